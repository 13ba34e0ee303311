"""How good a classifier or a segmentation is, and how certain that figure is.

`counts` holds the central object, the confusion matrix: integers that add up over batches and
sites. A federation's metrics therefore need only the matrix from a site, and it leaves the site
only through secure aggregation. Functions of a matrix take [..., L, L] and return JAX arrays
(float32, jittable) for JAX matrices and NumPy arrays (float64) for NumPy ones. Functions of
probabilities (`curves`, `intervals`, `paired`) sort, so they run in NumPy on the host.

A ratio with denominator 0, such as the sensitivity to a class without examples, is NaN
("undefined"). The exception is `mcc`, which is 0 then, by convention.
"""

from primia_jax.metrics.binned import (
  Bounded,
  ScoreCounts,
  binned_calibration_error,
  binned_deviation,
  binned_intervals,
  binned_macro_roc_auc,
  binned_roc_auc,
  binned_roc_curve,
  clustered_deviation,
  normal_interval,
  score_counts,
)
from primia_jax.metrics.counts import (
  accuracy,
  confusion_matrix,
  dice,
  f1,
  iou,
  mcc,
  precision,
  sensitivity,
  specificity,
)
from primia_jax.metrics.curves import (
  RocCurve,
  average_precision,
  binary_calibration_error,
  brier_score,
  check_probabilities,
  expected_calibration_error,
  log_loss,
  macro_roc_auc,
  roc_auc,
  roc_curve,
)
from primia_jax.metrics.intervals import (
  Interval,
  Intervals,
  Scores,
  bootstrap_difference,
  bootstrap_intervals,
  clopper_pearson,
  percentile_interval,
  resamples,
  scores,
)
from primia_jax.metrics.noised import NoisedCounts, noised_area, noised_intervals, shared_counts
from primia_jax.metrics.paired import (
  DeLong,
  McNemar,
  Spread,
  bootstrap_mean_difference,
  delong,
  mcnemar,
  over_seeds,
  predicted,
  worst_mcnemar,
)

__all__ = [
  "Bounded",
  "DeLong",
  "Interval",
  "Intervals",
  "McNemar",
  "NoisedCounts",
  "RocCurve",
  "ScoreCounts",
  "Scores",
  "Spread",
  "accuracy",
  "average_precision",
  "binary_calibration_error",
  "binned_calibration_error",
  "binned_deviation",
  "binned_intervals",
  "binned_macro_roc_auc",
  "binned_roc_auc",
  "binned_roc_curve",
  "bootstrap_difference",
  "bootstrap_intervals",
  "bootstrap_mean_difference",
  "brier_score",
  "check_probabilities",
  "clopper_pearson",
  "clustered_deviation",
  "confusion_matrix",
  "delong",
  "dice",
  "expected_calibration_error",
  "f1",
  "iou",
  "log_loss",
  "macro_roc_auc",
  "mcc",
  "mcnemar",
  "noised_area",
  "noised_intervals",
  "normal_interval",
  "over_seeds",
  "percentile_interval",
  "precision",
  "predicted",
  "resamples",
  "roc_auc",
  "roc_curve",
  "score_counts",
  "scores",
  "sensitivity",
  "shared_counts",
  "specificity",
  "worst_mcnemar",
]
