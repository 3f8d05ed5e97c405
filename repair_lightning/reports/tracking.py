"""Weights & Biases for machines that may have no network and no account: on the disk first."""

from __future__ import annotations

import logging
import os
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import WandbLogger

log = logging.getLogger(__name__)

WAIT, FINISH = 10.0, 60.0
"""Seconds that the server has to answer at the start, and to take what is left at the end."""


def unreachable() -> str | None:
    """Why the server of W&B does not answer; None where it does. Asked first: its client tries again for minutes."""
    import requests
    import wandb

    address = os.environ.get("WANDB_BASE_URL") or wandb.Settings().base_url
    try:
        requests.head(address, timeout=WAIT)
    except requests.RequestException as error:
        return f"{address}: {type(error).__name__}"
    return None


class OfflineFirstWandbLogger(WandbLogger):
    """Lightning's `WandbLogger`, which writes to the disk unless a key is set and the server answers.

    What was written to the disk alone is sent by `wandb sync` whenever you like. `offline` None writes to the disk
    alone unless `WANDB_API_KEY` or `WANDB_MODE` says otherwise; `group` joins the processes and the resumed parts of
    one run; `options` are those of `wandb.init`.
    """

    def __init__(
        self,
        project: str = "repair-lightning",
        offline: bool | None = None,
        name: str | None = None,
        group: str | None = None,
        save_dir: str = ".",
        **options: Any,
    ) -> None:
        if offline is None:
            offline = not (os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE"))
        settings = {"init_timeout": WAIT, "finish_timeout": FINISH, "silent": True}
        options = {"group": group, "settings": settings} | options
        super().__init__(name, save_dir, offline=offline, project=project, **options)
        self._wandb_init.pop("anonymous", None)  # has no effect but a warning

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run of W&B; where the server does not answer, one on the disk."""
        import wandb

        if self._experiment is None and not self._offline and "WANDB_MODE" not in os.environ:
            self._stay(unreachable())
        try:
            return WandbLogger.experiment.fget(self)  # type: ignore[attr-defined]
        except (wandb.errors.CommError, wandb.errors.UsageError) as error:
            if self._offline:
                raise
            self._stay(str(error).splitlines()[0])
            return WandbLogger.experiment.fget(self)  # type: ignore[attr-defined]

    def _stay(self, reason: str | None) -> None:
        """Write to the disk alone, where there is a reason for it."""
        if reason is not None:
            log.warning("wandb: no server (%s); the run is kept on the disk", reason)
            self._offline = True
            self._wandb_init["mode"] = "offline"
