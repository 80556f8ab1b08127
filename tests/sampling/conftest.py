"""What several tests of sampling run."""

import pytest

import composeprob as cp
from sampling_cases import both, normal


@pytest.fixture(scope="session")
def product():
    """The compiled product of two Gaussians in the plane."""
    return cp.compile(both, normal([0.0, 0.0], [1.0, 0.5]), normal([1.0, -1.0], [0.5, 1.0]))
