"""A window that breaks unrelated questions is taken back, bit by bit; what it held is written again or reported."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers_runs import (
    fit,
    same,
    world_editor,
    world_edits,
    world_stream,
    write_edits,
    written_editor,
)

from callbacks import ErrorSampleMonitor, ProbeGate, PruneAndRetrigger
from repair_lightning.editors import Keyed, Repair
from repair_lightning.edits.ledger import EditStatus
from repair_lightning.packs.pack import shard_tensors
from repair_lightning.types import BASE, EditReport

FORMS = [{"form": "low_rank"}, {"form": "dense", "capacity": 4}]


def bits(editor: Any) -> dict[str, Any]:
    """All that the editor has learnt; a row's number is never given twice, so the next one is not taken back."""
    router = {name: value for name, value in editor.router.state_dict().items() if name != "next_number"}
    return copy.deepcopy({"next": editor.memory.next_id} | shard_tensors(editor.memory) | router)


def misroute(editor: Any, *guilty: str) -> None:
    """A router that sends every prompt to the first of the guilty edits that a shard holds."""
    real = editor.choose

    def choose(prompts):
        choice = real(prompts)
        owners = [owner for id in guilty if id in editor.ledger and (owner := editor.ledger.owner_of(id)) is not None]
        return replace(choice, memory=torch.full_like(choice.memory, owners[0])) if owners else choice

    editor.choose = choose


def blow_up(editor: Any, shard: int) -> None:
    """Let a shard hold noise beside what was written: whatever it answers is wrong."""
    module, dice = editor.memory[shard], torch.Generator().manual_seed(0)
    if hasattr(module, "mask"):
        module.delta.data.add_(torch.randn(module.delta.shape, generator=dice))
    else:
        left, right = module.factors()
        editor.memory.put(shard, left + 1e4 * torch.randn(left.shape, generator=dice), right)


def let_spoil(editor: Any, *guilty: str) -> None:
    """Whenever one of these edits is written, its shard is noise and answers every prompt."""
    write = editor.write

    def spoilt(batch):
        reports = write(batch)
        for shard in {report.shard for report in reports if report.id in guilty}:
            blow_up(editor, shard)
        return reports

    editor.write = spoilt
    misroute(editor, *guilty)


class Watch(pl.Callback):
    """Takes down how things stand before each window; stands behind the gate at its end."""

    def __init__(self, gate: ProbeGate) -> None:
        self.gate, self.windows = gate, []

    def on_train_epoch_start(self, trainer, pl_module):
        entries = {id: pl_module.ledger.entry(id) for id in pl_module.ledger}
        self.before, self.entries, self.so_far = bits(pl_module), entries, self.gate.rolled_back

    def on_train_epoch_end(self, trainer, pl_module):
        rolled_back = self.gate.rolled_back > self.so_far
        entries = {id: pl_module.ledger.entry(id) for id in pl_module.ledger}
        changed = {id for id in entries if entries[id] != self.entries.get(id)}
        self.windows.append(SimpleNamespace(rolled_back=rolled_back, same=same(bits(pl_module), self.before)))
        self.windows[-1].changed = {id: entries[id] for id in changed}


def run(tmp_path, form: dict[str, Any], guilty: tuple[int, ...] = (), enabled: bool = True):
    """Windows of four edits; those at `guilty` answer every prompt as soon as a shard holds them."""
    edits = world_edits(8)
    editor = world_editor(**({"steps": 40} | form))
    let_spoil(editor, *(edits[i].id for i in guilty))
    stream = world_stream(write_edits(tmp_path / "edits.jsonl", edits), window=4, batch_size=4)
    gate = ProbeGate(enabled)
    gate.max_attempts = 3
    watch = Watch(gate)
    fit(editor, stream, [gate, watch, ErrorSampleMonitor(), PruneAndRetrigger()], tmp_path)
    return editor, stream, gate, watch


@pytest.fixture(scope="module", params=FORMS, ids=["low_rank", "dense"])
def broken(request, tmp_path_factory):
    """A run whose sixth edit breaks every probe whenever it is written."""
    return run(tmp_path_factory.mktemp("gate"), request.param, guilty=(5,))


def test_a_window_that_breaks_probes_is_taken_back_bit_by_bit_and_its_edits_wait_again(broken):
    editor, _, gate, watch = broken
    guilty = world_edits(8)[5].id
    assert [window.rolled_back for window in watch.windows] == [False, True, True, True, False]
    assert gate.rolled_back == 3
    assert [window.same for window in watch.windows] == [False, True, True, True, False]
    for n, window in enumerate(watch.windows[1:3], start=1):
        # The others stand as before the window, but for the first time, when they had just arrived.
        assert {guilty} <= window.changed.keys() <= {edit.id for edit in world_edits(4, 4)}
        assert n > 1 or len(window.changed) == 4
        for entry in window.changed.values():
            # Who shared the guilty one's shard is suspected once; alone it is the only one that this counts against.
            attempts = n if entry.edit.id == guilty else int(isinstance(editor, Repair))
            assert (entry.status, entry.shard, entry.attempts) == (EditStatus.REQUEUED, None, attempts)
            assert entry.reason.startswith("window rolled back: ")
            assert entry.reason.endswith(" of the probes lost their answer")


def test_only_the_guilty_one_is_given_up_and_nothing_is_lost(broken):
    """Dense shards hold four edits at first; what failed together is not written together again."""
    editor, stream, _, _ = broken
    guilty = world_edits(8)[5].id
    counts = stream.ledger.counts()
    assert (counts["written"], counts["quarantined"], sum(counts.values())) == (7, 1, 8)
    entry = stream.ledger.entry(guilty)
    assert (entry.status, entry.shard, entry.attempts) == (EditStatus.QUARANTINED, None, 3)
    assert entry.reason.endswith("of the probes lost their answer in each of 3 attempts")
    asked = type(editor).choose(editor, [edit.prompt for edit in world_edits(8)]).memory.tolist()
    assert asked[5] == BASE
    assert BASE not in asked[:5] + asked[6:]
    owners = [stream.ledger.owner_of(edit.id) for edit in world_edits(8)]
    assert owners == [*asked[:5], None, *asked[6:]]


def test_a_window_that_breaks_nothing_passes_untouched(tmp_path):
    """With the gate and without it the same bits; nothing was rolled back."""
    found = []
    for name in ("on", "off"):
        (tmp_path / name).mkdir()
        editor, stream, gate, _ = run(tmp_path / name, FORMS[0], enabled=name == "on")
        assert gate.rolled_back == 0
        found.append((bits(editor), stream.ledger))
    assert same(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


@pytest.fixture
def alone():
    """An editor without a trainer, its stream, and what it logs."""
    editor, stream = written_editor(4)
    logged: dict[str, float] = {}
    editor.log = lambda name, value, **_: logged.update({name: value})
    return editor, stream, logged


def window(gate: ProbeGate, editor: Any, stream: Any, change: Any) -> None:
    """A window in which `change` happens."""
    trainer = SimpleNamespace(datamodule=stream)
    gate.on_train_epoch_start(trainer, editor)
    change()
    gate.on_train_epoch_end(trainer, editor)


def overwrite(editor: Any) -> None:
    """A merge into W_v that ruins it."""
    weights, layer = editor.edited.weights, editor.layer
    weights.put(layer, torch.randn(weights.matrix(layer).shape, generator=torch.Generator().manual_seed(0)))


def test_the_part_of_the_irrelevant_prompts_that_nothing_else_sees_is_asked(alone):
    editor, stream, logged = alone
    gate = ProbeGate()
    gate.sample = 5
    window(gate, editor, stream, lambda: None)
    assert gate.prompts == list(editor.guard_prompts[:5])
    assert logged["gate/probe_loss"] == 0.0

    def spoil() -> None:
        """Write the first edit again, this time with noise, and route everything to its shard."""
        first = stream.edits[0].id
        stream.ledger.written([EditReport(first, stream.ledger.owner_of(first), 0.1, 0.0, 1)])
        blow_up(editor, stream.ledger.owner_of(first))
        misroute(editor, first)

    window(gate, editor, stream, spoil)
    assert gate.rolled_back == 1
    assert logged["gate/probe_loss"] > 0.02


def test_the_answers_of_the_base_survive_a_resume_after_a_merge_into_it(alone):
    """What is asked for is what the base said before anything was written into it."""
    editor, stream, logged = alone
    gate, again = ProbeGate(), ProbeGate()
    window(gate, editor, stream, lambda: None)
    again.load_state_dict(json.loads(json.dumps(gate.state_dict())))
    assert again.state_dict() == gate.state_dict()
    overwrite(editor)
    for one in (gate, again):
        window(one, editor, stream, lambda: None)
        assert logged.pop("gate/probe_loss") > 0.5
    assert again.broken == gate.broken


def test_a_weight_that_was_written_into_goes_back_too(alone):
    editor, stream, _ = alone
    before = editor.edited.value_weight.detach().clone()
    gate = ProbeGate()
    window(gate, editor, stream, lambda: overwrite(editor))
    assert gate.rolled_back == 1
    assert torch.equal(editor.edited.value_weight, before)


# -- what nobody has patched -------------------------------------------------------------------------------------------


def plain_run(tmp_path, editor: Any) -> tuple[Any, ProbeGate]:
    """Two edits under an editor as it is."""
    stream = world_stream(write_edits(tmp_path / "edits.jsonl", world_edits(2)), window=2, batch_size=2)
    gate = ProbeGate()
    gate.max_attempts = 1
    fit(editor, stream, [gate], tmp_path)
    return stream.ledger, gate


def test_shards_that_answer_everything_trip_it(tmp_path):
    """The activation router under the published rule, which each irrelevant prompt passes, and a shard that was pushed
    too far."""
    ledger, gate = plain_run(
        tmp_path, world_editor({"router": "activation", "act_ratio": 0.01}, stop_margin=None, steps=150, lr=10.0)
    )
    assert gate.rolled_back == 1
    for id in ledger:
        assert ledger.entry(id).status is EditStatus.QUARANTINED
        assert "of the probes lost their answer" in ledger.entry(id).reason


def test_shards_that_answer_all_that_is_asked_of_their_subject_trip_it(tmp_path):
    """A key router that is told to take any question about a subject for the edited one."""
    editor = Keyed("world", precision="float32", relation_false_rate=0.95)
    ledger, gate = plain_run(tmp_path, editor)
    assert gate.rolled_back == 1
    for id in ledger:
        assert ledger.entry(id).status is EditStatus.QUARANTINED
        assert "of other questions about its subjects lost their answer" in ledger.entry(id).reason
