"""The settings of a fit, chosen once on old labels that were treated as new ones.

They were measured with encoders that never saw those labels (``tests/benchmarks/tune_backbone.py`` trains the encoders,
``tests/benchmarks/tune_fit.py`` compares settings).
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SETTINGS", "Settings"]


@dataclass(frozen=True)
class Settings:
    """How an offset-logistic row is fitted.

    Parameters
    ----------
    ridge_classifier, ridge_hidden, total
        Features are standardised, and the within-label covariance is widened by a ridge on the classifier features,
        another one on the hidden features, and ``total`` times the covariance of all inputs. Fine-tuning has pulled
        together the texts of the labels it saw, above all in the classifier features, so the within-label covariance
        alone would promise a separation that a new label does not have.
    positive_variance
        Spread of the cloud that an example stands for, in units of that covariance.
    penalty
        Weight of the row's squared distance to the prior, in whitened features.
    prior
        The row that the penalty pulls towards: ``zero``, ``imprint`` or ``lda``.
    near, near_floor
        Old labels that take part: the ``near`` ones with the largest logits on the examples, and as many with the
        nearest means; all of them if there are at most ``near_floor``. The same holds for the other new labels.
    hard, hard_weight
        This many real inputs of old labels, the nearest to a first version of the row, are added as negatives with this
        weight (a label's mean has weight 1).
    kernel
        Width of the cloud that a real old input stands for when errors are predicted, in standard deviations of the
        row's margin within the input's label.
    taken_weight
        Cost of an old input that the new label takes, relative to an input of the new label that is missed, both
        counted in labels' worth of inputs.
    folds
        Up to this many examples are left out one at a time; more are left out in this many groups.
    name_slack
        A label's name takes part if its squared distance to the examples is at most this many times its distance to
        any other label.
    refit_ridge
        For ``ridge``: penalty per text, on standardised features.
    refit_taken_weight
        ``taken_weight`` for ``ridge`` and ``lda``; 1 gives the highest accuracy over all labels together.
    anchor
        For ``anchored``: weight of the rows' squared distance from where they started, in whitened features.
    """

    ridge_classifier: float = 1.0
    ridge_hidden: float = 0.1
    total: float = 1.0
    positive_variance: float = 4.0
    penalty: float = 1e-3
    prior: str = "zero"
    near: int = 32
    near_floor: int = 96
    hard: int = 64
    hard_weight: float = 0.1
    kernel: float = 1.0
    taken_weight: float = 0.25
    folds: int = 10
    name_slack: float = 1.5
    refit_ridge: float = 0.3
    refit_taken_weight: float = 1.0
    anchor: float = 1e-4


SETTINGS = Settings()
