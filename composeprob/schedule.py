"""Noise schedules: K levels x_k = α_k·x_0 + σ_k·ε, level 0 the cleanest, level K−1 the
noisiest.

Everything that depends on how much noise a level carries is given in log-SNR, λ_k =
log(α_k²/σ_k²), because that is what two schedules can agree on.
"""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int
from numpy.typing import ArrayLike

from composeprob.errors import InvalidValueError, LevelError, ShapeError, WrongTypeError
from composeprob.text import printable


class Noise(eqx.Module):
    """A `Noise` holds α and σ of one level, or of every level at once (arrays instead
    of scalars).

    Attributes:
        index: the level's index, an integer; a real number where a factor is evaluated
            between two levels of its own.
        alpha: α, the factor of the signal.
        sigma: σ, the standard deviation of the noise.
    """

    index: Array
    alpha: Float[Array, "*levels"]
    sigma: Float[Array, "*levels"]

    @property
    def log_snr(self) -> Float[Array, "*levels"]:
        """λ = log(α²/σ²)."""
        return 2.0 * (jnp.log(self.alpha) - jnp.log(self.sigma))

    @property
    def variance(self) -> Float[Array, "*levels"]:
        """s = σ²/α², the variance of the noise in y = x/α."""
        return (self.sigma / self.alpha) ** 2


class _LogSNR:
    """`Schedule.log_snr`: a constructor on the class, the array λ on an instance."""

    def __get__(self, instance: Schedule | None, owner: type[Schedule]) -> Any:
        if instance is not None:
            if isinstance(instance.alpha, jax.core.Tracer):
                return instance.levels.log_snr
            # On the host: each operation on a device would be compiled separately.
            log_snr = log_snr_of(instance.alpha, instance.sigma)
            return log_snr.astype(jnp.result_type(float))

        def evenly_spaced(
            num_levels: int, min: float = -9.0, max: float = 11.0
        ) -> Schedule:
            """Make a variance-preserving schedule, log-SNR evenly spaced from ``max``
            (level 0) to ``min``."""
            log_snr = np.linspace(max, min, _count(num_levels))
            return owner.from_arrays(*_vp(log_snr))

        return evenly_spaced


class Schedule(eqx.Module):
    """A `Schedule` is K noise levels, x_k = α_k·x_0 + σ_k·ε, whose log-SNR falls
    strictly from k = 0 to K−1.

    Level 0 should be cleaner than the finest scale of the data: its noise stays in the
    samples.

    Attributes:
        alpha: α, shape (K,).
        sigma: σ, shape (K,).
        drift_ratio: f/g² of the forward diffusion dx = f·x dt + g dW, shape (K,): −½
            for variance-preserving schedules, 0 for variance-exploding ones, −1/(2σ)
            for flow matching. Feynman–Kac rates need it.

    Example:
        >>> import composeprob as cp
        >>> schedule = cp.Schedule.log_snr(60, min=-9.0, max=11.0)
        >>> schedule.num_levels
        60
        >>> round(float(schedule.sigma[0]), 4)
        0.0041
    """

    alpha: Float[Array, " levels"]
    sigma: Float[Array, " levels"]
    drift_ratio: Float[Array, " levels"]

    def __len__(self) -> int:
        return self.num_levels

    def __getitem__(self, level: object) -> NoReturn:
        raise WrongTypeError(
            "A schedule is no list of levels, and has no […].",
            fix="write schedule.at(3) for α and σ of one level, schedule.alpha and "
            "schedule.sigma for those of all.",
        )

    def __iter__(self) -> NoReturn:
        raise WrongTypeError(
            "A schedule is no list of levels, and is not iterated over.",
            fix="write [schedule.at(k) for k in range(len(schedule))], or take "
            "schedule.alpha and schedule.sigma.",
        )

    @classmethod
    def from_arrays(cls, alpha: ArrayLike, sigma: ArrayLike) -> Schedule:
        """Make a schedule of given α and σ, both of shape (K,), from the cleanest level
        to the noisiest."""
        try:
            alpha = np.asarray(alpha, np.float64)
            sigma = np.asarray(sigma, np.float64)
        except (TypeError, ValueError) as error:
            raise WrongTypeError(
                f"A schedule's α and σ must be arrays of numbers: {error}.",
                fix="pass two arrays with one number for each level: "
                "cp.Schedule.from_arrays([0.9, 0.1], [0.1, 0.9]).",
            ) from error
        if alpha.ndim != 1 or alpha.shape != sigma.shape or alpha.size == 0:
            raise ShapeError(
                "A schedule needs α and σ of one shape (K,), K ≥ 1; "
                f"got {alpha.shape} and {sigma.shape}.",
                fix="pass two arrays with one entry per level.",
            )
        if not (_finite_and_positive(alpha) and _finite_and_positive(sigma)):
            raise InvalidValueError(
                "A schedule's α and σ must be finite and positive at every level.",
                fix="start level 0 at a small positive σ; "
                "a level without noise has no score.",
            )
        log_snr = log_snr_of(alpha, sigma)
        _check_order(log_snr)
        _check_size(np.sqrt(alpha**2 + sigma**2))
        # NumPy arrays stay on the host until the schedule is traced.
        host: Any = (alpha, sigma, _drift_ratio(alpha, sigma, log_snr))
        return cls(*host)

    @classmethod
    def linear(cls, num_levels: int) -> Schedule:
        """Make DDPM's schedule (Ho et al. 2020): β linear from 10⁻⁴ to 0.02, times
        1000/K; α_k² = Π_{j≤k}(1−β_j)."""
        count = _count(num_levels)
        # K levels together add as much noise as DDPM's 1,000.
        beta = np.linspace(1e-4, 0.02, count) * (1000.0 / count)
        return cls._from_beta(np.minimum(beta, 0.999))

    @classmethod
    def cosine(cls, num_levels: int) -> Schedule:
        """Make the cosine schedule (Nichol & Dhariwal 2021): ᾱ(t) ∝
        cos²(π/2·(t+0.008)/1.008), β at most 0.999."""
        return cls._from_beta(cosine_betas(_count(num_levels)))

    @classmethod
    def vp(
        cls, num_levels: int, beta_min: float = 0.1, beta_max: float = 20.0
    ) -> Schedule:
        """Make levels of the VP-SDE (Song et al. 2021): log α(t) = −¼t²(β_max−β_min) −
        ½tβ_min, K times 10⁻³ … 1."""
        beta_first = beta_min + 1e-3 * (beta_max - beta_min)
        if not beta_first > 0 or not beta_max > 0:
            raise InvalidValueError(
                "β must be positive throughout; "
                f"got beta_min={beta_min}, beta_max={beta_max}.",
                fix="for example beta_min=0.1, beta_max=20.",
            )
        # At t = 0 there is no noise, and no score.
        t = np.linspace(1e-3, 1.0, _count(num_levels))
        log_alpha = -0.25 * t**2 * (beta_max - beta_min) - 0.5 * t * beta_min
        return cls.from_arrays(np.exp(log_alpha), np.sqrt(-np.expm1(2 * log_alpha)))

    @classmethod
    def edm(
        cls,
        num_levels: int,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        rho: float = 7.0,
    ) -> Schedule:
        """Make a variance-exploding schedule (Karras et al. 2022): α = 1, σ^{1/ρ}
        evenly spaced, σ_min to σ_max."""
        if not (0 < sigma_min < sigma_max and rho > 0):
            raise InvalidValueError(
                "Karras's levels need 0 < sigma_min < sigma_max and rho > 0; "
                f"got {sigma_min}, {sigma_max}, {rho}.",
                fix="for example sigma_min=0.002, sigma_max=80, rho=7.",
            )
        # Evenly spaced in σ^{1/ρ}: most levels have little noise.
        ramp = np.linspace(0.0, 1.0, _count(num_levels))
        first = sigma_min ** (1 / rho)
        last = sigma_max ** (1 / rho)
        sigma = (first + ramp * (last - first)) ** rho
        return cls.from_arrays(np.ones_like(sigma), sigma)

    @classmethod
    def flow(cls, num_levels: int, shift: float = 1.0) -> Schedule:
        """Make the straight levels of flow matching, α = 1 − t and σ = t, at t =
        s·u/(1 + (s−1)·u).

        u is evenly spaced from 10⁻³ to 1 − 10⁻³: at t = 0 there is no noise, at t = 1
        no signal. A shift s above 1 puts more levels where noise is strong, as models
        of large images need.

        References:
            Lipman et al. 2023, *Flow matching*; Esser et al. 2024, *Scaling rectified
            flow transformers*.
        """
        if not shift > 0 or not np.isfinite(shift):
            raise InvalidValueError(
                f"The shift of flow-matching levels must be positive; got {shift!r}.",
                fix="1 for evenly spaced times, 3 as Stable Diffusion 3 has it.",
            )
        u = np.linspace(1e-3, 1 - 1e-3, _count(num_levels))
        scale = 1 + (shift - 1) * u
        # (1 − u)/scale is 1 − t without a difference of nearly equal numbers.
        return cls.from_arrays((1 - u) / scale, shift * u / scale)

    log_snr: ClassVar[Any] = _LogSNR()
    """On a schedule, λ_k of every level, shape (K,). On the class, the constructor
    ``Schedule.log_snr(num_levels, min=-9.0, max=11.0)``: variance preserving, λ evenly
    spaced from ``max`` at level 0 down to ``min`` at level K−1."""

    def every(self, step: int) -> Schedule:
        """Keep every ``step``-th of these levels, and always level 0 and the noisiest.

        A model with a discrete time embedding can be evaluated only at the levels that
        it was trained on, often 1,000: run it on some of them, ``cp.compile(program, …,
        schedule=factor.schedule.every(20))``.

        Args:
            step: s ≥ 1; the levels 0, s, 2s, … and K−1 are kept, with their α and σ as
                they are.

        Raises:
            InvalidValueError: step is not a whole number from 1 to K−1.

        Example:
            >>> import composeprob as cp
            >>> cp.Schedule.linear(1000).every(20).num_levels
            51
        """
        whole = isinstance(step, (int, np.integer)) and not isinstance(step, bool)
        if not whole or not 1 <= step < self.num_levels:
            raise InvalidValueError(
                f"A schedule of {self.num_levels} levels is thinned by a whole number "
                f"from 1 to {self.num_levels - 1}; got {step!r}.",
                fix="every(20) keeps level 0, every 20th after it, and the noisiest.",
            )
        last = self.num_levels - 1
        kept = np.append(np.arange(0, last, step), last)
        return type(self)(self.alpha[kept], self.sigma[kept], self.drift_ratio[kept])

    @classmethod
    def _from_beta(cls, beta: np.ndarray) -> Schedule:
        # α² = Π (1 − β) in logarithms, so that σ² = 1 − α² is exact where α is near 1.
        log_alpha_squared = np.cumsum(np.log1p(-beta))
        sigma = np.sqrt(-np.expm1(log_alpha_squared))
        return cls.from_arrays(np.exp(0.5 * log_alpha_squared), sigma)

    @property
    def num_levels(self) -> int:
        """The number of levels, K."""
        return self.alpha.shape[0]

    @property
    def kept(self) -> Float[Array, " levels"]:
        """The probability that a token is kept under uniform noise, α²/(α² + σ²): the
        log-SNR is its log-odds."""
        alpha = jnp.asarray(self.alpha, jnp.result_type(float))
        sigma = jnp.asarray(self.sigma, jnp.result_type(float))
        return alpha**2 / (alpha**2 + sigma**2)

    @property
    def levels(self) -> Noise:
        """The noise of every level, each field of shape (K,)."""
        return Noise(
            jnp.arange(self.num_levels),
            jnp.asarray(self.alpha),
            jnp.asarray(self.sigma),
        )

    @property
    def beta(self) -> Float[Array, " levels"]:
        """The noise that enters between level k−1 and k, shape (K,): σ_k²·(1 −
        e^{λ_k−λ_{k−1}}).

        For variance-preserving schedules this is DDPM's β_k = 1 − (α_k/α_{k−1})²; at
        level 0, σ_0².
        """
        sigma = jnp.asarray(self.sigma)
        # -expm1 instead of a difference of squares: exact where α is within rounding of
        # 1.
        entering = -jnp.expm1(jnp.diff(self.levels.log_snr))
        return sigma**2 * jnp.concatenate([jnp.ones((1,), sigma.dtype), entering])

    def at(self, level: Int[Array, ""] | int) -> Noise:
        """Return the noise of one level; the level may be traced.

        Raises:
            LevelError: a concrete level outside 0 … K−1.
        """
        self.check_level(level)
        index = jnp.asarray(level)
        return jax.tree.map(lambda a: a[index], self.levels)

    def check_level(self, level: Int[Array, ""] | int) -> None:
        """Refuse a concrete level that does not exist, or is not an integer."""
        if isinstance(level, jax.core.Tracer):
            return
        integer = np.issubdtype(np.asarray(level).dtype, np.integer)
        if not integer or np.ndim(level) != 0:
            raise LevelError(
                f"A level is one integer; got {level!r}.",
                fix="pass an int, or vmap over levels.",
            )
        if not 0 <= int(level) < self.num_levels:
            raise LevelError(
                f"Level {int(level)} does not exist: this schedule has levels "
                f"0 (cleanest) to {self.num_levels - 1}.",
                fix="use 0 for the distribution that the program promises.",
            )

    def same_levels(self, other: Schedule) -> bool:
        """Return whether both schedules have the same α and σ at every level.

        Host arrays only.
        """
        if self.num_levels != other.num_levels:
            return False
        same_alpha = np.allclose(self.alpha, other.alpha, rtol=1e-6, atol=0)
        return same_alpha and np.allclose(self.sigma, other.sigma, rtol=1e-6, atol=0)

    def noise_at(
        self, log_snr: Float[np.ndarray, "*n"]
    ) -> tuple[Float[np.ndarray, "*n"], Float[np.ndarray, "*n"]]:
        """Return α and σ of the schedule's family at any log-SNR.

        Exact for VP, VE and flow; for others by interpolation in log α.
        """
        alpha = np.asarray(self.alpha, np.float64)
        sigma = np.asarray(self.sigma, np.float64)
        family = _family(alpha, sigma)
        if family == "vp":
            return _vp(log_snr)
        if family == "ve":
            signal = np.full_like(log_snr, alpha[0])
        elif family == "flow":
            # α = 1 − t and σ = t, so λ = 2·log(α/(1 − α)).
            signal = 1 / (1 + np.exp(-np.asarray(log_snr) / 2))
        else:
            knots = log_snr_of(alpha, sigma)
            # np.interp needs rising knots, and log-SNR falls.
            signal = np.exp(np.interp(log_snr, knots[::-1], np.log(alpha)[::-1]))
        return signal, signal * np.exp(-np.asarray(log_snr) / 2)

    def level_at(self, log_snr: Float[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
        """Return the level at any log-SNR as a real number, interpolated between the
        schedule's levels in log-SNR."""
        knots = log_snr_of(self.alpha, self.sigma)
        levels = np.arange(self.num_levels, dtype=np.float64)
        return np.interp(log_snr, knots[::-1], levels[::-1])

    def __repr__(self) -> str:
        if isinstance(self.alpha, jax.core.Tracer):
            return "Schedule(traced)"
        log_snr = log_snr_of(self.alpha, self.sigma)
        return printable(
            f"Schedule({self.num_levels} levels, "
            f"log-SNR {log_snr[0]:.3g} … {log_snr[-1]:.3g}, "
            f"σ {float(self.sigma[0]):.3g} … {float(self.sigma[-1]):.3g})"
        )


def check_schedule(
    schedule: object, fix: str = "for example cp.Schedule.cosine(100)."
) -> None:
    """Refuse a value that is not a schedule."""
    if not isinstance(schedule, Schedule):
        raise WrongTypeError(
            f"schedule must be a cp.Schedule; got {type(schedule).__name__}.", fix=fix
        )


def log_snr_of(alpha: ArrayLike, sigma: ArrayLike) -> np.ndarray:
    """λ of levels with these α and σ, in double precision."""
    # A difference of logarithms: a quotient α/σ could overflow, and its square sooner.
    log_alpha = np.log(np.asarray(alpha, np.float64))
    return 2 * (log_alpha - np.log(np.asarray(sigma, np.float64)))


def cosine_betas(num_levels: int) -> Float[np.ndarray, " {num_levels}"]:
    """β of `Schedule.cosine`."""
    t = np.arange(num_levels + 1) / num_levels
    alpha_bar = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


def _vp(log_snr: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """α and σ of the variance-preserving family: α² = sigmoid(λ), σ² = sigmoid(−λ)."""
    # In logarithms: neither underflows where the other is within rounding of 1.
    alpha = np.exp(-0.5 * np.logaddexp(0, -log_snr))
    return alpha, np.exp(-0.5 * np.logaddexp(0, log_snr))


def _family(alpha: np.ndarray, sigma: np.ndarray) -> str:
    """Name of the schedule's family, ``"vp"``, ``"ve"`` or ``"flow"``; ``""`` without a
    closed form."""
    if np.allclose(alpha**2 + sigma**2, 1.0, rtol=1e-6, atol=0):
        return "vp"
    if np.allclose(alpha, alpha[0], rtol=1e-9, atol=0):
        return "ve"
    if np.allclose(alpha + sigma, 1.0, rtol=1e-6, atol=0):
        return "flow"
    return ""


def _drift_ratio(
    alpha: np.ndarray, sigma: np.ndarray, log_snr: np.ndarray
) -> np.ndarray:
    """f/g² = (d log α/dλ)/(−σ²): in closed form for the VP, VE and flow families, by
    differences for others."""
    family = _family(alpha, sigma)
    if family == "flow":
        return -0.5 / sigma  # λ = 2·log((1−t)/t), so d log α/dλ = t/2
    if family == "vp":
        return np.full_like(alpha, -0.5)
    if family == "ve":
        # α is constant.
        return np.full_like(alpha, 0.0)
    return np.gradient(np.log(alpha), log_snr) / -(sigma**2)


def _finite_and_positive(values: np.ndarray) -> bool:
    return bool(np.all(np.isfinite(values)) and np.all(values > 0))


def _check_order(log_snr: np.ndarray) -> None:
    """Refuse levels whose log-SNR does not fall strictly."""
    rising = np.diff(log_snr) >= 0
    if not np.any(rising):
        return
    k = int(np.argmax(rising))
    raise InvalidValueError(
        "Levels must go from clean to noisy, "
        f"but log-SNR goes from {log_snr[k]:.4g} at level {k} to "
        f"{log_snr[k + 1]:.4g} at level {k + 1}.",
        fix="sort the levels by decreasing α/σ and drop repeated ones.",
    )


def _check_size(size: np.ndarray) -> None:
    """Refuse levels whose √(α² + σ²) falls far: their α and σ follow different
    conventions.

    Variance-preserving levels keep it, straight ones lose a third at t = ½.
    """
    if size.min() >= 0.25 * size[0]:
        return
    k = int(size.argmin())
    raise InvalidValueError(
        f"√(α² + σ²) falls from {size[0]:.3g} at level 0 to {size[k]:.3g} at level "
        f"{k}: the signal falls, and no noise replaces it.",
        fix="of DDPM's betas and alphas_cumprod = cumprod(1 − betas), α is "
        "sqrt(alphas_cumprod) and σ is sqrt(1 − alphas_cumprod).",
    )


def _count(num_levels: int) -> int:
    """Return the number of levels as an int; refuse others, and those below 2."""
    if np.ndim(num_levels) == 1:
        raise InvalidValueError(
            "A schedule needs its number of levels; got an array of "
            f"{len(num_levels)} numbers.",  # type: ignore[arg-type]
            fix="of the betas of a training write alpha_bar = np.cumprod(1 - betas); "
            "cp.Schedule.from_arrays(np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)).",
        )
    whole = isinstance(num_levels, (int, np.integer))
    if not whole or isinstance(num_levels, bool):
        raise InvalidValueError(
            f"The number of a schedule's levels must be a whole number; got "
            f"{num_levels!r}.",
            fix="pass num_levels as an int ≥ 2.",
        )
    if num_levels < 2:
        raise InvalidValueError(
            f"A schedule needs at least 2 levels; got {num_levels!r}.",
            fix="pass num_levels as an int ≥ 2.",
        )
    return int(num_levels)
