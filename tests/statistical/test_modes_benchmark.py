"""Benchmark `modes`: what it takes for exact is, what counts as wrong or named, and
that a stopped run goes on."""

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import modes
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from exact import ablation, axis, constraints, grids, measure, networks, right, without
from exact.case import Answer, schedule
from exact.measure import Outcome
from scipy import stats
from scipy.special import logsumexp

import composeprob as cp
from composeprob.results.checks import Need
from sampling_cases import measured, single, slow


def level_0():
    return float(schedule().alpha[0]), float(schedule().sigma[0])


@pytest.mark.parametrize("dims", [1, 2, 3, 10])
def test_a_grid_of_two_numbers_gives_the_square_of_a_mixture(dims):
    """Squares of mixtures are sums over pairs of components, in closed form."""
    alpha, sigma = level_0()
    terms = axis.squared_mixture(dims)
    mixture = terms[0][0]
    variance = (alpha * np.array(mixture.widths)) ** 2 + sigma**2
    logs = [
        np.log(mixture.weights[i] * mixture.weights[j])
        - 0.5
        * alpha**2
        * (mixture.centres[i] - mixture.centres[j]) ** 2
        / (variance[i] + variance[j])
        - 0.5 * dims * np.log(2 * np.pi * (variance[i] + variance[j]))
        for i, j in itertools.product(range(2), repeat=2)
    ]
    found = axis.exact(terms, dims, 0.0)
    assert found.log_evidence == pytest.approx(float(logsumexp(logs)), abs=3e-4)
    if dims == 10:  # the modes are far enough apart that each is on its side of the cut
        assert found.value == pytest.approx(
            float(np.exp(logs[0] - logsumexp(logs))), rel=1e-3
        )


def test_a_product_of_one_hot_mixtures_has_the_evidence_of_all_its_corners():
    """3 × 3 permutations: the sum over all 3⁶ choices of corners, each a product of
    Gaussians."""
    puzzle = constraints.permutations(3)
    alpha, sigma = level_0()
    v = (alpha * constraints.WIDTH) ** 2 + sigma**2
    corners = np.eye(3)
    chosen = np.array(list(itertools.product(range(3), repeat=6)))
    rows = corners[chosen[:, :3]]
    columns = corners[chosen[:, 3:]].transpose(0, 2, 1)
    apart = alpha**2 * ((rows - columns) ** 2).sum(
        (1, 2)
    )  # ∫ N(x; a, v)·N(x; b, v) dx = N(a; b, 2v), entry by entry
    logs = -apart / (4 * v) - 4.5 * np.log(4 * np.pi * v) - 6 * np.log(3)
    assert puzzle.exact().log_evidence == pytest.approx(
        float(logsumexp(logs)), abs=1e-5
    )


def test_solutions_are_counted():
    """Against numbers that are known: Petersen's graph has 120 colourings, six queens 4
    places."""
    assert [constraints.petersen().solutions, constraints.queens().solutions] == [
        120,
        4,
    ]
    every = jnp.asarray(list(itertools.product((0.0, 1.0), repeat=12)))
    clauses = constraints.satisfiability()
    assert int(jax.vmap(clauses.valid)(every).sum()) == clauses.solutions


def test_a_hill_on_a_gaussian():
    found = grids.bump_answer(1, gain=4.0, centre=1.5, width=0.05, sd=1.0, reach=0.3)
    x = np.linspace(-8, 8, 1_600_001)
    mass = stats.norm.pdf(x) * (1 + np.exp(4.0 - 0.5 * ((x - 1.5) / 0.05) ** 2))
    assert found.log_evidence == pytest.approx(
        np.log(mass.sum() * (x[1] - x[0])), abs=1e-5
    )
    assert found.value == pytest.approx(
        mass[np.abs(x - 1.5) < 0.3].sum() / mass.sum(), abs=1e-5
    )


def row(value, error, codes=(), exact=0.3, improper=False, withheld=None):
    numbers = {
        "exact": [exact, None],
        "estimates": [value, None],
        "errors": [error, None],
    }
    numbers["withheld"] = [withheld, None]
    return numbers | {"codes": list(codes), "chains": 1000, "improper": improper}


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (row(0.33, 0.01), Outcome.RIGHT),
        (row(0.35, 0.01), Outcome.DEFECT),
        (row(0.35, 0.01, ["levels_too_few"]), Outcome.NAMED),
        (row(0.30, 0.01, ["levels_too_few"]), Outcome.FALSE_ALARM),
        (row(0.90, None, ["shares_frozen"]), Outcome.NAMED),
        (row(0.31, None, ["ancestors_collapsed"]), Outcome.NO_ERROR),
        (row(0.31, None, ["shares_frozen"], withheld=0.01), Outcome.FALSE_ALARM),
        (row(0.35, None, ["shares_frozen"], withheld=0.01), Outcome.NAMED),
        (row(0.3, 0.01, improper=True), Outcome.DEFECT),
        (row(0.3, 0.01, ["samples_diverged"], improper=True), Outcome.NAMED),
        (row(0.3, 0.01, exact=None), Outcome.RIGHT),
        (row(0.3, 0.01, ["shares_frozen"], exact=None), Outcome.FALSE_ALARM),
        (
            row(0.3, 0.01)
            | {"exact": [0.3, 1.0], "estimates": [0.3, 1.5], "errors": [0.01, 0.1]},
            Outcome.DEFECT,
        ),
    ],
)
def test_what_a_run_is(run, expected):
    assert measure.outcome(run) is expected


def test_a_right_run_is_right_and_the_same_run_against_another_answer_is_not(
    tmp_path, monkeypatch
):
    """One Gaussian by reverse diffusion alone, which is exact there; then a wrong
    answer; then the file is enough."""
    case = axis.along(
        "tiny",
        "a Gaussian",
        ((right.gaussian(0.4, 0.7), 1.0),),
        cut=0.2,
        sampler=cp.Ancestral,
    )
    density = case.compile()
    answer = case.exact()
    assert answer.value == pytest.approx(stats.norm(0.4, 0.7).cdf(0.2), abs=1e-4)
    wrong = measure.measured(case, lambda: density, Answer(0.9), 0, 64)
    assert wrong["outcome"] == Outcome.DEFECT
    file = tmp_path / "rows.jsonl"
    (first,) = modes.measure([case], {64: 1}, file)
    assert first["outcome"] == Outcome.RIGHT
    assert first["estimates"] == wrong["estimates"]  # of the same key
    file.write_text(
        '{"program": "a Gau' + file.read_text()
    )  # before it, a write that was interrupted
    monkeypatch.setattr(modes, "measured", lambda *_: pytest.fail("made again"))
    assert list(modes.measure([case], {64: 1}, file)) == [first]


def test_what_a_status_withholds_is_read():
    """Reverse diffusion loses the shares of modes: the error beside its withheld one is
    that of as many independent draws."""
    (case,) = (case for case in axis.common_cases() if case.family == "Ancestral")
    density = case.compile()
    row = measure.measured(case, lambda: density, case.exact(), 0, 1000)
    assert row["codes"] == ["shares_frozen", "levels_too_few"]
    assert row["errors"] == [None, None]
    share = row["estimates"][0]
    assert row["withheld"][0] == pytest.approx(
        math.sqrt(share * (1 - share) / 1000), rel=0.1
    )


def test_a_program_that_is_refused_is_named():
    def refused():
        raise cp.errors.ImproperError("It rises without bound.")

    case = grids.improper_case()
    row = measure.measured(case, refused, case.exact(), 0, 64)
    assert row["outcome"] == Outcome.NAMED
    assert "rises without bound" in row["reason"]


def test_a_defect_fails_the_benchmark():
    fine = {
        "family": "right: one mode",
        "program": "p",
        "z": [1.0, None],
        "outcome": Outcome.RIGHT,
    }
    rows = [row(0.3, 0.01) | fine for _ in range(40)]
    assert all(modes.checks(rows).values())
    for outcome, codes in (
        (Outcome.DEFECT, []),
        (Outcome.FALSE_ALARM, ["shares_frozen"]),
    ):
        bad = [
            *rows,
            *({**rows[0], "outcome": outcome, "codes": codes} for _ in range(3)),
        ]
        assert not all(modes.checks(bad).values())


def test_there_are_thirty_easy_programs_and_names_are_unique():
    cases = modes.cases()
    assert sum(case.family.startswith("right") for case in cases) == 30
    assert len({case.name for case in cases}) == len(cases)


def test_each_way_names_a_part_of_the_library_that_stands(monkeypatch):
    """A function that is gone fails loudly, and is itself again afterwards."""
    # Other tests go on with what they have compiled.
    monkeypatch.setattr(jax, "clear_caches", lambda: None)
    for way in without.WAYS:
        if way.function is None:
            continue
        with way.function.patched() as instead:
            assert instead is way.function.instead
    gone = without.Function("composeprob.runtime.plan", "", "can_linger", None)
    with pytest.raises(AttributeError, match="can_linger"), gone.patched():
        pass
    with pytest.raises(ValueError, match="unpack"):
        without.way("luck")


def test_a_sampler_is_left_alone_where_it_lacks_the_part():
    smc = cp.SMC(cp.MALA(0.1), then=(cp.GlobalMoves(2), cp.WarmUp()))
    moved = cp.AnnealedMCMC(cp.MALA(0.1))
    left = without.way("global-moves").sampler(smc)
    assert [type(each) for each in left.finishers] == [cp.WarmUp]
    assert without.way("relaxation").sampler(smc) is smc
    assert float(without.way("resampling").sampler(smc).exchange.threshold) < 1 / 64
    assert without.way("second-run").sampler(smc).check_order is None
    for name in ("resampling", "global-moves", "warm-up", "second-run"):
        assert without.way(name).sampler(moved) is moved


def test_a_way_is_left_out_of_the_runs_that_use_it():
    """A Gaussian by 64 chains: 20 global moves, and no patient run. An earlier call's
    rows are enough."""
    case = axis.along("tiny", "a Gaussian", ((right.gaussian(0.4, 0.7), 1.0),), cut=0.2)
    ways = [without.way("global-moves"), without.way("closer")]
    written = []
    rows = list(ablation.measure([case], [64], 1, ways, [], written.append))
    assert rows == written
    default, other = rows
    with without.left_out(None) as plan:
        measure.measured(case, case.compile, case.exact(), 0, 64)
    (result,) = plan.results()  # the plan stops asking after its last attempt
    assert result.evaluations == default["evaluations"]
    assert (default["way"], other["way"]) == ("", "global-moves")
    assert default["uses"] == ["global-moves", "importance-samples", "tuned-steps"]
    assert default["evaluations"] - other["evaluations"] == 20
    assert "global moves" in default["reason"]
    again = ablation.measure([case], [64], 1, ways, written, pytest.fail)
    assert list(again) == rows
    nothing, moves, closer = ablation.table(rows, ways)
    assert nothing[:2] == ["nothing", "1"]
    assert moves[:3] == ["global-moves", "1", "0"]
    assert closer[1:3] == ["0", "–"]
    assert ablation.idle([nothing, moves, closer]) == ["global-moves"]


@cp.program
def group():
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    with numpyro.plate("members", 3):
        numpyro.sample("x", dist.Normal(0.0, scale))


class Comparable(cp.Check):
    """A remark on runs that importance samples can be compared with."""

    code = "comparable"
    withholds = False
    meaning = "importance samples can be compared with the run"
    needs = frozenset({Need.IMPORTANCE})

    def ask(self, run):
        return [self.finding("Importance samples can be compared with the run.")]


def along_one_axis():
    case = axis.along("tiny", "a Gaussian", ((right.gaussian(0.4, 0.7), 1.0),), cut=0.2)
    return case.compile()


def by_moments():
    prior = cp.Analytic(dist.Normal(1.0, 1.5), schedule())
    law = partial(dist.Normal, scale=0.3)
    return cp.compile(measured, prior, law, jnp.float32(2.0), "moments")


def of_a_count():
    prior = cp.Analytic(dist.Normal(1.0, 1.5), schedule())

    def law(x):
        return dist.Poisson(jnp.exp(x))

    return cp.compile(measured, prior, law, jnp.float32(20.0))


def of_tokens():
    logits = jnp.asarray(2 * np.random.default_rng(3).normal(size=(3, 3)))

    def network(tokens, visible):
        return logits + 0.0 * tokens[:, None]

    f = cp.MaskedDiffusion(network, length=3, num_values=3, mask="boolean")
    return cp.compile(single, f**4.0)


@pytest.mark.parametrize(
    ("name", "compiled", "chains"),
    [
        ("look-ahead", of_tokens, 64),
        ("importance-samples", along_one_axis, 16),
        slow("step-controls", along_one_axis, 256),
        slow("tuned-steps", along_one_axis, 64),
        slow("bent-step", by_moments, 64),
        slow("near", of_a_count, 64),
        slow("short-steps", partial(cp.compile, group), 16),
    ],
)
def test_a_run_without_a_way_is_another_run(name, compiled, chains):
    """With the way it is the same again, whatever was compiled without it."""
    way = without.way(name)
    found = []
    for some in (None, way, None):
        with without.left_out(some) as plan:
            result = cp.infer(
                compiled(),
                jax.random.key(0),
                num_chains=chains,
                progress=False,
                checks=[Comparable()],
            )
            codes = [str(finding.code) for finding in result.status.findings]
        found.append((codes, *(values.tolist() for values in result.samples.values())))
        assert some is not None or way.used(plan)
    default, other, again = found
    assert default == again
    assert default != other


def test_a_check_is_left_out_of_the_run_that_it_named():
    """Reverse diffusion alone loses the shares of modes, and variance: without either
    check the other one names the run."""
    (case,) = (case for case in axis.common_cases() if case.family == "Ancestral")
    density = case.compile()
    row = ablation.default_row(case, lambda: density, case.exact(), 0, 1000)
    assert row["outcome"] == Outcome.NAMED
    left = {"SharesFrozen": ["levels_too_few"], "NarrowSteps": ["shares_frozen"]}
    assert {name: found["codes"] for name, found in row["checks"].items()} == left


def test_programs_of_the_ablation_have_names_of_their_own():
    cases = modes.ablated()
    assert len({case.name for case in cases}) == len(cases)
    with pytest.raises(KeyError):
        ablation.selected(cases[:1])


def test_networks_are_the_mixtures_that_they_stand_for():
    mixture = networks.UNEVEN
    alpha, sigma = level_0()
    log_snr = float(schedule().log_snr[0])
    for t in (-2.3, 0.1, 1.9):
        exact = mixture.log_density(np.array([t]), np.zeros(1), 1, alpha, sigma)
        found = networks.log_noised(mixture, 1)(jnp.float32(t), log_snr)
        assert float(found) == pytest.approx(exact.item(), abs=1e-3)
    switched = networks.only_level_0(jnp.asarray(schedule().log_snr))
    np.testing.assert_allclose(switched[:2], [1.0, 0.0], atol=1e-5)
