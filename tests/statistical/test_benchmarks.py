"""Benchmarks A and E as tests: the judged thresholds, on the rows that take seconds;
the whole tables are slow."""

import dataclasses

import disjoint
import mode_weights
import numpy as np
import pytest
import ring_product


def test_quadrature_agrees_with_exact_draws():
    problem = mode_weights.ring_product()
    row = mode_weights.samplers()["exact draws"]
    many = mode_weights.measure(problem, row, num_chains=400_000, keys=1)
    assert many.pooled < 0.003


def test_a_floor_is_what_exact_draws_have():
    problem = mode_weights.ring_product()
    row = mode_weights.measure(
        problem, mode_weights.samplers()["exact draws"], num_chains=500, keys=200
    )
    error = np.std(row.tv) / np.sqrt(len(row.tv))
    assert abs(row.mean - row.floor) < 4 * error < 0.1 * row.floor
    assert 0.06 * row.floor < row.pooled_floor < 0.08 * row.floor  # 1/√200


def test_every_estimate_has_its_exact_value_and_its_spread_beside_it():
    problem = mode_weights.ring_product()
    row = mode_weights.samplers()["exact draws"]
    drawn = mode_weights.measure(problem, row, num_chains=64, keys=2)
    estimated = dataclasses.replace(drawn, log_evidence=[-0.9, -1.1])
    told = dict(zip(mode_weights.COLUMNS, mode_weights.as_text(estimated), strict=True))
    assert told["log Z of one run"] == "-1.0000 ± 0.1414"
    assert (
        told["exact log Z"] == "-0.9888"
    )  # by the closed form, at level 0 of the cosine schedule
    assert told["TV of one run"].startswith(f"{np.mean(drawn.tv):.4f} ± ")
    assert told["floor"] == f"{drawn.floor:.4f}"
    assert mode_weights.as_text(drawn)[mode_weights.COLUMNS.index("exact log Z")] == "–"


@pytest.mark.slow
@pytest.mark.parametrize("benchmark", [ring_product, disjoint], ids=["A", "E"])
def test_the_whole_table(benchmark):
    problem = {
        ring_product: mode_weights.ring_product,
        disjoint: mode_weights.disjoint,
    }[benchmark]()
    rows = {
        name: mode_weights.measure(problem, row)
        for name, row in mode_weights.samplers().items()
    }
    assert not [text for text, holds in benchmark.checks(rows).items() if not holds]
