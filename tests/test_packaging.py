"""The wheel: one top-level name, and everything that a run needs inside it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers_runs import REPOSITORY


def project_files() -> list[str]:
    """The files of the checkout that git does not ignore, tracked or about to be."""
    call = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(call, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.split("\0")
    return [name for name in listed if name and (REPOSITORY / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in project_files():
        if not name.startswith(("tests/", "benchmarks/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, source / name)
    call = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target), str(source)]
    built = subprocess.run(call, capture_output=True, text=True)
    assert built.returncode == 0, (built.stdout + built.stderr)[-3000:]
    assert "would be ignored" not in built.stdout + built.stderr  # a folder that no list of packages names
    (file,) = target.glob("*.whl")
    return zipfile.ZipFile(file)


def test_one_top_level_name(wheel):
    """`callbacks` and `configs` at the top of site-packages would collide with everybody's."""
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert len([top for top in tops if top.endswith(".dist-info")]) == 1
    assert {top for top in tops if not top.endswith(".dist-info")} == {"repair_lightning"}


def test_every_module_and_every_data_file_is_inside(wheel):
    """Whatever is in the library, in callbacks/ and in configs/: a new package must not be forgotten in pyproject."""
    expected = {name for name in project_files() if name.startswith("repair_lightning/")}
    expected |= {f"repair_lightning/{name}" for name in project_files() if name.startswith(("callbacks/", "configs/"))}
    expected = {name for name in expected if not name.endswith(".md")}
    assert expected - set(wheel.namelist()) == set()
    assert len([name for name in expected if name.startswith("repair_lightning/configs/")]) >= 10


def test_the_installed_package_imports_and_finds_its_files(wheel, tmp_path):
    """From the wheel's own files, in a directory where the checkout is out of reach."""
    wheel.extractall(tmp_path / "site")
    program = """
import importlib.resources, repair_lightning, repair_lightning.callbacks
from repair_lightning.world import base_dir, edits_path
from repair_lightning import load_edited
print(repair_lightning.__file__)
print(repair_lightning.callbacks.LossAwareTiesMerge.__module__)
print(base_dir().is_dir(), edits_path().is_file())
print((importlib.resources.files("repair_lightning") / "configs" / "quickstart.yaml").is_file())
"""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env |= {"PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    file, module, world, config = done.stdout.splitlines()
    assert Path(file).is_relative_to(tmp_path / "site")
    assert module == "repair_lightning.callbacks.ties_merge"
    assert (world, config) == ("True True", "True")


def test_the_installed_package_trains(wheel, tmp_path):
    """Its own callbacks, configurations and world: `repair-lightning train --config quickstart`, cut to four edits."""
    wheel.extractall(tmp_path / "site")
    small = ["--data.max_edits", "4", "--data.max_irrelevant", "40", "--model.writing.steps", "20"]
    call = [sys.executable, "-m", "repair_lightning", "train", "--config", "quickstart", *small, "--run_dir", "run"]
    env = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    done = subprocess.run(call, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "4 edits of world" in done.stdout
    assert (tmp_path / "run" / "pack" / "repair_config.json").is_file()
