"""How Lightning runs an edit stream on several devices: process groups as DDP has them, and nothing wrapped.

`shard_parallel` deals a window's batches to the ranks, each of which writes shards of its own: no gradient travels.
`data_parallel` (`ddp` on the command line) deals the rows of each batch and sums the gradients of the one shard that
they share. `model_parallel` lays the base's weights out over the ranks (FSDP2), which then all do the same in step.
"""

from __future__ import annotations

import os
import signal
import subprocess
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.distributed import _distributed_is_initialized
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from torch import nn

from repair_lightning.errors import ConfigError
from repair_lightning.training.team import ALONE, Team
from repair_lightning.training.watch import Meeting, Watch


class EarlyLauncher(_SubprocessScriptLauncher):
    """Starts the other ranks when it is told to, before the trainer fits: they load while this one does."""

    def start(self) -> None:
        """Start this host's other ranks, unless something else does."""
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally and not self.procs:
            self._call_children_scripts()

    def launch(self, function: Any, *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        """Call the function, with all ranks there."""
        self.start()
        return function(*args, **kwargs)

    def end(self) -> None:
        """End the ranks that this one has started."""
        for child in self.procs:
            if child.poll() is None:
                child.terminate()
        for child in self.procs:
            try:
                child.wait(timeout=1)  # in a collective it does not hear
            except subprocess.TimeoutExpired:
                child.kill()


class EditStrategy(DDPStrategy):
    """What the strategies have in common: a process group, a watch over the ranks, and the module as it is.

    Args:
        lost_after: seconds without a sign of life before a rank counts as lost and the run is ended.
        meet_within: seconds that the ranks have to meet at the start.
        options: of Lightning's DDPStrategy, as `timeout` and `process_group_backend`.
    """

    deals = True
    rows_of_batches = False
    shards_base = False

    def __init__(self, lost_after: float = 60.0, meet_within: float = 600.0, **options: Any) -> None:
        for name, seconds in (("lost_after", lost_after), ("meet_within", meet_within)):
            if seconds <= 0:
                raise ConfigError(f"strategy {name} must be above 0 seconds, got {seconds}")
        super().__init__(**options)
        self.lost_after, self.meet_within = lost_after, meet_within
        self.team = ALONE
        self.watch: Watch | None = None
        self._sigterm: Any = None

    def join(self) -> Team:
        """Start the other ranks where nothing else has, and meet them; does nothing the second time."""
        if self.team.size > 1 or self.world_size == 1:
            return self.team
        assert isinstance(self._launcher, EarlyLauncher)
        self._sigterm = signal.getsignal(signal.SIGTERM)
        self._launcher.start()
        started = self._launcher.procs
        with Meeting(self.global_rank, self.world_size, started, self.meet_within, self.local_rank == 0):
            self.accelerator.setup_device(self.root_device)  # type: ignore[union-attr]
            self.setup_distributed()
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.watch = Watch(self.global_rank, self.world_size, address, self.lost_after, started)
        self.watch.start()
        self.team = Team(self.global_rank, self.world_size, self.root_device, self.deals, self.rows_of_batches)
        return self.team

    def leave(self, reason: str = "") -> None:
        """No longer be waited for; with a reason where something went wrong, and then the started ranks end too."""
        if self.watch is not None:
            self.watch.stop(reason)
            self.watch = None
        if reason and isinstance(self._launcher, EarlyLauncher):
            self._launcher.end()

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

    def setup_distributed(self) -> None:
        """Lightning's, once."""
        if not _distributed_is_initialized():
            super().setup_distributed()

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Lightning's sampler passes everything on: each rank's loader holds that rank's own batches already."""
        return {"num_replicas": 1, "rank": 0}

    def configure_ddp(self) -> None:
        """Nothing is wrapped: the shards' gradients are the editor's own business."""

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        self._launcher = EarlyLauncher(self.cluster_environment, self.num_processes, self.num_nodes)


class ShardParallelStrategy(EditStrategy):
    """Each rank writes whole batches of a window into shards of its own; see `EditStrategy` for the options."""


class DataParallelStrategy(EditStrategy):
    """All ranks write each batch together, with part of its rows each and the sum of their gradients.

    Low-rank shards have no parameter in common: their edits are dealt out as `shard_parallel` does.
    """

    rows_of_batches = True


class ShardedBaseStrategy(EditStrategy):
    """The base's layers are laid out over the ranks (FSDP2), for a base larger than one device; shards are replicated.

    Every layer's weights are put together where they are needed and let go of again, so all ranks must run the same
    passes at the same time: they do the same work, and their gradients are averaged. It saves memory, not time. The
    edited layer, the embeddings and the head stay whole on every rank.
    """

    deals = False
    shards_base = True

    def model_to_device(self) -> None:
        """Lay out the base's layers before anything is moved as a whole."""
        editor: Any = self.lightning_module
        if editor.writes_base:
            raise ConfigError(
                "trainer.strategy model_parallel lays the base's weights out over the ranks, and this editor writes "
                "into them; give another strategy"
            )
        if self.world_size > 1:
            shard_layers(editor.edited.split.layers, editor.layer, self.root_device.type, self.world_size)
        super().model_to_device()


def shard_layers(layers: nn.ModuleList, edited: int, device_type: str, size: int) -> None:
    """Lay the parameters of each layer but the edited one out over all ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device_type, (size,))
    for i, layer in enumerate(layers):
        if i != edited:
            fully_shard(layer, mesh=mesh)


STRATEGIES: dict[str, type[EditStrategy]] = {
    "shard_parallel": ShardParallelStrategy,
    "data_parallel": DataParallelStrategy,
    "model_parallel": ShardedBaseStrategy,
}
"""By the names that `Trainer(strategy=...)` takes."""

for _name, _strategy in STRATEGIES.items():
    StrategyRegistry.register(_name, _strategy, description=(_strategy.__doc__ or "").splitlines()[0])
