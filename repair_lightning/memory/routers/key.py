"""The key router: the edit that a prompt is closest to answers it, if the prompt names its subject and asks the same.

Ours, not the paper's: the activation score finds the right shard for fewer prompts than the nearest key does.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import faiss
import torch
from torch import Tensor
from torch.nn.functional import normalize

from repair_lightning.functional.keys import (
    coverage,
    document_counts,
    highest_coverage,
    inverse_document_frequency,
    pairs_above,
)
from repair_lightning.memory.query import Check, Choice, Query, pad_right
from repair_lightning.memory.routers.base import Anchor, Neighbours, Router
from repair_lightning.memory.side_memory import SideMemory
from repair_lightning.types import BASE

_PER_EDIT = ("shards", "anchors", "prompts", "negatives", "radii", "floors", "limits", "named")
_PROGRESS = ("changed", "renewed_at", "calibrated_on")

_FULL = 0.95
"""Coverage that counts as naming the subject in full."""

_UNKNOWN = -1.0
"""Stands for the nearest negative of an edit that was not calibrated yet."""


class KeyEncoder:
    """Prompts as unit vectors: what they are about (rare tokens' embeddings) beside what is asked (last hidden state).

    Both halves are centred on irrelevant prompts. `state_weight` scales the second half.
    """

    def __init__(self, state_weight: float = 0.5) -> None:
        self.state_weight = state_weight
        self.embeddings = torch.zeros(0, 0)
        self.token_weights = torch.zeros(0)
        self.centres = (torch.zeros(0), torch.zeros(0))

    def fit(self, background: Query, embeddings: Tensor) -> None:
        """Token weights and centres from irrelevant prompts; `embeddings` is the base's input table (V, E)."""
        self.embeddings = embeddings
        counts = document_counts(background.words, len(embeddings))
        self.token_weights = inverse_document_frequency(counts, len(background))
        self.centres = (self._lexical(background).mean(0), background.last_hidden().cpu().mean(0))

    def __call__(self, query: Query) -> Tensor:
        """Keys (B, E + D), unit length, float32 on the CPU."""
        lexical = normalize(self._lexical(query) - self.centres[0], dim=-1)
        state = normalize(query.last_hidden().cpu() - self.centres[1], dim=-1)
        return normalize(torch.cat([lexical, self.state_weight * state], dim=-1), dim=-1)

    def _lexical(self, query: Query) -> Tensor:
        tokens = query.words
        weights = self.token_weights[tokens.clamp_min(0)] * (tokens >= 0)
        vectors = self.embeddings[tokens.clamp_min(0).to(self.embeddings.device)].float().cpu()
        return torch.einsum("bt,bte->be", weights, vectors) / weights.sum(-1, keepdim=True).clamp_min(1e-12)


class _Rows:
    """A table (N, W) that grows at its end in amortised constant time. Rows once written are never written again."""

    def __init__(self, table: Tensor) -> None:
        self.table, self.size = table, len(table)

    def get(self) -> Tensor:
        """The table (N, W); no copy."""
        return self.table[: self.size]

    def append(self, rows: Tensor) -> None:
        """Put rows (M, W) below the others."""
        size = self.size + len(rows)
        if size > len(self.table):
            larger = rows.new_empty(size + size // 4, rows.shape[1])
            larger[: self.size] = self.get().reshape(-1, rows.shape[1])
            self.table = larger
        self.table[self.size : size] = rows
        self.size = size


class KeyRouter(Router):
    """The prompt's nearest edit answers, if the prompt names what that edit is about.

    FAISS finds the nearest keys; among them an edit is eligible where its anchor's coverage by the prompt exceeds the
    edit's radius. The radius is calibrated per edit: above the coverage that irrelevant prompts and the other edits'
    prompts (as neighbours) reach, by `caution` of the way to full coverage. Of one subject only the relation that was
    edited is answered: the prompt's last state must be closer to the edit's than its made-up neighbours' are.

    Calibration compares all pairs of edits only when it is renewed: with fresh token weights, for every edit, once the
    edits that came and went since the last renewal are a quarter of those it saw (always, up to `always_renewed`
    edits). In between the weights stand and only new edits are compared with the others, so that a window costs as
    much as its new edits times all; a forgotten edit's prompt still holds its neighbours back until the next renewal.

    Args:
        candidates: how many nearest keys are looked at.
        caution: where between the nearest known negative (0) and full coverage (1) the radius lies, for edits whose
            subject is known.
        caution_unnamed: the same for edits whose subject is not: a rephrase covers less of a whole prompt.
        relation_caution: where between the median of an edit's made-up neighbours (same subject, other relation) and 1
            the floor of the last states' cosine lies.
        state_weight: weight of the last hidden state in the key, against the rare tokens' embeddings.
    """

    always_renewed: ClassVar[int] = 4096
    """Up to so many edits every calibration is from scratch: that takes 30 ms there."""
    name = "key"
    needs_owned = False
    needs_neighbours = True

    def __init__(
        self,
        candidates: int = 64,
        caution: float = 0.6,
        caution_unnamed: float = 0.2,
        relation_caution: float = 0.15,
        state_weight: float = 0.5,
    ) -> None:
        self.candidates = candidates
        self.caution, self.caution_unnamed, self.relation_caution = caution, caution_unnamed, relation_caution
        self.encoder = KeyEncoder(state_weight)
        self.ids: list[str] = []
        self._keys = _Rows(torch.zeros(0, 0))
        self.shards = torch.zeros(0, dtype=torch.long)
        self.anchors = torch.zeros(0, 0, dtype=torch.long)
        self.prompts = torch.zeros(0, 0, dtype=torch.long)
        self.negatives = torch.zeros(0)
        self.radii = torch.zeros(0)
        self.floors = torch.zeros(0)
        self.limits = torch.zeros(0)
        self.named = torch.zeros(0, dtype=torch.bool)
        self.token_weights = torch.zeros(0)
        self._background_counts = torch.zeros(0)
        self._background_size = 0
        self.changed, self.renewed_at, self.calibrated_on = 0, 0, ""

    @property
    def keys(self) -> Tensor:
        """The edits' keys (N, E + D)."""
        return self._keys.get()

    def options(self) -> dict[str, Any]:
        """As given to the constructor."""
        names = ("candidates", "caution", "caution_unnamed", "relation_caution")
        return {name: getattr(self, name) for name in names} | {"state_weight": self.encoder.state_weight}

    def fit(self, background: Query, embeddings: Tensor) -> None:
        """What is common to all prompts, from irrelevant ones. A router that holds edits keeps what it made their keys
        with, so a resumed one goes on as it was."""
        if self.ids:
            self.bind(embeddings)
            return
        self.encoder.fit(background, embeddings)
        self._background_counts = document_counts(background.words, len(embeddings))
        self._background_size = len(background)
        # Until the first calibration counts the edits' words too.
        self.token_weights = self.encoder.token_weights.clone()

    def add(
        self,
        ids: Sequence[str],
        anchors: Sequence[Anchor],
        prompts: Query,
        shards: Sequence[int],
        neighbours: Neighbours | None = None,
    ) -> None:
        """Keys of the edits' own prompts. Radii follow with the next calibration; until then they ask for all."""
        self.forget(ids)
        self.ids += ids
        keys = self.encoder(prompts)
        self._keys.append(keys)
        self.shards = torch.cat([self.shards, torch.tensor(list(shards), dtype=torch.long)])
        self.anchors = _stack_ragged(self.anchors, pad_right([anchor.tokens for anchor in anchors]))
        self.named = torch.cat([self.named, torch.tensor([anchor.named for anchor in anchors])])
        self.floors = torch.cat([self.floors, self._floors(keys, neighbours)])
        self.prompts = _stack_ragged(self.prompts, prompts.words)
        self.negatives = torch.cat([self.negatives, torch.full((len(ids),), _UNKNOWN)])
        self.radii = torch.cat([self.radii, torch.full((len(ids),), _FULL)])
        self.limits = torch.cat([self.limits, self.floors[len(self.limits) :]])
        self.changed += len(ids)

    def forget(self, ids: Sequence[str]) -> None:
        """Drop edits; the others keep their order."""
        gone = set(ids)
        if gone.isdisjoint(self.ids):
            return
        keep = torch.tensor([i for i, name in enumerate(self.ids) if name not in gone], dtype=torch.long)
        self.changed += len(self.ids) - len(keep)
        self.ids = [name for name in self.ids if name not in gone]
        self._keys = _Rows(self.keys[keep])
        for field in _PER_EDIT:
            setattr(self, field, getattr(self, field)[keep])

    def reassign(self, shards: Sequence[int], fused: int) -> None:
        """The edits of the given shards belong to `fused`."""
        self.shards = torch.where(torch.isin(self.shards, torch.tensor(list(shards))), fused, self.shards)

    def calibrate(self, memory: SideMemory, owned: Mapping[int, Query], background: Query) -> None:
        """Radii and limits from the edits' own prompts and the irrelevant ones: of all edits where a renewal is due,
        else of those that came since, and of those that they are negatives of."""
        if not self.ids:
            return
        seen = hashlib.sha256(background.words.contiguous().numpy().tobytes()).hexdigest()
        if self._renewal_due() or seen != self.calibrated_on:
            self._renew_weights()
            self.calibrated_on = seen
        new = self.negatives == _UNKNOWN
        if not new.any():
            return
        self.negatives = self._nearest_negatives(new, background.words)
        caution = torch.where(self.named, self.caution, self.caution_unnamed)
        self.radii = (self.negatives + caution * (1 - self.negatives)).clamp_max(_FULL)
        self.limits = torch.where(new, self.floors, self.limits)
        if self.encoder.state_weight:
            self.limits = torch.maximum(self.limits, self._above(new, background))

    def _renewal_due(self) -> bool:
        """Whether the edits changed by a quarter since token weights were renewed; any change will do while few."""
        few = len(self.ids) <= self.always_renewed
        return self.changed * 4 >= self.renewed_at or (few and self.changed > 0)

    def _renew_weights(self) -> None:
        """Token weights anew, from the irrelevant prompts and the edits' own; nothing calibrated before stands."""
        counts = self._background_counts + document_counts(self.prompts, len(self._background_counts))
        self.token_weights = inverse_document_frequency(counts, self._background_size + len(self.ids))
        self.negatives = torch.full_like(self.negatives, _UNKNOWN)
        self.changed, self.renewed_at = 0, len(self.ids)

    def _nearest_negatives(self, new: Tensor, unrelated: Tensor) -> Tensor:
        """The highest coverage that a prompt which is not about an edit reaches (N,), where `new` (N,) is true from
        scratch, elsewhere raised by the new prompts. Its own prompt and others that name the subject are no
        negatives."""
        weights, negatives = self.token_weights, self.negatives.clone()
        anchors = self.anchors[new]
        by_edits = highest_coverage(self.prompts, anchors, weights, below=_FULL)
        negatives[new] = torch.maximum(by_edits, highest_coverage(unrelated, anchors, weights))
        by_new = highest_coverage(self.prompts[new], self.anchors[~new], weights, below=_FULL)
        negatives[~new] = torch.maximum(negatives[~new], by_new)
        return negatives

    def _above(self, new: Tensor, background: Query) -> Tensor:
        """How alike a prompt must ask so that no irrelevant prompt which names a new edit's subject gets through: (N,).

        Radii lie above every irrelevant prompt's coverage or at full, so only those prompts that exceed full matter.
        """
        at = new.nonzero()[:, 0]
        rows, edits = pairs_above(background.words, self.anchors[at], self.token_weights, _FULL)
        worst = torch.full((len(self.ids),), -1.0)
        if len(rows):
            rows, which = rows.unique(return_inverse=True)
            keys = self.encoder(background.rows(rows))
            for place, edit in zip(which.split(1024), at[edits].split(1024), strict=True):
                worst.scatter_reduce_(0, edit, self._state_similarity(keys[place], self.keys[edit]), reduce="amax")
        return worst + self.relation_caution * (1 - worst) * (worst > -1)

    def _floors(self, keys: Tensor, neighbours: Neighbours | None) -> Tensor:
        """How alike (cosine of the last states) a prompt must ask: beyond the median of the edit's own neighbours."""
        floors = torch.full((len(keys),), -1.0)
        if neighbours is None or not self.encoder.state_weight:  # keys without states cannot tell relations apart
            return floors
        alike = self._state_similarity(self.encoder(neighbours.prompts), keys[neighbours.of])
        edits, median = _medians(alike, neighbours.of)
        floors[edits] = median + self.relation_caution * (1 - median)
        return floors

    def _state_similarity(self, keys: Tensor, others: Tensor) -> Tensor:
        weight = self.encoder.state_weight
        size = len(self.encoder.centres[0])
        return (keys[..., size:] * others[..., size:]).sum(-1) * (1 + weight**2) / max(weight**2, 1e-12)

    def route(self, query: Query, memory: SideMemory) -> Choice:
        """Nearest eligible edit's shard, else the base."""
        if not self.ids:
            return Choice.base(len(query))
        keys = self.encoder(query)
        similarity, found = self._search(keys)
        alike = self._state_similarity(keys[:, None], self.keys[found])
        covered = coverage(query.words, self.anchors[found], self.token_weights)
        radii = self.radii[found]
        eligible = (covered > radii) & (alike >= self.limits[found])
        rank = covered + similarity + 4 * eligible
        best = rank.argmax(-1, keepdim=True)
        pick, fires, score, radius, likeness = (
            values.gather(1, best)[:, 0] for values in (found, eligible, covered, radii, alike)
        )
        limits = self.limits[pick]
        limits = limits.where(limits > -1, -math.inf)  # a cosine: any will do
        asks_the_same = Check("likeness of what is asked", likeness, limits)
        nearest = tuple(self.ids[i] for i in pick.tolist())
        return Choice(torch.where(fires, self.shards[pick], BASE), score, radius, nearest, (asks_the_same,))

    def _search(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest edits' similarities and places, (B, C) each: exact search in the keys as they lie in memory."""
        number = min(self.candidates, len(self.ids))
        similarity, found = faiss.knn(keys.numpy(), self.keys.numpy(), number, metric=faiss.METRIC_INNER_PRODUCT)
        return torch.from_numpy(similarity), torch.from_numpy(found)

    def state_dict(self) -> dict[str, Any]:
        """Keys, radii, anchors, what is known of the background and when it was renewed; the base's embeddings are not
        copied."""
        state: dict[str, Any] = {field: getattr(self, field).contiguous() for field in (*_PER_EDIT, "token_weights")}
        state["keys"] = self.keys.clone()  # a view would be saved with the room behind it
        state |= {field: getattr(self, field) for field in _PROGRESS}
        state |= {"ids": list(self.ids), "background_size": self._background_size}
        state |= {"background_counts": self._background_counts, "encoder_weights": self.encoder.token_weights}
        return state | {"lexical_centre": self.encoder.centres[0], "state_centre": self.encoder.centres[1]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Accepts what :meth:`state_dict` gave; give the embeddings with :meth:`bind`."""
        for field in (*_PER_EDIT, *_PROGRESS, "token_weights"):
            setattr(self, field, state[field])
        self._keys = _Rows(state["keys"])
        self.ids = list(state["ids"])
        self._background_size = int(state["background_size"])
        self._background_counts = state["background_counts"]
        self.encoder.token_weights = state["encoder_weights"]
        self.encoder.centres = (state["lexical_centre"], state["state_centre"])

    def bind(self, embeddings: Tensor) -> None:
        """Give the base's input embeddings (V, E) to a loaded router."""
        self.encoder.embeddings = embeddings


def _stack_ragged(above: Tensor, below: Tensor) -> Tensor:
    width = max(above.shape[1], below.shape[1])
    padded = [torch.nn.functional.pad(rows, (0, width - rows.shape[1]), value=-1) for rows in (above, below)]
    return torch.cat(padded)


def _medians(values: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """The groups (G,) that occur and the median (G,) of each one's values; the lower of two, as `Tensor.median`."""
    order = values.argsort()
    order = order[groups[order].argsort(stable=True)]
    found, sizes = groups.unique(return_counts=True)
    return found, values[order[sizes.cumsum(0) - sizes + (sizes - 1) // 2]]
