"""Adds the models that the split ensemble is measured against to a copy of its repository.

``whole`` is the classifier as if it had never been split: tokenizer, then backbone and head merged into one ONNX file.
``tokens`` is the split ensemble without its tokenizer. Both are served by the same server under the same settings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from patcher.classifier import Classifier

WHOLE, TOKENS = "whole", "tokens"


def merged(backbone: Path, head: Path) -> bytes:
    """Backbone and head merged into one graph, from token tensors to the head's answer."""
    import onnx
    from onnx import compose

    first, second = onnx.load(backbone), onnx.load(head)
    second = compose.add_prefix(second, "head/", rename_inputs=False, rename_outputs=False)
    joined = compose.merge_models(
        first, second, io_map=[("features", "features")], outputs=[output.name for output in second.graph.output]
    )
    joined.ir_version = first.ir_version
    del joined.metadata_props[:]
    data: bytes = joined.SerializeToString()
    return data


def _write(root: Path, name: str, message: Any, data: bytes | None = None) -> None:
    from google.protobuf import text_format

    message.name = name
    (root / name / "1").mkdir(parents=True)
    (root / name / "config.pbtxt").write_text(text_format.MessageToString(message))
    if data is not None:
        (root / name / "1" / "model.onnx").write_bytes(data)


def add_contenders(classifier: Classifier) -> tuple[str, str]:
    """Write ``whole`` and ``tokens`` into the repository of ``classifier`` (must be a copy); return their names."""
    repository, root = classifier.repository, classifier.root
    backbone, head, ensemble = (
        repository.config(name) for name in (classifier.backbone_model, classifier.head_model, classifier.name)
    )
    # The merged graph gets the backbone's settings, except for outputs and warm-up.
    whole = type(backbone)()
    whole.CopyFrom(backbone)
    del whole.output[:]
    whole.output.extend(head.output)
    del whole.model_warmup[:]
    data = merged(classifier.backbone_path, classifier.version_path(classifier.serving()) / "model.onnx")
    _write(root, f"{WHOLE}_model", whole, data)

    answer = {tensor.name: tensor.name for tensor in head.output}
    tokens = {tensor.name: tensor.name for tensor in backbone.input}

    def over(*steps: tuple[str, dict[str, str], dict[str, str]]) -> Any:
        message = type(ensemble)()
        message.CopyFrom(ensemble)
        del message.ensemble_scheduling.step[:]
        for model, given, gives in steps:
            message.ensemble_scheduling.step.add(model_name=model, model_version=-1, input_map=given, output_map=gives)
        return message

    _write(
        root, WHOLE, over((classifier.tokenizer_model, {"text": "text"}, tokens), (f"{WHOLE}_model", tokens, answer))
    )
    features = {"features": "features"}
    headless = over((classifier.backbone_model, tokens, features), (classifier.head_model, features, answer))
    del headless.input[:]
    headless.input.extend(backbone.input)
    _write(root, TOKENS, headless)
    return WHOLE, TOKENS


def with_tritons_defaults(classifier: Classifier) -> None:
    """Remove the repository's choice of instances and threads: two sessions, each with a thread per core."""
    from google.protobuf import text_format

    for model in (classifier.backbone_model, classifier.head_model):
        message = classifier.repository.config(model)
        del message.instance_group[:]
        message.instance_group.add(count=2)  # the C++ backend's default on a CPU
        for key in [key for key in message.parameters if key.endswith("thread_count")]:
            del message.parameters[key]
        (classifier.root / model / "config.pbtxt").write_text(text_format.MessageToString(message))
