"""The figures that a fit is tuned by: chosen once and for all by old labels posing as new ones.

They were measured on encoders that never saw the posing labels (``tests/benchmarks/tune_backbone.py`` trains them,
``tests/benchmarks/tune_fit.py`` compares).
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
        Features are standardised, and the covariance inside labels is widened by a ridge on the classifier features,
        one on the others, and this share of the covariance of all inputs. Fine-tuning has squeezed the labels it saw,
        the classifier features most of all, so that the covariance alone promises a separation that a new label lacks.
    positive_variance
        Spread of the cloud that an example stands for, in units of that covariance.
    variant_share
        Of an example's weight what its variants have together, where it has some; 0.3 to 0.7 measured the same.
    penalty
        On the row's squared distance to the prior in whitened features.
    prior
        ``zero``, ``imprint`` or ``lda``.
    near, near_floor
        Old labels that take part: this many by their logits on the examples and as many by the distance of their
        means; all of them where there are no more than ``near_floor``. The same holds for the other new labels.
    hard, hard_weight
        So many real inputs of old labels, those that a first row comes nearest to, join as negatives of this weight
        (a label's mean has weight 1).
    kernel
        Width of the cloud that a real old input stands for when errors are foretold, in standard deviations of the
        row's margin inside its label.
    taken_weight
        Price of an old input that the new label takes, next to one of the new label's that is missed, both counted
        in labels' worth of inputs.
    folds
        Ten examples are left out one by one, more of them in as many groups.
    name_slack
        A label's name takes part if its squared distance to the examples is at most so many times that to any other
        label.
    refit_ridge
        Of ``ridge``: penalty a sentence, on standardised features.
    refit_taken_weight
        Of ``ridge`` and ``lda``: ``taken_weight``; with 1 the most texts are answered right over all labels.
    anchor
        Of ``anchored``: penalty on the squared way of all rows from where they were, in whitened features.
    """

    ridge_classifier: float = 1.0
    ridge_hidden: float = 0.1
    total: float = 1.0
    positive_variance: float = 4.0
    variant_share: float = 0.5
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
