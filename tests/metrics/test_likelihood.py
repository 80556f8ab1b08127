"""RAISE: the expectation of p̂ is exactly the density of what the sampler puts out,
biases included."""

import dataclasses
import re
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
from sampling_cases import both, learned, measured, modes, run, single
from targets import product_of_normals
from zscores import assert_agrees, assert_disagrees, z_scores

FIRST_ORDER = cp.ReverseStep(order=1, control="none")
FEW = cp.Schedule.log_snr(
    6, min=-5.0, max=4.0
)  # steps of 1.8 in log-SNR: every sampler is visibly wrong
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
    logs = reverse_walks(
        path, jax.random.key(seed), as_positions(points, density), count, 100_000
    )
    return np.asarray(logs, float).reshape(-1, count)


# ── closed forms: samplers whose output is Gaussian ───────────────────────────────────


class Affine:
    """Every step of these samplers on Gaussian factors is affine: the law of (x,) or
    (x, v) follows exactly."""

    def __init__(self, schedule: cp.Schedule, factors: int, dimension: int = 1):
        self.schedule, self.factors = schedule, factors
        self.e = np.eye(dimension)[0]
        sigma = float(schedule.sigma[-1])
        self.mean, self.covariance = (
            np.zeros(dimension),
            np.diag([sigma**2 / factors, 1.0][:dimension]),
        )

    def at(self, k: int) -> tuple[float, float, float, float]:
        """α, σ, and the product's precision and precision·mean."""
        a, s = float(self.schedule.alpha[k]), float(self.schedule.sigma[k])
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
        slope = np.eye(len(self.e)) + (
            a_next / a - on_score * precision - 1
        ) * np.outer(self.e, self.e)
        self.move(slope, on_score * shift * self.e, noise * np.outer(self.e, self.e))

    def ula(self, k: int) -> None:
        _, s, precision, shift = self.at(k)
        h = 0.3 * s**2
        self.move(
            np.array([[1 - h * precision]]), np.array([h * shift]), np.array([[2 * h]])
        )

    def uhmc(self, k: int) -> None:
        """Two leapfrogs after a refreshment that keeps 0.6."""
        _, s, precision, shift = self.at(k)
        h = 0.7 * s
        self.move(np.diag([1.0, 0.6]), np.zeros(2), np.diag([0.0, 1 - 0.36]))
        half = np.array([[1, 0], [-h / 2 * precision, 1]]), np.array([0, h / 2 * shift])
        for slope, push in 2 * (half, (np.array([[1, h], [0, 1]]), np.zeros(2)), half):
            self.move(slope, push, np.zeros((2, 2)))

    def run(self, kernel: str | None, reverse: bool) -> Any:
        """The law at level 0 of a sampler that makes two transitions a level."""
        for k in range(self.schedule.num_levels - 1, -1, -1):
            if reverse and k < self.schedule.num_levels - 1:
                self.reverse(k + 1)
            for _ in range(2 if kernel else 0):
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
    ratios = {
        str(i): np.exp(row - p)
        for i, (row, p) in enumerate(zip(logs, log_density, strict=True))
    }
    return z_scores(ratios, dict.fromkeys(ratios, 1.0))


SLOW = ("ULA", "UHMC", "UHMC with reverse step")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if n in SLOW else []) for n in CLOSED],
)
def test_mean_of_p_hat_is_the_gaussian_that_the_sampler_draws_from(name):
    sampler, law, schedule, factors = CLOSED[name]
    each = [gaussian(MEANS[i], SDS[i], schedule) for i in range(factors)]
    density = cp.compile(both if factors == 2 else single, *each)
    points = law().mean() + law().std() * np.linspace(-1.5, 1.5, 4)
    logs = chains(density, points, sampler, 10_000)
    assert_agrees(scores_at(logs, law().logpdf(points)))
    # Not the law that the program promises: the check sees the sampler's bias.
    _, _, precision, shift = Affine(schedule, factors).at(0)
    assert_disagrees(
        scores_at(logs, stats.norm(shift / precision, precision**-0.5).logpdf(points))
    )


# ── any kernel: p̂ integrates to what chains do ───────────────────────────────────────

GRID = np.linspace(-3.0, 3.0, 61)


def features(x: np.ndarray) -> dict[str, np.ndarray]:
    """What the two ways to the output law are compared by."""
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
    """∫ feature·p̂ dx, once for each chain: midpoints with a random offset have no
    discretisation error on average."""
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
    difference = {}
    for name, value in features(x).items():
        error = np.sqrt(
            found[name].var(ddof=1) / len(found[name]) + value.var(ddof=1) / len(value)
        )
        difference[name] = float((found[name].mean() - value.mean()) / error)
    (assert_agrees if agree else assert_disagrees)(difference)


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
    density, sampler = (
        cp.compile(*OBSERVED),
        cp.AnnealedMCMC(KERNELS[kernel], 1, reverse_step=FIRST_ORDER),
    )
    x = drawn(density, sampler)
    assert_same_law(by_p_hat(density, sampler), x)
    straight = eqx.tree_at(
        lambda s: s.step, sampler, dataclasses.replace(sampler.step, twist=0.0)
    )
    assert_same_law(by_p_hat(density, straight), x, agree=False)


class Forgetful(cp.MALA):
    """A mutant: reports no difference between a move and its reversal."""

    def step(self, key: Any, state: Any, target: Any, step_size: Any) -> Any:
        state, info = super().step(key, state, target, step_size)
        return state, dataclasses.replace(
            info, log_reversal=jnp.zeros_like(info.log_reversal)
        )


@pytest.mark.slow
def test_a_kernel_that_forgets_its_reversal_is_found_out(mixture):
    sampler = cp.AnnealedMCMC(Forgetful(lambda s: 0.6 * s.sigma**2), 1)
    assert_same_law(by_p_hat(mixture, sampler), drawn(mixture, sampler), agree=False)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["ULA", "MALA"])
@pytest.mark.parametrize("program", ["product", "observation"])
def test_under_smc_p_hat_is_the_law_of_the_weighted_path(kernel, program):
    """Few, coarse levels: the weighted path is far from the target, and both ways to
    its law agree; with observations that are averaged over where steps came from
    too."""
    densities = {
        "product": (both, two_modes(), gaussian(0.3, 0.8)),
        "observation": OBSERVED,
    }
    density = cp.compile(*densities[program])
    sampler = cp.SMC(KERNELS[kernel], 1, step=FIRST_ORDER)
    found = by_p_hat(density, sampler, 2000)
    runs = [run(density, seed, 4000, sampler=sampler) for seed in range(10)]
    evidence = np.exp([each.log_evidence for each in runs])
    difference = {}
    for name in found:  # ∫ feature × evidence: what SMC estimates without bias
        by_run = evidence * [
            features(np.asarray(each["x"], float))[name].mean() for each in runs
        ]
        error = np.sqrt(
            found[name].var(ddof=1) / len(found[name])
            + by_run.var(ddof=1) / len(by_run)
        )
        difference[name] = float((found[name].mean() - by_run.mean()) / error)
    assert_agrees(difference)


def weighed():
    """Likelihoods under density weights of a product of two Gaussians, its mean, its
    variance and its log Z."""
    density = cp.compile(both, *map(gaussian, MEANS, SDS))
    sampler = cp.SMC(cp.MALA(lambda s: 0.5 * s.sigma**2), weights="density")
    likelihoods = partial(
        cp.metrics.raise_log_likelihood, density, key=jax.random.key(0), sampler=sampler
    )
    return likelihoods, *product_of_normals(FEW.alpha[0], FEW.sigma[0], MEANS, SDS)


def test_under_density_weights_it_is_the_target():
    """With a Metropolis kernel every reversal telescopes to log π₀ − log Z, whatever
    the levels."""
    likelihoods, mean, variance, log_z = weighed()
    law = stats.norm(mean, np.sqrt(variance))
    points = law.rvs(size=20, random_state=0)
    found = likelihoods(points, num_chains=3, log_evidence=log_z)
    assert np.abs(found.values - law.logpdf(points)).max() < 2e-4
    assert found.errors.max() < 1e-4


@pytest.mark.slow
def test_evidence_is_estimated_where_none_is_given():
    likelihoods, *_, log_z = weighed()
    estimated = likelihoods(np.zeros(3), num_chains=1)
    assert abs(estimated.log_evidence - log_z) < 4 * estimated.log_evidence_error
    assert estimated.log_evidence_error < 0.05


# ── what it reports, and what it refuses ──────────────────────────────────────────────


def test_values_errors_and_print(mixture):
    sampler, points = ula(True), np.array([-1.0, 0.9, 1.2])
    found = cp.metrics.raise_log_likelihood(
        mixture, {"x": points}, jax.random.key(0), sampler=sampler, num_chains=500
    )
    logs = chains(mixture, points, sampler, 500)
    assert found.values == pytest.approx(np.log(np.exp(logs).mean(1)), abs=1e-5)
    assert found.errors == pytest.approx(
        np.exp(logs).std(1, ddof=1) / np.exp(logs).mean(1) / np.sqrt(500), rel=1e-6
    )
    assert found.mean == pytest.approx(found.values.mean())
    assert found.standard_error == pytest.approx(found.values.std(ddof=1) / np.sqrt(3))
    assert found.monte_carlo_error == pytest.approx(
        np.sqrt(np.sum(found.errors**2)) / 3
    )
    assert "over 3 points" in repr(found)
    assert "500 chains a point" in repr(found)


def test_in_batches_of_any_size():
    assert np.asarray(in_batches(lambda i: 2 * i, 10, 3)).tolist() == list(
        range(0, 20, 2)
    )
    assert np.asarray(in_batches(lambda i: 2 * i, 3, 10)).tolist() == [0, 2, 4]


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
    steps = np.array(
        [0.1, 0.2, 0.3, 0.4, 0.5, np.nan]
    )  # the level where SMC did not begin takes its neighbour's
    moves = frozen(sampler, mixture, steps).moves
    assert np.asarray(moves.kernel.kernels[0].step_size) == pytest.approx(
        [0.1, 0.2, 0.3, 0.4, 0.5, 0.5]
    )
    assert (
        moves.count == sampler.prepare(mixture).moves.total
    )  # transitions that adapted moved the chains too


def test_a_metric_that_is_measured_has_no_law_of_one_chain(mixture):
    with pytest.raises(CapabilityError, match="measured from all chains"):
        frozen(cp.SMC(step=FIRST_ORDER), mixture, np.full(6, 0.1))


def test_score_only_factors_have_the_same_likelihood():
    """The score of N(0, 1), which a variance-preserving schedule leaves alone, with and
    without its log-density."""
    score = learned(lambda x, t: -x + 0 * t, "score", FEW, (1,))
    energy = cp.Analytic(
        dist.Independent(dist.Normal(jnp.zeros(1), jnp.ones(1)), 1), FEW
    )
    of = partial(
        cp.metrics.raise_log_likelihood,
        points=np.array([[0.0], [1.0]]),
        key=jax.random.key(0),
    )
    found, exact = (
        of(cp.compile(single, factor), sampler=ula(True)).values
        for factor in (score, energy)
    )
    assert found == pytest.approx(exact, abs=1e-4)


class Blind(cp.ULA):
    """Does not know how likely its moves are reversed."""

    def step(self, key: Any, state: Any, target: Any, step_size: Any) -> Any:
        state, info = super().step(key, state, target, step_size)
        return unadjusted(state, state)[0], dataclasses.replace(
            info, log_reversal=jnp.nan * info.log_reversal
        )


REFUSED = {
    "eta": ({"sampler": cp.Ancestral(eta=0.5)}, "eta=0.5"),
    "no sampler": ({"sampler": cp.MALA(0.1)}, "got MALA"),
    "no chains": ({"num_chains": 0}, "num_chains must be"),
    "steps": (
        {"sampler": cp.AnnealedMCMC(cp.MALA(), 1), "step_size": [0.1, 0.2]},
        "6 levels",
    ),
    "steps of zero": (
        {"sampler": cp.AnnealedMCMC(cp.MALA(), 1), "step_size": np.zeros(6)},
        "positive",
    ),
    "shape": ({"points": np.zeros((3, 2))}, "(3, 2)"),
    "site": ({"points": {"y": np.zeros(3)}}, "['y']"),
    "nan": ({"points": np.array([np.nan])}, "not finite"),
    "evidence": (
        {"sampler": cp.SMC(cp.ULA(0.1), step=FIRST_ORDER), "log_evidence": np.nan},
        "log-evidence is nan",
    ),
    "key": ({"key": 0}, "typed random key"),
    "static sites": (
        {"sampler": cp.AnnealedMCMC(cp.ULA(0.1), 1)},
        "'z' is a NumPyro latent",
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
    changed, message, *kind = REFUSED[case]
    density = (
        cp.compile(with_latent, gaussian(0.0, 1.0))
        if case == "static sites"
        else mixture
    )
    given = {
        "points": np.zeros(3),
        "key": jax.random.key(0),
        "sampler": cp.Ancestral(),
        **changed,
    }
    with pytest.raises(tuple(kind) or ComposeProbError, match=re.escape(message)):
        cp.metrics.raise_log_likelihood(density, **given)
