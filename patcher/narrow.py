"""Convert a head to one plain linear layer on the classifier features, for an export as an ordinary checkpoint.

Patched rows use features that a fine-tuned layer does not see. Here each of them is refitted on the classifier features
alone, from the examples kept in the memory, in the order in which they were added. If a refit had replaced every row,
all rows are fitted again, as linear discriminants. A row fitted like this finds slightly fewer inputs
(``tests/benchmarks/quality.py``: the classifier's features alone).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from patcher.errors import InputError
from patcher.fit import fit
from patcher.fit.closed import discriminants
from patcher.head import Head

if TYPE_CHECKING:
    from patcher.memory import Memory

__all__ = ["narrow_head", "narrow_memory"]


def narrow_memory(memory: Memory) -> Memory:
    """The same memory, reduced to the classifier features."""
    split = memory.split
    return dataclasses.replace(
        memory,
        sums=memory.sums[:, :split],
        second_moment=memory.second_moment[:split, :split],
        sample=memory.sample[:, :split],
        clusters=dataclasses.replace(memory.clusters, means=memory.clusters.means[:, :split]),
    )


def narrow_head(head: Head, memory: Memory | None) -> Head:
    """The head with all its labels as base rows, FP32 ``[C, split]``, in the order of its logits.

    Fine-tuned rows keep their values. Raises InputError if the memory has no features of a label that was patched in.
    """
    rows = len(head.base_weight)
    plain = Head.from_linear(
        [label for label, row in zip(head.labels, head.order, strict=True) if row < rows],
        head.base_weight[head.order[head.order < rows]],
        head.base_bias[head.order[head.order < rows]],
        head.split,
        head.lineage.backbone,
        problem=head.problem,
    )
    patched = [(int(row), label) for label, row in zip(head.labels, head.order, strict=True) if row >= rows]
    if patched:
        plain = _with_patched(plain, [label for _, label in sorted(patched)], memory)
    order = [plain.labels.index(label) for label in head.labels]
    every = np.concatenate([plain.base_weight, plain.patch_weight]), np.concatenate([plain.base_bias, plain.patch_bias])
    weight, bias = (array[plain.order[order]] for array in every)
    return Head.from_linear(
        head.labels, weight, bias, head.split, head.lineage.backbone, problem=head.problem, method="narrow"
    )


def _with_patched(plain: Head, labels: list[str], memory: Memory | None) -> Head:
    lacking = [label for label in labels if memory is None or not len(memory.features_of(label))]
    if memory is None or lacking:
        raise InputError(
            f"the memory has nothing on {', '.join(map(repr, lacking))}, so no row on the classifier features can "
            "be fitted; expected a memory with features (`patcher remember --data FILE`)"
        )
    narrow = narrow_memory(memory)
    if not plain.labels:  # a refit had replaced all fine-tuned rows
        rows = discriminants(narrow, labels)
        return Head.from_linear(labels, rows.weight, rows.bias, plain.split, plain.lineage.backbone)
    examples = {}
    for label in labels:
        examples[label] = narrow.features_of(label)
        whole = len(examples[label]) == narrow.counts[narrow.labels.index(label)]
        narrow = narrow.remove(label, examples[label] if whole else None)
    for label in labels:
        plain = fit({label: examples[label]}, plain, narrow).apply(plain)
        narrow = narrow.add([label], examples[label], np.zeros(len(examples[label]), np.int64))
    return plain
