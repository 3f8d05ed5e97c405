"""A real headless Chromium, driven by selenium; skipped with a reason where there is none."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FLAGS = """headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking
disable-component-update disable-sync disable-dev-shm-usage"""


@contextmanager
def chromium(folder: Path, **logs: str) -> Iterator[Any]:
    """A browser with its own profile in `folder`, which keeps these logs."""
    paths = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    if None in paths.values():
        pytest.skip("no chromium with its driver here: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = paths["chromium"]
    for flag in [*FLAGS.split(), f"user-data-dir={folder}"]:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", logs)
    driver = webdriver.Chrome(options=options, service=Service(paths["chromedriver"]))
    try:
        yield driver
    finally:
        driver.quit()
