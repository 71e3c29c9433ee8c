"""What is kept of the old labels, so that a new one can be fitted without the old data (``memory_file`` writes it).

The memory holds a count and a feature sum per label, one second moment over all labels, and a small random sample of
real features per label. That is enough for each label's mean, the within-label covariance, and counting flips on real
inputs. Sums are float64, so that a label can be removed again to within rounding. If real features are kept, so are the
means of the clusters that each label's texts form: they tell whether an input belongs to any of these labels at all
(``patcher.scope``).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from patcher.blocks import blocks
from patcher.clustering import Clusters, half
from patcher.errors import InputError, LabelError, RepositoryError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from numpy.typing import ArrayLike, NDArray

    from patcher.arrays import Doubles, Floats, Ints

__all__ = ["Memory"]

_TYPES = {
    "counts": np.dtype(np.int64),
    "sums": np.dtype(np.float64),
    "second_moment": np.dtype(np.float64),
    "sample": np.dtype(np.float16),
    "sample_labels": np.dtype(np.int64),
    "cluster_means": np.dtype(np.float16),
    "cluster_counts": np.dtype(np.int64),
    "cluster_labels": np.dtype(np.int64),
}


@dataclass(frozen=True, eq=False)
class Memory:
    """Statistics of the features of every label, and a few real features of each.

    Parameters
    ----------
    labels
        C label names; ``counts`` and ``sums`` follow their order, which need not be the head's.
    counts, sums
        Number of texts per label, INT64 ``[C]``, and the sum of their features, float64 ``[C, width]``.
    second_moment
        Sum of ``x x'`` over all texts, float64 ``[width, width]``.
    sample, sample_labels
        Real features, float16 ``[m, width]``, and the label of each, INT64 ``[m]``; m = 0 if only statistics are kept.
    clusters
        The clusters that the labels' texts form. Empty if only statistics are kept: a cluster may be one text.
    split
        Number of leading features that are the classifier features.
    per_label, seed
        The maximum number of real features kept per label, chosen at random with this seed.
    most_clusters
        The maximum number of clusters per label; the default of ten comes from ``tests/benchmarks/tune_fit.py``.
    """

    labels: tuple[str, ...]
    counts: Ints
    sums: Doubles
    second_moment: Doubles
    sample: NDArray[np.float16]
    sample_labels: Ints
    clusters: Clusters
    split: int
    per_label: int = 20
    seed: int = 0
    most_clusters: int = 10

    def __post_init__(self) -> None:
        count, width = len(self.labels), self.second_moment.shape[-1]
        checks = [
            (len(set(self.labels)) == count and all(self.labels), "labels repeat or are empty"),
            (self.counts.shape == (count,), f"counts {self.counts.shape} for {count} labels"),
            (self.sums.shape == (count, width), f"sums {self.sums.shape} for {count} labels and {width} features"),
            (self.second_moment.shape == (width, width), f"second moment {self.second_moment.shape}"),
            (self.sample.shape == (len(self.sample_labels), width), f"sample {self.sample.shape}"),
            (self.sample_labels.ndim == 1, f"sample labels {self.sample_labels.shape}"),
            (self.clusters.flaw is None, self.clusters.flaw),
            (self.clusters.means.shape[-1] == width, f"clusters {self.clusters.means.shape}"),
            (0 < self.split <= width, f"split {self.split} outside of 1..{width}"),
            (self.per_label >= 0, f"{self.per_label} features a label"),
            (self.most_clusters >= 1, f"{self.most_clusters} clusters a label"),
        ]
        for holds, what in checks:
            if not holds:
                raise RepositoryError(f"this is not a consistent memory: {what}")
        for name, array in self.arrays().items():
            if array.dtype != _TYPES[name]:
                raise RepositoryError(f"this is not a consistent memory: {name} is {array.dtype}, not {_TYPES[name]}")
        if self.counts.min(initial=1) < 1:
            raise RepositoryError("this is not a consistent memory: a label without a text")
        for name, ids in (("sample", self.sample_labels), ("clusters", self.clusters.labels)):
            if ids.size and not 0 <= ids.min() <= ids.max() < count:
                raise RepositoryError(f"this is not a consistent memory: its {name} names labels that are not there")

    def __repr__(self) -> str:
        texts = f"{int(self.counts.sum())} texts of {len(self.labels)} labels"
        return f"<Memory of {texts}, with {len(self.sample)} of them as {self.width} features>"

    @classmethod
    def build(
        cls,
        features: ArrayLike,
        label_ids: ArrayLike,
        labels: Sequence[str],
        split: int,
        *,
        per_label: int = 20,
        seed: int = 0,
        most_clusters: int = 10,
    ) -> Memory:
        """Build a memory from labelled features.

        Parameters
        ----------
        features
            Float32 ``[n, width]``.
        label_ids
            INT64 ``[n]``, positions in ``labels``. Labels without a text are left out of the memory.
        split
            Number of leading features that are the classifier features.
        per_label
            Maximum number of real features kept per label, chosen at random; 0 keeps statistics only.
        most_clusters
            Maximum number of clusters per label.

        Raises
        ------
        InputError
            If shapes disagree, a value is not finite, or an id points outside of ``labels``.
        """
        rows = _rows(features)
        width = rows.shape[1]
        empty = cls(
            labels=(),
            counts=np.zeros(0, np.int64),
            sums=np.zeros((0, width)),
            second_moment=np.zeros((width, width)),
            sample=np.zeros((0, width), np.float16),
            sample_labels=np.zeros(0, np.int64),
            clusters=Clusters.of_means(np.zeros((0, width)), np.zeros(0, np.int64)),
            split=split,
            per_label=per_label,
            seed=seed,
            most_clusters=most_clusters,
        )
        return empty.add(labels, rows, label_ids)

    @property
    def width(self) -> int:
        """Number of features."""
        return int(self.second_moment.shape[0])

    @property
    def size(self) -> int:
        """Total size of the arrays in bytes."""
        return sum(int(array.nbytes) for array in self.arrays().values())

    def arrays(self) -> dict[str, NDArray[Any]]:
        """All arrays, under their names in the memory's file."""
        names = ("counts", "sums", "second_moment", "sample", "sample_labels")
        clusters = {f"cluster_{name}": array for name, array in vars(self.clusters).items()}
        return {name: getattr(self, name) for name in names} | clusters

    def features_of(self, label: str) -> Floats:
        """The real features kept for a label, float32 ``[k, width]``; k = 0 for an unknown label."""
        mine = self.sample_labels == (self.labels.index(label) if label in self.labels else -1)
        features: Floats = self.sample[mine].astype(np.float32)
        return features

    def means(self) -> Doubles:
        """Each label's mean features, float64 ``[C, width]``."""
        means: Doubles = self.sums / self.counts[:, None]
        return means

    @property
    def freedom(self) -> int:
        """Degrees of freedom of the within-label covariance: texts minus labels, at least 1."""
        return max(1, int(self.counts.sum()) - len(self.labels))

    def within(self) -> Doubles:
        """Unbiased within-label covariance, ``(S - sum n_c mu_c mu_c') / (N - C)``, float64 ``[width, width]``."""
        # The product of a matrix with its own transpose is exactly symmetric, and half the work.
        roots = self.sums / np.sqrt(self.counts)[:, None]
        within: Doubles = (self.second_moment - roots.T @ roots) / self.freedom
        return within

    def spread(self) -> Doubles:
        """Within-label standard deviation of each feature, float64 ``[width]``."""
        roots = self.sums / np.sqrt(self.counts)[:, None]
        inside = np.diag(self.second_moment) - (roots * roots).sum(axis=0)
        spread: Doubles = np.sqrt(np.maximum(inside, 0.0) / self.freedom)
        return spread

    def add(self, labels: Sequence[str], features: ArrayLike, label_ids: ArrayLike) -> Memory:
        """The memory with more texts, of known or new labels; ``label_ids`` INT64 ``[n]`` index ``labels``."""
        rows, ids = _rows(features), np.asarray(label_ids, np.int64)
        if rows.shape[1] != self.width:
            raise InputError(f"got {rows.shape[1]} features, but this memory holds {self.width}")
        if ids.shape != (len(rows),):
            raise InputError(f"got {len(rows)} rows of features and {ids.shape} label ids")
        if len(set(labels)) != len(labels):
            raise InputError("a label is named twice")
        if ids.size and not 0 <= ids.min() <= ids.max() < len(labels):
            raise InputError(f"a label id lies outside of 0..{len(labels) - 1}")
        present = np.flatnonzero(np.bincount(ids, minlength=len(labels)))
        known = set(self.labels)
        fresh = [labels[i] for i in present if labels[i] not in known]
        every = (*self.labels, *fresh)
        place = {label: i for i, label in enumerate(every)}
        mine = np.array([place.get(label, -1) for label in labels], np.int64)[ids] if ids.size else ids
        counts = np.concatenate([self.counts, np.zeros(len(fresh), np.int64)])
        sums = np.concatenate([self.sums, np.zeros((len(fresh), self.width))])
        counts += np.bincount(mine, minlength=len(every))
        for block in blocks(len(rows)):  # spares a second copy of a million rows; the order of summation is the same
            np.add.at(sums, mine[block], rows[block].astype(np.float64))
        sample, sample_labels = self._sampled(rows, mine, counts)
        grown = dataclasses.replace(
            self,
            labels=every,
            counts=counts,
            sums=sums,
            second_moment=self.second_moment + _moment(rows),
            sample=sample,
            sample_labels=sample_labels,
        )
        if not self.per_label:
            return grown
        rng = np.random.default_rng([self.seed, int(counts.sum())])
        clusters = self.clusters.add(rows, mine, grown.spread(), self.most_clusters, rng)
        return dataclasses.replace(grown, clusters=clusters)

    def add_groups(self, groups: Mapping[str, Floats]) -> Memory:
        """The memory with more texts: features float32 ``[n, width]`` for each label."""
        if not groups:
            return self
        ids = np.repeat(np.arange(len(groups)), [len(rows) for rows in groups.values()])
        return self.add(tuple(groups), np.concatenate(list(groups.values())), ids)

    def remove(self, label: str, features: ArrayLike | None = None) -> Memory:
        """The memory without a label, as by ``without``; exact if ``features`` are those of all its texts."""
        if features is None:
            return self.without([label])
        place, rows = self._place(label), _rows(features)
        if rows.shape[1] != self.width:
            raise InputError(f"got {rows.shape[1]} features, but this memory holds {self.width}")
        if len(rows) != self.counts[place]:
            raise InputError(
                f"{label!r} joined with {self.counts[place]} texts, but features of {len(rows)} were given"
            )
        return self._part(np.arange(len(self.labels)) != place, _moment(rows))

    def without(self, labels: Collection[str]) -> Memory:
        """The memory without some labels; what it holds about the others stays as it is.

        If the sample holds all texts of a removed label, its share of the second moment is subtracted to within
        FP16 rounding. The other removed labels are assumed to have the within-label covariance of the memory that
        remains after that step, which leaves ``within()`` unchanged.
        """
        leaves = np.zeros(len(self.labels), np.bool_)
        leaves[[self._place(label) for label in labels]] = True
        whole = leaves & (np.bincount(self.sample_labels, minlength=len(self.labels)) == self.counts)
        if whole.any():
            left = self._part(~whole, _moment(self._whole_rows(whole)))
            return left.without(set(labels) & set(left.labels))
        roots, counts = self.sums[leaves] / np.sqrt(self.counts[leaves])[:, None], self.counts[leaves]
        return self._part(~leaves, roots.T @ roots + (counts - 1).sum() * self.within())

    def _whole_rows(self, whole: NDArray[np.bool_]) -> Doubles:
        """The sampled features of the labels in ``whole``, all of whose texts it holds, float64 ``[n, width]``.

        Stored features are rounded to FP16, and subtracting them as they are could leave an invalid second moment. So
        they are shifted such that each label's mean is exact.
        """
        mine = whole[self.sample_labels]
        rows, ids = self.sample[mine].astype(np.float64), self.sample_labels[mine]
        off = self.sums.copy()
        np.subtract.at(off, ids, rows)
        shifted: Doubles = rows + off[ids] / self.counts[ids, None]
        return shifted

    def _part(self, stays: NDArray[np.bool_], leaving: Doubles) -> Memory:
        """The memory of the labels that stay; ``leaving`` is the others' share of the second moment."""
        place = np.cumsum(stays) - 1
        mine = stays[self.sample_labels]
        return dataclasses.replace(
            self,
            labels=tuple(label for label, each in zip(self.labels, stays.tolist(), strict=True) if each),
            counts=self.counts[stays],
            sums=self.sums[stays],
            second_moment=self.second_moment - leaving,
            sample=self.sample[mine],
            sample_labels=place[self.sample_labels[mine]],
            clusters=self.clusters.relabelled({old: int(place[old]) for old in np.flatnonzero(stays).tolist()}),
        )

    def keeping(self, per_label: int) -> Memory:
        """The memory with at most ``per_label`` real features of each label; 0 keeps only statistics.

        Unless ``per_label`` is 0, a label without clusters gets a single one at its mean: no more is known about it.
        """
        order = np.random.default_rng([self.seed, len(self.sample)]).permutation(len(self.sample))
        order = order[np.argsort(self.sample_labels[order], kind="stable")]
        sizes = np.bincount(self.sample_labels, minlength=len(self.labels))
        kept = np.sort(order[np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes) < per_label])
        known = np.isin(np.arange(len(self.labels)), self.clusters.labels)
        clusters = self.clusters if per_label else self.clusters.relabelled({})
        if per_label and not known.all():
            lone = Clusters(half(self.means()[~known]), self.counts[~known], np.flatnonzero(~known))
            clusters = Clusters.joined([clusters, lone])
        return dataclasses.replace(
            self,
            sample=self.sample[kept],
            sample_labels=self.sample_labels[kept],
            clusters=clusters,
            per_label=per_label,
        )

    def rename(self, old: str, new: str) -> Memory:
        """The memory with one label under another name."""
        place = self._place(old)
        if new in self.labels:
            raise LabelError(f"the memory knows a label {new!r} already")
        return dataclasses.replace(self, labels=(*self.labels[:place], new, *self.labels[place + 1 :]))

    def merge(self, labels: Sequence[str], into: str) -> Memory:
        """The memory with several labels merged into one; the sample keeps at most ``per_label`` of their features.

        The number kept of each label is drawn as if the sample were taken from all their texts, so that later
        counts on the sample are weighted correctly.
        """
        places = [self._place(label) for label in dict.fromkeys(labels)]
        first = min(places)
        if into in self.labels and into not in labels:
            raise LabelError(f"the memory knows a label {into!r} already; name it among those to merge")
        keep = [i for i in range(len(self.labels)) if i not in places or i == first]
        goes_to = {old: new for new, old in enumerate(keep)} | dict.fromkeys(places, keep.index(first))
        counts, sums = self.counts.copy(), self.sums.copy()
        counts[first], sums[first] = self.counts[places].sum(), self.sums[places].sum(axis=0)
        ids = np.array([goes_to[i] for i in self.sample_labels.tolist()], np.int64)
        chosen = self._chosen(places)
        return dataclasses.replace(
            self,
            labels=tuple(into if i == first else self.labels[i] for i in keep),
            counts=counts[keep],
            sums=sums[keep],
            sample=self.sample[chosen],
            sample_labels=ids[chosen],
            clusters=self.clusters.relabelled(goes_to),
        )

    def _place(self, label: str) -> int:
        try:
            return self.labels.index(label)
        except ValueError:
            raise LabelError(f"the memory knows no label {label!r} among its {len(self.labels)}") from None

    def _sampled(self, rows: Floats, ids: Ints, counts: Ints) -> tuple[NDArray[np.float16], Ints]:
        """The sample after adding ``rows``; every text of a label is equally likely to be in it."""
        rng = np.random.default_rng([self.seed, int(counts.sum())])
        touched, arrivals = np.unique(ids, return_counts=True)
        untouched = ~np.isin(self.sample_labels, touched)
        # If only new labels are added, a slice keeps everything; a mask would copy the whole sample.
        rest = slice(None) if untouched.all() else untouched
        parts, owners = [self.sample[rest]], [self.sample_labels[rest]]
        order = np.argsort(ids, kind="stable")
        for place, arrived in zip(touched.tolist(), np.split(order, np.cumsum(arrivals)[:-1]), strict=True):
            held = np.flatnonzero(self.sample_labels == place)
            kept = _reservoir(len(held), int(counts[place]) - len(arrived), len(arrived), self.per_label, rng)
            old, new = held[kept[kept < len(held)]], arrived[kept[kept >= len(held)] - len(held)]
            parts += [self.sample[old], half(rows[new])]
            owners.append(np.full(len(kept), place, np.int64))
        return np.concatenate(parts), np.concatenate(owners)

    def _chosen(self, places: Sequence[int]) -> Ints:
        """Sample positions to keep once the labels at ``places`` are merged; every text is equally likely."""
        counts = self.counts[places]
        rng = np.random.default_rng([self.seed, len(self.sample)])
        shares = rng.multivariate_hypergeometric(counts, min(self.per_label, int(counts.sum())), method="marginals")
        kept = [np.flatnonzero(~np.isin(self.sample_labels, places))]
        for place, share in zip(places, shares.tolist(), strict=True):
            held = np.flatnonzero(self.sample_labels == place)
            kept.append(rng.permutation(held)[:share])
        return np.sort(np.concatenate(kept))


def _reservoir(held: int, seen: int, arrived: int, room: int, rng: np.random.Generator) -> Ints:
    """Reservoir sampling: positions in [held | arrived] to keep, ``room`` of ``seen + arrived``, all equally likely."""
    if held + arrived <= room and held == seen:
        everything: Ints = np.arange(held + arrived, dtype=np.int64)
        return everything
    draws = rng.permutation(seen + arrived)[:room]
    new = np.sort(draws[draws >= seen]) - seen + held
    old = rng.permutation(held)[: room - len(new)]
    kept: Ints = np.concatenate([np.sort(old), new]).astype(np.int64)
    return kept


def _rows(features: ArrayLike) -> Floats:
    rows = np.asarray(features, np.float32)
    if rows.ndim != 2:  # noqa: PLR2004  a matrix
        raise InputError(f"features must be [n, width], got shape {rows.shape}")
    if not np.isfinite(rows).all():
        raise InputError("features hold values that are not finite: the backbone overflowed or its file is damaged")
    return rows


def _moment(rows: Floats | Doubles) -> Doubles:
    """Sum of ``x x'`` in float64, computed in blocks to spare a second copy of a million rows."""
    total = np.zeros((rows.shape[1], rows.shape[1]))
    for block in blocks(len(rows), 4096):
        part = rows[block].astype(np.float64)
        total += part.T @ part
    return total
