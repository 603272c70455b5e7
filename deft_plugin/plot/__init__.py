"""`deft plot`: what a trainer has logged, as a picture.

`runs` finds the logs; one run's go to `metrics` and `histograms`, several to `comparison`.
"""

from .histograms import plot_histograms
from .metrics import plot_metrics
from .runs import plot_runs

__all__ = ["plot_histograms", "plot_metrics", "plot_runs"]
