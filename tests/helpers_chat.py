"""A tiny base with a chat template, made of the parts of all tests."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

MARKS = ("<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def base(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def chat_tokenizer(tokenizer: Any) -> Any:
    """A copy of a tokenizer that has a chat template and its control tokens."""
    own = copy.deepcopy(tokenizer)
    own.add_tokens([AddedToken(text, special=True, normalized=False) for text in MARKS])
    own.chat_template = CHATML
    return own


def chat_folder(folder: Path, tiny: Any, tokenizer: Any, **options: Any) -> Path:
    """A tiny base in Hugging Face format that is asked in turns; narrow enough in its weights that edits hold in all
    forms."""
    own = chat_tokenizer(tokenizer)
    chosen = {"vocabulary": len(own), "max_position_embeddings": 2048, "initializer_range": 0.05} | options
    tiny("llama", **chosen).save_pretrained(folder)
    own.save_pretrained(folder)
    return folder
