"""RAISE: the expectation of p̂ is exactly the density of the sampler's output.

Biases of the sampler are included.
"""

import dataclasses
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy import stats

import composeprob as cp
from composeprob.errors import CapabilityError, ComposeProbError
from composeprob.kernels.metropolis import unadjusted
from composeprob.metrics.likelihood import (
    Path,
    as_positions,
    frozen,
    in_batches,
    reverse_walks,
)
from messages import check_wording
from sampling_cases import both, learned, measured, modes, run, single, slow
from targets import product_of_normals
from zscores import assert_agrees, assert_disagrees, z_scores

FIRST_ORDER = cp.ReverseStep(order=1, control="none")
# Steps of 1.8 in log-SNR: every sampler is visibly wrong.
FEW = cp.Schedule.log_snr(6, min=-5.0, max=4.0)
MEANS, SDS = (0.6, -0.4), (0.5, 0.8)
MORE = cp.Schedule.log_snr(24, min=-5.0, max=4.0)


def gaussian(mean: float, sd: float, schedule: cp.Schedule = FEW) -> cp.Analytic:
    return cp.Analytic(dist.Normal(mean, sd), schedule)


def two_modes(schedule: cp.Schedule = FEW) -> cp.Analytic:
    return cp.Analytic(modes([0.3, 0.7], [-1.0, 1.0], [0.4, 0.3]), schedule)


@pytest.fixture(scope="module")
def mixture():
    return cp.compile(single, two_modes())


OBSERVED = measured, two_modes(), lambda x: dist.StudentT(3.0, x, 0.3), 0.2, "tempered"


def chains(
    density: Any,
    points: Any,
    sampler: Any,
    count: int,
    seed: int = 0,
    step_size: Any = None,
) -> np.ndarray:
    """log p̂ of every chain, (points, count)."""
    path = Path.of_sampler(frozen(sampler, density, step_size), density)
    positions = as_positions(points, density)
    logs = reverse_walks(path, jax.random.key(seed), positions, count, 100_000)
    return np.asarray(logs, float).reshape(-1, count)


# ── closed forms: samplers whose output is Gaussian ───────────────────────────────────


class Affine:
    """Exact Gaussian law of (x,) or (x, v): each step on Gaussian factors is affine."""

    def __init__(self, schedule: cp.Schedule, factors: int, dimension: int = 1):
        self.schedule = schedule
        self.factors = factors
        self.e = np.eye(dimension)[0]
        sigma = float(schedule.sigma[-1])
        self.mean = np.zeros(dimension)
        self.covariance = np.diag([sigma**2 / factors, 1.0][:dimension])

    def at(self, k: int) -> tuple[float, float, float, float]:
        """α, σ, and the product's precision and precision·mean."""
        a = float(self.schedule.alpha[k])
        s = float(self.schedule.sigma[k])
        mean, variance, _ = product_of_normals(
            a, s, MEANS[: self.factors], SDS[: self.factors]
        )
        return a, s, 1 / variance, mean / variance

    def move(self, slope: np.ndarray, push: np.ndarray, noise: np.ndarray) -> None:
        self.mean = slope @ self.mean + push
        self.covariance = slope @ self.covariance @ slope.T + noise

    def reverse(self, k: int) -> None:
        """DDPM's step from level k to k − 1 along the summed scores."""
        a, s, precision, shift = self.at(k)
        a_next, s_next, *_ = self.at(k - 1)
        noise = s**2 * (1 - (a / a_next * s_next / s) ** 2) * (s_next / s) ** 2
        on_score = a_next / a * s**2 - np.sqrt(s_next**2 - noise) * s
        projection = np.outer(self.e, self.e)
        of_x = a_next / a - on_score * precision
        slope = np.eye(len(self.e)) + (of_x - 1) * projection
        self.move(slope, on_score * shift * self.e, noise * projection)

    def ula(self, k: int) -> None:
        _, s, precision, shift = self.at(k)
        h = 0.3 * s**2
        slope = np.array([[1 - h * precision]])
        self.move(slope, np.array([h * shift]), np.array([[2 * h]]))

    def uhmc(self, k: int) -> None:
        """Two leapfrogs after a refreshment that keeps 0.6."""
        _, s, precision, shift = self.at(k)
        h = 0.7 * s
        self.move(np.diag([1.0, 0.6]), np.zeros(2), np.diag([0.0, 1 - 0.36]))
        half = np.array([[1, 0], [-h / 2 * precision, 1]]), np.array([0, h / 2 * shift])
        drift = np.array([[1, h], [0, 1]]), np.zeros(2)
        for slope, push in (half, drift, half, half, drift, half):
            self.move(slope, push, np.zeros((2, 2)))

    def run(self, kernel: str | None, reverse: bool) -> Any:
        """The law at level 0 of a sampler that makes two transitions a level."""
        for k in range(self.schedule.num_levels - 1, -1, -1):
            if reverse and k < self.schedule.num_levels - 1:
                self.reverse(k + 1)
            if kernel:
                for _ in range(2):
                    getattr(self, kernel)(k)
        return stats.norm(self.mean[0], np.sqrt(self.covariance[0, 0]))


def ula(reverse: bool) -> cp.AnnealedMCMC:
    return cp.AnnealedMCMC(
        cp.ULA(lambda s: 0.3 * s.sigma**2), 2, reverse_step=reverse and FIRST_ORDER
    )


def uhmc(reverse: bool) -> cp.AnnealedMCMC:
    return cp.AnnealedMCMC(
        cp.UHMC(lambda s: 0.7 * s.sigma, num_leapfrog=2, damping=0.6),
        2,
        reverse_step=reverse and FIRST_ORDER,
    )


CLOSED = {
    "Ancestral, product": (
        cp.Ancestral(),
        lambda: Affine(MORE, 2).run(None, True),
        MORE,
        2,
    ),
    "ULA": (ula(False), lambda: Affine(FEW, 2).run("ula", False), FEW, 2),
    "ULA with reverse step": (
        ula(True),
        lambda: Affine(FEW, 1).run("ula", True),
        FEW,
        1,
    ),
    "UHMC": (uhmc(False), lambda: Affine(FEW, 2, 2).run("uhmc", False), FEW, 2),
    "UHMC with reverse step": (
        uhmc(True),
        lambda: Affine(FEW, 1, 2).run("uhmc", True),
        FEW,
        1,
    ),
}


def scores_at(logs: np.ndarray, log_density: np.ndarray) -> dict[str, float]:
    """z-scores of E p̂/p = 1 at every point."""
    rows = enumerate(zip(logs, log_density, strict=True))
    ratios = {str(i): np.exp(row - p) for i, (row, p) in rows}
    return z_scores(ratios, dict.fromkeys(ratios, 1.0))


QUICK = ("Ancestral, product", "ULA with reverse step")


@pytest.mark.parametrize(
    "name", [*QUICK, *(slow(name) for name in CLOSED if name not in QUICK)]
)
def test_mean_of_p_hat_is_the_gaussian_that_the_sampler_draws_from(name):
    sampler, law, schedule, factors = CLOSED[name]
    each = [gaussian(MEANS[i], SDS[i], schedule) for i in range(factors)]
    program = both if factors == 2 else single
    density = cp.compile(program, *each)
    points = law().mean() + law().std() * np.linspace(-1.5, 1.5, 4)
    logs = chains(density, points, sampler, 10_000)
    assert_agrees(scores_at(logs, law().logpdf(points)))
    # It is not the law of the program: the check detects the sampler's bias.
    _, _, precision, shift = Affine(schedule, factors).at(0)
    target = stats.norm(shift / precision, precision**-0.5)
    assert_disagrees(scores_at(logs, target.logpdf(points)))


# ── any kernel: p̂ integrates to what chains do ───────────────────────────────────────

GRID = np.linspace(-3.0, 3.0, 61)


def features(x: np.ndarray) -> dict[str, np.ndarray]:
    """Features in which two estimates of the output law are compared."""
    near = np.abs(x - 0.95) < 0.35
    return {
        "mass": np.ones_like(x),
        "right": 1.0 * (x > 0),
        "x": x,
        "x²": x**2,
        "near": 1.0 * near,
    }


def by_p_hat(
    density: Any, sampler: Any, count: int = 200, **how: Any
) -> dict[str, np.ndarray]:
    """∫ feature·p̂ dx, once for each chain.

    Midpoints with a random offset have no discretisation error on average.
    """
    width = GRID[1] - GRID[0]
    points = GRID + np.random.default_rng(3).uniform(-0.5, 0.5) * width
    p = np.exp(chains(density, points, sampler, count, **how))
    return {
        name: width * (value[:, None] * p).sum(0)
        for name, value in features(points).items()
    }


def assert_same_law(
    found: dict[str, np.ndarray], x: np.ndarray, agree: bool = True
) -> None:
    """The features of p̂ agree, or disagree, with those of draws x."""
    sampled = features(x)
    difference = {name: z_score(found[name], sampled[name]) for name in sampled}
    if agree:
        assert_agrees(difference)
    else:
        assert_disagrees(difference)


def z_score(one: np.ndarray, other: np.ndarray) -> float:
    """Difference of two means, in standard errors."""
    variance = one.var(ddof=1) / len(one) + other.var(ddof=1) / len(other)
    return float((one.mean() - other.mean()) / np.sqrt(variance))


KERNELS = {
    "ULA": cp.ULA(lambda s: 0.3 * s.sigma**2),
    "MALA": cp.MALA(lambda s: 0.6 * s.sigma**2),
    "UHMC": cp.UHMC(lambda s: 0.6 * s.sigma, num_leapfrog=2),
    "HMC": cp.HMC(lambda s: 1.1 * s.sigma, num_leapfrog=2, damping=0.7),
    "MALA, line integral": cp.MALA(
        lambda s: 0.6 * s.sigma**2, log_ratio=cp.LineIntegral(num_points=3)
    ),
    "HMC, line integral": cp.HMC(
        lambda s: 1.1 * s.sigma,
        num_leapfrog=2,
        log_ratio=cp.LineIntegral(num_points=None),
    ),
}


def drawn(density: Any, sampler: Any) -> np.ndarray:
    return np.asarray(run(density, 1, 20_000, sampler=sampler)["x"], float)


@pytest.mark.slow
@pytest.mark.parametrize("reverse", [False, True], ids=["", "and reverse step"])
@pytest.mark.parametrize("name", KERNELS)
def test_p_hat_integrates_to_what_chains_do(mixture, name, reverse):
    sampler = cp.AnnealedMCMC(KERNELS[name], 1, reverse_step=reverse and FIRST_ORDER)
    assert_same_law(by_p_hat(mixture, sampler), drawn(mixture, sampler))


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["ULA", "MALA"])
def test_the_twist_of_a_step_towards_data_is_in_it(kernel):
    density = cp.compile(*OBSERVED)
    sampler = cp.AnnealedMCMC(KERNELS[kernel], 1, reverse_step=FIRST_ORDER)
    x = drawn(density, sampler)
    assert_same_law(by_p_hat(density, sampler), x)
    untwisted = dataclasses.replace(sampler.step, twist=0.0)
    straight = eqx.tree_at(lambda s: s.step, sampler, untwisted)
    assert_same_law(by_p_hat(density, straight), x, agree=False)


class Forgetful(cp.MALA):
    """A mutant: reports no difference between a move and its reversal."""

    def step(self, key: Any, state: Any, target: Any, step_size: Any) -> Any:
        state, info = super().step(key, state, target, step_size)
        zero = jnp.zeros_like(info.log_reversal)
        return state, dataclasses.replace(info, log_reversal=zero)


@pytest.mark.slow
def test_a_kernel_that_forgets_its_reversal_is_found_out(mixture):
    sampler = cp.AnnealedMCMC(Forgetful(lambda s: 0.6 * s.sigma**2), 1)
    assert_same_law(by_p_hat(mixture, sampler), drawn(mixture, sampler), agree=False)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["ULA", "MALA"])
@pytest.mark.parametrize("program", ["product", "observation"])
def test_under_smc_p_hat_is_the_law_of_the_weighted_path(kernel, program):
    """Few, coarse levels: the weighted path is far from the target.

    Both estimates of its law agree, also with observations that are averaged over the
    starts of steps.
    """
    densities = {
        "product": (both, two_modes(), gaussian(0.3, 0.8)),
        "observation": OBSERVED,
    }
    density = cp.compile(*densities[program])
    sampler = cp.SMC(KERNELS[kernel], 1, step=FIRST_ORDER)
    found = by_p_hat(density, sampler, 2000)
    runs = [run(density, seed, 4000, sampler=sampler) for seed in range(10)]
    evidence = np.exp([each.log_evidence for each in runs])
    of_runs = [features(np.asarray(each["x"], float)) for each in runs]
    difference = {}
    for name in found:
        # SMC estimates ∫ feature × evidence without bias.
        by_run = evidence * [values[name].mean() for values in of_runs]
        difference[name] = z_score(found[name], by_run)
    assert_agrees(difference)


def with_density_weights():
    """Likelihoods under density weights, and mean, variance and log Z of the target.

    It is a product of two Gaussians.
    """
    density = cp.compile(both, *map(gaussian, MEANS, SDS))
    sampler = cp.SMC(cp.MALA(lambda s: 0.5 * s.sigma**2), weights="density")
    likelihoods = partial(
        cp.metrics.raise_log_likelihood, density, key=jax.random.key(0), sampler=sampler
    )
    return likelihoods, *product_of_normals(FEW.alpha[0], FEW.sigma[0], MEANS, SDS)


def test_under_density_weights_it_is_the_target():
    """With a Metropolis kernel every reversal telescopes to log π₀ − log Z.

    This holds for any levels.
    """
    likelihoods, mean, variance, log_z = with_density_weights()
    law = stats.norm(mean, np.sqrt(variance))
    points = law.rvs(size=20, random_state=0)
    found = likelihoods(points, num_chains=3, log_evidence=log_z)
    assert np.abs(found.values - law.logpdf(points)).max() < 2e-4
    assert found.errors.max() < 1e-4


@pytest.mark.slow
def test_evidence_is_estimated_where_none_is_given():
    likelihoods, *_, log_z = with_density_weights()
    estimated = likelihoods(np.zeros(3), num_chains=1)
    assert abs(estimated.log_evidence - log_z) < 4 * estimated.log_evidence_error
    assert estimated.log_evidence_error < 0.05


# ── reports and refusals ──────────────────────────────────────────────────────────────


def test_values_errors_and_print(mixture):
    sampler = ula(True)
    points = np.array([-1.0, 0.9, 1.2])
    found = cp.metrics.raise_log_likelihood(
        mixture, {"x": points}, jax.random.key(0), sampler=sampler, num_chains=500
    )
    weights = np.exp(chains(mixture, points, sampler, 500))
    means = weights.mean(1)
    errors = weights.std(1, ddof=1) / means / np.sqrt(500)
    assert found.values == pytest.approx(np.log(means), abs=1e-5)
    assert found.errors == pytest.approx(errors, rel=1e-6)
    assert found.mean == pytest.approx(found.values.mean())
    assert found.standard_error == pytest.approx(found.values.std(ddof=1) / np.sqrt(3))
    monte_carlo_error = np.sqrt(np.sum(found.errors**2)) / 3
    assert found.monte_carlo_error == pytest.approx(monte_carlo_error)
    assert "over 3 points" in repr(found)
    assert "500 chains a point" in repr(found)


def test_in_batches_of_any_size():
    many = in_batches(lambda i: 2 * i, 10, 3)
    assert np.asarray(many).tolist() == list(range(0, 20, 2))
    few = in_batches(lambda i: 2 * i, 3, 10)
    assert np.asarray(few).tolist() == [0, 2, 4]


ADAPTIVE = {
    "online": cp.AnnealedMCMC(cp.MALA(), 2),
    "SMC": cp.SMC(cp.MALA(), step=FIRST_ORDER),
    "warm-up": cp.AnnealedMCMC(
        cp.MALA(cp.Adaptive(warmup=3)), 1, reverse_step=FIRST_ORDER
    ),
}


@pytest.mark.parametrize("sampler", ADAPTIVE.values(), ids=ADAPTIVE)
def test_adaptive_steps_are_those_of_a_run(mixture, sampler):
    with pytest.raises(CapabilityError, match=r"step_size=result\.step_size"):
        cp.metrics.raise_log_likelihood(
            mixture, np.array([0.9]), jax.random.key(0), sampler=sampler
        )
    # The level where SMC did not begin takes its neighbour's step.
    steps = np.array([0.1, 0.2, 0.3, 0.4, 0.5, np.nan])
    moves = frozen(sampler, mixture, steps).moves
    step_size = np.asarray(moves.kernel.kernels[0].step_size)
    assert step_size == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.5])
    # Transitions that adapted moved the chains too.
    assert moves.count == sampler.prepare(mixture).moves.total


def test_a_metric_that_is_measured_has_no_law_of_one_chain(mixture):
    with pytest.raises(CapabilityError) as caught:
        frozen(cp.SMC(step=FIRST_ORDER), mixture, np.full(6, 0.1))
    check_wording(str(caught.value))


def test_score_only_factors_have_the_same_likelihood():
    """N(0, 1), which a variance-preserving schedule leaves invariant."""
    score = learned(lambda x, t: -x + 0 * t, "score", FEW, (1,))
    normal = dist.Normal(jnp.zeros(1), jnp.ones(1)).to_event(1)
    energy = cp.Analytic(normal, FEW)

    def values(factor):
        density = cp.compile(single, factor)
        points = np.array([[0.0], [1.0]])
        key = jax.random.key(0)
        likelihood = cp.metrics.raise_log_likelihood
        return likelihood(density, points, key, sampler=ula(True)).values

    assert values(score) == pytest.approx(values(energy), abs=1e-4)


class Blind(cp.ULA):
    """Reports no probability of its reversed moves."""

    def step(self, key: Any, state: Any, target: Any, step_size: Any) -> Any:
        state, info = super().step(key, state, target, step_size)
        blind = dataclasses.replace(info, log_reversal=jnp.nan * info.log_reversal)
        return unadjusted(state, state)[0], blind


REFUSED = {
    "eta": ({"sampler": cp.Ancestral(eta=0.5)}, "eta=0.5"),
    "no sampler": ({"sampler": cp.MALA(0.1)}, "got MALA"),
    "no chains": ({"num_chains": 0}, "num_chains"),
    "steps": (
        {"sampler": cp.AnnealedMCMC(cp.MALA(), 1), "step_size": [0.1, 0.2]},
        "6",
    ),
    "steps of zero": (
        {"sampler": cp.AnnealedMCMC(cp.MALA(), 1), "step_size": np.zeros(6)},
        "step_size",
    ),
    "shape": ({"points": np.zeros((3, 2))}, "(3, 2)"),
    "site": ({"points": {"y": np.zeros(3)}}, "['y']"),
    "nan": ({"points": np.array([np.nan])}, ""),
    "evidence": (
        {"sampler": cp.SMC(cp.ULA(0.1), step=FIRST_ORDER), "log_evidence": np.nan},
        "nan",
    ),
    "key": ({"key": 0}, "key"),
    "static sites": (
        {"sampler": cp.AnnealedMCMC(cp.ULA(0.1), 1)},
        "'z'",
        CapabilityError,
    ),
    "a blind kernel": (
        {"sampler": cp.AnnealedMCMC(Blind(0.1), 1), "num_chains": 2},
        "log_reversal",
        CapabilityError,
    ),
}


@cp.program
def with_latent(f: Any) -> Any:
    numpyro.sample("z", dist.Normal(0.0, 1.0))
    return cp.sample("x", f)


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused(mixture, case):
    changed, facts, *kind = REFUSED[case]
    density = mixture
    if case == "static sites":
        density = cp.compile(with_latent, gaussian(0.0, 1.0))
    given = {
        "points": np.zeros(3),
        "key": jax.random.key(0),
        "sampler": cp.Ancestral(),
        **changed,
    }
    with pytest.raises(tuple(kind) or ComposeProbError) as caught:
        cp.metrics.raise_log_likelihood(density, **given)
    assert facts in str(caught.value)
    check_wording(str(caught.value))
