"""Kernels: Markov transitions that move chains of one level's density.

`kernel.py` defines kernels, `metropolis.py` holds the only accept test,
`hamiltonian.py` the only leapfrog. May import `density.evaluation`, `schedule`,
`pytree` and `errors`: kernels know positions and `Evaluation`s, no factors. To add one,
see docs/extending.md.
"""

from composeprob.kernels.blackjax import BlackJAX
from composeprob.kernels.gibbs import Gibbs
from composeprob.kernels.hamiltonian import HMC, UHMC
from composeprob.kernels.kernel import Info, Kernel, KernelState
from composeprob.kernels.langevin import MALA, ULA
from composeprob.kernels.line_integral import LineIntegral
from composeprob.kernels.step_size import Adaptive, mean_acceptance

__all__ = [
    "HMC",
    "MALA",
    "UHMC",
    "ULA",
    "Adaptive",
    "BlackJAX",
    "Gibbs",
    "Info",
    "Kernel",
    "KernelState",
    "LineIntegral",
    "mean_acceptance",
]
