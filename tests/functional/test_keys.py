"""Coverage of anchors against loops over token sets, and the weights of tokens as a law."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from repair_lightning.functional.keys import coverage, coverage_matrix, inverse_document_frequency

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
