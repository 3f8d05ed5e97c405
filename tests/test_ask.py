"""Base and edited model side by side, from a pack: who answered, why, and where the two differ."""

from __future__ import annotations

import io
import json
import logging
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers_runs import written_editor

from repair_lightning.__main__ import run as run_command
from repair_lightning.commands.ask import Pair, read_prompts
from repair_lightning.editors import Keyed
from repair_lightning.errors import RecordError, RepairError
from repair_lightning.packs.pack import save_pack
from repair_lightning.scoring.protocols import answers
from repair_lightning.texts import dialogue
from repair_lightning.types import BASE, READS, Edit

ELSEWHERE = "Which river flows through Zarvik?"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Keyed, list[Edit]]:
    """A pack of six edits with a shard each, and the editor that wrote it."""
    editor, stream = written_editor(6, form="low_rank", capacity=1)
    return save_pack(editor, tmp_path_factory.mktemp("ask") / "pack", {}), editor, list(stream.edits)


@pytest.fixture(scope="module")
def pair(made) -> Pair:
    return Pair(made[0])


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


def test_a_text_about_a_subject_is_the_bases_which_has_read_the_edit(pair, made):
    _, editor, edits = made
    asked = f"Write a sentence about {edits[0].subject}."
    (reply,) = pair.ask([asked])
    assert reply.memory == "base, after it has read edits"
    assert reply.nearest.id == edits[0].id
    assert reply.edited == answers(editor.edited, [asked], torch.tensor([READS]), 32)[0]
    assert reply.base == answers(editor.edited, [asked], torch.tensor([BASE]), 32)[0]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("prompts", "a b\n\n  c?  \n"),
        ("p.jsonl", '{"prompt": "a b", "target": "x"}\n{"question": "c?"}\n'),
        ("p.json", '["a b", "c?"]'),
        ("p.csv", "id,prompt\n1,a b\n2,c?\n"),
        ("p.txt", "\ufeffa b\r\nc?\r\n"),
    ],
)
def test_prompts_from_a_file(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    assert read_prompts(tmp_path / name) == ["a b", "c?"]


def talk(*contents: str) -> list[dict[str, str]]:
    """Turns of user and base, by turns; the last is the user's where their number is odd."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


ONE, THREE = talk("a b"), talk("Hi!", "Hello.", "c?")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.jsonl", f'{{"messages": {json.dumps(ONE)}}}\n{{"prompt": {json.dumps(THREE)}}}\n'),
        ("p.json", json.dumps([ONE, {"question": THREE}])),
        ("p.json", json.dumps([json.dumps(ONE), {"prompt": json.dumps(THREE)}])),
        ("p.txt", f"{json.dumps(ONE)}\n  {json.dumps(THREE)}\n"),
    ],
)
def test_messages_from_a_file(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert [dialogue.parse(prompt) for prompt in read_prompts(tmp_path / name)] == [ONE, THREE]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.txt", " \n", "holds no prompts"),
        ("p.jsonl", '{"text": "a"}', "record 1, field 'prompt': is missing or no text"),
        ("p.jsonl", '{"prompt": ["a"]}', r"record 1, field 'prompt\[0\]': is 'a', not a message; write"),
        ("p.txt", json.dumps([{"role": "wizard", "content": "b"}]), r"record 1, .*is 'wizard', no known role"),
        ("absent.txt", None, "no such file"),
    ],
)
def test_a_bad_file_of_prompts(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises((RecordError, RepairError), match=words):
        read_prompts(tmp_path / name)


def run(*argv: object) -> None:
    """A command in this process."""
    run_command([str(word) for word in argv])


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


@pytest.fixture(scope="module")
def in_chat(tmp_path_factory, chat_folder, prepared, edits, write) -> tuple[Path, list[Edit]]:
    """A pack of two edits of a base with a chat template."""
    editor = prepared(chat_folder)
    assert all(report.error is None for report in write(editor, edits[:2]))
    return save_pack(editor, tmp_path_factory.mktemp("ask") / "pack", {}), edits[:2]


def test_ask_says_what_it_loads(made, caplog):
    with caplog.at_level(logging.INFO):
        Pair(made[0])
    assert caplog.messages == ["loading the base 'world'"]


def test_messages_on_the_command_line(in_chat, tmp_path, capsys):
    pack, edits = in_chat
    asked = talk("Hello there!", "Good day.", edits[0].prompt)
    run("ask", "--pack", pack, json.dumps(asked), edits[1].prompt)
    first, second = capsys.readouterr().out.split("\n\n")
    assert first.startswith("user: Hello there!\nassistant: Good day.\nuser: ")
    assert f"  edited   {edits[0].target}" in first.splitlines()
    assert second.startswith(edits[1].prompt)
    with pytest.raises(RepairError, match=r"'question\[1\].role': is 'assistant' in the last turn"):
        run("ask", "--pack", pack, json.dumps(asked[:2]))
    (tmp_path / "p.jsonl").write_text(json.dumps({"messages": asked}) + "\n")
    run("diff", "--pack", pack, "--data", tmp_path / "p.jsonl", "--to", tmp_path / "d.jsonl")
    (row,) = [json.loads(line) for line in (tmp_path / "d.jsonl").read_text().splitlines()]
    assert (row["prompt"], row["edited"]) == (asked, edits[0].target)
    assert read_prompts(tmp_path / "d.jsonl") == [dialogue.dump(asked)]


def test_diff_lists_and_counts(made, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pack, _, edits = made
    (tmp_path / "prompts.txt").write_text("\n".join([edits[0].prompt, ELSEWHERE, edits[1].prompt]))
    run("diff", "--pack", pack, "--data", "prompts.txt", "--to", "d.jsonl")
    said = "2 of 3 prompts answered differently (66.7 %); a shard answered 2, the base 1; d.jsonl\n"
    assert capsys.readouterr().out == said
    rows = [json.loads(line) for line in (tmp_path / "d.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [edits[0].prompt, edits[1].prompt]
    assert [row["edited"] for row in rows] == [edits[0].target, edits[1].target]
    assert all(row["base"] != row["edited"] and row["nearest"]["id"] for row in rows)
