"""Base and edited model side by side, from a pack: who answered, why, and where the two differ."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers_runs import REPOSITORY, written_editor

from repair_lightning.__main__ import parser
from repair_lightning.ask import Pair, difference_lines, read_prompts
from repair_lightning.editors import Repair
from repair_lightning.errors import ConfigError, RecordError, RepairError
from repair_lightning.evaluation.protocols import answers
from repair_lightning.packs import save_pack
from repair_lightning.types import BASE, Edit

ELSEWHERE = "Which river flows through Zarvik?"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY)}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Repair, list[Edit]]:
    """A pack of six edits with a shard each, and the editor that wrote it."""
    editor, stream = written_editor(6, form="low_rank", capacity=1)
    return save_pack(editor, tmp_path_factory.mktemp("ask") / "pack", {}), editor, list(stream.edits)


@pytest.fixture(scope="module")
def pair(made) -> Pair:
    return Pair.open(made[0])


def test_both_answers_and_who_gave_them(pair, made):
    _, editor, edits = made
    told, left = pair.ask([edits[0].prompt, ELSEWHERE])
    base = answers(editor.edited, [edits[0].prompt, ELSEWHERE], torch.tensor([BASE, BASE]), 32)
    assert [told.base, left.base] == base
    assert told.edited == edits[0].target != told.base
    assert left.edited == left.base
    assert (told.differs, left.differs) == (True, False)
    assert told.route.memory == editor.ledger.owner_of(edits[0].id)
    assert (told.memory, left.memory) == (f"shard {told.route.memory}", "base")
    assert told.nearest == replace(edits[0], locality=told.nearest.locality, near=told.nearest.near)
    assert told.route.score > told.route.threshold
    assert not left.route.score > left.route.threshold


def test_the_lines_say_what_a_person_asks_for(pair, made):
    edit = made[2][0]
    (reply,) = pair.ask([edit.prompt])
    prompt, base, edited, memory, nearest, reason = reply.lines()
    assert prompt == edit.prompt
    assert (base.split(), edited.split()) == (["base", *reply.base.split()], ["edited", *edit.target.split()])
    assert memory == f"  memory   shard {reply.route.memory}"
    assert nearest == f"  nearest  {edit.id}: {edit.prompt} -> {edit.target}"
    assert reason == f"  reason   {reply.route.reason}"
    assert f"score {reply.route.score:.3f} exceeds {reply.route.threshold:.3f}" in reason
    assert json.loads(json.dumps(reply.as_dict()))["nearest"]["id"] == edit.id


def test_another_question_about_the_subject_is_refused_for_what_it_asks(pair, made):
    """It names the subject in full, so the score passes; the reason must name the check that did not."""
    edit = made[2][0]
    (reply,) = pair.ask([f"Tell me about {edit.subject}"])
    assert reply.route.memory == BASE
    assert reply.route.score > reply.route.threshold
    assert "but likeness of what is asked" in reply.route.reason
    assert "does not exceed" not in reply.route.reason


def test_a_merged_matrix_is_the_edited_answer_alone(made, tmp_path):
    """Edits that a merge wrote into W_v: the base's answer is still the base's own, before and after."""
    editor, stream = written_editor(1, capacity=1)
    edit = stream.edits[0]
    before = answers(editor.edited, [edit.prompt], torch.tensor([BASE]), 32)
    (shard,) = editor.memory.ids
    editor.fold(shard)
    editor.ledger.reassign([edit.id], BASE)
    pair = Pair.open(save_pack(editor, tmp_path / "pack", {}))
    for _ in range(2):
        (reply,) = pair.ask([edit.prompt])
        assert [reply.base] == before
        assert reply.edited == edit.target
        assert reply.memory == "base, with 1 edit written into it"


def test_what_cannot_be_asked_is_refused(pair):
    with pytest.raises(ConfigError, match=r"prompt 'who who .*' has .* tokens, .* shorten it"):
        pair.ask(["who " * 3000])
    with pytest.raises(ConfigError, match="a prompt is empty"):
        pair.ask([" "])
    with pytest.raises(ConfigError, match="max_new_tokens must be at least 1, got 0"):
        Pair(pair.model, max_new_tokens=0)


# -- files of prompts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.txt", "a b\n\n  c?  \n"),
        ("prompts", "a b\nc?"),
        ("p.jsonl", '{"prompt": "a b", "target": "x"}\n{"question": "c?"}\n'),
        ("p.json", '["a b", "c?"]'),
        ("p.csv", "id,prompt\n1,a b\n2,c?\n"),
    ],
)
def test_prompts_from_a_file(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert read_prompts(tmp_path / name) == ["a b", "c?"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.txt", " \n", "holds no prompts"),
        ("p.jsonl", '{"text": "a"}', "record 1, field 'prompt': is missing or no text"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt"', "record 2: is not valid JSON"),
        ("p.csv", "text\na\n", "record 1, field 'prompt'"),
        ("absent.txt", None, "no such file"),
    ],
)
def test_a_bad_file_of_prompts(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises((RecordError, RepairError), match=words):
        read_prompts(tmp_path / name)


def test_no_text_at_all(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RepairError, match="cannot be read as UTF-8 text"):
        read_prompts(tmp_path / "p.txt")


def test_the_differences_and_their_number(pair, made):
    edits = made[2]
    replies = pair.ask([edits[0].prompt, ELSEWHERE, edits[1].prompt])
    *listed, last = difference_lines(replies)
    assert [line for line in listed if line and not line.startswith(" ")] == [edits[0].prompt, edits[1].prompt]
    assert last == "2 of 3 prompts answered differently (66.7 %); a shard answered 2, the base 1"
    assert difference_lines(replies, Path("d.jsonl")) == [f"{last}; d.jsonl"]
    assert difference_lines(replies[1:2])[-1].startswith("0 of 1 prompt answered differently (0.0 %)")


# -- the commands ------------------------------------------------------------------------------------------------------


def run(*argv: object) -> None:
    """A command in this process."""
    options = parser().parse_args([str(word) for word in argv])
    options.run_command(options)


def test_ask_reads_questions_from_a_pipe(made, monkeypatch, capsys):
    """Without a terminal there is no prompt in the output; a bad question does not end the conversation."""
    pack, _, edits = made
    typed = f"{edits[0].prompt}\n\n{'who ' * 3000}\n{ELSEWHERE}\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    run("ask", "--pack", pack)
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert (lines[0], lines[6]) == (edits[0].prompt, ELSEWHERE)
    assert f"  edited   {edits[0].target}" in lines
    assert "error: prompt 'who " in said.err


def test_ask_takes_several_questions(made, capsys):
    pack, _, edits = made
    run("ask", "--pack", pack, edits[0].prompt, ELSEWHERE)
    first, second = capsys.readouterr().out.split("\n\n")
    assert first.startswith(edits[0].prompt)
    assert second.startswith(ELSEWHERE)


def test_a_question_without_quotes_is_one_question(made, monkeypatch, capsys):
    pack, _, edits = made
    run("ask", "--pack", pack, *edits[0].prompt.split())
    assert capsys.readouterr().out.startswith(edits[0].prompt)


def test_ask_opens_a_prompt_in_a_terminal_and_ctrl_d_leaves_it(made):
    pack, _, edits = made
    ours, theirs = pty.openpty()
    call = [sys.executable, "-m", "repair_lightning", "ask", "--pack", str(pack)]
    process = subprocess.Popen(
        call, stdin=theirs, stdout=theirs, stderr=theirs, env=ENVIRONMENT | {"TERM": "dumb"}, start_new_session=True
    )
    os.close(theirs)
    assert until(ours, "> ")
    os.write(ours, f"{edits[0].prompt}\n".encode())
    said = until(ours, "\n> ")
    assert f"edited   {edits[0].target}" in said
    os.write(ours, b"\x04")
    assert process.wait(30) == 0
    os.close(ours)


def until(terminal: int, end: str) -> str:
    """What a terminal shows, up to some text."""
    said, late = "", time.monotonic() + 300
    while not said.replace("\r", "").endswith(end):
        assert time.monotonic() < late, said
        said += os.read(terminal, 1024).decode(errors="replace")
    return said


def test_diff_lists_and_counts(made, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pack, _, edits = made
    (tmp_path / "prompts.txt").write_text("\n".join([edits[0].prompt, ELSEWHERE, edits[1].prompt]))
    run("diff", "--pack", pack, "--data", "prompts.txt", "--to", "d.jsonl")
    assert (
        capsys.readouterr().out
        == "2 of 3 prompts answered differently (66.7 %); a shard answered 2, the base 1; d.jsonl\n"
    )
    rows = [json.loads(line) for line in (tmp_path / "d.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [edits[0].prompt, edits[1].prompt]
    assert [row["edited"] for row in rows] == [edits[0].target, edits[1].target]
    assert all(row["base"] != row["edited"] and row["nearest"]["id"] for row in rows)
