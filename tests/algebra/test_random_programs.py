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
from typing import Any

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

DEPTH, COMPONENTS, PROGRAMS, QUICK = 4, 3, 200, 28


@dataclass(eq=False)
class Term:
    """A factor of a product that is none itself.

    Attributes:
        meaning: log f, given σ²/α² of level 0, from which on exponents in it are
            constant; None: they are everywhere.
        power: its power of noise at each entry of the event.
        known: whether all in it has a log-density known at every level, so that its
            exponent may grow.
        kind: leaves, and products over data, are merged with themselves; mixtures are
            not. The exponent of a product over data counts as that of what stands in
            it.
    """

    meaning: Callable[[float | None], ref.Reference]
    power: np.ndarray
    known: bool
    kind: str = "leaf"


Terms = list[tuple[Term, float]]


def times(*parts: tuple[Terms, float]) -> Terms:
    """Π_i part_i^{w_i} as factors that are no products, each with its exponent."""
    found: Terms = []
    for term, exponent in [
        (term, w * inner) for terms, w in parts for term, inner in terms
    ]:
        before = [w for known, w in found if known is term and term.kind != "mixture"]
        if before:
            found = [(known, w) for known, w in found if known is not term]
        found.append((term, exponent + sum(before)))
    return [(term, w) for term, w in found if abs(w) > 1e-12]


def total(terms: Terms) -> np.ndarray:
    """The power of noise at each entry, at level 0."""
    return sum(w * term.power for term, w in terms)


def paths(
    exponents: list[float], powers: list[np.ndarray]
) -> list[tuple[float, float]]:
    """e and κ of every factor: w_k = e + (w − e)/(1 + κ·s_k). The powers are of noise,
    at each entry."""
    entries, factors = range(powers[0].size), range(len(exponents))
    counted = [
        [w * p for p in power.ravel()]
        for w, power in zip(exponents, powers, strict=True)
    ]
    multiplies, divides = (
        [i for i in factors if max(counted[i]) > 0],
        [i for i in factors if min(counted[i]) < 0],
    )
    start = [min(w, 1.0) if i in multiplies else w for i, w in enumerate(exponents)]

    def multiplied(j):
        return sum(start[i] * powers[i].ravel()[j] for i in multiplies)

    sees = [[j for j in entries if powers[i].ravel()[j] != 0] for i in factors]
    most = {i: max(multiplied(j) for j in sees[i]) for i in multiplies}
    start = [
        min(e / most[i], 1.0) if i in most and most[i] < 1 else e
        for i, e in enumerate(start)
    ]
    divided = [-sum(counted[i][j] for i in divides) for j in entries]
    left = [multiplied(j) - 1 for j in entries]
    for i in divides:
        kept = min(
            [left[j] / divided[j] for j in sees[i] if divided[j] > 0], default=1.0
        )
        start[i] = min(max(kept, 0.0), 1.0) * exponents[i]
    sharper = {i: exponents[i] / start[i] for i in multiplies if i not in divides}
    most_sharp = max([1.0, *sharper.values()])
    return [
        (start[i], most_sharp if i in divides else sharper.get(i, 1.0)) for i in factors
    ]


def meaning(terms: Terms, clean: float | None) -> ref.Reference:
    """The product of these, with exponents that grow as noise falls to that of level 0,
    where they can."""
    over_data = [term.kind == "over" for term, _ in terms]
    exponents = [
        1.0 if inside else w for inside, (_, w) in zip(over_data, terms, strict=True)
    ]
    inner = [
        w if inside else 1.0 for inside, (_, w) in zip(over_data, terms, strict=True)
    ]
    logs = [
        ref.product([term.meaning(clean)], [w])
        for (term, _), w in zip(terms, inner, strict=True)
    ]
    if clean is None or set(exponents) == {1.0}:
        return ref.product(logs, exponents)
    found = paths(
        exponents, [w * term.power for (term, _), w in zip(terms, inner, strict=True)]
    )
    growing = [abs(e - w) > 1e-9 for (e, _), w in zip(found, exponents, strict=True)]
    if not all(
        term.known for (term, _), grows in zip(terms, growing, strict=True) if grows
    ):
        return ref.product(logs, exponents)

    def log_density(x: np.ndarray, alpha: float, sigma: float) -> complex:
        s = sigma**2 / alpha**2 - clean
        grown = [
            e + (w - e) / (1 + kappa * s)
            for (e, kappa), w in zip(found, exponents, strict=True)
        ]
        return ref.product(logs, grown)(x, alpha, sigma)

    return log_density


def leaf(reference: ref.Reference, power: np.ndarray, known: bool) -> Terms:
    return [(Term(lambda _: reference, power, known), 1.0)]


def mixture(parts: list[Terms], multipliers: np.ndarray) -> Terms:
    def summed(clean: float | None) -> ref.Reference:
        return ref.mixture([meaning(part, clean) for part in parts], multipliers)

    power, known = (
        np.min([total(part) for part in parts], axis=0),
        all(t.known for part in parts for t, _ in part),
    )
    return [(Term(summed, power, known, "mixture"), 1.0)]


def window(terms: Terms, shape: tuple[int, ...], offset, extent, scale: int) -> Terms:
    """Block averages have no power of noise, and exponents in them do not grow."""

    def placed(term: Term) -> Term:
        power = np.zeros(shape)
        if scale == 1:
            power[
                tuple(slice(o, o + e) for o, e in zip(offset, extent, strict=True))
            ] = term.power
        seen = lambda clean: ref.window(
            term.meaning(clean if scale == 1 else None), offset, extent, scale
        )
        return Term(seen, power, term.known and scale == 1, term.kind)

    return [(placed(term), w) for term, w in terms]


@dataclass
class Random:
    """A random expression, what it means, and the constructions in it."""

    factor: Factor
    terms: Terms
    uses: Counter

    @property
    def power(self) -> np.ndarray:
        return total(self.terms)


class Model(eqx.Module):
    """A conditional energy network that knows its law: Gaussians whose means move by
    c·shift. E = −σ·log p."""

    weights: jax.Array
    means: jax.Array
    shift: jax.Array
    scale: float = eqx.field(static=True)

    def __call__(self, x, log_snr, c):
        alpha, sigma = (
            jnp.sqrt(jax.nn.sigmoid(log_snr)),
            jnp.sqrt(jax.nn.sigmoid(-log_snr)),
        )
        variance = (alpha * self.scale) ** 2 + sigma**2
        away = x.ravel() - alpha * (self.means + c * self.shift)
        logs = -0.5 * jnp.sum(away**2, axis=1) / variance - 0.5 * away.shape[
            1
        ] * jnp.log(2 * jnp.pi * variance)
        return -sigma * jax.nn.logsumexp(jnp.log(self.weights) + logs)


class Logits(eqx.Module):
    """A classifier trained where α² + σ² = 1; elsewhere its logits are M·x/√(α²+σ²)."""

    matrix: jax.Array

    def __call__(self, x, log_snr):
        return self.matrix @ x.ravel()


def own_schedule():
    """What models were trained on: a range that holds every level of the programs, also
    seen through windows."""
    return cp.Schedule.log_snr(2, min=-16.0, max=16.0)


def schedules():
    return cp.Schedule.log_snr(12, min=-8.0, max=9.0), cp.Schedule.edm(
        12, sigma_min=0.02, sigma_max=50.0
    )


def draw_mixture(rng, size):
    weights, means = (
        rng.dirichlet(np.ones(COMPONENTS) * 3),
        rng.normal(size=(COMPONENTS, size)),
    )
    return weights, means


def analytic(rng, shape):
    size = math.prod(shape)
    weights, means = draw_mixture(rng, size)
    mixing = dist.Categorical(probs=jnp.asarray(weights))
    kind = rng.choice(["normal", "mvn", "general"]) if len(shape) == 1 else "normal"
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
        locs, sds = (
            jnp.asarray(a.reshape(COMPONENTS, *shape)) for a in (means, scales)
        )
        if kind == "general":
            law = dist.MixtureGeneral(
                mixing,
                [dist.Normal(m, s).to_event(1) for m, s in zip(locs, sds, strict=True)],
            )
        else:
            law = dist.MixtureSameFamily(
                mixing, dist.Normal(locs, sds).to_event(len(shape))
            )
    factor = cp.Analytic(law, own_schedule())
    return Random(
        factor,
        leaf(ref.gaussians(weights, means, covariances), np.ones(shape), True),
        Counter(),
    )


def model(rng, shape, name="c"):
    """A conditional diffusion model, whose constants are unknown, and its reference as
    a function of the condition."""
    size = math.prod(shape)
    weights, means = draw_mixture(rng, size)
    shift, scale = rng.normal(size=size), float(rng.uniform(0.3, 0.9))
    network = Model(jnp.asarray(weights), jnp.asarray(means), jnp.asarray(shift), scale)

    def call(x, log_snr, **conditions):
        return network(x, log_snr, conditions[name])

    factor = learned(call, "energy", own_schedule(), shape, conditions={name: 0.0})
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
    made = globals()[f"make_{kind}"](rng, shape, depth)
    made.uses[kind] += 1
    return made


def make_product(rng, shape, depth):
    parts = [expression(rng, shape, depth - 1) for _ in range(2)]
    if rng.uniform() < 0.3:  # the same factor twice
        parts.append(parts[0])
    factor = (
        parts[0].factor * parts[1].factor
        if len(parts) == 2
        else cp.product(*[p.factor for p in parts])
    )
    return Random(factor, times(*[(p.terms, 1.0) for p in parts]), count(parts))


def make_quotient(rng, shape, depth):
    a, b = expression(rng, shape, depth - 1), expression(rng, shape, 0)
    return Random(
        a.factor / b.factor, times((a.terms, 1.0), (b.terms, -1.0)), count([a, b])
    )


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
    scale, c = float(rng.choice([0.0, 1.0, 1.7, 3.0])), float(rng.normal())
    given, free = (leaf(reference(value), np.ones(shape), False) for value in (c, 0.0))
    return Random(
        cp.guide(factor, scale, c=c),
        times((given, scale), (free, 1.0 - scale)),
        Counter(),
    )


def make_condition(rng, shape, depth):
    a = expression(rng, shape, depth - 1)
    matrix, label, scale = (
        rng.normal(size=(3, math.prod(shape))),
        int(rng.integers(3)),
        float(rng.uniform(0.5, 2.0)),
    )
    classifier = cp.Classifier(
        Logits(jnp.asarray(matrix)), own_schedule(), time="log_snr"
    )
    factor = cp.condition(a.factor, classifier, label, scale=scale)
    label_given = leaf(ref.log_softmax(matrix, label), np.zeros(shape), False)
    return Random(factor, times((a.terms, 1.0), (label_given, scale)), count([a]))


def make_over(rng, shape, depth):
    """A product or mixture over data of an expression that only in part has the
    condition."""
    name = f"c{depth}"  # none of the conditions of the expression below
    factor, reference = model(rng, shape, name)
    other, cs = (
        expression(rng, shape, depth - 1),
        rng.normal(size=int(rng.integers(1, 4))),
    )
    block = [None, 1, 2][int(rng.integers(3))]
    given = [leaf(reference(c), np.ones(shape), False) for c in cs]
    whole = factor * other.factor**0.3
    if rng.uniform() < 0.5:
        made = cp.product(whole, over={name: cs}, block=block)
        all_given = ref.product([reference(c) for c in cs], [1.0] * len(cs))
        over = [
            (Term(lambda _: all_given, len(cs) * np.ones(shape), False, "over"), 1.0)
        ]
        terms = times(
            (over if len(cs) > 1 else given[0], 1.0), (other.terms, 0.3 * len(cs))
        )
    else:
        shares = np.exp(rng.normal(size=len(cs)))
        made = cp.mixture(
            whole, log_weights=np.log(shares), over={name: cs}, block=block
        )
        terms = mixture(
            [times((one, 1.0), (other.terms, 0.3)) for one in given], shares
        )
    return Random(made, terms, other.uses)


def make_window(rng, shape, depth):
    scale = int(rng.choice([1, 2])) if all(n % 2 == 0 for n in shape) else 1
    event = (
        tuple(n // 2 for n in shape)
        if scale == 2
        else tuple(max(1, n - int(rng.integers(0, 2))) for n in shape)
    )
    extent = tuple(scale * n for n in event)
    offset = tuple(
        int(rng.integers(0, n - e + 1)) for n, e in zip(shape, extent, strict=True)
    )
    inner = expression(rng, event, depth - 1)
    factor = cp.window(inner.factor, shape, offset, scale=scale)
    inner.uses[f"window {scale}"] += 1
    return Random(factor, window(inner.terms, shape, offset, extent, scale), inner.uses)


def count(parts):
    return sum((p.uses for p in parts), Counter())


@functools.cache
def random_program(seed: int) -> tuple[Random, tuple[int, ...], np.random.Generator]:
    rng = np.random.default_rng(seed)
    shape = [(1,), (2,), (4,), (2, 2)][seed % 4]
    made = expression(rng, shape, DEPTH)
    if np.min(made.power) < 0.5:  # multiply on what makes the noisiest level proper
        base, w = analytic(rng, shape), float(1.0 - np.min(made.power))
        made = Random(
            made.factor * base.factor**w,
            times((made.terms, 1.0), (base.terms, w)),
            made.uses,
        )
    return made, shape, rng


@functools.cache
def evaluated(seed: int) -> tuple[Any, ...]:
    """Of a random program at a random level and position: what it was multiplied by to
    be proper, if by anything, where it was evaluated, and its log-density and score;
    once for all tests that ask for them."""
    made, shape, rng = random_program(seed)
    schedule, narrow = schedules()[int(rng.integers(2))], None
    try:
        density = cp.compile(single, made.factor, schedule=schedule)
    except (
        ImproperError
    ):  # some quotients are, at level 0: narrow enough, anything is proper
        mean, sd = np.zeros(math.prod(shape)), 0.1
        factor = cp.Analytic(dist.Normal(jnp.zeros(shape), sd), schedule)
        narrow = leaf(
            ref.gaussians([1.0], [mean], [np.eye(mean.size) * sd**2]),
            np.ones(shape),
            True,
        )
        density = cp.compile(single, made.factor * factor, schedule=schedule)
    level = int(rng.integers(schedule.num_levels))
    alpha, sigma = float(schedule.alpha[level]), float(schedule.sigma[level])
    x = rng.normal(size=shape) * np.hypot(alpha, sigma)
    value, score = density.value_and_score({"x": x}, level)
    assert value.dtype == score["x"].dtype == jnp.float64
    clean = float(schedule.sigma[0] / schedule.alpha[0]) ** 2
    return narrow, (x, alpha, sigma), clean, float(value), np.asarray(score["x"])


def errors(seed: int, terms: Any = None, growing: bool = True) -> tuple[float, float]:
    """The largest differences of a program in log-density and score from what these
    terms mean; by default its own."""
    narrow, at, clean, value, score = evaluated(seed)
    terms = random_program(seed)[0].terms if terms is None else terms
    terms = terms if narrow is None else times((terms, 1.0), (narrow, 1.0))
    expected_value, expected_score = ref.value_and_score(
        meaning(terms, clean if growing else None), *at
    )
    return abs(value - expected_value), float(np.max(np.abs(score - expected_score)))


@pytest.mark.parametrize("seed", [s if s < QUICK else slow(s) for s in range(PROGRAMS)])
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
def test_another_program_is_told_apart(seed):
    assert max(errors(seed, random_program(seed + 4)[0].terms)) > 1e-2


@pytest.mark.parametrize("seed", [2, 8, 9, 22])
def test_constant_exponents_are_told_apart(seed):
    """Programs at a level where exponents have not grown yet to what they are at level
    0."""
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
def test_another_path_of_exponents_is_told_apart(wrong, monkeypatch):
    right = paths
    monkeypatch.setitem(
        globals(), "paths", lambda *terms: [wrong(*path) for path in right(*terms)]
    )
    found = [errors(seed) for seed in (2, 8, 9, 22)]
    assert sum(max(pair) > 1e-4 for pair in found) >= 2
