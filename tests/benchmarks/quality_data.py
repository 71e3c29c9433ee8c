"""Texts and features for the quality benchmark: reads labelled files and returns arrays that are computed once."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from patcher.examples import Examples, data_hash
from patcher.examples_file import read_examples
from patcher.head import Head
from patcher.memory import Memory
from patcher.words import label_words

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Ints = NDArray[np.int64]

__all__ = ["Corpus", "NewLabel", "Setting", "draws_of", "load", "note", "read_folder", "read_pair", "sequence_of"]

_OLD = {"train": ("base_train.csv", "train.csv"), "test": ("base_test.csv", "test.csv")}
_NEW = {"train": ("new_train.csv", "new_*.csv", "new/*.csv"), "test": ("new_test.csv", "new_*_test.csv")}
_NOT_FOR_TRAINING = ("_test.csv", "_val.csv")


def note(*words: object) -> None:
    """Print progress on stderr."""
    print(*words, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Corpus:
    """Labelled texts; the checkpoint decides which labels are old or new. Texts in ``outside`` have no label."""

    name: str
    train: tuple[tuple[str, str], ...]
    test: tuple[tuple[str, str], ...]
    outside: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()
    """Texts of old labels not used for training; an export sets the out-of-scope limit on them."""


def read_folder(folder: Path) -> Corpus:
    """Read a folder of CSV files.

    Old labels: ``base_train.csv`` and ``base_test.csv`` (or ``train.csv``, ``test.csv``). New ones: ``new_train.csv``
    and ``new_test.csv``, or ``new_LABEL.csv`` and ``new_LABEL_test.csv``; the examples may also be in
    ``new/LABEL.csv``. Optional: texts of no label in ``oos_test.csv``, fresh texts of old labels in ``base_val.csv``.
    """
    parts = {}
    for part in ("train", "test"):
        old = _first(folder, _OLD[part])
        new = _first(folder, _NEW[part])
        if not old or not new:
            sys.exit(f"{folder}: expected one of {', '.join(_OLD[part])} and one of {', '.join(_NEW[part])}")
        parts[part] = _pairs([*old, *new])
    oos = folder / "oos_test.csv"
    outside = read_examples(oos).texts if oos.is_file() else ()
    fresh = read_examples(folder / "base_val.csv").texts if (folder / "base_val.csv").is_file() else ()
    return Corpus(folder.name, parts["train"], parts["test"], tuple(outside), tuple(fresh))


def read_pair(train: Path, test: Path, outside: Path | None = None) -> Corpus:
    """Read two labelled files with both old and new labels, and optionally texts of no label."""
    beyond = read_examples(outside).texts if outside else ()
    return Corpus(train.stem, _pairs([train]), _pairs([test]), tuple(beyond))


def _first(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """The files of the first pattern that matches any; test files do not count as examples."""
    for pattern in patterns:
        found = sorted(folder.glob(pattern))
        if "test" not in pattern:
            found = [path for path in found if not path.name.endswith(_NOT_FOR_TRAINING)]
        if found:
            return found
    return []


def _pairs(paths: Iterable[Path]) -> tuple[tuple[str, str], ...]:
    pairs: list[tuple[str, str]] = []
    for path in paths:
        examples: Examples = read_examples(path)
        labels = examples.labels or (path.stem,) * len(examples)
        pairs += zip(examples.texts, labels, strict=True)
    return tuple(pairs)


@dataclass(frozen=True)
class NewLabel:
    """A label that the backbone never saw: features and texts to draw examples from, and others to measure on."""

    train: Floats
    train_texts: tuple[str, ...]
    test: Floats
    test_texts: tuple[str, ...]
    name: Floats | None = None
    """Features of the label's name, float32 ``[width]``, if it consists of words."""


@dataclass(frozen=True)
class Setting:
    """Everything that a measurement needs, as arrays.

    Features are float32 ``[n, width]``; ids are INT64 ``[n]`` indices into the head's labels.
    """

    name: str
    head: Head
    train: Floats
    train_ids: Ints
    train_texts: tuple[str, ...]
    test: Floats
    test_ids: Ints
    test_texts: tuple[str, ...]
    new: dict[str, NewLabel]
    outside: Floats
    fresh: Floats

    @cached_property
    def memory(self) -> Memory:
        """The memory as ``export --train`` builds it."""
        return Memory.build(self.train, self.train_ids, self.head.labels, self.head.split)

    @cached_property
    def statistics(self) -> Memory:
        """The memory with statistics only, without features of single sentences."""
        return Memory.build(self.train, self.train_ids, self.head.labels, self.head.split, per_label=0)

    @cached_property
    def logits(self) -> Floats:
        """The old test set's logits before any patch."""
        return self.head.logits(self.test)

    @cached_property
    def before(self) -> Ints:
        """The predicted ids for the old test set before any patch."""
        answers: Ints = self.logits.argmax(axis=1)
        return answers

    @property
    def everything(self) -> Floats:
        """Features of the old test texts, followed by those of each new label."""
        return np.concatenate([self.test, *(label.test for label in self.new.values())])

    @property
    def everything_ids(self) -> Ints:
        """Ids of ``everything``; new labels are numbered after the old ones in the order of ``new``."""
        counts = [len(label.test) for label in self.new.values()]
        return np.concatenate([self.test_ids, np.repeat(np.arange(len(counts)) + len(self.head.labels), counts)])

    def limited(self, examples: int, labels: int | None = None) -> Setting:
        """The setting with at most ``labels`` new labels, each with at least ``examples`` examples to draw from."""
        enough = {label: new for label, new in self.new.items() if len(new.train) >= examples}
        for label in self.new.keys() - enough.keys():
            note(f"left out: {label!r} has {len(self.new[label].train)} examples, and {examples} are needed")
        if not enough:
            sys.exit(f"{self.name}: no new label has {examples} examples")
        return Setting(**{**_fields(self), "new": dict(list(enough.items())[:labels])})


def _fields(setting: Setting) -> dict[str, Any]:
    return {name: getattr(setting, name) for name in Setting.__dataclass_fields__}


def draws_of(setting: Setting, label: str, n: int, draws: int) -> list[Ints]:
    """Positions of ``n`` examples in a label's train set, drawn ``draws`` times, or fewer if there is no choice.

    The draw for 5 examples is the beginning of the draw for 10, so that curves over n are comparable.
    """
    size = len(setting.new[label].train)
    if size < n:
        return []
    place = list(setting.new).index(label)
    every = [np.random.default_rng([17, place, draw]).permutation(size)[:n] for draw in range(draws)]
    return every[:1] if size == n else every


def sequence_of(setting: Setting, n: int, draw: int) -> list[tuple[str, Ints]]:
    """All new labels in a random order, with positions of ``n`` examples each; empty if a label has too few draws.

    The sequence is the same for every way of adding the labels, so that accuracies are compared on equal examples.
    """
    found = []
    for position in np.random.default_rng([23, draw]).permutation(len(setting.new)).tolist():
        label = list(setting.new)[position]
        every = draws_of(setting, label, n, draw + 1)
        if len(every) <= draw:
            return []
        found.append((label, every[draw]))
    return found


def load(checkpoint: Path, corpus: Corpus, cache: Path) -> Setting:
    """Compute a corpus's features with patcher's own export and encoder; they are cached below ``cache``."""
    store = _Store(checkpoint, cache)
    head = store.head()
    place = {label: i for i, label in enumerate(head.labels)}
    old = {part: [pair for pair in getattr(corpus, part) if pair[1] in place] for part in ("train", "test")}
    new = {part: [pair for pair in getattr(corpus, part) if pair[1] not in place] for part in ("train", "test")}
    names = sorted({label for _, label in new["train"]} & {label for _, label in new["test"]})
    if not names or not old["train"] or not old["test"]:
        sys.exit(f"{corpus.name}: expected old and new labels for {checkpoint}, in train and test files; got {names}")
    rows = {f"old_{part}": store.features(f"old_{part}", [text for text, _ in old[part]]) for part in old}
    rows |= {f"new_{part}": store.features(f"new_{part}", [text for text, _ in new[part]]) for part in new}
    words = {label: text for label in names if (text := label_words(label))}
    spoken = dict(zip(words, store.features("names", list(words.values())), strict=True)) if words else {}
    outside, fresh = (
        store.features(name, texts) if texts else np.zeros((0, head.width), np.float32)
        for name, texts in (("outside", corpus.outside), ("fresh", corpus.fresh))
    )

    def of(part: str, label: str) -> tuple[Floats, tuple[str, ...]]:
        here = [i for i, (_, name) in enumerate(new[part]) if name == label]
        return rows[f"new_{part}"][here], tuple(new[part][i][0] for i in here)

    return Setting(
        name=corpus.name,
        head=head,
        train=rows["old_train"],
        train_ids=np.array([place[label] for _, label in old["train"]], np.int64),
        train_texts=tuple(text for text, _ in old["train"]),
        test=rows["old_test"],
        test_ids=np.array([place[label] for _, label in old["test"]], np.int64),
        test_texts=tuple(text for text, _ in old["test"]),
        new={label: NewLabel(*of("train", label), *of("test", label), spoken.get(label)) for label in names},
        outside=outside,
        fresh=fresh,
    )


class _Store:
    """A cache of one checkpoint's head and features, in a folder named after a hash of its files."""

    def __init__(self, checkpoint: Path, cache: Path) -> None:
        self._checkpoint = checkpoint
        self.folder = cache / f"{checkpoint.name}-{_fingerprint(checkpoint)[:12]}"
        self.folder.mkdir(parents=True, exist_ok=True)

    def head(self) -> Head:
        path = self.folder / "head.npz"
        if not path.is_file():
            head = self._classifier().head(1)
            layer = {"weight": head.base_weight, "bias": head.base_bias, "labels": np.array(head.labels)}
            np.savez(path, **layer, width=np.array(head.width), problem=np.array(head.problem))
        with np.load(path) as kept:
            return Head.from_linear(
                kept["labels"].tolist(),
                kept["weight"],
                kept["bias"],
                int(kept["width"]),
                self.folder.name,
                problem=str(kept["problem"]),
            )

    def features(self, name: str, texts: Sequence[str]) -> Floats:
        path = self.folder / f"{name}-{data_hash(texts, ('',) * len(texts))[:12]}.npy"
        if not path.is_file():
            from patcher.features import extract_features

            step = max(1, len(texts) // 10)

            def progress(done: int) -> None:
                if done % step < 32:  # report about every tenth; texts come in batches of 32
                    note(f"  features of {name}: {done}/{len(texts)}")

            np.save(path, extract_features(self._classifier(), texts, progress=progress))
            note(f"kept in {path}")
        rows: Floats = np.load(path)
        return rows

    def _classifier(self) -> Any:
        from patcher import ModelRepository

        root = self.folder / "model_repository"
        if not root.is_dir():
            from export import export_classifier

            note(f"exporting {self._checkpoint} to {root}")
            export_classifier(self._checkpoint, root, name="intent")
        return ModelRepository(root).classifier()


def _fingerprint(checkpoint: Path) -> str:
    """SHA-256 of a checkpoint's configuration, weights and tokenizer."""
    digest = hashlib.sha256()
    files = sorted(path for path in checkpoint.iterdir() if path.suffix in {".json", ".safetensors", ".bin", ".txt"})
    if not files:
        sys.exit(f"{checkpoint} is no checkpoint; expected the folder of a fine-tuned model")
    for path in files:
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
