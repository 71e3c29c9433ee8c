"""Imports have no cycles, and the core knows nothing of files and servers."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PURE = (
    "patcher.clustering",
    "patcher.examples",
    "patcher.feature_map",
    "patcher.fit",
    "patcher.flips",
    "patcher.gate",
    "patcher.gate_words",
    "patcher.head",
    "patcher.memory",
    "patcher.narrow",
    "patcher.patch",
    "patcher.recall",
    "patcher.rounding",
    "patcher.scope",
    "patcher.screening",
    "patcher.words",
)
"""Modules that only map arrays to arrays."""
OUTSIDE = {
    "grpc",
    "io",
    "onnx",
    "onnxruntime",
    "os",
    "pathlib",
    "shutil",
    "socket",
    "subprocess",
    "tempfile",
    "tritonclient",
}


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(path): path for package in ("patcher", "export") for path in (ROOT / package).rglob("*.py")}


def imports(name, *, types=True):
    """What a module imports anywhere, including for type checking if ``types``; our own modules by their full names."""
    tree = ast.parse(FILES[name].read_text())
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not types
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = name.split(".")[: -node.level] if node.level else []  # none is in an __init__.py
            module = ".".join([*above, *([node.module] if node.module else [])])
            whole = {f"{module}.{alias.name}" for alias in node.names}
            found |= whole & set(FILES) or {module}
    return found


def belongs(name, package):
    return name == package or name.startswith(f"{package}.")


def test_no_import_leads_back():
    below = {name: imports(name) & set(FILES) - {name} for name in FILES}
    count = 0
    while count != len(below):  # what imports nothing, or is imported by nothing, is in no cycle
        count = len(below)
        needed = set().union(*below.values())
        below = {name: needs & set(below) for name, needs in below.items() if needs & set(below) and name in needed}
    assert {name: sorted(needs & set(below)) for name, needs in below.items()} == {}


def test_imports_that_are_relative_count():
    """Triton's backend uses them between its files, since it does not always run as a part of this package."""
    backend = "patcher.triton.backends.onnxruntime"
    assert {f"{backend}.settings", f"{backend}.check", f"{backend}.graphs"} <= imports(f"{backend}.session")


def test_adding_labels_needs_no_exporter():
    """torch and transformers are installed only on the machine that exports."""
    heavy = {name: imports(name) for name in FILES if belongs(name, "patcher") and not belongs(name, "patcher.cli")}
    wrong = {
        name: sorted(each for each in needed if each.split(".")[0] in ("export", "torch", "transformers"))
        for name, needed in heavy.items()
    }
    assert {name: needed for name, needed in wrong.items() if needed} == {}


def ways(name):
    """Each of our modules that importing ``name`` runs, with the chain of imports that leads to it."""
    found, new = {name: (name,)}, [name]
    while new:
        last = new.pop()
        needed = {last, *imports(last, types=False)}
        packages = {each.rsplit(".", 1)[0] for each in needed if "." in each}
        for each in sorted((needed | packages) & set(FILES) - set(found)):
            found[each] = (*found[last], each)
            new.append(each)
    return found


@pytest.mark.parametrize("package", PURE)
def test_the_core_touches_no_file_and_no_server(package):
    modules = [name for name in FILES if belongs(name, package)]
    assert modules
    for name in modules:
        assert {each.split(".")[0] for each in imports(name)} & OUTSIDE == set(), name
        for last, way in ways(name).items():
            outside = {each.split(".")[0] for each in imports(last, types=False)} & OUTSIDE
            assert outside == set(), f"{' imports '.join(way)}, and that {outside}"


def test_types_of_arrays_are_for_type_checking_alone():
    assert [name for name in FILES if "patcher.arrays" in imports(name, types=False)] == []
    assert [name for name in FILES if "patcher.arrays" in imports(name)] != []
