"""An unconditional network that is, or is not, the mixture of its conditional ones."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import composeprob as cp
from composeprob.errors import InvalidValueError, ShapeError, WrongTypeError
from composeprob.training import conditionals as module
from refusals import refused

SCHEDULE = cp.Schedule.log_snr(24)
SHARES = (0.3, 0.7)
MEANS = (-1.0, 1.5)
WIDTHS = (0.4, 0.6)


class Score(eqx.Module):
    """The score of a mixture of isotropic Gaussians in the plane."""

    shares: jax.Array
    means: jax.Array
    widths: jax.Array

    def __call__(self, x, log_snr):
        alpha2 = jax.nn.sigmoid(log_snr)
        variances = alpha2 * self.widths**2 + 1 - alpha2

        def log_density(x):
            away = jnp.sum((x - jnp.sqrt(alpha2) * self.means[:, None]) ** 2, 1)
            logs = jnp.log(self.shares) - jnp.log(variances) - away / (2 * variances)
            return jax.nn.logsumexp(logs)

        return jax.grad(log_density)(x)


def factor(shares, means, widths):
    network = Score(*(jnp.asarray(x, jnp.float32) for x in (shares, means, widths)))
    return cp.Diffusion(
        network, SCHEDULE, event_shape=(2,), parameterization="score", time="log_snr"
    )


CONDITIONALS = [
    factor((1.0,), (mean,), (width,)) for mean, width in zip(MEANS, WIDTHS, strict=True)
]


def found(unconditional, shares):
    key = jax.random.key(0)
    return cp.training.misfit_of_mixture(
        unconditional, CONDITIONALS, key, shares=shares, num=128
    )


@pytest.mark.parametrize("shares", [SHARES, None], ids=["shares", "no shares"])
@pytest.mark.parametrize("off", [0.0, 1.0])
def test_a_pair_that_is_no_mixture(shares, off):
    """One label's mode is off by 1 in the unconditional network; no shares mend it."""
    misfit = found(factor(SHARES, (MEANS[0], MEANS[1] + off), WIDTHS), shares)
    assert (misfit is not None) == (off > 0)


def test_shares_that_are_wrong_are_found_where_they_are_given():
    """The network is a mixture under the shares .9 and .1."""
    unconditional = factor((0.9, 0.1), MEANS, WIDTHS)
    assert found(unconditional, SHARES) is not None
    assert found(unconditional, None) is None


def test_shares_that_suit_are_those_of_the_network():
    key = jax.random.key(1)
    unconditional = factor((0.9, 0.1), MEANS, WIDTHS)
    noised = module.noised_labels(unconditional, CONDITIONALS, key, 256).of_labels
    np.testing.assert_allclose(module.best_shares(noised), (0.9, 0.1), atol=0.1)


@pytest.mark.parametrize(
    ("count", "shares"), [(1, None), (2, (0.5, 0.2, 0.3)), (2, (-1.0, 2.0))]
)
def test_labels_and_shares_that_do_not_fit(count, shares):
    refused(
        lambda: cp.training.misfit_of_mixture(
            factor(SHARES, MEANS, WIDTHS),
            CONDITIONALS[:count],
            jax.random.key(0),
            shares=shares,
        ),
        InvalidValueError,
    )


def test_a_factor_in_the_place_of_a_list_of_them():
    unconditional = factor(SHARES, MEANS, WIDTHS)
    key = jax.random.key(0)
    refused(
        lambda: cp.training.misfit_of_mixture(unconditional, CONDITIONALS[0], key),
        WrongTypeError,
    )


def test_a_reference_over_other_events_is_refused():
    for measure in (cp.training.sample_quality, cp.training.score_errors):
        refused(
            lambda measure=measure: measure(
                CONDITIONALS[0], dist.Normal(0.0, 1.0), jax.random.key(0)
            ),
            ShapeError,
        )
