"""`repair-lightning serve`: what it opens, where it listens, how it ends."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

import uvicorn

from repair_lightning.errors import ConfigError
from repair_lightning.models.base import Base, load_base
from repair_lightning.packs.pack import Pack, download
from repair_lightning.serving.app import LOOPBACK, Keys, Served, make_app, read_key
from repair_lightning.serving.live import LiveModel, begun, resumed

log = logging.getLogger(__name__)

PATIENCE = 30
"""Seconds that answers under way get to end when the server is told to."""


def serve(
    pack: Sequence[str],
    base: str | None,
    run: Path | None,
    precision: str,
    host: str,
    port: int,
    ask_key_file: Path | None,
    edit_key_file: Path | None,
    say: Callable[[str], None],
) -> None:
    """Serve until SIGTERM or Ctrl-C; `say` is told the address when the models are there."""
    keys = Keys(read_key(ask_key_file), read_key(edit_key_file))
    local = host in LOOPBACK
    if (keys.ask is None) != (keys.edit is None):
        raise ConfigError("--ask_key_file and --edit_key_file belong together: give both, or none")
    if not local and keys.ask is None:
        words = "--host beyond this machine needs --ask_key_file and --edit_key_file"
        raise ConfigError(f"{words}, got '{host}'; give both, or leave --host out")
    if not 0 <= port < 65536:
        raise ConfigError(f"--port must be from 0 to 65535, got {port}")
    models = opened(pack, base, run, precision)
    names = ", ".join(("base", *models))
    served = Served(models, keys, LOOPBACK if local and keys.ask is None else None, threaded=False)
    config = uvicorn.Config(
        make_app(served), host, port, log_level="warning", server_header=False, timeout_graceful_shutdown=PATIENCE
    )
    server = Announcing(config, lambda at: say(f"serving {names} at {at}"))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, server.handle_exit)
    thread = threading.Thread(target=_listen, args=(server, served), name="server")
    thread.start()
    served.engine.run()
    thread.join()
    if not server.started:
        raise ConfigError(f"cannot listen at {host}:{port}; the port may be in use: give another --port")


def _listen(server: uvicorn.Server, served: Served) -> None:
    """Listen until the server is told to end; the engine ends with it, however that comes about."""
    try:
        server.run()
    except SystemExit:  # uvicorn's, where it cannot listen: it has said why
        log.error("the server has not started")
    finally:
        served.engine.stop()


class Announcing(uvicorn.Server):
    """Says where it listens as soon as it does."""

    def __init__(self, config: uvicorn.Config, say: Callable[[str], None]) -> None:
        super().__init__(config)
        self._say = say

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal lets answers end, and so does the process; a second one does not wait for them."""
        self.should_exit, self.force_exit = True, self.should_exit

    async def startup(self, sockets: list | None = None) -> None:
        """Uvicorn's, and the address."""
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            self._say(f"http://{f'[{host}]' if ':' in host else host}:{port}")


def opened(packs: Sequence[str], base: str | None, run: Path | None, precision: str = "auto") -> dict[str, LiveModel]:
    """The live models by name, over one base in memory."""
    if not packs:
        if base is None or run is None:
            raise ConfigError("nothing to serve: give --pack DIR, or --base BASE with --run DIR to begin with no edit")
        options = {} if precision == "auto" else {"precision": precision}  # as `edit` goes on with the same folder
        return {"edited": begun(base, "keyed", options, run)}
    if run is not None and len(packs) > 1:
        raise ConfigError("--run is for one pack; several keep their corrections in PACK/live")
    named = [_named(text) for text in packs]
    names = [name for name, _ in named]
    if len(set(names)) < len(names) or "base" in names:
        raise ConfigError(f"packs need names of their own, none of them 'base', got {', '.join(names)}; NAME=DIR")
    loaded: Base | None = None
    found: dict[str, LiveModel] = {}
    for name, given in named:
        folder = download(given)
        if run is None and folder != Path(given).expanduser():
            raise ConfigError(f"pack '{given}' is the hub's; give --run a folder for the corrections")
        log.info("reading the pack '%s'", given)
        content = Pack.read(folder)
        loaded = loaded or load_base(base or content.base, precision)
        found[name] = resumed(folder, loaded, run or folder / "live")
    return found


def _named(text: str) -> tuple[str, str]:
    """`NAME=DIR`; without a name the model is `edited`."""
    name, equals, folder = text.partition("=")
    return (name, folder) if equals and name and folder and "/" not in name else ("edited", text)
