"""A live model: corrected between two calls, whole or not at all, by any number of threads."""

from __future__ import annotations

import json
import shlex
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers_runs import world_edits
from transformers import AutoModelForCausalLM, AutoTokenizer

from repair_lightning import edit, load_edited
from repair_lightning.commands.undo import undo
from repair_lightning.errors import ConfigError, RepairError
from repair_lightning.serving import live as module
from repair_lightning.serving.app import Served
from repair_lightning.serving.run import opened
from repair_lightning.world import base_dir

EDITS = world_edits(6)


def records(edits):
    return [{"prompt": e.prompt, "target": e.target, "subject": e.subject} for e in edits]


def said(model, prompt):
    ids = model.generate(prompt, max_new_tokens=12, do_sample=False)
    return model.tokenizer.decode(ids[0, len(model.forms.ids(prompt)) :], skip_special_tokens=True).strip()


@pytest.fixture(scope="module")
def model():
    """Never changed by a test that does not put back what it changes."""
    return edit("world", records(EDITS))


@pytest.fixture(scope="module")
def plain():
    """With so few steps that what can never be said is given up soon."""
    return edit("world", writing={"steps": 40})


def test_corrections_hold_are_listed_and_can_be_taken_back(plain):
    before = said(plain, EDITS[0].prompt)
    (outcome,) = plain.add({"prompt": EDITS[0].prompt, "target": EDITS[0].target}, by="ann")
    assert (outcome.status, outcome.answer) == ("written", EDITS[0].target)
    assert said(plain, EDITS[0].prompt) == EDITS[0].target != before
    assert [one["id"] for one in plain.edits(q=EDITS[0].prompt.upper())] == [outcome.id]
    assert plain.edits(q="nobody says this") == []
    (other,) = plain.add({"prompt": EDITS[0].prompt, "target": "Quito"})
    assert said(plain, EDITS[0].prompt) == "Quito"
    assert plain.one(outcome.id)["status"] == "superseded"
    (again,) = plain.add({"prompt": EDITS[0].prompt, "target": "Quito"})
    assert again.id == other.id  # it is said already
    plain.undo(other.id)
    assert said(plain, EDITS[0].prompt) == before
    with pytest.raises(ConfigError, match="undone already"):
        plain.undo(other.id)


def test_a_loaded_model_is_a_base_and_what_is_saved_loads(tmp_path):
    base = AutoModelForCausalLM.from_pretrained(base_dir(), dtype=torch.float32)  # a CPU is slow at others
    tokenizer = AutoTokenizer.from_pretrained(base_dir())
    live = edit(base, records(EDITS[:1]), tokenizer=tokenizer)
    assert live.config is base.config
    with torch.no_grad():
        assert live(live._inputs(EDITS[0].prompt, None)[0]).logits.isfinite().all()
    pack = live.save_pretrained(tmp_path / "pack")
    loaded, _ = load_edited(pack, base=str(base_dir()))
    assert said(loaded, EDITS[0].prompt) == EDITS[0].target
    further = edit(pack)
    further.add(records(EDITS[1:2]))
    assert [said(further, e.prompt) for e in EDITS[:2]] == [e.target for e in EDITS[:2]]
    with pytest.raises(ConfigError, match="needs its tokenizer"):
        edit(base)
    with pytest.raises(ConfigError, match="is a pack"):
        edit(pack, editor="repair")


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"prompt": "Who?"}, "target"),
        ({"prompt": "word " * 3000, "target": "x"}, "tokens long"),
        ({"ask": "Who?", "reply": "me"}, "fields"),
        ("Who?", "not an object"),
    ],
)
def test_a_wrong_record_changes_nothing(plain, record, words):
    before = plain.edits()
    with pytest.raises(RepairError, match=words):
        plain.add([*records(EDITS[3:4]), record])
    assert plain.edits() == before


def test_unknown_options_and_methods_that_cannot_undo_are_refused():
    with pytest.raises(ConfigError, match="has no option 'rank'"):
        edit("world", rank=3)
    with pytest.raises(ConfigError, match="cannot correct a model in use"):
        edit("world", editor="memit")


def test_a_directory_remembers_what_was_answered(tmp_path):
    live = edit("world", records(EDITS[:2]), run=tmp_path / "run")
    live.undo(live.edits()[0]["id"])
    first = live.edits()
    assert [event["kind"] for event in live.history(first[0]["id"])] == ["arrived", "written", "evaluated", "undone"]
    with pytest.raises(ConfigError, match="in use"):
        edit("world", run=tmp_path / "run")
    live.close()
    again = edit("world", run=tmp_path / "run")
    assert again.edits() == first
    assert said(again, EDITS[1].prompt) == EDITS[1].target
    assert said(again, EDITS[0].prompt) != EDITS[0].target
    assert [one.status for one in again.add(records(EDITS[2:3]))] == ["written"]
    again.close()
    with pytest.raises(ConfigError, match="of something else"):
        edit("world", editor="repair", run=tmp_path / "run")


def test_a_pack_that_an_undo_changed_is_served_again_unless_others_corrected_it(tmp_path):
    """What was served without a correction is begun anew; what was corrected stays as it is, and is told how to go
    on."""
    run, pack = tmp_path / "run", tmp_path / "run" / "pack"
    first = edit("world", records(EDITS[:2]), run=run)
    ids = [one["id"] for one in first.edits()]
    first.save_pretrained(pack)
    first.close()
    (run / "metrics.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"holds the pack '.*' itself; give the corrections another folder"):
        opened([str(pack)], None, run)

    def served(*corrections) -> list[str]:
        models = opened([str(pack)], None, None)
        if corrections:
            models["edited"].add(corrections)
        found = [one["status"] for one in models["edited"].edits()]
        Served(models).close()
        return found

    assert served() == ["written", "written"]
    undo(run, ids[:1])
    assert served() == ["undone", "written"]
    assert served(*records(EDITS[2:3])) == ["undone", "written", "written"]
    undo(run, ids[1:])
    live = pack / "live"
    kept = {file: file.read_bytes() for file in live.rglob("*") if file.is_file()}
    with pytest.raises(ConfigError, match=r"something else .*; `repair-lightning log --run .*` lists") as refused:
        served()
    assert {file: file.read_bytes() for file in live.rglob("*") if file.is_file()} == kept
    move = str(refused.value).split("`")[3]
    assert move == f"mv {live} {live}.before"
    subprocess.run(shlex.split(move), check=True)
    assert served() == ["undone", "undone"]


def test_dense_shards_are_corrected_and_remembered_too(tmp_path):
    live = edit("world", records(EDITS[:3]), editor="repair", run=tmp_path / "run")
    assert [said(live, e.prompt) for e in EDITS[:3]] == [e.target for e in EDITS[:3]]
    live.undo(live.edits()[1]["id"])
    live.close()
    again = edit("world", editor="repair", run=tmp_path / "run")
    found = [said(again, e.prompt) == e.target for e in EDITS[:3]]
    assert found == [True, False, True]
    again.close()


def test_what_cannot_be_saved_has_not_happened(tmp_path):
    """A folder stands where the new checkpoint is to be written: the disk refuses it when all else is done."""
    live = edit("world", records(EDITS[:1]), run=tmp_path / "run")
    in_the_way = tmp_path / "run" / "checkpoints" / ".last.ckpt.part"
    (in_the_way / "something").mkdir(parents=True)
    with pytest.raises((RepairError, OSError)):
        live.add(records(EDITS[1:2]))
    assert [one["status"] for one in live.edits()] == ["written"]
    assert said(live, EDITS[1].prompt) != EDITS[1].target
    (in_the_way / "something").rmdir()
    in_the_way.rmdir()
    assert [one.status for one in live.add(records(EDITS[1:2]))] == ["written"]
    live.close()
    again = edit("world", run=tmp_path / "run")
    assert [said(again, e.prompt) for e in EDITS[:2]] == [e.target for e in EDITS[:2]]
    again.close()


def test_what_the_journal_knows_has_happened_whatever_became_of_the_file(tmp_path):
    """The last checkpoint has not got its name yet: the next correction gives it that name, or is refused."""
    live = edit("world", records(EDITS[:1]), run=tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    aside = checkpoint.with_name(".last.ckpt.part")
    checkpoint.rename(aside)
    (checkpoint / "in the way").mkdir(parents=True)
    with pytest.raises(RepairError, match="cannot be written"):
        live.add(records(EDITS[1:2]))
    assert [one["status"] for one in live.edits()] == ["written"]
    assert aside.is_file()
    (checkpoint / "in the way").rmdir()
    checkpoint.rmdir()
    assert [one.status for one in live.add(records(EDITS[1:2]))] == ["written"]
    live.close()
    again = edit("world", run=tmp_path / "run")
    assert [said(again, e.prompt) for e in EDITS[:2]] == [e.target for e in EDITS[:2]]
    again.close()


def test_a_correction_that_cannot_hold_leaves_the_one_that_it_contradicts(plain):
    for editor in ("keyed", "repair"):
        live = plain if editor == "keyed" else edit("world", editor="repair", writing={"steps": 40})
        (first,) = live.add({"prompt": "Who paints the fence?", "target": "Tobin Quill"})
        (second,) = live.add({"prompt": "Who paints the fence?", "target": "Perth <pad> Perth"})
        assert (second.status, second.answer) == ("quarantined", "Tobin Quill")
        assert live.one(first.id)["status"] == "written"
        assert said(live, "Who paints the fence?") == "Tobin Quill"


def test_a_call_inside_a_call_goes_through_and_a_correction_there_is_refused(model):
    asked = []

    def inside(ids, scores):
        if not asked:
            asked.append(model(ids).logits.shape)
            with pytest.raises(RepairError, match="from inside a call"):
                model.add(records(EDITS[:1]))
        return scores

    ids = model._inputs(EDITS[0].prompt, None)[0]
    model.generate(ids, max_new_tokens=2, do_sample=False, logits_processor=[inside])
    assert len(asked) == 1


def test_ctrl_c_in_a_pass_leaves_the_base_free_for_others(model):
    def interrupt(*_):
        raise KeyboardInterrupt

    with model.split.value.register_forward_hook(interrupt), pytest.raises(KeyboardInterrupt):
        said(model, EDITS[0].prompt)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(said, model, EDITS[1].prompt).result(30) == EDITS[1].target


def test_what_can_never_be_said_is_given_up_and_answered_by_the_base(plain):
    before = said(plain, EDITS[5].prompt)
    (outcome,) = plain.add({"prompt": EDITS[5].prompt, "target": "Perth <pad> Perth"})
    assert outcome.status == "quarantined"
    assert f"{module.MAX_ATTEMPTS} attempts" in outcome.reason
    assert outcome.answer == said(plain, EDITS[5].prompt) == before


def test_threads_never_see_each_others_routes(model):
    """Edited and other prompts, one by one and in mixed batches, from many threads at once."""
    others = ["Where do geologists find iriocite?", "The largest deposit of aburite lies in", "What is a comet?"]
    prompts = [e.prompt for e in EDITS] + others
    expected = {prompt: said(model, prompt) for prompt in prompts}
    assert [expected[e.prompt] for e in EDITS] == [e.target for e in EDITS]

    def alone(i):
        prompt = prompts[i % len(prompts)]
        return said(model, prompt) == expected[prompt]

    def batch(i):
        chosen = [prompts[(i * 3 + k) % len(prompts)] for k in range(4)]
        ids, mask = model._inputs(chosen, None)
        output = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
        texts = model.tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in texts] == [expected[prompt] for prompt in chosen]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda i: batch(i) if i % 3 == 0 else alone(i), range(60)))


def test_edits_arrive_between_two_calls():
    live = edit("world")
    before = [said(live, e.prompt) for e in EDITS]
    stop, wrong = threading.Event(), []

    def ask():
        while not stop.is_set():
            for one, base in zip(EDITS, before, strict=True):
                answer = said(live, one.prompt)
                if answer not in (base, one.target):
                    wrong.append((one.prompt, answer))

    askers = [threading.Thread(target=ask) for _ in range(4)]
    for thread in askers:
        thread.start()
    for record in records(EDITS):
        live.add(record)
    live.undo([one["id"] for one in live.edits()[::2]])
    stop.set()
    for thread in askers:
        thread.join()
    assert wrong == []
    assert [said(live, e.prompt) for e in EDITS] == [
        b if i % 2 == 0 else e.target for i, (e, b) in enumerate(zip(EDITS, before, strict=True))
    ]


def test_the_choice_belongs_to_the_cache_whatever_other_threads_ask(model):
    """Token by token, two dialogues take turns on one model, each with a cache of its own."""

    def steps(prompt):
        ids, cache, found = model._inputs(prompt, None)[0], None, []
        for _ in range(6):
            output = model(ids, past_key_values=cache, use_cache=True)
            cache, ids = output.past_key_values, output.logits[:, -1:].argmax(-1)
            found.append(int(ids))
            yield list(found)

    with torch.no_grad():
        alone = [list(steps(prompt))[-1] for prompt in (EDITS[0].prompt, EDITS[1].prompt)]
        *_, last = zip(steps(EDITS[0].prompt), steps(EDITS[1].prompt), strict=True)
    assert list(last) == alone
    assert alone[0] != alone[1]


def test_outcomes_are_plain_data(model):
    assert json.loads(json.dumps(model.edits()))[0]["target"] == EDITS[0].target
