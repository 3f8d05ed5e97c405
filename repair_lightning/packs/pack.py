"""The pack: an edited model's side memory as `repair_config.json`, `side_memory.safetensors` and the ledger.

Loading one reads JSON, safetensors and Parquet only and never runs code. Of a masked shard only the open coordinates
are stored. A pack is replaced whole: until the new one is on the disk and was read back, the old one is there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import HfApi, snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pipelines.base import SUPPORTED_PEFT_TASKS

from repair_lightning.edits.ledger import Ledger
from repair_lightning.errors import ConfigError, RepairError, first_line
from repair_lightning.memory.routers import make_router
from repair_lightning.memory.shards import shard_from
from repair_lightning.memory.side_memory import SideMemory
from repair_lightning.models.architectures import architecture_of, value_shape
from repair_lightning.models.base import Base, files_hash, load_base
from repair_lightning.models.edited import EditedModel
from repair_lightning.models.weights import Place
from repair_lightning.packs.card import HUB_NAME, model_card
from repair_lightning.storage.folders import replace_folder, whereabouts

if TYPE_CHECKING:
    from repair_lightning.editors.base import Editor

log = logging.getLogger(__name__)

FORMAT_VERSION = 3
CONFIG_FILE, WEIGHTS_FILE, LEDGER_FILE = "repair_config.json", "side_memory.safetensors", "ledger.parquet"
JOURNAL_FILE, CARD_FILE, MERGED_FOLDER = "journal.parquet", "README.md", "merged"
OURS = (CONFIG_FILE, WEIGHTS_FILE, LEDGER_FILE, JOURNAL_FILE, CARD_FILE, MERGED_FOLDER)
"""What saving a pack replaces; other files in its folder are kept."""
BASE_FOLDER = "base"
"""Where a self-contained pack holds its base; see `repair_lightning.packs.export`."""
SEAL = "config_sha256"
ORIGIN = ("editor", "options", "base", "layer", "irrelevant", "provenance", "scores")
"""What of a configuration stays when a loaded pack is saved again."""
FOLDED, OWN, ROUTER, LOW_RANK = "base.value_weight.", "own.", "router.", "low_rank."
"""What the names of tensors begin with: of what was written into the base (a W_v's layer follows, or a module's name),
of what the method and the router remember, and of the low-rank shards."""

PATTERNS = ["*.json", "*.safetensors", "*.parquet", CARD_FILE]
"""What is downloaded from the hub and uploaded: nothing that could run."""

State = Mapping[str, Any]
Also = Mapping[str, Callable[[Path], object]]
"""Further files or folders of a pack by name: what writes each at the path that it is given."""


def save_pack(
    editor: Editor, folder: str | Path, provenance: State, also: Also | None = None, scores: State | None = None
) -> Path:
    """Write an editor's memory, router and ledger, and a model card, in place of what the folder holds; returns the
    folder. A process that is killed on the way leaves the old pack or the new one.

    Where something wrote into the base's own W_v, that matrix goes along; after a merge into it the whole base beside
    it as a plain Hugging Face checkpoint that needs neither pack nor router. `provenance` says in plain types how the
    pack came about, `also` names further files of it and who writes them, `scores` (`final` of `metrics.json`) are for
    the card. Raises `RepairError` where it cannot be written, or what is read back is not what was written.
    """
    base = editor.base
    assert base is not None
    config = {
        "editor": editor.editor_name,  # type: ignore[attr-defined]
        "options": editor.options(),
        "base": {"name": base.name, "sha256": base.sha256},
        "layer": editor.layer,
        "irrelevant": {"background": list(editor.background_prompts), "held_out": list(editor.held_out_prompts)},
        "provenance": dict(provenance),
        "scores": scores,
    }
    also = dict(also or {})
    if editor.base_changed and not editor.writes_base:
        also[MERGED_FOLDER] = lambda path: (base.model.save_pretrained(path), base.tokenizer.save_pretrained(path))
    return _write(folder, config, editor.edited, editor.own_state(), editor.ledger, also)


def _write(folder: str | Path, config: State, edited: EditedModel, own: State, ledger: Ledger, also: Also) -> Path:
    router, memory, tensors = edited.router, edited.memory, written_tensors(edited, own)
    content = {
        "format_version": FORMAT_VERSION,
        **config,
        "shape": list(memory.shape),
        "mask_ratio": memory.mask_ratio,
        "next_shard": memory.next_id,
        "shards": {str(shard): memory[shard].generation for shard in memory.ids},
        "router": {"name": router.name, "options": router.options(), "state": _plain(router.state_dict())},
        "own": _plain(own),
    }

    def fill(part: Path) -> None:
        try:
            save_file(tensors, part / WEIGHTS_FILE)
        except SafetensorError as error:  # it reports a full disk too
            raise OSError(str(error)) from error
        ledger.to_parquet(part / LEDGER_FILE)
        for name, put in also.items():
            put(part / name)
        files = {file.name: files_hash([file]) for file in sorted(part.iterdir()) if file.is_file()}
        text = json.dumps(sealed({**content, "files": files}), indent=1)
        (part / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        card = model_card(config, ledger, any(key.startswith(FOLDED) for key in tensors))
        card.save(part / CARD_FILE)  # after the hashes: it may be edited
        _, found = read_pack(part)
        same = found.keys() == tensors.keys() and all(_same_bits(found[key], tensors[key]) for key in tensors)
        if not same or load_ledger(part) != ledger:
            raise RepairError(f"pack '{part}': what is read back is not what was written; check the disk")

    return replace_folder(folder, fill, OURS, "pack")


def _same_bits(a: Tensor, b: Tensor) -> bool:
    flat = [tensor.reshape(-1).view(torch.uint8) for tensor in (a, b)]  # NaN is the same as itself
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(*flat)


def sealed(config: State) -> dict[str, Any]:
    """The configuration with the hash of all else that it says."""
    rest = {key: value for key, value in config.items() if key != SEAL}
    return rest | {SEAL: hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()}


def written_tensors(edited: EditedModel, own: State) -> dict[str, Tensor]:
    """All that editing has left, by name: shards, router, each W_v that was written into, what the method remembers."""
    parts: dict[str, Mapping[Any, Any]] = {ROUTER: edited.router.state_dict(), FOLDED: edited.weights.state(), OWN: own}
    state = {f"{start}{key}": value for start, part in parts.items() for key, value in part.items()}
    tensors = {key: value.cpu().contiguous() for key, value in state.items() if isinstance(value, Tensor)}
    return shard_tensors(edited.memory) | tensors


def shard_tensors(memory: SideMemory) -> dict[str, Tensor]:
    """The shards: dense deltas, masks in bits with the values that they open, and low-rank factors."""
    found = {
        f"shard.{id}.{key}": value for id in memory.shards for key, value in memory.shards[id].state_dict().items()
    }
    found |= {f"{LOW_RANK}{key}": value for key, value in memory.low_rank_tensors().items()}
    return {key: value.cpu().contiguous() for key, value in found.items()}


def bytes_left(editor: Editor) -> int:
    """What editing has left, in bytes of a pack's tensors, without what a router learns before the first edit."""
    empty = editor.build_router()
    assert editor.base is not None
    empty.space = getattr(editor.router, "space", None)  # type: ignore[attr-defined]
    empty.fit(editor.background)
    before = sum(value.nbytes for value in empty.state_dict().values() if isinstance(value, Tensor))
    return sum(tensor.nbytes for tensor in written_tensors(editor.edited, editor.own_state()).values()) - before


def _plain(state: State) -> dict[str, Any]:
    return {key: value for key, value in state.items() if not isinstance(value, Tensor)}


def read_pack(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A pack's configuration and tensors; every file of it is checked against its hash first. Raises `RepairError`
    where there is none, or it is damaged, or of a version that this release does not read."""
    place = whereabouts(folder)
    if not (place / CONFIG_FILE).is_file():
        raise RepairError(f"'{folder}' is no pack: it has no {CONFIG_FILE}; give the folder that train.py wrote")
    try:
        config = json.loads((place / CONFIG_FILE).read_text(encoding="utf-8"))
        version = config.get("format_version") if isinstance(config, dict) else None
        if version != FORMAT_VERSION:
            words = f"pack '{folder}' has format version {version}; this release reads {FORMAT_VERSION}"
            again = f"repair-lightning train --config own --model.base BASE --data.path {place / LEDGER_FILE}"
            raise RepairError(f"{words}: `{again}` writes its edits again, undone ones too")
        if sealed(config) != config:
            raise ValueError(f"{CONFIG_FILE} is not as it was written")
        files = config.get("files")
        if not isinstance(files, dict) or not {WEIGHTS_FILE, LEDGER_FILE} <= files.keys():
            raise ValueError(f"{CONFIG_FILE} does not list its files")
        for name, sha256 in files.items():
            if Path(name).name != name:
                raise ValueError(f"{CONFIG_FILE} names a file elsewhere, {name!r}")
            if files_hash([place / name]) != sha256:
                raise ValueError(f"{name} is not the file that {CONFIG_FILE} was written for")
        return config, load_file(place / WEIGHTS_FILE)
    except (ValueError, RecursionError, SafetensorError, OSError) as error:
        raise _damaged(folder, str(error)) from error


def _damaged(folder: str | Path, problem: str) -> RepairError:
    return RepairError(f"pack '{folder}' is damaged: {problem.splitlines()[0]}; restore it from a copy")


@contextmanager
def _fits(folder: str | Path) -> Iterator[None]:
    """What goes wrong inside is the fault of the pack's configuration."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise _damaged(folder, f"{CONFIG_FILE} does not fit ({type(error).__name__}: {error})") from error


class PackedModel(EditedModel):
    """The edited model of a pack: it can be saved and shared like any Hugging Face model. `card` is the pack's
    configuration, `own` what the method remembers, `more` the content of the pack's further files by name."""

    card: dict[str, Any]
    ledger: Ledger
    own: State
    more: Mapping[str, bytes]

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        base: str | None = None,
        precision: str = "auto",
        **hub: Any,
    ) -> PackedModel:
        """The model of a pack in a folder or on the Hugging Face hub; its `tokenizer` is with it.

        Args:
            name_or_path: the folder, or a hub name `org/name`; only JSON, safetensors and Parquet files are downloaded.
            base: the base's folder or hub name; None takes the one in the pack's folder, else the one it remembers.
            precision: of the base.
            hub: as `huggingface_hub.snapshot_download` takes it: `revision`, `token`, `cache_dir`.

        RepairError where there is no such pack, or it is damaged or belongs to another base.
        """
        pack = Pack.read(download(str(name_or_path), **hub))
        model = pack.open(base, precision)
        model.weights.load(pack.weights)
        if not any(model.ledger.owner_of(id) is not None for id in model.ledger):
            counts = ", ".join(f"{n:,} {status}" for status, n in model.ledger.counts().items() if n) or "none at all"
            log.warning("pack '%s' holds no written edit (%s): the base answers every prompt", pack.folder, counts)
        return model

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **hub: Any) -> Path:
        """Write the pack, without its base; returns the folder. With `push_to_hub` it is uploaded too, `hub` as that
        takes it, by default under the folder's name. RepairError where it cannot be written or uploaded."""
        origin = {key: self.card.get(key) for key in ORIGIN}
        also = {name: partial(Path.write_bytes, data=content) for name, content in self.more.items()}
        folder = _write(save_directory, origin, self, self.own, self.ledger, also)
        if push_to_hub:
            upload(folder, **{"repo_id": folder.name} | hub)
        return folder

    def push_to_hub(self, repo_id: str, **hub: Any) -> str:
        """Upload the pack to the Hugging Face hub as `org/name`, made where it is missing; returns the address. `hub`
        holds `private`, `token`, `revision`, `commit_message`. RepairError where it cannot be uploaded."""
        with tempfile.TemporaryDirectory() as folder:
            return upload(self.save_pretrained(Path(folder) / "pack"), repo_id=repo_id, **hub)


def download(name_or_path: str, **options: Any) -> Path:
    """The folder of a pack: the one that is named, or what the hub holds under the name `org/name`.

    `options` are those of `snapshot_download`. Raises `RepairError` where the hub does not give it.
    """
    path = Path(name_or_path).expanduser()
    if not HUB_NAME.fullmatch(name_or_path) or whereabouts(path).exists() or path.parent.exists():
        return path
    try:
        return Path(snapshot_download(name_or_path, allow_patterns=PATTERNS, ignore_patterns="merged/*", **options))
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise RepairError(
            f"'{name_or_path}' is no folder here, and the hub does not give it ({first_line(error)}); give the folder "
            "that train.py wrote, or check name, token and network"
        ) from error


def upload(folder: Path, repo_id: str, private: bool | None = None, token: str | None = None, **options: Any) -> str:
    """Upload a pack and return its address; the repository is made where it is missing.

    `options` are those of `upload_folder`. Raises `RepairError` where the hub refuses it or cannot be reached.
    """
    options = {"commit_message": "Upload a REPAIR-Lightning pack"} | options
    api = HfApi(token=token)
    try:
        name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        return str(api.upload_folder(repo_id=name, folder_path=folder, allow_patterns=PATTERNS, **options))
    except Exception as error:  # the hub client raises a dozen unrelated types
        words = f"the pack cannot be uploaded to '{repo_id}' ({first_line(error)}); check name, token and network"
        raise RepairError(words) from error


def load_edited(folder: str | Path, base: str | None = None, precision: str = "auto") -> tuple[PackedModel, Any]:
    """An edited model and its tokenizer; for arguments and errors see :meth:`PackedModel.from_pretrained`."""
    model = PackedModel.from_pretrained(folder, base, precision)
    return model, model.tokenizer


def load_ledger(folder: str | Path) -> Ledger:
    """The ledger that travels with a pack."""
    return Ledger.from_parquet(whereabouts(folder) / LEDGER_FILE)


@dataclass(frozen=True)
class Pack:
    """A pack that was read: its configuration, its tensors and its ledger."""

    folder: str | Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    ledger: Ledger

    @classmethod
    def read(cls, folder: str | Path) -> Pack:
        """A folder's pack; see :func:`read_pack`."""
        return cls(folder, *read_pack(folder), load_ledger(folder))

    @property
    def base(self) -> str:
        """The base that a self-contained pack holds, else the name of the one that it was made with."""
        inside = whereabouts(self.folder) / BASE_FOLDER
        return str(inside) if (inside / "config.json").is_file() else self.config["base"]["name"]

    @property
    def weights(self) -> dict[Place, Tensor]:
        """What was written into the base, by place; see `BaseWeights.state`."""
        return {int(place) if place.isdigit() else place: value for place, value in self.part(FOLDED).items()}

    def part(self, start: str) -> dict[str, Tensor]:
        """The tensors whose names begin so, by the rest of their names."""
        return {key[len(start) :]: value for key, value in self.tensors.items() if key.startswith(start)}

    def check_base(self, name: str, sha256: str) -> None:
        """Raise `RepairError` where a base is not the one that the pack was made with."""
        known, wanted = self.config["base"]["name"], self.config["base"]["sha256"]
        if sha256 != wanted:
            words = f"the pack belongs to base '{known}' ({wanted[:12]}), but '{name}' is {sha256[:12]}"
            raise RepairError(f"{words}; give the base that it was made with")

    def memory(self) -> SideMemory:
        """The bank of shards."""
        config, low_rank = self.config, self.part(LOW_RANK)
        shape = (int(config["shape"][0]), int(config["shape"][1]))
        memory = SideMemory(shape, config["mask_ratio"])
        memory.next_id = int(config["next_shard"])
        if low_rank:
            memory.load_low_rank(low_rank)
        for name in config["shards"].keys() - map(str, memory.ids):
            state = self.part(f"shard.{name}.")
            if not any(kind <= state.keys() for kind in ({"delta"}, {"mask", "values"}, {"value"})):
                raise RepairError(f"the pack lacks shard {name}; restore it from a copy")
            memory.shards[name] = shard_from(shape, state, config["shards"][name]).requires_grad_(False)
        memory.shards = nn.ModuleDict({name: memory.shards[name] for name in sorted(memory.shards, key=int)})
        return memory

    def open(self, base: str | None = None, precision: str = "auto") -> PackedModel:
        """The edited model, while its base still has its own weights: `weights` are to be loaded into it."""
        config = self.config
        with _fits(self.folder):
            layer, router = config["layer"], make_router(config["router"]["name"], **config["router"]["options"])
            loaded = load_base(base or self.base, precision)
            self.check_base(loaded.name, loaded.sha256)
            memory = self.memory()
            found = value_shape(architecture_of(loaded.model).value_module(loaded.model, layer))
            if found != memory.shape:
                raise ValueError(f"its shards are {memory.shape}, the value matrix of layer {layer} is {found}")
            router.load_state_dict(config["router"]["state"] | self.part(ROUTER))
            forms = loaded.forms(config["options"].get("template", "auto"))
            memory = memory.to(loaded.model.device)
            model = PackedModel(loaded.model, loaded.tokenizer, memory, router, layer, forms)
            more = [name for name in config["files"] if name not in (WEIGHTS_FILE, LEDGER_FILE)]
            model.more = {name: (whereabouts(self.folder) / name).read_bytes() for name in more}
            model.own = config["own"] | self.part(OWN)
        known = SUPPORTED_PEFT_TASKS["text-generation"]  # what `pipeline` takes beside the library's own classes
        known += [PackedModel.__name__] * (PackedModel.__name__ not in known)
        model.card, model.ledger = dict(config), self.ledger
        model.edit_of = lambda id: self.ledger.edit(id) if id in self.ledger else None
        return model.eval()

    def model_options(self) -> dict[str, Any]:
        """The editor as the command line configures one."""
        from repair_lightning.editors import editor_class

        with _fits(self.folder):
            name = editor_class(self.config["editor"]).__name__
            chosen = {"base": self.base, "layer": self.config["layer"]}
            return {"class_path": f"repair_lightning.editors.{name}", "init_args": self.config["options"] | chosen}

    def restore_into(self, editor: Editor) -> None:
        """Give a loaded editor what the pack holds; each W_v that was written into waits for `Editor.change_base`.
        Raises `RepairError` where the pack belongs to another base, layer, editor or router, or is damaged."""
        assert editor.base is not None
        self.check_base(editor.base.name, editor.base.sha256)
        asked = {"editor": editor.editor_name, "layer": editor.layer, "router": editor.router.name}  # type: ignore[attr-defined]
        with _fits(self.folder):
            config = self.config
            made = {"editor": config["editor"], "layer": config["layer"], "router": config["router"]["name"]}
            for name, value in made.items():
                if asked[name] != value:
                    words = f"pack '{self.folder}' was made with {name} {value}, got {asked[name]}"
                    raise ConfigError(f"{words}; leave that option out")
            memory = self.memory().requires_grad_(True).to(editor.memory.device)
            if memory.shape != editor.memory.shape:
                raise ValueError(f"its shards are {memory.shape}, the value matrix is {editor.memory.shape}")
            editor.memory.restore(memory.snapshot())
            editor.router.load_state_dict(config["router"]["state"] | self.part(ROUTER))
            editor.load_own_state(config["own"] | self.part(OWN))
            editor.changed_weights = self.weights


def restore_editor(folder: str | Path, base: Base | str | None = None, precision: str | None = None) -> Editor:
    """The editor that wrote a pack, as it was then: it can write, forget, calibrate, merge and be saved again.

    `base` and `precision` are those of :meth:`PackedModel.from_pretrained`; None does as when the pack was written. A
    base that is loaded already is taken as it is.
    RepairError where the pack is damaged, belongs to another base, or its editor is not known.
    """
    from repair_lightning.editors import make_editor

    pack = Pack.read(folder)
    with _fits(folder):
        given = {"precision": precision, "base": base.name if isinstance(base, Base) else base or pack.base}
        chosen = {name: value for name, value in given.items() if value is not None} | {"layer": pack.config["layer"]}
        editor = make_editor(pack.config["editor"], pack.config["options"] | chosen)
        irrelevant = pack.config["irrelevant"]["background"], pack.config["irrelevant"]["held_out"]
    if isinstance(base, Base):
        pack.check_base(base.name, base.sha256)
        editor.build(base, pack.config["layer"])
    else:
        editor.load()
    editor.ledger = pack.ledger
    if irrelevant[0]:
        with _fits(folder):
            editor.prepare(*irrelevant)
    pack.restore_into(editor)
    editor.change_base()
    return editor
