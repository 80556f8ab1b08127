"""Sequential Monte Carlo along the levels: reverse step, weights, resampling, kernel transitions."""

from __future__ import annotations

from composeprob.density.annealed import AnnealedDensity
from composeprob.errors import InvalidValueError, WrongTypeError
from composeprob.kernels import MALA, Adaptive, Kernel
from composeprob.samplers.closing import Closing, closings
from composeprob.samplers.meet import Meet, Resample
from composeprob.samplers.moves import by_kind
from composeprob.samplers.sampler import Sampler, check_kernel
from composeprob.samplers.step import ReverseStep


class SMC(Sampler):
    r"""A population of chains, weighted from level to level so that modes keep their shares.

    From level k + 1 to k, with F the part of π made of diffusion factors and G the rest (observations, user
    energies, classifiers):

    * ``weights="feynman_kac"``: a reverse step, and log w += ∫(r + ∇·u + ⟨u, S⟩) dτ + log G_k(x') − log G_{k+1}(x) +
      log p(x') − log q(x'), with S = ∇log F and r the Feynman–Kac rate that the compiler derives from the leaves'
      scores, τ the variance that a step takes away, u the control, p the law of the step along S + u, and q that of
      the step that is made, which is twisted towards ∇log G. It needs scores of F only, so it is right for learned
      factors. Tempered observations and user energies are averaged in G_{k+1}, over 8 points that noise leads back to
      from x', so that walls, where they are 0, lose no mass. That takes 8 evaluations of these functions a level, and
      none of a network of F;
    * ``weights="density"``: no move, and log w += log π_k(x) − log π_{k+1}(x). It trusts log-densities *between*
      modes, which energies learned by score matching do not know: for analytic or calibrated factors only.

    Then the chains are resampled where the relative effective sample size is below the threshold, and make
    ``steps_per_level`` transitions of the kernel, which leave π_k invariant. The last level always resamples, so that
    samples have equal weights.

    Where weights differ much, many chains become copies of few: ``result.ancestors`` says how many of the first chains
    have descendants, ``result.effective_chains`` and every standard error follow from that. Below some hundred chains
    independent ones (`AnnealedMCMC`) are better.

    Args:
        kernel: any kernel; left out, ``MALA(Adaptive(), metric="auto")`` where the density has an energy, else no
            transitions. A program with latents has one for the noised sites and another for the latents, in turn, as
            a `Gibbs`.
        steps_per_level: transitions at each level.
        weights: ``"feynman_kac"`` or ``"density"``.
        resample: a threshold in (0, 1] for ``cp.Resample(threshold)``, resampling where ESS/N falls below it; or
            another `Meet`.
        step: how chains go from level to level, a `ReverseStep`; density weights make none.
        then: what closes the run at level 0: `WarmUp`, `GlobalMoves`, or several in a tuple.
        check_levels: whether Feynman–Kac weights are computed once more over every other level, for half the
            evaluations, as an estimate of what the levels' distance does to the log-evidence.

    Result:
        ``result.log_evidence`` estimates log ∫π_0, with diffusion factors counted as normalised. Under Feynman–Kac
        weights it has an error of discretisation, which vanishes as the square of the levels' distance, or in
        proportion to it for a step of first order; ``result.log_evidence_error`` has it in it.

    References:
        Skreta et al. 2025, *Feynman–Kac Correctors in Diffusion* (arXiv 2503.02819). Del Moral, Doucet and Jasra 2006,
        *Sequential Monte Carlo samplers*, for the density weights.
    """

    def __init__(
        self,
        kernel: Kernel | None = None,
        steps_per_level: int = 1,
        weights: str = "feynman_kac",
        resample: float | Meet = 0.5,
        step: ReverseStep | None = None,
        then: Closing | tuple[Closing, ...] = (),
        check_levels: bool = True,
    ):
        check_kernel(kernel, steps_per_level, optional=True)
        if weights not in ("feynman_kac", "density"):
            raise InvalidValueError(f"Unknown weights {weights!r}.", fix="use one of: feynman_kac, density.")
        if step is not None and not isinstance(step, ReverseStep):
            raise WrongTypeError(f"step must be a cp.ReverseStep; got {step!r}.", fix="pass one, or leave step out.")
        if step is not None and weights == "density":
            raise InvalidValueError(
                "SMC(weights='density') makes no reverse step.",
                fix="leave step= out, or weights=, whose default steps from level to level.",
            )
        if step is not None and (float(step.eta) != 1.0 or step.twist is None):
            raise InvalidValueError(
                f"SMC weighs steps with eta=1 and a twist that is limited; got {step!r}.",
                fix="leave eta out, and give twist a number such as 0.5.",
            )
        step = None if weights == "density" else step or ReverseStep()
        if isinstance(resample, type):
            raise WrongTypeError(
                f"SMC(resample=) is the class {resample.__name__}.", fix=f"write {resample.__name__}()."
            )
        meet = resample if isinstance(resample, Meet) else Resample(resample)
        checked = bool(check_levels) and weights == "feynman_kac"
        super().__init__(kernel, int(steps_per_level), step, weights, meet, closings(then), checked)

    def prepare(self, density: AnnealedDensity) -> Sampler:
        if self.kernel is None and "energy" in density.capabilities:
            kernel = by_kind(lambda: MALA(Adaptive(), metric="auto"), density)
            return self.with_moves(kernel, self.steps_per_level).prepare(density)
        return super().prepare(density)

    def describe(self) -> str:
        kernel = "no kernel" if self.kernel is None else f"{self.kernel!r}, {self.steps_per_level} steps a level"
        threshold = f"{float(self.meet.threshold):.3g}" if isinstance(self.meet, Resample) else repr(self.meet)
        step = "" if self.step is None or repr(self.step) == "ReverseStep()" else f", step={self.step!r}"
        then = "".join(f", then {closing!r}" for closing in self.then)
        return f"SMC({kernel}, weights='{self.weights}', resample={threshold}{step}{then})"
