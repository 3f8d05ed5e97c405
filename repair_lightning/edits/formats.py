"""Record formats: how each data set names its fields, and what its records say as the project's `jsonl` records.

A `jsonl` record is `{id, subject, prompt, target, rephrases, locality, near, aliases, old_answer, further}`:
`rephrases` and `aliases` are lists of texts, `locality` and `near` lists of `{prompt, answer}`, `further` a list of
`{kind, prompt, answers}` (see `repair_lightning.types.Further`). The questions of one multi-hop case stand on one edit,
and all have the case's answers.

The project's own format keeps prompts, targets and answers as they were written: an indentation, a blank or a line
break at an end belongs to the text. Each of its prompts may be messages, carried as one text (see `dialogue`), and may
leave the place of the subject open (see `joint.fill`). It also takes prompt and target under the names that others give
them. The published sets have stray blanks at the ends of their fields that mean nothing, so theirs are stripped.

The layouts are those of the published files: ZsRE as prepared for MEND (with EasyEdit's `portability`), CounterFact (as
in ROME and flattened), WikiBigEdit (arXiv 2503.05683), KnowEdit (arXiv 2401.01286), MQuAKE (arXiv 2305.14795), QAEdit
of the WILD evaluation (arXiv 2502.11177), UltraEditBench (arXiv 2505.14679), and WISE's two other sets.

To add a format: write one entry in `_ALL`.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from repair_lightning.edits.fields import (
    PROMPT_REMEDY,
    TARGET_REMEDY,
    TEXT_REMEDY,
    Record,
    identity,
    items,
    kind_of,
    named,
    objects,
    optional_text,
    present,
    prompt_of,
    required_text,
    spellings,
    texts,
)
from repair_lightning.errors import ConfigError, FieldError
from repair_lightning.texts.dialogue import opened

AUTO = "auto"
"""In the place of a format's name: the one that the records look like."""
KINDS = ("multi_hop", "persona", "generation")
"""The kinds of what follows from an edit, beside those with a name of the user's own after them."""
_NAMED = ("portability/", "multi_hop/")
_LOC, _LOCALITY = ("loc", "loc_ans"), ("locality_prompt", "locality_ground_truth")
_PROBE = '[{"prompt": "...", "answer": "..."}]'
_FURTHER = '[{"kind": "multi_hop", "prompt": "...", "answers": ["..."]}]'
_SORTS = '{"Reasoning": [{"prompt": "...", "ground_truth": "..."}]}'
_PAIRS = (
    ("prompt", "target"),
    ("prompt", "target_new"),
    ("prompt", "completion"),
    ("question", "answer"),
    ("messages", "completion"),
    ("messages",),
)
"""How others name prompt and target; messages alone end with the answer."""
Converted = list[dict[str, Any]]


def _is_nested(record: Record) -> bool:
    """Whether questions stand below sorts, as KnowEdit has them: `{"Reasoning": [...]}`."""
    moved = opened(record.get("portability"))
    sorts = isinstance(moved, Mapping) and not any(isinstance(opened(value), str) for value in moved.values())
    return sorts or isinstance(opened(record.get("locality")), Mapping)


def _is_flat(record: Record) -> bool:
    return not _is_nested(record)


def _plain(record: Record, chosen: Format, left: Counter[str]) -> Converted:
    return [_published(record, chosen)]


@dataclass(frozen=True, slots=True)
class Format:
    """How one data set writes its records.

    Attributes:
        required: alternative layouts, of one of which a record has all fields; each begins with prompt and target.
        optional: further fields that are read.
        unread: fields by which a record is recognised and that say nothing here.
        rephrases: fields that hold one rephrase or a list of them.
        locality: the fields of the locality prompt and its answer.
        neighbours: locality prompts ask the same of another subject, and count as `near` too.
        old_answer: the field of what the target replaces, a text or a list of spellings.
        mark: what tells a record from those of other formats with the same fields.
        read: converts a record; counts in the last argument what it leaves out.
        several: a record holds several edits.
    """

    name: str
    required: tuple[tuple[str, ...], ...]
    optional: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    rephrases: tuple[str, ...] = ()
    locality: tuple[str, str] = _LOCALITY
    neighbours: bool = False
    old_answer: str = ""
    mark: Callable[[Record], bool] = _is_flat
    read: Callable[[Record, Format, Counter[str]], Converted] = _plain
    several: bool = False

    @property
    def fields(self) -> frozenset[str]:
        """Every field that is read."""
        return frozenset(("id", "case_id", "subject", *self.optional)).union(*self.required)

    @property
    def known(self) -> frozenset[str]:
        """Every field by which a record is recognised."""
        return self.fields.union(self.unread)

    def layout(self, record: Record) -> tuple[str, ...] | None:
        """The first layout of which a record has (not null) all fields."""
        return next((each for each in self.required if all(record.get(field) is not None for field in each)), None)

    def fits(self, record: Record) -> bool:
        """Whether a record has all fields of one layout and looks like no other format."""
        return self.layout(record) is not None and self.mark(record)

    def described(self) -> str:
        """The format and its required fields, for a message."""
        return f"{self.name} ({' or '.join(', '.join(layout) for layout in self.required)})"


def _has_pairs(record: Record) -> bool:
    """Whether `locality` is a list of `{loc, loc_ans}`."""
    found = opened(record.get("locality"))
    return isinstance(found, list) and any(isinstance(item, Mapping) and "loc" in item for item in found)


def _is_own(record: Record) -> bool:
    """Prompt and target under others' names are ours where no published set has all of the fields."""
    if _is_nested(record) or _has_pairs(record):
        return False
    return record.get("target") is not None or not any(other.fits(record) for other in _ALL[1:])


def _turns(record: Record, field: str) -> list[Mapping[str, Any]]:
    """The messages of a field, unchecked; none where it holds something else."""
    found = opened(record.get(field))
    return found if isinstance(found, list) and all(isinstance(turn, Mapping) for turn in found) else []


def _pair(record: Record, subject: str | None) -> tuple[str, list[str]]:
    """Prompt and target of a record of ours, and after the target other spellings of it."""
    prompt = next((name for name in ("prompt", "question", "messages") if name in record), "prompt")
    target = next((name for name in ("target", "target_new", "answer", "completion") if name in record), "target")
    said, place = _turns(record, target) if target == "completion" else [], f"{target}[0]"
    turns = _turns(record, prompt) if target not in record else []
    if turns and turns[-1].get("role") == "assistant":  # the dialogue ends with the answer
        said, place = turns[-1:], f"{prompt}[{len(turns) - 1}]"
        record = {**record, prompt: turns[:-1]}
    asked = prompt_of(record, prompt, PROMPT_REMEDY, subject)
    if len(said) > 1:
        raise FieldError(target, f"has {len(said)} messages", "give the one that answers, or a text")
    if said:
        record, target = named(said[0], place, "a message"), f"{place}.content"
    spelt = items(record, target) if target == "answer" else {}
    if spelt:
        return asked, [required_text(spelt, name, TARGET_REMEDY) for name in spelt]
    return asked, [required_text(record, target, TARGET_REMEDY)]


def _probes(record: Record, field: str) -> list[dict[str, Any]]:
    """The probes of a field that holds a list of `{prompt, answer}` or of plain prompts.

    They may not be left open by `{}`: another subject than the record's belongs there.
    """
    open_remedy = "write the subject that the probe asks about, or {{}} for the two signs themselves"
    probes = []
    for place, item in objects(record, field, _PROBE):
        flat = named(item, place, _PROBE) if isinstance(item, Mapping) else {f"{place}.prompt": item}
        prompt = prompt_of(flat, f"{place}.prompt", "give the prompt that must keep its answer", None, open_remedy)
        probes.append({"prompt": prompt, "answer": optional_text(flat, f"{place}.answer")})
    return probes


def _given_further(record: Record, subject: str | None) -> list[dict[str, Any]]:
    """What a record of ours says of what follows from its edit."""
    found = []
    for place, item in objects(record, "further", _FURTHER):
        flat = named(item, place, _FURTHER)
        remedy = f"choose of {', '.join(KINDS)}, portability/SORT, multi_hop/CASE"
        kind = required_text(flat, f"{place}.kind", remedy).strip()
        if kind not in KINDS and not (kind.startswith(_NAMED) and kind not in _NAMED):
            raise FieldError(f"{place}.kind", f"is '{kind}'", remedy)
        prompt = prompt_of(flat, f"{place}.prompt", "give the question that follows from the edit", subject)
        answers = texts(flat, f"{place}.answers")
        if not answers:
            raise FieldError(f"{place}.answers", "is missing", "give the answers of which each counts as right")
        found.append({"kind": kind, "prompt": prompt, "answers": answers})
    return found


def _own(record: Record, chosen: Format, left: Counter[str]) -> Converted:
    """A record of the project's own format. A field that is nearly one of its names is an error."""
    own = {*chosen.optional, "id", "subject", "prompt", "target"}
    for field in (field for field in record if field not in chosen.fields):
        close = difflib.get_close_matches(str(field).lower(), sorted(own - record.keys()), n=1, cutoff=0.85)
        if close:
            raise FieldError(str(field), "is not a field of format 'jsonl'", f"did you mean '{close[0]}'?")
    found: dict[str, Any] = identity(record)
    subject = found["subject"]
    found["prompt"], (found["target"], *aliases) = _pair(record, subject)
    rephrases = items(record, "rephrases")
    if rephrases and all(isinstance(item, Mapping) for item in rephrases.values()):  # one dialogue
        rephrases = {"rephrases": list(rephrases.values())}
    found["rephrases"] = [prompt_of(rephrases, name, TEXT_REMEDY, subject) for name in rephrases]
    found |= {name: _probes(record, name) for name in ("locality", "near")}
    found |= {"aliases": [*texts(record, "aliases"), *aliases], "old_answer": optional_text(record, "old_answer")}
    return [found | {"further": _given_further(record, subject)}]


def _published(record: Record, chosen: Format) -> dict[str, Any]:
    """What a record of a published set says in the fields that its format names, all texts stripped."""
    layout = chosen.layout(record) or chosen.required[0]
    target = required_text(record, layout[1], TARGET_REMEDY).strip()
    question, answer = (optional_text(record, field) for field in chosen.locality)
    probes = [_probe(question, answer)] if question else []
    old = next(iter(spellings(record.get(chosen.old_answer), chosen.old_answer)), None)
    return {
        **identity(record),
        "prompt": required_text(record, layout[0], PROMPT_REMEDY).strip(),
        "target": target,
        "rephrases": [text.strip() for text in texts(record, *chosen.rephrases)],
        "locality": probes,
        "near": probes if chosen.neighbours else [],
        "aliases": [],
        "old_answer": None if old == target else old,
        "further": [],
    }


def _probe(prompt: str, answer: str | None) -> dict[str, Any]:
    return {"prompt": prompt.strip(), "answer": answer and answer.strip()}


def _follows(kind: str, prompts: list[str], answers: list[str]) -> list[dict[str, Any]]:
    return [{"kind": kind, "prompt": prompt.strip(), "answers": answers} for prompt in prompts]


def _portability(record: Record, left: Counter[str]) -> list[dict[str, Any]]:
    """EasyEdit's question beside a record of ZsRE or CounterFact, which KnowEdit has below `Reasoning`."""
    found, name = opened(record.get("portability")), "portability"
    if found is None:
        return []
    flat = named(found, name, '{"New Question": "...", "New Answer": "..."}')
    asked, answers = f"{name}.New Question", f"{name}.New Answer"
    left.update(f"'{field}'" for field in flat if field not in (asked, answers))
    said = spellings(flat.get(answers), answers)
    prompts = spellings(flat.get(asked), asked)
    if not said or not prompts:
        left[f"an empty '{name}'"] += 1
        return []
    return _follows(f"{name}/Reasoning", prompts, said)


def _zsre(record: Record, chosen: Format, left: Counter[str]) -> Converted:
    return [_published(record, chosen) | {"further": _portability(record, left)}]


def _counterfact(record: Record, chosen: Format, left: Counter[str]) -> Converted:
    """CounterFact, flat or in ROME's own layout; neighbourhood prompts share the answer that is to be replaced."""
    if record.get("requested_rewrite") is not None:
        record = {**record, **_rewrite(record["requested_rewrite"], "requested_rewrite")}
    found = _published(record, chosen)
    found["rephrases"] += [text.strip() for text in texts(record, "paraphrase_prompts")]
    near = [_probe(text, found["old_answer"]) for text in texts(record, "neighborhood_prompts")]
    found |= {name: [*found[name], *near] for name in ("locality", "near")}
    written = _follows("generation", texts(record, "generation_prompts"), [found["target"]])
    return [found | {"further": [*written, *_portability(record, left)]}]


def _rewrite(rewrite: Any, place: str) -> dict[str, Any]:
    """A rewrite under the names of a flat record; errors name the fields inside."""
    flat = named(opened(rewrite), place, '{"prompt": "{} is in", "subject": "...", "target_new": {"str": "..."}}')
    for side in (f"{place}.target_new", f"{place}.target_true"):
        value = opened(flat.get(side))
        flat[f"{side}.str"] = value.get("str") if isinstance(value, Mapping) else value
    subject = required_text(flat, f"{place}.subject").strip()
    return {
        "subject": subject,
        "prompt": required_text(flat, f"{place}.prompt", PROMPT_REMEDY).replace("{}", subject),
        "target_new": required_text(flat, f"{place}.target_new.str", TARGET_REMEDY),
        "ground_truth": optional_text(flat, f"{place}.target_true.str"),
        "rephrase_prompt": texts(flat, f"{place}.question"),
    }


def _wikibigedit(record: Record, chosen: Format, left: Counter[str]) -> Converted:
    """Changes of Wikidata over time; a persona's way of asking is no plain rephrase."""
    found = _published(record, chosen)
    hops, answers = texts(record, "mhop"), spellings(record.get("mhop_ans"), "mhop_ans")
    left["'mhop' without an answer"] += bool(hops and not answers)
    found["further"] = _follows("persona", texts(record, "personas"), [found["target"]])
    found["further"] += _follows("multi_hop", hops, answers) if answers else []
    return [found]


def _nested(record: Record, field: str, left: Counter[str]) -> Iterator[tuple[str, str, list[str]]]:
    """Sort, prompt and answers of each question that KnowEdit keeps below sorts; what is empty is counted."""
    for name, given in named(opened(record.get(field)) or {}, field, _SORTS).items():
        entries = opened(given)
        found = [
            question
            for place, item in objects({name: [entries] if isinstance(entries, Mapping) else entries}, name, _SORTS)
            for question in _asked(named(item, place, _SORTS), place)
        ]
        left[f"an empty '{name}'"] += given is not None and not found
        yield from ((name.removeprefix(f"{field}."), prompt, answers) for prompt, answers in found)


def _asked(flat: Record, place: str) -> Iterator[tuple[str, list[str]]]:
    """The prompts of one entry with their answers: one each where there are as many, else each has all of them."""
    name = f"{place}.ground_truth"
    prompts, answers = opened(flat.get(f"{place}.prompt")), opened(flat.get(name))
    if isinstance(prompts, list) and isinstance(answers, list) and len(prompts) == len(answers) > 1:
        pairs = list(zip(prompts, answers, strict=True))
    else:
        pairs = [(prompts, answers)]
    for own, given in pairs:
        yield from ((prompt, spellings(given, name)) for prompt in spellings(own, f"{place}.prompt"))


def _knowedit(record: Record, chosen: Format, left: Counter[str]) -> Converted:
    """KnowEdit's wiki_recent, wiki_counterfact, ZsRE and WikiBio; each of its spellings of an answer counts."""
    found = _published({"subject": record.get("concept"), **record}, chosen)
    found["locality"] = [_probe(text, next(iter(said), None)) for _, text, said in _nested(record, "locality", left)]
    for sort, prompt, answers in _nested(record, "portability", left):
        left[f"'portability.{sort}' without an answer"] += not answers
        found["further"] += _follows(f"portability/{sort}", [prompt], answers) if answers else []
    return [found]


def _qaedit(record: Record, chosen: Format, left: Counter[str]) -> Converted:
    """QAEdit, as the WILD evaluation asks it: several locality questions; its ids count within each source."""
    shape = '[{"loc": "...", "loc_ans": "..."}]'
    probes = []
    for place, item in objects(record, "locality", shape):
        flat = named(item, place, shape)
        answer = optional_text(flat, f"{place}.loc_ans")
        probes.append(_probe(required_text(flat, f"{place}.loc", f"write {shape}"), answer))
    found = _published(record, chosen) | {"locality": probes}
    source = optional_text(record, "source")
    return [found | {"id": f"{source.strip()}-{found['id']}"} if source and found["id"] else found]


def _mquake(record: Record, chosen: Format, left: Counter[str]) -> Converted:
    """A case of MQuAKE: its edits, of which the first has the questions that follow from all of them."""
    shape = '[{"prompt": "{} is in", "subject": "...", "target_new": {"str": "..."}}]'
    steps = [hop for _, hop in objects(record, "new_single_hops", "[]") if isinstance(hop, Mapping)]
    hops = {hop["question"]: hop for hop in steps if isinstance(hop.get("question"), str)}
    found: Converted = []
    for place, item in objects(record, "requested_rewrite", shape):
        flat = _rewrite(item, place)
        edit = _published(flat, FORMATS["counterfact"]) | {"id": identity(record)["id"], "near": []}
        hop = next((hops[question] for question in flat["rephrase_prompt"] if question in hops), {})
        if hop.get("answer") == edit["target"]:
            edit["aliases"] = spellings(hop.get("answer_alias"), "new_single_hops.answer_alias")
        found.append(edit)
    if not found:
        raise FieldError("requested_rewrite", "is empty", f"write {shape}")
    asked = texts(record, "questions")
    answers = [text for name in ("new_answer", "new_answer_alias") for text in spellings(record.get(name), name)]
    left["'questions' without 'new_answer'"] += bool(asked and not answers)
    case = identity(record)["id"]  # another case may begin with the same edit
    kind = "multi_hop" if case is None else f"multi_hop/{case}"
    found[0]["further"] = _follows(kind, asked, list(dict.fromkeys(answers))) if answers else []
    return found


_ALL = (
    Format(
        "jsonl",
        _PAIRS,
        ("rephrases", "locality", "near", "aliases", "old_answer", "further"),
        mark=_is_own,
        read=_own,
    ),
    # as prepared for MEND and WISE; the locality prompt is `loc` as it stands (`nq question: ...`), `answers` the truth
    # and `pred` what some model said
    Format(
        "zsre",
        (("src", "alt"),),
        ("rephrase", *_LOC, "answers", "portability"),
        ("pred", "cond"),
        ("rephrase",),
        _LOC,
        old_answer="answers",
        read=_zsre,
    ),
    Format(
        "counterfact",
        (("prompt", "target_new", "rephrase_prompt"), ("requested_rewrite",)),
        ("ground_truth", "paraphrase_prompts", "neighborhood_prompts", "generation_prompts", "portability", *_LOCALITY),
        ("attribute_prompts", "pararel_idx"),
        ("rephrase_prompt",),
        neighbours=True,
        old_answer="ground_truth",
        mark=lambda record: not _is_nested(record) and not isinstance(opened(record.get("requested_rewrite")), list),
        read=_counterfact,
    ),
    Format(
        "wikibigedit",
        (("update", "ans"),),
        ("rephrase", "personas", "mhop", "mhop_ans", *_LOC),
        ("tag", "relation", "object", "subject_id", "relation_id", "object_id"),
        ("rephrase",),
        _LOC,
        read=_wikibigedit,
    ),
    # SelfCheckGPT's WikiBio passages with the sentence that should follow; locality from RedPajama
    Format("hallucination", (("prompt", "target_new", "locality_prompt"),), ("locality_ground_truth",)),
    # WISE's out-of-distribution set: recent facts, with a rephrase from the wild
    Format("temporal", (("prompt", "target_new", "ood_rephrase"),), _LOCALITY, rephrases=("ood_rephrase",)),
    Format(
        "knowedit",
        (("prompt", "target_new"), ("text", "labels")),
        ("concept", "rephrase_prompt", "ground_truth", "portability", "locality"),
        ("cond",),
        ("rephrase_prompt",),
        old_answer="ground_truth",
        mark=lambda record: record.get("labels") is not None or _is_nested(record),
        read=_knowedit,
    ),
    Format(
        "mquake",
        (("requested_rewrite", "questions"),),
        ("new_answer", "new_answer_alias", "new_single_hops"),
        ("answer", "answer_alias", "answer_extended", "single_hops", "orig"),
        mark=lambda record: isinstance(opened(record.get("requested_rewrite")), list),
        read=_mquake,
        several=True,
    ),
    Format(
        "qaedit",
        (("prompt", "target", "rephrase"), ("prompt", "target", "locality")),
        ("source",),
        rephrases=("rephrase",),
        mark=lambda record: _has_pairs(record) or record.get("locality") is None,
        read=_qaedit,
    ),
    Format(
        "ultraedit",
        (("prompt", "ans"),),
        ("rephrase_prompt", *_LOC),
        rephrases=("rephrase_prompt",),
        locality=_LOC,
    ),
)
FORMATS: Mapping[str, Format] = {entry.name: entry for entry in _ALL}


def get_format(name: str) -> Format:
    """The format called `name`. Raises `ConfigError` if there is none, naming the nearest."""
    if name in FORMATS:
        return FORMATS[name]
    close = difflib.get_close_matches(str(name), FORMATS, n=1)
    hint = f"did you mean '{close[0]}'? " if close else ""
    raise ConfigError(f"unknown data format '{name}': {hint}known: {', '.join((AUTO, *FORMATS))}")


def guess_format(record: Record) -> str | None:
    """The format that knows most of a record's fields, of several the one with fewest of its own; None where none
    fits."""
    fitting = [entry for entry in _ALL if entry.fits(record)]
    likest = max(fitting, key=lambda entry: (len(entry.known & record.keys()), -len(entry.known)), default=None)
    return likest.name if likest else None


def recognise(source: str, rows: list[Any]) -> str:
    """The format that more than half of the recognised records look like.

    ConfigError where there is none, with what the formats need; rows that are no records at all are taken as `jsonl`.
    """
    records = [present(row) for row in rows if isinstance(row, Mapping)]
    guesses = Counter(guess for record in records if (guess := guess_format(record)))
    (likest, number), *others = guesses.most_common() or [("jsonl", 0)]
    if number * 2 > sum(guesses.values()) or not records:
        return likest
    if others:
        looks = " or ".join(f"'{name}' ({number:,})" for name, number in guesses.most_common())
        problem = f"its records look like {looks}; give one format in each file, or name it"
    else:
        names = ", ".join(dict.fromkeys(str(name) for record in records for name in record)) or "none"
        problem = f"its records have the fields {names}, which fit no format; rename them"
    known = "; ".join(entry.described() for entry in _ALL)
    raise ConfigError(f"data.format auto: '{source}' is not recognised: {problem}. Formats and what they need: {known}")


def convert(record: Any, name: str, left: Counter[str] | None = None) -> Converted:
    """One source record of format `name` as `jsonl` records; their id is None where the source has none.

    What is not read is counted in `left`. FieldError if the record is no object, looks like another format, or one of
    its fields is wrong.
    """
    chosen, left = FORMATS[name], Counter() if left is None else left
    if not isinstance(record, Mapping):
        raise FieldError(None, f"is {kind_of(record)}, not an object", 'write each record as {"prompt": ..., ...}')
    record = present(record)
    if not chosen.fits(record):
        guess, problem = guess_format(record), f"is not in format '{name}'"
        bare = guess == "jsonl" and "target" not in record and chosen.layout(record) is not None
        if guess not in (None, name) and not bare:  # prompt and `target_new` alone may stand in any of their files
            raise FieldError(None, problem, f"its fields look like format '{guess}': choose that")
        if not any(field in record for layout in chosen.required for field in layout):
            needed = " or ".join(", ".join(layout) for layout in chosen.required)
            found = ", ".join(map(str, record)) or "none"
            raise FieldError(None, problem, f"it needs the fields {needed}; found: {found}")
    converted = chosen.read(record, chosen, left)
    left.update(f"'{field}'" for field in record if field not in chosen.fields)
    return converted
