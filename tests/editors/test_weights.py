"""What only the editors that write into the base's own matrices promise: each its defining property, on tiny bases."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch
import yaml
from helpers_runs import REPOSITORY, fit, world_edits, world_stream

from repair_lightning.editors import make_editor
from repair_lightning.editors.inner_loop import TargetRows
from repair_lightning.editors.ultraedit import pseudo_values
from repair_lightning.editors.values import Values
from repair_lightning.edits.records import load_records
from repair_lightning.functional.least_squares import Recursion, damped_change
from repair_lightning.packs.pack import restore_editor, save_pack
from repair_lightning.types import BASE, EditBatch

SURE = Values(lr=0.3, steps=60, stop_margin=6.0)
AT_SUBJECT = Values(at="subject", lr=0.3, steps=40, stop_margin=3.0)
SOFT = {"ridge": 0.003, "anchoring": 0.01}


def test_the_subjects_last_token(editor_of, edits):
    editor = editor_of("llama", "rlsedit", layer=1, values=AT_SUBJECT)
    encoded = [editor.encode(edit) for edit in edits]
    places = editor.places(edits, encoded, TargetRows.of(editor.edited, encoded))
    for edit, row, back in zip(edits, encoded, places.back.tolist(), strict=True):
        upto = editor.tokenizer.decode(row.ids[: len(row.ids) - back], skip_special_tokens=True)
        assert edit.subject in upto
        shorter = editor.tokenizer.decode(row.ids[: len(row.ids) - back - 1], skip_special_tokens=True)
        assert edit.subject not in shorter


class TestRLSEdit:
    def test_the_matrix_is_the_minimiser_of_all_it_remembers(self, editor_of, write, edits):
        """By the closed form of the stacked problem, in float64."""
        editor = editor_of("llama", "rlsedit", values=SURE, **SOFT)
        write(editor, edits, 3)
        layer = editor.layer
        ridge, anchoring = editor.strengths(layer)
        original, anchors = editor.edited.weights.original(layer).double(), editor.anchor_keys(layer).double()
        terms = [editor.terms[edit.id][layer] for edit in edits]
        rows = [ridge**0.5 * torch.eye(original.shape[1], dtype=torch.float64), anchoring**0.5 * anchors]
        aims = [ridge**0.5 * original.T, anchoring**0.5 * anchors @ original.T]
        rows += [term.keys.double() for term in terms]
        aims += [term.values.double() for term in terms]
        wanted = torch.linalg.lstsq(torch.cat(rows), torch.cat(aims)).solution.T.float()
        torch.testing.assert_close(editor.edited.weights.matrix(layer), wanted, rtol=1e-3, atol=1e-3)

    def test_an_undone_edits_term_is_gone(self, editor_of, write, edits):
        """The problem without it, solved anew from W_0, and the rest untouched in the ledger; without all it is the
        base, bitwise identical."""
        editor = editor_of("llama", "rlsedit", values=SURE, layers=2, **SOFT)
        weights = {key: value.clone() for key, value in editor.base.model.state_dict().items()}
        write(editor, edits, 3)
        kept = [edit for edit in edits if edit.id not in ("e1", "e4")]
        assert editor.undo(["e1", "e4"]) == []
        for layer in editor.written_layers:
            anew = Recursion.start(
                editor.edited.weights.original(layer), editor.anchor_keys(layer), *editor.strengths(layer)
            )
            for edit in kept:
                term = editor.terms[edit.id][layer]
                anew = anew.absorb(term.keys, term.values)
            apart = editor.edited.weights.matrix(layer) - anew.weight
            assert float(apart.norm() / anew.weight.norm()) < 3e-3
        assert editor.terms.keys() == {edit.id for edit in kept}
        assert [editor.ledger.owner_of(edit.id) for edit in kept] == [BASE] * len(kept)
        editor.undo([edit.id for edit in kept])
        assert all(torch.equal(value, weights[key]) for key, value in editor.base.model.state_dict().items())
        assert editor.own_state() == {"ids": []}

    def test_anchors_that_scoring_asks_are_left_out(self, tmp_path, caplog):
        """On the way that a run takes: what is held to the base's answer must not be what `Loc` asks."""
        edit = world_edits(2)[0]
        given = [edit.locality[0].prompt, "the sky is blue", "the sky is blue"]
        options = {"base": "world", "precision": "float32", "anchors": given, "values": asdict(SURE)}
        editor = make_editor("rls_repair", options)
        fit(editor, world_stream(max_edits=2), [], tmp_path)
        assert editor.anchors == ["the sky is blue"]
        assert editor.anchored == ["the sky is blue"]
        assert "anchors: 2 of 3 are asked in scoring or repeated: left out" in caplog.text

    def test_a_pack_needs_neither_the_file_nor_the_same_irrelevant_prompts(self, editor_of, write, edits, tmp_path):
        """What the problem holds is the pack's own: bounds and undo go on."""
        file = tmp_path / "anchors.txt"
        file.write_text("the sky is blue\nthe river runs\n")
        for anchors in (str(file), None):
            editor = editor_of("llama", "rlsedit", anchors=anchors, layers=2, values=SURE, **SOFT)
            write(editor, edits[:3])
            pack = save_pack(editor, tmp_path / f"pack-{anchors is None}", {})
            file.unlink(missing_ok=True)
            again = restore_editor(pack, precision="float32")
            again.prepare(["quite another text"], ["and one more"])
            for layer in editor.written_layers:
                assert again.bounds(layer) == pytest.approx(editor.bounds(layer))
            again.undo([edits[1].id])
            editor.undo([edits[1].id])
            for layer in editor.written_layers:
                assert torch.equal(again.edited.weights.matrix(layer), editor.edited.weights.matrix(layer))


class TestROME:
    def test_the_key_gets_its_value_by_the_least_change(self, editor_of, edits):
        """`W' k = v`, and the change is along `C^-1 k`, so that no smaller one in the norm of C does it."""
        editor = editor_of("llama", "rome", layer=1, values=AT_SUBJECT)
        seen = {}
        solve = editor.solve
        editor.solve = lambda layer, ids, of, keys, values: (
            seen.update(k=keys, v=values) or solve(layer, ids, of, keys, values)
        )
        before = editor.edited.weights.matrix(1)
        editor.ledger.arrive(edits[:1], 0)
        editor.write(EditBatch((edits[0],)))
        after = editor.edited.weights.matrix(1)
        torch.testing.assert_close(seen["k"] @ after.T, seen["v"], rtol=1e-3, atol=1e-3)
        assert float((seen["v"] - seen["k"] @ before.T).norm()) > 0.1, "the premise"
        toward = torch.linalg.solve(editor.moments[1], seen["k"][0])
        change = after - before
        torch.testing.assert_close(
            change, torch.outer(change @ toward / (toward @ toward), toward), rtol=1e-2, atol=1e-3
        )

    @pytest.mark.parametrize("name", ["rome", "memit"])
    def test_a_base_that_knows_facts_says_another(self, name, irrelevant):
        """On the embedded world, with the settings for a small base: what had hardly a chance is the likelier answer,
        to a rephrase as well."""
        settings = yaml.safe_load((REPOSITORY / "configs/compare/compare_zsre_small.yaml").read_text())
        options = settings["variants"][name]["options"]
        values = {key.rsplit(".", 1)[1]: value for key, value in options.items() if key.startswith("model.values.")}
        own = {key.rsplit(".", 1)[1]: value for key, value in options.items() if key.count(".") == 1}
        plain = make_editor(name, {}).options()
        editor = make_editor(name, {**plain, "base": "world", **own, "values": plain["values"] | values})
        editor.load()
        editor.prepare(irrelevant[:8], irrelevant[8:])
        edit = load_records(REPOSITORY / "repair_lightning/world/edits.jsonl").edits[200]
        asked = [edit, replace(edit, prompt=edit.rephrases[0])]
        before = [loss_of(editor, one) for one in asked]
        editor.write(EditBatch((edit,)))
        after = [loss_of(editor, one) for one in asked]
        assert min(before) > 3
        assert after[0] < 0.3
        assert after[1] < 0.5 * before[1]


def test_memit_solves_the_batchs_normal_equations(editor_of, edits):
    """`delta (w C + K^T K) = R^T K` at the lowest layer, whose keys do not move."""
    editor = editor_of("llama", "memit", layer=0, layers=2, values=AT_SUBJECT, moment_weight=0.5)
    seen = {}
    solve = editor.solve
    editor.solve = lambda layer, ids, of, keys, values: (
        seen.setdefault(layer, (keys, values)) and solve(layer, ids, of, keys, values)
    )
    before = editor.edited.weights.matrix(0)
    editor.write(EditBatch(tuple(edits[:4])))
    keys, values = seen[0]
    delta = editor.edited.weights.matrix(0) - before
    assert float((values - keys @ before.T).norm()) > 0.1, "the premise"
    left = delta @ (0.5 * editor.moments[0] + keys.T @ keys)
    torch.testing.assert_close(left, (values - keys @ before.T).T @ keys, rtol=1e-3, atol=1e-3)
    assert sorted(seen) == [0, 1]


def test_ultraedit_makes_the_published_shift(editor_of, write, edits):
    """Keys and gradients, normalised over all edits so far, in the closed form; the gradients by autograd through
    the whole model."""
    editor = editor_of("llama", "ultraedit", layers=1, lr=0.01)
    write(editor, edits[:3])
    before, known = editor.edited.weights.matrix(editor.layer), editor.known[editor.layer]
    later = edits[3:6]
    keys = keys_by_hand(editor, later)
    gradients = gradients_by_hand(editor, later)
    write(editor, later)
    known = known.with_(torch.cat([keys, gradients], -1))
    aims = pseudo_values(keys, gradients, known, 0.01)
    wanted = damped_change(keys, aims, torch.eye(keys.shape[1]))
    torch.testing.assert_close(editor.edited.weights.matrix(editor.layer) - before, wanted, rtol=1e-2, atol=1e-4)


def keys_by_hand(editor, edits):
    rows = [editor.encode(edit) for edit in edits]
    captures = editor.edited.captures([row.ids for row in rows])
    pairs = zip(rows, captures, strict=True)
    return torch.cat([c.activations[len(r.prompt) - 1 : len(r.ids) - 1].float() for r, c in pairs])


def gradients_by_hand(editor, edits):
    """Of the mean token loss, at the value matrix's output, row by row."""
    rows, found = [editor.encode(edit) for edit in edits], []
    tokens = sum(len(row.target) for row in rows)
    for row in rows:
        outputs = []
        handle = editor.edited.split.value.register_forward_hook(
            lambda _, __, out, outputs=outputs: outputs.append(out.detach().requires_grad_()) or outputs[0]
        )
        logits = editor.base.model(input_ids=torch.tensor([row.ids])).logits[0]
        handle.remove()
        start = len(row.prompt)
        loss = torch.nn.functional.cross_entropy(logits[start - 1 : -1], torch.tensor(row.target), reduction="sum")
        (loss / tokens).backward()
        found.append(outputs[0].grad[0, start - 1 : -1])
    return torch.cat(found)


def loss_of(editor, edit):
    """The mean token loss of an edit's target, by the whole model."""
    row = editor.encode(edit)
    with torch.no_grad():
        logits = editor.base.model(input_ids=torch.tensor([row.ids])).logits[0, len(row.prompt) - 1 : -1]
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor(row.target)))
