"""Finds the server of this machine that serves a repository already, by the command lines of its processes."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["Running", "find_running"]

_PROGRAM = "tritonserver"
_PORTS = ("grpc-port", "http-port", "metrics-port")


@dataclass(frozen=True)
class Running:
    """A server that runs: its gRPC address, HOST:PORT, and its process.

    Not the process that started it, which may be a shell or the first one of the machine. With the server's, a
    `patcher serve` that started it ends as well.
    """

    url: str
    pid: int


def find_running(repository: Path | str, ports: Sequence[int]) -> Running | None:
    """The server of ``repository`` that was told to listen on one of ``ports``, whoever started it; None if none was.

    Processes that the system hides, such as those in another container, are not found.
    """
    for pid, words in _processes():
        options = dict(word.removeprefix("--").split("=", 1) for word in words if word.startswith("--") and "=" in word)
        taken = {options.get(each) for each in _PORTS}
        if options.get("model-repository") == str(repository) and taken & set(map(str, ports)):
            return Running(f"{options.get('grpc-address', '')}:{options.get('grpc-port', '')}", pid)
    return None


def _processes() -> Iterator[tuple[int, list[str]]]:
    """The processes that run a Triton server, each with the words of its command line."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            program, *words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if PurePath(program).name == _PROGRAM:
                yield int(folder.name), words
