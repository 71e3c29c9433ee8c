"""Temporary folders of killed processes are removed, those of running ones are not."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading

import pytest

from patcher.scratch import scratch
from patcher.signals import interruptible, late_signals, uninterrupted

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


@pytest.fixture
def handled():
    """The signals that a handler of this process, which is not patcher's, was called for."""
    found, numbers = [], (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, lambda number, _: found.append(number)) for number in numbers}
    yield found
    for number, earlier in before.items():
        signal.signal(number, earlier)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_for_the_process_comes_once_the_step_is_done(number, handled):
    with late_signals():
        with uninterrupted(), uninterrupted():
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
        assert handled == []
    assert handled == [number]
    with uninterrupted():
        os.kill(os.getpid(), number)
        assert handled == [number]
    assert handled == [number, number]


def test_each_signal_that_was_put_off_comes_even_if_the_handler_of_another_raises(handled):
    numbers = [signal.SIGTERM, signal.SIGHUP, signal.SIGINT]

    def fail(number, _):
        handled.append(number)
        raise RuntimeError(number)

    def send():
        for number in numbers:
            os.kill(os.getpid(), number)

    for number in numbers[:2]:
        signal.signal(number, fail)
    with pytest.raises(RuntimeError), uninterrupted():
        send()
    assert handled == numbers


def test_an_event_loop_hears_of_a_signal_once_and_late():
    found = []

    async def run():
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, found.append, "told")
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(0.05)
            assert found == []
        await asyncio.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0.05)
        loop.remove_signal_handler(signal.SIGTERM)

    asyncio.run(run())
    assert found == ["told", "told"]


def test_a_signal_that_would_end_the_process_ends_it_once_the_step_is_done():
    script = (
        "import os, signal\n"
        "from patcher.signals import uninterrupted\n"
        "with uninterrupted():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('done', flush=True)\n"
        "print('never', flush=True)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (-signal.SIGTERM, "done\n"), ended.stderr


def test_outside_of_the_main_thread_signals_are_left_alone(handled):
    def other():
        with late_signals(), uninterrupted():
            os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert handled == [signal.SIGTERM]


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
