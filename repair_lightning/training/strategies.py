"""How Lightning runs an edit stream on several devices: process groups as DDP has them, and nothing wrapped."""

from __future__ import annotations

import signal
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from repair_lightning.errors import ConfigError
from repair_lightning.training.ranks import follow_agent, not_met, plain_signals, start_ranks
from repair_lightning.training.team import ALONE, Team


class EditStrategy(DDPStrategy):
    """What the strategies have in common: a process group, and the module as it is.

    Args:
        lost_after: seconds that a rank waits for the others before one counts as lost and the run is ended. One that
            ends is noticed at once; this is for one that stands still, and longer than the first may work alone.
        meet_within: seconds to wait for the other machines, where this process is to start its machine's ranks.
        process_group_backend: by default `nccl` on GPUs and `gloo` elsewhere.
    """

    deals = True
    rows_of_batches = False

    def __init__(
        self, lost_after: float = 1800.0, meet_within: float = 600.0, process_group_backend: str | None = None
    ) -> None:
        for name, seconds in (("lost_after", lost_after), ("meet_within", meet_within)):
            if seconds <= 0:
                raise ConfigError(f"strategy {name} must be above 0 seconds, got {seconds}")
        super().__init__(timeout=timedelta(seconds=lost_after), process_group_backend=process_group_backend)
        self.lost_after, self.meet_within = lost_after, meet_within
        self.team = ALONE
        self._sigterm: Any = None

    def join(self) -> Team:
        """Meet the other ranks, once. Where nobody has started this machine's ranks, this process starts them, and ends
        (`SystemExit`) when they have. A `LostError` says that not all ranks have come."""
        if self.team.size > 1 or self.world_size == 1:
            return self.team
        there = self.cluster_environment
        assert there is not None
        if not there.creates_processes_externally:
            address = f"{there.main_address}:{there.main_port}"
            machine = (self.num_processes, self.num_nodes, there.node_rank())
            raise SystemExit(start_ranks(*machine, address, self.meet_within))
        follow_agent()
        self._sigterm = signal.getsignal(signal.SIGTERM)
        self.accelerator.setup_device(self.root_device)  # type: ignore[union-attr]
        try:
            with plain_signals():
                self.setup_distributed()
        except RuntimeError as error:
            raise not_met(self.world_size, self.lost_after, error) from error
        self.team = Team(self.global_rank, self.world_size, self.root_device, self.deals, self.rows_of_batches)
        return self.team

    def setup_distributed(self) -> None:
        """Lightning's, once."""
        if not dist.is_initialized():
            super().setup_distributed()

    def setup_environment(self) -> None:
        """Lightning's, and meet the other ranks where that has not happened yet."""
        super().setup_environment()
        self.join()

    def on_train_start(self) -> None:
        """Lightning's, and SIGTERM as it was: Lightning's answer is a broadcast, which waits for ever in the midst of
        another collective."""
        super().on_train_start()
        if self._sigterm is not None:
            signal.signal(signal.SIGTERM, self._sigterm)

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Lightning's sampler passes everything on: each rank's loader holds that rank's own batches already."""
        return {"num_replicas": 1, "rank": 0}

    def configure_ddp(self) -> None:
        """Nothing is wrapped: the shards' gradients are the editor's own business."""


class ShardParallelStrategy(EditStrategy):
    """Each rank writes whole batches of a window into shards of its own: no gradient travels. For the options see
    `EditStrategy`."""


class DataParallelStrategy(EditStrategy):
    """All ranks write each batch together, with part of its rows each and the sum of their gradients.

    Low-rank shards have no parameter in common: their edits are dealt out as `shard_parallel` does.
    """

    rows_of_batches = True


class ShardedBaseStrategy(EditStrategy):
    """The base's layers are laid out over the ranks (FSDP2), for a base larger than one device; shards are replicated.

    All ranks run the same passes at the same time, and their gradients are averaged: it saves memory, not time. The
    edited layer, the embeddings and the head stay whole on every rank.
    """

    deals = False

    def model_to_device(self) -> None:
        """Lay out the base's layers before anything is moved as a whole."""
        editor: Any = self.lightning_module
        if editor.writes_base:
            words = "lays the base's weights out over the ranks, and this editor writes into them"
            raise ConfigError(f"trainer.strategy model_parallel {words}; give another strategy")
        if self.world_size > 1:
            mesh = init_device_mesh(self.root_device.type, (self.world_size,))
            for i, layer in enumerate(editor.edited.split.layers):
                if i != editor.layer:
                    fully_shard(layer, mesh=mesh)
        super().model_to_device()


STRATEGIES: dict[str, type[EditStrategy]] = {
    "shard_parallel": ShardParallelStrategy,
    "data_parallel": DataParallelStrategy,
    "model_parallel": ShardedBaseStrategy,
}
"""By the names that `Trainer(strategy=...)` takes."""
for _name, _strategy in STRATEGIES.items():
    StrategyRegistry.register(_name, _strategy)
