"""Checks a model file against its configuration, and refuses at load what Triton's C++ backend refuses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .settings import LoadError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    Signature = tuple[str, tuple[int, ...]]

__all__ = ["check_model"]

_ELEMENTS = {  # onnxruntime's names of Triton's data types; Triton cannot transport other ONNX types
    "TYPE_BOOL": "bool",
    "TYPE_UINT8": "uint8",
    "TYPE_UINT16": "uint16",
    "TYPE_UINT32": "uint32",
    "TYPE_UINT64": "uint64",
    "TYPE_INT8": "int8",
    "TYPE_INT16": "int16",
    "TYPE_INT32": "int32",
    "TYPE_INT64": "int64",
    "TYPE_FP16": "float16",
    "TYPE_FP32": "float",
    "TYPE_FP64": "double",
    "TYPE_STRING": "string",
}
_DATA_TYPES = {f"tensor({element})": name for name, element in _ELEMENTS.items()}
_UNSUPPORTED = ("sequence_batching", "batch_input", "batch_output", "model_operations")


def check_model(config: Mapping[str, Any], session: Any) -> None:
    """Raise LoadError if the file contradicts the configuration, by the C++ backend's rules.

    The configuration must name as many required inputs as the file has, only tensors that exist in the file, and their
    data types. With ``max_batch_size`` the first axis must be dynamic, and no input may be optional. The dims of an
    output must equal the file's exactly, those of an input only where the file fixes them. Outputs may be left out.
    (See ValidateInputs, ValidateOutputs and CompareDimsSupported in triton-inference-server/onnxruntime_backend.)
    """
    for key in _UNSUPPORTED:
        if config.get(key):
            raise LoadError(f"the configuration asks for {key}, which this Python-based backend does not support")
    batches = int(config.get("max_batch_size", 0)) > 0
    inputs = _signatures(session.get_inputs())
    required = [entry for entry in config["input"] if not entry.get("optional")]
    if len(required) != len(inputs):
        raise LoadError(
            f"configuration expects {len(required)} inputs ({_names(required)}), "
            f"model provides {len(inputs)} ({', '.join(inputs)})"
        )
    inputs |= _signatures(session.get_overridable_initializers())
    for entry in config["input"]:
        if entry.get("optional") and batches:
            raise LoadError(f"optional input '{entry['name']}' is not supported for models that support batching")
        if entry.get("allow_ragged_batch"):
            raise LoadError(
                f"input '{entry['name']}' allows ragged batches, which this Python-based backend does not support"
            )
        _check_tensor("input", entry, inputs, batches)
    outputs = _signatures(session.get_outputs())
    for entry in config["output"]:
        _check_tensor("output", entry, outputs, batches)


def _check_tensor(kind: str, entry: Mapping[str, Any], there: Mapping[str, Signature], batches: bool) -> None:
    name = entry["name"]
    if name not in there:
        raise LoadError(f"unexpected inference {kind} '{name}', allowed {kind}s are: {', '.join(sorted(there))}")
    data_type, dims = there[name]
    if entry["data_type"] != data_type:
        raise LoadError(
            f"configuration expects datatype {entry['data_type']} for {kind} '{name}', model provides {data_type}"
        )
    shape = entry["reshape"].get("shape", []) if "reshape" in entry else entry["dims"]
    stated = tuple(int(dim) for dim in shape)
    if not dims and not batches:
        if any(dim != 1 for dim in stated):
            raise LoadError(f"{kind} '{name}' is a scalar in the model, the configuration specifies {list(stated)}")
        return
    if batches and (not dims or dims[0] != -1):
        raise LoadError(
            f"{kind} '{name}': under max_batch_size > 0 the first dimension must be -1; "
            f"the shape expected by the model is {list(dims)}"
        )
    if batches:
        stated = (-1, *stated)
    loose = kind == "input"
    equal = (a == b or (a == -1 and loose) for a, b in zip(dims, stated, strict=False))
    if len(dims) != len(stated) or not all(equal):
        raise LoadError(
            f"{kind} '{name}': the model expects shape {list(dims)} but the configuration specifies {list(stated)}"
            + (" (with the batch dimension that max_batch_size adds)" if batches else "")
        )


def _signatures(tensors: Sequence[Any]) -> dict[str, Signature]:
    """Triton's data type and the dims (-1 where not fixed) of tensors of an ONNX file, by name."""
    there = {}
    for tensor in tensors:
        if tensor.type not in _DATA_TYPES:
            raise LoadError(
                f"'{tensor.name}' is a {tensor.type} in the model; expected one of {', '.join(_DATA_TYPES)}"
            )
        dims = tuple(dim if isinstance(dim, int) else -1 for dim in tensor.shape)
        there[tensor.name] = (_DATA_TYPES[tensor.type], dims)
    return there


def _names(entries: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(entry["name"] for entry in entries)
