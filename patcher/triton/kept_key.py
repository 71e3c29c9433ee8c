"""The admin key that a server generates for itself: where it is stored, and how those who may use it find it.

Without a key, every user of the machine could load models, which means running code as the user who started the server.
So a server that is given no key generates one. It is stored in that user's state folder, in a file that is named after
the server's address and that nobody else can read. The file stays locked while the process that started the server
runs. Since the kernel releases the lock, a file that nobody has locked was left behind by a killed process and is
ignored.

The key is valid only for the exact address in the file's name. ``localhost`` may resolve to another address, where
another user listens on the same port.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import ipaddress
import os
import pwd
import re
import secrets
import socket
import stat
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING

from patcher.errors import InputError
from patcher.scratch import abandoned
from patcher.triton.prepared import make_private

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["KeptKey", "find_key", "state_folder"]

_KEY = re.compile(rb"[0-9a-f]{64}")
_LONGEST = 100
_LISTENS = "0A"
"""The state of a listening socket in the kernel's tables, proc(5)."""
_YOUNG_SECONDS = 60.0
"""An unlocked file that is younger may be new and not locked yet, so it is not deleted."""
_XDG = Path(".local") / "state"


class KeptKey:
    """A key for one run of a server: stored by :meth:`write`, published by :meth:`show`, deleted by :meth:`remove`."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self._file: IO[bytes] | None = None

    def write(self) -> str:
        """Store a new key and return it; called before the server starts, which is pointless without a stored key.

        Raises InputError if there is no place for it that only this user can access.
        """
        folder, key = state_folder(), secrets.token_hex(32)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            make_private(folder)
            _require_private(folder.lstat(), folder)
            for left in abandoned(folder.glob(f"{glob.escape(_node())}-*.key")):
                if time.time() - left.stat().st_mtime > _YOUNG_SECONDS:
                    left.unlink(missing_ok=True)
            descriptor, name = tempfile.mkstemp(".key", f"{_node()}-new-", folder)
            self._file, self.path = os.fdopen(descriptor, "wb", buffering=0), Path(name)
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            self._file.write(key.encode())
            _require_private(os.fstat(descriptor), self.path)
        except OSError as error:
            self.remove()
            raise _not_kept(folder, error) from error
        return key

    def show(self, address: str) -> None:
        """Let this user's commands find the key of the server at ``address``, HOST:PORT; raises like :meth:`write`."""
        if self.path:
            try:
                self.path = self.path.replace(self.path.with_name(_name(address)))
            except OSError as error:
                raise _not_kept(self.path.parent, error) from error

    def remove(self) -> None:
        """Delete the file, unless another server at the same address has replaced it with its own."""
        if self._file and self.path:
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(self._file.fileno()), self.path.lstat()):
                    self.path.unlink()
            self._file.close()
        self._file = self.path = None


def find_key(host: str, port: int) -> tuple[str, str] | None:
    """Address and key of the server at ``host`` and ``port``, if this user started it on this machine; else None.

    Root finds the key whoever started the server.
    """
    for number in _loopback(host):
        address = f"[{number}]:{port}" if ":" in number else f"{number}:{port}"
        for folder, owner in _folders(number, port):
            if key := _read(folder / _name(address), owner):
                return address, key
    return None


def state_folder() -> Path:
    """The folder for logs and keys of this user's servers; InputError for a user without a home folder."""
    given = Path(os.environ.get("XDG_STATE_HOME", ""))
    try:
        return (given if given.is_absolute() else Path.home() / _XDG) / "patcher"
    except RuntimeError as error:
        raise InputError(f"{error}; set $HOME, or name a folder for logs and keys in $XDG_STATE_HOME") from error


def _not_kept(folder: Path, error: OSError) -> InputError:
    return InputError(
        f"cannot keep this server's own admin key in {folder}: {error.strerror or error}; name another folder in "
        "$XDG_STATE_HOME, or give a key (--admin-key-file FILE or $PATCHER_ADMIN_KEY, admin_key=...). With "
        "--no-admin-key (open_control=True) every user of this machine may load models, which runs code as you"
    )


def _node() -> str:
    """The host name: machines may share a home folder, and the same port is a different server on each."""
    return re.sub(r"[^\w.-]", "_", socket.gethostname())


def _name(address: str) -> str:
    return f"{_node()}-{address}.key"


def _require_private(found: os.stat_result, path: Path) -> None:
    kind = "a link" if stat.S_ISLNK(found.st_mode) else ""
    whose = "another user's" if found.st_uid != os.geteuid() else ""
    opened = "open to others" if found.st_mode & (stat.S_IRWXG | stat.S_IRWXO) else ""
    if wrong := kind or whose or opened:
        raise PermissionError(0, f"{path} is {wrong}")


def _loopback(host: str) -> list[str]:
    if host == "localhost":
        return ["127.0.0.1", "::1"]
    try:
        number = ipaddress.ip_address(host)
    except ValueError:
        return []
    return [str(number)] if number.is_loopback else []


def _folders(number: str, port: int) -> Iterator[tuple[Path, int]]:
    """The folders in which a server's key may be, each with the user ID that has to own the file."""
    with contextlib.suppress(InputError):
        yield state_folder(), os.geteuid()
    if os.geteuid() == 0:
        for user in _listeners(number, port) - {0}:
            with contextlib.suppress(KeyError):
                yield Path(pwd.getpwuid(user).pw_dir) / _XDG / "patcher", user


def _read(path: Path, owner: int) -> str | None:
    """The key in a file that ``owner`` owns and that is locked, else None: other files are planted or left behind."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if found.st_uid != owner or not stat.S_ISREG(found.st_mode):
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:  # the file is locked, or the file system has no locks
            key = file.read(_LONGEST)
            return key.decode() if _KEY.fullmatch(key) else None
    return None


def _listeners(number: str, port: int) -> set[int]:
    """The IDs of the users whose processes listen at that address and port."""
    found = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                _, local, _, state, _, _, _, user, *_ = line.split()
                if state == _LISTENS and _place(local) == (number, port):
                    found.add(int(user))
    return found


def _place(written: str) -> tuple[str, int]:
    """Parse an address and port from the kernel's tables, where gRPC's IPv4 addresses appear as IPv4-mapped IPv6."""
    digits, port = written.split(":")
    words = [int(digits[start : start + 8], 16).to_bytes(4, sys.byteorder) for start in range(0, len(digits), 8)]
    number = ipaddress.ip_address(b"".join(words))
    return str(getattr(number, "ipv4_mapped", None) or number), int(port, 16)
