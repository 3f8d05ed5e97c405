"""The model card of a pack: what it is, how well it answers, how to load it and to ask it, for whoever finds it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from huggingface_hub import ModelCard, ModelCardData

from repair_lightning.edits.ledger import Ledger
from repair_lightning.errors import counted

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_PROTOCOLS = {"autoregressive": "free generation", "teacher_forced": "teacher forced"}
_KINDS = ("rel", "gen", "loc", "near", "op")
_FORM = ("rel", "contains", "fires", "garbled")
_TEMPLATE = """\
---
{{ card_data }}
---

# {{ title }}

{{ number }} in `{{ base }}` by the editor `{{ editor }}` of REPAIR-Lightning. This folder is a pack: it holds what the
edits have added, and not the base.

## Load and ask

```python
from repair_lightning import load_edited

model, tokenizer = load_edited("PACK")  # this folder, or its name on the hub
prompt = {{ prompt }}
output = model.generate(prompt, max_new_tokens=32)
print(tokenizer.decode(output[0], skip_special_tokens=True))
print(model.route(prompt)[0].reason)  # who answers, and why
with model.disabled():  # the plain base
    output = model.generate(prompt, max_new_tokens=32)
```

`transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)` takes it too, and
`repair-lightning ask --pack PACK "..."` shows both answers.

## Scores
{% if scores %}
In per cent. Rel: edits answered right; Gen: rephrases answered right; Loc: unrelated prompts that keep the base's
answer; Near: likewise of questions about other subjects; OP: the geometric mean of the first three.

{{ scores }}
{% if forms %}
The edits in several forms. Contains: the target is in the answer; fires: the edit answers; garbled: it answers, with
neither the target nor the base's answer.

{{ forms }}
{% endif %}{% else %}
None are known for what the pack holds now: `repair-lightning evaluate --pack PACK --data.path FILE` measures them.
{% endif %}
## Limits

- It needs the base whose weights have the SHA-256 hash `{{ sha256 }}`; `load_edited` checks that.
- {{ scope }}
- Another question about an edited subject, in nearly the edit's words, may get the edit's target too: "Who was the
  first woman to climb it?" for "Who climbed it first?".
- What follows from a corrected fact is corrected only where an edit says it.
- The edits: {{ statuses }}. What is not written is answered as by the base.
"""


def model_card(config: Mapping[str, Any], ledger: Ledger, in_base: bool) -> ModelCard:
    """The card of a pack with this configuration; `in_base` says that something was written into the base's matrices.

    `config["scores"]`, where there are any, are `final` of `metrics.json`. A base or data that only has a path is not
    named in the head, which the hub checks.
    """
    base, data = config["base"]["name"], str(config["provenance"].get("data") or "")
    counts = {status: number for status, number in ledger.counts().items() if number}
    written = [ledger.edit(id).prompt for id in ledger if ledger.owner_of(id) is not None]
    scores = config.get("scores") or {}
    head = ModelCardData(
        base_model=base if _on_hub(base) else None,
        datasets=[data] if _on_hub(data) else None,
        library_name="repair-lightning",
        pipeline_tag="text-generation",
        tags=["model-editing", "repair-lightning", config["editor"]],
    )
    return ModelCard.from_template(
        head,
        template_str=_TEMPLATE,
        title=f"{Path(base).name}, corrected",
        number=f"{counted(len(written), 'edit')}",
        base=Path(base).name if Path(base).is_absolute() else base,
        editor=config["editor"],
        prompt=repr(min(written, key=len, default="...")),
        scores=_table({words: scores[name] for name, words in _PROTOCOLS.items() if name in scores}, _KINDS),
        forms=_table(scores.get("forms") or {}, _FORM),
        sha256=config["base"]["sha256"],
        scope=_IN_BASE if in_base else _ASIDE,
        statuses=", ".join(f"{number:,} {status}" for status, number in counts.items()) or "none",
    )


_ASIDE = "Prompts that no edit is about get the base's own answers, as far as the router tells them apart."
_IN_BASE = "The edits are in the base's own matrices: answers to other prompts may have changed."


def _on_hub(name: str) -> bool:
    return bool(HUB_NAME.fullmatch(name)) and not Path(name).exists()


def _table(rows: Mapping[str, Mapping[str, Any]], columns: tuple[str, ...]) -> str:
    """Shares as Markdown, in per cent; rows without any are left out."""
    shares = 100 * pd.DataFrame(rows, list(columns), dtype=float).T.dropna(how="all")
    shown = shares.astype(object).where(shares.notna(), "-").rename(columns=str.capitalize).rename(columns={"Op": "OP"})
    return shown.to_markdown(floatfmt=".1f") if len(shown) else ""
