"""The result of an export, as data and as a sentence."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from patcher.wording import percent

if TYPE_CHECKING:
    from export.precision import PrecisionCheck
    from patcher.repository import ModelRepository

__all__ = ["ExportReport"]


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote, and how closely it answers as the checkpoint does."""

    repository: ModelRepository
    classifier: str
    address: str
    """What clients ask for: the classifier's name, or ENSEMBLE/NAME in a head store."""
    backbone: str
    fingerprint: str
    """SHA-256 of the backbone's ONNX file."""
    layer: str
    """The last linear layer's name in the checkpoint."""
    labels: tuple[str, ...]
    problem: str
    split: int
    """Number of classifier features; ``width`` includes the mean of the last hidden states too."""
    width: int
    max_length: int
    """Tokens beyond which a text is cut."""
    parity: float
    """Largest difference of any logit from the checkpoint's, on ``parity_texts`` texts."""
    parity_texts: int
    train_examples: int = 0
    train_repeated: int = 0
    """Number of training texts left out because another text of their label has the same words."""
    train_accuracy: float | None = None
    """Share of the training texts that the exported files answer as labelled; None without training texts."""
    train_cut: int = 0
    """Number of training texts that have more than ``max_length`` tokens."""
    memory_bytes: int = 0
    precision: str = "fp32"
    device: str = "cpu"
    unpadded: bool = False
    """Whether attention is the only work that the backbone does on padding tokens."""
    noise: float = 0.0
    """RMS of the change in the logits, divided by the RMS of the logits about their mean, on ``parity_texts`` texts."""
    checked: PrecisionCheck | None = None
    """What a lower precision changed on labelled texts; None for FP32 or without labelled texts."""
    warnings: tuple[str, ...] = ()
    """What later patches will lack, and what looks wrong with the training data, in words."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds spent in each stage."""

    def to_json(self) -> dict[str, Any]:
        """The report as plain values; ``labels`` becomes their count."""
        values = {name: value for name, value in vars(self).items() if name != "seconds"}
        values.update(repository=str(self.repository.location), labels=len(self.labels))
        values["checked"] = self.checked and self.checked.details()
        return {**values, "seconds": {stage: round(value, 3) for stage, value in self.seconds.items()}}

    def sentence(self) -> str:
        """The main figures in one sentence."""
        if self.train_accuracy is None:
            memory = "no memory, so later patches come without a bound on their harm (--train FILE builds one)"
        else:
            right = percent(self.train_accuracy, 1)
            memory = f"a memory of {self.train_examples:,} texts, {right} of them answered as labelled"
        features = f"{self.split} + {self.width - self.split} features"
        if self.precision == "fp32":
            closeness = f"logits within {self.parity:.1g} of the checkpoint's"
        else:
            noise = percent(self.noise, 1)
            closeness = f"{self.precision}: logits {noise} of their spread off the checkpoint's, {self._cost()}"
        asked = "" if self.address == self.classifier else f" (asked as {self.address})"
        return (
            f"Exported {self.classifier}{asked}: {len(self.labels)} labels, {features}, "
            f"{closeness}, {memory}; {sum(self.seconds.values()):.0f} s."
        )

    def _cost(self) -> str:
        found = self.checked
        if found is None:
            return "accuracy not measured (--train or --eval FILE measures it)"
        return (
            f"accuracy {percent(found.accuracy_before)} before and {percent(found.accuracy_after)} after on "
            f"{found.texts:,} texts of {found.source}, {percent(found.agreement)} answered the same"
        )
