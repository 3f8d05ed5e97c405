"""A space in which wordings of one question lie together: linear discriminants of a base's own states.

Shapes: n states of width D, R relations of several wordings each, k dimensions of the space.
Fisher's discriminant analysis: states are whitened by how wordings of one relation differ, then turned to the
directions in which relations differ most. Nothing of any edit goes into it. Beside the states stand the words: the
weighted share that two wordings have in common. What the two see differs, so their mean is told apart better than
either.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

SHRINKAGE = 0.1  # added to the scatter within relations, as a share of its mean diagonal
DIMENSIONS = 256  # most dimensions of the space
DEVIATIONS = 4.0  # so many deviations above the median of likenesses, two wordings count as one question


@dataclass(frozen=True)
class RelationSpace:
    """Directions of states, `projection` (D, k), from `centre` (D,), what all states share; two wordings count as one
    question where they are :func:`alike` above `limit`, as a share of pairs of different relations is."""

    centre: Tensor
    projection: Tensor
    limit: float

    def __call__(self, states: Tensor) -> Tensor:
        """States (n, D) as unit vectors (n, k), float32. What is not finite becomes zero: it is like nothing."""
        if not len(self.centre):
            return states.new_zeros(len(states), 0)
        found = normalize(normalize(states.float() - self.centre, dim=-1) @ self.projection, dim=-1)
        return torch.where(found.isfinite().all(-1, keepdim=True), found, torch.zeros_like(found))


def no_space() -> RelationSpace:
    """Before anything is learnt."""
    return RelationSpace(torch.zeros(0), torch.zeros(0, 0), 1.0)


def alike(cosine: Tensor, in_common: Tensor) -> Tensor:
    """How much two wordings ask the same, in [-1, 1], from their cosine in the space and their words in common."""
    return (cosine + in_common) / 2


def words_in_common(holds: Tensor, weights: Tensor) -> Tensor:
    """The weighted share of the words of either text that both have, (n, n) in [0, 1], for texts that hold words or not
    (n, V) and the words' weights (V,)."""
    holds = holds.float()
    both = (holds * weights) @ holds.T
    sizes = both.diagonal()
    return both / (sizes[:, None] + sizes[None] - both).clamp_min(1e-12)


def fit_relations(states: Tensor, relation: Tensor, in_common: Tensor, false_rate: float) -> RelationSpace:
    """The space of a bank of wordings.

    Args:
        states: (n, D) of the wordings.
        relation: (n,) which relation each belongs to.
        in_common: (n, n) their words in common.
        false_rate: share of pairs of different relations that may lie above the limit, in (0, 1). It is measured on
            relations that the space was not learnt from, half of them at a time.

    Wordings whose states are not finite are left out; where too few are left, the space is like nothing.
    """
    sound = states.isfinite().all(-1)
    states, relation, in_common = states[sound], relation[sound], in_common[sound][:, sound]
    if not all((relation % 2 == half).sum() > 1 for half in (0, 1)):
        return no_space()
    found = []
    for half in (0, 1):
        inside = relation % 2 == half
        centre, projection = _discriminants(states[inside], relation[inside])
        apart = RelationSpace(centre, projection, 0.0)(states[~inside])
        other = relation[~inside][:, None] != relation[~inside][None]
        both = alike(apart @ apart.T, in_common[~inside][:, ~inside])
        found.append(torch.quantile(both[other][::7].double(), 1 - false_rate))
    return RelationSpace(*_discriminants(states, relation), float(sum(found) / 2))


def usual_limit(likeness: Tensor) -> float:
    """From which likeness on two wordings count as one question, from that of pairs (p,), most of which ask different
    things.

    The median and the spread below it are those of pairs that ask different things, whatever share of the others asks
    the same: an empirical null, fitted to the half that no match reaches.
    """
    median = likeness.double().quantile(0.5)
    below = likeness[likeness < median].double() - median
    return float(median + DEVIATIONS * below.square().mean().sqrt()) if len(below) else 1.0


def _discriminants(states: Tensor, relation: Tensor) -> tuple[Tensor, Tensor]:
    states = states.double()
    centre = states.mean(0)
    directions = normalize(states - centre, dim=-1)
    known, index = relation.unique(return_inverse=True)
    sizes = index.bincount().double()[:, None]
    means = directions.new_zeros(len(known), states.shape[1]).index_add(0, index, directions) / sizes
    whitened = _whitening(directions - means[index], max(len(states) - len(known), 1))
    _, _, found = torch.linalg.svd(whitened(means - means.mean(0)), full_matrices=False)
    projection = whitened(found[: min(DIMENSIONS, len(known) - 1)]).T.float()
    return centre.float(), projection.contiguous()  # as it is stored: a product differs in its last bits by the layout


def _whitening(apart: Tensor, freedom: int) -> Callable[[Tensor], Tensor]:
    """What makes rows (m, D) have the same variance in all directions, where what is `apart` (n, D) has it with so many
    degrees of freedom: its scatter matrix, shrunk, to the power of -1/2. The smaller of the n by n and D by D matrices
    is taken apart: a large base's D by D takes minutes."""
    n, d = apart.shape
    least = (SHRINKAGE * apart.square().sum() / freedom / d).clamp_min(SHRINKAGE * 1e-12)
    within, axes = torch.linalg.eigh((apart @ apart.T if n < d else apart.T @ apart) / freedom)
    root = (within.clamp_min(0) + least).sqrt()
    if n >= d:
        return lambda rows: rows @ (axes / root) @ axes.T
    inner = -axes / (root * least.sqrt() * (root + least.sqrt())) @ axes.T / freedom
    return lambda rows: rows * least.rsqrt() + rows @ apart.T @ inner @ apart
