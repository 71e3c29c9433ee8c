"""The public interface: exported names, the imports of the light core, and exit codes of errors."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_structure import FILES

import patcher
from patcher import errors
from patcher.wording import install_hint, listing, percent

HEAVY = ("torch", "transformers", "pytriton", "matplotlib", "pyarrow", "scipy")


def test_every_public_name_is_there_and_says_what_it_is():
    assert sorted(patcher.__all__) == sorted(patcher._HOMES)
    for name in patcher.__all__:
        assert inspect.getdoc(getattr(patcher, name)), name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = patcher.nothing


EXPORTING = sorted(name for name, path in FILES.items() if "\n__all__ = " in path.read_text())


def test_every_module_says_what_it_exports_but_verbs_and_what_runs_alone():
    silent = {name for name in FILES if name not in EXPORTING and not name.startswith("patcher.cli.")}
    inside = {"patcher.triton.stub_start", *(name for name in FILES if name.endswith(".model") and ".triton." in name)}
    assert silent == {"patcher.__main__", "patcher.triton", *inside}


@pytest.mark.parametrize("name", EXPORTING)
def test_modules_export_what_they_define(name):
    module = importlib.import_module(name)
    assert set(module.__all__) <= set(dir(module))
    public = {
        member
        for member, value in vars(module).items()
        if not member.startswith("_") and getattr(value, "__module__", None) == module.__name__ and callable(value)
    }
    assert public <= set(module.__all__), public - set(module.__all__)


def test_every_error_is_in_the_tree_with_its_exit_code():
    classes = [getattr(errors, name) for name in errors.__all__ if name != "as_sentence"]
    assert all(issubclass(each, errors.PatcherError) for each in classes)
    codes = {each.__name__: each.exit_code for each in classes}
    assert {name for name, code in codes.items() if code == 2} == {
        "InputError", "ExamplesError", "LabelError", "VersionError", "RepositoryError", "CheckpointError", "SplitError"
    }  # fmt: skip
    assert (codes["GateRefused"], codes["NotServed"], codes["ServerUnreachable"]) == (3, 4, 1)
    kinds = (Path(__file__).parent.parent / "docs" / "operations.md").read_text()
    assert [name for name in codes if f"`{name}`" not in kinds] == ["PatcherError"]  # no error is of the base itself
    assert all(f"{name} " in errors.__doc__ or f"{name}\n" in errors.__doc__ for name in codes)


def test_every_error_that_a_docstring_names_is_at_hand():
    for name in errors.__all__:
        if name != "as_sentence":
            assert getattr(patcher, name) is getattr(errors, name)
            assert name in patcher.__all__
    assert patcher.EmbeddedTriton.__module__ == "patcher.triton.server"


def test_the_core_needs_none_of_the_heavy_packages():
    """Run every verb but `export` in a process in which the heavy packages cannot be imported."""
    block = f"import sys; sys.modules.update(dict.fromkeys({HEAVY!r}))\n"
    script = block + (
        "import patcher\n"
        "for name in patcher.__all__: getattr(patcher, name)\n"
        "from patcher.cli import _VERBS, main\n"
        "codes = [main([verb, '--help']) for verb in _VERBS]\n"
        "assert codes == [0] * len(_VERBS), codes\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_patcher_costs_next_to_nothing():
    script = "import sys; before = set(sys.modules); import patcher; print(sorted(set(sys.modules) - before))"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert not any(f"'{name}'" in loaded for name in (*HEAVY, "numpy", "onnx", "onnxruntime", "tritonclient"))


def test_every_extra_that_a_message_names_is_there():
    root = Path(__file__).parent.parent
    sources = "".join(path.read_text() for path in (root / "patcher").rglob("*.py"))
    named = set(re.findall(r"""install_hint\(['"](\w+)['"]\)""", sources))
    assert {"export", "serve", "report"} <= named
    extras = (root / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
    assert named <= set(re.findall(r"^(\w+) = \[", extras, re.MULTILINE))
    assert install_hint("report") == "pip install '.[report]' in the folder of patcher's clone"


def test_a_few_of_many_names_are_listed():
    assert listing(["a", "b"]) == "a, b"
    assert listing("abcde") == "a, b, c, d, e"
    assert listing(map(repr, "abcdef")) == "'a', 'b', 'c', 'd', 'e' …"
    assert listing("abcd", 3) == "a, b, c …"
    assert listing([]) == ""


@pytest.mark.parametrize(
    "share, shown, bound",
    [
        (0.0062217, "0.62 %", "0.63 %"),
        (0.07, "7.00 %", "7.00 %"),
        (0.0029, "0.29 %", "0.29 %"),
        (1e-9, "0.00 %", "0.01 %"),
        (0.0, "0.00 %", "0.00 %"),
        (1.0, "100.00 %", "100.00 %"),
        (0.99999, "99.99 %", "100.00 %"),
        (1.0 - 1e-15, "100.00 %", "100.00 %"),
        (np.float32(0.5), "50.00 %", "50.00 %"),
        (None, "—", "—"),
    ],
)
def test_an_upper_bound_is_rounded_up(share, shown, bound):
    assert (percent(share), percent(share, up=True)) == (shown, bound)


def test_a_lower_bound_is_rounded_down():
    assert [percent(share, 0, down=True) for share in (0.7469, 0.07, 1.0, None)] == ["74 %", "7 %", "100 %", "—"]
