"""Coverage of anchors against loops over token sets, and the weights of tokens as a law."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from repair_lightning.functional import keys
from repair_lightning.functional.keys import (
    coverage,
    coverage_matrix,
    document_counts,
    highest_coverage,
    inverse_document_frequency,
    pairs_above,
)

VOCABULARY = 9


def padded(rows):
    """Ragged rows of ids as (n, width), -1 past each row's end."""
    width = max([1, *map(len, rows)])
    return torch.tensor([[*row, *[-1] * (width - len(row))] for row in rows], dtype=torch.long).reshape(-1, width)


def slow(prompt, anchor, weights):
    total = sum(weights[token].item() for token in anchor)
    return sum(weights[token].item() for token in anchor if token in prompt) / total if total else 0.0


token_rows = st.lists(st.lists(st.integers(0, VOCABULARY - 1), max_size=6), min_size=1, max_size=5)
token_weights = st.lists(st.floats(0.015625, 10, width=32), min_size=VOCABULARY, max_size=VOCABULARY).map(torch.tensor)


class TestCoverage:
    @given(prompts=token_rows, anchors=token_rows, weights=token_weights)
    def test_against_a_loop(self, prompts, anchors, weights):
        candidates = padded(anchors).expand(len(prompts), -1, -1)
        found = coverage(padded(prompts), candidates, weights)
        expected = torch.tensor([[slow(prompt, anchor, weights) for anchor in anchors] for prompt in prompts])
        torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-6)
        assert bool(((found >= 0) & (found <= 1 + 1e-5)).all())

    @given(prompts=token_rows, anchors=token_rows, weights=token_weights)
    def test_the_matrix_says_the_same(self, prompts, anchors, weights):
        one_by_one = coverage(padded(prompts), padded(anchors).expand(len(prompts), -1, -1), weights)
        at_once = coverage_matrix(padded(prompts), padded(anchors), weights)
        torch.testing.assert_close(at_once, one_by_one, rtol=1e-5, atol=1e-6)

    def test_pinned(self):
        """Weights 1, 2, 4 of the tokens 0, 1, 2. The prompt (1, 2, 8) covers 6 of 7, (2,) all, () and (8, 0) 0 of 1."""
        weights = torch.tensor([1.0, 2.0, 4.0, 0, 0, 0, 0, 0, 0])
        prompts, anchors = padded([[1, 2, 8]]), padded([[0, 1, 2], [2], [], [8, 0]])
        expected = torch.tensor([[6 / 7, 1.0, 0.0, 0.0]])
        torch.testing.assert_close(coverage(prompts, anchors[None], weights), expected)
        torch.testing.assert_close(coverage_matrix(prompts, anchors, weights), expected)

    def test_padding_is_no_token(self):
        """Token 0 stands nowhere in the prompt, and -1 stands in both: neither counts as found."""
        prompts, anchors = padded([[3], [3, 4]]), padded([[0], [0, 3]])
        expected = torch.tensor([[0.0, 0.5], [0.0, 0.5]])
        torch.testing.assert_close(coverage_matrix(prompts, anchors, torch.ones(VOCABULARY)), expected)
        torch.testing.assert_close(coverage(prompts, anchors.expand(2, -1, -1), torch.ones(VOCABULARY)), expected)

    @given(
        prompt=st.lists(st.integers(0, 8)), more=st.lists(st.integers(0, 8)), anchors=token_rows, weights=token_weights
    )
    def test_more_words_never_cover_less(self, prompt, more, anchors, weights):
        few = coverage_matrix(padded([prompt]), padded(anchors), weights)
        many = coverage_matrix(padded([prompt + more]), padded(anchors), weights)
        assert bool((many >= few - 1e-6).all())

    def test_nobody_and_nothing(self):
        some, none, nothing = padded([[1]]), torch.zeros(0, 3, dtype=torch.long), torch.zeros(2, 0, dtype=torch.long)
        weights = torch.ones(VOCABULARY)
        assert coverage_matrix(none, some, weights).shape == (0, 1)
        assert coverage_matrix(some, none, weights).shape == (1, 0)
        assert coverage_matrix(some, nothing, weights).tolist() == [[0.0, 0.0]]
        assert highest_coverage(none, some, weights).tolist() == [0.0]
        assert highest_coverage(nothing, some, weights).tolist() == [0.0]
        assert highest_coverage(some, none, weights).shape == (0,)
        assert [part.tolist() for part in pairs_above(none, some, weights, 0.5)] == [[], []]


def many_rows(number, seed, vocabulary=40):
    """Rows of up to 7 tokens, small numbers being common; holes and repeated tokens occur."""
    generator = torch.Generator().manual_seed(seed)
    rows = (vocabulary * torch.rand(number, 7, generator=generator) ** 2).long()
    return rows.masked_fill(torch.rand(rows.shape, generator=generator) < 0.3, -1)


class TestHighestCoverage:
    @given(prompts=token_rows, anchors=token_rows, weights=token_weights, below=st.sampled_from([0.3, 0.95, math.inf]))
    def test_against_the_dense_definition(self, prompts, anchors, weights, below):
        """Below a limit the highest coverage is that of the matrix with everything at or above it struck out."""
        matrix = coverage_matrix(padded(prompts), padded(anchors), weights)
        expected = matrix.masked_fill(matrix >= below, 0).amax(0)
        assert torch.equal(highest_coverage(padded(prompts), padded(anchors), weights, below), expected)

    @given(prompts=token_rows, anchors=token_rows, weights=token_weights, above=st.sampled_from([0.0, 0.5, 0.95]))
    def test_pairs_above(self, prompts, anchors, weights, above):
        matrix = coverage_matrix(padded(prompts), padded(anchors), weights)
        rows, edits = pairs_above(padded(prompts), padded(anchors), weights, above)
        pairs = sorted(zip(rows.tolist(), edits.tolist(), strict=True))
        assert pairs == [tuple(pair) for pair in (matrix > above).nonzero().tolist()]

    @pytest.mark.parametrize("below", [0.95, math.inf])
    def test_blocks_do_not_matter(self, monkeypatch, below):
        """300 prompts and 200 anchors in blocks of 64 x 3, at once, and each anchor alone: equal to the bit."""
        prompts, anchors, weights = many_rows(300, 0), many_rows(200, 1), torch.rand(40) + 0.1
        whole = highest_coverage(prompts, anchors, weights, below)
        pairs = pairs_above(prompts, anchors, weights, 0.5)
        alone = [highest_coverage(prompts, anchor[None], weights, below) for anchor in anchors]
        monkeypatch.setattr(keys, "_TABLE", 1)
        monkeypatch.setattr(keys, "_BLOCK", 192)
        assert torch.equal(highest_coverage(prompts, anchors, weights, below), whole)
        assert torch.equal(torch.cat(alone), whole)
        in_blocks = pairs_above(prompts, anchors, weights, 0.5)
        assert set(map(tuple, torch.stack(in_blocks, 1).tolist())) == set(map(tuple, torch.stack(pairs, 1).tolist()))
        one_by_one = coverage(prompts, anchors.expand(300, -1, -1), weights)
        torch.testing.assert_close(whole, one_by_one.masked_fill(one_by_one >= below, 0).amax(0))

    def test_pinned(self):
        """Weights 1, 2, 4. Of the anchor (0, 1, 2) the prompts cover 7/7, 6/7 and 1/7."""
        weights = torch.tensor([1.0, 2.0, 4.0, 0, 0, 0, 0, 0, 0])
        prompts, anchors = padded([[0, 1, 2], [2, 1], [0]]), padded([[0, 1, 2]])
        found = [highest_coverage(prompts, anchors, weights, below).item() for below in (2, 1, 0.8, 0.1)]
        assert found == pytest.approx([1, 6 / 7, 1 / 7, 0])


class TestDocumentCounts:
    @given(rows=token_rows)
    def test_against_a_loop(self, rows):
        expected = [float(sum(token in row for row in rows)) for token in range(VOCABULARY)]
        assert document_counts(padded(rows), VOCABULARY).tolist() == expected

    def test_many_rows(self):
        rows = many_rows(5000, 2)
        expected = torch.stack([(rows == token).any(-1).sum() for token in range(40)]).float()
        assert torch.equal(document_counts(rows, 40), expected)
        assert document_counts(torch.zeros(0, 0, dtype=torch.long), 3).tolist() == [0, 0, 0]
        assert document_counts(torch.zeros(2, 0, dtype=torch.long), 3).tolist() == [0, 0, 0]


class TestInverseDocumentFrequency:
    def test_pinned(self):
        """3 documents: never seen log(4 / 0.5)^2 = log(8)^2, in all log(4 / 3.5)^2."""
        found = inverse_document_frequency(torch.tensor([0, 3]), 3)
        torch.testing.assert_close(found, torch.tensor([math.log(8) ** 2, math.log(4 / 3.5) ** 2]))

    @pytest.mark.parametrize("documents", [0, 1, 2, 7, 10_000, 1_000_000])
    def test_positive_and_falling(self, documents):
        counts = torch.linspace(0, documents, min(documents + 1, 1000)).round()
        weights = inverse_document_frequency(counts, documents)
        assert bool((weights > 0).all())
        assert bool((weights.diff() <= 0).all())
        assert documents == 0 or weights[0] > weights[-1]
