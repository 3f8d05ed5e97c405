"""The embedded small world: invented facts, edits of them, and a base model that knows them."""

from pathlib import Path

WORLD = "world"
"""Stands for the embedded base, edits or irrelevant prompts wherever a path or a hub name is asked for."""


def base_dir() -> Path:
    """The folder of the base model and its tokenizer, in Hugging Face format."""
    return Path(__file__).with_name("base-model")


def edits_path() -> Path:
    """The edits, one JSON object per line."""
    return Path(__file__).with_name("edits.jsonl")


def irrelevant_path() -> Path:
    """Questions about neither edits nor locality prompts, one JSON object per line."""
    return Path(__file__).with_name("irrelevant.jsonl")
