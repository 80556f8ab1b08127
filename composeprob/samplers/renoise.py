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
from jaxtyping import Bool, Float, Int, UInt32

from composeprob import tuning
from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Evaluation
from composeprob.errors import CapabilityError, InvalidValueError
from composeprob.kernels import KernelState
from composeprob.kernels.kernel import Info
from composeprob.kernels.metropolis import log_density_ratio, log_uniform, metropolis
from composeprob.samplers.finishers import Points
from composeprob.samplers.layout import Layout
from composeprob.samplers.random import Stream, normals, stream
from composeprob.schedule import Noise


class Ladder(eqx.Module):
    """Levels of a density where chains turn, and its reverse steps between them.

    Attributes:
        levels: the levels of its rungs, from level 0 up.
        narrowing: for each rung and entry the variance of the reverse step from there
            to the rung below, over the variance that this step takes away; None where
            each chain's own score tells it.
        turns: the rung where each proposal of a round turns.
        renews: for each rung, whether a move that turns there forgets where it began.
        piloted: evaluations that measuring all this took, for each chain.
    """

    levels: Int[Array, " rungs"]
    narrowing: Float[Array, "rungs dims"] | None
    turns: Int[Array, " proposals"]
    renews: Float[Array, " rungs"]
    piloted: int = eqx.field(static=True, default=0)
    # The program with constant exponents, if those of the density grow by what chains
    # carry: the rates along a way up would lack that part.
    untracked: AnnealedDensity | None = None


class OneFactor(NamedTuple):
    """One factor of a program, whose reverse steps are made.

    Attributes:
        number: its place in `Described.experts`.
        site: the noised site that it is a density of.
    """

    number: int
    site: str


class Stop(NamedTuple):
    """A place on a way: a chain at a rung, and what reverse steps from there need.

    Attributes:
        position: the vector v.
        drift: that of the reverse process in y.
        rate: the Feynman–Kac rate; 0 of a single factor.
        others: log-density of the other factors, where one factor makes the steps by
            its score alone; else 0.
        evaluation: of the density, with its terms; None where one factor makes the
            steps.
    """

    position: Float[Array, " size"]
    drift: Float[Array, " dims"]
    rate: Float[Array, ""]
    others: Float[Array, ""]
    evaluation: Evaluation | None


class LadderStep(NamedTuple):
    """A step of a way up to a rung and down again, between two rungs."""

    up: Bool[Array, ""]
    rung: Int[Array, ""]
    next_rung: Int[Array, ""]


def ladder_step(step: Array, turn: Array | int) -> LadderStep:
    """Return one of the 2·turn steps of a way from the lowest rung and back."""
    up = step < turn
    rung = jnp.where(up, step, 2 * turn - step)
    return LadderStep(up, rung, jnp.where(up, rung + 1, rung - 1))


class Excursion(NamedTuple):
    """The end of the ways up and down of a chain.

    Attributes:
        state: the proposal y, evaluated at level 0 with its density terms.
        log_steps: Σ of `log_edge`, along the way down less along the way up.
        log_others: what the log-density of the other factors gained, where one factor
            makes the steps by its score alone.
    """

    state: KernelState
    log_steps: Float[Array, ""]
    log_others: Float[Array, ""]


class Renoising(NamedTuple):
    """Proposals of one density: up its ladder and down again.

    Attributes:
        density: whose level at the lowest rung is the target.
        layout: of its positions.
        ladder: its rungs.
        factor: the factor whose reverse steps are made; None for those of the whole
            program.
        moves: whether each noised entry is moved; None for all.
    """

    density: AnnealedDensity
    layout: Layout
    ladder: Ladder
    factor: OneFactor | None = None
    moves: Bool[Array, " dims"] | None = None

    @property
    def by_values(self) -> bool:
        """True if the ratio is of log-densities, False if of the integrals of rates."""
        return "energy" in self.density.capabilities

    @property
    def beside_steps(self) -> int:
        """Evaluations of a proposal beside those of its steps: one factor's end where
        the program is evaluated, and by scores it is asked of their start too."""
        if self.factor is None:
            return 0
        return 1 if self.by_values else 2

    def evaluate(self, v: Float[Array, " size"], rung: Array | int) -> Evaluation:
        """Evaluate the density at one chain, with its terms."""
        return self.layout.evaluate(self.density, v, self.ladder.levels[rung])

    def state(self, v: Float[Array, " size"]) -> KernelState:
        """Return a chain at the lowest rung, evaluated."""
        return KernelState(v, self.evaluate(v, 0))

    def stop(self, v: Float[Array, " size"], rung: Array | int) -> Stop:
        """Return a chain at a rung, with one evaluation."""
        if self.factor is None:
            return self.stopped(KernelState(v, self.evaluate(v, rung)))
        level = self.ladder.levels[rung]
        alpha = self.density.schedule.at(level).alpha
        position = self.layout.position(v, alpha)
        values = self.density.evaluator.expert_values(position, level)
        number, site = self.factor
        entries = self.layout.entries((site,))
        drift = jnp.zeros(self.layout.dims)
        drift = drift.at[entries].set(alpha * values[number].total)
        others = jnp.zeros(())
        if not self.by_values:
            for i, value in enumerate(values):
                if i != number:
                    others = others + jnp.sum(value.log_density)
        return Stop(v, drift, jnp.zeros(()), others, None)

    def stopped(self, state: KernelState) -> Stop:
        """Return the stop of a chain that is evaluated with its terms."""
        terms = state.evaluation.terms
        zero = jnp.zeros(())
        return Stop(state.position, terms.drift, terms.rate, zero, state.evaluation)

    def propose(
        self, words: UInt32[Array, " 2"], state: KernelState, turn: Int[Array, ""]
    ) -> tuple[KernelState, Float[Array, ""]]:
        """Return the proposal of one chain, and the logarithm of π(y)·Q/π(x).

        Args:
            words: the random words of this proposal.
            state: the chain at the lowest rung, evaluated with its terms.
            turn: the rung where it turns.
        """
        excursion = self.excursion(words, state, turn)
        log_quotient = self.log_quotient(state, excursion)
        return excursion.state, log_quotient + self.log_rest(state, excursion.state)

    def excursion(
        self, words: UInt32[Array, " 2"], state: KernelState, turn: Int[Array, ""] | int
    ) -> Excursion:
        """Go up to a rung and down again; 2·turn evaluations, in one loop."""
        return self.walk(words, self.first_stop(state), turn, jnp.zeros_like(turn))

    def first_stop(self, state: KernelState) -> Stop:
        """Return the stop where a way up begins; by values its place alone is read."""
        v = state.position
        if self.factor is None and state.evaluation.terms is None:
            unread = self.layout.unevaluated(self.density)
            return self.stopped(KernelState(v, unread))
        if self.factor is None:
            return self.stopped(state)
        if self.by_values:
            zero = jnp.zeros(())
            return Stop(v, jnp.zeros((self.layout.dims,)), zero, zero, None)
        return self.stop(v, 0)

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
        first = self.stopped(KernelState(start, at_start))
        excursion = self.walk(words, first, top, top)
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
        start: Stop,
        turn: Int[Array, ""] | int,
        first: Int[Array, ""] | int,
    ) -> Excursion:
        """Go up to a rung and down again, from the step ``first`` of the 2·turn on."""
        d = self.layout.dims
        schedule = self.density.schedule
        Carry = tuple[Stop, Array]

        def step(i: Array, carry: Carry) -> Carry:
            here, log_steps = carry
            up, rung, next_rung = ladder_step(i, turn)
            upper = jnp.maximum(rung, next_rung)
            high = schedule.at(self.ladder.levels[upper])
            low = schedule.at(self.ladder.levels[upper - 1])
            taken = self.taken(high, low)
            v = here.position
            z = normals(words, i, d, v.dtype)
            y = v[:d]
            noised = y + jnp.sqrt(taken) * z
            variance = self.variance(here, upper, taken)
            denoised = y + taken * here.drift + jnp.sqrt(variance) * z
            moved = jnp.where(up, noised, denoised)
            there = self.stop(jnp.concatenate([moved, v[d:]]), next_rung)
            ends = here, there
            below, above = jax.tree.map(partial(jnp.where, up), ends, ends[::-1])
            along = self.log_edge(below, above, low, high, upper)
            return there, log_steps + jnp.where(up, -along, along)

        carry = (start, jnp.zeros(()))
        end, log_steps = jax.lax.fori_loop(first, 2 * turn, step, carry)
        if end.evaluation is None:
            state = self.state(end.position)
        else:
            state = KernelState(end.position, end.evaluation)
        return Excursion(state, log_steps, end.others - start.others)

    def taken(self, high: Noise, low: Noise) -> Float[Array, " dims"]:
        """Return the variance in y that a reverse step takes away at each entry; 0 of
        entries that stay."""
        # Of two rungs at one level compiled code may leave a difference that is not 0:
        # its root would be NaN, or its density that of rounding.
        same = high.index == low.index
        difference = jnp.where(same, 0.0, high.variance - low.variance)
        taken = jnp.full((self.layout.dims,), difference)
        if self.moves is None:
            return taken
        return jnp.where(self.moves, taken, 0.0)

    def variance(
        self, above: Stop, rung: Array, taken: Float[Array, " dims"]
    ) -> Float[Array, " dims"]:
        """Return the variance of the reverse step from a stop."""
        narrowing = self.ladder.narrowing
        if narrowing is not None:
            return taken * narrowing[rung]
        # Without a population the stop's own score tells the mean of S² over its
        # entries. The step depends on its start alone, so that its density is known on
        # both ways. Where a test corrects it, entries of data of variance 1 steady it;
        # where none does, the variance has to be right on average.
        high = self.density.schedule.at(self.ladder.levels[rung]).variance
        few = tuning.RENOISE.pseudo_entries
        if not self.by_values:
            few = 0
        moved = taken > 0
        squares = jnp.sum(jnp.where(moved, above.drift**2, 0.0))
        # Two rungs may be one level, where nothing moves.
        known = jnp.maximum(jnp.sum(moved) + few, 1)
        mean = (squares + few / (1 + high)) / known
        least = 1 - taken / high
        return taken * jnp.clip(1 - taken * mean, least, 1.0)

    def log_edge(
        self, below: Stop, above: Stop, low: Noise, high: Noise, upper: Array
    ) -> Float[Array, ""]:
        """Return log q(above | below) − log r(below | above) of one step; by scores
        ∫R dτ, by the trapezoid rule."""
        if not self.by_values:
            # Per unit of log-SNR the rate is s·R.
            rates = low.variance * below.rate + high.variance * above.rate
            return 0.5 * rates * (low.log_snr - high.log_snr)
        d = self.layout.dims
        y = below.position[:d]
        z = above.position[:d]
        taken = self.taken(high, low)
        forth = _log_normal(z - y, taken)
        back = _log_normal(
            y - z - taken * above.drift, self.variance(above, upper, taken)
        )
        return forth - back

    def log_quotient(
        self, state: KernelState, excursion: Excursion
    ) -> Float[Array, ""]:
        """Return the logarithm of f(y)·Q/f(x), with f the factors whose reverse steps
        the proposal made; 0 where these are exact."""
        if not self.by_values:
            return excursion.log_steps + excursion.log_others
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
        rest = log_there - here.log_potential - here.log_prior
        if self.factor is None:
            return rest
        # The steps of one factor know nothing of exact observations.
        return rest + there.log_exact - here.log_exact


def _log_normal(
    away: Float[Array, " dims"], variance: Float[Array, " dims"]
) -> Float[Array, ""]:
    """Return the log-density of independent normal numbers, without its constant; those
    of variance 0 are left out."""
    moved = variance > 0
    width = jnp.where(moved, variance, 1.0)
    terms = away**2 / width + jnp.log(width)
    return -0.5 * jnp.sum(jnp.where(moved, terms, 0.0))


def accept(
    words: UInt32[Array, " 2"],
    proposed: KernelState,
    state: KernelState,
    log_ratio: Float[Array, ""],
    log_target_ratio: Float[Array, ""] | float = math.nan,
) -> tuple[KernelState, Info]:
    """Accept or reject the proposal of one chain, which `Renoising.propose` made with
    these words; ``log_target_ratio`` is log π(y) − log π(x) where it is known."""
    log_u = log_uniform(normals(stream(words, Stream.STATES), 0, 1)[0])
    known = jnp.asarray(log_target_ratio)
    return metropolis(log_u, log_ratio, proposed, state, known)


def ladder_of(
    points: Points,
    density: AnnealedDensity,
    within: tuple[float, float] | None = None,
    factor: OneFactor | None = None,
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
        factor: whose reverse steps are made; left out, those of the whole program.
    """
    layout = Layout.of_density(density)
    log_snr = np.asarray(density.schedule.log_snr, np.float64)
    levels = levels_of_rungs(log_snr, longest_step(density))
    some = points[: tuning.RENOISE.pilots]
    blank = Ladder(
        levels=jnp.asarray(levels, jnp.int32),
        narrowing=None,
        turns=jnp.zeros((0,), jnp.int32),
        renews=jnp.zeros((len(levels),)),
    )
    squares = _mean_squares(
        Renoising(density, layout, blank, factor),
        jnp.asarray(some, jnp.result_type(float)),
    )
    s = np.exp(-log_snr[levels])
    taken = np.diff(s, prepend=s[0])[:, None]
    least = least_narrowing(s)[:, None]
    narrowing = np.clip(1 - taken * np.asarray(squares, np.float64), least, 1.0)
    variance = np.var(points[:, : layout.dims], axis=0, dtype=np.float64)
    moved = np.arange(layout.dims)
    if factor is not None:
        moved = layout.entries((factor.site,))
    renewed = np.mean(s[:, None] / (variance[moved] + s[:, None]), axis=1)
    # Other sites stay where they are, so that no move forgets these. Along the axis of
    # separated modes chains vary more than their entries do, and remember longest.
    whole = layout.size == len(moved)
    longest = s / (greatest_variance(points[:, moved]) + s)
    renews = whole & (longest >= 1 - tuning.RENOISE.memory)
    allowed = np.arange(len(levels)) > 0
    if within is not None:
        places = log_snr[levels]
        allowed &= (places >= min(within)) & (places <= max(within))
    ladder = dataclasses.replace(
        blank,
        narrowing=jnp.asarray(narrowing, jnp.result_type(float)),
        renews=jnp.asarray(renews, jnp.result_type(float)),
        piloted=-(-len(some) * len(levels) // len(points)),
    )
    return ladder, np.where(allowed, renewed, 0.0)


def levels_of_rungs(log_snr: Float[np.ndarray, " levels"], spacing: float) -> list[int]:
    """Return levels from level 0 up that are at least ``spacing`` apart in log-SNR, and
    the noisiest one."""
    levels = [0]
    for level in range(1, len(log_snr)):
        noisiest = level == len(log_snr) - 1
        if noisiest or log_snr[levels[-1]] - log_snr[level] >= spacing:
            levels.append(level)
    return levels


def greatest_variance(points: Float[np.ndarray, "n dims"]) -> float:
    """Return the variance of points along the direction where it is greatest."""
    count = min(len(points), tuning.MIXTURE.most_points)
    chosen = np.linspace(0, len(points) - 1, count).astype(int)
    some = points[chosen].astype(np.float64)
    return float(np.linalg.norm(some - some.mean(0), 2) ** 2 / count)


def least_narrowing(s: Float[np.ndarray, " rungs"]) -> Float[np.ndarray, " rungs"]:
    """Return (c + s)/(c + s + Δ) of each rung where c, the variance of the data, is 0:
    no reverse step is narrower."""
    return np.append(1.0, s[:-1] / s[1:])


def longest_step(density: AnnealedDensity) -> float:
    """Return the least distance of two rungs in log-SNR: less where scores alone make
    the steps, whose error no test corrects."""
    if "energy" in density.capabilities:
        return tuning.RENOISE.spacing
    return tuning.RENOISE.spacing_by_score


@eqx.filter_jit
def _mean_squares(
    renoising: Renoising, points: Float[Array, "n size"]
) -> Float[Array, "rungs dims"]:
    """Mean squares of the score in y, over points with the noise of each rung."""
    d = renoising.layout.dims
    schedule = renoising.density.schedule
    levels = renoising.ladder.levels
    start = schedule.at(0).variance
    noise = jax.random.normal(jax.random.key(0), (len(points), d))
    # Every level takes the same noise: if its mean square were that of few draws, all
    # narrowings would be off in one direction, which a narrow law cannot bear.
    noise = noise / jnp.sqrt(jnp.mean(noise**2, axis=0))

    def at_rung(rung: Array) -> Array:
        width = jnp.sqrt(schedule.at(levels[rung]).variance - start)

        def of_chain(v: Array, z: Array) -> Array:
            v = v.at[:d].add(width * z)
            return renoising.stop(v, rung).drift ** 2

        squares = jax.vmap(of_chain)(points, noise)
        # A chain without a finite score tells nothing.
        return jnp.nanmean(jnp.where(jnp.isfinite(squares), squares, jnp.nan), axis=0)

    return jnp.nan_to_num(jax.lax.map(at_rung, jnp.arange(len(levels))))


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
def acceptance_by_rung(
    renoising: Renoising, points: Float[Array, "n size"]
) -> Float[Array, " rungs"]:
    """Mean acceptance of proposals that turn at each rung."""
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

    return jax.lax.map(of_rung, jnp.arange(len(renoising.ladder.levels)))


def one_factor(
    density: AnnealedDensity, name: str | None, above: bool = False
) -> OneFactor | None:
    """Return the factor of this name; refuse names of no factor, and one whose rest is
    unknown.

    Args:
        density: of the program.
        name: as the program's text prints it, ``"f(x)"`` or ``"f"``; None for none.
        above: whether its steps are made at levels above 0 too.
    """
    if name is None:
        return None
    where = density.described.where
    experts = density.described.experts
    names = [expert.name for expert in experts]
    short = [printed.split("(")[0] for printed in names]
    if name not in names + short:
        known = ", ".join(map(repr, short)) or "none"
        raise InvalidValueError(
            f"Renoise(factor={name!r}) names no factor that is a density of a noised "
            f"site; there are: {known}.",
            where=where,
            fix="name one of these, or leave factor out.",
        )
    if names.count(name) + short.count(name) > 1 and name not in names:
        raise InvalidValueError(
            f"Renoise(factor={name!r}) names more than one factor: "
            f"{', '.join(map(repr, names))}.",
            where=where,
            fix="name it with its site, or give the factors other names.",
        )
    number = names.index(name) if name in names else short.index(name)
    if "energy" not in density.capabilities:
        _check_rest(density, number, above)
    return OneFactor(number, experts[number].site)


def _check_rest(density: AnnealedDensity, number: int, above: bool) -> None:
    """Refuse a factor beside which the rest of a program has no log-density."""
    experts = density.described.experts
    own = experts[number]
    noised = []
    for name, _, offers in density.described.offers:
        if "exact_marginals" in offers:
            noised.append((name, offers))
    # Each leaf by itself: those of a mixture are one expert.
    product = [name for name, _ in noised] == [expert.name for expert in experts]
    lacking = []
    for i, (name, offers) in enumerate(noised):
        if i != number and "energy" not in offers:
            lacking.append(name)
    powers = [expert.power for expert in experts]
    whole = own.power == 1 and own.rows == 1
    plain = all(power == 1 for power in powers) or not above
    if product and not lacking and whole and plain:
        return
    found = "the program is not a product of it and of log-densities"
    if lacking:
        found = f"{lacking[0]!r} offers only its score"
    elif product and not whole:
        found = f"its power is {own.power:g}, or it stands for several rows"
    elif product:
        found = "powers other than 1 grow from level to level"
    raise CapabilityError(
        f"cp.Renoise(factor={own.name!r}) accepts by the log-density of all other "
        f"factors, and {found}.",
        where=density.described.where,
        fix="leave factor= out, so that the steps are those of the whole program.",
    )


def check_noised(density: AnnealedDensity) -> None:
    """Refuse programs without noised sites, or without a ratio to accept by."""
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


def check_levels(density: AnnealedDensity, levels: tuple[float, float] | None) -> None:
    """Refuse a range of log-SNR without a level above 0."""
    if levels is None:
        return
    log_snr = np.asarray(density.schedule.log_snr)[1:]
    inside = (log_snr >= min(levels)) & (log_snr <= max(levels))
    if not inside.any():
        raise InvalidValueError(
            f"No level of the density has a log-SNR in {levels}.",
            fix=f"its levels go from {log_snr[0]:.3g} to {log_snr[-1]:.3g}.",
        )
