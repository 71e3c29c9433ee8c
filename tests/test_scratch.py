"""Temporary folders of killed processes are removed, those of running ones are not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from patcher.scratch import scratch
from patcher.signals import interruptible, uninterrupted

HOLD = """
import sys, time
from pathlib import Path
from patcher.scratch import scratch
with scratch("patcher-test-", Path(sys.argv[1])) as folder:
    (folder / "large").mkdir()
    print(folder.name, flush=True)
    time.sleep(300)
"""


def test_what_a_killed_process_left_is_taken_away_and_what_lives_stays(tmp_path):
    def names():
        return {path.name for path in tmp_path.iterdir()}

    others = {"patcher-test-of-an-older-patcher", "somebody-elses"}
    for name in others:
        (tmp_path / name).mkdir()
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        held = process.stdout.readline().strip()
        with scratch("patcher-test-", tmp_path) as mine:
            assert names() == {*others, held, mine.name}
        assert names() == {*others, held}
        process.kill()
        process.wait()
    assert names() == {*others, held}
    with scratch("somebody-", tmp_path):
        assert held in names()
    with scratch("patcher-test-", tmp_path) as mine:
        assert names() == {*others, mine.name}


def test_a_mark_that_leads_elsewhere_takes_nothing_away(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / ".patcher-alive").touch()
    (tmp_path / "patcher-test-x").mkdir()
    (tmp_path / "patcher-test-x" / ".patcher-alive").symlink_to(tmp_path / "precious" / ".patcher-alive")
    (tmp_path / "patcher-test-y").symlink_to(tmp_path / "precious")
    with scratch("patcher-test-", tmp_path):
        pass
    assert (tmp_path / "precious" / ".patcher-alive").is_file()
    assert (tmp_path / "patcher-test-x").is_dir()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_interrupt_unless_they_are_ignored(number):
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), interruptible():
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) == before
    with interruptible(), uninterrupted():
        os.kill(os.getpid(), number)
    signal.signal(number, signal.SIG_IGN)
    try:
        with interruptible():
            os.kill(os.getpid(), number)  # under nohup
    finally:
        signal.signal(number, before)
