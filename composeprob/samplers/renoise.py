r"""Moves that add noise and take it away again.

A chain goes up from level 0 to a turn by the noising process q, and comes down by the
reverse steps r of a factor f. With the way up u_0 = x, u_1, …, u_T and the way down
d_T = u_T, …, d_0 = y, each move also has a way back, up along d and down along u, so
that Metropolis and Hastings' ratio of a target π is

$$\frac{\pi(y)}{\pi(x)}\,Q,\qquad
  Q = \prod_j \frac{q(d_{j+1} \mid d_j)}{r(d_j \mid d_{j+1})}
      \prod_j \frac{r(u_j \mid u_{j+1})}{q(u_{j+1} \mid u_j)}.$$

Where r reverses f's noising exactly, f(y)·Q = f(x): the rest of π alone decides. No
gradient of that rest is needed, and a turn at much noise leads to any mode.

By scores alone f(y)·Q/f(x) is known from the Feynman–Kac rate R of the composition, as
∫R dτ along d less ∫R dτ along u; it is 1 for a single factor, up to the error of steps.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int, UInt32

from composeprob import tuning
from composeprob.arguments import check_count
from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Evaluation
from composeprob.errors import CapabilityError, InvalidValueError
from composeprob.kernels import KernelState
from composeprob.kernels.kernel import Info
from composeprob.kernels.metropolis import log_density_ratio, log_uniform, metropolis
from composeprob.samplers.descent import moved_to
from composeprob.samplers.finishers import Finisher, Points, genealogy_after_moves
from composeprob.samplers.layout import Layout
from composeprob.samplers.moves import Particles
from composeprob.samplers.random import Stream, normals, stream
from composeprob.samplers.run import Run
from composeprob.schedule import Noise


class Ladder(eqx.Module):
    """Levels of a density where chains turn, and its reverse steps between them.

    Attributes:
        levels: the levels of its rungs, from level 0 up.
        narrowing: for each rung and entry the variance of the reverse step from there
            to the rung below, over the variance that this step takes away.
        turns: the rung where each proposal of a round turns.
        renews: for each rung, whether a move that turns there forgets where it began.
        piloted: evaluations that measuring all this took, for each chain.
    """

    levels: Int[Array, " rungs"]
    narrowing: Float[Array, "rungs dims"]
    turns: Int[Array, " proposals"]
    renews: Float[Array, " rungs"]
    piloted: int = eqx.field(static=True, default=0)


class Excursion(NamedTuple):
    """The end of the ways up and down of a chain.

    Attributes:
        state: the proposal y, evaluated at level 0 with its density terms.
        log_steps: Σ of `log_edge`, along the way down less along the way up.
    """

    state: KernelState
    log_steps: Float[Array, ""]


class Renoising(NamedTuple):
    """Proposals of one density: up its ladder and down again.

    Attributes:
        density: whose level 0 is the target.
        layout: of its positions.
        ladder: its rungs.
    """

    density: AnnealedDensity
    layout: Layout
    ladder: Ladder

    @property
    def by_values(self) -> bool:
        """True if the ratio is of log-densities, False if of the integrals of rates."""
        return "energy" in self.density.capabilities

    def evaluate(self, v: Float[Array, " size"], rung: Array | int) -> Evaluation:
        """Evaluate the density at one chain, with its terms."""
        return self.layout.evaluate(self.density, v, self.ladder.levels[rung])

    def state(self, v: Float[Array, " size"]) -> KernelState:
        """Return a chain at level 0, evaluated."""
        return KernelState(v, self.evaluate(v, 0))

    def propose(
        self, words: UInt32[Array, " 2"], state: KernelState, turn: Int[Array, ""]
    ) -> tuple[KernelState, Float[Array, ""]]:
        """Return the proposal of one chain, and the logarithm of π(y)·Q/π(x).

        Args:
            words: the random words of this proposal.
            state: the chain at level 0, evaluated with its terms.
            turn: the rung where it turns.
        """
        excursion = self.excursion(words, state, turn)
        log_quotient = self.log_quotient(state, excursion)
        return excursion.state, log_quotient + self.log_rest(state, excursion.state)

    def excursion(
        self, words: UInt32[Array, " 2"], state: KernelState, turn: Int[Array, ""]
    ) -> Excursion:
        """Go up to a rung and down again; 2·turn evaluations, in one loop."""
        return self.walk(words, state, turn, jnp.zeros_like(turn))

    def draw_from_noise(
        self, words: UInt32[Array, " 2"], v: Float[Array, " size"]
    ) -> tuple[KernelState, Float[Array, ""]]:
        r"""Draw the noised entries of one chain from noise alone, by the reverse steps.

        With u_T, …, u_0 = x the way down from the law ρ of the noisiest level, the
        weight is of expectation ∫π(x, z) dx at every z, whatever the steps are:

        $$w = \frac{\pi(u_0, z)}{\rho(u_T)}
          \prod_j \frac{q(u_{j+1} \mid u_j)}{r(u_j \mid u_{j+1})}.$$

        By scores alone it is the Feynman–Kac weight ∫F_T·E_T(u_T)·exp(∫R dτ)·G_0(x),
        up to the error of the steps.

        Args:
            words: the random words of this draw.
            v: the chain; its noised entries are replaced, its static ones z stay.

        Returns:
            The chain at level 0, evaluated with its terms, and log w, without the
                priors of z.
        """
        d = self.layout.dims
        top = len(self.ladder.levels) - 1
        level = self.ladder.levels[top]
        schedule = self.density.schedule
        noise = schedule.at(level)
        power = self.layout.power(self.density, level)
        variance = noise.variance / power
        drawn = jnp.sqrt(variance) * normals(words, Stream.INITIAL, d, v.dtype)
        start = jnp.concatenate([drawn, v[d:]])
        at_start = self.evaluate(start, top)
        excursion = self.walk(words, KernelState(start, at_start), top, top)
        terms = excursion.state.evaluation.terms
        if self.by_values:
            log_volume = self.layout.log_volume(schedule.at(0).alpha)
            constant = 0.5 * d * math.log(2 * math.pi)
            log_top = _log_normal(drawn, variance) - constant
            log_density = excursion.state.evaluation.log_density - terms.log_prior
            log_weight = log_density + log_volume - log_top + excursion.log_steps
            return excursion.state, log_weight
        normaliser = self.density.top.at(level).log_normaliser(noise.sigma)
        log_weight = normaliser + at_start.terms.log_exact + excursion.log_steps
        return excursion.state, log_weight + terms.log_potential

    def walk(
        self,
        words: UInt32[Array, " 2"],
        state: KernelState,
        turn: Int[Array, ""] | int,
        first: Int[Array, ""] | int,
    ) -> Excursion:
        """Go up to a rung and down again, from the step ``first`` of the 2·turn on."""
        d = self.layout.dims
        schedule = self.density.schedule
        Carry = tuple[Array, Evaluation, Array]

        def step(i: Array, carry: Carry) -> Carry:
            v, at_v, log_steps = carry
            up = i < turn
            here = jnp.where(up, i, 2 * turn - i)
            there = jnp.where(up, here + 1, here - 1)
            upper = jnp.maximum(here, there)
            high = schedule.at(self.ladder.levels[upper])
            low = schedule.at(self.ladder.levels[upper - 1])
            taken = high.variance - low.variance
            variance = taken * self.ladder.narrowing[upper]
            z = normals(words, i, d, v.dtype)
            y = v[:d]
            noised = y + jnp.sqrt(taken) * z
            denoised = y + taken * at_v.terms.drift + jnp.sqrt(variance) * z
            moved = jnp.where(up, noised, denoised)
            w = jnp.concatenate([moved, v[d:]])
            at_w = self.evaluate(w, there)
            ends = (y, at_v), (moved, at_w)
            below, above = jax.tree.map(partial(jnp.where, up), ends, ends[::-1])
            along = self.log_edge(below, above, low, high, variance)
            return w, at_w, log_steps + jnp.where(up, -along, along)

        carry = (state.position, state.evaluation, jnp.zeros(()))
        w, at_w, log_steps = jax.lax.fori_loop(first, 2 * turn, step, carry)
        return Excursion(KernelState(w, at_w), log_steps)

    def log_edge(
        self,
        below: tuple[Array, Evaluation],
        above: tuple[Array, Evaluation],
        low: Noise,
        high: Noise,
        variance: Float[Array, " dims"],
    ) -> Float[Array, ""]:
        """Return log q(above | below) − log r(below | above) of one step; by scores
        ∫R dτ, by the trapezoid rule."""
        y, at_y = below
        z, at_z = above
        if not self.by_values:
            # Per unit of log-SNR the rate is s·R.
            rates = low.variance * at_y.terms.rate + high.variance * at_z.terms.rate
            return 0.5 * rates * (low.log_snr - high.log_snr)
        taken = high.variance - low.variance
        forth = _log_normal(z - y, jnp.broadcast_to(taken, z.shape))
        back = _log_normal(y - z - taken * at_z.terms.drift, variance)
        return forth - back

    def log_quotient(
        self, state: KernelState, excursion: Excursion
    ) -> Float[Array, ""]:
        """Return the logarithm of f(y)·Q/f(x), with f the factors whose reverse steps
        the proposal made; 0 where these are exact."""
        if not self.by_values:
            return excursion.log_steps
        there = excursion.state.evaluation.terms
        here = state.evaluation.terms
        log_there = there.log_marginal + there.log_exact
        log_here = here.log_marginal + here.log_exact
        return log_there - log_here + excursion.log_steps

    def log_rest(self, state: KernelState, proposed: KernelState) -> Float[Array, ""]:
        """Return the log-ratio of the rest of π: potentials, and priors that depend on
        noised sites."""
        there = proposed.evaluation.terms
        here = state.evaluation.terms
        if self.by_values:
            ratio = log_density_ratio(proposed, state)
            log_there = there.log_marginal + there.log_exact
            return ratio - log_there + here.log_marginal + here.log_exact
        log_there = there.log_potential + there.log_prior
        return log_there - here.log_potential - here.log_prior


def _log_normal(
    away: Float[Array, " dims"], variance: Float[Array, " dims"]
) -> Float[Array, ""]:
    """Return the log-density of independent normal numbers, without its constant."""
    return -0.5 * jnp.sum(away**2 / variance + jnp.log(variance))


def accept(
    words: UInt32[Array, " 2"],
    proposed: KernelState,
    state: KernelState,
    log_ratio: Float[Array, ""],
) -> tuple[KernelState, Info]:
    """Accept or reject the proposal of one chain, which `Renoising.propose` made with
    these words."""
    log_u = log_uniform(normals(stream(words, Stream.STATES), 0, 1)[0])
    # Chains do not use the way back's density, which is no closed form here.
    return metropolis(log_u, log_ratio, proposed, state, jnp.zeros(()))


def ladder_of(
    points: Points,
    density: AnnealedDensity,
    within: tuple[float, float] | None = None,
) -> tuple[Ladder, Float[np.ndarray, " rungs"]]:
    r"""Return the rungs of a density for a population, without turns, and the share of
    a chain's variance that a turn at each rung renews.

    The reverse step of a Gaussian of variance c takes Δ from s + Δ with the variance
    Δ·(c + s)/(c + s + Δ), which is Δ·(1 − Δ·E[S²]) with S its score at the upper end.
    For separated modes that is the width of each of them, by the mean of S² over the
    population's noised points; the fitted slope would be that of all modes together.

    Args:
        points: the population at level 0.
        density: the target.
        within: the range of log-SNR where chains may turn; left out, all.
    """
    layout = Layout.of_density(density)
    log_snr = np.asarray(density.schedule.log_snr, np.float64)
    spacing = tuning.RENOISE.spacing
    if "energy" not in density.capabilities:
        spacing = tuning.RENOISE.spacing_by_score
    levels = [0]
    for level in range(1, len(log_snr)):
        last = level == len(log_snr) - 1
        far = log_snr[levels[-1]] - log_snr[level] >= spacing
        if far or last:
            levels.append(level)
    some = points[: tuning.RENOISE.pilots]
    squares = _mean_squares(
        density, jnp.asarray(some, jnp.result_type(float)), jnp.asarray(levels)
    )
    s = np.exp(-log_snr[levels])
    taken = np.diff(s, prepend=s[0])[:, None]
    least = least_narrowing(s)[:, None]
    narrowing = np.clip(1 - taken * np.asarray(squares, np.float64), least, 1.0)
    variance = np.var(points[:, : layout.dims], axis=0, dtype=np.float64)
    renewed = np.mean(s[:, None] / (variance + s[:, None]), axis=1)
    # Static sites stay where they are, so that no move forgets these.
    whole = layout.size == layout.dims
    renews = whole & (renewed >= 1 - tuning.RENOISE.memory)
    allowed = np.arange(len(levels)) > 0
    if within is not None:
        places = log_snr[levels]
        allowed &= (places >= min(within)) & (places <= max(within))
    ladder = Ladder(
        levels=jnp.asarray(levels, jnp.int32),
        narrowing=jnp.asarray(narrowing, jnp.result_type(float)),
        turns=jnp.zeros((0,), jnp.int32),
        renews=jnp.asarray(renews, jnp.result_type(float)),
        piloted=-(-len(some) * len(levels) // len(points)),
    )
    return ladder, np.where(allowed, renewed, 0.0)


def least_narrowing(s: Float[np.ndarray, " rungs"]) -> Float[np.ndarray, " rungs"]:
    """Return (c + s)/(c + s + Δ) of each rung where c, the variance of the data, is 0:
    no reverse step is narrower."""
    return np.append(1.0, s[:-1] / s[1:])


@eqx.filter_jit
def _mean_squares(
    density: AnnealedDensity, points: Float[Array, "n size"], levels: Array
) -> Float[Array, "rungs dims"]:
    """Mean squares of the score in y, over points with the noise of each level."""
    layout = Layout.of_density(density)
    d = layout.dims
    start = density.schedule.at(0).variance
    noise = jax.random.normal(jax.random.key(0), (len(points), d))

    def at_level(level: Array) -> Array:
        width = jnp.sqrt(density.schedule.at(level).variance - start)

        def of_chain(v: Array, z: Array) -> Array:
            v = v.at[:d].add(width * z)
            return layout.evaluate(density, v, level).terms.drift ** 2

        squares = jax.vmap(of_chain)(points, noise)
        # A chain without a finite score tells nothing.
        return jnp.nanmean(jnp.where(jnp.isfinite(squares), squares, jnp.nan), axis=0)

    return jnp.nan_to_num(jax.lax.map(at_level, levels))


def chosen_turns(
    renewed: Float[np.ndarray, " rungs"],
    acceptance: Float[np.ndarray, " rungs"],
    number: int,
) -> Int[np.ndarray, " number"]:
    """Return the rungs where a round's proposals turn: each as often as the variance
    that it renews is accepted, and all allowed ones now and then."""
    gain = renewed * acceptance
    total = gain.sum()
    allowed = renewed > 0
    chance = allowed / allowed.sum()
    if total > 0:
        chance = (
            1 - tuning.RENOISE.tried
        ) * gain / total + tuning.RENOISE.tried * chance
    # Systematic, in a fixed order that mixes near and far turns.
    places = (np.arange(number) + 0.5) / number
    turns = np.searchsorted(np.cumsum(chance), places * (1 - 1e-12))
    return np.random.default_rng(0).permutation(turns).astype(np.int32)


@eqx.filter_jit
def _acceptance(
    density: AnnealedDensity, ladder: Ladder, points: Float[Array, "n size"]
) -> Float[Array, " rungs"]:
    """Mean acceptance of proposals that turn at each rung."""
    renoising = Renoising(density, Layout.of_density(density), ladder)
    states = jax.vmap(renoising.state)(points)
    number = jnp.arange(len(points), dtype=jnp.uint32)
    words = jnp.stack([number, jnp.full_like(number, Stream.CLOSING)], axis=1)

    def of_rung(rung: Array) -> Array:
        def of_chain(words: Array, state: KernelState) -> Array:
            words = stream(words, rung)
            proposed, log_ratio = renoising.propose(words, state, rung)
            _, info = accept(words, proposed, state, log_ratio)
            return info.acceptance

        return jnp.mean(jax.vmap(of_chain)(words, states))

    return jax.lax.map(of_rung, jnp.arange(len(ladder.levels)))


class Renoise(Finisher):
    r"""Moves up to a level of noise and down again by reverse steps, accepted so that
    the target is left invariant.

    $$u_T \sim q(\cdot \mid x),\qquad y \sim r(\cdot \mid u_T),\qquad
      a = \min\Big(1, \frac{\pi(y)}{\pi(x)}\,Q\Big),$$

    with Q the ratio of the noising and the reverse steps along both ways. They need no
    gradient of observations, and turns at much noise lead from mode to mode. By scores
    alone the rest of π decides, and ∫R dτ along both ways with R the Feynman–Kac rate:
    right up to the error of the steps.

    Args:
        number: proposals to each chain; one evaluation for each step, up and down.
        levels: the range of log-SNR where chains turn, such as ``(-6, 3)``; left out,
            the levels of the density, each as often as what it renews is accepted.

    Raises:
        InvalidValueError: no whole number ≥ 1, or a range without a level.

    Example:
        >>> import composeprob as cp
        >>> cp.SMC(then=(cp.Renoise(20), cp.WarmUp())).finishers
        (Renoise(20), WarmUp())

    References:
        Meng et al. 2022, *SDEdit*, for the proposal; Andrieu, Doucet and Holenstein
        2010, *Particle Markov chain Monte Carlo methods*, for ratios along paths.
    """

    number: int = eqx.field(default=20, static=True)
    levels: tuple[float, float] | None = eqx.field(default=None, static=True)

    title = "renoising"

    def __check_init__(self) -> None:
        check_count(self.number, "Renoise(number=)")
        if self.levels is not None and not np.all(np.isfinite(self.levels)):
            raise InvalidValueError(
                f"Renoise(levels={self.levels!r}) is no range of log-SNR.",
                fix="pass two numbers, such as levels=(-6.0, 3.0).",
            )

    @property
    def requires(self) -> dict[str, frozenset[str]]:
        return {"Renoise": frozenset({"score"})}

    def __repr__(self) -> str:
        within = "" if self.levels is None else f", levels={self.levels}"
        return f"Renoise({self.number}{within})"

    def check(self, density: AnnealedDensity, num_chains: int) -> None:
        where = density.described.where
        if not Layout.of_density(density).dims or density.num_levels == 1:
            raise CapabilityError(
                "cp.Renoise adds noise to noised sites, and this program has none.",
                where=where,
                fix="leave it out.",
            )
        if {"energy", "feynman_kac"}.isdisjoint(density.capabilities):
            raise CapabilityError(
                "cp.Renoise needs a log-density or a Feynman–Kac rate, and this "
                "program has neither.",
                where=where,
                fix="leave it out.",
            )
        if self.levels is None:
            return
        log_snr = np.asarray(density.schedule.log_snr)[1:]
        inside = (log_snr >= min(self.levels)) & (log_snr <= max(self.levels))
        if not inside.any():
            raise InvalidValueError(
                f"No level of the density has a log-SNR in {self.levels}.",
                fix=f"its levels go from {log_snr[0]:.3g} to {log_snr[-1]:.3g}.",
            )

    def adapt(self, points: Points, density: AnnealedDensity) -> Ladder | None:
        """Return the rungs, with the turns of a round."""
        points = points[np.isfinite(points).all(1)]
        if not len(points):
            return None  # the status says why
        ladder, renewed = ladder_of(points, density, self.levels)
        if not renewed.any():
            return None
        some = jnp.asarray(points[: tuning.RENOISE.pilots], jnp.result_type(float))
        acceptance = np.asarray(_acceptance(density, ladder, some), np.float64)
        turns = chosen_turns(renewed, acceptance, self.number)
        rungs = len(acceptance)
        pilots = len(some) * (1 + rungs * (rungs - 1))
        return dataclasses.replace(
            ladder,
            turns=jnp.asarray(turns),
            piloted=ladder.piloted + -(-pilots // len(points)),
        )

    def move(
        self, run: Run, density: AnnealedDensity, fitted: Ladder, number: Array
    ) -> Run:
        renoising = Renoising(density, Layout.of_density(density), fitted)
        spread = run.spread
        Carry = tuple[KernelState, Array, Array]

        def chain(words: Array, v: Array) -> tuple[Array, Evaluation, Array]:
            words = stream(stream(words, Stream.CLOSING), number)

            def propose(i: Array, carry: Carry) -> Carry:
                state, total, renewed = carry
                turn = fitted.turns[i]
                of_proposal = stream(words, i)
                proposed, log_ratio = renoising.propose(of_proposal, state, turn)
                state, info = accept(of_proposal, proposed, state, log_ratio)
                renews = info.accepted & (fitted.renews[turn] > 0)
                return state, total + info.acceptance, renewed | renews

            carry = (renoising.state(v), jnp.zeros(()), jnp.asarray(False))
            state, total, renewed = jax.lax.fori_loop(
                0, len(fitted.turns), propose, carry
            )
            facts = jnp.stack([renewed, total / len(fitted.turns)])
            return state.position, state.evaluation.without_terms, facts

        points, evaluations, facts = spread.map(chain, run.words, run.chains.position)

        after = spread.on_population(
            genealogy_after_moves, spread.gather(facts), run.ancestors
        )
        chains = Particles(points, evaluations, run.chains.inner)
        return dataclasses.replace(moved_to(run, chains), **after._asdict())

    def evaluations(self, fitted: Ladder) -> int:
        moves = 2 * int(np.sum(np.asarray(fitted.turns)))
        return fitted.piloted + 1 + moves
