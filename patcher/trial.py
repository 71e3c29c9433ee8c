"""A backbone and its tokenizer tried in a process of its own: foreign files may run for ever or take all memory."""

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
# With -I, for the folder here may be the repository, which could bring a numpy.py. Of memory as much as there is; if
# that is too much, it is this process that the kernel ends.
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
    """RepositoryError where a backbone's files give no features of ``text`` in time and in the memory that there is."""
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
