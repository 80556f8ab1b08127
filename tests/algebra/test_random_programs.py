"""200 random programs against references written down from the definitions: log-density
and score, float64.

Where exponents grow as noise falls, the definition is that of docs/architecture.md,
written out once more in `paths`.
"""

import functools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import composeprob as cp
import references as ref
from composeprob.errors import ImproperError
from composeprob.factors.factor import Factor
from sampling_cases import learned, single, slow

pytestmark = pytest.mark.usefixtures("double_precision")

DEPTH = 4
COMPONENTS = 3
PROGRAMS = 200
QUICK = 28  # programs that a quick run evaluates


@dataclass(eq=False)
class Term:
    """A factor of a product that is not a product itself.

    Attributes:
        meaning: log f, given σ²/α² of level 0, from which on exponents in it are
            constant; given None they are constant at all levels.
        power: its power of noise at each entry of the event.
        closed_form: whether every factor in it has a closed-form log-density at every
            level, so that its exponent may grow.
        kind: leaves, and products over data, are merged with themselves; mixtures are
            not. The exponent of a product over data counts as that of the factor in it.
    """

    meaning: Callable[[float | None], ref.Reference]
    power: np.ndarray
    closed_form: bool
    kind: str = "leaf"


Terms = list[tuple[Term, float]]


def times(*parts: tuple[Terms, float]) -> Terms:
    """Π_i part_i^{w_i} as factors that are not products, each with its exponent."""
    merged: Terms = []
    for terms, power in parts:
        for term, inner in terms:
            exponent = power * inner
            if term.kind != "mixture":
                exponent += sum(w for other, w in merged if other is term)
                merged = [(other, w) for other, w in merged if other is not term]
            merged.append((term, exponent))
    return [(term, w) for term, w in merged if abs(w) > 1e-12]


def total(terms: Terms) -> np.ndarray:
    """The power of noise at each entry, at level 0."""
    return sum(w * term.power for term, w in terms)


class Path(NamedTuple):
    """e and κ of an exponent that grows: w_k = e + (w − e)/(1 + κ·s_k)."""

    start: float
    sharpness: float


def paths(exponents: list[float], powers: list[np.ndarray]) -> list[Path]:
    """Paths of the exponents of all factors, of powers of noise at each entry."""
    powers = [power.ravel() for power in powers]
    entries = range(powers[0].size)
    factors = range(len(exponents))
    counted = [[exponents[i] * p for p in powers[i]] for i in factors]
    multiplies = [i for i in factors if max(counted[i]) > 0]
    divides = [i for i in factors if min(counted[i]) < 0]
    entries_of = [[j for j in entries if powers[i][j] != 0] for i in factors]
    start = list(exponents)
    for i in multiplies:
        start[i] = min(exponents[i], 1.0)

    def multiplied(j):
        return sum(start[i] * powers[i][j] for i in multiplies)

    # Where all that multiplies sums to less than 1, it starts at 1 in sum.
    most = {i: max(multiplied(j) for j in entries_of[i]) for i in multiplies}
    for i, power in most.items():
        if power < 1:
            start[i] = min(start[i] / power, 1.0)
    # Divisors start at the share that leaves a power of 1 at each entry.
    divided = [-sum(counted[i][j] for i in divides) for j in entries]
    left = [multiplied(j) - 1 for j in entries]
    for i in divides:
        shares = [left[j] / divided[j] for j in entries_of[i] if divided[j] > 0]
        start[i] = min(max(min(shares, default=1.0), 0.0), 1.0) * exponents[i]
    sharpness = dict.fromkeys(factors, 1.0)
    for i in multiplies:
        if i not in divides:
            sharpness[i] = exponents[i] / start[i]
    # Divisors grow as fast as the fastest factor.
    fastest = max([1.0, *sharpness.values()])
    sharpness |= dict.fromkeys(divides, fastest)
    return [Path(start[i], sharpness[i]) for i in factors]


def meaning(terms: Terms, clean: float | None) -> ref.Reference:
    """The product of the terms, with exponents that grow as noise falls to that of
    level 0, where they can."""
    logs = []
    exponents = []
    powers = []
    for term, exponent in terms:
        outside = exponent
        inside = 1.0
        if term.kind == "over":
            outside = 1.0
            inside = exponent
        logs.append(ref.product([term.meaning(clean)], [inside]))
        exponents.append(outside)
        powers.append(inside * term.power)
    if clean is None or set(exponents) == {1.0}:
        return ref.product(logs, exponents)
    growth = paths(exponents, powers)
    for (term, _), path, exponent in zip(terms, growth, exponents, strict=True):
        start, _ = path
        if abs(start - exponent) > 1e-9 and not term.closed_form:
            return ref.product(logs, exponents)

    def log_density(x: np.ndarray, alpha: float, sigma: float) -> complex:
        s = sigma**2 / alpha**2 - clean
        grown = [
            e + (w - e) / (1 + kappa * s)
            for (e, kappa), w in zip(growth, exponents, strict=True)
        ]
        return ref.product(logs, grown)(x, alpha, sigma)

    return log_density


def leaf(reference: ref.Reference, power: np.ndarray, closed_form: bool) -> Terms:
    return [(Term(lambda _: reference, power, closed_form), 1.0)]


def mixture(parts: list[Terms], multipliers: np.ndarray) -> Terms:
    def summed(clean: float | None) -> ref.Reference:
        return ref.mixture([meaning(part, clean) for part in parts], multipliers)

    power = np.min([total(part) for part in parts], axis=0)
    closed_form = all(term.closed_form for part in parts for term, _ in part)
    return [(Term(summed, power, closed_form, "mixture"), 1.0)]


def window(terms: Terms, shape: tuple[int, ...], offset, extent, scale: int) -> Terms:
    """The terms seen through a window. Block averages have no power of noise, and
    exponents in them do not grow."""

    def placed(term: Term) -> Term:
        power = np.zeros(shape)
        if scale == 1:
            box = tuple(slice(o, o + e) for o, e in zip(offset, extent, strict=True))
            power[box] = term.power

        def windowed(clean: float | None) -> ref.Reference:
            if scale != 1:
                clean = None
            return ref.window(term.meaning(clean), offset, extent, scale)

        return Term(windowed, power, term.closed_form and scale == 1, term.kind)

    return [(placed(term), w) for term, w in terms]


@dataclass
class Random:
    """A random expression, its meaning, and the constructions in it."""

    factor: Factor
    terms: Terms
    uses: Counter

    @property
    def power(self) -> np.ndarray:
        return total(self.terms)


class Model(eqx.Module):
    """A conditional energy network of a law in closed form: Gaussians whose means move
    by c·shift. E = −σ·log p."""

    weights: jax.Array
    means: jax.Array
    shift: jax.Array
    scale: float = eqx.field(static=True)

    def __call__(self, x, log_snr, c):
        alpha = jnp.sqrt(jax.nn.sigmoid(log_snr))
        sigma = jnp.sqrt(jax.nn.sigmoid(-log_snr))
        variance = (alpha * self.scale) ** 2 + sigma**2
        away = x.ravel() - alpha * (self.means + c * self.shift)
        square = jnp.sum(away**2, axis=1) / variance
        logs = -0.5 * square - 0.5 * x.size * jnp.log(2 * jnp.pi * variance)
        return -sigma * jax.nn.logsumexp(jnp.log(self.weights) + logs)


class Logits(eqx.Module):
    """A classifier trained where α² + σ² = 1; elsewhere its logits are M·x/√(α²+σ²)."""

    matrix: jax.Array

    def __call__(self, x, log_snr):
        return self.matrix @ x.ravel()


def training_schedule():
    """The schedule of the models: a range of log-SNR that holds every level of the
    programs, also seen through windows."""
    return cp.Schedule.log_snr(2, min=-16.0, max=16.0)


def schedules():
    """Schedules of the programs: variance-preserving and variance-exploding."""
    preserving = cp.Schedule.log_snr(12, min=-8.0, max=9.0)
    exploding = cp.Schedule.edm(12, sigma_min=0.02, sigma_max=50.0)
    return preserving, exploding


def draw_mixture(rng, size):
    weights = rng.dirichlet(np.ones(COMPONENTS) * 3)
    means = rng.normal(size=(COMPONENTS, size))
    return weights, means


def analytic(rng, shape):
    size = math.prod(shape)
    weights, means = draw_mixture(rng, size)
    mixing = dist.Categorical(probs=jnp.asarray(weights))
    kind = "normal"
    if len(shape) == 1:
        kind = rng.choice(["normal", "mvn", "general"])
    if kind == "mvn":
        roots = np.eye(size) * 0.4 + 0.3 * rng.normal(size=(COMPONENTS, size, size))
        covariances = roots @ roots.transpose(0, 2, 1) + 0.05 * np.eye(size)
        law = dist.MixtureSameFamily(
            mixing,
            dist.MultivariateNormal(jnp.asarray(means), jnp.asarray(covariances)),
        )
    else:
        scales = rng.uniform(0.2, 1.0, size=(COMPONENTS, size))
        covariances = np.stack([np.diag(s**2) for s in scales])
        locs = jnp.asarray(means.reshape(COMPONENTS, *shape))
        sds = jnp.asarray(scales.reshape(COMPONENTS, *shape))
        if kind == "general":
            law = dist.MixtureGeneral(
                mixing,
                [dist.Normal(m, s).to_event(1) for m, s in zip(locs, sds, strict=True)],
            )
        else:
            law = dist.MixtureSameFamily(
                mixing, dist.Normal(locs, sds).to_event(len(shape))
            )
    reference = ref.gaussians(weights, means, covariances)
    terms = leaf(reference, np.ones(shape), closed_form=True)
    return Random(cp.Analytic(law, training_schedule()), terms, Counter())


def model(rng, shape, name="c"):
    """A conditional diffusion model, with unknown constants, and its reference as a
    function of the condition."""
    size = math.prod(shape)
    weights, means = draw_mixture(rng, size)
    shift = rng.normal(size=size)
    scale = float(rng.uniform(0.3, 0.9))
    network = Model(jnp.asarray(weights), jnp.asarray(means), jnp.asarray(shift), scale)

    def call(x, log_snr, **conditions):
        return network(x, log_snr, conditions[name])

    factor = learned(call, "energy", training_schedule(), shape, conditions={name: 0.0})
    covariances = np.stack([np.eye(size) * scale**2] * COMPONENTS)
    return factor, lambda c: ref.gaussians(weights, means + c * shift, covariances)


def expression(rng, shape, depth) -> Random:
    if depth == 0 or rng.uniform() < 0.1:
        return analytic(rng, shape)
    kinds = [
        "product",
        "quotient",
        "power",
        "mixture",
        "guide",
        "condition",
        "window",
        "over",
    ]
    kind = rng.choice(kinds, p=[0.2, 0.1, 0.15, 0.15, 0.1, 0.05, 0.15, 0.1])
    made = MAKERS[kind](rng, shape, depth)
    made.uses[kind] += 1
    return made


def make_product(rng, shape, depth):
    parts = [expression(rng, shape, depth - 1) for _ in range(2)]
    if rng.uniform() < 0.3:  # the same factor twice
        parts.append(parts[0])
    if len(parts) == 2:
        factor = parts[0].factor * parts[1].factor
    else:
        factor = cp.product(*[p.factor for p in parts])
    return Random(factor, times(*[(p.terms, 1.0) for p in parts]), count(parts))


def make_quotient(rng, shape, depth):
    a = expression(rng, shape, depth - 1)
    b = expression(rng, shape, 0)
    terms = times((a.terms, 1.0), (b.terms, -1.0))
    return Random(a.factor / b.factor, terms, count([a, b]))


def make_power(rng, shape, depth):
    a = expression(rng, shape, depth - 1)
    w = float(rng.choice([-0.5, 0.3, 0.7, 1.0, 1.5, 2.0]))
    return Random(a.factor**w, times((a.terms, w)), count([a]))


def make_mixture(rng, shape, depth):
    if rng.uniform() < 0.4:  # shares of normalised factors
        parts = [analytic(rng, shape) for _ in range(3)]
        shares = rng.dirichlet(np.ones(3))
        factor = cp.mixture([p.factor for p in parts], weights=7.0 * shares)
    else:
        parts = [expression(rng, shape, depth - 1) for _ in range(2)]
        shares = np.exp(rng.normal(size=2))
        factor = cp.mixture([p.factor for p in parts], log_weights=np.log(shares))
    return Random(factor, mixture([p.terms for p in parts], shares), count(parts))


def make_guide(rng, shape, depth):
    factor, reference = model(rng, shape)
    scale = float(rng.choice([0.0, 1.0, 1.7, 3.0]))
    c = float(rng.normal())
    given = leaf(reference(c), np.ones(shape), closed_form=False)
    free = leaf(reference(0.0), np.ones(shape), closed_form=False)
    terms = times((given, scale), (free, 1.0 - scale))
    return Random(cp.guide(factor, scale, c=c), terms, Counter())


def make_condition(rng, shape, depth):
    a = expression(rng, shape, depth - 1)
    matrix = rng.normal(size=(3, math.prod(shape)))
    label = int(rng.integers(3))
    scale = float(rng.uniform(0.5, 2.0))
    logits = Logits(jnp.asarray(matrix))
    classifier = cp.Classifier(logits, training_schedule(), time="log_snr")
    factor = cp.condition(a.factor, classifier, label, scale=scale)
    likelihood = leaf(
        ref.log_softmax(matrix, label), np.zeros(shape), closed_form=False
    )
    return Random(factor, times((a.terms, 1.0), (likelihood, scale)), count([a]))


def make_over(rng, shape, depth):
    """A product or mixture over data of an expression that only in part has the
    condition."""
    name = f"c{depth}"  # a condition that the expression below does not have
    factor, reference = model(rng, shape, name)
    other = expression(rng, shape, depth - 1)
    cs = rng.normal(size=int(rng.integers(1, 4)))
    block = [None, 1, 2][int(rng.integers(3))]
    given = [leaf(reference(c), np.ones(shape), closed_form=False) for c in cs]
    member = factor * other.factor**0.3
    if rng.uniform() < 0.5:
        made = cp.product(member, over={name: cs}, block=block)
        over = given[0]
        if len(cs) > 1:
            over = over_data([reference(c) for c in cs], shape)
        terms = times((over, 1.0), (other.terms, 0.3 * len(cs)))
    else:
        shares = np.exp(rng.normal(size=len(cs)))
        made = cp.mixture(
            member, log_weights=np.log(shares), over={name: cs}, block=block
        )
        components = [times((part, 1.0), (other.terms, 0.3)) for part in given]
        terms = mixture(components, shares)
    return Random(made, terms, other.uses)


def over_data(references: list[ref.Reference], shape: tuple[int, ...]) -> Terms:
    """The product of a factor over several data, which is one term."""
    count = len(references)
    reference = ref.product(references, [1.0] * count)
    power = count * np.ones(shape)
    return [(Term(lambda _: reference, power, closed_form=False, kind="over"), 1.0)]


def make_window(rng, shape, depth):
    scale = 1
    if all(n % 2 == 0 for n in shape):
        scale = int(rng.choice([1, 2]))
    if scale == 2:
        event = tuple(n // 2 for n in shape)
    else:
        event = tuple(max(1, n - int(rng.integers(0, 2))) for n in shape)
    extent = tuple(scale * n for n in event)
    offset = tuple(
        int(rng.integers(0, n - e + 1)) for n, e in zip(shape, extent, strict=True)
    )
    inner = expression(rng, event, depth - 1)
    factor = cp.window(inner.factor, shape, offset, scale=scale)
    inner.uses[f"window {scale}"] += 1
    return Random(factor, window(inner.terms, shape, offset, extent, scale), inner.uses)


MAKERS = {
    "product": make_product,
    "quotient": make_quotient,
    "power": make_power,
    "mixture": make_mixture,
    "guide": make_guide,
    "condition": make_condition,
    "window": make_window,
    "over": make_over,
}


def count(parts):
    return sum((p.uses for p in parts), Counter())


@functools.cache
def random_program(seed: int) -> tuple[Random, tuple[int, ...], np.random.Generator]:
    rng = np.random.default_rng(seed)
    shape = [(1,), (2,), (4,), (2, 2)][seed % 4]
    made = expression(rng, shape, DEPTH)
    # Another factor makes the noisiest level proper.
    if np.min(made.power) < 0.5:
        base = analytic(rng, shape)
        w = float(1.0 - np.min(made.power))
        terms = times((made.terms, 1.0), (base.terms, w))
        made = Random(made.factor * base.factor**w, terms, made.uses)
    return made, shape, rng


class Evaluated(NamedTuple):
    """A random program at a random level and position.

    Attributes:
        narrow: the factor that made it proper, or None.
        x, alpha, sigma: the position and the level.
        clean: σ²/α² of level 0.
        value, score: the log-density and its gradient.
    """

    narrow: Terms | None
    x: np.ndarray
    alpha: float
    sigma: float
    clean: float
    value: float
    score: np.ndarray


@functools.cache
def evaluated(seed: int) -> Evaluated:
    """Evaluate a random program, once for all tests that need it."""
    made, shape, rng = random_program(seed)
    schedule = schedules()[int(rng.integers(2))]
    narrow = None
    try:
        density = cp.compile(single, made.factor, schedule=schedule)
    except ImproperError:
        # Some quotients are improper at level 0; times a narrow factor they are proper.
        sd = 0.1
        size = math.prod(shape)
        reference = ref.gaussians([1.0], [np.zeros(size)], [np.eye(size) * sd**2])
        narrow = leaf(reference, np.ones(shape), closed_form=True)
        factor = cp.Analytic(dist.Normal(jnp.zeros(shape), sd), schedule)
        density = cp.compile(single, made.factor * factor, schedule=schedule)
    # Of factors whose height only chains know, exponents are constant in the reference.
    density = density.untracked()
    level = int(rng.integers(schedule.num_levels))
    alpha = float(schedule.alpha[level])
    sigma = float(schedule.sigma[level])
    x = rng.normal(size=shape) * np.hypot(alpha, sigma)
    value, score = density.value_and_score({"x": x}, level)
    assert value.dtype == score["x"].dtype == jnp.float64
    clean = float(schedule.sigma[0] / schedule.alpha[0]) ** 2
    return Evaluated(
        narrow, x, alpha, sigma, clean, float(value), np.asarray(score["x"])
    )


def errors(
    seed: int, terms: Terms | None = None, growing: bool = True
) -> tuple[float, float]:
    """The largest differences of a program in log-density and score from the meaning of
    terms; by default those of the program."""
    program = evaluated(seed)
    if terms is None:
        terms = random_program(seed)[0].terms
    if program.narrow is not None:
        terms = times((terms, 1.0), (program.narrow, 1.0))
    clean = program.clean if growing else None
    reference = meaning(terms, clean)
    value, score = ref.value_and_score(
        reference, program.x, program.alpha, program.sigma
    )
    score_error = float(np.max(np.abs(program.score - score)))
    return abs(program.value - value), score_error


@pytest.mark.parametrize(
    "seed", [*range(QUICK), *(slow(seed) for seed in range(QUICK, PROGRAMS))]
)
def test_program_means_what_it_says(seed):
    value_error, score_error = errors(seed)
    assert value_error < 1e-5
    assert score_error < 1e-5


def test_the_programs_use_everything():
    uses = count([random_program(seed)[0] for seed in range(QUICK)])
    assert all(
        uses[kind] >= 10
        for kind in (
            "product",
            "quotient",
            "power",
            "mixture",
            "guide",
            "window",
            "over",
        )
    )
    assert all(uses[kind] >= 3 for kind in ("condition", "window 1", "window 2"))


@pytest.mark.parametrize("seed", range(4))
def test_another_program_is_detected(seed):
    assert max(errors(seed, random_program(seed + 4)[0].terms)) > 1e-2


@pytest.mark.parametrize("seed", [2, 8, 9, 22])
def test_constant_exponents_are_detected(seed):
    """Programs at a level where exponents have not grown yet to those of level 0."""
    assert max(errors(seed, growing=False)) > 1e-2


@pytest.mark.parametrize(
    "wrong",
    [
        lambda e, kappa: (e, 1.0),
        lambda e, kappa: (0.5 * e, kappa),
        lambda e, kappa: (1.0, kappa),
    ],
    ids=["one sharpness", "another start", "starts at 1"],
)
def test_another_path_of_exponents_is_detected(wrong, monkeypatch):
    right = paths
    monkeypatch.setitem(
        globals(), "paths", lambda *terms: [wrong(*path) for path in right(*terms)]
    )
    all_errors = [errors(seed) for seed in (2, 8, 9, 22)]
    assert sum(max(pair) > 1e-4 for pair in all_errors) >= 2
