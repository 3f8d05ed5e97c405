"""The key router: the edit that a prompt is closest to answers it, if the prompt names its subject and asks the same.

Ours, not the paper's: the activation score finds the right shard for fewer prompts than the nearest key does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import faiss
import torch
from torch import Tensor
from torch.nn.functional import normalize

from repair_lightning.functional.keys import coverage, coverage_matrix, inverse_document_frequency
from repair_lightning.memory.query import Choice, Query, pad_right
from repair_lightning.memory.routers.base import Anchor, Neighbours, Router
from repair_lightning.memory.side_memory import SideMemory
from repair_lightning.types import BASE

_PER_EDIT = ("keys", "shards", "anchors", "prompts", "radii", "floors", "limits", "named")

_FULL = 0.95
"""Coverage that counts as naming the subject in full."""


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


def document_counts(tokens: Tensor, vocabulary: int) -> Tensor:
    """In how many of the rows (N, T) each token stands, (V,); -1 is no token."""
    counts = torch.zeros(vocabulary)
    rows = torch.arange(len(tokens))[:, None].expand_as(tokens)
    pairs = torch.stack([rows, tokens], -1)[tokens >= 0].unique(dim=0)
    return counts.index_add_(0, pairs[:, 1], torch.ones(len(pairs)))


class KeyRouter(Router):
    """The prompt's nearest edit answers, if the prompt names what that edit is about.

    FAISS finds the nearest keys; among them an edit is eligible where its anchor's coverage by the prompt exceeds the
    edit's radius. The radius is calibrated per edit: above the coverage that irrelevant prompts and the other edits'
    prompts (as neighbours) reach, by `caution` of the way to full coverage. Of one subject only the relation that was
    edited is answered: the prompt's last state must be closer to the edit's than its made-up neighbours' are.

    Args:
        candidates: how many nearest keys are looked at.
        caution: where between the nearest known negative (0) and full coverage (1) the radius lies, for edits whose
            subject is known.
        caution_unnamed: the same for edits whose subject is not: a rephrase covers less of a whole prompt.
        relation_caution: where between the median of an edit's made-up neighbours (same subject, other relation) and 1
            the floor of the last states' cosine lies.
        state_weight: weight of the last hidden state in the key, against the rare tokens' embeddings.
    """

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
        self.keys = torch.zeros(0, 0)
        self.shards = torch.zeros(0, dtype=torch.long)
        self.anchors = torch.zeros(0, 0, dtype=torch.long)
        self.prompts = torch.zeros(0, 0, dtype=torch.long)
        self.radii = torch.zeros(0)
        self.floors = torch.zeros(0)
        self.limits = torch.zeros(0)
        self.named = torch.zeros(0, dtype=torch.bool)
        self.token_weights = torch.zeros(0)
        self._background_counts = torch.zeros(0)
        self._background_size = 0
        self._index: faiss.IndexFlatIP | None = None

    def options(self) -> dict[str, Any]:
        """As given to the constructor."""
        names = ("candidates", "caution", "caution_unnamed", "relation_caution")
        return {name: getattr(self, name) for name in names} | {"state_weight": self.encoder.state_weight}

    def fit(self, background: Query, embeddings: Tensor) -> None:
        """What is common to all prompts, from irrelevant ones."""
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
        self.keys = torch.cat([self.keys.reshape(-1, keys.shape[1]), keys])
        self.shards = torch.cat([self.shards, torch.tensor(list(shards), dtype=torch.long)])
        self.anchors = _stack_ragged(self.anchors, pad_right([anchor.tokens for anchor in anchors]))
        self.named = torch.cat([self.named, torch.tensor([anchor.named for anchor in anchors])])
        self.floors = torch.cat([self.floors, self._floors(keys, neighbours)])
        self.prompts = _stack_ragged(self.prompts, prompts.words)
        self.radii = torch.cat([self.radii, torch.full((len(ids),), _FULL)])
        self.limits = torch.cat([self.limits, self.floors[-len(ids) :]])
        self._index = None

    def forget(self, ids: Sequence[str]) -> None:
        """Drop edits; the others keep their order."""
        gone = set(ids)
        keep = torch.tensor([i for i, name in enumerate(self.ids) if name not in gone], dtype=torch.long)
        if len(keep) == len(self.ids):
            return
        self.ids = [name for name in self.ids if name not in gone]
        for field in _PER_EDIT:
            setattr(self, field, getattr(self, field)[keep])
        self._index = None

    def reassign(self, shards: Sequence[int], fused: int) -> None:
        """The edits of the given shards belong to `fused`."""
        self.shards = torch.where(torch.isin(self.shards, torch.tensor(list(shards))), fused, self.shards)

    def calibrate(self, memory: SideMemory, owned: Mapping[int, Query], background: Query) -> None:
        """Token weights and radii anew, from the edits' own prompts and the irrelevant ones."""
        if not self.ids:
            return
        counts = self._background_counts + document_counts(self.prompts, len(self._background_counts))
        self.token_weights = inverse_document_frequency(counts, self._background_size + len(self.ids))
        unrelated = coverage_matrix(background.words, self.anchors, self.token_weights)
        others = coverage_matrix(self.prompts, self.anchors, self.token_weights)
        about_the_same = others >= _FULL  # the edit's own prompt, and edits of the same subject: no negatives
        negatives = torch.maximum(unrelated.amax(0), others.masked_fill(about_the_same, 0).amax(0))
        caution = torch.where(self.named, self.caution, self.caution_unnamed)
        self.radii = (negatives + caution * (1 - negatives)).clamp_max(_FULL)
        self.limits = self.floors.clone()
        if self.encoder.state_weight:
            above = self._above(unrelated > self.radii, self.encoder(background))
            self.limits = torch.maximum(self.floors, above)

    def _above(self, covered: Tensor, keys: Tensor) -> Tensor:
        """How alike a prompt must ask so that no irrelevant prompt which names the subject (M, N) gets through:
        (N,)."""
        rows, edits = covered.nonzero(as_tuple=True)
        alike = self._state_similarity(keys[rows], self.keys[edits])
        worst = torch.full((len(self.ids),), -1.0).scatter_reduce_(0, edits, alike, reduce="amax")
        return worst + self.relation_caution * (1 - worst) * (worst > -1)

    def _floors(self, keys: Tensor, neighbours: Neighbours | None) -> Tensor:
        """How alike (cosine of the last states) a prompt must ask: beyond the median of the edit's own neighbours."""
        floors = torch.full((len(keys),), -1.0)
        if neighbours is None or not self.encoder.state_weight:  # keys without states cannot tell relations apart
            return floors
        alike = self._state_similarity(self.encoder(neighbours.prompts), keys[neighbours.of])
        for edit in neighbours.of.unique().tolist():
            median = alike[neighbours.of == edit].median()
            floors[edit] = median + self.relation_caution * (1 - median)
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
        pick = found.gather(1, best)[:, 0]
        fires = eligible.gather(1, best)[:, 0]
        return Choice(
            torch.where(fires, self.shards[pick], BASE),
            covered.gather(1, best)[:, 0],
            radii.gather(1, best)[:, 0],
            tuple(self.ids[i] for i in pick.tolist()),
        )

    def _search(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        if self._index is None:
            self._index = faiss.IndexFlatIP(self.keys.shape[1])
            self._index.add(self.keys.numpy())
        similarity, found = self._index.search(keys.numpy(), min(self.candidates, len(self.ids)))
        return torch.from_numpy(similarity), torch.from_numpy(found)

    def state_dict(self) -> dict[str, Any]:
        """Keys, radii, anchors and what is known of the background; the base's embeddings are not copied."""
        state: dict[str, Any] = {field: getattr(self, field).contiguous() for field in (*_PER_EDIT, "token_weights")}
        state |= {"ids": list(self.ids), "background_size": self._background_size}
        state |= {"background_counts": self._background_counts, "encoder_weights": self.encoder.token_weights}
        return state | {"lexical_centre": self.encoder.centres[0], "state_centre": self.encoder.centres[1]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Accepts what :meth:`state_dict` gave; give the embeddings with :meth:`bind`."""
        for field in (*_PER_EDIT, "token_weights"):
            setattr(self, field, state[field])
        self.ids = list(state["ids"])
        self._background_size = int(state["background_size"])
        self._background_counts = state["background_counts"]
        self.encoder.token_weights = state["encoder_weights"]
        self.encoder.centres = (state["lexical_centre"], state["state_centre"])
        self._index = None

    def bind(self, embeddings: Tensor) -> None:
        """Give the base's input embeddings (V, E) to a loaded router."""
        self.encoder.embeddings = embeddings


def _stack_ragged(above: Tensor, below: Tensor) -> Tensor:
    width = max(above.shape[1], below.shape[1])
    padded = [torch.nn.functional.pad(rows, (0, width - rows.shape[1]), value=-1) for rows in (above, below)]
    return torch.cat(padded)
