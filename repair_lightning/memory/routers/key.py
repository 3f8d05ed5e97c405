"""The key router: the edit that a prompt is closest to answers it, if the prompt names its subject and asks the same.

Ours, not the paper's: the activation score finds the right shard for fewer prompts than the nearest key does.
"""

from __future__ import annotations

import hashlib
import json
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
from repair_lightning.memory.routers.inverted import InvertedFile, cells_of, centroids_of
from repair_lightning.memory.rows import NUMBERS, Part, Rows, joined
from repair_lightning.memory.side_memory import SideMemory
from repair_lightning.types import BASE

_PER_EDIT = ("shards", "anchors", "prompts", "negatives", "radii", "floors", "limits", "named")
_PROGRESS = ("changed", "renewed_at", "calibrated_on")
_CELLS = ("centroids", "cells", "clustered")
_FIXED = ("anchors", "prompts", "floors", "named")
"""What of an edit is not changed any more once it has been added, besides its key and its id."""
_RAGGED = ("anchors", "prompts")

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

    From `two_level_from` edits on the nearest keys are looked up in two levels, in the cells about the nearest of some
    centroids. These are learnt from the keys that are there, and anew whenever the edits have doubled.

    Args:
        candidates: how many nearest keys are looked at.
        caution: where between the nearest known negative (0) and full coverage (1) the radius lies, for edits whose
            subject is known.
        caution_unnamed: the same for edits whose subject is not: a rephrase covers less of a whole prompt.
        relation_caution: where between the median of an edit's made-up neighbours (same subject, other relation) and 1
            the floor of the last states' cosine lies.
        state_weight: weight of the last hidden state in the key, against the rare tokens' embeddings.
        two_level_from: number of edits from which on few cells are searched; below, all keys are, and the nearest are
            found exactly.
    """

    always_renewed: ClassVar[int] = 4096
    """Up to so many edits every calibration is from scratch: that takes 30 ms there."""
    probes: ClassVar[int] = 32
    """Cells that a search goes through."""
    most_wasted: ClassVar[float] = 0.25
    """Share of forgotten edits in the cells from which on these are filled anew."""
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
        two_level_from: int = 20_000,
    ) -> None:
        self.candidates, self.two_level_from = candidates, two_level_from
        self.caution, self.caution_unnamed, self.relation_caution = caution, caution_unnamed, relation_caution
        self.encoder = KeyEncoder(state_weight)
        self.ids: list[str] = []
        self.numbers = torch.zeros(0, dtype=torch.long)  # ascending; no two edits ever have the same
        self.next_number = 0
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
        self.centroids = torch.zeros(0, 0)
        self.cells = torch.zeros(0, dtype=torch.long)
        self.clustered = 0
        self._inverted: InvertedFile | None = None

    @property
    def keys(self) -> Tensor:
        """The edits' keys (N, E + D)."""
        return self._keys.get()

    def options(self) -> dict[str, Any]:
        """As given to the constructor."""
        names = ("candidates", "caution", "caution_unnamed", "relation_caution", "two_level_from")
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

    def describe(
        self, anchors: Sequence[Anchor], prompts: Query, shards: Sequence[int], neighbours: Neighbours | None = None
    ) -> dict[str, Tensor]:
        """Keys of the edits' own prompts, anchors, floors."""
        keys = self.encoder(prompts)
        return {
            "keys": keys,
            "shards": torch.tensor(list(shards), dtype=torch.long),
            "anchors": pad_right([anchor.tokens for anchor in anchors]),
            "named": torch.tensor([anchor.named for anchor in anchors], dtype=torch.bool),
            "floors": self._floors(keys, neighbours),
            "prompts": prompts.words,
        }

    def insert(self, ids: Sequence[str], described: Mapping[str, Tensor]) -> None:
        """Keys of the edits' own prompts. Radii follow with the next calibration; until then they ask for all."""
        self.forget(ids)
        self.ids += ids
        self._keys.append(described["keys"])
        for field in ("shards", "named", "floors"):
            setattr(self, field, torch.cat([getattr(self, field), described[field]]))
        for field in ("anchors", "prompts"):
            setattr(self, field, _stack_ragged(getattr(self, field), described[field]))
        self.negatives = torch.cat([self.negatives, torch.full((len(ids),), _UNKNOWN)])
        self.radii = torch.cat([self.radii, torch.full((len(ids),), _FULL)])
        self.limits = torch.cat([self.limits, self.floors[len(self.limits) :]])
        self.numbers = torch.cat([self.numbers, torch.arange(len(ids)) + self.next_number])
        self.next_number += len(ids)
        self.changed += len(ids)
        self._sort_into_cells(described["keys"])

    def forget(self, ids: Sequence[str]) -> None:
        """Drop edits; the others keep their order."""
        gone = set(ids)
        if gone.isdisjoint(self.ids):
            return
        keep = torch.tensor([i for i, name in enumerate(self.ids) if name not in gone], dtype=torch.long)
        self.changed += len(self.ids) - len(keep)
        self.ids = [name for name in self.ids if name not in gone]
        if self._inverted is not None:
            left = torch.ones(len(self.numbers), dtype=torch.bool)
            left[keep] = False
            self._inverted.drop(self.numbers[left])
        self._keys = _Rows(self.keys[keep])
        for field in (*_PER_EDIT, "numbers", *(["cells"] if self.clustered else [])):
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
        """The nearest edits' similarities and places, (B, C) each: of all, or where there are many, of those in the
        nearest cells, and of all for a prompt about which these hold too few."""
        number = min(self.candidates, len(self.ids))
        if not self.clustered or len(self.ids) < self.two_level_from:
            return self._search_all(keys, number)
        found = self._in_cells().search(keys, number)
        places = torch.searchsorted(self.numbers, found).sort(dim=-1).values
        similarity = torch.einsum("bw,bcw->bc", keys, self.keys[places])
        similarity, order = similarity.sort(dim=-1, descending=True, stable=True)
        places = places.gather(1, order)
        few = (found < 0).any(-1)
        if bool(few.any()):
            similarity[few], places[few] = self._search_all(keys[few], number)
        return similarity, places

    def _search_all(self, keys: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Exact search in the keys as they lie in memory."""
        similarity, found = faiss.knn(keys.numpy(), self.keys.numpy(), number, metric=faiss.METRIC_INNER_PRODUCT)
        return torch.from_numpy(similarity), torch.from_numpy(found)

    def _sort_into_cells(self, new: Tensor) -> None:
        """Find the cells of the last edits, whose keys are `new`; learn the cells first where there are none yet, or
        half of the edits have come since."""
        if len(self.ids) >= self.two_level_from and len(self.ids) >= 2 * self.clustered:
            self.centroids, self.clustered, self._inverted = centroids_of(self.keys), len(self.ids), None
            self.cells = cells_of(self.keys, self.centroids)
        elif self.clustered:
            cells = cells_of(new, self.centroids)
            self.cells = torch.cat([self.cells, cells])
            if self._inverted is not None:
                self._inverted.add(new, self.numbers[-len(new) :], cells)

    def _in_cells(self) -> InvertedFile:
        """The edits by their cells; made when it is needed."""
        if self._inverted is None or self._inverted.wasted > self.most_wasted:
            self._inverted = InvertedFile(self.centroids, self.probes)
            self._inverted.add(self.keys, self.numbers, self.cells)
        return self._inverted

    def state_dict(self) -> dict[str, Any]:
        """Keys, radii, anchors, what is known of the background and when it was renewed; the base's embeddings are not
        copied."""
        state = self.state_beside_rows() | {field: getattr(self, field).contiguous() for field in _FIXED}
        state["keys"] = self.keys.clone()  # a view would be saved with the room behind it
        return state | {"numbers": self.numbers, "ids": list(self.ids)}

    def state_beside_rows(self) -> dict[str, Any]:
        """What changes with every calibration, and what is there once."""
        fields = [field for field in (*_PER_EDIT, "token_weights") if field not in _FIXED]
        state: dict[str, Any] = {field: getattr(self, field).contiguous() for field in fields}
        state |= {field: getattr(self, field) for field in (*_PROGRESS, *(_CELLS if self.clustered else ()))}
        state |= {"next_number": self.next_number, "background_size": self._background_size}
        state |= {f"{field}_width": getattr(self, field).shape[1] for field in _RAGGED}
        state |= {"background_counts": self._background_counts, "encoder_weights": self.encoder.token_weights}
        return state | {"lexical_centre": self.encoder.centres[0], "state_centre": self.encoder.centres[1]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Accepts what :meth:`state_dict` gave; give the embeddings with :meth:`bind`."""
        for field in (*_PER_EDIT, *_PROGRESS, "token_weights"):
            setattr(self, field, state[field])
        self._keys = _Rows(state["keys"])
        self.ids = list(state["ids"])
        self.numbers = state.get("numbers", torch.arange(len(self.ids)))
        self.next_number = max(self.next_number, state.get("next_number", len(self.ids)))  # never given twice
        empty = (torch.zeros(0, 0), torch.zeros(0, dtype=torch.long), 0)
        self.centroids, self.cells, self.clustered = (
            state.get(field, default) for field, default in zip(_CELLS, empty, strict=True)
        )
        self._inverted = None
        if not self.clustered:
            self._sort_into_cells(self.keys[:0])  # what an earlier release has left may be many
        self._background_size = int(state["background_size"])
        self._background_counts = state["background_counts"]
        self.encoder.token_weights = state["encoder_weights"]
        self.encoder.centres = (state["lexical_centre"], state["state_centre"])

    def rows(self) -> Rows:
        """The edits' ids, keys, words and floors."""

        def take(start: int, stop: int) -> dict[str, Tensor]:
            ids = torch.frombuffer(bytearray(json.dumps(self.ids[start:stop]).encode()), dtype=torch.uint8)
            fixed = {field: getattr(self, field)[start:stop] for field in _FIXED}
            return {"ids": ids, "keys": self.keys[start:stop], **fixed}

        return Rows(self.numbers, take)

    @staticmethod
    def state_of_rows(state: Mapping[str, Any], parts: Sequence[Part]) -> dict[str, Any]:
        """The whole state again."""
        known = [(part, json.loads(part.tensors["ids"].numpy().tobytes())) for part in parts]
        ids = [id for part, names in known for id, kept in zip(names, part.kept.tolist(), strict=True) if kept]
        plain = {name: joined(parts, name) for name in (NUMBERS, "keys", "floors", "named")}
        ragged = {name: joined(parts, name, fill=-1, width=state[f"{name}_width"]) for name in _RAGGED}
        return {**state, "ids": ids, **plain, **ragged}

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
