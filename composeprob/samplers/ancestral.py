"""The baseline: reverse diffusion along the composed score."""

from __future__ import annotations

from jax import Array

from composeprob.kernels.step_size import as_scalar, check_range
from composeprob.samplers.sampler import Sampler
from composeprob.samplers.step import ReverseStep


class Ancestral(Sampler):
    """Reverse diffusion of the composed score: K − 1 evaluations, and the wrong law for products.

    The score of the noised product is not the sum of the noised scores, so this samples something else than the
    program's density; it is the baseline that the other samplers mend (Du et al. 2023, section 3).

    Args:
        eta: η in [0, 1]; 1 is DDPM's ancestral sampling, 0 deterministic DDIM.

    Raises:
        InvalidValueError: η outside [0, 1].

    References:
        Ho et al. 2020, *Denoising Diffusion Probabilistic Models*; Song, Meng and Ermon 2021 (DDIM).
    """

    def __init__(self, eta: Array | float = 1.0):
        value = as_scalar(eta, "Ancestral(eta=)")
        check_range(
            value, "Ancestral(eta=)", 0.0, 1.0 + 1e-6, closed=True, fix="a number in [0, 1]: 1 is DDPM, 0 is DDIM"
        )
        super().__init__(step=ReverseStep(order=1, control="none", twist=None, eta=value))

    def describe(self) -> str:
        assert self.step is not None
        return f"Ancestral(eta={float(self.step.eta):.3g})"
