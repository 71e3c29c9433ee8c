"""A ``transformers.Trainer`` callback that exports the model when training ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from export.classifier import run_export
from export.options import ExportOptions, settle
from export.plan import foresee
from patcher.errors import InputError

if TYPE_CHECKING:
    import os

    from transformers import TrainerControl, TrainerState, TrainingArguments
    from typing_extensions import Unpack

    from export.report import ExportReport

__all__ = ["ExportCallback"]


class ExportCallback(TrainerCallback):
    """Adds the trained model to a Triton model repository when training ends, as ``export_classifier`` does.

    Usage: ``Trainer(..., processing_class=tokenizer, callbacks=[ExportCallback("model_repository", name="intent")])``.
    If the trainer loads the best model at the end, that one is exported. Afterwards ``report`` holds the figures.

    Everything that can be checked up front is checked before the first training step, not after hours of training: a
    name that is taken, an invalid option, a file that cannot be read or has labels the model lacks, a missing
    tokenizer.
    """

    def __init__(self, repository_dir: str | os.PathLike[str], **options: Unpack[ExportOptions]) -> None:
        self.repository_dir = repository_dir
        self.options = options
        self.report: ExportReport | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,  # noqa: ARG002  part of the trainer's interface
        state: TrainerState,  # noqa: ARG002  the same
        control: TrainerControl,  # noqa: ARG002  the same
        **kwargs: Any,
    ) -> None:
        """Raise now what the export would raise at the end of training."""
        model, options = kwargs["model"], ExportOptions(**self.options)
        options["tokenizer"] = self._tokenizer(kwargs)
        foresee(model, settle(model, self.repository_dir, options))

    def on_train_end(
        self,
        args: TrainingArguments,  # noqa: ARG002  part of the trainer's interface
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002  the same
        **kwargs: Any,
    ) -> None:
        """Export the model; in distributed training only the world's first process does."""
        if state.is_world_process_zero:
            options: ExportOptions = {**self.options, "tokenizer": self._tokenizer(kwargs)}
            self.report = run_export(kwargs["model"], self.repository_dir, **options)

    def _tokenizer(self, kwargs: dict[str, Any]) -> Any:
        tokenizer = self.options.get("tokenizer") or kwargs.get("processing_class") or kwargs.get("tokenizer")
        if tokenizer is None:
            raise InputError(
                "the trainer knows no tokenizer to export; expected Trainer(processing_class=tokenizer), or "
                "ExportCallback(…, tokenizer=tokenizer)"
            )
        return tokenizer
