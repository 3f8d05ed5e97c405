"""Running moments are those of everything so far."""

import pytest
import torch

from repair_lightning.functional.moments import RunningMoments


@pytest.mark.parametrize("parts", [[5], [1, 1, 1], [2, 30, 1, 7]])
def test_parts_and_the_whole_agree(parts):
    features = torch.randn(sum(parts), 4, generator=torch.Generator().manual_seed(0)) * 3 + 100
    found = RunningMoments.none(4)
    for part in features.split(parts):
        found = found.with_(part)
    torch.testing.assert_close(found.mean, features.mean(0))
    wanted = (features - features.mean(0)) / features.std(0)
    torch.testing.assert_close(found.normalise(features), wanted, rtol=1e-3, atol=1e-3)
    assert found.count == len(features)


def test_what_never_varies_stays_finite():
    found = RunningMoments.none(2).with_(torch.ones(3, 2))
    assert torch.equal(found.normalise(torch.ones(1, 2)), torch.zeros(1, 2))
