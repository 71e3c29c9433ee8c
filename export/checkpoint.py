"""Loads a fine-tuned checkpoint safely: runs none of its code unless allowed, and says why it refuses one."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import logging
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file

from export.source import ADAPTER, Place, locate, unmerged, unread
from patcher.errors import CheckpointError, ExamplesError
from patcher.examples import check_label
from patcher.head import MULTI_LABEL, SINGLE_LABEL
from patcher.wording import listing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

__all__ = ["Checkpoint", "from_objects", "load_checkpoint", "own_logits", "quiet_transformers"]

_SUFFIX = "ForSequenceClassification"
_PLAIN = r"[^/\\]+\.safetensors"
"""Pattern for a safetensors file in the same folder as the file that names it."""
_OF_TRAINING = ("training_args.", "optimizer.", "scheduler.", "scaler.", "rng_state")
"""Beginnings of the names of what a Trainer keeps beside the weights."""
_LONG = 100
"""Above this many tokens in a batch, an error hints at ``--max-length``."""
# What transformers and the libraries under it raise for files that are missing, damaged, foreign or not trusted.
_READ_ERRORS = (
    *(OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, AttributeError, AssertionError),
    SafetensorError,
    pickle.UnpicklingError,
)
_ATTENTION = (None, "eager", "sdpa")


@dataclass(frozen=True)
class Checkpoint:
    """A sequence classifier ready to be split: float32, on the CPU, in evaluation mode."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    labels: tuple[str, ...]
    """In the order of the logits."""
    problem: str
    """``single_label`` or ``multi_label``."""
    source: str
    """Where it came from, for messages."""
    location: str | None = None
    """Absolute path of its folder, or its id on the hub; None for a model in memory or an unprintable path."""
    dtype: torch.dtype = torch.float32
    """dtype of the weights as stored; ``model`` has them in float32."""


def load_checkpoint(source: str | Place, *, allow_pickle: bool = False, trust_remote_code: bool = False) -> Checkpoint:
    """Read a fine-tuned classifier and its tokenizer from a folder or, by its id, from the Hugging Face hub.

    Parameters
    ----------
    source
        A folder, or an id on the hub. ``hf://ID`` always means the hub, even if the id looks like a mistyped folder.
        A ``Place`` has been found by ``locate`` already.
    allow_pickle
        Read weights from a pickle file if there is no safetensors file; unpickling can run code.
    trust_remote_code
        Run Python code that comes with the checkpoint.

    Raises
    ------
    CheckpointError
        if the checkpoint is missing or damaged, is no sequence classifier or a regression, has fewer than two labels,
        keeps its weights in a pickle, or needs code of its own without the flag that allows it.
    """
    name, local_files_only = locate(source) if isinstance(source, str) else source
    common = {"trust_remote_code": trust_remote_code, "local_files_only": local_files_only}
    with quiet_transformers():
        if not Path(name).is_dir() and _on_hub(name, ADAPTER, local_files_only):
            raise unmerged(name)
        written, _ = _read(name, "configuration", PretrainedConfig.get_config_dict, **common)
        if isinstance(written, dict):  # before transformers, which says less of what is wrong with id2label
            _by_number(written.get("id2label"), name)
        config = _read(name, "configuration", AutoConfig.from_pretrained, **common)
        labels, problem, dtype = _labels(config, name), _problem(config, name), config.dtype or torch.float32
        _refuse_other_tasks(config, name)
        _refuse_unfit(config, name)
        _refuse_kernels(config, name)
        if not allow_pickle:
            _refuse_pickle(name, config, local_files_only=local_files_only)
        model, found = _read(
            name,
            "weights",
            AutoModelForSequenceClassification.from_pretrained,
            config=config,
            dtype=torch.float32,
            use_safetensors=None if allow_pickle else True,
            output_loading_info=True,
            **common,
        )
        tokenizer = _read(name, "tokenizer", AutoTokenizer.from_pretrained, **common)
    missing = sorted(found["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{name} lacks {len(missing)} weights of {type(model).__name__} ({listing(missing, 3)}), which were "
            "left random: expected a checkpoint that was fine-tuned for sequence classification"
        )
    location = str(Path(name).resolve()) if Path(name).is_dir() else name
    return dataclasses.replace(
        _ready(model, tokenizer, labels, problem, name),
        dtype=dtype,
        location=location if location.isprintable() else None,  # the lineage cannot store an unprintable path
    )


def from_objects(model: nn.Module, tokenizer: PreTrainedTokenizerBase, source: str = "") -> Checkpoint:
    """A checkpoint made from a model in memory; works on copies and leaves the originals untouched.

    Raises CheckpointError as ``load_checkpoint`` does.
    """
    name = source or f"the {type(model).__name__} in memory"
    if not isinstance(model, PreTrainedModel):
        merge = "; merge its adapters first (`merge_and_unload`)" if hasattr(model, "merge_and_unload") else ""
        raise CheckpointError(f"{name} is not a transformers model, but a {type(model).__name__}{merge}")
    labels, problem = _labels(model.config, name), _problem(model.config, name)
    _refuse_unfit(model.config, name)
    if not type(model).__name__.endswith(_SUFFIX):
        raise CheckpointError(f"{name} is a {type(model).__name__}; expected a model ending in {_SUFFIX}")
    return _ready(copy.deepcopy(model), copy.deepcopy(tokenizer), labels, problem, name)


def own_logits(model: PreTrainedModel, tokens: Mapping[str, torch.Tensor]) -> NDArray[np.float32]:
    """The checkpoint's own logits, float32 ``[batch, labels]``, for token tensors INT64 ``[batch, sequence]``.

    Raises CheckpointError if the forward pass fails.
    """
    try:
        with torch.no_grad():
            logits: NDArray[np.float32] = model(**tokens).logits.float().numpy()
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        batch, sequence = tokens["input_ids"].shape
        hint = "; --max-length N allows shorter texts only" if sequence > _LONG else ""
        where = f"on a batch of {batch} texts of {sequence} tokens"
        raise CheckpointError(f"the forward of {type(model).__name__} failed {where}: {error}{hint}") from error
    return logits


def _ready(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, labels: tuple[str, ...], problem: str, name: str
) -> Checkpoint:
    # Called through `nn.Module`, because transformers' own methods hide their signatures behind decorators.
    nn.Module.to(model, device="cpu", dtype=torch.float32)
    nn.Module.eval(model)
    # Callers read the forward's result by attribute, and need nothing but the logits.
    model.config.return_dict = True
    model.config.output_attentions = model.config.output_hidden_states = False
    return Checkpoint(model, tokenizer, labels, problem, name)


def _read(name: str, what: str, reader: Callable[..., Any], **options: Any) -> Any:
    try:
        return reader(name, **options)
    except _READ_ERRORS as error:
        reason = _first_line(error)
        if "trust_remote_code" in str(error):
            reason = (
                "it brings Python code of its own; --trust-remote-code (trust_remote_code=True) runs it, if you trust "
                "its source"
            )
        elif "ignore_mismatched_sizes" in str(error):
            reason = (
                f"their shapes are not those that its config.json says (it counts {len(options['config'].id2label)} "
                "labels; expected in id2label a name for each row of the last layer)"
            )
        elif what == "tokenizer" and (file := _sentencepiece(name)):
            reason = (
                f"it is a SentencePiece file alone ({file}); expected tokenizer.json, which "
                "`AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)` writes where sentencepiece and "
                "protobuf are installed"
            )
        raise unread(Place(name, options["local_files_only"]), what, reason) from error


def _sentencepiece(name: str) -> str:
    """Name of the SentencePiece file in a folder without a ``tokenizer.json``; "" if there is none."""
    folder = Path(name)
    if (folder / "tokenizer.json").is_file():
        return ""
    # Some .model files are tiktoken's, which are text; SentencePiece's begin with the tag of a protobuf field.
    return next((path.name for path in sorted(folder.glob("*.model")) if path.read_bytes()[:1] == b"\n"), "")


def _refuse_pickle(name: str, config: PretrainedConfig, *, local_files_only: bool) -> None:
    named, folder = getattr(config, "transformers_weights", None), Path(name)
    if named is not None and not (isinstance(named, str) and re.fullmatch(_PLAIN + r"(\.index\.json)?", named)):
        raise CheckpointError(
            f"{name} names {named!r:.80} in its config.json as its weights (transformers_weights); expected a file "
            "beside it that ends in .safetensors, or --allow-pickle (allow_pickle=True) if it is a pickle and you "
            "trust its source"
        )
    if not folder.is_dir():
        if named is None or named.endswith(".json"):
            _refuse_other_files_on_hub(name, named or "model.safetensors.index.json", local_files_only)
        return
    for index in sorted(folder.glob("*.safetensors.index.json")):
        _refuse_other_files(index)
    if any(folder.glob("*.safetensors")):
        return
    files = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    pickles = [file for file in files if not file.startswith(_OF_TRAINING)]
    if pickles:
        first = next((file for file in pickles if file.startswith("pytorch_model")), pickles[0])
        raise CheckpointError(
            f"{name} has its weights in a pickle ({first}), which can run code when it is read; expected "
            "model.safetensors (`save_pretrained` writes it), or --allow-pickle (allow_pickle=True) if you "
            "trust its source"
        )


def _refuse_other_files_on_hub(name: str, index: str, local_files_only: bool) -> None:
    if found := _on_hub(name, index, local_files_only):
        _refuse_other_files(Path(found))


def _on_hub(name: str, file: str, local_files_only: bool) -> str | None:
    """Path of the local copy of a file on the hub; None if there is no such file."""
    try:
        found = cached_file(name, file, local_files_only=local_files_only, _raise_exceptions_for_missing_entries=False)
    except _READ_ERRORS as error:
        raise CheckpointError(f"cannot read {file} of {name}: {_first_line(error)}") from error
    return found and str(found)


def _first_line(error: Exception) -> str:
    """First non-empty line of the message: those of transformers run over many lines."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _refuse_other_files(index: Path) -> None:
    """Refuse an index of sharded weights that names a pickle, which transformers would read, or a file elsewhere."""
    try:
        names = list(json.loads(index.read_bytes())["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"cannot read {index}: {type(error).__name__} {error}") from error
    for name in names:
        if not (isinstance(name, str) and re.fullmatch(_PLAIN, name)):
            raise CheckpointError(
                f"{index} has weights in {name!r:.80}; expected files beside it that end in .safetensors, or "
                "--allow-pickle (allow_pickle=True) if it is a pickle and you trust where it comes from"
            )


def _refuse_kernels(config: PretrainedConfig, name: str) -> None:
    """Refuse kernels from the hub: transformers would fetch and run code whose name has a slash, without any flag."""
    for key in ("_attn_implementation", "attn_implementation", "_attn_implementation_internal"):
        if (value := getattr(config, key, None)) not in _ATTENTION:
            raise CheckpointError(
                f"{name} asks for the attention {value!r:.80} in its config.json; expected eager or sdpa"
            )
    for key in ("_experts_implementation", "experts_implementation", "_experts_implementation_internal"):
        if "/" in str(value := getattr(config, key, None)):
            raise CheckpointError(f"{name} asks for the kernels {value!r:.80} in its config.json; expected none")


def _refuse_other_tasks(config: PretrainedConfig, name: str) -> None:
    names = list(getattr(config, "architectures", None) or [])
    if names and not any(each.endswith(_SUFFIX) for each in names):
        raise CheckpointError(
            f"{name} is a {names[0]}; expected a model ending in {_SUFFIX}, fine-tuned on labelled texts"
        )
    if getattr(config, "quantization_config", None):
        raise CheckpointError(f"{name} is quantized; expected plain floating-point weights, from which export starts")


def _refuse_unfit(config: PretrainedConfig, name: str) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise CheckpointError(
            f"{name} is a {config.model_type}, which encodes a text and decodes it again; expected an encoder alone "
            "(BERT's kin) or a decoder alone (GPT's)"
        )
    # BigBird's forward switches to full attention for good at the first short text, so no comparison would show it.
    if getattr(config, "attention_type", None) == "block_sparse":
        raise CheckpointError(
            f"{name} reads long texts with block-sparse attention and short ones with full attention, which one graph "
            "cannot do; set attention_type to original_full in its config.json to use full attention for all of them"
        )


def _problem(config: PretrainedConfig, name: str) -> str:
    problem = getattr(config, "problem_type", None)
    if problem == "regression":
        raise CheckpointError(f"{name} was trained for regression: it has no labels; expected a classifier")
    return MULTI_LABEL if problem == "multi_label_classification" else SINGLE_LABEL


def _labels(config: PretrainedConfig, name: str) -> tuple[str, ...]:
    names = _by_number(config.id2label, name)
    if len(names) <= 1:
        raise CheckpointError(f"{name} has {len(names)} label(s), as a regression has; expected two or more")
    if sorted(names) != list(range(len(names))):
        raise CheckpointError(f"{name}: id2label in config.json does not count from 0 to {len(names) - 1}")
    try:
        labels = tuple(check_label(names[index], f"{name}, id2label {index}") for index in range(len(names)))
    except ExamplesError as error:
        raise CheckpointError(str(error)) from error
    repeated = sorted({label for label in labels if labels.count(label) > 1})
    if repeated:
        raise CheckpointError(f"{name}: id2label in config.json has {repeated[0]!r} more than once")
    joined = [label for label in labels if "|" in label]
    if joined and _problem(config, name) == MULTI_LABEL:
        raise CheckpointError(
            f"{name}: the label {joined[0]!r} has a '|', which parts a text's labels in the files of a multi-label "
            "classifier; expected another name in id2label"
        )
    return labels


def _by_number(id2label: object, name: str) -> dict[int, object]:
    """The names of labels by their numbers; CheckpointError if ``id2label`` is something else."""
    if id2label is None:
        return {}
    if not isinstance(id2label, dict) or not all(re.fullmatch(r"\d+", str(key)) for key in id2label):
        raise CheckpointError(
            f"{name}: id2label in config.json is {id2label!r:.80}; expected a name for each number, as in "
            '{"0": "balance", "1": "transfer"}'
        )
    return {int(key): value for key, value in id2label.items()}


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the progress bars and load reports of transformers; we raise errors for what matters in them."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
