"""With `chunk=` the samples are the same, bit for bit, on two devices or more, for every row of the registry.

The compiler treats a program for one device otherwise: there only some rows are held to it, which once differed.
"""

import json

import pytest

import same_bits
from processes import said
from registry import FACTORS, KERNELS

RUN = "import json, sys, same_bits; same_bits.main(**json.loads(sys.argv[1]))"
CLOSED = [name for name in same_bits.EXPRESSIONS if name not in FACTORS]


def found(cases, devices):
    """Whether each case's samples on the other numbers of devices are those on the first; in a process of its own."""
    task = json.dumps({"cases": cases, "devices": devices})
    return json.loads(said(RUN, task, devices=same_bits.DEVICES, timeout=3600)[-1])


def test_weighted_models_and_full_covariances_have_the_same_samples_on_one_device_and_on_eight():
    """The rows whose last bits depended on the number of devices while XLA merged equal expressions."""
    case = "Ancestral: Weighted + mixture of MultivariateNormal"
    assert found([case], [1, 2, 8]) == {case: [True, True]}


@pytest.mark.slow
@pytest.mark.parametrize("rows", [list(FACTORS), CLOSED], ids=["factors", "closed forms"])
def test_every_factor(rows):
    """By reverse diffusion and MALA, and where the factor has a rate by SMC."""
    cases = [f"MALA: {row}" for row in rows] + [f"SMC: {row}" for row in rows if same_bits.has_rate(row)]
    assert found(cases, [2, 8]) == {case: [True] for case in cases}


@pytest.mark.slow
def test_every_kernel_and_what_is_annealed_exactly():
    cases = [*KERNELS, "observed", "SMC, metric: mixture of Normal", "global moves: mixture of Normal"]
    assert found(cases, [2, 8]) == {case: [True] for case in cases}
