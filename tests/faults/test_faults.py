"""A few of the faults that `torture.py` tries by the hundred, on short runs."""

from __future__ import annotations

import signal

import malformed
import pytest
import torture

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> torture.Bench:
    """Four windows, undisturbed."""
    return torture.Bench.of(tmp_path_factory.mktemp("faults"), 24, window=6)


def survived(*rows: torture.Row) -> None:
    """Every try was survived, and no edit was lost."""
    for row in rows:
        assert (row.survived, row.lost) == (row.tried, 0), row


def test_killed_and_stopped_at_random_moments(bench):
    survived(torture.random_kills(bench, 2, signal.SIGKILL, signal.SIGTERM))


def test_killed_at_one_moment_after_the_other_and_then_checkpoint_and_journal_rot(bench):
    moments = ("amid the second checkpoint's rows", "before the first checkpoint's rename", "before the merge")
    survived(*torture.damaged(bench, *torture.DAMAGES[1::2], moments=moments))


def test_killed_during_the_merge(tmp_path):
    bench = torture.Bench.of(tmp_path, 12, options=torture.MERGING)
    survived(torture.killed_at(bench, "during the merge"))


def test_two_runs_on_one_directory(bench):
    survived(torture.two_runs(bench))


def test_a_full_disk(bench):
    row = torture.full_disk(bench)
    if row is None:
        pytest.skip("needs the right to mount a small tmpfs")
    survived(row)


def test_a_loss_that_is_not_finite(bench):
    """The edit that has it is reported; the others of its window, and those that share words with it, are written."""
    survived(torture.a_nan(bench))


def test_malformed_records_in_every_format(tmp_path):
    """200 files by chance besides those by hand."""
    row = torture.malformed_records(tmp_path / "records", 200)
    assert row.tried == 200 + len(malformed.BY_HAND)
    survived(row)
