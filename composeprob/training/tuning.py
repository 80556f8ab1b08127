"""Numbers that tune the defaults of training; see `composeprob.tuning`."""

from typing import NamedTuple

# Most training steps in one call of the compiled loop.
TRAINING_STEPS = 256
# Bins of log-SNR in which the training loss is recorded.
TRAINING_BINS = 16


class _Estimator(NamedTuple):
    # Width of the network's layers.
    width: int = 128
    # Residual blocks of the network of θ.
    blocks: int = 3
    # Finest structure of a posterior before training, in its standard deviations.
    finest: float = 0.1
    # Sines and cosines of the log-SNR that the network takes.
    waves: int = 32
    # Shortest and longest period of these, in log-SNR.
    periods: tuple[float, float] = (4.0, 128.0)
    # Training steps.
    iterations: int = 20_000
    # Pairs of each step.
    batch: int = 256
    # Adam's first step size; it falls to 0 as a cosine.
    rate: float = 1e-3
    # Levels of the factor's schedule.
    levels: int = 80
    # Log-SNR of the noisiest level, for θ of unit variance.
    low: float = -8.0
    # Log-SNR of level 0, for θ of unit variance.
    high: float = 12.0
    # Least log-SNR of level 0 where the residual of a linear regression of θ has unit
    # variance.
    residual: float = 10.0
    # Distances in log-SNR from the noisiest level and from level 0 of the range from
    # which half of the pairs are drawn.
    focus: tuple[float, float] = (6.0, 3.0)
    # Most held-out pairs; of few pairs a tenth.
    held_out: int = 2000
    # Noises for each held-out pair, as antithetic pairs ±ε, over which their loss is
    # averaged.
    noises: int = 8
    # Fewest pairs for training.
    fewest: int = 100


# The default recipe of `cp.training.estimator`.
ESTIMATOR = _Estimator()
