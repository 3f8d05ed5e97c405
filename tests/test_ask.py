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
from helpers_chat import chat_folder
from helpers_runs import REPOSITORY, written_editor

from repair_lightning.__main__ import parser
from repair_lightning.commands.ask import Pair, difference_lines, read_prompts
from repair_lightning.editors import Repair
from repair_lightning.errors import ConfigError, RecordError, RepairError
from repair_lightning.packs.pack import save_pack
from repair_lightning.scoring.protocols import answers
from repair_lightning.texts import dialogue
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
    """It names the subject in full; the reason must say how far it is from what the edit asks, and which edit that
    is."""
    edit = made[2][0]
    (reply,) = pair.ask([f"Tell me about {edit.subject}"])
    assert reply.route.memory == BASE
    assert -1 < reply.route.score <= reply.route.threshold
    assert reply.route.reason.startswith(f"base: score {reply.route.score:.3f} does not exceed")
    assert reply.nearest is not None
    assert reply.nearest.subject == edit.subject
    (left,) = pair.ask([ELSEWHERE])
    assert left.route.reason == "base: no edit is about what it names"
    assert left.nearest is None


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
        ("p.jsonl", f"{json.dumps(ONE)}\n{json.dumps(THREE)}\n"),
        ("p.json", json.dumps([ONE, {"question": THREE}])),
        ("p.json", json.dumps([json.dumps(ONE), {"prompt": json.dumps(THREE)}])),
        ("p.txt", f"{json.dumps(ONE)}\n  {json.dumps(THREE)}\n"),
    ],
)
def test_messages_from_a_file(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert [dialogue.parse(prompt) for prompt in read_prompts(tmp_path / name)] == [ONE, THREE]


def test_a_file_may_be_one_dialogue(tmp_path):
    (tmp_path / "p.json").write_text(json.dumps(THREE, indent=1))
    assert read_prompts(tmp_path / "p.json") == [dialogue.dump(THREE)]


def test_prompts_are_kept_as_written(tmp_path):
    """Blanks and line breaks may be the point of a prompt; a list that is no dialogue is a text."""
    texts = ["  def f():\n    ", "a\u2028b", "[1, 2]", '[{"a": 1}]', "Is {} a set?"]
    (tmp_path / "p.json").write_text(json.dumps(texts))
    assert read_prompts(tmp_path / "p.json") == texts
    (tmp_path / "p.jsonl").write_text(
        "".join(json.dumps({"prompt": text}, ensure_ascii=False) + "\n" for text in texts)
    )
    assert read_prompts(tmp_path / "p.jsonl") == texts
    (tmp_path / "p.txt").write_text("a\u2028b\x0cc\nd", encoding="utf-8")
    assert read_prompts(tmp_path / "p.txt") == ["a\u2028b\x0cc", "d"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.txt", " \n", "holds no prompts"),
        ("p.jsonl", '{"text": "a"}', "record 1, field 'prompt': is missing or no text"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt"', "record 2: is not valid JSON"),
        ("p.csv", "text\na\n", "record 1, field 'prompt'"),
        ("p.jsonl", '{"prompt": ["a"]}', r"record 1, field 'prompt\[0\]': is 'a', not a message; write"),
        ("p.jsonl", '{"messages": [{"role": "user", "content": " "}]}', r"'messages\[0\].content': is empty"),
        (
            "p.json",
            json.dumps(["a", talk("b", "c")]),
            r"record 2, field 'messages\[1\].role': is 'assistant' in the last",
        ),
        ("p.txt", json.dumps([{"role": "wizard", "content": "b"}]), r"record 1, .*is 'wizard', no known role"),
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


# -- messages ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def in_chat(tmp_path_factory, tiny, tokenizer, irrelevant, edits, write) -> tuple[Path, list[Edit]]:
    """A pack of two edits of a base with a chat template."""
    base = chat_folder(tmp_path_factory.mktemp("bases") / "chat", tiny, tokenizer)
    editor = Repair(str(base), precision="float32")
    editor.load()
    editor.prepare(irrelevant[:8], irrelevant[8:])
    assert all(report.error is None for report in write(editor, edits[:2]))
    return save_pack(editor, tmp_path_factory.mktemp("ask") / "pack", {}), edits[:2]


def test_messages_are_asked_and_shown(in_chat):
    """The last turn is the question; a person reads turns, a program gets messages."""
    pack, edits = in_chat
    pair = Pair.open(pack)
    asked = talk("Hello there!", "Good day.", edits[0].prompt)
    (reply,) = pair.ask(asked)
    assert reply.edited == edits[0].target != reply.base
    turns = ["user: Hello there!", "assistant: Good day.", f"user: {edits[0].prompt}"]
    assert "\n".join(reply.lines()).splitlines()[:3] == turns
    assert json.loads(json.dumps(reply.as_dict()))["prompt"] == asked
    one, plain = pair.ask([talk(edits[1].prompt), edits[1].prompt])
    assert one.edited == plain.edited == edits[1].target
    assert one.lines()[0] == plain.lines()[0] == edits[1].prompt
    with pytest.raises(ConfigError, match="prompt 'user: Hi"):
        pair.ask(talk("Hi " * 2000, "Yes?", "Who?"))


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


def test_messages_to_a_base_without_a_template_are_refused(pair, made):
    with pytest.raises(ConfigError, match="the base has no chat template"):
        pair.ask(talk(made[2][0].prompt))


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
