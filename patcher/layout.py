"""The folders that a backbone, a head store and a classifier are made of: names and bytes, before they are written."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from patcher import model_config
from patcher.head_file import write_head
from patcher.memory_file import write_memory

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import TypeAlias

    from patcher.backbone import Backbone
    from patcher.head import Head
    from patcher.memory import Memory

    Folders: TypeAlias = dict[str, dict[str, bytes | Path]]

__all__ = [
    "CONFIG",
    "MEMORY",
    "MODEL",
    "STORE",
    "BackboneFiles",
    "backbone_folders",
    "classifier_folders",
    "encoder_folder",
    "programs",
    "store_folders",
    "version_files",
    "version_numbers",
]

CONFIG = "config.pbtxt"
MODEL = "model.onnx"
MEMORY = "memory.safetensors"
STORE = "store"
"""A file in the head's folder of a classifier that a head store answers for: it names the backbone."""


@dataclass(frozen=True)
class BackboneFiles:
    """What an export hands over: the ONNX file of the backbone, and the tokenizer before it."""

    model: Path
    fingerprint: str
    """SHA-256 of the file."""
    tokenizer_json: str
    """A Rust tokenizer with padding and truncation switched on."""
    token_inputs: tuple[str, ...]
    width: int
    device: str = "cpu"
    """``gpu`` places the backbone there, and all else on the CPU; ``cpu`` leaves it to Triton."""
    tensorrt: str = ""
    """Precision in which TensorRT runs the backbone on a GPU; empty leaves it to CUDA."""
    unpadded: bool = False
    """Whether the file computes nothing for padding but attention."""


def backbone_folders(base: Backbone, files: BackboneFiles) -> Folders:
    """A backbone with its encoder, tokenizer and features ensemble, the ensemble last."""
    longest = json.loads(files.tokenizer_json)["truncation"]["max_length"]
    configs = (
        model_config.tokenizer_config(base.tokenizer_model, files.token_inputs),
        model_config.backbone_config(
            base.backbone_model,
            files.token_inputs,
            files.width,
            files.fingerprint,
            files.device,
            files.tensorrt,
            longest,
        ),
        model_config.encoder_config(
            base.encoder_model,
            files.token_inputs,
            base.backbone_model,
            files.width,
            files.device,
            unpadded=files.unpadded,
        ),
        model_config.features_config(base.features_model, base.encoder_model, files.width),
    )
    texts = _text_files(files.tokenizer_json)
    contents: Folders = {
        base.tokenizer_model: texts,
        base.backbone_model: {f"1/{MODEL}": files.model},
        base.encoder_model: texts,
    }
    return _with_configs(contents, configs)


def encoder_folder(backbone: Backbone, config: str, tokenizer_json: str) -> Folders:
    """An encoder alone, under its ``config``."""
    return {backbone.encoder_model: {**_text_files(tokenizer_json), CONFIG: config.encode()}}


def store_folders(backbone: Backbone) -> Folders:
    """A backbone's head store and the ensemble above it."""
    configs = (
        model_config.store_config(backbone.store_model, backbone.width(), backbone.backbone),
        model_config.any_config(backbone.any_model, backbone.encoding(), backbone.store_model),
    )
    return _with_configs({backbone.store_model: {"1/model.py": _source("heads")}}, configs)


def classifier_folders(
    name: str, head: Head, memory: Memory | None, base: Backbone, *, in_store: bool, share: float | None
) -> Folders:
    """A classifier's head with its first version, and the ensemble above it where no head store answers for it."""
    version = head.lineage.version
    configs = [model_config.head_config(f"{name}_head", head.width, version)]
    mark = {STORE: f"{base.backbone}\n".encode()} if in_store else {}
    if not in_store:
        configs.append(model_config.classifier_config(name, base.encoding(), f"{name}_head", share))
    versions = {f"{version}/{file}": data for file, data in version_files(head, memory).items()}
    return _with_configs({f"{name}_head": {**mark, **versions}}, configs)


def programs(backbone: Backbone) -> dict[str, bytes]:
    """What runs inside Triton for a backbone, by model, whether it has that model or not."""
    encoding = _source("tokenizer")
    return {
        backbone.tokenizer_model: encoding,
        backbone.encoder_model: encoding,
        backbone.store_model: _source("heads"),
    }


def _with_configs(contents: Folders, configs: Sequence[model_config.ModelConfig]) -> Folders:
    return {config.name: contents.get(config.name, {}) | _config_files(config) for config in configs}


def _config_files(config: model_config.ModelConfig) -> dict[str, bytes | Path]:
    # An object store has no empty folders, and an ensemble without its version folder does not load.
    keep: dict[str, bytes | Path] = {"1/.keep": b""} if config.steps else {}
    return {**keep, CONFIG: model_config.render(config).encode()}


def _text_files(tokenizer_json: str) -> dict[str, bytes | Path]:
    return {"1/model.py": _source("tokenizer"), "1/tokenizer.json": tokenizer_json.encode()}


def _source(model: str) -> bytes:
    return (Path(__file__).parent / "triton" / model / "model.py").read_bytes()


def version_numbers(names: Sequence[str]) -> tuple[int, ...]:
    """The versions among names like ``intent_head/3/model.onnx``, ascending."""
    found = (name.split("/")[1] for name in names)
    return tuple(sorted(int(number) for number in found if number.isascii() and number.isdigit() and int(number) > 0))


def version_files(head: Head, memory: Memory | None) -> dict[str, bytes]:
    """The files of a version; the head comes last, since it makes the version one."""
    return ({} if memory is None else {MEMORY: write_memory(memory)}) | {MODEL: write_head(head)}
