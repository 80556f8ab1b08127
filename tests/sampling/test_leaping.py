"""Tokens under uniform noise against enumeration: the density of every level, every law
at level 0, log-evidence, counts of evaluations, and mutants that must fail."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import composeprob as cp
from composeprob.density.residual_noise import log_weights_of_clean
from composeprob.factors.uniform_noise import NoisedEvent, UniformNoise
from composeprob.results.checks.noise_left import NoiseLeft, noise_left
from composeprob.samplers import leaping as module
from composeprob.samplers.population import reweighted
from messages import check_finding
from token_cases import (
    EXPRESSIONS,
    KEY,
    LENGTH,
    NUM_CHAINS,
    NUM_VALUES,
    STATES,
    A,
    B,
    closed,
    run,
    scores,
    site,
    soft_energy,
    soft_values,
    with_clue,
)
from zscores import assert_agrees, assert_disagrees

LEVELS = cp.Schedule.log_snr(16)
KEPT = np.asarray(LEVELS.kept, float)


def run_noised(program, *args, sampler=None, num_chains=NUM_CHAINS):
    """The result of a program of closed forms under uniform noise."""
    density = cp.compile(program, *args, schedule=LEVELS)
    return cp.infer(
        density, KEY, num_chains=num_chains, sampler=sampler, progress=False
    )


def noised(probs: np.ndarray, kept: float) -> np.ndarray:
    """A table under uniform noise of every token."""
    for axis in range(LENGTH):
        probs = np.moveaxis(np.tensordot(kernel(kept), probs, (1, axis)), 0, axis)
    return probs


def kernel(kept: float) -> np.ndarray:
    """Probabilities of noised tokens given clean ones."""
    return kept * np.eye(NUM_VALUES) + (1 - kept) / NUM_VALUES


def network_of(probs: np.ndarray, output: str, mutant: str = "") -> cp.Factor:
    """A network of a table: the ratios of its neighbours, or its clean tokens."""
    table = jnp.asarray(probs)

    def told(tokens, kept):
        own = jnp.arange(NUM_VALUES) == tokens[:, None]
        return jnp.where(own, kept, 0.0) + (1 - kept) / NUM_VALUES

    def log_p(counted):
        return jnp.log(table @ counted[2] @ counted[1] @ counted[0])

    def ratios(tokens, kept):
        def of(i, v):
            return log_p(told(tokens.at[i].set(v), kept))

        over_values = jax.vmap(of, (None, 0))
        neighbours = jax.vmap(over_values, (0, None))(
            jnp.arange(LENGTH), jnp.arange(NUM_VALUES)
        )
        logs = neighbours - log_p(told(tokens, kept))
        return -logs if mutant == "inverted" else logs

    def clean(tokens, kept):
        counted = told(tokens, kept)
        return jnp.log(counted * jax.grad(log_p)(counted))

    return cp.UniformDiffusion(
        {"ratios": ratios, "x0": clean}[output],
        LEVELS,
        length=LENGTH,
        num_values=NUM_VALUES,
        output=output,
        label="network",
    )


def test_every_level_has_the_product_of_the_noised_factors():
    f = cp.mixture([closed(A), closed(B)], weights=[0.3, 0.7]) * closed(B) ** 0.5
    f = f * soft_energy()
    density = cp.compile(site, f, schedule=LEVELS)
    energy = cp.compile(site, soft_energy())
    potential = [energy.log_density({"s": jnp.asarray(s)}) for s in STATES]
    for level in (0, 6, 15):
        a = noised(A, KEPT[level]).ravel()
        b = noised(B, KEPT[level]).ravel()
        power = (KEPT[level] - KEPT[-1]) / (KEPT[0] - KEPT[-1])
        exact = np.log((0.3 * a + 0.7 * b) * np.sqrt(b)) + power * np.asarray(potential)
        values = [density.log_density({"s": jnp.asarray(s)}, level) for s in STATES]
        np.testing.assert_allclose(values, exact, atol=1e-4)


def test_a_chain_is_noised_as_its_table_is():
    first = np.array([0.5, 0.2, 0.3])
    # No value follows itself but the last: impossible pairs have no derivative.
    steps = np.array([[0.0, 0.4, 0.6], [0.7, 0.0, 0.3], [0.2, 0.2, 0.6]])
    probs = first[STATES[:, 0]]
    for i in range(LENGTH - 1):
        probs = probs * steps[STATES[:, i], STATES[:, i + 1]]
    chain = cp.Analytic.chain(first, steps, length=LENGTH)
    table = cp.Analytic.table(probs.reshape(A.shape))
    for tokens in ([0, 0, 0], [1, 0, 2]):
        answers = []
        for factor in (chain, table):
            event = event_at(5, 4, jnp.array(tokens))
            answers.append(factor.noised(event, {}))
        for one, other in zip(*answers, strict=True):
            np.testing.assert_allclose(one, other, atol=2e-4)


def event_at(level: int, below: int, tokens):
    """Tokens at a level."""
    noise = UniformNoise.between(LEVELS, jnp.int32(level), jnp.int32(below))
    return NoisedEvent(tokens, noise)


def test_ratios_and_clean_tokens_determine_each_other():
    tokens = jnp.array([2, 0, 1])
    p = noised(A, KEPT[7])
    fine = [noised(A, KEPT[7]) for _ in range(LENGTH)]
    for axis in range(LENGTH):
        # One position under the noise of the level below.
        kernels = [kernel(KEPT[7])] * LENGTH
        kernels[axis] = kernel(KEPT[6])
        fine[axis] = np.einsum("ai,bj,ck,ijk->abc", *kernels, A)
    for factor in (closed(A), network_of(A, "ratios"), network_of(A, "x0")):
        answer = factor.noised(event_at(7, 6, tokens), {})
        for i, v in itertools.product(range(LENGTH), range(NUM_VALUES)):
            there = np.array(tokens)
            there[i] = v
            here = p[tuple(np.array(tokens))]
            rise = np.log(p[tuple(there)] / here)
            assert float(answer.rises[i, v]) == pytest.approx(rise, abs=2e-4)
            onward = np.log(fine[i][tuple(there)] / here)
            assert float(answer.onward[i, v]) == pytest.approx(onward, abs=2e-4)


@pytest.mark.parametrize(
    "name",
    ["mixture", *(pytest.param(n, marks=pytest.mark.slow) for n in EXPRESSIONS)],
)
def test_expressions_of_closed_forms_have_their_law(name):
    make, target = EXPRESSIONS[name]
    result = run_noised(site, make())
    assert result.status.ok, result.status
    assert_agrees(scores(result, target))


def mixed_networks(output: str) -> cp.Factor:
    a = network_of(A, output)
    b = network_of(B, output)
    return cp.mixture([a, b], weights=[0.3, 0.7]) * b


NETWORKS = {
    "x0, mixture": (lambda: mixed_networks("x0"), (0.3 * A + 0.7 * B) * B),
    "ratios, quotient": (
        lambda: network_of(A, "ratios") / closed(B) ** 0.5,
        A / B**0.5,
    ),
    "ratios, power": (lambda: network_of(A, "ratios") ** 2.5, A**2.5),
    "x0, energy": (lambda: network_of(A, "x0") * soft_energy(), A * soft_values()),
}


@pytest.mark.parametrize(
    "name",
    [
        "ratios, power",
        *(pytest.param(n, marks=pytest.mark.slow) for n in NETWORKS),
    ],
)
def test_expressions_of_networks_have_their_law(name):
    make, target = NETWORKS[name]
    result = run(site, make())
    assert result.status.ok, result.status
    assert_agrees(scores(result, target))
    assert np.nanmin(result.levels["acceptance"]) > 0.98


def test_observed_tokens_are_never_noised():
    result = run_noised(with_clue, closed(A) ** 2.0, jnp.array([2]))
    assert np.unique(result["s"][:, 1]).tolist() == [2]
    target = A.ravel() ** 2 * (STATES[:, 1] == 2)
    exact = target[STATES[:, 0] == 0].sum() / target.sum()
    estimate = result.mean(lambda s: s["s"][0] == 0)
    z = {"P(s0 = 0)": (estimate.value - exact) / estimate.error}
    off = result.log_evidence - np.log(target.sum())
    assert_agrees(z | {"log Z": off / result.log_evidence_error})
    free = cp.infer(cp.prior(result.density), KEY, num_chains=64, progress=False)
    assert len(np.unique(free["s"][:, 1])) > 1


@pytest.mark.slow
def test_windows_conditions_and_guidance_mean_what_they_mean_elsewhere():
    pair = np.array([[0.5, 0.1, 0.2], [0.1, 0.6, 0.1], [0.3, 0.1, 0.9]])
    pair = pair / pair.sum()
    over = np.stack([np.arange(2), np.arange(1, 3)], 1)
    neighbours = cp.window(closed(pair), (LENGTH,), over=over)
    target = A.copy().ravel()
    for i in range(2):
        target *= pair[STATES[:, i], STATES[:, i + 1]]
    result = run(site, network_of(A, "x0") * neighbours)
    assert_agrees(scores(result, target.reshape(A.shape)))

    def network(tokens, kept, label=-1):
        tilt = jnp.where(label >= 0, 0.5, 0.0) * jnp.arange(NUM_VALUES)
        own = jnp.arange(NUM_VALUES) == tokens[:, None]
        likelihood = jnp.where(own, kept, 0.0) + (1 - kept) / NUM_VALUES
        return tilt + jnp.log(likelihood)

    f = cp.UniformDiffusion(
        network,
        LEVELS,
        length=LENGTH,
        num_values=NUM_VALUES,
        output="x0",
        conditions=("label",),
    )
    guided = run(site, cp.guide(f, 2.0, label=1))
    one = np.exp(0.5 * np.arange(NUM_VALUES))
    one = one / one.sum()
    rows = one**2 / (1 / NUM_VALUES)
    target = rows[STATES].prod(1).reshape(A.shape)
    assert_agrees(scores(guided, target))


@pytest.mark.slow
def test_draws_go_on_at_level_0():
    result = run(site, network_of(A, "x0") * closed(B), num_chains=64, draws=30)
    assert result["s"].shape == (64, 30, LENGTH)
    weights = (A * B).ravel() / (A * B).sum()
    exact = weights[STATES[:, 0] == 1].sum()
    estimate = result.probability(lambda s: s["s"][0] == 1)
    assert abs(estimate.value - exact) < 4 * estimate.error


def test_each_leap_and_each_redraw_evaluates_a_factor_once():
    calls = []

    def network(tokens, kept):
        shape = jax.ShapeDtypeStruct((LENGTH, NUM_VALUES), jnp.float32)

        def count(_):
            calls.append(1)
            return np.zeros((LENGTH, NUM_VALUES), np.float32)

        return jax.pure_callback(count, shape, tokens, vmap_method="sequential")

    f = cp.UniformDiffusion(network, LEVELS, length=LENGTH, num_values=NUM_VALUES)
    density = cp.compile(site, f)
    calls.clear()
    sampler = cp.TauLeaping(2, 1, check_levels=False)
    result = cp.infer(density, KEY, num_chains=4, sampler=sampler, progress=False)
    assert result.evaluations == 16 * 3 - 2 + LENGTH
    assert len(calls) == 4 * result.evaluations


SHARP = (A * B) ** 1.2
"""Program on which mutants are tried."""


def sharp() -> cp.Factor:
    return closed(A) ** 1.2 * closed(B) ** 1.2


def unweighted(run, rule, level, gain, averaging, error):
    """A mutant: leaves the weights out."""
    return reweighted(run, rule, level, jnp.zeros_like(gain), averaging, error)


class Quieter(module.LeapPhases):
    """A mutant: another rate of noise in the kernel of the way back."""

    def log_noising(self, place, tokens):
        return 0.9 * super().log_noising(place, tokens)


class Flattened(module.LeapPhases):
    """Redraws from other conditionals, which the test corrects."""

    def log_values_at(self, chain, rises, i):
        return 0.3 * super().log_values_at(chain, rises, i)


class Untested(Flattened):
    """A mutant: accepts these without a test."""

    def redraw(self, place, words, chain):
        leap = super().redraw(place, words, chain)
        return leap._replace(log_ratio=jnp.full_like(leap.log_ratio, 99.0))


PHASES = {
    "as it is": (module.LeapPhases, cp.TauLeaping(0, 0), True),
    "Flattened": (Flattened, cp.TauLeaping(1, 4), True),
    "Untested": (Untested, cp.TauLeaping(2, 3), False),
    "Quieter": (Quieter, cp.TauLeaping(0, 0), False),
}


def sharp_scores(sampler, number: int) -> dict[str, float]:
    # A number of chains of its own, or the code that was compiled for other phases
    # would run.
    result = run_noised(site, sharp(), sampler=sampler, num_chains=NUM_CHAINS - number)
    return scores(result, SHARP)


@pytest.mark.parametrize("name", PHASES)
def test_mutants_fail_and_what_the_test_corrects_does_not(name, monkeypatch):
    phases, sampler, right = PHASES[name]
    monkeypatch.setattr(module, "LeapPhases", phases)
    found = sharp_scores(sampler, list(PHASES).index(name))
    if right:
        assert_agrees(found)
    else:
        assert_disagrees(found)


@pytest.mark.filterwarnings("ignore:divide by zero")
def test_leaps_without_weights_fail(monkeypatch):
    monkeypatch.setattr(module, "reweighted", unweighted)
    assert_disagrees(sharp_scores(cp.TauLeaping(0, 0), len(PHASES)))


def test_inverted_ratios_fail():
    result = run(site, network_of(A, "ratios", "inverted") ** 2.5)
    assert_disagrees(scores(result, A**2.5))


HIDDEN = np.full(len(STATES), 1.0)
HIDDEN[5] = 3e-4
HIDDEN = (HIDDEN / HIDDEN.sum()).reshape(A.shape)
"""A divisor that hides one state, of probability 10⁻⁵."""
QUOTIENT = A / HIDDEN**0.5


DIVISORS = {
    "closed form": (closed, 1.0),
    # Of a network tokens are taken for independent, which is less than all of it.
    "network": (lambda probs: network_of(probs, "x0"), 0.6),
}


@pytest.mark.parametrize("name", DIVISORS)
def test_what_level_0_hides_is_estimated_as_by_enumeration(name):
    divisor, least = DIVISORS[name]
    levels = cp.Schedule.log_snr(16, max=8.0)
    density = cp.compile(site, closed(A) / divisor(HIDDEN) ** 0.5, schedule=levels)
    kept = float(levels.kept[0])
    at_level_0 = noised(A, kept) / noised(HIDDEN, kept) ** 0.5
    change = log_weights_of_clean(density, {"s": STATES.astype(np.int32)})
    exact = np.log(QUOTIENT / at_level_0).ravel()
    np.testing.assert_allclose(np.delete(change, 5), np.delete(exact, 5), atol=2e-3)
    assert least * exact[5] - 2e-3 < change[5] < exact[5] + 2e-3
    left = noise_left(change, at_level_0.ravel())
    shift = np.log(QUOTIENT.sum() / at_level_0.sum())
    law = QUOTIENT / QUOTIENT.sum() - at_level_0 / at_level_0.sum()
    total_variation = 0.5 * np.abs(law).sum()
    assert left.log_evidence == pytest.approx(shift, rel=0.4)
    assert left.total_variation == pytest.approx(total_variation, rel=0.4)


@pytest.mark.parametrize("most", [8.0, 14.0])
def test_noise_that_a_divisor_does_not_ignore_is_found(most):
    levels = cp.Schedule.log_snr(16, max=most)
    density = cp.compile(site, closed(A) / closed(HIDDEN) ** 0.5, schedule=levels)
    result = cp.infer(density, KEY, num_chains=512, progress=False)
    found = [f for f in result.status.findings if "Level 0 keeps" in f.message]
    assert bool(found) == (most == 8)
    assert all(f.code == NoiseLeft.code and f.withholds for f in found)
    if most == 14:
        assert_agrees(scores(result, QUOTIENT))
        return
    # The levels that it advises are enough.
    text = check_finding(result.status, NoiseLeft.code)
    advice = re.search(r"schedule=(cp\.Schedule\.log_snr\(.*\))\.", text)
    advised = density.on(eval(advice[1], {"cp": cp}))
    change = log_weights_of_clean(advised, {"s": result["s"]})
    left = noise_left(change, np.ones(len(change)))
    assert not NoiseLeft().findings(left, advised)


def test_energies_have_no_noise_at_level_0():
    """Their exponent is 1 there, however large they are."""
    large = cp.Energy(
        lambda tokens, visible: 1e4 * jnp.sum(tokens), length=LENGTH, num_values=3
    )
    levels = cp.Schedule.log_snr(8, max=8.0)
    uniform = closed(np.full(A.shape, 1 / A.size))
    density = cp.compile(site, uniform * large, schedule=levels)
    change = log_weights_of_clean(density, {"s": STATES.astype(np.int32)})
    np.testing.assert_allclose(change, 0.0, atol=2e-2)
