"""Finds everything in a repository that would make a server run code that patcher did not write.

Triton runs far more than a model's ``model.py``: a library, a stub or an environment beside it, any file that its
configuration names, and any module that shadows one that ``model.py`` imports.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from patcher.errors import PatcherError
from patcher.layout import programs
from patcher.names import CONFIG, MODEL, PROGRAM, BackboneNames
from patcher.storage.disk import STAGING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from patcher.files import RepositoryFiles

__all__ = ["UNKNOWN", "foreign", "is_earlier", "outdated"]

UNKNOWN = "if a newer patcher wrote it, update this one; otherwise `patcher upgrade --force` replaces it"
"""Advice on a program that neither this patcher nor an earlier one wrote. Nothing in it tells who did."""
_COMPILED = re.compile(r"1/__pycache__/model\.[^/]*\.pyc")
"""Byte code that Python writes if the server was not started by `patcher serve` or in the container."""
_PREPARED = re.compile(rf"1/{re.escape(STAGING)}[^/]*/\.model\.py\.new")
"""The remains of an upgrade that was killed while replacing a program; no server reads them."""
_STUB = "triton_python_backend_stub"
_CODE = frozenset([".py", ".pyc", ".pyo", ".pth", ".so", ".dll", ".dylib"])
_ARCHIVES = frozenset([".tar", ".gz", ".tgz", ".bz2", ".xz", ".zip", ".whl", ".egg"])
_DEEPEST = 8
_RUNTIMES = ("python", "onnxruntime", "")
"""Backends: of the models with a program; of the backbone and the heads; of ensembles, which have none."""
_EARLIER = frozenset(
    [
        "04cbe8b51be3490d330a77c1659cf0c5f8a36d13637cf1633972ab7306f140a6",
        "0c69c07b7f570c4521b7394aee82cb776b44548c016da7cee35779ad34842ce1",
        "1c11b8cb10f664ddfc7eb3b88fe8c0df4220714d49a684134cf83fce72022583",
        "1e7dc87920ba4c1bf7457c94dbaf5c1c63dfb2cb3daa0dad58378482bf6e8a8e",
        "3be0b636e136cad8e807cacde92ca8c5a9aee23d85973ed3fbf28d199101dfad",
        "3f1baddfe8641358566e2c5808313a2f0c80e06dced8c64f485ff194052efd1f",
        "4246612894512caaddb5c661af195f522b5170158d9f50b5c43fc53102225dc1",
        "471f2935853ab7abbfd5095d49b3f1eec1e9f37757237733ce16f4355de6750c",
        "674eee00d022f3a019668ffea46454ed770d4ed3264029106f8baa1d6a4aa80b",
        "67b783286ad5edf8aae922eda827dd732389f58ec7c6cdfc716bcf425e58d97b",
        "6a5d2c2853e683681dc65879f5a96c767b57745930315a790a7f40c1f3dfa2ab",
        "7d33b0b21f6b1b7bb32c2a76684add2ecbc7020df14fccbcbba962c476564a00",
        "7f7f7e32fbd59186b1e35783005bb7aa7e5966b1231d2cdef518c7d364700485",
        "9741f15ae793eb6ddd4f2565df33d88b2db41a49316caeb0c713e1ac352e5888",
        "9b08bfecf2cdb93571e3b2f5f726e5f0dbf8f443142dc955880d6028872ff42b",
        "cf81d33cf8dc68727e9703d52f432d7e5d4b00494eb2c80bbf6d5c7e9b907ac2",
        "d0aab26935dfcffc4729627ad5a4a1d0bb941ecda3b0fc0f264ad87f2852538e",
        "d269583757455251e49362da60fe44ef55aab3503794fbf29961d96441fdada8",
        "efe18c17cd3be5bbacd8ac7b82384791e767fdd18f45a00da781e3600d4f9429",
    ]
)
"""SHA-256 of every ``model.py`` that any version of patcher, this one included, wrote into repositories."""


def foreign(repository: RepositoryFiles) -> Iterator[tuple[str, str]]:
    """Yield a model and a finding for everything that makes a server run anything but what patcher wrote."""
    roles = _roles(repository)
    files: dict[str, list[str]] = {}
    # A single call, which is one listing on an object store.
    for path in repository.storage.glob(*("/".join("*" * depth) for depth in range(2, _DEEPEST + 1))):
        model, _, name = path.partition("/")
        files.setdefault(model, []).append(name)
    for model, backend in sorted(roles.items()):
        known = _programs(model)
        for name in sorted(files.get(model, [])):
            if known is not None and _PREPARED.fullmatch(name):
                continue
            if said := _file(repository, f"{model}/{name}", name, known):
                yield model, said
        try:
            message = repository.config(model)
        except PatcherError as error:
            if repository.storage.has(f"{model}/{CONFIG}"):
                yield model, str(error)
            continue
        for said in _configuration(message, backend, roles):
            yield model, f"{CONFIG}: {said}"


def outdated(repository: RepositoryFiles) -> list[str]:
    """Models whose program is an earlier version's, which `patcher upgrade` replaces."""
    found = []
    for model in sorted(_roles(repository)):
        known, data = _programs(model), repository.storage.find(f"{model}/{PROGRAM}") if _programs(model) else None
        if data is not None and data != known and is_earlier(data):
            found.append(model)
    return found


def is_earlier(program: bytes) -> bool:
    """Whether this version of patcher, or an earlier one, wrote a program."""
    return hashlib.sha256(program).hexdigest() in _EARLIER


def _roles(repository: RepositoryFiles) -> dict[str, str]:
    """Names of the models that patcher writes, each with the backend that it must have."""
    python, onnxruntime, ensemble = _RUNTIMES
    roles: dict[str, str] = {}
    for backbone in repository.backbones():
        names = BackboneNames(backbone)
        roles |= dict.fromkeys((names.tokenizer_model, names.encoder_model, names.store_model), python)
        roles |= {names.backbone_model: onnxruntime, names.features_model: ensemble, names.any_model: ensemble}
    for name in repository.classifiers():
        roles |= {name: ensemble, f"{name}_head": onnxruntime}
    return roles


def _programs(model: str) -> bytes | None:
    """The current version's program for a model; None for a model that has none."""
    for role in ("_tokenizer", "_encoder", "_heads"):
        if model.endswith(role):
            return programs(BackboneNames(model.removesuffix(role)))[model]
    return None


def _file(repository: RepositoryFiles, path: str, name: str, program: bytes | None) -> str:
    """What is wrong with a file of a model; empty if nothing is."""
    if name == PROGRAM and program is not None:
        data = repository.storage.find(path)
        if data is None or data == program or is_earlier(data):
            return ""
        return f"{name} is no program of this or an earlier patcher, and a server runs it: {UNKNOWN}"
    suffixes = set(PurePosixPath(name).suffixes)
    if name.rpartition("/")[2] == _STUB or suffixes & _CODE:
        said = "is not patcher's, and a server may run it; delete it"
        if _COMPILED.fullmatch(name):
            said = "is not patcher's: Python wrote it, or somebody put it there; start the server with "
            said += "PYTHONDONTWRITEBYTECODE=1, and delete it"
        return f"{name} {said}"
    if suffixes & _ARCHIVES:
        return f"{name} is an archive, from which a server may take its programs; delete it"
    if name.endswith(f"/{MODEL}") and not name.startswith("1/") and not path.partition("/")[0].endswith("_head"):
        return f"{name} would be served in place of 1/{MODEL}; delete it"
    return ""


def _configuration(message: Any, backend: str, ours: dict[str, str]) -> list[str]:
    """Settings in a parsed configuration that make a server run something else than what patcher wrote."""
    given = message.backend or message.platform.partition("_")[0]  # the older form: onnxruntime_onnx
    expected = backend or "ensemble"
    found = [] if given == expected else [f"backend {message.backend or message.platform!r}; expected {expected!r}"]
    if message.runtime:
        found.append(f"runtime {message.runtime!r}; expected none")
    usual = "model.py" if backend == "python" else MODEL
    named = {message.default_model_filename, *message.cc_model_filenames.values()} - {"", usual}
    found += [f"it has the server load the file {name!r}; expected {usual}" for name in sorted(named)]
    if "EXECUTION_ENV_PATH" in message.parameters:
        found.append("EXECUTION_ENV_PATH has the server run another Python; expected none")
    steps = {step.model_name for step in message.ensemble_scheduling.step}
    found += [f"it asks the model {name!r}, which is not patcher's" for name in sorted(steps - ours.keys())]
    return [*found, *_loaded(message)]


def _loaded(message: Any) -> Iterator[str]:
    """Settings in a parsed configuration that make a server load or read further files."""
    for name in message.model_operations.op_library_filename:
        yield f"it has the server load the library {name!r}; expected none"
    for agent in message.model_repository_agents.agents:
        yield f"it has the repository agent {agent.name!r} load it; expected none"
    accelerators = message.optimization.execution_accelerators
    for each in (*accelerators.gpu_execution_accelerator, *accelerators.cpu_execution_accelerator):
        for key in each.parameters:
            if "path" in key or "directory" in key or "library" in key:
                yield f"{key} of {each.name} has the server load files from elsewhere; expected none"
    files = [given.input_data_file for call in message.model_warmup for given in call.inputs.values()]
    yield from (f"a warm-up reads the file {name!r}; expected none" for name in files if name)
