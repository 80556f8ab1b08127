"""`Result`: weights, summary, pictures, ArviZ, and the round trip through a file."""

import dataclasses
from types import SimpleNamespace
from typing import ClassVar

import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray

from composeprob.density.annealed import SiteInfo
from composeprob.errors import LoadError, UnknownSiteError
from composeprob.findings import Code, Finding
from composeprob.plotting.figures import diagnostics
from composeprob.records import REPORTED, Quantity
from composeprob.results.record import About, by_level
from composeprob.results.result import Result
from composeprob.results.status import Status
from composeprob.results.summary import weighted_statistics
from composeprob.results.trust import SHOWN, Trust
from messages import check_wording
from refusals import refused

N, K = 400, 12
UNKNOWN = dict.fromkeys(("acceptance", "step_size", "ess"), np.full(K, np.nan))


def make(samples=None, log_weights=None, **changes):
    x = np.random.default_rng(0).normal(size=(N, 2)).astype(np.float32)
    fields = {
        "samples": {"x": x} if samples is None else samples,
        "log_weights": np.zeros(N) if log_weights is None else log_weights,
        "log_evidence": -1.25,
        "evaluations": 120,
        "status": Status(),
        "reason": "every factor has a rate",
    }
    about = {"seconds": 3.2, "sampler": "SMC(MALA(Adaptive()))"}
    for fact in dataclasses.fields(About):
        if fact.name in changes:
            about[fact.name] = changes.pop(fact.name)
    levels = {
        "acceptance": np.linspace(0.5, 0.6, K),
        "step_size": np.geomspace(1e-3, 1, K),
    }
    levels |= {"ess": np.full(K, 0.75), "non_finite": np.zeros(K, int)}
    levels |= {name: changes.pop(name) for name in REPORTED if name in changes}
    levels = by_level(np.linspace(11, -9, K), about.get("blocks", ()), levels)
    return Result(**fields | {"about": About(**about), "levels": levels} | changes)


def test_weighted_statistics_against_repetition():
    # Integer weights are the same as repeating the values.
    rng = np.random.default_rng(1)
    values = rng.normal(size=200)
    counts = rng.integers(1, 6, 200)
    repeated = np.sort(np.repeat(values, counts))
    mean, sd, low, middle, high = weighted_statistics(values, counts)
    np.testing.assert_allclose(
        [mean, sd], [repeated.mean(), repeated.std()], rtol=1e-10
    )
    for quantile, q in ((low, 0.05), (middle, 0.5), (high, 0.95)):
        assert quantile == repeated[int(np.ceil(q * len(repeated))) - 1]

    # Values that are not finite are left out.
    assert weighted_statistics(np.array([1.0, np.nan, 3.0]), np.ones(3))[0] == 2.0
    assert np.isnan(weighted_statistics(np.array([np.nan]), np.ones(1))).all()


def test_unweighted_keeps_equal_weights_and_resamples_others():
    np.testing.assert_array_equal(make().unweighted()["x"], make()["x"])
    values = np.arange(N, dtype=float)
    # No overflow far from 0.
    log_weights = np.where(values < N / 2, 0.0, np.log(3.0)) - 700.0
    result = make({"x": values}, log_weights)
    counts = np.bincount(result.unweighted()["x"].astype(int), minlength=N)
    assert counts.sum() == N
    assert abs(counts[N // 2 :].sum() - 0.75 * N) <= 1  # systematic: within one
    assert counts.max() <= 2  # floor or ceiling of N·w
    np.testing.assert_array_equal(
        result.unweighted()["x"], result._genealogy.index[result._resampled]
    )


def test_summary_weights_the_samples():
    values = np.repeat([0.0, 1.0], N // 2)
    summary = make({"x": values}, np.where(values == 1, np.log(3.0), 0.0)).summary()
    assert summary.rows["x"][0] == pytest.approx(0.75)
    text = str(summary)
    for part in (
        "SMC(MALA",
        "every factor has a rate",
        "120",
        "-1.25",
        "OK",
        "0.5 (level 0)",
    ):
        assert part in text
    check_wording(text)


def test_summary_names_every_element_of_small_sites_and_pools_large_ones():
    shapes = {"x": (2,), "z": (), "m": (2, 2), "i": (8, 8)}
    zeros = {name: np.zeros((N, *shape)) for name, shape in shapes.items()}
    summary = make(zeros).summary()
    assert list(summary.rows) == [
        "x[0]",
        "x[1]",
        "z",
        "m[0, 0]",
        "m[0, 1]",
        "m[1, 0]",
        "m[1, 1]",
        "i (8×8, pooled)",
    ]


def test_summary_of_tokens_has_weighted_shares_of_values():
    """Weights 1, 1, 2 of three sequences: of the first token 0 has the share ½ and so
    has 4, which is seen once."""
    tokens = np.array([[0, 1], [0, 1], [4, 2]], np.int32)
    result = make({"s": tokens, "x": np.zeros(3)}, np.log([1.0, 1.0, 2.0]))
    summary = result.summary()
    assert list(summary.rows) == ["x"]
    assert list(summary.tokens) == ["s[0]", "s[1]"]
    second = summary.tokens["s[1]"]
    assert (second.token, second.next) == (1, 2)
    assert (second.share, second.next_share) == pytest.approx((0.5, 0.5))
    assert second.entropy == pytest.approx(np.log(2))
    expected = result.probability(lambda s: s["s"][1] == 1)
    assert second.error == pytest.approx(expected.error, nan_ok=True)
    assert "2 in 3 samples; the most frequent, 0 1, has a share of 0.5" in str(summary)
    assert "entropy" in str(summary)
    assert "<td>1</td><td>0.5</td>" in result._repr_html_()
    assert result.numbers()["summary"]["s[1]"]["token"] == 1


def test_summary_pools_the_positions_of_long_sequences():
    tokens = np.zeros((4, 40), np.int32)
    tokens[:, :10] = 3
    (row,) = make({"s": tokens}, np.zeros(4)).summary().tokens.values()
    assert (row.token, row.next) == (0, 3)
    assert (row.share, row.next_share) == pytest.approx((0.75, 0.25))


def test_summary_shows_findings_and_leaves_out_missing_diagnostics():
    text = str(make(**UNKNOWN, log_evidence=None).summary())
    assert "acceptance" not in text
    assert "evidence" not in text
    status = Status(
        (
            Finding(
                Code.ACCEPTANCE_COLLAPSED, "Acceptance fell to 0.01 at level 3.", True
            ),
        )
    )
    text = str(make(status=status, non_finite=np.full(K, 2)).summary())
    assert "ACCEPTANCE_COLLAPSED: Acceptance fell" in text
    assert " 24 " in text
    check_wording(text)


def test_blocks_have_columns_of_their_own(tmp_path):
    both = np.stack([np.linspace(0.5, 0.6, K), np.linspace(0.7, 0.9, K)], axis=1)
    result = make(
        acceptance=both,
        step_size=np.full((K, 2), [0.1, 0.02]),
        blocks=("x", "mu, sigma"),
    )
    text = str(result.summary())
    for part in (
        "acceptance of x",
        "acceptance of mu, sigma",
        "0.7 (level 0)",
        " 0.02 ",
    ):
        assert part in text
    check_wording(text)
    lines = [line.get_text() for line in result.plot().axes[1].get_legend().get_texts()]
    assert lines[:3] == [
        "effective sample size",
        "acceptance of x",
        "acceptance of mu, sigma",
    ]
    assert lines[3:] == ["step size of x (right)", "step size of mu, sigma (right)"]
    plt.close("all")
    assert result.numbers()["levels"]["acceptance"][0] == [0.5, 0.7]
    loaded = Result.load(result.save(tmp_path / "run"))
    assert loaded.about.blocks == ("x", "mu, sigma")
    np.testing.assert_array_equal(loaded.acceptance, both)


def test_sites_by_name_and_one_short_line():
    assert make()["x"].shape == (N, 2)
    refused(lambda: make()["y"], UnknownSiteError)
    assert repr(make()) == (
        "Result(x (400, 2); SMC(MALA(Adaptive())); 120 evaluations per chain; "
        "status OK; 3.2 s)"
    )


def test_round_trip_through_a_file(tmp_path):
    rng = np.random.default_rng(2)
    samples = {
        "x": rng.normal(size=(N, 2)).astype(np.float32),
        "part/z": rng.normal(size=N),
        "transposed": rng.normal(size=(3, N)).T,  # not contiguous in memory
        "flag": rng.integers(0, 2, N).astype(bool),
    }
    status = Status(
        (
            Finding(Code.NON_FINITE, "…", False),
            Finding(Code.WEIGHTS_COLLAPSED, "Try more chains.", True),
        )
    )
    result = make(
        samples,
        rng.normal(size=N),
        status=status,
        acceptance=np.full(K, np.nan),
        log_evidence=None,
        quadrature_error=np.linspace(0, 0.1, K),
        curl={"f(x)": 0.04, "g(x)": float("nan")},
    )
    path = result.save(tmp_path / "new" / "run")
    assert path.name == "run.safetensors"
    loaded = Result.load(path)
    assert loaded.density is None
    assert list(loaded.samples) == list(samples)
    for name, value in samples.items():
        assert loaded[name].dtype == value.dtype
        np.testing.assert_array_equal(loaded[name], value)
    for field in dataclasses.fields(Result):
        if field.name not in ("samples", "density"):
            a, b = getattr(loaded, field.name), getattr(result, field.name)
            if field.name == "levels":
                xarray.testing.assert_identical(a, b)
            elif dataclasses.is_dataclass(b):
                np.testing.assert_equal(dataclasses.asdict(a), dataclasses.asdict(b))
            else:
                np.testing.assert_equal(a, b)
    # Nothing is left of the writing.
    assert [file.name for file in path.parent.iterdir()] == ["run.safetensors"]
    assert str(loaded.summary()) == str(result.summary())
    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    assert path.stat().st_mode == ordinary.stat().st_mode


def test_the_reference_lists_the_quantities_of_levels():
    assert all(f"``{name}``" in Result.__doc__ for name in REPORTED)


def test_a_file_older_than_a_quantity_is_read(tmp_path, monkeypatch):
    """One row is all that a new quantity needs; required ones are missed by name."""
    older = make().save(tmp_path / "older")
    monkeypatch.setitem(REPORTED, "waits", Quantity("waits", old_files_lack=True))
    assert np.isnan(Result.load(older).levels["waits"]).all()
    result = make(waits=np.arange(K, dtype=float))
    loaded = Result.load(result.save(tmp_path / "newer"))
    xarray.testing.assert_identical(loaded.levels, result.levels)
    assert loaded.levels["waits"].attrs["long_name"] == "waits"
    assert "waits" in diagnostics(loaded)
    assert result.numbers()["levels"]["waits"][:2] == [0.0, 1.0]
    monkeypatch.setitem(REPORTED, "waits", Quantity("waits"))
    error = refused(lambda: Result.load(older), LoadError)
    assert "'waits'" in error.found


def test_arviz_sees_independent_draws_of_equal_weights():
    import arviz

    data = make().to_arviz()
    assert data.posterior["x"].shape == (1, N, 2)
    assert data.sample_stats["log_weight"].shape == (1, N)
    assert data.constant_data["acceptance"].shape == (K,)
    assert data.attrs["evaluations"] == 120
    assert arviz.summary(data, kind="stats").shape[0] == 2
    values = np.repeat([0.0, 1.0], N // 2)
    data = make({"x": values}, np.where(values == 1, np.log(3.0), 0.0)).to_arviz()
    assert float(data.posterior["x"].mean()) == pytest.approx(0.75, abs=1 / N)


def test_pandas_has_a_row_for_each_sample_of_equal_weight():
    values = np.repeat([0.0, 1.0], N // 2)
    weights = np.where(values == 1, np.log(3.0), 0.0)
    samples = {"x": np.stack([values, -values], 1), "z": values}
    table = make(samples, weights).to_pandas()
    assert list(table.columns) == ["x[0]", "x[1]", "z"]
    assert table.index.name == "draw"
    assert table["z"].mean() == pytest.approx(0.75, abs=1 / N)
    np.testing.assert_array_equal(table["x[1]"], -table["z"])


@pytest.mark.parametrize(
    ("name", "instead"),
    [("posterior", "to_arviz"), ("to_netcdf", "to_arviz"), ("to_df", "to_pandas")],
)
def test_where_people_look_for_other_forms(name, instead):
    assert instead in dir(make())
    with pytest.raises(AttributeError, match=instead):
        getattr(make(), name)


class Density:
    """The members of a compiled density that a plot reads: one noised site, N(0, I)."""

    capabilities = frozenset({"score", "energy"})
    sites: ClassVar = {"x": SiteInfo("noised", (2,))}
    graph: ClassVar = SimpleNamespace(name="program", formula="π_k(x) ∝ f(x)")

    def log_density(self, position, level):
        return -0.5 * (position["x"] ** 2).sum()


def panels(result):
    figure = result.plot()
    figure.canvas.draw()
    axes = {ax.get_title(loc="left"): ax for ax in figure.axes}
    plt.close(figure)
    return axes


def test_plot_of_images_scalars_vectors_and_the_run():
    rng = np.random.default_rng(0)
    samples = {
        "gray": rng.uniform(size=(N, 8, 8)),
        "colour": rng.uniform(-1, 1, size=(N, 8, 8, 3)),
        "one": rng.uniform(size=(N, 8, 8, 1)),
        "z": rng.normal(size=N),
        "v": rng.normal(size=(N, 3)),
        "matrix": rng.normal(size=(N, 2, 2)),
    }
    axes = panels(make(samples))
    for name in ("gray", "colour", "one"):
        assert len(axes[f"{name} (first 16 samples)"].images) == 1
    colour = axes["colour (first 16 samples)"]
    assert colour.images[0].get_array().ndim == 3
    assert axes["z"].patches
    assert len(axes["v"].get_legend().get_texts()) == 3
    assert len(axes["matrix"].get_legend().get_texts()) == 4
    assert axes["run"].lines


def test_plot_without_acceptance_or_with_few_or_broken_samples():
    assert "run" not in panels(make(**UNKNOWN))
    shapes = {"x": (2,), "z": (), "i": (8, 8)}
    broken = {name: np.full((N, *shape), np.nan) for name, shape in shapes.items()}
    panels(make(broken))
    single = {name: np.zeros((1, *shape)) for name, shape in shapes.items()}
    panels(make(single, np.zeros(1)))


def test_only_every_kth_of_many_draws_is_read():
    """Pictures and summaries of long runs: no more numbers than asked for, spread over
    the run, of equal weight."""
    x = np.arange(N * 30 * 2, dtype=float).reshape(N, 30, 2)
    result = make({"x": x}, draws=30, thin=2)
    np.testing.assert_array_equal(result.drawn("x", most=N * 2 * 10), x[:, ::3])
    np.testing.assert_array_equal(
        result.unweighted(most=N * 2 * 10)["x"], x[:, ::3].reshape(-1, 2)
    )
    assert result.drawn("x").shape == (N, 30, 2)
    # One draw of each chain at least.
    assert result.drawn("x", most=1).shape == (N, 1, 2)


def test_values_computed_later_are_computed_once_and_kept(tmp_path):
    calls = []

    def status(result):
        calls.append("status")
        text = str(result.about.curl["f"])
        return Status((Finding(Code.NOT_CONSERVATIVE, text, True),))

    def curl(about):
        calls.append("curl")
        return {"f": 0.3}

    def error(result):
        return np.nan if result.status.withholds else 0.1

    late = {"curl": curl, "status": status, "log_evidence_error": error}
    result = make(**late)
    assert calls == []
    assert np.isnan(result.log_evidence_error)
    assert result.status.message == "0.3"
    assert calls == ["status", "curl"]
    same = dataclasses.replace(result, evaluations=1)
    assert (same.status, same.about.curl) == (result.status, result.about.curl)
    assert make(**late).numbers()["curl"] == {"f": 0.3}
    assert Result.load(make(**late).save(tmp_path / "late")).status == result.status
    assert calls == ["status", "curl"] * 3
    fields = dict(vars(make()))
    del fields["status"]
    with pytest.raises(TypeError, match="status"):
        Result(**fields)
    assert make().about.curl == {}


def test_every_number_of_trust_is_printed_with_its_meaning():
    trust = Trust(num_chains=100, ancestors=90, effective_chains=80.0)
    assert str(trust).count("\n") == 2
    for name, _, meaning in SHOWN:
        more = dataclasses.replace(trust, **{name: 0.5})
        assert meaning in str(more)
        assert meaning not in str(trust)
    lost = dataclasses.replace(trust, level_weights=0.0)
    assert "0  of the chains count, at the worst level" in str(lost)


def test_trust_says_whether_proportions_are_contradicted_or_unsupported():
    trust = Trust(num_chains=1000, independent=900.0)
    assert trust.enough
    contradicted = dataclasses.replace(trust, proportions="contradicted")
    assert "modes were contradicted" in contradicted.lacks
    unsupported = dataclasses.replace(trust, proportions="unsupported")
    assert "nothing supported the proportions" in unsupported.lacks
    assert "unsupported" in str(unsupported)


def test_exact_weights_need_only_leave_enough_ancestors():
    trust = Trust(num_chains=1000, independent=900.0, level_weights=0.03)
    assert not trust.enough
    exact = dataclasses.replace(trust, exact_weights=True, step_weights=0.001)
    assert exact.enough
    few = dataclasses.replace(exact, level_weights=0.003)
    assert not few.enough


def test_a_file_with_the_former_count_of_defects_is_read(tmp_path, monkeypatch):
    former = {"num_chains": N, "contradicted": 1}
    monkeypatch.setattr(Trust, "numbers", lambda self: former)
    path = make(trust=Trust(num_chains=N)).save(tmp_path / "former")
    assert Result.load(path).trust.proportions == "unsupported"
