"""Which way of telling a chat base facts makes it say them, which retriever finds them, and what LoRA's rate does.

    python docs/studies/in_chat.py icl|lora|retriever ZSRE_RECORDS COUNTERFACT_RECORDS IRRELEVANT_QUESTIONS [BASE]

ZsRE records from 600 on and CounterFact records from 2,000 on: six of each for `icl`, three for `lora`, a hundred for
`retriever`; on SmolLM2 through its template, or another BASE. Each edit is asked in its own words and in others: how
many answers are the target, for `icl` how many of twelve tokens hold it, for `retriever` how often the edit is read.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from repair_lightning.editors import make_editor
from repair_lightning.models.base import load_base
from repair_lightning.models.forms import Forms
from repair_lightning.models.prefix import pad_left
from repair_lightning.scoring.protocols import answers, contains, same_answer
from repair_lightning.types import BASE, Edit, EditBatch

Messages = list[dict[str, str]]


def user(text: str) -> Messages:
    """A turn of the user."""
    return [{"role": "user", "content": text}]


def system(text: str) -> Messages:
    """A system message."""
    return [{"role": "system", "content": text}]


def turns(asked: str, answer: str) -> Messages:
    """A question and its answer."""
    return [*user(asked), {"role": "assistant", "content": answer}]


WAYS: dict[str, Callable[[str, str, str], Messages]] = {
    "system message": lambda p, t, q: [
        *system(f"Answer with these facts, in as few words as possible:\n{p} {t}"),
        *user(q),
    ],
    "system message, Question: and Answer:": lambda p, t, q: [
        *system(f"Answer the user's question with the answer below, word for word.\nQuestion: {p}\nAnswer: {t}"),
        *user(q),
    ],
    "the user's own turn": lambda p, t, q: user(f"{p} {t}\n\n{q}"),
    "earlier turns": lambda p, t, q: [*turns(p, t), *user(q)],
    "earlier turns, told to be brief": lambda p, t, q: [*system("Answer in a few words."), *turns(p, t), *user(q)],
    "system message and earlier turns": lambda p, t, q: [
        *system(f"Answer in a few words. {p} {t}"),
        *turns(p, t),
        *user(q),
    ],
}


def read(zsre: str, counterfact: str, number: int) -> list[Edit]:
    """The edits, with one rephrase each."""
    files = [json.loads(Path(file).read_text(encoding="utf-8")) for file in (zsre, counterfact)]
    names = ("src", "alt", "rephrase"), ("prompt", "target_new", "rephrase_prompt")
    found = []
    for records, first, (prompt, target, rephrase) in zip(files, (600, 2000), names, strict=True):
        for i, record in enumerate(records[first : first + number]):
            subject, other = record["subject"], (record[rephrase],)
            found.append(Edit(f"{first}-{i}", record[prompt], record[target], subject=subject, rephrases=other))
    return found


def said(base, forms: Forms, dialogues: list[Messages]) -> list[str]:
    """What the base says to dialogues, in at most twelve tokens."""
    ids, mask = pad_left([forms.in_chat(dialogue) for dialogue in dialogues])
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": base.tokenizer.pad_token_id}
    output = base.model.generate(input_ids=ids, attention_mask=mask, **options)
    return [forms.said(row).strip() for row in output[:, ids.shape[1] :].tolist()]


def tell(edits: list[Edit]) -> None:
    """A row of the table for each way."""
    base = load_base("smollm2")
    forms = base.forms("chat")
    for name, way in WAYS.items():
        row = []
        for asked in ([e.prompt for e in edits], [e.rephrases[0] for e in edits]):
            found = said(base, forms, [way(e.prompt, e.target, q) for e, q in zip(edits, asked, strict=True)])
            right = sum(same_answer(text, e.target) for text, e in zip(found, edits, strict=True))
            row.append(f"{right}/{sum(contains(text, e.target) for text, e in zip(found, edits, strict=True))}")
        print(f"| {name} | {' | '.join(row)} |", flush=True)


def train(edits: list[Edit], irrelevant: list[str]) -> None:
    """A row for each rate: the edits, their rephrases, ten irrelevant prompts whose answers stay."""
    for lr in (1e-3, 3e-4):
        options = {"base": "smollm2", "lr": lr, "epochs": 10, "rank": 8, "alpha": 16.0, "batch": 3}
        editor = make_editor("lora", options)
        editor.load()
        editor.prepare(irrelevant[:4], irrelevant[4:8])
        prompts = [*(e.prompt for e in edits), *(e.rephrases[0] for e in edits), *irrelevant[20:30]]

        def ask(editor=editor, prompts=prompts) -> list[str]:
            return answers(editor.edited, prompts, torch.full((len(prompts),), BASE), 8)

        before = ask()
        editor.ledger.arrive(edits, 0)
        reports = editor.write(EditBatch(tuple(edits)))
        after = ask()
        right = [same_answer(text, e.target) for text, e in zip(after, [*edits, *edits], strict=False)]
        kept = sum(a == b for a, b in zip(before[-10:], after[-10:], strict=True))
        print(f"| {lr:g} | {reports[0].steps} | {sum(right[: len(edits)])} | {sum(right[len(edits) :])} | {kept} |")


def find(edits: list[Edit], irrelevant: list[str], base: str) -> None:
    """A row for each retriever: how often an edit is read before its prompt, before its rephrase, and how many
    irrelevant prompts get anything."""
    for retriever in ("key", "states"):
        editor = make_editor("icl", {"base": base, "retriever": retriever})
        editor.load()
        editor.prepare(irrelevant[:100], irrelevant[100:200])
        editor.ledger.arrive(edits, 0)
        editor.ledger.written(editor.write(EditBatch(tuple(edits))))
        editor.finish_window()
        row = []
        for asked in ([e.prompt for e in edits], [e.rephrases[0] for e in edits]):
            found = editor.router.preface(editor.edited.query(asked), editor.choose(asked).memory.tolist())
            row.append(sum(edit.id in ids for edit, ids in zip(edits, found, strict=True)))
        print(f"| {retriever} | {row[0]} | {row[1]} | {int((editor.choose(irrelevant[200:]).memory != BASE).sum())} |")


NUMBER = {"icl": 6, "lora": 3, "retriever": 100}


def main() -> None:
    """Write the table."""
    kind, zsre, counterfact, questions = sys.argv[1:5]
    edits = read(zsre, counterfact, NUMBER[kind])
    lines = Path(questions).read_text(encoding="utf-8").splitlines()[3000:3300]
    irrelevant = [f"nq question: {json.loads(line)['question']}" for line in lines]
    if kind == "icl":
        tell(edits)
    elif kind == "lora":
        train(edits, irrelevant)
    else:
        for part in (edits[: NUMBER[kind]], edits[NUMBER[kind] :]):
            find(part, irrelevant, sys.argv[5] if len(sys.argv) > 5 else "smollm2")


if __name__ == "__main__":
    main()
