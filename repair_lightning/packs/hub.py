"""Packs on the Hugging Face hub. Of a repository only JSON, safetensors and Parquet files are ever downloaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download

from repair_lightning.errors import RepairError
from repair_lightning.storage.folders import whereabouts

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
PATTERNS = ["*.json", "*.safetensors", "*.parquet"]
"""What is downloaded and uploaded: nothing that could run."""


def download(name_or_path: str, **options: Any) -> Path:
    """The folder of a pack: the one that is named, or what the hub holds under the name `org/name`.

    `options` are those of `snapshot_download`. Raises `RepairError` where the hub does not give it.
    """
    path = Path(name_or_path).expanduser()
    if not _HUB_NAME.fullmatch(name_or_path) or whereabouts(path).exists() or path.parent.exists():
        return path
    try:
        return Path(snapshot_download(name_or_path, allow_patterns=PATTERNS, ignore_patterns="merged/*", **options))
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise RepairError(
            f"'{name_or_path}' is no folder here, and the hub does not give it ({_first_line(error)}); give the folder "
            "that train.py wrote, or check name, token and network"
        ) from error


def upload(folder: Path, repo_id: str, private: bool | None = None, token: str | None = None, **options: Any) -> str:
    """Upload a pack and return its address; the repository is made where it is missing.

    `options` are those of `upload_folder`. Raises `RepairError` where the hub refuses it or cannot be reached.
    """
    options = {"commit_message": "Upload a REPAIR-Lightning pack"} | options
    api = HfApi(token=token)
    try:
        name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        return str(api.upload_folder(repo_id=name, folder_path=folder, allow_patterns=PATTERNS, **options))
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise RepairError(
            f"the pack cannot be uploaded to '{repo_id}' ({_first_line(error)}); check name, token and network"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
