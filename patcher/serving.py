"""Read and write the performance settings in the ``config.pbtxt`` of a backbone and its encoder.

`patcher tune` chooses them for a machine; all other settings in a configuration stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from patcher.configs import GRAPHS, PADDING_SLACK, SLACK, asked_by, encoders
from patcher.errors import RepositoryError
from patcher.model_config import MAX_BATCH_SIZE, is_on_gpu, parameter, parse, to_text
from patcher.wording import plural

__all__ = ["Serving", "serving_of", "with_encoders", "with_response_cache", "with_serving"]

_THREADS, _LARGEST = "intra_op_thread_count", "largest_batch"


@dataclass(frozen=True)
class Serving:
    """The performance settings of a backbone and its encoder, which `patcher tune` chooses for a machine.

    - ``instances``: the number of sessions.
    - ``threads``: the threads of each session; 0 means one for each core.
    - ``delay_us``: how long, in microseconds, a text may wait in the encoder's queue for others to share its batch.
    - ``slack``: how much padding texts of different lengths may cost to share a batch, in tokens; 0 batches only equal
      lengths. For a backbone that skips padding, it is counted in pairs of tokens in its attention.
    - ``batch``: the largest batch of the backbone.

    Exports before 0.4.0 have no encoder: there, ``delay_us`` applies to the tokenizer's queue.
    """

    instances: int = 1
    threads: int = 0
    delay_us: int = 0
    slack: int = PADDING_SLACK
    batch: int = MAX_BATCH_SIZE

    def __str__(self) -> str:
        threads = plural(self.threads, "thread") if self.threads else "a thread for each core"
        each = " each" if self.instances > 1 else ""
        return (
            f"{plural(self.instances, 'instance')} with {threads}{each}, delay {self.delay_us:,} µs, "
            f"slack {self.slack:,}, batches of up to {self.batch}"
        )


def serving_of(encoder: Any, backbone: Any) -> Serving:
    """The settings in two parsed configurations; RepositoryError if one is not a whole number."""
    try:
        limit = max(backbone.dynamic_batching.preferred_batch_size, default=int(backbone.max_batch_size))
        return Serving(
            instances=sum(group.count for group in backbone.instance_group) or 1,
            threads=int(parameter(backbone, _THREADS, "0")),
            delay_us=int(encoder.dynamic_batching.max_queue_delay_microseconds),
            slack=int(parameter(encoder, SLACK, str(PADDING_SLACK))),
            batch=int(parameter(encoder, _LARGEST, str(limit))),
        )
    except ValueError as error:
        raise RepositoryError(
            f"{backbone.name} or {encoder.name}: {error}; expected whole numbers in {_THREADS}, {SLACK} and {_LARGEST}"
        ) from error


def with_serving(encoder: str, backbone: str, serving: Serving) -> tuple[str, str]:
    """Both ``config.pbtxt`` with these settings; all others stay as they are."""
    first, second = parse(encoder), parse(backbone)
    first.dynamic_batching.max_queue_delay_microseconds = serving.delay_us
    _set_parameter(first, SLACK, serving.slack, PADDING_SLACK)
    if serving.instances != serving_of(first, second).instances and asked_by(first):
        _set_encoders(first, second, serving.instances)
    _set_instances(second, serving.instances)
    _set_parameter(second, _THREADS, serving.threads, 0)
    if asked_by(first):
        _set_parameter(first, _LARGEST, serving.batch, second.max_batch_size)
    else:
        # Triton closes a batch at its largest preferred size. max_batch_size stays, for batches sent by clients.
        del second.dynamic_batching.preferred_batch_size[:]
        if serving.batch < second.max_batch_size:
            second.dynamic_batching.preferred_batch_size.append(serving.batch)
    return to_text(first), to_text(second)


def with_encoders(encoder: str, backbone: str) -> str:
    """An encoder's ``config.pbtxt`` with at least as many instances as its backbone's.

    Each encoder instance calls, or runs, one session of the backbone at a time.
    """
    first, second = parse(encoder), parse(backbone)
    there = sum(group.count for group in first.instance_group)
    _set_encoders(first, second, max(there, serving_of(first, second).instances))
    return to_text(first)


def _set_encoders(encoder: Any, backbone: Any, instances: int) -> None:
    least = encoders(gpu=is_on_gpu(backbone), graphs=parameter(encoder, GRAPHS, ""))
    _set_instances(encoder, max(instances, least))


def _set_instances(message: Any, count: int) -> None:
    if not message.instance_group:
        message.instance_group.add()
    message.instance_group[0].count = count


def with_response_cache(text: str, *, enable: bool) -> str:
    """The same configuration with Triton's response cache on or off, for models that return features.

    Only an encoder or a backbone may be cached: its answer depends on its input alone, and its file never changes.
    Heads and the ensembles above them do change, and the cache key of an ensemble's answer does not include the head
    version. RepositoryError for those.
    """
    message = parse(text)
    if message.ensemble_scheduling.step or [output.name for output in message.output] != ["features"]:
        raise RepositoryError(
            f"{message.name} is no encoder or backbone; a cached answer of it could outlive the head that gave it. "
            "Expected a model whose file never changes: NAME_encoder or NAME_backbone"
        )
    if enable:
        message.response_cache.enable = True
    else:
        message.ClearField("response_cache")
    return to_text(message)


def _set_parameter(message: Any, key: str, value: int, default: int) -> None:
    if value == default:
        message.parameters.pop(key, None)
    else:
        message.parameters[key].string_value = str(value)
