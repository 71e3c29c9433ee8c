"""The log of a server that we start: opened so that only its owner can read it, and read to explain a failure."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
from typing import TYPE_CHECKING

from patcher.errors import InputError
from patcher.scratch import KEPT_SECONDS, abandoned

if TYPE_CHECKING:
    from pathlib import Path
    from typing import BinaryIO

__all__ = ["last_words", "open_log", "remove_old", "size", "telling_lines"]


def open_log(path: Path) -> BinaryIO:
    """An empty log file, open for writing, that only its owner can read: logs may quote what clients send.

    It is locked for as long as the server has it open. Raises InputError if it cannot be written.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.is_file() and not path.is_symlink():
            # Keep the previous log: it explains why a server died, and a supervisor starts the next one at once. A
            # server that still writes to it keeps writing to the renamed file.
            before = path.replace(f"{path}.1")
            with contextlib.suppress(OSError):  # the file belongs to somebody else
                before.chmod(0o600)  # earlier versions of patcher created logs that everybody could read
        log = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb")
    except OSError as error:
        raise InputError(
            f"cannot write the server's log to {path}: {error.strerror or error}; name another file (--log-file FILE, "
            "log_file=...)"
        ) from error
    with contextlib.suppress(OSError):  # a terminal or a pipe, or a file system without locks
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return log


def remove_old(folder: Path, pattern: str) -> None:
    """Remove logs that no server has open and to which nothing was written for a month."""
    before = time.time() - KEPT_SECONDS
    for log in abandoned(folder.glob(pattern)):
        with contextlib.suppress(OSError):
            if log.stat().st_mtime < before:
                log.unlink()


def size(path: Path | None) -> int:
    """The size of a log in bytes; 0 if it does not exist."""
    with contextlib.suppress(OSError):
        return path.stat().st_size if path else 0
    return 0


def last_words(path: Path | None) -> str:
    """What a log says about a failure, to be appended to the error message."""
    lines = telling_lines(path) if path else []
    said = "".join(f"\n  {line}" for line in lines) or " It logged nothing."
    return f"{said}\nThe whole log: {path}"


def telling_lines(log_file: Path, most: int = 12) -> list[str]:
    """The last lines of a log that explain a failure: errors if there are any, else whatever is not known to be noise.

    At most ``most`` lines of at most 600 characters.
    """
    try:
        lines = log_file.read_text(errors="replace").splitlines()
    except OSError:
        return []
    noise = re.compile(
        r"CUDA driver version|CudaDriverHelper|DCGM|NVML|pinned|Timeout \d+: Found|\+-{3,}|^\s*\|?\s*\|?$"
    )
    kept = [line for line in lines if line.strip() and not noise.search(line)]
    telling = [line for line in kept if re.match(r"E\d{4} |error|Error|Traceback", line)]
    return [line[:600] for line in (telling or kept)[-most:]]
