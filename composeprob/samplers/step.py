r"""The one Gaussian law of a step from a level to another.

In y = x/α the reverse process of every schedule is dy = (S + u) dτ + dW, which takes
away the variance h = s₁ − s₀, from s₁ = σ²/α² of a level to s₀ of the next. A `Step` is
a Gaussian law for it,

$$y' = y + U\,G\,U^\top g + U\,Q^{1/2}\,z,$$

with g the drift that is followed and z ~ N(0, I). DDPM's step at any η, the step that
integrates a fitted slope exactly, replica exchange's bridge between two rungs and
RAISE's upward walk are this law with other G, Q and U.

A level's `Fit` has all that a step knows of the population: the slope of the score, and
the control u, which makes weights more equal. With S + u followed in place of S, and r
+ ∇·u + ⟨u, S⟩ in place of the Feynman–Kac rate r, every F_k stays the same: insert the
drift into the equation ∂F = 𝓛F − g²·r·F that defines r.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from composeprob import tuning
from composeprob.errors import InvalidValueError
from composeprob.kernels.step_size import as_scalar, check_range, settings
from composeprob.samplers.resampling import normalised_weights


class ReverseStep(eqx.Module):
    """The step of chains from a level to the next one: what `SMC` takes as ``step=``.

    Args:
        order: 2 fits the linear part of the drift over the population, integrates it
            exactly, and corrects each step by the score where it ended, as in Heun's
            method, for one evaluation more a level: stable for products of any number
            of factors. 1 is DDPM's step, whose variance is too small, and which is
            unstable for products of n factors from n·Δλ ≈ 2 on, Δλ the distance of
            levels in log-SNR.
        control: ``"affine"`` adds a drift under which Feynman–Kac weights differ less,
            fitted over the population, and takes it into account in the weights, which
            stay exact; ``"none"`` leaves it out.
        twist: the longest shift of a step by data and user energies, in units of its
            noise; None for no limit.
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
        if self.twist is not None and not _is_length(self.twist):
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

    def narrowing(self, variances: Float[np.ndarray, " levels"]) -> float:
        r"""Return the share of the variance of N(0, 1) that steps of order 1 lose.

        Each step has the variance of one point's posterior, not of the data's. From
        level to level a Gaussian's variance V in units of α becomes
        $(1 - G/(1 + s_1))^2\,V + Q$. What is lost is half the distance of levels in
        log-SNR, or a quarter for DDIM, and about the same for data of any variance.

        Args:
            variances: s = σ²/α² of the levels, from the one with the least noise.
        """
        if self.order != 1 or len(variances) < 2:
            return 0.0
        s = np.asarray(variances, np.float64)
        step = Step.ddpm(jnp.asarray(s[1:]), jnp.asarray(s[:-1]), self.eta)
        slopes = 1 - np.asarray(step.gain) / (1 + s[1:])
        noises = np.asarray(step.noise)
        variance = s[-1]
        for slope, noise in zip(slopes[::-1], noises[::-1], strict=True):
            variance = slope**2 * variance + noise**2
        return float(max(1 - variance / (1 + s[0]), 0.0))


def _is_length(value: object) -> bool:
    """Return whether a value is a finite number ≥ 0; a truth value is not."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return 0 <= value < math.inf


class Step(eqx.Module):
    r"""y' ~ N(y + U·G·Uᵀg, U·Q·Uᵀ), with the coefficients of `correct`."""

    # U, columns of length 1; None for the coordinate axes
    basis: Float[Array, "dims dims"] | None
    gain: Float[Array, " dims"]  # G
    noise: Float[Array, " dims"]  # √Q
    # Of `fitted` steps alone, which `correct` makes once more:
    decay: Float[Array, " dims"] | float = 0.0  # K
    mean_decay: Float[Array, " dims"] | float = 0.0  # J/h
    start_width: Float[Array, " dims"] | float = 0.0  # n₁
    end_width: Float[Array, " dims"] | float = 0.0  # n₀
    # L of steps that are `bent` towards data, where the precision of the noise that is
    # drawn is L·Lᵀ; a diagonal along the coordinate axes
    root: Float[Array, "dims dims"] | Float[Array, " dims"] | None = None

    @classmethod
    def diagonal(
        cls, gain: Float[Array, " #dims"], variance: Float[Array, " #dims"]
    ) -> Step:
        """Return the step of this G and Q along the coordinate axes; of first order
        only."""
        return cls(None, *jnp.broadcast_arrays(gain, jnp.sqrt(variance)))

    @classmethod
    def ddpm(
        cls, s1: Array, s0: Array, eta: Array | float = 1.0, power: Array | float = 1.0
    ) -> Step:
        """Return DDPM's step at η = 1, DDIM's deterministic one at η = 0 (Song, Meng
        and Ermon 2021, equation 12).

        Of P factors whose data are points, where a power P is given: Q = η²·s₀·h/s₁ and
        G = s₁ − √(s₁·(s₀ − Q)), both divided by P. In x that is x' = α'·x̂₀ + √(σ'² −
        v)·ε̂ + √v·ξ with v = η²·β·σ'²/σ².
        """
        variance = eta**2 * s0 * (s1 - s0) / s1
        gain = s1 - jnp.sqrt(s1 * jnp.maximum(s0 - variance, 0.0))
        return cls.diagonal(gain / power, variance / power)

    @classmethod
    def bridge(cls, start: Array, end: Array, power: Float[Array, " dims"]) -> Step:
        """Return the step between two rungs of replica exchange: downwards `ddpm` of P
        factors; upwards the noise that this step reverses, of variance h/P."""
        down = cls.ddpm(start, jnp.minimum(end, start), 1.0, power)
        up = (end - start) / power
        # A step to its own level is never made; the variance keeps its density finite.
        not_down = jnp.where(end > start, up, start / power)
        variance = jnp.where(end < start, down.noise**2, not_down)
        return cls.diagonal(jnp.where(end < start, down.gain, 0.0), variance)

    @classmethod
    def upward(
        cls,
        s1: Array,
        s0: Array,
        power: Float[Array, " dims"],
        mixed: bool,
        by_rate: bool,
    ) -> Step:
        """Return the step of RAISE's walk from s₀ up to s₁, which undoes `ddpm` where
        there is only noise.

        For one factor it is the forward diffusion, of gain 0. A product's reverse step
        draws chains together P times as strongly, which noise alone would not undo: the
        weights of walks would degenerate. With y ~ N(0, V) at s₁ and S = −P·y/s at both
        ends, y at s₁ is Gaussian given y at s₀. V is s₁/P if kernels or weights bring
        chains to π_k (``mixed``), s₁/(2P − 1) if there are steps alone; Feynman–Kac
        weights (``by_rate``), ½(P² − P)·y²/s per unit of log-SNR, widen it, but not to
        an improper density.
        """
        precision = power
        if not mixed:
            precision = jnp.maximum(2 * power - 1, power)
        if by_rate:
            # Half of a trapezoid's weight falls to the upper end.
            widening = 0.25 * jnp.log(s1 / s0) * (power**2 - power)
            precision = jnp.maximum(power - widening, 0.5 * power)
        start = s1 / precision  # V
        added = s0 * (s1 - s0) / s1
        slope = 1 - (s1 - s0) * power / s1
        variance = slope**2 * start + added  # of y at s₀
        gain = (1 - slope * start / variance) * s0 / power
        return cls.diagonal(gain, jnp.maximum(start / variance, 1.0) * added)

    @classmethod
    def fitted(
        cls,
        first: Float[Array, "dims dims"] | Float[Array, " dims"],
        last: Float[Array, "dims dims"] | Float[Array, " dims"],
        s1: Array,
        s0: Array,
        power: Float[Array, " dims"],
        both: Array | bool,
    ) -> Step:
        r"""Return the step that integrates a linear drift exactly: stable however stiff
        the density is.

        In each direction of U the drift is −(y − μ)/n, where n goes linearly from n₁ to
        n₀, and μ from μ₁ to μ₀, while h is taken away. With ρ = log(n₁/n₀), m = (n₁ −
        n₀)/ρ and E(x) = (eˣ − 1)/x,

            y' = K·y + (J/h − K)·μ₁ + (1 − J/h)·μ₀ + √Q·z,
            K = exp(−h/m),    J = h·(n₀/m)·E(ρ − h/m),    Q = h·(n₀/m)·E(ρ − 2h/m);

        before the evaluation at its end, μ₀ = μ₁ and G = (1 − K)·n₁. A factor whose
        data are points has n = s: then K = s₀/s₁ and Q = s₀·h/s₁, DDPM's step. A
        Gaussian of variance c has n = c + s, a product of P of them with its control
        n = 2(c + s)/(P + 1): exact for any h and P.

        The basis is that of the mean slope's eigenvectors; the part of a slope that is
        not diagonal in it counts as nonlinear.

        Args:
            first: slope of the drift where the step starts; a diagonal may be (d,).
            last: slope where it ends; it must be ``first`` unless ``both`` are known.
            s1: s where it starts.
            s0: s where it ends.
            power: P at each entry.
            both: whether the second slope is known. Else it is that of a product of P
                equal Gaussians.
        """
        basis = None
        slope = first
        end_slope = last
        if first.ndim == 2:
            _, basis = jnp.linalg.eigh(0.5 * (first + last))
            slope = _diagonal_in(basis, first)
            end_slope = _diagonal_in(basis, last)
            power = (basis**2).T @ power
        h = s1 - s0
        ratio = s0 / s1
        # No Gaussian has a slope that is flat or turns upwards.
        least = tuning.STEP.least_slope
        n1 = -1 / jnp.minimum(slope, -least / s1)
        # n = 2(c + s)/(P + 1) falls by 2h/(P + 1), in proportion no faster than s.
        equal = jnp.maximum(n1 - 2 * h / (1 + power), n1 * ratio)
        n0 = jnp.where(both, -1 / jnp.minimum(end_slope, -least / s0), equal)
        # Two fits may differ by chance, so n changes only so much faster than s.
        most_change = tuning.STEP.most_change
        n0 = jnp.clip(n0, n1 * ratio / most_change, n1 * most_change)
        rho = jnp.log(n1 / n0)
        m = n0 * relative_exponential(rho)  # (n₁ − n₀)/ρ, also where ρ = 0
        noise = jnp.sqrt(h * (n0 / m) * relative_exponential(rho - 2 * h / m))
        decay = jnp.exp(-h / m)
        mean_decay = (n0 / m) * relative_exponential(rho - h / m)
        return cls(basis, (1 - decay) * n1, noise, decay, mean_decay, n1, n0)

    def bent(self, fit: Fit, s1: Array, s0: Array) -> Step:
        """Return the step whose `predict` draws less noise, by the curvature of log G
        that was fitted over the population.

        The precision of exp(⟨g, y'⟩ + ½·y'ᵀHy')·N(y'; m, Q) is Q⁻¹ − H. Along an
        eigenvector of H with eigenvalue η where the step starts, n of the drift's slope
        −1/n and p = 1/(1/n − η) both fall by h, as variances of noised Gaussians do,
        and H is 1/n − 1/p where it ends: of a Gaussian's Gaussian data with the same
        axes all weights are then equal. Elsewhere they make up for the difference, with
        a finite variance even where log G turns out flat.
        """
        assert fit.bend is not None
        h = s1 - s0
        ratio = s0 / s1
        slope = fit.controlled_slope
        if fit.axes is not None:
            products = jax.vmap(times, (None, 1), 1)(slope, fit.axes)
            slope = jnp.sum(fit.axes * products, axis=0)
        # 1/n and 1/p where the step starts, then where it ends
        rates = -jnp.stack([slope, slope + fit.bend])
        widths = 1 / jnp.maximum(rates, tuning.STEP.least_slope / s1)
        end_rates = 1 / jnp.maximum(widths - h, widths * ratio)
        bend = jnp.clip(end_rates[1] - end_rates[0], 0.0, tuning.STEP.most_bend / h)
        if fit.axes is None and self.basis is None:
            return dataclasses.replace(self, root=jnp.sqrt(1 + self.noise**2 * bend))
        identity = jnp.eye(len(bend))
        axes = identity if fit.axes is None else fit.axes
        basis = identity if self.basis is None else self.basis
        rows = jnp.sqrt(bend)[:, None] * (axes.T @ basis) * self.noise
        root = jnp.linalg.cholesky(jnp.eye(len(bend)) + rows.T @ rows)
        return dataclasses.replace(self, root=root)

    def predict(
        self,
        y: Float[Array, " dims"],
        drift: Float[Array, " dims"],
        score: Float[Array, " dims"],
        noise: Float[Array, " dims"],
        twist_limit: float | None,
    ) -> tuple[Float[Array, " dims"], Float[Array, " dims"], Float[Array, ""]]:
        """Step one chain by drift and score at its start, towards data as far as the
        twist allows.

        Without ∇log G it would be left to the weights to pick the chains that found the
        data by chance. The shift is at most ``twist_limit`` times the length √d of the
        noise: where G is much narrower than that, its whole gradient would throw chains
        far off. Of a step that is `bent` q is also narrower than p. This is the twisted
        proposal of Wu et al. (2023), *Practical and asymptotically exact conditional
        sampling in diffusion models*.

        Args:
            y: the chain.
            drift: S + u there.
            score: S + u + ∇_y log G there.
            noise: standard normals.
            twist_limit: the longest shift; None for no limit.

        Returns:
            y'; the noise in it, z and the shift, in the coordinates of y; and log
                p(y')/q(y'), with p the law along the drift, and q the one that was
                drawn from, which follows the score.
        """
        z = self._coordinates(noise)
        shift = self.shift(drift, score, twist_limit)
        narrower, log_volume = self._narrowed(z)
        twisted = narrower + shift
        if twist_limit is None and self.root is None:
            moved = self.draw(y, score, noise)
        else:
            coordinates = self.gain * self._coordinates(drift) + self.noise * twisted
            moved = y + self._vector(coordinates)
        # (z − twisted)·(z + twisted), as a product: exactly zero where there is no
        # twist.
        log_ratio = 0.5 * jnp.sum((z - twisted) * (z + twisted)) - log_volume
        return moved, self._vector(twisted), log_ratio

    def _narrowed(
        self, z: Float[Array, " dims"]
    ) -> tuple[Float[Array, " dims"], Float[Array, ""]]:
        """Return L⁻ᵀz and log |L|: noise of a step that is `bent`."""
        if self.root is None:
            return z, jnp.zeros(())
        if self.root.ndim == 1:
            return z / self.root, jnp.sum(jnp.log(self.root))
        narrower = jax.scipy.linalg.solve_triangular(self.root, z, trans=1, lower=True)
        return narrower, jnp.sum(jnp.log(jnp.diag(self.root)))

    def shift(
        self,
        drift: Float[Array, " dims"],
        score: Float[Array, " dims"],
        twist_limit: float | None,
    ) -> Float[Array, " dims"]:
        """Return the shift of the step by the twist, in units of its noise and
        coordinates of U."""
        pull = self.gain * self._coordinates(score - drift) / self.noise
        if twist_limit is None:
            return pull
        return within(pull, pull, twist_limit)

    def correct(
        self,
        start: Float[Array, " dims"],
        drift: Float[Array, " dims"],
        predicted: Float[Array, " dims"],
        end_drift: Float[Array, " dims"],
        noise: Float[Array, " dims"],
    ) -> tuple[Float[Array, " dims"], Float[Array, ""]]:
        """Make the step once more with the noise of `predict`, by S + u at its start
        and where it was predicted to end: Heun's method for the nonlinear part.

        Returns:
            y', and the mean square of its distance from the predicted one, in units of
                the density's width.
        """
        y = self._coordinates(start)
        predicted_y = self._coordinates(predicted)
        mu1 = y + self.start_width * self._coordinates(drift)
        mu0 = predicted_y + self.end_width * self._coordinates(end_drift)
        towards_start = (self.mean_decay - self.decay) * mu1
        towards_end = (1 - self.mean_decay) * mu0
        corrected = self.decay * y + towards_start + towards_end
        corrected = corrected + self.noise * self._coordinates(noise)
        error = jnp.mean((corrected - predicted_y) ** 2 / self.end_width)
        return self._vector(corrected), error

    def draw(
        self,
        y: Float[Array, " dims"],
        g: Float[Array, " dims"],
        noise: Float[Array, " dims"],
    ) -> Float[Array, " dims"]:
        """Return y' of one chain that follows g."""
        pulled = self.gain * self._coordinates(g)
        return y + self._vector(pulled + self.noise * self._coordinates(noise))

    def log_density(
        self,
        moved: Float[Array, " dims"],
        y: Float[Array, " dims"],
        g: Float[Array, " dims"],
        shift: Float[Array, " dims"] | float = 0.0,
    ) -> Float[Array, ""]:
        """Return log of the law's density at y'; of the twisted law where a `shift` is
        given."""
        away = self._coordinates(moved - y) - self.gain * self._coordinates(g)
        z = away / self.noise - shift
        return -0.5 * jnp.sum(z**2 + jnp.log(2 * jnp.pi) + 2 * jnp.log(self.noise))

    def _coordinates(self, vector: Float[Array, " dims"]) -> Float[Array, " dims"]:
        """Coordinates of a vector in the basis."""
        if self.basis is None:
            return vector
        return self.basis.T @ vector

    def _vector(self, coordinates: Float[Array, " dims"]) -> Float[Array, " dims"]:
        """Return the vector of such coordinates."""
        if self.basis is None:
            return coordinates
        return self.basis @ coordinates


def _diagonal_in(
    basis: Float[Array, "dims dims"], matrix: Float[Array, "dims dims"]
) -> Float[Array, " dims"]:
    """Diagonal of a matrix in a basis."""
    return jnp.sum(basis * (matrix @ basis), axis=0)


class _Algebra(NamedTuple):
    """Operations of matrices that are symmetric and commute, by their entries or as
    diagonals alone."""

    identity: Callable[[int], Array | float]
    of_diagonal: Callable[[Array], Array]
    product: Callable[[Array, Array], Array]
    inverse: Callable[[Array], Array]
    root: Callable[[Array], Array]


DENSE = _Algebra(
    identity=jnp.eye,
    of_diagonal=jnp.diag,
    product=jnp.matmul,
    inverse=jnp.linalg.inv,
    root=jnp.linalg.cholesky,
)
DIAGONAL = _Algebra(
    identity=lambda _: 1.0,
    of_diagonal=lambda diagonal: diagonal,
    product=jnp.multiply,
    inverse=lambda diagonal: 1 / diagonal,
    root=jnp.sqrt,
)


class Backward(eqx.Module):
    r"""The step's backward kernel, N(R·y' + b, C) of y given y', for either half of the
    chains.

    The paths of dy = (S + u) dτ + dW with u = A·y + a, seen from their ends, are those
    of

        dy = −(A·y + a) ds + dW,    s from s₀ to s₁,

    whatever S is (Anderson 1982): noise as it enters anyway, N(y', h), but for the
    control. It is integrated by the implicit midpoint rule, which is stable for any A ≥
    0 and has the variance of equal Gaussians' products right. Between the levels s·A of
    the fits is taken for linear in s, as it nearly is for Gaussians of any width.
    """

    decay: Float[Array, "2 dims *columns"]  # R; (2, d) for a diagonal
    shift: Float[Array, "2 dims"]  # b
    root: Float[Array, "2 dims *columns"]  # a root of C, structured like R

    @classmethod
    def of_step(
        cls,
        s1: Array,
        s0: Array,
        power: Float[Array, " dims"],
        fits: tuple[Fit, Fit] | None,
        control: bool,
    ) -> Backward:
        """Return the backward kernel of a step from s₁ to s₀, by the population's fits
        at both ends if there is a control."""
        zero = jnp.zeros((2, power.size))
        gains = [zero, zero]  # A at both ends
        pushes = [zero, zero]  # a
        if fits is not None:
            gains = [fit.gain for fit in fits]
            pushes = [fit.offset for fit in fits]
        algebra = DENSE if gains[0].ndim == 3 else DIAGONAL
        ones = jnp.broadcast_to(algebra.identity(power.size), gains[0].shape)
        without_control = cls(ones, zero, ones * jnp.sqrt(s1 - s0))
        if not control:
            return without_control
        product = algebra.product
        step = (s1 - s0) / tuning.STEP.midpoints

        def advance(
            i: Array, law: tuple[Array, Array, Array]
        ) -> tuple[Array, Array, Array]:
            """One midpoint step of R, b and C."""
            decay, shift, variance = law
            share = (i + 0.5) / tuning.STEP.midpoints
            s = s0 + share * (s1 - s0)
            gain = ((1 - share) * s0 * gains[1] + share * s1 * gains[0]) / s
            push = ((1 - share) * s0 * pushes[1] + share * s1 * pushes[0]) / s
            fixed = algebra.of_diagonal(fixed_control(power, s))
            matrix = ones + 0.5 * step * (gain + fixed)
            half = algebra.inverse(matrix)
            middle = 2 * half - ones
            added = step * product(half, half)
            variance = added + product(product(middle, variance), middle)
            pushed = step * jax.vmap(times)(half, push)
            shift = jax.vmap(times)(middle, shift) - pushed
            return product(middle, decay), shift, variance

        start = ones, zero, jnp.zeros_like(ones)
        decay, shift, variance = jax.lax.fori_loop(
            0, tuning.STEP.midpoints, advance, start
        )
        law = cls(decay, shift, algebra.root(variance))
        # A fit that is NaN leaves the kernel without a control.
        finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(law)]
        usable = jnp.all(jnp.stack(finite))
        return jax.tree.map(partial(jnp.where, usable), law, without_control)

    def draw(
        self,
        moved: Float[Array, " dims"],
        noise: Float[Array, " dims"],
        half: Int[Array, ""],
    ) -> Float[Array, " dims"]:
        """Return y of one chain of this half that ended at y', given standard normal
        noise."""
        both = jax.vmap(times, (0, None))
        return (both(self.decay, moved) + self.shift + both(self.root, noise))[half]


def within(
    vector: Float[Array, " dims"], shift: Float[Array, " dims"], limit: float
) -> Float[Array, " dims"]:
    """Return a vector, shortened so that the shift that it makes is at most
    ``limit``·√d long, in units of noise; 0 where it is NaN or infinite."""
    length = jnp.sum(shift**2)
    longest = jnp.minimum(
        1.0, limit * jnp.sqrt(shift.size / jnp.maximum(length, 1e-30))
    )
    share = jnp.where(jnp.isfinite(length), longest, 0.0)
    # Entry by entry, before the product: chosen after it, by chain, some compilers
    # round a sum with it once and others twice, and samples depend on the number of
    # devices.
    return share * jnp.where(jnp.isfinite(vector), vector, 0.0)


def fixed_control(power: Float[Array, " dims"], s: Array) -> Float[Array, " dims"]:
    """Return a of the control u = a·y that needs no fit, (P − 1)/2(1 + s).

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


def times(matrix: Float[Array, " dims *columns"], vector: Array) -> Array:
    """A matrix, or a diagonal, times a vector."""
    if matrix.ndim == 2:
        return matrix @ vector
    return matrix * vector


class Fit(eqx.Module):
    """A level's affine fits over the population, in y, and the control of each half of
    it: A·(y − centre) + a, and the fixed one."""

    centre: Float[Array, " dims"]  # the weighted mean of y
    # L, the linear part that a step integrates exactly: symmetric, or (d,) for a
    # diagonal
    slope: Float[Array, " dims *columns"]
    gain: Float[Array, "2 dims *columns"]  # A
    push: Float[Array, "2 dims"]  # a
    # Eigenvalues of the slope of ∇log G, at most 0; None where there is no G
    bend: Float[Array, " dims"] | None = None
    # and its eigenvectors; None for the coordinate axes
    axes: Float[Array, "dims dims"] | None = None
    fixed: Float[Array, " dims"] | float = 0.0  # u = fixed·y, of `fixed_control`

    @classmethod
    def default(cls, base: Float[Array, " dims"], bent: bool) -> Fit:
        """Return the fit of too few chains: the slope −P/s, no control, and a flat log
        G."""
        zero = jnp.zeros((2, base.size))
        bend = jnp.zeros_like(base) if bent else None
        return cls(jnp.zeros_like(base), -base, zero, zero, bend)

    @property
    def offset(self) -> Float[Array, "2 dims"]:
        """a − A·centre: the control at y = 0."""
        return self.push - jax.vmap(times, (0, None))(self.gain, self.centre)

    @property
    def controlled_slope(self) -> Float[Array, " dims *columns"]:
        """The slope of the score with the controls: the fixed one, and the mean of
        those fitted."""
        slope = self.slope + jnp.mean(self.gain, axis=0)
        if slope.ndim == 2:
            return slope + jnp.diag(self.fixed)
        return slope + self.fixed

    def controlled(
        self,
        y: Float[Array, " dims"],
        drift: Float[Array, " dims"],
        rate: Float[Array, ""],
        half: Int[Array, ""],
    ) -> tuple[Float[Array, " dims"], Float[Array, " dims"], Float[Array, ""]]:
        """Return u at y, S + u, and r + ∇·u + ⟨u, S⟩ for a chain of this half with S
        and r."""
        # Of both halves, as one product of all chains with each matrix, and not a copy
        # of a matrix for every chain.
        both = jax.vmap(times, (0, None))(self.gain, y - self.centre) + self.push
        diagonals = jax.vmap(jnp.diag)(self.gain) if self.gain.ndim == 3 else self.gain
        u = self.fixed * y + both[half]
        divergence = jnp.sum(self.fixed) + jnp.sum(diagonals, axis=1)[half]
        return u, drift + u, rate + divergence + u @ drift


def fit(
    rows: Float[Array, "chains columns"],
    log_weights: Float[Array, " chains"],
    base: Float[Array, " dims"],
    control: bool,
) -> Fit:
    r"""Fit affine models over a weighted population of N chains, or over a subset of
    them where that is as good.

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

    Args:
        rows: (N, 2d + 1), each y, S without any control, and the potential per unit of
            τ with the fixed one, or (N, 3d + 1) with ∇log G between the last two.
        log_weights: of the chains.
        base: P/s.
        control: whether to fit a control.
    """
    dims = base.size
    rows = thinned(rows, dims)
    log_weights = thinned(log_weights, dims)
    usable = jnp.all(jnp.isfinite(rows), axis=1) & jnp.isfinite(log_weights)
    rows = jnp.where(usable[:, None], rows, 0.0)
    weights = normalised_weights(jnp.where(usable, log_weights, -jnp.inf))
    means = weights @ jnp.column_stack([rows, weights])
    mean = means[:-1]
    squares = means[-1]
    count = len(rows)
    y = rows[:, :dims] - mean[:dims]
    score = rows[:, dims : 2 * dims]
    potential = rows[:, -1]
    degrees = 1 / squares - 1  # of freedom: effective chains, less the mean

    def residual_factor(full: bool) -> Array:
        """Factor by which residuals of least squares are too small."""
        coefficients = dims if full else 1
        return degrees / jnp.maximum(degrees - coefficients, 1e-3)

    full = dims <= tuning.FIT.full and count >= tuning.FIT.per_dimension * dims
    roots = jnp.sqrt(weights)[:, None]
    pair = roots * jnp.stack([y, score - mean[dims : 2 * dims]])
    slopes, basis = _slope(pair, residual_factor(full), base, full)
    slope = slopes if basis is None else (basis * slopes) @ basis.T
    bend = None
    axes = None
    if rows.shape[1] > 2 * dims + 1:
        pulls = roots * (rows[:, 2 * dims : -1] - mean[2 * dims : -1])
        full_bend = dims <= tuning.FIT.full and count >= tuning.FIT.per_bend * dims
        pair = jnp.stack([pair[0], pulls])
        flat = jnp.zeros_like(base)
        bend, axes = _slope(pair, residual_factor(full_bend), flat, full_bend)
        bend = jnp.minimum(bend, 0.0)
    gain = jnp.zeros((2, *slope.shape))
    push = jnp.zeros((2, dims))
    if control:
        form = _ControlForm.of_population(count, dims, full)
        table = jnp.column_stack([y, score, potential, weights])
        first, second = jnp.split(table, [count // 2])
        # Zeros, of weight 0, fill up the shorter half.
        padded = jnp.pad(first, [(0, count % 2), (0, 0)])
        gain, push = _controls(jnp.stack([padded, second]), form, basis)
    return Fit(mean[:dims], slope, gain, push, bend, axes)


def centred(
    values: Float[Array, " chains *columns"], weights: Float[Array, " chains"]
) -> Float[Array, " chains *columns"]:
    """√w·(f − Σ w·f) of values, for weights that add up to 1: products of these are
    covariances."""
    away = values - weights @ values
    return jnp.sqrt(weights).reshape(-1, *[1] * (values.ndim - 1)) * away


def thinned(
    table: Float[Array, " chains *columns"], dims: int
) -> Float[Array, " fewer *columns"]:
    """Return evenly spaced rows of each half of the chains, to make fits over.

    The first half keeps as many rows as the second or one fewer, so that `fit` can
    split them again at half of their number.
    """
    count = table.shape[0]
    of_a_matrix = tuning.FIT.per_feature * dims * (dims + 3)
    step = -(-count // max(tuning.FIT.enough, 2 * of_a_matrix))
    return jnp.concatenate([table[: count // 2 : step], table[count // 2 :: step]])


def _slope(
    pair: Float[Array, "2 chains dims"],
    residual_factor: Array,
    base: Float[Array, " dims"],
    full: bool,
) -> tuple[Float[Array, " dims"], Float[Array, "dims dims"] | None]:
    """Return the slope of `centred` S on y, the ``pair``, as eigenvalues and
    eigenvectors; −``base`` where chains determine none.

    These are those of least squares, if ``full``; else the coordinate axes stand for
    them. Residuals are too small by the ``residual_factor``.
    """
    basis = None
    if full:
        slopes, basis = _regression(pair)
        pair = pair @ basis
        base = (basis**2).T @ base
    else:
        products = jnp.sum(pair[0] * pair[1], axis=0)
        slopes = products / jnp.maximum(jnp.sum(pair[0] ** 2, axis=0), 1e-30)
    residuals = pair[1] - pair[0] * slopes
    rest, total = jnp.sum(jnp.stack([residuals, pair[1]]) ** 2, axis=1)
    # R², along each eigenvector
    unexplained = residual_factor * rest / jnp.maximum(total, 1e-30)
    explained = jnp.clip(1 - unexplained, 0.0, 1.0)
    shrunk = explained * slopes - (1 - explained) * base
    return jnp.where(jnp.isfinite(shrunk), shrunk, -base), basis


def _regression(
    pair: Float[Array, "2 chains dims"],
) -> tuple[Float[Array, " dims"], Float[Array, "dims dims"]]:
    """Eigenvalues and eigenvectors of the symmetric slope of least squares of `centred`
    S on y, the ``pair``."""
    variances, axes = jnp.linalg.eigh(pair[0].T @ pair[0])
    least = jnp.maximum(1e-7 * variances[-1], 1e-30)
    scale = jnp.sqrt(jnp.maximum(variances, least))
    # In coordinates where y has covariance I the slope is Cov(S, y). S is a gradient,
    # so it is stretched as y is shrunk: the slope is a Hessian, and symmetric.
    white, stretched = pair @ axes * jnp.stack([1 / scale, scale])[:, None]
    slopes = stretched.T @ white
    # One refinement, of the residuals that rounding left
    slopes = slopes + (stretched - white @ slopes.T).T @ white
    slopes = 0.5 * (slopes + slopes.T) / (scale[:, None] * scale)
    # Eigenvectors of NaN would be NaN too.
    finite = jnp.all(jnp.isfinite(slopes))
    values, vectors = jnp.linalg.eigh(jnp.where(finite, slopes, 0.0))
    return values, axes @ vectors


class _ControlForm(NamedTuple):
    """The form of a control, and the coefficients of A and a that least squares find.

    A "dense" A is any symmetric matrix, a "diagonal" one a number for each entry; of a
    "scalar" control A is one number and a is 0.
    """

    kind: str
    dims: int

    @classmethod
    def of_population(cls, count: int, dims: int, full: bool) -> _ControlForm:
        """Return the form of as many coefficients as N chains, in two halves, can
        determine."""
        chains = count // 2
        per_feature = tuning.FIT.per_feature
        if full and chains >= per_feature * dims * (dims + 3) / 2:
            return cls("dense", dims)
        if chains >= per_feature * 2 * dims:
            return cls("diagonal", dims)
        return cls("scalar", dims)

    @property
    def entries(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns of the entries of A that have a coefficient."""
        # NumPy's, known while traced: no bounds to check.
        if self.kind == "dense":
            i, j = np.triu_indices(self.dims)
            return i, j
        diagonal = np.arange(self.dims)
        return diagonal, diagonal

    def features(
        self, pairs: Float[Array, "chains 2 dims"], weights: Float[Array, " chains"]
    ) -> Float[Array, "chains features"]:
        """Return the regressors of the potential, `centred`: those whose coefficients
        are A and a."""
        i, j = self.entries
        away = pairs[:, 0]
        score = pairs[:, 1]
        products = away[:, i] * score[:, j]
        if self.kind == "dense":  # A_ij = A_ji multiplies both
            products = products + (i != j) * away[:, j] * score[:, i]
        if self.kind == "scalar":
            return centred(jnp.sum(products, axis=1, keepdims=True), weights)
        return centred(jnp.hstack([products, score]), weights)

    def control(
        self, coefficients: Float[Array, " features"]
    ) -> tuple[Float[Array, " dims *columns"], Float[Array, " dims"]]:
        """Return A and a of these coefficients; A as a diagonal unless it is dense."""
        dims = self.dims
        if self.kind == "scalar":
            return jnp.full((dims,), coefficients[0]), jnp.zeros((dims,))
        gain = coefficients[:-dims]
        push = coefficients[-dims:]
        if self.kind == "dense":
            i, j = self.entries
            index = np.zeros((dims, dims), int)
            index[i, j] = np.arange(len(i))
            index[j, i] = index[i, j]
            gain = gain[index]
        return gain, push


def _controls(
    table: Float[Array, "2 half columns"],
    form: _ControlForm,
    basis: Float[Array, "dims dims"] | None,
) -> tuple[Float[Array, "2 dims *columns"], Float[Array, "2 dims"]]:
    """Return A and a for each half of the chains, by least squares over the other; A is
    (d, d) where there is a basis.

    The coordinates are that basis. A diagonal A takes the eigenvectors of the slope of
    the half that is fitted: those of all chains know of the chains that take it, and
    made the log-evidence of a squared mixture in 32 dimensions .3 too low. Both are 0
    where they leave more than `tuning.FIT.worth` of the potential's variance over the
    half that takes them. The ``table`` is each half's y, S, potential and weights, (2,
    ⌈N/2⌉, 2d + 2).
    """
    weights = table[..., -1]
    pairs = table[..., :-2].reshape(*weights.shape, 2, form.dims)
    weights = weights / jnp.maximum(jnp.sum(weights, axis=1, keepdims=True), 1e-30)
    features = jax.vmap(form.features)
    if basis is not None and form.kind == "diagonal":
        of_y = jax.vmap(centred)(pairs[:, :, 0], weights)
        of_score = jax.vmap(centred)(pairs[:, :, 1], weights)
        _, axes = jax.vmap(_regression)(jnp.stack([of_y, of_score], axis=1))
        fitted = features(pairs @ axes[:, None], weights)
        basis = axes[::-1]  # of the other half
        taking = features(pairs @ basis[:, None], weights)
    else:
        if basis is not None:
            pairs = pairs @ basis
        fitted = features(pairs, weights)
        taking = fitted

    def kept(
        coefficients: Array, features: Array, potential: Array
    ) -> tuple[Array, Array]:
        """Control of the half that takes it, 0 where it is of no use there."""
        left = potential + features @ coefficients
        rest, before = jnp.sum(jnp.stack([left, potential]) ** 2, axis=1)
        # False where anything is NaN
        better = rest < tuning.FIT.worth * before
        return form.control(jnp.where(better, coefficients, 0.0))

    potential = jax.vmap(centred)(table[..., -2], weights)
    of_other_half = jax.vmap(_least_squares)(fitted, potential)[::-1]
    gain, push = jax.vmap(kept)(of_other_half, taking, potential)
    if basis is None:
        return gain, push
    if form.kind != "dense":
        gain = jax.vmap(jnp.diag)(gain)
    return basis @ gain @ basis.mT, (basis @ push[..., None])[..., 0]


def _least_squares(
    features: Float[Array, "chains features"], potential: Float[Array, " chains"]
) -> Float[Array, " features"]:
    """Coefficients whose features take most of the variance from a potential, by damped
    normal equations."""
    unit = jnp.sqrt(jnp.maximum(jnp.sum(features**2, axis=0), 1e-30))
    features = features / unit
    damping = tuning.FIT.ridge * jnp.eye(len(unit))
    factor = jax.scipy.linalg.cho_factor(features.T @ features + damping)

    def refine(_: int, coefficients: Array) -> Array:
        left = features.T @ (potential + features @ coefficients)
        return coefficients - jax.scipy.linalg.cho_solve(factor, left)

    # Normal equations square the condition number; each round wins back digits.
    return jax.lax.fori_loop(0, 3, refine, jnp.zeros_like(unit)) / unit
