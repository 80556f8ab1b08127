r"""The one Gaussian law that leads from a level to another.

In y = x/α the reverse process of every schedule is dy = (S + u) dτ + dW, which takes
away the variance h = s₁ − s₀, from s₁ = σ²/α² of a level to s₀ of the next. A `Step` is
a Gaussian law for it,

$$y' = y + U\,G\,U^\top g + U\,Q^{1/2}\,z,$$

with g the drift that is followed and z ~ N(0, I). DDPM's step at any η, the step that
integrates a fitted slope exactly, replica exchange's bridge between two rungs and
RAISE's upward walk are this law with other G, Q and U.

What a step knows of the population is a level's `Fit`: the slope of the score, and the
control u, which makes weights more equal. With S + u followed in place of S, and r +
∇·u + ⟨u, S⟩ weighed in place of the Feynman–Kac rate r, every F_k stays what it is:
insert the drift into the equation ∂F = 𝓛F − g²·r·F that defines r.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from composeprob import tuning
from composeprob.errors import InvalidValueError
from composeprob.kernels.step_size import as_scalar, check_range, settings
from composeprob.samplers.resampling import normalised_weights


class ReverseStep(eqx.Module):
    """How chains go from a level to the next one: what `SMC` takes as ``step=``.

    Args:
        order: 2 fits what is linear in the drift over the population, integrates it
            exactly, and corrects each step by the score where it ended, as in Heun's
            method, for one evaluation more a level: stable for products of any number
            of factors. 1 is DDPM's step, whose variance is too small, and which is
            unstable for products of n factors from n·Δλ ≈ 2 on, Δλ the distance of
            levels in log-SNR.
        control: ``"affine"`` adds a drift under which Feynman–Kac weights differ less,
            fitted over the population, and takes it into account in the weights, which
            stay exact; ``"none"`` leaves it out.
        twist: how far data and user energies may shift a step, in units of its noise;
            None for as far as they will.
        eta: η in [0, 1] of order 1: 1 is DDPM's ancestral step, 0 the deterministic
            DDIM step.

    Raises:
        InvalidValueError: a value out of its range.

    Example:
        >>> import composeprob as cp
        >>> cp.ReverseStep(order=1, control="none")
        ReverseStep(order=1, control='none')

    References:
        Kloeden and Platen (1992), chapter 15, for the weak order of Heun's method under
        additive noise; *DriftLite* (ICLR 2026, arXiv 2509.21655) for controls; Wu et
        al. (2023) for twisted proposals; Ho et al. 2020.
    """

    order: int = eqx.field(default=2, static=True, repr=False)
    control: str = eqx.field(default="affine", static=True, repr=False)
    twist: float | None = eqx.field(default=0.5, static=True, repr=False)
    eta: Array | float = eqx.field(
        default=1.0, converter=partial(as_scalar, what="ReverseStep(eta=)"), repr=False
    )

    def __check_init__(self) -> None:
        if self.order not in (1, 2):
            raise InvalidValueError(
                f"The order of a step is 1 or 2; got {self.order!r}.",
                fix="leave order out for 2.",
            )
        if self.control not in ("affine", "none"):
            raise InvalidValueError(
                f"Unknown control {self.control!r}.", fix="use one of: affine, none."
            )
        number = isinstance(self.twist, (int, float)) and not isinstance(
            self.twist, bool
        )
        if self.twist is not None and not (number and 0 <= self.twist < math.inf):
            raise InvalidValueError(
                f"twist must be a number ≥ 0; got {self.twist!r}.",
                fix="for example twist=0.5.",
            )
        check_range(
            self.eta,
            "ReverseStep(eta=)",
            1.0 + 1e-6,
            closed=True,
            fix="a number in [0, 1]",
        )

    __repr__ = settings


class Step(eqx.Module):
    r"""y' ~ N(y + U·G·Uᵀg, U·Q·Uᵀ), and what `correct` needs of both of its ends."""

    basis: Array | None  # U, columns of length 1, (d, d); None for the coordinate axes
    gain: Array  # G, (d,)
    noise: Array  # √Q, (d,)
    # Of `fitted` steps alone, which `correct` makes once more:
    decay: Array | float = 0.0  # K, (d,)
    mean: Array | float = 0.0  # J/h, (d,)
    first: Array | float = 0.0  # n₁, (d,)
    last: Array | float = 0.0  # n₀, (d,)
    # L of steps that are `bent` towards data, where the precision of the noise that is
    # drawn is L·Lᵀ: (d, d), or (d,)
    root: Array | None = None

    @classmethod
    def plain(cls, gain: Array, variance: Array) -> Step:
        """The step of this G and Q, along the coordinate axes; of first order only."""
        return cls(None, *jnp.broadcast_arrays(gain, jnp.sqrt(variance)))

    @classmethod
    def ddpm(
        cls, s1: Array, s0: Array, eta: Array | float = 1.0, power: Array | float = 1.0
    ) -> Step:
        """DDPM's step at η = 1, DDIM's deterministic one at η = 0 (Song, Meng and Ermon
        2021, equation 12); of P factors whose data are points where a power P is given:
        Q = η²·s₀·h/s₁ and G = s₁ − √(s₁·(s₀ − Q)), both divided by P. In x that is x' =
        α'·x̂₀ + √(σ'² − v)·ε̂ + √v·ξ with v = η²·β·σ'²/σ²."""
        variance = eta**2 * s0 * (s1 - s0) / s1
        gain = s1 - jnp.sqrt(s1 * jnp.maximum(s0 - variance, 0.0))
        return cls.plain(gain / power, variance / power)

    @classmethod
    def bridge(cls, start: Array, end: Array, power: Array) -> Step:
        """Between two rungs of replica exchange: down `ddpm` of P factors, up the noise
        whose reversal that is, of variance h/P."""
        down, up = (
            cls.ddpm(start, jnp.minimum(end, start), 1.0, power),
            (end - start) / power,
        )
        # A step to its own level is never made; the variance keeps its density a
        # number.
        variance = jnp.where(
            end < start, down.noise**2, jnp.where(end > start, up, start / power)
        )
        return cls.plain(jnp.where(end < start, down.gain, 0.0), variance)

    @classmethod
    def upward(
        cls, s1: Array, s0: Array, power: Array, mixed: bool, weights: str | None
    ) -> Step:
        """From s₀ up to s₁, as `ddpm` is undone where there is only noise: what RAISE
        walks by.

        For one factor it is the forward diffusion, of gain 0. A product's reverse step
        draws chains together P times as strongly, which noise alone would not undo: the
        weights of walks would degenerate. With y ~ N(0, V) at s₁ and S = −P·y/s at both
        ends, y at s₁ is Gaussian given y at s₀. V is s₁/P if kernels or weights bring
        chains to π_k (``mixed``), s₁/(2P − 1) if there are steps alone; Feynman–Kac
        weights ½(P² − P)·y²/s per unit of log-SNR widen it, but not to an improper
        density.
        """
        precision = power if mixed else jnp.maximum(2 * power - 1, power)
        if (
            weights == "feynman_kac"
        ):  # half of a trapezoid's weight falls to the upper end
            precision = jnp.maximum(
                power - 0.25 * jnp.log(s1 / s0) * (power**2 - power), 0.5 * power
            )
        start, added, slope = (
            s1 / precision,
            s0 * (s1 - s0) / s1,
            1 - (s1 - s0) * power / s1,
        )
        variance = slope**2 * start + added
        return cls.plain(
            (1 - slope * start / variance) * s0 / power,
            jnp.maximum(start / variance, 1.0) * added,
        )

    @classmethod
    def fitted(
        cls,
        first: Array,
        last: Array,
        s1: Array,
        s0: Array,
        power: Array,
        both: Array | bool,
    ) -> Step:
        r"""Integrates a linear drift exactly: stable however stiff the density is.

        In each direction of U the drift is −(y − μ)/n, where n goes linearly from n₁ to
        n₀, and μ from μ₁ to μ₀, while h is taken away. With ρ = log(n₁/n₀), m = (n₁ −
        n₀)/ρ and E(x) = (eˣ − 1)/x,

            y' = K·y + (J/h − K)·μ₁ + (1 − J/h)·μ₀ + √Q·z,
            K = exp(−h/m),    J = h·(n₀/m)·E(ρ − h/m),    Q = h·(n₀/m)·E(ρ − 2h/m);

        by what is known at its start, μ₀ = μ₁ and G = (1 − K)·n₁. A factor whose data
        are points has n = s: then K = s₀/s₁ and Q = s₀·h/s₁, DDPM's step. A Gaussian of
        variance c has n = c + s, a product of P of them with its control 2(c + s)/(P +
        1): exact for any h and P.

        The basis is that of the mean slope's eigenvectors; what is not diagonal in it
        counts as not linear. The slopes ``first`` and ``last`` are (d, d) or (d,);
        where not ``both`` are known the second is what a product of P equal Gaussians
        has there, and ``last`` must be the first one.
        """
        basis, slope, end_slope = None, first, last
        if first.ndim == 2:
            _, basis = jnp.linalg.eigh(0.5 * (first + last))
            slope, end_slope = (
                jnp.sum(basis * (matrix @ basis), axis=0) for matrix in (first, last)
            )
            power = (basis**2).T @ power
        h, ratio = s1 - s0, s0 / s1
        n1 = -1 / jnp.minimum(slope, -tuning.STEP.least_slope / s1)
        equal = jnp.maximum(n1 - 2 * h / (1 + power), n1 * ratio)
        n0 = jnp.where(
            both, -1 / jnp.minimum(end_slope, -tuning.STEP.least_slope / s0), equal
        )
        n0 = jnp.clip(
            n0, n1 * ratio / tuning.STEP.most_change, n1 * tuning.STEP.most_change
        )
        rho = jnp.log(n1 / n0)
        m = n0 * relative_exponential(rho)
        noise = jnp.sqrt(h * (n0 / m) * relative_exponential(rho - 2 * h / m))
        decay = jnp.exp(-h / m)
        mean = (n0 / m) * relative_exponential(rho - h / m)
        return cls(basis, (1 - decay) * n1, noise, decay, mean, n1, n0)

    def bent(self, fit: Fit, s1: Array, s0: Array) -> Step:
        """The step that `predict` draws with as little noise as a G leaves it that is
        bent like the population's fit.

        The precision of exp(⟨g, y'⟩ + ½·y'ᵀHy')·N(y'; m, Q) is Q⁻¹ − H. Along an
        eigenvector of H with eigenvalue η where the step starts, n of the drift's slope
        −1/n and p = 1/(1/n − η) both fall by h, as variances of noised Gaussians do,
        and H is 1/n − 1/p where it ends: of a Gaussian's Gaussian data with the same
        axes weights then differ by nothing. What is not so they make up for, with a
        finite variance even where log G turns out flat.
        """
        assert fit.bend is not None
        h, ratio, slope = s1 - s0, s0 / s1, fit.controlled_slope
        along = slope
        if fit.axes is not None:
            along = jnp.sum(
                fit.axes * jax.vmap(times, (None, 1), 1)(slope, fit.axes), axis=0
            )
        rates = jnp.maximum(
            -jnp.stack([along, along + fit.bend]), tuning.STEP.least_slope / s1
        )
        widths = 1 / rates
        there = 1 / jnp.maximum(widths - h, widths * ratio)
        bend = jnp.clip(there[1] - there[0], 0.0, tuning.STEP.most_bend / h)
        if fit.axes is None and self.basis is None:
            return dataclasses.replace(self, root=jnp.sqrt(1 + self.noise**2 * bend))
        axes, basis = (
            jnp.eye(len(bend)) if found is None else found
            for found in (fit.axes, self.basis)
        )
        rows = jnp.sqrt(bend)[:, None] * (axes.T @ basis) * self.noise
        return dataclasses.replace(
            self, root=jnp.linalg.cholesky(jnp.eye(len(bend)) + rows.T @ rows)
        )

    def predict(
        self, y: Array, drift: Array, score: Array, noise: Array, twist: float | None
    ) -> tuple[Array, Array, Array]:
        """One chain's step by what is known at its start, towards data as far as the
        twist allows, None for no limit: y', (d,); the noise in it, z and the shift, in
        the coordinates of y, (d,); and log p(y')/q(y'), with p the law along the
        ``drift`` S + u and q the one that was drawn from, which follows the ``score``,
        S + u + ∇_y log G.

        Without ∇log G it would be left to the weights to pick the chains that found the
        data by chance. The shift is at most ``twist`` times the length √d of the noise:
        where G is much narrower than that, its whole gradient would throw chains far
        off. Of a step that is `bent` q is also narrower than p. This is the twisted
        proposal of Wu et al. (2023), *Practical and asymptotically exact conditional
        sampling in diffusion models*.
        """
        z, shift = self._into(noise), self.shift(drift, score, twist)
        narrower, volume = z, jnp.zeros(())
        if self.root is not None:
            dense = self.root.ndim == 2
            narrower = (
                jax.scipy.linalg.solve_triangular(self.root, z, trans=1, lower=True)
                if dense
                else z / self.root
            )
            volume = jnp.sum(jnp.log(jnp.diag(self.root) if dense else self.root))
        twisted = narrower + shift
        if twist is None and self.root is None:
            moved = self.draw(y, score, noise)
        else:
            moved = y + self._out(self.gain * self._into(drift) + self.noise * twisted)
        # (z − twisted)·(z + twisted), as a product: exactly zero where there is no
        # twist.
        return (
            moved,
            self._out(twisted),
            0.5 * jnp.sum((z - twisted) * (z + twisted)) - volume,
        )

    def shift(self, drift: Array, score: Array, twist: float | None) -> Array:
        """How far the twist moves the step, in units of its noise and coordinates of U,
        (d,)."""
        pull = self.gain * self._into(score - drift) / self.noise
        if twist is None:
            return pull
        return within(pull, pull, twist)

    def correct(
        self,
        start: Array,
        drift: Array,
        predicted: Array,
        end_drift: Array,
        noise: Array,
    ) -> tuple[Array, Array]:
        """The step once more with the noise of `predict`, by y and S + u at its start
        and where that led: Heun's method for what is not linear. Returns y', and the
        mean square of how far it is from the predicted one, in units of the density's
        width."""
        y, there = self._into(start), self._into(predicted)
        mu1, mu0 = (
            y + self.first * self._into(drift),
            there + self.last * self._into(end_drift),
        )
        corrected = (
            self.decay * y + (self.mean - self.decay) * mu1 + (1 - self.mean) * mu0
        )
        corrected = corrected + self.noise * self._into(noise)
        return self._out(corrected), jnp.mean((corrected - there) ** 2 / self.last)

    def draw(self, y: Array, g: Array, noise: Array) -> Array:
        """y' of one chain that follows g, (d,)."""
        return y + self._out(self.gain * self._into(g) + self.noise * self._into(noise))

    def log_density(
        self, moved: Array, y: Array, g: Array, shift: Array | float = 0.0
    ) -> Array:
        """log of the law's density at y', a scalar; of the twisted law where a `shift`
        is given."""
        z = (self._into(moved - y) - self.gain * self._into(g)) / self.noise - shift
        return -0.5 * jnp.sum(z**2 + jnp.log(2 * jnp.pi) + 2 * jnp.log(self.noise))

    def _into(self, vector: Array) -> Array:
        """Coordinates of a vector in the basis."""
        return vector if self.basis is None else self.basis.T @ vector

    def _out(self, vector: Array) -> Array:
        """The vector of such coordinates."""
        return vector if self.basis is None else self.basis @ vector


class Backward(eqx.Module):
    r"""The step's backward kernel, N(R·y' + b, C) of y given y', for either half of the
    chains.

    The paths of dy = (S + u) dτ + dW with u = A·y + a, seen from their ends, are those
    of

        dy = −(A·y + a) ds + dW,    s from s₀ to s₁,

    whatever S is (Anderson 1982): noise as it enters anyway, N(y', h), but for the
    control. It is integrated by the implicit midpoint rule, which is stable for any A ≥
    0 and has the variance of equal Gaussians' products right. Between the levels s·A of
    what was fitted is taken for linear in s, as it nearly is for Gaussians of any
    width.
    """

    decay: Array  # R, (2, d, d) or (2, d) for a diagonal
    shift: Array  # b, (2, d)
    root: Array  # a root of C, structured like R

    @classmethod
    def of_step(
        cls,
        s1: Array,
        s0: Array,
        power: Array,
        fits: tuple[Fit, Fit] | None,
        control: bool,
    ) -> Backward:
        """The backward kernel of a step from s₁ to s₀, by the population's fits at both
        ends if there is a control."""
        blank = jnp.zeros((2, power.size))
        gains, pushes = [blank, blank], [blank, blank]
        if fits is not None:
            gains = [fit.gain for fit in fits]
            pushes = [
                fit.push - jax.vmap(times, (0, None))(fit.gain, fit.centre)
                for fit in fits
            ]
        dense = gains[0].ndim == 3
        ones = jnp.broadcast_to(jnp.eye(power.size) if dense else 1.0, gains[0].shape)
        still = cls(ones, blank, ones * jnp.sqrt(s1 - s0))
        if not control:
            return still
        product = (
            jnp.matmul if dense else jnp.multiply
        )  # of matrices that are symmetric, or powers of one another
        step = (s1 - s0) / tuning.STEP.midpoints

        def advance(
            i: Array, law: tuple[Array, Array, Array]
        ) -> tuple[Array, Array, Array]:
            decay, shift, variance = law
            share = (i + 0.5) / tuning.STEP.midpoints
            s = s0 + share * (s1 - s0)
            gain, push = (
                ((1 - share) * s0 * last + share * s1 * first) / s
                for first, last in (gains, pushes)
            )
            fixed = fixed_control(power, s)
            matrix = ones + 0.5 * step * (gain + (jnp.diag(fixed) if dense else fixed))
            half = jnp.linalg.inv(matrix) if dense else 1 / matrix
            middle = 2 * half - ones
            variance = step * product(half, half) + product(
                product(middle, variance), middle
            )
            shift = jax.vmap(times)(middle, shift) - step * jax.vmap(times)(half, push)
            return product(middle, decay), shift, variance

        start = ones, blank, jnp.zeros_like(ones)
        decay, shift, variance = jax.lax.fori_loop(
            0, tuning.STEP.midpoints, advance, start
        )
        law = cls(
            decay, shift, jnp.linalg.cholesky(variance) if dense else jnp.sqrt(variance)
        )
        fine = jnp.all(
            jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(law)])
        )
        return jax.tree.map(
            lambda found, other: jnp.where(fine, found, other), law, still
        )

    def draw(self, moved: Array, noise: Array, half: Array) -> Array:
        """y of one chain of this half that ended at y', (d,), given standard normal
        noise."""
        both = jax.vmap(times, (0, None))
        return (both(self.decay, moved) + self.shift + both(self.root, noise))[half]


def within(vector: Array, shift: Array, most: float) -> Array:
    """As much of a vector, (d,), as leaves the shift that it makes, in units of noise,
    no longer than ``most``·√d; 0 where that is no number."""
    length = jnp.sum(shift**2)
    longest = jnp.minimum(1.0, most * jnp.sqrt(shift.size / jnp.maximum(length, 1e-30)))
    share = jnp.where(jnp.isfinite(length), longest, 0.0)
    # Entry by entry, before the product: chosen after it, by chain, some compilers
    # round a sum with it once and others twice, and samples depend on the number of
    # devices.
    return share * jnp.where(jnp.isfinite(vector), vector, 0.0)


def fixed_control(power: Array, s: Array) -> Array:
    """a of the control u = a·y that needs no fit, (P − 1)/2(1 + s), (d,).

    Where no signal is left F is N(0, s/P), and the Feynman–Kac rate ½(P² − P)·‖y‖²/s²
    would cost a product half of its chains before anything is decided. With u = (P −
    1)·y/2s it is a constant, and so it is for powers of one Gaussian at every level,
    with c + s in the place of s; c = 1 stands for all.
    """
    return 0.5 * (power - 1.0) / (1.0 + s)


def relative_exponential(x: Array) -> Array:
    """(eˣ − 1)/x."""
    small = jnp.abs(x) < 1e-3
    safe = jnp.where(small, 1.0, x)
    return jnp.where(small, 1 + x / 2 + x**2 / 6, jnp.expm1(safe) / safe)


def times(matrix: Array, vector: Array) -> Array:
    """A matrix, or a diagonal, times a vector."""
    return matrix @ vector if matrix.ndim == 2 else matrix * vector


class Fit(eqx.Module):
    """A level's affine fits over the population, in y, and the control of each half of
    it: A·(y − centre) + a, and what needs no fit."""

    centre: Array  # the weighted mean of y, (d,)
    # L, the linear part of what a step integrates exactly: (d, d), symmetric, or (d,)
    # for a diagonal
    slope: Array
    gain: Array  # A, (2, d, d) or (2, d)
    push: Array  # a, (2, d)
    bend: Array | None = (
        # eigenvalues of the slope of ∇log G, at most 0, (d,); None where there is no G
        None
    )
    axes: Array | None = None  # its eigenvectors, (d, d); None for the coordinate axes
    fixed: Array | float = 0.0  # of `fixed_control`, (d,): u = fixed·y beside that

    @classmethod
    def none(cls, base: Array, bent: bool) -> Fit:
        """What takes the place of a fit where chains are too few: the slope −P/s, no
        control, and a flat log G."""
        zero = jnp.zeros((2, base.size))
        return cls(
            jnp.zeros_like(base),
            -base,
            zero,
            zero,
            jnp.zeros_like(base) if bent else None,
        )

    @property
    def controlled_slope(self) -> Array:
        """The slope of the score with the controls: the fixed one, and the mean of
        those fitted."""
        slope = self.slope + jnp.mean(self.gain, axis=0)
        return slope + (jnp.diag(self.fixed) if slope.ndim == 2 else self.fixed)

    def controlled(
        self, y: Array, drift: Array, rate: Array, half: Array
    ) -> tuple[Array, Array, Array]:
        """u at y, (d,), S + u, (d,), and r + ∇·u + ⟨u, S⟩, a scalar, for a chain of
        this half with S and r."""
        # Of both halves, as one product of all chains with each matrix, and not a copy
        # of a matrix for every chain.
        both = jax.vmap(times, (0, None))(self.gain, y - self.centre) + self.push
        diagonals = jax.vmap(jnp.diag)(self.gain) if self.gain.ndim == 3 else self.gain
        u, divergence = (
            self.fixed * y + both[half],
            jnp.sum(self.fixed) + jnp.sum(diagonals, axis=1)[half],
        )
        return u, drift + u, rate + divergence + u @ drift


def fit(rows: Array, log_weights: Array, base: Array, control: bool) -> Fit:
    r"""The affine fits over a weighted population of N chains, or over some of them
    where those are as good.

    The slope is that of least squares, B = Cov(S, y)·Cov(y)⁻¹, for a Gaussian the
    Hessian of log F. Along each eigenvector of B it counts as much as it explains of
    the variance of S there, R², and −P/s, the slope of P factors whose data are points,
    counts for the rest: narrow modes far apart have a flat B, and a step that took S
    for flat would throw chains out of them.

    The control (A, a), A symmetric, makes the potential r + ∇·u + ⟨u, S⟩ as nearly
    constant as least squares can. Each half of the chains takes what was fitted over
    the other: a fit to a chain's own potential would take from its weight what belongs
    there.

    The slope of ∇log G is one of least squares, too, and counts as much as it explains
    where it is negative: steps that are twisted towards data take it for the curvature
    of log G.

    ``rows`` are (N, 2d + 1), each y, S without any control, and the potential per unit
    of τ with the fixed one, or (N, 3d + 1) with ∇log G between the last two; ``base``
    is P/s, (d,).
    """
    dims = base.size
    rows, log_weights = (_thinned(table, dims) for table in (rows, log_weights))
    usable = jnp.all(jnp.isfinite(rows), axis=1) & jnp.isfinite(log_weights)
    rows = jnp.where(usable[:, None], rows, 0.0)
    weights = normalised_weights(jnp.where(usable, log_weights, -jnp.inf))
    mean, count = weights @ rows, len(rows)
    y, score, potential = (
        rows[:, :dims] - mean[:dims],
        rows[:, dims : 2 * dims],
        rows[:, -1],
    )
    full = dims <= tuning.FIT.full and count >= tuning.FIT.per_dimension * dims
    degrees = 1 / (weights @ weights) - 1
    freedom = lambda full: degrees / jnp.maximum(degrees - (dims if full else 1), 1e-3)  # noqa: E731
    roots = jnp.sqrt(weights)[:, None]
    pair = roots * jnp.stack([y, score - mean[dims : 2 * dims]])
    values, basis = _slope(pair, freedom(full), base, full)
    slope = values if basis is None else (basis * values) @ basis.T
    bend = axes = None
    if rows.shape[1] > 2 * dims + 1:
        pulls = roots * (rows[:, 2 * dims : -1] - mean[2 * dims : -1])
        whole = dims <= tuning.FIT.full and count >= tuning.FIT.per_bend * dims
        bend, axes = _slope(
            jnp.stack([pair[0], pulls]), freedom(whole), jnp.zeros_like(base), whole
        )
        bend = jnp.minimum(bend, 0.0)
    gain, push = jnp.zeros((2, *slope.shape)), jnp.zeros((2, dims))
    if control:
        # As many coefficients as so many chains can tell.
        kind = (
            "diagonal" if count // 2 >= tuning.FIT.per_feature * 2 * dims else "scalar"
        )
        if full and count // 2 >= tuning.FIT.per_feature * dims * (dims + 3) / 2:
            kind = "dense"
        first, second = jnp.split(
            jnp.column_stack([y, score, potential, weights]), [count // 2]
        )
        halves = jnp.stack(
            [jnp.pad(first, [(0, count % 2), (0, 0)]), second]
        )  # zeros fill up the shorter one
        gain, push = _controls(halves, kind, basis)
    return Fit(mean[:dims], slope, gain, push, bend, axes)


def centred(values: Array, weights: Array) -> Array:
    """√w·(f − Σ w·f) of values (M,) or (M, n), for weights that add up to 1: products
    of these are covariances."""
    away = values - weights @ values
    return jnp.sqrt(weights).reshape(-1, *[1] * (values.ndim - 1)) * away


def _thinned(table: Array, dims: int) -> Array:
    """Evenly spaced ones of either half of the chains, of the first with one fewer or
    as many, to make fits over."""
    count = table.shape[0]
    step = -(
        -count // max(tuning.FIT.enough, 2 * tuning.FIT.per_feature * dims * (dims + 3))
    )
    return jnp.concatenate([table[: count // 2 : step], table[count // 2 :: step]])


def _slope(
    pair: Array, freedom: Array, base: Array, full: bool
) -> tuple[Array, Array | None]:
    """The slope of `centred` y and S, the ``pair``, −``base`` where chains determine
    none: its eigenvalues, (d,), and eigenvectors, (d, d), those of least squares, if
    ``full``; else the coordinate axes stand for these. Residuals are too small by
    ``freedom``."""
    basis = None
    if full:
        slopes, basis = _regression(pair)
        pair, base = pair @ basis, (basis**2).T @ base
    else:
        slopes = jnp.sum(pair[0] * pair[1], axis=0) / jnp.maximum(
            jnp.sum(pair[0] ** 2, axis=0), 1e-30
        )
    rest, whole = jnp.sum(jnp.stack([pair[1] - pair[0] * slopes, pair[1]]) ** 2, axis=1)
    explained = jnp.clip(1 - freedom * rest / jnp.maximum(whole, 1e-30), 0.0, 1.0)
    found = explained * slopes - (1 - explained) * base
    return jnp.where(jnp.isfinite(found), found, -base), basis


def _regression(pair: Array) -> tuple[Array, Array]:
    """Eigenvalues and eigenvectors of the symmetric slope of least squares of `centred`
    S on y, the ``pair``."""
    variances, axes = jnp.linalg.eigh(pair[0].T @ pair[0])
    scale = jnp.sqrt(jnp.maximum(variances, jnp.maximum(1e-7 * variances[-1], 1e-30)))
    white, drawn = pair @ axes * jnp.stack([1 / scale, scale])[:, None]
    slopes = drawn.T @ white
    slopes = slopes + (drawn - white @ slopes.T).T @ white  # what rounding left of it
    slopes = 0.5 * (slopes + slopes.T) / (scale[:, None] * scale)
    # Eigenvectors of NaN would be NaN too.
    values, vectors = jnp.linalg.eigh(
        jnp.where(jnp.all(jnp.isfinite(slopes)), slopes, 0.0)
    )
    return values, axes @ vectors


def _controls(table: Array, kind: str, basis: Array | None) -> tuple[Array, Array]:
    """A and a for each half of the chains, by least squares over the other; A is (d, d)
    where there is a basis.

    The coordinates are that basis. A `diagonal` A takes the eigenvectors of the slope
    of the half that is fitted: those of all chains know of the chains that take it, and
    made the log-evidence of a squared mixture in 32 dimensions .3 too low. Both are 0
    where they leave more than `tuning.FIT.worth` of the potential's variance over the
    half that takes them. The ``table`` is each half's y, S, potential and weights, (2,
    ⌈N/2⌉, 2d + 2).
    """
    dims, weights = table.shape[-1] // 2 - 1, table[..., -1]
    pairs = table[..., :-2].reshape(*weights.shape, 2, dims)
    weights = weights / jnp.maximum(jnp.sum(weights, axis=1, keepdims=True), 1e-30)
    # Known while traced: no bounds to check.
    i, j = np.triu_indices(dims) if kind == "dense" else (np.arange(dims),) * 2

    def features(pairs: Array, weights: Array) -> Array:
        """What the coefficients of A and a multiply in the potential, `centred`."""
        away, score = pairs[:, 0], pairs[:, 1]
        found = away[:, i] * score[:, j]
        if kind == "dense":  # A_ij = A_ji multiplies both
            found = found + (i != j) * away[:, j] * score[:, i]
        return centred(
            jnp.sum(found, axis=1, keepdims=True)
            if kind == "scalar"
            else jnp.hstack([found, score]),
            weights,
        )

    def solved(features: Array, wanted: Array) -> Array:
        unit = jnp.sqrt(jnp.maximum(jnp.sum(features**2, axis=0), 1e-30))
        features = features / unit
        factor = jax.scipy.linalg.cho_factor(
            features.T @ features + tuning.FIT.ridge * jnp.eye(len(unit))
        )

        def refine(_: int, found: Array) -> Array:
            return found - jax.scipy.linalg.cho_solve(
                factor, features.T @ (wanted + features @ found)
            )

        # Normal equations square the condition number; each round wins back digits.
        return jax.lax.fori_loop(0, 3, refine, jnp.zeros_like(unit)) / unit

    def kept(found: Array, others: Array, theirs: Array) -> tuple[Array, Array]:
        left = theirs + others @ found
        better = left @ left < tuning.FIT.worth * (
            theirs @ theirs
        )  # false where anything is NaN
        found = jnp.where(better, found, 0.0)
        if kind == "scalar":
            return jnp.full((dims,), found[0]), jnp.zeros((dims,))
        gain, push = found[:-dims], found[-dims:]
        if kind == "dense":
            index = np.zeros((dims, dims), int)
            index[i, j] = index[j, i] = np.arange(len(i))
            gain = gain[index]
        return gain, push

    if basis is not None and kind == "diagonal":
        of_halves = [jax.vmap(centred)(pairs[:, :, i], weights) for i in (0, 1)]
        axes = jax.vmap(_regression)(jnp.stack(of_halves, axis=1))[1]
        fitted, taking = (
            jax.vmap(features)(pairs @ each[:, None], weights)
            for each in (axes, axes[::-1])
        )
        basis = axes[::-1]
    else:
        fitted = taking = jax.vmap(features)(
            pairs if basis is None else pairs @ basis, weights
        )
    wanted = jax.vmap(centred)(table[..., -2], weights)
    gain, push = jax.vmap(kept)(jax.vmap(solved)(fitted, wanted)[::-1], taking, wanted)
    if basis is None:
        return gain, push
    gain = gain if kind == "dense" else jax.vmap(jnp.diag)(gain)
    return basis @ gain @ basis.mT, (basis @ push[..., None])[..., 0]
