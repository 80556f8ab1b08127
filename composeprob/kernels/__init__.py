"""Kernels: Markov transitions that move chains of one level's density, one algorithm a file.

`base.py` says what a kernel is, `metropolis.py` holds the only accept test, `hamiltonian.py` the only leapfrog.
May import `density.evaluation`, `pytree` and `errors`: kernels know positions and `Evaluation`s, no factors.
To add one, see docs/extending.md.
"""

from composeprob.kernels.base import Info, Kernel, KernelState
from composeprob.kernels.blackjax import BlackJAX
from composeprob.kernels.gibbs import Gibbs
from composeprob.kernels.hamiltonian import HamiltonianState
from composeprob.kernels.hmc import HMC
from composeprob.kernels.line_integral import LineIntegral
from composeprob.kernels.mala import MALA
from composeprob.kernels.metric import Estimated, Metric
from composeprob.kernels.step_size import Adaptive, adapt, mean_acceptance, resolve, scaled_step
from composeprob.kernels.uhmc import UHMC
from composeprob.kernels.ula import ULA

__all__ = [
    "HMC",
    "MALA",
    "UHMC",
    "ULA",
    "Adaptive",
    "BlackJAX",
    "Estimated",
    "Gibbs",
    "HamiltonianState",
    "Info",
    "Kernel",
    "KernelState",
    "LineIntegral",
    "Metric",
    "adapt",
    "mean_acceptance",
    "resolve",
    "scaled_step",
]
