"""The whole workflow on this machine, with the commands a user would type: what `make demo` runs.

A small encoder is fine-tuned on support requests, exported and served by a real Triton. A label that it has never seen
is added from ten examples while it serves, and rolled back again. The demo fails if a command fails or an answer is not
the expected one. Its files are under $DEMO_DIR (build/demo).
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
DATA = Path("tests/demo/data")
WORK = Path(os.environ.get("DEMO_DIR", "build/demo"))
LABEL = "warranty_claim"
SENTENCE = "Is my vacuum cleaner still within the warranty period?"


class DemoError(Exception):
    """A command failed or gave an unexpected answer."""


class Demo:
    """Runs commands as a user would, shows them with their output, and records how long each step takes."""

    def __init__(self) -> None:
        self.seconds: list[tuple[str, float]] = []
        ports = free_ports(3)
        self.ports = [f"--{kind}-port={port}" for kind, port in zip(("grpc", "http", "metrics"), ports, strict=True)]
        self.settings = {
            "TRITON_MODEL_REPO": str(WORK / "model_repository"),
            "TRITON_URL": f"localhost:{ports[0]}",
        }
        # OpenMP is several times slower if its threads spin while they wait for a core that another process uses.
        self.environment = {**os.environ, **self.settings, "OMP_WAIT_POLICY": "PASSIVE"}

    def command(self, *words: str) -> list[str]:
        """Show the command line, and resolve its program to the one of this environment."""
        print(f"\n$ {shlex.join(words)}", flush=True)
        return [str(Path(sys.executable).parent / words[0]), *words[1:]]

    def run(self, step: str, *words: str) -> str:
        """Run a command to its end and return what it printed; DemoError when it fails."""
        command = self.command(*words)
        lines = []
        start = time.perf_counter()
        with subprocess.Popen(command, cwd=ROOT, env=self.environment, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout or ():
                print(line, end="", flush=True)
                lines.append(line)
        self.seconds.append((step, time.perf_counter() - start))
        if process.returncode:
            raise DemoError(f"exit code {process.returncode} from: {shlex.join(words)}")
        return "".join(lines)

    @contextmanager
    def serving(self) -> Iterator[None]:
        """`patcher serve` in the background, ready inside the block and gone after it."""
        command = [*self.command("patcher", "serve", *self.ports), f"--log-file={WORK / 'triton.log'}"]
        start = time.perf_counter()
        with subprocess.Popen(command, cwd=ROOT, env=self.environment, stdout=subprocess.PIPE, text=True) as server:
            try:
                for line in server.stdout or ():
                    print(line, end="", flush=True)
                    if line.startswith("ready"):
                        break
                else:
                    raise DemoError("`patcher serve` ended before it was ready")
                self.seconds.append(("serve: start to ready", time.perf_counter() - start))
                yield
            finally:
                server.terminate()
                server.communicate(timeout=60)


def free_ports(count: int) -> list[int]:
    """Free ports of the loopback interface."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def expect(*, told: bool, what: str) -> None:
    """Fail the demo unless ``told``; the error says ``what`` is wrong."""
    if not told:
        raise DemoError(what)


def best(answer: str, label: str) -> bool:
    """Whether `patcher classify` printed the label in the column of the best labels."""
    return re.search(rf"\s\s{label}\s\s", answer) is not None


def figure(output: str) -> str:
    """Texts and accuracy in what `patcher evaluate` printed."""
    found = re.search(r"on (\d+) texts: (accuracy [\d.]+ ?%)", output)
    if found is None:
        raise DemoError("`patcher evaluate` printed no accuracy")
    return f"{found[2]} on {found[1]} sentences never trained on"


def main() -> None:
    """Tell the story."""
    checkpoint, repository = WORK / "checkpoint", WORK / "model_repository"
    for old in (checkpoint, repository):
        shutil.rmtree(ROOT / old, ignore_errors=True)
    (ROOT / WORK).mkdir(parents=True, exist_ok=True)
    demo = Demo()

    print("A text classifier for a support desk: 24 kinds of requests, about 26 sentences each.")
    demo.run("fine-tune", "python", "tests/demo/finetune.py", str(checkpoint))
    demo.run(
        "export", "patcher", "export", str(checkpoint), "--repo", str(repository), "--name", "support",
        "--train", str(DATA / "train.csv"),
    )  # fmt: skip
    for name, value in demo.settings.items():
        print(f"\n$ export {name}={value}", end="")
    print()
    with demo.serving():
        answer = demo.run("classify", "patcher", "classify", SENTENCE)
        expect(told=not best(answer, LABEL), what=f"{LABEL} was known before it was added")
        before = figure(demo.run("evaluate", "patcher", "evaluate", str(DATA / "test.csv")))

        print(f"\nNobody taught it {LABEL}. Ten examples, while it serves:")
        demo.run("add-label", "patcher", "add-label", LABEL, "--examples", str(DATA / f"new_{LABEL}.csv"))
        answer = demo.run("classify", "patcher", "classify", SENTENCE)
        expect(told=best(answer, LABEL), what=f"{LABEL} was added, and the sentence is not recognised")
        after = figure(demo.run("evaluate", "patcher", "evaluate", str(DATA / "test.csv")))
        new = figure(demo.run("evaluate", "patcher", "evaluate", str(DATA / f"new_{LABEL}_test.csv")))

        print("\nAnd back, without a restart:")
        demo.run("history", "patcher", "history")
        demo.run("rollback", "patcher", "rollback")
        answer = demo.run("classify", "patcher", "classify", SENTENCE)
        expect(told=not best(answer, LABEL), what=f"{LABEL} is still answered after the rollback")

    print(f"\nold labels before: {before}")
    print(f"old labels after:  {after}")
    print(f"new label:         {new}")
    print("\nseconds")
    for step, seconds in demo.seconds:
        print(f"{seconds:8.1f}  {step}")


if __name__ == "__main__":
    try:
        main()
    except DemoError as error:
        sys.exit(f"demo: {error}")
