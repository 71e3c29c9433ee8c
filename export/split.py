"""Finds a classifier's last linear layer by shape and by what flows through it, not by a table of names."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from export.pooling import last_states
from patcher.errors import SplitError
from patcher.rounding import rounding

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

__all__ = ["Split", "allowed_gaps", "find_split", "without_layer"]

_TOKENWISE = 3
"""Number of dimensions of a tensor with a row for each token: batch, sequence, width."""
_MATRIX = 2
_TOLERANCE = 1e-4
"""Absolute difference of a logit that always counts as rounding, however small its terms are."""
_ROUNDING = 1e-5
"""Tolerance relative to a logit's terms; FP32 features and another order of summation differ by less."""


@dataclass(frozen=True)
class Split:
    """The last linear layer and the widths of the features before it.

    ``weight``, FP32 ``[labels, split]``, and ``bias``, FP32 ``[labels]`` (zeros if the layer has none), map the
    classifier features to the logits; ``hidden`` is the width of the last hidden states.
    """

    layer: str
    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    hidden: int

    @property
    def split(self) -> int:
        """Width of the classifier features."""
        return int(self.weight.shape[1])

    @property
    def width(self) -> int:
        """Width of all features."""
        return self.split + self.hidden


def allowed_gaps(
    features: NDArray[np.float32], weight: NDArray[np.float32], bias: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Largest rounding difference expected in each logit of ``features @ weight.T + bias``, ``[batch, labels]``."""
    gaps: NDArray[np.float32] = _TOLERANCE + rounding(features, weight, bias, _ROUNDING)
    return gaps


@dataclass(frozen=True)
class _Call:
    """One call of one module during the traced forward."""

    layer: str
    given: Tensor
    result: Tensor


def find_split(model: PreTrainedModel, inputs: Mapping[str, Tensor], labels: int) -> Split:
    """Find the layer whose output is the logits, and check that it can be removed.

    Parameters
    ----------
    inputs
        A padded batch of tokens, INT64 ``[batch, sequence]`` each.
    labels
        Number of logits the model gives.

    Raises
    ------
    SplitError
        if no linear layer gives the logits, something after it changes them, the model calls it more than once or ties
        its weights, or there is no last hidden state ``[batch, sequence, hidden]``.
    """
    with torch.no_grad(), last_states(model) as states:
        calls, logits = _traced(model, inputs, labels)
        if tuple(logits.shape) != (len(logits), labels):
            raise SplitError(f"the model gives logits {list(logits.shape)}; expected [batch, {labels}]")
        layer, matrix, bias = _last_layer(model, calls, logits, inputs["attention_mask"])
        # As at export, call the model without the layer: applying the layer to the result must give the logits.
        with without_layer(model, layer):
            features = model(**inputs).logits
    if features.shape != (len(logits), matrix.shape[1]) or not _gives(logits, features, matrix, bias):
        raise SplitError(f"the logits are not made by the layer {layer!r} alone: without it, other features come out")
    hidden = int(states[-1][-1].shape[-1])
    return Split(layer, matrix.numpy().copy(), bias.numpy().copy(), hidden)


@contextlib.contextmanager
def without_layer(model: nn.Module, layer: str) -> Iterator[None]:
    """Temporarily replace one layer of the model with the identity."""
    parent_name, _, name = layer.rpartition(".")
    parent = model.get_submodule(parent_name)
    removed = getattr(parent, name)
    setattr(parent, name, nn.Identity())
    try:
        yield
    finally:
        setattr(parent, name, removed)


def _traced(model: PreTrainedModel, inputs: Mapping[str, Tensor], labels: int) -> tuple[list[_Call], Tensor]:
    """Run the model once; return its logits and the calls of every module that could have produced them."""
    calls: list[_Call] = []

    def listen(layer: str) -> Any:
        def keep(_module: nn.Module, given: tuple[Any, ...], result: Any) -> None:
            if len(given) == 1 and isinstance(given[0], Tensor) and isinstance(result, Tensor):
                calls.append(_Call(layer, given[0], result))

        return keep

    layers = [name for name, module in model.named_modules() if _weight(module, labels) is not None]
    hooks = [model.get_submodule(name).register_forward_hook(listen(name)) for name in layers]
    try:
        logits = model(**inputs).logits
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        raise SplitError(f"the model's forward failed on a padded batch of tokens: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()
    return calls, logits


def _weight(module: nn.Module, labels: int) -> Tensor | None:
    """The module's weight matrix if it could be a linear layer with ``labels`` outputs, whatever its class."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Embedding) or not isinstance(weight, Tensor) or weight.dim() != _MATRIX:
        return None
    return weight if labels in weight.shape else None


def _last_layer(model: PreTrainedModel, calls: list[_Call], logits: Tensor, mask: Tensor) -> tuple[str, Tensor, Tensor]:
    """Name, matrix ``[labels, split]`` and bias of the layer that gives the logits, as ``_holds`` defines it."""
    last = [call for call in calls if _holds(call.result, logits, mask)]
    if not last:
        linear = ", ".join(sorted({call.layer for call in calls})) or "none"
        raise SplitError(
            f"no linear layer of {type(model).__name__} gives its logits (linear layers to {logits.shape[1]} numbers: "
            f"{linear}): something after the last layer changes them, so patched rows would not add up"
        )
    layer = last[-1].layer
    if sum(call.layer == layer for call in calls) > 1:
        raise SplitError(f"{type(model).__name__} calls its layer {layer!r} more than once; expected a last layer")
    module = model.get_submodule(layer)
    matrix, bias = _linear(module, last[-1])
    tied = [name for name, other in model.named_parameters(remove_duplicate=False) if other is module.weight]
    if len(tied) > 1:
        raise SplitError(
            f"the last layer {layer!r} shares its weights with another part of the model ({', '.join(tied)})"
        )
    return layer, matrix, bias


def _linear(module: nn.Module, call: _Call) -> tuple[Tensor, Tensor]:
    """Matrix ``[labels, split]`` and bias with ``result = given @ matrix.T + bias``; SplitError if there are none."""
    weight = module.get_parameter("weight").detach().float()
    bias = getattr(module, "bias", None)
    # transformers' Conv1D is a linear layer with a transposed matrix; the values show which orientation is right.
    for matrix in (weight, weight.T):
        rows = matrix.shape[0]
        shift = torch.zeros(rows) if bias is None else bias.detach().float()
        fits = call.given.shape[-1] == matrix.shape[1] and call.result.shape[-1] == rows
        if fits and _gives(call.result, call.given, matrix, shift):
            return matrix.contiguous(), shift
    raise SplitError(
        f"the layer {call.layer!r} ({type(module).__name__}) gives the logits, but is not linear: its output is not "
        "its input times its weight plus its bias; merge adapters into the weights first"
    )


def _holds(result: Tensor, logits: Tensor, mask: Tensor) -> bool:
    """Whether the logits are ``result`` itself or, for each text, one token's row of it or the mean of its rows."""
    if result.shape == logits.shape:
        return bool(torch.equal(result, logits))
    if result.dim() != _TOKENWISE or result.shape[0] != logits.shape[0] or result.shape[2] != logits.shape[1]:
        return False
    rows = mask.unsqueeze(-1).to(result.dtype)
    mean = (result * rows).sum(dim=1) / rows.sum(dim=1)  # a mean is linear, so the layer can just as well follow it
    chosen = (result == logits[:, None, :]).all(dim=2).any(dim=1).all()
    return bool(chosen) or torch.allclose(mean, logits, atol=_TOLERANCE)


def _gives(logits: Tensor, features: Tensor, matrix: Tensor, bias: Tensor) -> bool:
    gaps = (features @ matrix.T + bias - logits).abs().numpy()
    return bool((gaps <= allowed_gaps(*(each.numpy() for each in (features, matrix, bias)))).all())
