"""The log of a server that is started: opened for it alone to be read by its owner, and what it says at the end."""

from __future__ import annotations

import contextlib
import os
import re
from typing import TYPE_CHECKING

from patcher.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path
    from typing import BinaryIO

__all__ = ["last_words", "open_log", "size", "telling_lines"]


def open_log(path: Path) -> BinaryIO:
    """An empty log to write, that only its owner may read: logs may quote what clients send.

    Raises InputError where it cannot be written.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.is_file() and not path.is_symlink():
            # The log of a server that died is what explains it, and a supervisor starts the next one at once. One that
            # still writes there writes on into its own.
            before = path.replace(f"{path}.1")
            with contextlib.suppress(OSError):  # it is somebody else's
                before.chmod(0o600)  # that of an earlier patcher could be read by all
        return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb")
    except OSError as error:
        raise InputError(
            f"cannot write the server's log to {path}: {error.strerror or error}; name another file (--log-file FILE)"
        ) from error


def size(path: Path | None) -> int:
    """The bytes of a log, 0 for one that is not there."""
    with contextlib.suppress(OSError):
        return path.stat().st_size if path else 0
    return 0


def last_words(path: Path | None) -> str:
    """What a log says of a failure, to be put behind the sentence that tells of it."""
    lines = telling_lines(path) if path else []
    said = "".join(f"\n  {line}" for line in lines) or " It logged nothing."
    return f"{said}\nThe whole log: {path}"


def telling_lines(log_file: Path, most: int = 12) -> list[str]:
    """The lines of a log that say why: Triton's errors and what follows them, without the harmless ones."""
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
