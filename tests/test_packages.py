"""Every package that is imported is declared, and `patcher doctor` reports every declared one."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

from patcher import doctor
from patcher.triton import perf_analyzer

ROOT = Path(__file__).parents[1]
OURS = {"patcher", "export", "triton_python_backend_utils"}
"""The last one is provided by Triton to programs that run inside it."""


def declared(*extras):
    """Names of the packages in pyproject.toml: the required ones and those of ``extras`` (of all if none is named)."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = project["optional-dependencies"]
    chosen = [groups[extra] for extra in extras] if extras else [project["dependencies"], *groups.values()]
    found = (re.match(r"[A-Za-z0-9._-]+", each) for group in chosen for each in group)
    return {re.sub(r"[-_.]+", "-", name[0]).lower() for name in found}


def imported():
    """Top-level names that the code imports anywhere, including for type checking only."""
    for path in (*(ROOT / "patcher").rglob("*.py"), *(ROOT / "export").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from (alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield node.module.split(".")[0]


def test_every_package_that_is_imported_is_declared():
    brings = importlib.metadata.packages_distributions()
    names = set(imported()) - OURS - set(sys.stdlib_module_names) - {"google", "typing_extensions"}
    known = declared()
    missing = {
        name
        for name in names
        if name in brings and not known & {each.replace("_", "-").lower() for each in brings[name]}
    }
    # Both carry grpc: tritonclient[grpc] asks for it.
    assert missing - {"grpc"} == set()


def test_doctor_tells_of_every_package_that_may_be_missing():
    extras = ("export", "serve", "parquet", "plot", "report", "metrics", "s3")
    assert declared(*extras) == set(doctor._OPTIONAL)


def test_the_way_to_a_perf_analyzer_names_this_very_python():
    assert f"`{sys.executable} -m patcher.triton.perf_analyzer install`" in perf_analyzer._HINT


def test_there_is_a_way_to_run_the_quick_tests_alone():
    said = subprocess.run(["make", "-n", "test-fast"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert 'pytest -m "not slow"' in said
