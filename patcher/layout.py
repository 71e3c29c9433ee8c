"""The folders of a backbone, a head store and a classifier, as file names and contents, before they are written."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from patcher import model_config
from patcher.configs import (
    any_config,
    backbone_config,
    classifier_config,
    encoder_config,
    features_config,
    graphed,
    head_config,
    store_config,
    tokenizer_config,
    with_program,
)
from patcher.head_file import write_head
from patcher.memory_file import write_memory
from patcher.names import CONFIG, MEMORY, MODEL, PROGRAM, STORE

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import TypeAlias

    from patcher.head import Head
    from patcher.memory import Memory
    from patcher.model_config import Step
    from patcher.names import BackboneNames

    Folders: TypeAlias = dict[str, dict[str, bytes | Path]]

__all__ = [
    "BackboneFiles",
    "backbone_folders",
    "classifier_folders",
    "encoder_folder",
    "programs",
    "store_folders",
    "stored_folders",
    "version_files",
]


@dataclass(frozen=True)
class BackboneFiles:
    """What an export hands over: the ONNX file of the backbone, and its tokenizer."""

    model: Path
    fingerprint: str
    """SHA-256 of the file."""
    tokenizer_json: str
    """The ``tokenizer.json`` of a Rust tokenizer, with padding and truncation switched on."""
    token_inputs: tuple[str, ...]
    width: int
    device: str = "cpu"
    """``gpu`` runs the backbone on a GPU and everything else on the CPU; ``cpu`` leaves the placement to Triton."""
    tensorrt: str = ""
    """Precision in which TensorRT runs the backbone on a GPU; empty uses CUDA instead."""
    unpadded: bool = False
    """Whether the graph skips padding everywhere but in attention."""
    fused: bool = False
    """Whether the graph uses fused operators that each have a GPU kernel."""


def backbone_folders(names: BackboneNames, files: BackboneFiles) -> Folders:
    """The folders of a backbone with its encoder, tokenizer and features ensemble; the ensemble comes last."""
    longest = json.loads(files.tokenizer_json)["truncation"]["max_length"]
    graphs = graphed(longest) if files.fused else ""
    configs = (
        tokenizer_config(names.tokenizer_model, files.token_inputs),
        backbone_config(
            names.backbone_model,
            files.token_inputs,
            files.width,
            files.fingerprint,
            files.device,
            files.tensorrt,
            longest,
            graphs,
        ),
        encoder_config(
            names.encoder_model,
            files.token_inputs,
            names.backbone_model,
            files.width,
            files.device,
            unpadded=files.unpadded,
            graphs=graphs,
        ),
        features_config(names.features_model, names.encoder_model, files.width),
    )
    texts = _text_files(files.tokenizer_json)
    contents: Folders = {
        names.tokenizer_model: texts,
        names.backbone_model: {f"1/{MODEL}": files.model},
        names.encoder_model: texts,
    }
    return _with_configs(contents, configs)


def encoder_folder(names: BackboneNames, config: str, tokenizer_json: str) -> Folders:
    """The folder of an encoder alone, with the given ``config``."""
    files = _text_files(tokenizer_json)
    return {names.encoder_model: {**files, CONFIG: with_program(config, _source("tokenizer")).encode()}}


def store_folders(names: BackboneNames, width: int, encoding: Sequence[Step]) -> Folders:
    """The folders of a backbone's head store and its ensemble; ``encoding`` are the steps to the ``width`` features."""
    configs = (
        store_config(names.store_model, width, names.backbone_name),
        any_config(names.any_model, encoding, names.store_model),
    )
    return _with_configs({names.store_model: {PROGRAM: _source("heads")}}, configs)


def stored_folders(name: str, head: Head, memory: Memory | None, backbone: str) -> Folders:
    """The folder of a classifier in the head store of ``backbone``: its head with the first version."""
    files = {STORE: f"{backbone}\n".encode(), **_first_version(head, memory)}
    return _with_configs({f"{name}_head": files}, [_head_config(name, head)])


def classifier_folders(
    name: str, head: Head, memory: Memory | None, encoding: Sequence[Step], share: float | None
) -> Folders:
    """The folders of a classifier's head with its first version, and of its ensemble; a canary states its ``share``."""
    ensemble = classifier_config(name, encoding, f"{name}_head", share)
    return _with_configs({f"{name}_head": _first_version(head, memory)}, [_head_config(name, head), ensemble])


def _head_config(name: str, head: Head) -> model_config.ModelConfig:
    return head_config(f"{name}_head", head.width, head.lineage.version)


def _first_version(head: Head, memory: Memory | None) -> dict[str, bytes | Path]:
    return {f"{head.lineage.version}/{file}": data for file, data in version_files(head, memory).items()}


def programs(names: BackboneNames) -> dict[str, bytes]:
    """The Python programs that run inside Triton for a backbone, by model, including models that it may not have."""
    encoding = _source("tokenizer")
    return {names.tokenizer_model: encoding, names.encoder_model: encoding, names.store_model: _source("heads")}


def _with_configs(contents: Folders, configs: Sequence[model_config.ModelConfig]) -> Folders:
    return {config.name: contents.get(config.name, {}) | _config_files(config, contents) for config in configs}


def _config_files(config: model_config.ModelConfig, contents: Folders) -> dict[str, bytes | Path]:
    # An ensemble does not load without a version folder, and an object store has no empty folders.
    keep: dict[str, bytes | Path] = {"1/.keep": b""} if config.steps else {}
    text, program = model_config.render(config), contents.get(config.name, {}).get(PROGRAM)
    return {**keep, CONFIG: (with_program(text, program) if isinstance(program, bytes) else text).encode()}


def _text_files(tokenizer_json: str) -> dict[str, bytes | Path]:
    return {PROGRAM: _source("tokenizer"), "1/tokenizer.json": tokenizer_json.encode()}


def _source(model: str) -> bytes:
    return (Path(__file__).parent / "triton" / model / "model.py").read_bytes()


def version_files(head: Head, memory: Memory | None, data: bytes | None = None) -> dict[str, bytes]:
    """The files of a version. The head is last: a version exists once it does. ``data`` is its file, if written."""
    return ({} if memory is None else {MEMORY: write_memory(memory)}) | {MODEL: data or write_head(head)}
