"""Try a backbone and its tokenizer in a separate process: untrusted files may run forever or exhaust the memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

from patcher.errors import RepositoryError

if TYPE_CHECKING:
    from patcher.backbone import Backbone

__all__ = ["try_backbone"]

_SECONDS = 120.0
# Run with -I (isolated), because the current folder may be the repository, which could contain a numpy.py. The process
# may use up to the physical memory; if that is too much, its oom_score_adj makes the kernel kill this process first.
_CODE = """
import json, os, resource, sys
from pathlib import Path
from types import SimpleNamespace
path, backbone, tokenizer, text, most = json.loads(sys.argv[1])
sys.path[:] = path
answer = os.fdopen(os.dup(1), "w")
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # libraries may print
resource.setrlimit(resource.RLIMIT_DATA, (most, most))
Path("/proc/self/oom_score_adj").write_text("1000")
from patcher.errors import PatcherError
from patcher.features import extract_features
try:
    extract_features(SimpleNamespace(backbone_path=Path(backbone), tokenizer_path=Path(tokenizer)), [text])
except PatcherError as error:
    print(json.dumps(str(error)), file=answer, flush=True)
"""


def try_backbone(backbone: Backbone, text: str) -> None:
    """Raise RepositoryError if a backbone's files do not yield features of ``text`` within the time and memory limits.

    The limits are 120 seconds and the machine's physical memory.
    """
    files = [os.fspath(backbone.backbone_path), os.fspath(backbone.tokenizer_path)]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    given = json.dumps([sys.path, *files, text, memory])
    try:
        done = subprocess.run(  # noqa: S603 - a list of our own, no shell
            [sys.executable, "-I", "-c", _CODE, given], capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise RepositoryError(
            f"tokenizer and backbone gave no features of a short text in {_SECONDS:g} s; do not serve them"
        ) from None
    if done.returncode:
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "it said nothing")
        raise RepositoryError(
            f"tokenizer and backbone ended the process that tried them (exit code {done.returncode}: {last:.200}); "
            "do not serve them"
        )
    if done.stdout.strip():
        raise RepositoryError(json.loads(done.stdout))
