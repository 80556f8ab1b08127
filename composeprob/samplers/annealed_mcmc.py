"""Annealed MCMC: the paper's Algorithm 1."""

from __future__ import annotations

from composeprob.errors import InvalidValueError, WrongTypeError
from composeprob.kernels import Kernel
from composeprob.samplers.closing import Closing, closings
from composeprob.samplers.sampler import Sampler, check_kernel
from composeprob.samplers.step import ReverseStep


class AnnealedMCMC(Sampler):
    """Independent chains that make ``steps_per_level`` transitions of a kernel at every level, K − 1 to 0.

    Cost: one evaluation a level to refresh what the kernel caches, and the kernel's own for each transition. What
    chains cannot do is cross between modes once these have parted: the share of each mode is frozen at the level where
    that happens, and no number of chains mends it. `SMC` does. With ``reverse_step=True`` the status says so
    (``shares_frozen``) where the Feynman–Kac weights of the chains' paths tell.

    In a program without noised sites nothing leads from the prior to the data in small steps: there each chain starts
    at one of 16 draws of the prior, chosen by their likelihood, for 16 evaluations more.

    Args:
        kernel: a kernel such as ``cp.HMC(0.03, num_leapfrog=3)``.
        steps_per_level: transitions at each level, ≥ 1; 10 unless it says another number.
        reverse_step: whether one step of the reverse process takes the chains from each level to the next, as a
            better start for the kernel: of first order, or ``cp.ReverseStep(control="none")``, of second order for one
            evaluation more a level. Observations and user energies shift it by at most half the length of its noise,
            so that a sharp one does not throw chains far off.
        then: what closes the run at level 0: `WarmUp`, `GlobalMoves`, or several in a tuple.

    Raises:
        WrongTypeError: a step that is neither.
        InvalidValueError: a step with a control, which only weights could take into account.

    References:
        Du et al. 2023, Algorithm 1. Song and Ermon 2019 for annealed Langevin dynamics.

    Example:
        >>> import composeprob as cp
        >>> cp.AnnealedMCMC(cp.HMC(0.03, num_leapfrog=3), steps_per_level=10).describe()
        'AnnealedMCMC(HMC(step_size=0.03, num_leapfrog=3, damping=0.5), 10 steps a level)'
    """

    def __init__(
        self,
        kernel: Kernel,
        steps_per_level: int = 10,
        reverse_step: bool | ReverseStep = False,
        then: Closing | tuple[Closing, ...] = (),
    ):
        check_kernel(kernel, steps_per_level)
        if not isinstance(reverse_step, (bool, ReverseStep)):
            raise WrongTypeError(
                f"reverse_step must be True, False or a cp.ReverseStep; got {reverse_step!r}.", fix="write True."
            )
        step = ReverseStep(order=1, control="none") if reverse_step is True else reverse_step or None
        if step is not None and step.control != "none":
            raise InvalidValueError(
                f"The reverse step of AnnealedMCMC has control={step.control!r}, which only weights could make up for.",
                fix='write cp.ReverseStep(control="none"), or use cp.SMC.',
            )
        super().__init__(kernel, int(steps_per_level), step, then=closings(then))

    def describe(self) -> str:
        reverse = ""
        if self.step is not None:
            reverse = f", reverse step{' of second order' if self.step.order == 2 else ''} between levels"
        then = "".join(f", then {closing!r}" for closing in self.then)
        return f"AnnealedMCMC({self.kernel!r}, {self.steps_per_level} steps a level{reverse}{then})"
