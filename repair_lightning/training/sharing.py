"""An edited model among ranks: what is asked of it is dealt out, and every rank gets all that comes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from repair_lightning.memory.query import Choice, Query
from repair_lightning.models.edited import EditedModel
from repair_lightning.training.team import ALONE, Team


class SharedModel(EditedModel):
    """An edited model whose `team` deals prompts out among themselves: all of them must ask alike."""

    team: Team = ALONE

    @torch.no_grad()
    def choose(self, prompts: Sequence[str], batch_size: int = 64) -> Choice:
        """Who answers prompts; each is routed by one rank."""
        mine = self.team.mine_of(prompts)
        return self.shared_choice(mine, super().choose([prompts[i] for i in mine], batch_size))

    def shared_choice(self, mine: Sequence[int], part: Choice) -> Choice:
        """The choices of all ranks, from this one's `part` for the prompts with the indices `mine`."""
        if self.team.parts == 1:
            return part
        names = max(self.team.gather_objects([check.name for check in part.checks] if mine else []), key=len)
        tensors = part.tensors() if mine else [part.memory, *[part.score] * (2 + 2 * len(names))]
        return Choice.of(self.team.rows(mine, *tensors), self.team.items(mine, part.nearest), names)

    def shared_query(self, number: int, ask: Callable[[list[int]], Query]) -> Query:
        """The states of `number` prompts, each computed by one rank; `ask` gives those with the given indices."""
        mine = self.team.mine(number)
        if self.team.parts == 1 or self.router.reads_all_tokens:  # whole prompts are too much to send around
            return ask(list(range(number)))
        some = ask(mine or [0])  # one at the least: its shape is needed
        part = some if mine else some.rows(slice(0, 0))
        texts = tuple(self.team.items(mine, part.texts))
        return Query(texts, *self.team.rows(mine, part.mask, part.hidden, part.activations))


def team_of(model: EditedModel) -> Team:
    """The ranks among which a model's prompts are dealt out; a model that knows none is asked by one process."""
    return model.team if isinstance(model, SharedModel) else ALONE
