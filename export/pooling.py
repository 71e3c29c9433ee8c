"""Computes the features beside the classifier's own: a mean over tokens of the last layers' hidden states.

Fine-tuning pulls the tensor that enters the classifier towards the labels it was trained on. The hidden states keep
more of what sets a new label apart, and those of several layers keep more than the last layer alone. A mean over all
layers detects texts on distant topics a little better, but texts that resemble a label worse
(``tests/benchmarks/tune_fit.py`` measures it). The mean is as wide as one layer and costs nothing to serve.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from patcher.errors import SplitError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["LAYERS", "last_states", "pooled"]

LAYERS = 3
"""How many of the last layers are averaged; all of them if the model has fewer."""
_TOKENWISE = 3
"""Number of dimensions of a tensor with a row for each token: batch, sequence, width."""


def pooled(states: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Mean ``[batch, hidden]`` over layers and tokens of hidden states ``[batch, sequence, hidden]``.

    Each token's state is first scaled to a root mean square of 1: in pre-norm models the states grow from layer to
    layer, and the last would drown out the others. An empty text may consist of padding only; its mean is zero.
    """
    weights = mask.unsqueeze(-1).to(states[-1].dtype)
    # Summed one by one rather than stacked: `unpadding` only packs tensors of shape [batch, sequence, …].
    total = functools.reduce(
        torch.add, [state * torch.rsqrt(state.pow(2).mean(dim=-1, keepdim=True) + 1e-6) for state in states]
    )
    return (total / len(states) * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


@contextlib.contextmanager
def last_states(model: PreTrainedModel) -> Iterator[list[tuple[Tensor, ...]]]:
    """Collect, for each forward pass, the hidden states ``[batch, sequence, hidden]`` of the last layers in order.

    Raises SplitError if the encoder's first output is not such a state.
    """
    seen: list[tuple[Tensor, ...]] = []

    def keep(_module: nn.Module, _given: Any, result: Any) -> None:
        state = result[0] if isinstance(result, (tuple, Mapping)) and len(result) else result
        if not isinstance(state, Tensor) or state.dim() != _TOKENWISE:
            raise SplitError(f"{type(body).__name__}'s first output is no last hidden state [batch, sequence, hidden]")
        # The first is the embedding. The last is dropped because it may equal `state`, if no final norm follows it.
        inner = [each for each in (getattr(result, "hidden_states", None) or ())[1:-1] if each.shape == state.shape]
        seen.append((*inner[len(inner) - min(len(inner), LAYERS - 1) :], state))

    body = model.base_model
    if body is model:
        raise SplitError(f"{type(model).__name__} does not tell which part of it is the encoder (its base_model)")
    hook = body.register_forward_hook(keep)
    asked = model.config.output_hidden_states
    model.config.output_hidden_states = True
    try:
        yield seen
    finally:
        hook.remove()
        model.config.output_hidden_states = asked
