"""Scoring data never reaches training, routing or thresholds: other rephrases and probes give the same bits."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers_runs import fit, hard_edits, irrelevant_texts, without_probes, world_editor, world_stream, write_edits

from callbacks import ErrorSampleMonitor, LossAwareTiesMerge, ProbeGate, PruneAndRetrigger, Scoreboard
from repair_lightning.editors import Keyed
from repair_lightning.edits.stream import asked_of, folded
from repair_lightning.models import forms as written_forms
from repair_lightning.packs.pack import save_pack
from repair_lightning.scoring import beside, in_text
from repair_lightning.scoring import forms as asked_forms
from repair_lightning.texts.relations import STAND_IN, bank
from repair_lightning.types import Edit, Further, Probe


def other_probes(edit: Edit) -> Edit:
    """The same edit with scoring prompts that are nonsense, or the very prompts that would be worth cheating with."""
    return replace(
        edit,
        rephrases=("What colour is the moon?", edit.prompt + " now"),
        locality=(Probe("Completely different", "words"), Probe(edit.prompt.upper(), edit.target)),
        near=(Probe(edit.prompt.replace(str(edit.subject), "Somebody Else")),),
        aliases=(edit.target, edit.target.upper()),
        old_answer=edit.target,
        further=(
            Further("portability/Reasoning", edit.prompt + " then", (edit.target,)),
            Further("multi_hop", edit.prompt, (edit.target,)),
            Further("generation", edit.prompt, ("words",)),
        ),
    )


def run(folder: Path, edits: list[Edit], router: str) -> tuple[bytes, str]:
    """A closed loop that prunes, a merge, live scores: everything that could leak."""
    editor = world_editor({"router": router}, capacity=4)
    stream = world_stream(write_edits(folder / "edits.jsonl", edits), window=4, batch_size=4)
    feedback = PruneAndRetrigger(max_attempts=2)
    loop = [ErrorSampleMonitor(), feedback, Scoreboard(live=4), LossAwareTiesMerge(max_op_drop=0.5)]
    fit(editor, stream, loop, folder)
    assert feedback.pruned, "the premise: the closed loop acted"
    pack = save_pack(editor, folder / "pack", {})
    config = json.loads((pack / "repair_config.json").read_text())
    del config["files"], config["config_sha256"]  # the ledger's hash, which holds the scoring prompts
    return (pack / "side_memory.safetensors").read_bytes(), json.dumps(config)


def test_scoring_prompts_do_not_matter(tmp_path):
    """With the hybrid router, which holds both the keys and the activation gate."""
    edits = hard_edits(8)
    found = []
    for name, change in (("own", lambda edit: edit), ("other", other_probes), ("none", without_probes)):
        (tmp_path / name).mkdir()
        found.append(run(tmp_path / name, [change(edit) for edit in edits], "hybrid"))
    weights, configs = zip(*found, strict=True)
    assert len(set(weights)) == 1  # shards, masks, keys, radii
    assert len(set(configs)) == 1  # thresholds, owners, generations


def test_what_is_written_does_matter(tmp_path):
    """The check above would pass if nothing reached the pack: another target must change it."""
    edits = hard_edits(4)
    packs = []
    for name, target in (("a", edits[0].target), ("b", "Something Else")):
        (tmp_path / name).mkdir()
        packs.append(run(tmp_path / name, [replace(edits[0], target=target), *edits[1:]], "key")[0])
    assert packs[0] != packs[1]


def test_what_a_later_edit_asks_is_no_irrelevant_prompt_and_no_probe(tmp_path):
    """An irrelevant prompt that an edit of the last window asks, in its prompt or to score it, is left out before the
    first window: of the three parts, of the gate's probes, and of the questions about edited subjects."""
    edits = hard_edits(8)
    late = edits[-1]
    late = edits[-1] = replace(late, further=(Further("multi_hop", "who follows from it", ("Nobody",)),))
    texts = [*irrelevant_texts(40), late.prompt.upper(), *late.rephrases, *(probe.prompt for probe in late.near)]
    texts += [one.prompt for one in late.further]
    (tmp_path / "irrelevant.jsonl").write_text("".join(json.dumps({"question": text}) + "\n" for text in texts))
    editor = Keyed("world", precision="float32")
    stream = world_stream(write_edits(tmp_path / "edits.jsonl", edits), irrelevant=str(tmp_path / "irrelevant.jsonl"))
    stream.window = 4
    gate = ProbeGate()
    fit(editor, stream, [gate], tmp_path)
    seen = {*editor.background_prompts, *editor.held_out_prompts, *editor.guard_prompts, *gate.prompts, *gate.expected}
    assert gate.prompts == list(editor.guard_prompts)
    assert not {folded(text) for text in seen} & asked_of(edits)
    assert {*editor.background_prompts, *editor.held_out_prompts, *editor.guard_prompts} == set(texts[:40])


@pytest.mark.parametrize("number", [16, 80])
def test_default_questions_for_loc_serve_for_nothing_else(tmp_path, number):
    """Records without `locality` are scored on irrelevant prompts beyond those that are used, or on a part of them that
    is held back; editor, thresholds and gate never see them."""
    edits = [replace(edit, locality=(), near=()) for edit in hard_edits(4)]
    texts = irrelevant_texts(number)
    (tmp_path / "irrelevant.jsonl").write_text("".join(json.dumps({"question": text}) + "\n" for text in texts))
    editor = Keyed("world", precision="float32")
    path = write_edits(tmp_path / "edits.jsonl", edits)
    stream = world_stream(path, irrelevant=str(tmp_path / "irrelevant.jsonl"), max_irrelevant=40, window=4)
    gate, board = ProbeGate(), Scoreboard(live=0, forms=0)
    fit(editor, stream, [gate, board], tmp_path)
    asked = {probe.prompt for edit in stream.edits for probe in edit.locality}
    seen = {*editor.background_prompts, *editor.held_out_prompts, *editor.guard_prompts, *gate.prompts, *gate.expected}
    assert len(asked) == min(4, number // 5)
    assert asked <= set(texts)
    assert not asked & seen
    assert len(seen) == min(40, number - len(asked))
    assert all(board.results["final"].scores["autoregressive"][name] is not None for name in ("loc", "op"))


SCORING_WORDS = ("_SYSTEM", "_EARLIER", "_BEFORE", "_AFTER", "_PARAGRAPH")
OTHER_WORDS = ("Speak as a pirate would.", ("Who baked it?", "Nobody."), "Ahoy!", "Over.", "Rain fell on the mill.")


def default_run(folder: Path, base: str, edits: list[Edit], forms: int) -> tuple[bytes, bytes]:
    """A run of the default editor with everything that reports and everything that decides; its pack."""
    folder.mkdir()
    torch.manual_seed(0)
    editor = Keyed(base, precision="float32")
    texts = folder / "irrelevant.jsonl"
    texts.write_text("".join(json.dumps({"question": text}) + "\n" for text in irrelevant_texts(40)))
    stream = world_stream(write_edits(folder / "edits.jsonl", edits), irrelevant=str(texts), window=4)
    board = Scoreboard(live=2, forms=forms, further=forms)
    loop = [ProbeGate(), ErrorSampleMonitor(), PruneAndRetrigger(max_attempts=2), board]
    fit(editor, stream, loop, folder)
    assert (board.beside["forms"] is None) == (forms == 0)
    assert board.beside["same_subject"] is not None
    pack = save_pack(editor, folder / "pack", {})
    return (pack / "side_memory.safetensors").read_bytes(), (pack / "repair_config.json").read_bytes()


@pytest.mark.parametrize("base", ["chat", "bare"])
def test_forms_and_other_questions_do_not_matter(tmp_path, monkeypatch, chat_folder, folder_of, edits, base):
    """Asked or not, in these words or others: the same shards, keys, limits and owners, to the bit."""
    folder = str(chat_folder if base == "chat" else folder_of("llama"))
    found = [default_run(tmp_path / name, folder, edits, number) for name, number in (("none", 0), ("all", 8))]
    for name, words in zip(SCORING_WORDS, OTHER_WORDS, strict=True):
        monkeypatch.setattr(asked_forms, name, words)
    monkeypatch.setattr(in_text, "ASKED", ("{} is", "What is {}?"))
    monkeypatch.setattr(beside, "DENIAL", "{}")
    monkeypatch.setattr(asked_forms, "OWN", tuple(edit.prompt.replace(str(edit.subject), "{}") for edit in edits[:4]))
    found.append(default_run(tmp_path / "other", folder, edits, 8))
    assert found[0] == found[1] == found[2]


def scoring_texts() -> list[str]:
    """The words of the evaluation's own."""
    found = [getattr(asked_forms, name) for name in SCORING_WORDS]
    found += [in_text.ASKED, beside.DENIAL, asked_forms.OWN]
    return [part for text in found for part in ([text] if isinstance(text, str) else text)]


def runs_of_words(text: str, number: int) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+|\{\}", text.casefold())
    return {tuple(words[i : i + number]) for i in range(len(words) - number + 1)}


def test_the_words_of_scoring_are_no_words_of_writing():
    """No four words in a row, a subject counted as one, stand in both the evaluation's texts and those that edits are
    written in or that the space of relations is learnt from."""
    written = [*written_forms.GREETING, written_forms.SYSTEM, written_forms.LEAD]
    written += [wording.replace(STAND_IN, "{}") for wording in bank()[0]]
    known = set().union(*(runs_of_words(text, 4) for text in written))
    assert {text: runs_of_words(text, 4) & known for text in scoring_texts() if runs_of_words(text, 4) & known} == {}
    short = {tuple(re.findall(r"\w+|\{\}", text.casefold())) for text in written}
    assert not short & {tuple(re.findall(r"\w+|\{\}", text.casefold())) for text in scoring_texts()}
