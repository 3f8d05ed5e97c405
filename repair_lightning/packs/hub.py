"""Packs on the Hugging Face hub. Of a repository only JSON, safetensors and Parquet files are ever downloaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download

from repair_lightning.errors import RepairError
from repair_lightning.storage.folders import whereabouts

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")

PATTERNS = ("*.json", "*.safetensors", "*.parquet")
"""What is downloaded and uploaded: nothing that could run."""


def download(name_or_path: str, **options: Any) -> Path:
    """The folder of a pack: the one that is named, or what the hub holds under that name.

    Args:
        name_or_path: a folder, or a hub name `org/name`.
        options: as `snapshot_download` takes them.

    Raises:
        RepairError: neither is there.
    """
    path = Path(name_or_path).expanduser()
    if not _HUB_NAME.fullmatch(name_or_path) or whereabouts(path).exists() or path.parent.exists():
        return path
    try:
        return Path(
            snapshot_download(name_or_path, allow_patterns=list(PATTERNS), ignore_patterns="merged/*", **options)
        )
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise RepairError(
            f"'{name_or_path}' is no folder here, and the hub does not give it ({_first_line(error)}); give the folder "
            "that train.py wrote, or check name, token and network"
        ) from error


def upload(
    folder: Path,
    repo_id: str,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload a REPAIR-Lightning pack",
) -> str:
    """Upload a pack and return its address; the repository is made where it is missing.

    Raises:
        RepairError: the hub refuses it or cannot be reached.
    """
    api = HfApi(token=token)
    try:
        name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        done = api.upload_folder(
            repo_id=name,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message,
            allow_patterns=list(PATTERNS),
        )
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise RepairError(
            f"the pack cannot be uploaded to '{repo_id}' ({_first_line(error)}); check name, token and network"
        ) from error
    return str(done)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
