"""The compiled program: one unnormalised density for each noise level, and the
distribution that chains start from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar, NoReturn, Protocol

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float
from numpy.typing import ArrayLike

from composeprob import tuning
from composeprob.arguments import NotPickled, check_count, check_key
from composeprob.density.described import Described, Diagram
from composeprob.density.evaluation import (
    Evaluation,
    ExpertValue,
    Frame,
    Position,
    at_once,
    over_chains,
)
from composeprob.density.overlap import check
from composeprob.errors import (
    MEANT,
    CapabilityError,
    DoublyIntractableError,
    ShapeError,
    WrongTypeError,
    unknown_name,
)
from composeprob.findings import Finding
from composeprob.pytree import normal_like, vdot
from composeprob.schedule import Schedule
from composeprob.text import printable


class SiteInfo(eqx.Module):
    """Kind and shape of a latent site.

    Attributes:
        kind: ``"noised"``, ``"static"``, ``"discrete"`` (static, of finitely many
            values), ``"held"`` (static, and kept at its prior draw because a
            normaliser depends on it) or ``"given"`` (static, and taken from an earlier
            result by `Result.extend`).
        shape: the shape of its entry in a position.
        plates: of a noised site, the number of leading axes that run over members that
            are independent given the latents.
        num_values: of a discrete site, the number of values of each entry; a position
            holds the index of the value, a float.
    """

    kind: str = eqx.field(static=True)
    shape: tuple[int, ...] = eqx.field(static=True)
    plates: int = eqx.field(static=True, default=0)
    num_values: int = eqx.field(static=True, default=0)


class NoisePower(eqx.Module):
    """A product of factors at a level that is noise alone:

    exp(constant)·(2πσ²)^{−degree/2}·exp(−½·Σ power·x²/σ²).

    Attributes:
        power: total power at each entry, ``{site: array}``.
        degree: powers times dimensions, factors counted as normalised; NaN where a
            constant is unknown.
        constant: the contribution of mixture weights.
    """

    power: dict[str, Array]
    degree: Array  # this and `constant`: scalars, or (K,) where a `TopLaw` is stacked
    constant: Array

    def log_value(
        self, xs: dict[str, Array], sigma: Float[Array, ""]
    ) -> Float[Array, ""]:
        """Return the logarithm of the product at ``xs``; constants that are unknown
        count as 1."""
        exponent = jnp.zeros(())
        for name, power in self.power.items():
            exponent = exponent + jnp.sum(0.5 * power * (xs[name] / sigma) ** 2)
        of_width = 0.5 * self.degree * jnp.log(2 * jnp.pi * sigma**2)
        of_width = jnp.where(jnp.isnan(self.degree), 0.0, of_width)
        return self.constant - of_width - exponent


class TopLaw(NoisePower):
    """Distribution of a level that is noise alone, where F and G are a `NoisePower`.

    Attributes:
        entries: Σ |power|·dimensions over the factors.
        exact: whether F has this form; where not, kernels and weights move the initial
            samples to it.
        normalised: whether every factor's log-density is normalised, so that the values
            of F determine ∫F too.
        stacked: whether the arrays have an axis of all K levels in front, as exponents
            grow from level to level; `at` takes one of them. Elsewhere they are the
            same at all levels.
        potential: the part of it that factors of G make, such as a mixture of energies,
            whose values a run evaluates beside F; None where these are 1 at noise
            alone.
    """

    entries: Array  # a scalar, or (K,) where `stacked`
    exact: bool = eqx.field(static=True)
    normalised: bool = eqx.field(static=True)
    stacked: bool = eqx.field(static=True, default=False)
    potential: NoisePower | None = None

    def at(self, level: Array | int) -> TopLaw:
        """Return the law of one level, which may be traced."""
        if not self.stacked:
            return self
        law = self
        if isinstance(level, int) and not isinstance(self.degree, jax.core.Tracer):
            # On the host: each operation on a device would be compiled separately.
            law = jax.tree.map(np.asarray, self)
        law_of_level = jax.tree.map(lambda a: a[level], law)
        return dataclasses.replace(law_of_level, stacked=False)

    def draw(self, key: Array, sigma: Array) -> dict[str, Array]:
        """Draw from N(0, σ²/power) at each noised site."""
        noise = normal_like(key, self.power)
        return {
            name: sigma * noise[name] / jnp.sqrt(power)
            for name, power in self.power.items()
        }

    def log_density(
        self, xs: dict[str, Array], sigma: Float[Array, ""]
    ) -> Float[Array, ""]:
        """Return the log-density of `draw` at ``xs``."""
        terms = []
        for name, power in self.power.items():
            normaliser = 0.5 * jnp.log(power / (2 * jnp.pi * sigma**2))
            exponent = 0.5 * power * (xs[name] / sigma) ** 2
            terms.append(jnp.sum(normaliser - exponent))
        return sum(terms, jnp.zeros(()))

    def log_normaliser(self, sigma: Float[Array, ""]) -> Float[Array, ""]:
        """log ∫F; NaN where a factor's constant is unknown."""
        # ∫ exp(−½·power·x²/σ²) dx = √(2πσ²/power) for each entry.
        logs = [
            jnp.sum(0.5 * jnp.log(2 * jnp.pi * sigma**2 / power))
            for power in self.power.values()
        ]
        return (
            self.constant
            - 0.5 * self.degree * jnp.log(2 * jnp.pi * sigma**2)
            + sum(logs, jnp.zeros(()))
        )

    def signal(self, log_snr: float) -> float:
        """Estimate the error of ``log_normaliser`` from the signal that remains.

        Each factor N(α·m, σ²), with m of order 1 for data of unit size, is taken for
        N(0, σ²).
        """
        # KL(N(α·m, σ²) ‖ N(0, σ²)) = ½·α²·m²/σ² for each entry.
        return 0.5 * float(np.asarray(self.entries)) * math.exp(log_snr)


class Evaluates(Protocol):
    """Evaluator of a lowered program: an `equinox.Module` with these methods."""

    def __call__(self, position: Position, level: Array | int) -> Evaluation:
        """Evaluate π_level at the position, with one call of each network."""

    @property
    def has_user_potential(self) -> bool:
        """True if G has a part that is a user-defined function of x."""

    def user_potential(
        self, position: Position, level: Array | int
    ) -> Float[Array, ""]:
        """Log of the user-defined part of G: tempered observations and user energies,
        without a network of a diffusion or classifier."""

    @property
    def guided(self) -> bool:
        """True if G has a part that calls networks: classifiers, observations by
        moments or Tweedie means."""

    @property
    def knows_latents(self) -> bool:
        """True if there are latents and `log_closed_form` has all terms that depend on
        them."""

    @property
    def summed(self) -> tuple[str, ...]:
        """Names of the discrete latents that are summed out."""

    def log_closed_form(
        self, position: Position, level: Array | int
    ) -> Float[Array, ""]:
        """log π_level without the factors that depend on no latent; no network is
        called."""

    def frames(self, position: Position, level: Array | int) -> dict[str, Frame]:
        """Location and scale of x/α at noised sites whose prior depends on latents,
        where known, and of static sites under such priors."""

    def frames_by_data(
        self, position: Position, level: Array | int
    ) -> dict[str, Frame]:
        """Location and scale of static sites relative to the location of their data,
        which is affine in them: ξ = −m/s + θ/s, with θ = m + s·ξ."""

    def leaf_scores(
        self, position: Position, level: Array | int
    ) -> tuple[dict[str, Array], ...]:
        """``{site: ∇ log f}`` of every leaf, in the order of `Described.offers`; each
        network is called once."""

    def expert_values(
        self, position: Position, level: Array | int
    ) -> tuple[ExpertValue, ...]:
        """Score and log-density of every expert, in the order of `Described.experts`;
        each network is called once."""

    @property
    def drawable(self) -> bool:
        """True if every noised site has a factor with exact samples, not divided by."""

    def draw(self, key: Array) -> Position:
        """Draw a position of level 0 from the proposal q.

        Each noised site comes from one of its factors with exact samples, chosen
        uniformly; static sites come from their priors given these.
        """

    def importance(
        self, position: Position
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """log π₀ and the log importance weight log π₀/q."""

    def draw_static(self, key: Array, xs: dict[str, Array]) -> dict[str, Array]:
        """Draw the static sites from their priors given x/α of the noised ones,
        unconstrained."""

    def read(self, position: Position) -> dict[str, Array]:
        """Constrain the static sites of a position and add the deterministics."""

    def unread(self, values: dict[str, Array], key: Array) -> Position:
        """Return the position of the latents' values as `read` shows them.

        Static sites that are missing, or lack their last members, are drawn from their
        priors given the others.
        """

    def observed(
        self, values: dict[str, Array] | None = None, key: Array | None = None
    ) -> dict[str, Array]:
        """Return the observed values; with a ``key``, draw those sites anew, given the
        latents' values as `read` shows them."""

    def log_likelihood(self, values: dict[str, Array]) -> dict[str, Array]:
        """log p of every observed number at level 0, given the latents' values as
        `read` shows them."""

    def log_priors(self, values: dict[str, Array]) -> dict[str, Array]:
        """log p of every static site at the latents' values as `read` shows them."""


class AnnealedDensity(NotPickled, eqx.Module):
    """π_k(x, z) ∝ p(z)·F_k(x)·G_k(x, z) for k = K−1 … 0, made by `cp.compile`.

    A position is ``{site: array}`` for ONE chain; use `jax.vmap` over a leading chain
    axis. Static sites are in unconstrained coordinates. At the levels above 0 the
    product of noised factors is not the noised product: only level 0 is the promise,
    the others are the path to it. The density is a pytree whose arrays (weights, data)
    are leaves: pass it to a jitted function as an argument.

    Attributes:
        schedule: the levels.
        sites: ``{name: SiteInfo}`` of the latent sites.
        capabilities: what kernels may rely on, a frozenset of ``score``, ``energy``,
            ``conservative``, ``normalised``, ``exact_marginals``, ``feynman_kac``,
            ``mode_depth``.
        described: the program's IR and its text.
        tracks: True if exponents grow of factors whose log-density has no values to
            compare: weighted chains carry it along their paths.
    """

    _kept_by: ClassVar[str] = (
        "pickle its program and factors, and compile them again by "
        "cp.compile(program, …)."
    )

    schedule: Schedule
    evaluator: Evaluates
    top: TopLaw
    sites: dict[str, SiteInfo]
    # Static, as kernels and samplers branch on them while they are traced.
    capabilities: frozenset[str] = eqx.field(static=True)
    described: Described = eqx.field(static=True)
    tracks: bool = eqx.field(static=True, default=False, kw_only=True)

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        """Refuse the call: a density has a level, too."""
        raise WrongTypeError(
            "A density is not called like a function.",
            fix=MEANT["AnnealedDensity"]["log_prob"],
        )

    def __getitem__(self, name: object) -> NoReturn:
        """Refuse the index: samples belong to a result."""
        raise WrongTypeError(
            f"A density has no samples, of {name!r} or another site.",
            fix=MEANT["AnnealedDensity"]["sample"],
        )

    if not TYPE_CHECKING:  # a type checker that saw this would believe in every name

        def __getattr__(self, name: str) -> NoReturn:
            raise unknown_name("AnnealedDensity", name, dir(self))

    @property
    def graph(self) -> Diagram:
        """The program's IR: draws itself in notebooks; ``graph.dot()`` is its Graphviz
        source."""
        return self.described.graph

    @property
    def summed(self) -> tuple[str, ...]:
        """Names of the discrete latents that are summed out: no position holds them,
        and `to_samples` draws them given the rest."""
        return self.evaluator.summed

    @property
    def comparable_modes(self) -> bool:
        """True if log-densities can be compared between modes: there is an energy, and
        the heights of its modes are known."""
        return {"energy", "mode_depth"} <= self.capabilities

    @property
    def num_levels(self) -> int:
        """K."""
        return self.schedule.num_levels

    def on(self, schedule: Schedule) -> AnnealedDensity:
        """Return the same program on other levels, as ``cp.compile(program, …,
        schedule=schedule)`` does.

        Raises:
            AlignmentError: a factor does not know one of these levels.
            CapabilityError: this density is a copy with other arrays, and not the one
                that `cp.compile` returned.
        """
        return self._recompiled(schedule)

    def untracked(self) -> AnnealedDensity:
        """Return the same program with constant exponents where chains would have to
        carry a factor's log-density, for samplers whose chains do not."""
        if not self.tracks:
            return self
        return self._recompiled(self.schedule, False)

    def _recompiled(self, *options: object) -> AnnealedDensity:
        """Return the program compiled once more, for levels and with options of
        `lowered`."""
        # `cp.compile` sets the attribute on the instance; copies by tree operations,
        # whose arrays may be others, do not carry it.
        recompile: Callable[..., AnnealedDensity] | None = getattr(self, "_anew", None)
        if recompile is None:
            raise CapabilityError(
                "Only a density as cp.compile returned it can be compiled again, for "
                "other levels or another sampler: the arrays of this copy may differ "
                "from those of its program.",
                where=self.described.where,
                fix="compile on these levels: cp.compile(program, …, "
                "schedule=cp.Schedule.log_snr(60)).",
            )
        return recompile(*options)

    def evaluate(self, position: Position, level: Array | int) -> Evaluation:
        """Evaluate π_k at a position; each network is called once.

        Called by hand, outside of `jax.jit`, `jax.vmap` and `jax.grad`, it is compiled
        at the first call and serves all positions and levels; so are the methods below.

        Args:
            position: ``{site: array}``, no chain axis.
            level: 0 … K−1, may be traced.

        Raises:
            ShapeError: a site is missing, unknown or of the wrong shape.
            LevelError: a concrete level that does not exist.
        """
        self._check(position)
        self.schedule.check_level(level)
        values = {name: self._number(name, value) for name, value in position.items()}
        return at_once(self.evaluator, values, level)

    def _number(self, name: str, value: ArrayLike) -> Array:
        """Return the value of a site as an array, of real numbers where it has a
        gradient."""
        given = jnp.asarray(value)
        whole = jnp.issubdtype(given.dtype, jnp.integer)
        if whole and self.sites[name].kind != "discrete":
            return given.astype(float)
        return given

    def log_density(self, position: Position, level: Array | int) -> Float[Array, ""]:
        """log π_k(position) up to a constant of the level, a scalar.

        Raises:
            CapabilityError: a factor offers only its score.
        """
        return self.value_and_score(position, level)[0]

    def score(self, position: Position, level: Array | int) -> Position:
        """∇ log π_k(position), same structure as the position."""
        return self.evaluate(position, level).score

    def value_and_score(
        self, position: Position, level: Array | int
    ) -> tuple[Float[Array, ""], Position]:
        """(log π_k, ∇ log π_k) from one evaluation.

        Raises:
            CapabilityError: a factor offers only its score.
        """
        evaluation = self.evaluate(position, level)
        if evaluation.log_density is None:
            raise CapabilityError(
                "This density has no log-density: a factor in it offers only its "
                "score.",
                where=self.described.where,
                fix="use .score, or models trained with an energy parameterization.",
            )
        return evaluation.log_density, evaluation.score

    def score_and_rate(
        self, position: Position, level: Array | int
    ) -> tuple[Position, Float[Array, ""]]:
        """(∇ log F_k, r_k): the score of the diffusion part and its Feynman–Kac rate,
        from one evaluation.

        r is defined by ∂_t F = 𝓛F − g²·r·F with 𝓛 the forward Fokker–Planck operator of
        the schedule's diffusion. Weights that grow by g²·r along the reverse process
        make it sample F.

        Raises:
            CapabilityError: the program has no rate (a factor that is not a noised
                marginal inside a mixture), or one that depends on the log-density of a
                factor that offers only its score.
        """
        if self.tracks:
            raise CapabilityError(
                "The exponent of a factor without a comparable log-density grows here, "
                "and the rate depends on that log-density, which only chains on their "
                "path know.",
                where=self.described.where,
                fix="sample by cp.SMC, or use .score.",
            )
        evaluation = self.evaluate(position, level)
        if "feynman_kac" not in self.capabilities:
            raise CapabilityError(
                "This density has no Feynman–Kac rate: it has a part that is not a "
                "noised marginal.",
                where=self.described.where,
                fix="use cp.AnnealedMCMC or, where all factors are analytic, "
                "cp.SMC(weights='density').",
            )
        terms = evaluation.terms
        drift_ratio = jnp.asarray(self.schedule.drift_ratio)[level]  # f/g²
        return terms.drift, terms.rate + drift_ratio * terms.excess

    def leaf_scores(
        self, position: Position, level: Array | int
    ) -> dict[str, dict[str, Array]]:
        """``{factor: {site: ∇ log f}}``, the score of every single factor; summed where
        one name stands for several uses (in a plate, in windows)."""
        self._check(position)
        leaf_scores = self.evaluator.leaf_scores(position, level)
        scores_of_factors: dict[str, dict[str, Array]] = {}
        for offer, scores in zip(self.described.offers, leaf_scores, strict=True):
            name, *_ = offer
            total = scores_of_factors.setdefault(name, {})
            for site, score in scores.items():
                total[site] = score + total.get(site, 0.0)
        return scores_of_factors

    def initial(self, key: Array, level: Array | int | None = None) -> Position:
        """Draw a position of a noisy level (the noisiest, K−1, if left out).

        Noised sites are drawn from N(0, σ²/power), static ones from their priors.
        Levels below K−1 are meant only where no signal is left: α ≪ σ.
        """
        check_key(key)
        level = self.num_levels - 1 if level is None else level
        return self._from_noise(key, level, self.schedule.at(level).sigma)

    def _from_noise(
        self, key: Array, level: Array | int, sigma: Float[Array, ""]
    ) -> Position:
        """Draw as `initial` does, but with noise of another standard deviation."""
        noised_key, static_key = jax.random.split(key)
        xs = self.top.at(level).draw(noised_key, sigma)
        alpha = self.schedule.at(level).alpha
        clean = {name: x / alpha for name, x in xs.items()}  # as the priors see them
        return {**xs, **self.evaluator.draw_static(static_key, clean)}

    def to_samples(self, position: Position) -> dict[str, Array]:
        """Return a position in the program's terms: static sites constrained, discrete
        ones that are summed out drawn given the rest, deterministics computed.

        Raises:
            ShapeError: a site is missing, unknown or of the wrong shape.
        """
        self._check(position)
        return self.evaluator.read(position)

    def observed(self) -> dict[str, Array]:
        """The observed values, ``{site: array}``, without soft evidence (`factor`)."""
        return _observed(self.evaluator)

    def predict(self, key: Array, samples: Mapping[str, ArrayLike]) -> dict[str, Array]:
        """Draw data from the posterior predictive: the observed sites anew for each
        sample.

        An observation that later statements depend on is replaced there too.
        Observations are those of level 0; soft evidence (`factor`) is not data and is
        left out.

        Args:
            key: a random key.
            samples: values of every latent, ``{site: (N, …)}``, as in
                ``result.samples``; other entries are ignored.

        Returns:
            ``{observed site: (N, …)}``.

        Raises:
            ShapeError: a latent is missing, or their leading axes differ.
            CapabilityError: the program observes nothing.
        """
        check_key(key)
        latents = self._latents(samples)
        # A key for each sample: the evaluator draws for one chain.
        number = len(next(iter(latents.values())))
        keys = jax.random.split(key, number)
        return over_chains(self.evaluator.observed, latents, keys)

    def log_likelihood(self, samples: Mapping[str, ArrayLike]) -> dict[str, Array]:
        """log p(y | sample) at level 0 for every single observed number y, as
        leave-one-out estimates need it.

        Args:
            samples: as for `predict`.

        Returns:
            ``{observed site: (N, …)}``, without the axes over which the site's
                distribution is one event.

        Raises:
            ShapeError, CapabilityError: as for `predict`.
        """
        return over_chains(self.evaluator.log_likelihood, self._latents(samples))

    def check(
        self, key: Array, num_chains: int = tuning.PILOT.chains
    ) -> tuple[Finding, ...]:
        """Check, before a run, that the factors agree somewhere; see
        `composeprob.density.overlap`.

        A few chains go down the levels by unadjusted Langevin steps under the diffusion
        factors alone, which takes about 100 evaluations each. They follow neither
        observations nor your energies. Data that lie where a factor was never trained
        are found by `cp.infer`, which runs the same checks on its own samples, early in
        a long run.

        Args:
            key: a typed random key.
            num_chains: the number of chains.

        Returns:
            Findings, each with ``.code``, ``"no_overlap"`` or ``"out_of_training"``,
            ``.factor``, ``.level``, ``.share`` and ``.message``; empty where the
            factors agree.

        Example:
            >>> import composeprob as cp, jax, numpyro.distributions as dist
            >>> schedule = cp.Schedule.log_snr(40)
            >>> left = cp.Analytic(dist.Uniform(-1.0, -0.5), schedule)
            >>> right = cp.Analytic(dist.Uniform(0.5, 1.0), schedule)
            >>> both = cp.program(lambda f, g: cp.sample("x", f * g))
            >>> density = cp.compile(both, left, right)
            >>> finding = density.check(jax.random.key(0))[0]
            >>> str(finding.code), finding.factor
            ('no_overlap', 'f(x)')
        """
        check_key(key)
        return check(self, key, num_chains)

    def to_numpyro(self, level: int = 0) -> NumPyroPotential:
        """Return one level as a target for NumPyro's `HMC` and `NUTS`: a potential, an
        initial position, and a map from positions to samples.

        Args:
            level: k; the posterior that the program promises is that of level 0.

        Raises:
            CapabilityError: a factor offers only its score, or a discrete site is not
                summed out, or has tokens.
            DoublyIntractableError: a static site is held.
            LevelError: a level that does not exist.

        Example:
            >>> import composeprob as cp, jax, numpyro.distributions as dist
            >>> from numpyro.infer import MCMC, NUTS
            >>> @cp.program
            ... def scale(y):
            ...     sd = cp.sample("sd", dist.HalfNormal(1.0))
            ...     cp.observe("y", dist.Normal(0.0, sd), y)
            >>> target = cp.compile(scale, 0.5).to_numpyro()
            >>> mcmc = MCMC(
            ...     NUTS(potential_fn=target.potential_fn),
            ...     num_warmup=50,
            ...     num_samples=100,
            ...     postprocess_fn=target.postprocess_fn,
            ...     progress_bar=False,
            ... )
            >>> start = target.init_params(jax.random.key(1))
            >>> mcmc.run(jax.random.key(0), init_params=start)
            >>> bool((mcmc.get_samples()["sd"] > 0).all())
            True
        """
        if "energy" not in self.capabilities:
            raise CapabilityError(
                "NumPyro's samplers need a log-density, and a factor of this program "
                "offers only its score.",
                where=self.described.where,
                fix="use cp.infer, or models trained with an energy parameterization.",
            )
        # The normaliser that depends on a held site is not a part of log π, so that
        # moves of the site would sample another law.
        kinds = ("held", "given")
        held = [name for name, site in self.sites.items() if site.kind in kinds]
        if held:
            raise DoublyIntractableError(
                f"NumPyro's samplers would move {', '.join(map(repr, held))}, which "
                "the normaliser of a factor depends on.",
                where=self.described.where,
                fix="use cp.infer with cp.AnnealedMCMC, which holds it.",
            )
        kinds = ("discrete", "categorical")
        discrete = [name for name, site in self.sites.items() if site.kind in kinds]
        if discrete:
            raise CapabilityError(
                "HMC and NUTS move real numbers, and "
                f"{', '.join(map(repr, discrete))} is discrete, with entries that "
                "depend on one another.",
                where=self.described.where,
                fix="use cp.infer, which moves its entries.",
            )
        self.schedule.check_level(level)
        return NumPyroPotential(self, level)

    def _check(self, position: Position) -> None:
        """Refuse a position with other sites, or with sites of another shape."""
        if not isinstance(position, dict):
            raise self._not_a_position(type(position).__name__)
        if position.keys() != self.sites.keys():
            raise self._not_a_position(str(sorted(position)))
        for name, info in self.sites.items():
            shape = np.shape(position[name])
            if shape != info.shape:
                raise ShapeError(
                    f"Site {name!r} has shape {info.shape}; got {shape}.",
                    fix="a position is ONE chain; map over chains with "
                    "jax.vmap(density.log_density, (0, None)).",
                )

    def _not_a_position(self, got: str) -> ShapeError:
        entries = ", ".join(f"{name!r}: array" for name in self.sites)
        return ShapeError(
            f"A position of this program is a dict with the sites "
            f"{sorted(self.sites)}; got {got}.",
            fix=f"pass {{{entries}}}.",
        )

    def _latents(self, samples: Mapping[str, ArrayLike]) -> dict[str, Array]:
        """The latents among samples of a program with data, ``{site: (N, …)}``."""
        if not self.observed():
            raise CapabilityError(
                "This program observes nothing, so it has no data to predict.",
                where=self.described.where,
                fix="add cp.observe(name, distribution, value), or compile with data.",
            )
        names = [*self.sites, *self.summed]
        missing = [name for name in names if name not in samples]
        if missing:
            shown = ", ".join(map(repr, missing))
            raise ShapeError(
                "Samples of this program hold a value of every latent; "
                f"{shown} is missing.",
                fix="pass result.samples, or the samples of a NumPyro run on "
                "density.to_numpyro().",
            )
        latents = {name: jnp.asarray(samples[name]) for name in names}
        shapes = [values.shape for values in latents.values()]
        leading_axes = {shape[:1] for shape in shapes}
        if len(leading_axes) > 1 or () in leading_axes:
            raise ShapeError(
                f"All samples must have the same leading axis; got shapes {shapes}.",
                fix="of several chains, flatten the first two axes.",
            )
        return latents

    # A density is equal to itself alone: so jax.jit(density.score) works, with weights
    # as constants. See also `equinox.tree_equal`.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return printable(self.described.text)

    def _repr_html_(self) -> str:
        return self.described.html()


@dataclasses.dataclass(frozen=True, eq=False)
class NumPyroPotential:
    """Arguments of NumPyro's `HMC`, `NUTS` and `MCMC` for one level of a density, under
    NumPyro's names.

    `AnnealedDensity.to_numpyro` makes it. Chains then live at that level alone and
    nothing is annealed, so they do not find separated modes; `infer` does.

    Args:
        density: the compiled program.
        level: the level k.
    """

    density: AnnealedDensity
    level: int

    def __call__(self, *_: object, **__: object) -> NoReturn:
        raise WrongTypeError(
            "density.to_numpyro() is no model of NumPyro's, but has its arguments.",
            fix="write, with n = density.to_numpyro(), NUTS(potential_fn="
            "n.potential_fn), and run the chains from init_params=n.init_params(key).",
        )

    def potential_fn(self, position: Position) -> Float[Array, ""]:
        """−log π_k(position) up to a constant, a scalar; its derivative is −∇log π_k
        from the same evaluation.

        Args:
            position: ``{site: array}``, static sites in unconstrained coordinates.
        """

        # The score is at hand, so that NumPyro need not differentiate the networks.
        @jax.custom_jvp
        def potential(position: Position) -> Array:
            return -self.density.log_density(position, self.level)

        @potential.defjvp
        def derivative(
            primals: tuple[Position], tangents: tuple[Position]
        ) -> tuple[Array, Array]:
            value, score = self.density.value_and_score(primals[0], self.level)
            return -value, -vdot(score, tangents[0])

        return potential(position)

    def init_params(self, key: Array, num_chains: int = 1) -> Position:
        """Draw initial positions: noised sites from N(0, I/power), static ones from
        their priors.

        Args:
            key: a typed random key.
            num_chains: as given to `MCMC`.

        Returns:
            A position; for more than one chain with a leading axis of ``num_chains``,
                as `MCMC.run` wants it.
        """
        check_count(num_chains, "num_chains")

        # Unit noise in place of level 0's, which would put all chains at one place.
        @jax.jit
        def start(key: Array) -> Position:
            return self.density._from_noise(key, self.level, jnp.ones(()))

        if num_chains == 1:
            return start(key)
        return jax.vmap(start)(jax.random.split(key, num_chains))

    def postprocess_fn(self, position: Position) -> dict[str, Array]:
        """Return one position in the program's terms: static sites constrained,
        deterministics computed."""
        return self.density.to_samples(position)


@eqx.filter_jit
def _observed(evaluator: Evaluates) -> dict[str, Array]:
    return evaluator.observed()
