"""The map of the edits' features: principal components, against the covariance's eigenvectors."""

from __future__ import annotations

import numpy as np
import pytest

from repair_lightning.scoring.feature_map import feature_map, principal_components


@pytest.mark.parametrize("shape", [(30, 6), (6, 30)])
def test_against_the_covariance(shape):
    features = np.random.default_rng(1).normal(size=shape) * np.linspace(3, 1, shape[1])
    places, shares = principal_components(features)
    centred = features - features.mean(0)
    values, vectors = np.linalg.eigh(np.cov(centred.T))
    expected = centred @ vectors[:, ::-1][:, :2]
    assert shares == pytest.approx(values[::-1][:2] / values.sum())
    for found, other in zip(places.T, expected.T, strict=True):
        assert np.abs(found) == pytest.approx(np.abs(other), abs=1e-9)
        assert abs(np.corrcoef(found, other)[0, 1]) == pytest.approx(1)
        assert found[np.abs(found).argmax()] > 0  # the sign is not left to chance


def test_fewer_edits_than_components():
    for number in (0, 1):
        places, shares = principal_components(np.ones((number, 5)))
        assert places.shape == (number, 2)
        assert shares.tolist() == [0, 0]
    places, shares = principal_components(np.ones((4, 5)))  # no variance at all
    assert np.abs(places).max() < 1e-9
    assert np.isfinite(shares).all()
    places, shares = principal_components(np.array([[0.0, 1.0], [2.0, 1.0]]))
    assert np.abs(places) == pytest.approx(np.array([[1, 0], [1, 0]]))
    assert shares == pytest.approx([1, 0])


def test_of_an_editor(written):
    editor, stream = written
    found = feature_map(editor, stream.edits)
    assert list(found["edits"]) == [edit.id for edit in stream.edits]
    assert 0 < found["explained"][1] <= found["explained"][0] < 1
    few = feature_map(editor, stream.edits, most=4)
    assert list(few["edits"]) == [edit.id for edit in stream.edits[::2]]


def test_features_that_are_not_finite_have_no_place(written):
    editor, stream = written

    class Broken:
        def features(self, edits):
            found = editor.features(edits)
            found[1] = np.nan
            return found

    found = feature_map(Broken(), stream.edits)  # type: ignore[arg-type]
    assert list(found["edits"]) == [edit.id for i, edit in enumerate(stream.edits) if i != 1]
