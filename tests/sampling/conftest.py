"""Runs that several tests of sampling share."""

import pytest

import composeprob as cp
from composeprob import tuning
from composeprob.runtime.progress import Progress
from sampling_cases import both, normal


@pytest.fixture(scope="session")
def product():
    """The compiled product of two Gaussians in the plane."""
    return cp.compile(
        both, normal([0.0, 0.0], [1.0, 0.5]), normal([1.0, -1.0], [0.5, 1.0])
    )


@pytest.fixture
def every_level(monkeypatch):
    """A checkpoint after each level."""
    monkeypatch.setattr(Progress, "pause", 1e-9)
    monkeypatch.setattr(
        tuning, "CHECKPOINTS", tuning.CHECKPOINTS._replace(seconds=0.0, share=1e9)
    )
