"""Importance weights of chains: at the first level, and their increments from a level
to the next.

`Weights` is the rule; `FeynmanKac` and `DensityRatio` are those that have short names.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int, UInt32

from composeprob import tuning
from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import DensityTerms, Evaluation
from composeprob.errors import InvalidValueError, WrongTypeError
from composeprob.kernels.kernel import log_density_of
from composeprob.kernels.step_size import settings
from composeprob.samplers.layout import Layout
from composeprob.samplers.moves import Particles
from composeprob.samplers.random import Stream, normals, stream
from composeprob.samplers.step import Backward, ReverseStep, Step, within
from composeprob.schedule import Noise
from composeprob.user_code import array_from, is_own


class Passage(NamedTuple):
    """One chain's passage from a level to the next cleaner one, as `Weights` see it.

    A position is v = (y, z): the noised entries as y = x/α, of which there are
    ``layout.dims``, then the latents in unconstrained coordinates. A passage leaves z
    as it is; without a step it leaves x as it is, too.

    Attributes:
        start: the chain at the noisier level: its ``position`` and ``evaluation``.
        moved: the chain at the cleaner one.
        noise: α, σ, log-SNR and variance s = σ²/α² of the noisier level.
        end: those of the cleaner one.
        density: of all levels.
        layout: of positions.
        words: the chain's random words.
        half: the half of the population that the chain is in, 0 or 1.
        backward: the step's backward kernel, over which `FeynmanKac` averages the
            user-defined part of the potential; None where nothing is averaged.
        twist_limit: greatest shift of a step towards data, in units of its noise.
    """

    start: Particles
    moved: Particles
    noise: Noise
    end: Noise
    density: AnnealedDensity
    layout: Layout
    words: UInt32[Array, " 2"]
    half: Int[Array, ""]
    backward: Backward | None
    twist_limit: float | None

    @property
    def before(self) -> Evaluation:
        """The density at the chain's start."""
        return self.start.evaluation

    @property
    def after(self) -> Evaluation:
        """The density where the passage ended."""
        return self.moved.evaluation


class Increment(NamedTuple):
    """A log-weight increment, and how much greater it would be if potentials were not
    averaged."""

    log_weight: Float[Array, ""]
    averaging: Float[Array, ""]


class Weights(eqx.Module):
    r"""A rule for the importance weights of chains: what `SMC` takes as ``weights=``.

    To write another one, say which capabilities of the density it needs (`requires`),
    what a chain gains on the way to a level (`gained`), and which step leads there
    (`reverse_step`; without one, chains keep their x). With π_k the density of level k,
    M the law of the step and L a backward law of the writer's choice, weights are right
    at any number of levels if

    $$\log w \mathrel{+}= \log \frac{\pi_k(x')\,L(x \mid x')}
        {\pi_{k+1}(x)\,M(x' \mid x)}.$$

    The transitions between two passages leave π_k invariant and change no weight.

    Attributes:
        requires: capabilities that the density must have.
        by_rate: increments integrate the compiler's rate over a step: they are right as
            the distance of levels goes to 0, `SMC` computes them once more over every
            other level, and averages user-defined potentials.

    References:
        Del Moral, Doucet and Jasra 2006, *Sequential Monte Carlo samplers*, section 3.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"score"})
    by_rate: ClassVar[bool] = False

    __repr__ = settings

    @property
    def argument(self) -> str:
        """The argument ``weights=`` of `SMC` as text: a short name where there is
        one."""
        for name, rule in NAMED.items():
            if type(self) is rule:
                return repr(name)
        return repr(self)

    def reverse_step(self, given: ReverseStep | None) -> ReverseStep | None:
        """Return the step that leads chains from a level to the next: the ``given`` one
        of the user, who may give none, or that of these weights; None where chains keep
        their x.

        Raises:
            InvalidValueError: these weights do not allow the given step.
        """
        if given is not None:
            raise InvalidValueError(
                f"SMC(weights={self.argument}) makes no reverse step.",
                fix="leave step= out, or weights=, whose default steps from level to "
                "level.",
            )
        return None

    def first(
        self,
        layout: Layout,
        density: AnnealedDensity,
        v: Float[Array, " size"],
        evaluation: Evaluation,
        level: Array | int,
    ) -> Float[Array, ""]:
        """Return the log-weight of one chain's initial draw, as `first_weight` does."""
        return first_weight(layout, density, v, evaluation, level)

    def first_evidence(self, density: AnnealedDensity, level: int) -> Float[Array, ""]:
        """Return the log-evidence that all weights start from, as `first_evidence`
        does: of other first weights, another one."""
        return first_evidence(density, level)

    @abc.abstractmethod
    def gained(self, passage: Passage) -> Float[Array, ""]:
        """Return the log-weight increment of one chain by a passage.

        The log-ratio of the step's twist is not in it. With p the law of the step along
        the factors' score, and q the law that was drawn from, shifted towards ∇log G,
        log p − log q is added to what is returned: so M above is p.
        """

    def increment(self, passage: Passage) -> Increment:
        """Return what one chain gains by a passage; −∞ where the density was 0."""
        if is_own(self):
            gain = _own_gain(self, passage)
        else:
            gain = self.gained(passage)
        # A chain that was at a zero has no weight left: its increment would be −∞/−∞.
        log_weight = jnp.where(passage.before.zero, -jnp.inf, gain)
        return Increment(log_weight, jnp.zeros(()))

    def estimates_evidence(self, density: AnnealedDensity) -> bool:
        """Return whether the weights' mean estimates ∫π_0."""
        # Ratios of densities carry each level's own constant: they give the evidence
        # only if the noisiest level has none.
        return density.top.normalised


def _own_gain(rule: Weights, passage: Passage) -> Float[Array, ""]:
    """Return the increment of a user's own rule; refuse anything but a number."""
    return array_from(
        f"The rule of weights {type(rule).__name__}",
        "gained(passage)",
        lambda: rule.gained(passage),
        (),
    )


class DensityRatio(Weights):
    """Weights by the ratio of the densities of two levels, without a step:
    ``weights="density"``.

        log w += log π_k(x) − log π_{k+1}(x)

    These weights trust log-densities *between* modes, which energies learned by score
    matching do not know: use them for analytic or calibrated factors only.

    Example:
        >>> import composeprob as cp
        >>> cp.SMC(weights=cp.DensityRatio())
        SMC(no kernel, weights='density', resample=0.5)

    References:
        Del Moral, Doucet and Jasra 2006, *Sequential Monte Carlo samplers*.
    """

    requires = frozenset({"score", "energy", "mode_depth"})

    def gained(self, passage: Passage) -> Float[Array, ""]:
        return log_density_of(passage.after) - log_density_of(passage.before)


class FeynmanKac(Weights):
    """Weights by the rate that the compiler derives from the leaves' scores:
    ``weights="feynman_kac"``, the default.

    They need scores of the diffusion factors only, so they are right for learned ones,
    as the distance of levels goes to 0; `incremental_log_weight` has the formula.
    User-defined potentials are averaged over points that noise leads back to, so that
    walls, where they are 0, lose no mass.

    Example:
        >>> import composeprob as cp
        >>> cp.SMC(weights=cp.FeynmanKac())
        SMC(no kernel, weights='feynman_kac', resample=0.5)

    References:
        Skreta et al. 2025, *Feynman–Kac Correctors in Diffusion* (arXiv 2503.02819).
    """

    requires = frozenset({"score", "feynman_kac"})
    by_rate = True

    def reverse_step(self, given: ReverseStep | None) -> ReverseStep | None:
        if given is None:
            return ReverseStep()
        if float(given.eta) != 1.0 or given.twist is None:
            raise InvalidValueError(
                "SMC's Feynman–Kac weights need a step with eta=1 and a limited twist; "
                f"got {given!r}.",
                fix="leave eta out, and give twist a number such as 0.5.",
            )
        return given

    def gained(self, passage: Passage) -> Float[Array, ""]:
        return incremental_log_weight(
            passage.before.terms, passage.after.terms, passage.noise, passage.end
        )

    def increment(self, passage: Passage) -> Increment:
        if passage.backward is None or passage.twist_limit is None:
            return super().increment(passage)
        rise, alike = averaged_potential(passage, passage.backward, passage.twist_limit)
        increment = super().increment(_with_potential(passage, rise))
        return increment._replace(averaging=jnp.where(alike, rise, 0.0))

    def estimates_evidence(self, density: AnnealedDensity) -> bool:
        return True


NAMED: dict[str, type[Weights]] = {"feynman_kac": FeynmanKac, "density": DensityRatio}
"""Weights by their short names."""


def as_weights(weights: object) -> Weights:
    """Return the rule that the argument ``weights`` of `SMC` stands for."""
    if isinstance(weights, Weights):
        return weights
    if isinstance(weights, type) and issubclass(weights, Weights):
        raise WrongTypeError(
            f"SMC(weights=) is the class {weights.__name__}.",
            fix=f"write {weights.__name__}().",
        )
    if isinstance(weights, str) and weights in NAMED:
        return NAMED[weights]()
    raise InvalidValueError(
        f"Unknown weights {weights!r}.", fix=f"use one of: {', '.join(NAMED)}."
    )


def first_weight(
    layout: Layout,
    density: AnnealedDensity,
    v: Float[Array, " size"],
    evaluation: Evaluation,
    level: Array | int,
) -> Float[Array, ""]:
    """Return the log-weight of one chain's initial draw v, from the distribution of the
    first level, by its evaluation:

        log G + log E, and log F − log(top) where `weighs_top`,

    with F, E and G the `DensityTerms`. Elsewhere the draws already are draws of the
    factors of G that are noise there, which are divided out."""
    terms = evaluation.terms
    noise = density.schedule.at(level)
    log_weight = terms.log_potential + terms.log_exact
    top = density.top.at(level)
    position = layout.position(v, noise.alpha)
    xs = {name: position[name] for name in top.power}
    if weighs_top(density):
        log_top = top.log_density(xs, noise.sigma)
        return log_weight + terms.log_marginal - log_top
    if top.potential is not None:
        log_weight = log_weight - top.potential.log_value(xs, noise.sigma)
    return log_weight


def first_evidence(density: AnnealedDensity, level: int) -> Float[Array, ""]:
    """Return the log-evidence that all weights start from; 0 where the first weights
    already contain ∫F."""
    constant = density.top.at(level).log_normaliser(density.schedule.at(level).sigma)
    if weighs_top(density) and density.top.normalised:
        return jnp.zeros_like(constant)
    return constant


def weighs_top(density: AnnealedDensity) -> bool:
    """Return whether the first draws are weighted by F over the density that they are
    drawn from; otherwise they count as draws of F."""
    has_density = bool(density.top.power) and "energy" in density.capabilities
    return has_density and (density.top.normalised or not density.top.exact)


def incremental_log_weight(
    before: DensityTerms, after: DensityTerms, noise: Noise, end: Noise
) -> Float[Array, ""]:
    r"""Return the Feynman–Kac log-weight increment of a chain from a level to a cleaner
    one,

    $$\int r\,d\tau + \log G'(x') - \log G(x) + \log p(z \mid x') - \log p(z \mid x),$$

    without the log-ratio of its step's twist. The part of r that comes from scores is
    integrated over λ by the trapezoid rule, as s·r per unit of λ; that from the drift
    is exact, excess·log(α/α'). Rates are per unit of τ, with the control in them.
    """
    rate = 0.5 * (noise.variance * before.rate + end.variance * after.rate)
    excess = 0.5 * (before.excess + after.excess)
    from_scores = (end.log_snr - noise.log_snr) * rate
    gain = from_scores + excess * jnp.log(noise.alpha / end.alpha)
    gain = gain + after.log_potential - before.log_potential
    # 0 unless a prior depends on a noised site
    return gain + after.log_prior - before.log_prior


def _with_potential(passage: Passage, rise: Float[Array, ""]) -> Passage:
    """Return the passage with a log-potential at its start that is greater by
    ``rise``."""
    evaluation = passage.before
    log_potential = evaluation.terms.log_potential + rise
    terms = dataclasses.replace(evaluation.terms, log_potential=log_potential)
    evaluation = dataclasses.replace(evaluation, terms=terms)
    start = dataclasses.replace(passage.start, evaluation=evaluation)
    return passage._replace(start=start)


def averaged_potential(
    passage: Passage, backward: Backward, twist_limit: float
) -> tuple[Float[Array, ""], Bool[Array, ""]]:
    """Return the rise of a chain's log-potential at its start by averaging, as
    `averaged` defines it, and whether its points are alike."""
    layout = passage.layout
    noise = passage.noise
    d = layout.dims
    # Its gain and noise say how far a step follows a slope: as `Step.shift` does.
    law = Step.ddpm(noise.variance, passage.end.variance)
    y = passage.moved.position[:d]
    static = passage.moved.position[d:]

    def potential(y: Array) -> Array:
        v = jnp.concatenate([y, static])
        position = layout.position(v, noise.alpha)
        return passage.density.evaluator.user_potential(position, noise.index)

    def draw(z: Array) -> Array:
        return backward.draw(y, z, passage.half)

    count = tuning.POTENTIAL_POINTS - 1
    # Random numbers of their own: the step's were used on the way here.
    z = normals(stream(passage.words, Stream.POINTS), noise.index, count * d)
    points = jax.vmap(draw)(z.reshape(-1, d))
    slope = jax.grad(potential)(draw(jnp.zeros_like(y)))
    slope = within(slope, law.gain * slope / law.noise, twist_limit)
    # A chain at a zero has no weight to gain or lose; −∞ − (−∞) would make it NaN.
    positive = ~jnp.isneginf(passage.before.terms.log_potential)
    rise, alike = averaged(potential, passage.start.position[:d], points, slope)
    return jnp.where(positive, rise, 0.0), alike


def averaged(
    potential: Callable[[Array], Array],
    x: Float[Array, " dims"],
    points: Float[Array, "points dims"],
    slope: Float[Array, " dims"],
) -> tuple[Float[Array, ""], Bool[Array, ""]]:
    r"""Return the rise of log P_k(x), the user-defined part of a potential, by
    averaging over points where a step may have come from, and whether these are alike.

    In the place of P_k(x) stands

        (1/M)·Σ_j P_k(x^(j))·exp(⟨g, x − x^(j)⟩),
        x^(1) = x,    x^(2…M) ~ q(x_k | x'),

    the mean over the step's `Backward` kernel q, with g, the ``slope``, as much of
    ∇log P_k at its mean as the twist allows. Where no point counts M times as much as
    another they are alike, and the first two stand for all.

    A weight G_k'(x')/G_k(x) loses, at every level anew, the mass that noise leads from
    a point that G allows to one that it forbids; where G is nearly 0 it comes back in a
    few chains of huge weight. With the mean a chain is lost only where all M points are
    forbidden, and no weight is more than M times that of the best path. The weights
    stay unbiased: they are those of a process whose backward step draws M points from q
    and picks one of them with probability in proportion to P_k·exp(−⟨g, x^(j)⟩), for
    any g that depends on x' alone (Andrieu, Doucet and Holenstein 2010); of two of them
    just as well, as whether points are alike does not depend on their order. With this
    g the terms are alike where P is smooth and the twist has made up for its slope: the
    mean adds no noise. But q is the kernel of the exact process: the reversal of a step
    departs from it by its discretisation error, the less the fewer points are drawn.
    """
    first = potential(x)

    def term(point: Array) -> Array:
        return potential(point) + jnp.sum(slope * (x - point))

    terms = jnp.concatenate([first[None], jax.vmap(term)(points)])
    terms = jnp.where(jnp.isnan(terms), -jnp.inf, terms)
    # NaN, and so false, where all are −∞.
    alike = jnp.max(terms) - jnp.min(terms) < math.log(len(terms))
    rise_of_all = _log_mean(terms) - first
    rise_of_two = _log_mean(terms[:2]) - first
    return jnp.where(alike, rise_of_two, rise_of_all), alike


def _log_mean(terms: Float[Array, " points"]) -> Float[Array, ""]:
    """Return log of the mean of exponentials."""
    return jax.nn.logsumexp(terms) - math.log(len(terms))
