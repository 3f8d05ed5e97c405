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


def test_the_installed_package_trains(wheel, tmp_path):
    """Its own callbacks, configurations and world, in a directory where the checkout is out of reach: `repair-lightning
    train --config quickstart`, cut to four edits."""
    wheel.extractall(tmp_path / "site")
    small = ["--data.max_edits", "4", "--data.max_irrelevant", "40", "--model.writing.steps", "20"]
    program = """
import sys
from repair_lightning.__main__ import main
try:
    main()
finally:
    names = ("repair_lightning", "repair_lightning.callbacks.ties_merge", "repair_lightning.world")
    print(*(sys.modules[name].__file__ for name in names), sep="\\n")
"""
    call = [sys.executable, "-c", program, "train", "--config", "quickstart", *small, "--run_dir", "run"]
    env = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    done = subprocess.run(call, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "4 edits of world" in done.stdout
    for file in done.stdout.splitlines()[-3:]:
        assert Path(file).is_relative_to(tmp_path / "site")
    assert (tmp_path / "run" / "pack" / "repair_config.json").is_file()
