"""A seeded generator of random programs with exact answers: hierarchies, factors that
are learned or in closed form, observations, and latents beside a noised site.

A `Shape` is a program without its numbers, and `Shape.case` draws these. Shapes are
drawn family by family; programs of one shape share their compiled code. Nothing is
chosen after a run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from scipy import stats

import composeprob as cp
from composeprob.results.estimates import Estimate
from exact import axis, more_hierarchies
from exact.axis import Mixture, Terms
from exact.case import Answer, Case, schedule, share, single
from exact.grids import log_normal, on_grid
from exact.hierarchies import PRIORS, STRUCTURES, Event, Posterior, log_scale
from exact.networks import factor, noise_at

Generator = np.random.Generator

QUARTER = 0.25
"""Probability of each tail of a hierarchy's latents that is asked for. Of rarer events
64 independent draws are off by more than four of their own errors too often."""


class Shape(NamedTuple):
    """A program without its numbers.

    Attributes:
        family: of the table.
        name: of the program.
        draw: makes the program of random numbers.
    """

    family: str
    name: str
    draw: Callable[[str, Generator], Case]

    def case(self, seed: int, number: int) -> Case:
        """Return the program of this shape with this number."""
        letters = np.frombuffer(f"{self.family}, {self.name}".encode(), np.uint8)
        rng = np.random.default_rng([seed, number, *letters.tolist()])
        return self.draw(f"{self.name}, {number}", rng)


def log_uniform(rng: Generator, low: float, high: float) -> float:
    """Draw a number whose logarithm is uniform."""
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


# ── hierarchies of latents alone ──────────────────────────────────────────────────────
class Hierarchy(NamedTuple):
    """A structure of latents alone: its program, sizes, data, and posterior."""

    program: Callable[[str], Any]
    sizes: tuple[tuple[int, ...], ...]
    data: Callable[[tuple[int, ...], Generator], tuple[np.ndarray, ...]]
    posterior: Callable[[str, tuple[np.ndarray, ...]], Posterior]


def spread(rng: Generator) -> float:
    """Draw the spread of effects, or the noise of data: data may be vague or sharp."""
    return log_uniform(rng, 0.01, 2.0)


def data_of_members(size: tuple[int, ...], rng: Generator) -> tuple[np.ndarray, ...]:
    """Draw one datum a member, with noise that is one for all or each one's own."""
    (members,) = size
    noise = np.full(members, spread(rng))
    if rng.random() < 0.4:
        noise = noise * np.exp(rng.normal(0.0, 1.5, members))
    theta = rng.normal(0.0, 1.0) + spread(rng) * rng.standard_normal(members)
    return theta + noise * rng.standard_normal(members), noise


def data_of_layers(size: tuple[int, ...], rng: Generator) -> tuple[np.ndarray, ...]:
    """Draw members of groups."""
    groups, members = size
    noise = spread(rng)
    centre = rng.normal(0.0, 1.0) + spread(rng) * rng.standard_normal((groups, 1))
    theta = centre + spread(rng) * rng.standard_normal((groups, members))
    y = theta + noise * rng.standard_normal((groups, members))
    return y, np.asarray(noise)


def data_of_crossed(size: tuple[int, ...], rng: Generator) -> tuple[np.ndarray, ...]:
    """Draw effects of rows plus effects of columns."""
    rows, columns = size
    noise = spread(rng)
    row = rng.normal(0.0, 1.0) + spread(rng) * rng.standard_normal((rows, 1))
    column = spread(rng) * rng.standard_normal((1, columns))
    y = row + column + noise * rng.standard_normal((rows, columns))
    return y, np.asarray(noise)


def data_of_readings(size: tuple[int, ...], rng: Generator) -> tuple[np.ndarray, ...]:
    """Draw readings of members, whose noise is unknown."""
    members, readings = size
    theta = rng.normal(0.0, 1.0) + spread(rng) * rng.standard_normal((members, 1))
    return (theta + spread(rng) * rng.standard_normal((members, readings)),)


def data_of_regression(size: tuple[int, ...], rng: Generator) -> tuple[np.ndarray, ...]:
    """Draw inputs, slopes and targets."""
    rows, columns = size
    inputs = rng.standard_normal((rows, columns))
    slopes = spread(rng) * rng.standard_normal(columns)
    return inputs, inputs @ slopes + spread(rng) * rng.standard_normal(rows)


def data_of_counts(size: tuple[int, ...], rng: Generator) -> tuple[np.ndarray, ...]:
    """Draw counts."""
    (members,) = size
    log_rate = rng.normal(0.5, 0.7) + log_uniform(rng, 0.05, 1.0) * rng.standard_normal(
        members
    )
    return (rng.poisson(np.exp(log_rate)).astype(float),)


def of_structure(name: str, sizes: Any, data: Any) -> Hierarchy:
    """Return a hierarchy of `STRUCTURES` with random data."""
    structure = STRUCTURES[name]

    def posterior(prior: str, data: Any) -> Posterior:
        return structure.posterior(prior, data)

    def drawn(size: tuple[int, ...], rng: Generator) -> Any:
        return Observed(*data(size, rng))

    return Hierarchy(structure.program, sizes, drawn, posterior)


class Observed(NamedTuple):
    """Data, and the standard deviation of each given its member."""

    y: np.ndarray
    noise: np.ndarray


MEMBERS = ((5,), (20,), (100,), (300,))
HIERARCHIES = {
    "one layer": of_structure("one layer", MEMBERS, data_of_members),
    "non-centred": of_structure("non-centred", MEMBERS[:3], data_of_members),
    "two layers": of_structure(
        "two layers", ((5, 4), (6, 5), (10, 10)), data_of_layers
    ),
    "crossed": of_structure("crossed", ((5, 4), (6, 5), (10, 10)), data_of_crossed),
    "unknown noise": Hierarchy(
        more_hierarchies.unknown_noise,
        ((5, 3), (8, 4), (30, 5)),
        data_of_readings,
        lambda prior, data: more_hierarchies.unknown_noise_posterior(prior, *data),
    ),
    "regression": Hierarchy(
        more_hierarchies.regression,
        ((40, 5), (40, 20)),
        data_of_regression,
        lambda prior, data: more_hierarchies.regression_posterior(prior, *data),
    ),
    "counts": Hierarchy(
        more_hierarchies.counts,
        ((8,), (30,)),
        data_of_counts,
        lambda prior, data: more_hierarchies.counts_posterior(prior, *data),
    ),
}


def below(events: list[Event], prior: str) -> Callable[[dict[str, Any]], Any]:
    """Return the truth values of events of one sample."""

    def truth(sample: dict[str, Any]) -> Any:
        found = []
        for event in events:
            value = sample[event.name]
            if event.name == "slope":
                value = value[0]
            elif event.name != "mu":
                value = log_scale(value, prior)
            found.append(value < event.threshold)
        return jnp.stack(found)

    return truth


def hierarchies(rng: Generator, number: int) -> list[Shape]:
    """Draw shapes of hierarchies; every structure in turn."""
    shapes = []
    names = list(HIERARCHIES)
    priors = list(PRIORS)
    for place in range(number):
        name = names[place % len(names)]
        hierarchy = HIERARCHIES[name]
        size = hierarchy.sizes[rng.integers(len(hierarchy.sizes))]
        prior = priors[rng.integers(len(priors))]
        shapes.append(hierarchy_shape(name, size, prior))
    return shapes


def hierarchy_shape(name: str, size: tuple[int, ...], prior: str) -> Shape:
    """Return a hierarchy of this structure, size and prior of scales."""
    hierarchy = HIERARCHIES[name]
    program = hierarchy.program(prior)

    def draw(label: str, rng: Generator) -> Case:
        data = hierarchy.data(size, rng)
        arrays = [jnp.asarray(array, jnp.float32) for array in data]

        @functools.cache
        def events() -> list[Event]:
            return hierarchy.posterior(prior, data).events(QUARTER)

        def ask(result: cp.Result) -> Estimate:
            return result.probability(below(events(), prior))

        def exact() -> Answer:
            return Answer(tuple(event.probability for event in events()))

        def compiled() -> cp.AnnealedDensity:
            return cp.compile(program, *arrays)

        return Case(f"hierarchy, {name}", label, compiled, ask, exact)

    shown = " × ".join(map(str, size))
    return Shape(f"hierarchy, {name}", f"{name}, {shown}, {prior}", draw)


# ── compositions of mixtures ──────────────────────────────────────────────────────────
class MixtureNetwork(eqx.Module):
    """The score or the energy of a mixture along the diagonal, as a network has it: the
    library knows neither its modes nor their heights."""

    log_weights: Any  # (J,)
    centres: Any  # (J,), along the diagonal
    widths: Any  # (J,)
    dims: int = eqx.field(static=True)
    energy: bool = eqx.field(static=True)

    def log_density(self, x: Any, log_snr: Any) -> Any:
        """Return log f at a level of noise."""
        alpha, sigma = noise_at(log_snr)
        variance = (alpha * self.widths) ** 2 + sigma**2
        centres = self.centres[:, None] * jnp.full(self.dims, self.dims**-0.5)
        away = jnp.sum((jnp.reshape(x, (1, self.dims)) - alpha * centres) ** 2, axis=1)
        volume = self.dims * jnp.log(2 * jnp.pi * variance)
        return jax.nn.logsumexp(self.log_weights - 0.5 * (away / variance + volume))

    def __call__(self, x: Any, log_snr: Any) -> Any:
        if self.energy:
            return -noise_at(log_snr)[1] * self.log_density(x, log_snr)
        return jax.grad(self.log_density)(x, log_snr)


class Wavy(eqx.Module):
    """An energy of which each level but the noisiest differs from the limit of noisier
    ones by waves that fade as noise grows, as it may after training."""

    exact: MixtureNetwork
    heights: Any  # (M,), in nats
    slopes: Any  # (M,)
    phases: Any  # (M,)
    fading: Any  # (M,): log-SNR at which a wave has half its height

    def waves(self, x: Any, log_snr: Any) -> Any:
        """Return the error of log f."""
        place = jnp.sum(x) * self.exact.dims**-0.5
        each = self.heights * jnp.cos(self.slopes * place + self.phases)
        return jnp.sum(jax.nn.sigmoid(log_snr - self.fading) * each)

    def __call__(self, x: Any, log_snr: Any) -> Any:
        sigma = noise_at(log_snr)[1]
        return self.exact(x, log_snr) - sigma * self.waves(x, log_snr)


FORMS = ("closed form", "score", "energy")
"""Forms of a factor: known to the library, or a network."""


def form_of(name: str) -> Callable[[Mixture, int], Any]:
    """Return what makes the factor of a mixture in this form."""
    if name == "closed form":
        return Mixture.factor
    energy = name == "energy"

    def made(mixture: Mixture, dims: int) -> Any:
        return factor(network_of(mixture, dims, energy), name, dims)

    return made


def network_of(mixture: Mixture, dims: int, energy: bool) -> MixtureNetwork:
    """Return the network of a mixture."""
    arrays = (np.log(mixture.weights), mixture.centres, mixture.widths)
    single_precision = (jnp.asarray(array, jnp.float32) for array in arrays)
    return MixtureNetwork(*single_precision, dims, energy)


def random_mixture(rng: Generator, widths: tuple[float, float]) -> Mixture:
    """Draw two modes on either side of 0."""
    weight = float(rng.uniform(0.1, 0.9))
    centres = float(-rng.uniform(1.0, 2.5)), float(rng.uniform(1.0, 2.5))
    return axis.two(
        weight, centres, (log_uniform(rng, *widths), log_uniform(rng, *widths))
    )


def overlapping_mixture(rng: Generator) -> Mixture:
    """Draw two modes that overlap, between which moves at level 0 lead."""
    weight = float(rng.uniform(0.2, 0.8))
    centres = float(-rng.uniform(0.3, 1.0)), float(rng.uniform(0.3, 1.0))
    return axis.two(
        weight, centres, (log_uniform(rng, 0.6, 1.0), log_uniform(rng, 0.6, 1.0))
    )


def beside(rng: Generator, mixture: Mixture) -> Mixture:
    """Draw a mixture whose modes lie near those of another."""
    near = random_mixture(rng, (0.2, 1.0))
    moved = np.asarray(mixture.centres) + rng.normal(0.0, 0.3, 2)
    return Mixture(near.weights, tuple(moved.tolist()), near.widths)


def wider(rng: Generator, mixture: Mixture) -> Mixture:
    """Draw a mixture that is wider than each mode of another, to divide it by."""
    widest = max(mixture.widths)
    moved = np.asarray(mixture.centres) * rng.uniform(0.5, 1.0, 2)
    widths = widest * rng.uniform(1.3, 2.0, 2)
    weight = float(rng.uniform(0.3, 0.7))
    return Mixture((weight, 1 - weight), tuple(moved.tolist()), tuple(widths.tolist()))


def power(rng: Generator, exponent: float) -> Terms:
    return ((random_mixture(rng, (0.15, 1.0)), exponent),)


def guidance(rng: Generator, scale: float) -> Terms:
    f = random_mixture(rng, (0.25, 0.8))
    return (f, scale), (wider(rng, f), 1.0 - scale)


def conjunction(rng: Generator, number: float) -> Terms:
    first = random_mixture(rng, (0.2, 1.0))
    others = [beside(rng, first) for _ in range(int(number) - 1)]
    return tuple((mixture, 1.0) for mixture in (first, *others))


def negation(rng: Generator, exponent: float) -> Terms:
    f = random_mixture(rng, (0.25, 0.8))
    return (f, 1.0), (wider(rng, f), -exponent)


COMPOSITIONS: dict[str, tuple[Callable[[Generator, float], Terms], tuple]] = {
    "power": (power, (2.0, 3.0, 5.0)),
    "guidance": (guidance, (2.0, 3.0, 5.0)),
    "AND": (conjunction, (2.0, 3.0)),
    "negation": (negation, (0.3, 0.7)),
}
"""Compositions, and their exponents, or numbers of factors."""


def compositions(rng: Generator, number: int, forms: tuple[str, ...]) -> list[Shape]:
    """Draw shapes of compositions; every composition in turn."""
    shapes = []
    names = list(COMPOSITIONS)
    for place in range(number):
        name = names[place % len(names)]
        _, exponents = COMPOSITIONS[name]
        exponent = float(rng.choice(exponents))
        form = forms[rng.integers(len(forms))]
        dims = int(rng.choice([1, 1, 2, 4]))
        shapes.append(composition_shape(name, exponent, form, dims))
    return shapes


def composition_shape(name: str, exponent: float, form: str, dims: int) -> Shape:
    """Return a composition in this form."""
    terms_of, _ = COMPOSITIONS[name]
    kind = "closed form" if form == "closed form" else "learned"
    family = f"{kind}, {name}"

    def draw(label: str, rng: Generator) -> Case:
        terms = terms_of(rng, exponent)
        return axis.along(family, label, terms, dims, form=form_of(form))

    return Shape(family, f"{name} {exponent:g}, {form}, d = {dims}", draw)


# ── energies whose levels disagree ────────────────────────────────────────────────────
def disagreements(rng: Generator, number: int) -> list[Shape]:
    """Draw energies, and products of two, whose levels disagree."""
    shapes = []
    for place in range(number):
        waves = int(rng.integers(2, 5))
        shapes.append(disagreement_shape(1 + place % 2, waves))
    return shapes


def disagreement_shape(factors: int, waves: int) -> Shape:
    """Return so many energies whose levels disagree by so many waves each."""
    family = "learned, levels disagree"

    def draw(label: str, rng: Generator) -> Case:
        # How high separated modes are is not what score matching teaches an energy.
        mixtures = [overlapping_mixture(rng) for _ in range(factors)]
        networks = [wavy(mixture, waves, rng) for mixture in mixtures]
        log_snr = float(schedule().log_snr[0])
        alpha, sigma = map(float, (schedule().alpha[0], schedule().sigma[0]))

        def log_joint(x: np.ndarray) -> np.ndarray:
            total = np.zeros_like(x)
            for mixture, network in zip(mixtures, networks, strict=True):
                total += mixture.log_density(x, np.zeros(1), 1, alpha, sigma)
                at_level_0 = jax.vmap(lambda x, net=network: net.waves(x, log_snr))
                total += np.asarray(at_level_0(jnp.asarray(x, jnp.float32)), float)
            return total

        def exact() -> Answer:
            found = on_grid(
                (-9.0, 9.0, 40_000), log_joint=log_joint, inside=lambda x: x < 0
            )
            return Answer(found.value)  # an energy has no normaliser

        def compiled() -> cp.AnnealedDensity:
            return cp.compile(
                single, cp.product(*(factor(each, "energy", 1) for each in networks))
            )

        return Case(family, label, compiled, share(lambda s: s["x"] < 0), exact)

    return Shape(family, f"{factors} energies of {waves} waves", draw)


def wavy(mixture: Mixture, waves: int, rng: Generator) -> Wavy:
    """Draw the errors of an energy."""
    heights = rng.normal(0.0, 0.4, waves)
    slopes = rng.uniform(0.3, 3.0, waves)
    phases = rng.uniform(0.0, 2 * np.pi, waves)
    fading = rng.uniform(-2.0, 6.0, waves)
    arrays = (jnp.asarray(a, jnp.float32) for a in (heights, slopes, phases, fading))
    return Wavy(network_of(mixture, 1, energy=True), *arrays)


# ── observations, and latents beside a noised site ────────────────────────────────────
@cp.program
def normal_data(f: Any, y: Any, noise: Any) -> None:
    x = cp.sample("x", f)
    cp.observe("y", dist.Normal(x, noise), y)


@cp.program
def squared_data(f: Any, y: Any, noise: Any) -> None:
    x = cp.sample("x", f)
    cp.observe("y", dist.Normal(x**2, noise), y)


@cp.program
def heavy_data(f: Any, y: Any, noise: Any) -> None:
    x = cp.sample("x", f)
    cp.observe("y", dist.StudentT(3.0, x, noise), y)


@cp.program
def count_data(f: Any, y: Any, noise: Any) -> None:
    x = cp.sample("x", f)
    cp.observe("y", dist.Poisson(jnp.exp(x)), y)


@cp.program
def binary_data(f: Any, y: Any, noise: Any) -> None:
    x = cp.sample("x", f)
    cp.observe("y", dist.Bernoulli(logits=x / noise), y)


Likelihood = Callable[[np.ndarray, float, float], np.ndarray]


def log_binary(x: np.ndarray, y: float, noise: float) -> np.ndarray:
    return -np.logaddexp(0.0, (1 - 2 * y) * x / noise)


OBSERVED: dict[str, tuple[Any, Likelihood]] = {
    "normal": (normal_data, lambda x, y, s: log_normal(y, x, s)),
    "squared": (squared_data, lambda x, y, s: log_normal(y, x**2, s)),
    "heavy tails": (heavy_data, lambda x, y, s: stats.t.logpdf(y, 3.0, x, s)),
    "count": (count_data, lambda x, y, s: stats.poisson.logpmf(y, np.exp(x))),
    "binary": (binary_data, log_binary),
}
"""Programs of one datum, and its log-likelihood at x, y and the noise."""


def datum(name: str, x: float, noise: float, rng: Generator) -> float:
    """Draw a datum of x."""
    if name == "count":
        return float(rng.poisson(np.exp(x)))
    if name == "binary":
        return float(rng.random() < 1 / (1 + np.exp(-x / noise)))
    centre = x**2 if name == "squared" else x
    return float(centre + noise * rng.standard_normal())


def draw_from(mixture: Mixture, rng: Generator) -> float:
    """Draw a number of a mixture."""
    chosen = rng.choice(len(mixture.weights), p=mixture.weights)
    return float(rng.normal(mixture.centres[chosen], mixture.widths[chosen]))


def observations(rng: Generator, number: int) -> list[Shape]:
    """Draw programs of one datum; every likelihood in turn."""
    names = list(OBSERVED)
    shapes = []
    for place in range(number):
        form = FORMS[rng.integers(len(FORMS))]
        shapes.append(observed_shape(names[place % len(names)], form))
    return shapes


def observed_shape(name: str, form: str) -> Shape:
    """Return a mixture and a datum of it."""
    program, log_likelihood = OBSERVED[name]
    family = "observation"

    def draw(label: str, rng: Generator) -> Case:
        mixture = random_mixture(rng, (0.3, 1.0))
        noise = log_uniform(rng, 0.1, 1.5)
        y = datum(name, draw_from(mixture, rng), noise, rng)
        alpha, sigma = map(float, (schedule().alpha[0], schedule().sigma[0]))

        def exact() -> Answer:
            def log_joint(x: np.ndarray) -> np.ndarray:
                prior = mixture.log_density(x, np.zeros(1), 1, alpha, sigma)
                return prior + log_likelihood(x, y, noise)

            return on_grid(
                (-9.0, 9.0, 40_000), log_joint=log_joint, inside=lambda x: x < 0
            )

        def compiled() -> cp.AnnealedDensity:
            arguments = jnp.float32(y), jnp.float32(noise)
            return cp.compile(program, form_of(form)(mixture, 1), *arguments)

        return Case(family, label, compiled, share(lambda s: s["x"] < 0), exact)

    return Shape(family, f"{name}, {form}", draw)


@cp.program
def with_scale(f: Any, y: Any) -> None:
    x = cp.sample("x", f)
    s = cp.sample("s", dist.LogNormal(-0.7, 0.8))
    cp.observe("y", dist.Normal(x, s).expand(y.shape).to_event(1), y)


@cp.program
def with_half_normal(f: Any, y: Any) -> None:
    x = cp.sample("x", f)
    s = cp.sample("s", dist.HalfNormal(1.0))
    cp.observe("y", dist.Normal(x, s).expand(y.shape).to_event(1), y)


@cp.program
def with_offset(f: Any, y: Any) -> None:
    x = cp.sample("x", f)
    s = cp.sample("s", dist.Normal(0.0, 1.0))
    cp.observe("y", dist.Normal(x + s, 0.3).expand(y.shape).to_event(1), y)


def log_scaled(y: np.ndarray, x: np.ndarray, z: np.ndarray) -> np.ndarray:
    return sum(log_normal(each, x, np.exp(z)) for each in y)


LATENT: dict[str, tuple[Any, Any, Any, Any]] = {
    "log-normal scale": (
        with_scale,
        (-6.0, 4.0),
        lambda z: log_normal(z, -0.7, 0.8),
        log_scaled,
    ),
    "half-normal scale": (
        with_half_normal,
        (-9.0, 2.0),
        lambda z: stats.halfnorm.logpdf(np.exp(z)) + z,
        log_scaled,
    ),
    "offset": (
        with_offset,
        (-6.0, 6.0),
        lambda z: log_normal(z, 0.0, 1.0),
        lambda y, x, z: sum(log_normal(each, x + z, 0.3) for each in y),
    ),
}
"""Programs of a latent: the range of its coordinate z, the log-prior, and the
log-likelihood of data."""


def latents(rng: Generator, number: int) -> list[Shape]:
    """Draw programs of a latent beside a noised site; every one in turn."""
    names = list(LATENT)
    shapes = []
    for place in range(number):
        form = FORMS[rng.integers(len(FORMS))]
        readings = int(rng.choice([2, 5, 10]))
        shapes.append(latent_shape(names[place % len(names)], form, readings))
    return shapes


def latent_shape(name: str, form: str, readings: int) -> Shape:
    """Return a mixture, a latent, and readings of both."""
    program, reach, log_prior, log_likelihood = LATENT[name]
    family = "latent beside a noised site"

    def draw(label: str, rng: Generator) -> Case:
        mixture = random_mixture(rng, (0.3, 1.0))
        x = draw_from(mixture, rng)
        noise = log_uniform(rng, 0.2, 1.5)
        if name == "offset":
            x += rng.standard_normal()
            noise = 0.3
        y = x + noise * rng.standard_normal(readings)
        alpha, sigma = map(float, (schedule().alpha[0], schedule().sigma[0]))

        def log_joint(x: np.ndarray, z: np.ndarray) -> np.ndarray:
            prior = mixture.log_density(x, np.zeros(1), 1, alpha, sigma)
            return prior + log_prior(z) + log_likelihood(y, x, z)

        def exact() -> Answer:
            return on_grid(
                (-9.0, 9.0, 1800),
                (*reach, 600),
                log_joint=log_joint,
                inside=lambda x, z: (x < 0) & (z < 100),
            )

        def compiled() -> cp.AnnealedDensity:
            data = jnp.asarray(y, jnp.float32)
            return cp.compile(program, form_of(form)(mixture, 1), data)

        return Case(family, label, compiled, share(lambda s: s["x"] < 0), exact)

    return Shape(family, f"{name}, {form}, {readings} readings", draw)


# ── all ───────────────────────────────────────────────────────────────────────────────
def shapes(seed: int, number: int) -> list[Shape]:
    """Draw the shapes of a series, about ``number`` of each of six groups."""
    rng = np.random.default_rng(seed)
    return [
        *hierarchies(rng, number),
        *compositions(rng, number, FORMS[1:]),
        *compositions(rng, -(-number // 3), FORMS[:1]),
        *disagreements(rng, -(-number // 3)),
        *observations(rng, number),
        *latents(rng, number),
    ]
