"""The cross-condition loss: least at the true log-densities of conditions, "no condition" included."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import composeprob as cp
from composeprob.errors import InvalidValueError
from composeprob.training.loss import draw, losses
from training.recipes import tiny
from zscores import assert_agrees, assert_disagrees, z_scores

KEY = jax.random.key(6)
SHARES = jnp.array([0.7, 0.3])
PARTS = dist.Normal(jnp.array([[-0.4, 0.0], [0.5, 0.3]]), jnp.array([[0.5, 0.5], [0.3, 0.8]])).to_event(1)
NONE = -1


def data(key, n):
    part_key, event_key = jax.random.split(key)
    part = dist.Categorical(SHARES).sample(part_key, (n,))
    return jnp.take_along_axis(PARTS.sample(event_key, (n,)), part[:, None, None], axis=1)[:, 0], {"part": part}


def told_apart(**changes):
    settings = {"data": data, "conditions": {"part": NONE}, "condition_dropout": 0.3, "parameterization": "energy"}
    return tiny(**(settings | {"cross_condition": 1.0} | changes))


@pytest.mark.parametrize("tilt", [0.0, 0.2, -0.2])
@pytest.mark.parametrize(("tilted", "others"), [(NONE, 1), (1, 1), (1, 4)])
def test_the_loss_is_least_at_the_true_ratios(tilt, tilted, others):
    """The slope of the mean loss in a constant a of one condition's log f is zero at a = 0, and nowhere else."""

    def slopes(a):
        def energy(x, log_snr, part):
            alpha, sigma = jnp.sqrt(jax.nn.sigmoid(log_snr)), jnp.sqrt(jax.nn.sigmoid(-log_snr))
            spread = jnp.sqrt((alpha * PARTS.base_dist.scale) ** 2 + sigma**2)
            each = dist.Normal(alpha * PARTS.base_dist.loc, spread).to_event(1).log_prob(x)
            any_part = jax.nn.logsumexp(each + jnp.log(SHARES))
            return -sigma * (jnp.where(part == NONE, any_part, each[jnp.maximum(part, 0)]) + a * (part == tilted))

        recipe = told_apart(cross_condition_others=others)
        factor = cp.Diffusion(
            energy, recipe.schedule, event_shape=(2,), parameterization="energy", time="log_snr", conditions={"part": 0}
        )
        return losses(factor, draw(recipe, KEY, 20_000)).cross_condition

    slope = jax.jit(jax.jacfwd(slopes))(jnp.float32(tilt)).reshape(1000, 20)  # neighbours share a condition
    scores = z_scores({"slope": slope}, {"slope": 0.0})
    if tilt:
        assert_disagrees(scores)
        assert np.sign(scores["slope"]) == np.sign(tilt)
    else:
        assert_agrees(scores)


def test_the_next_event_s_condition_is_the_foreign_one():
    batch = draw(told_apart(), KEY, 16)
    np.testing.assert_array_equal(batch.foreign["part"][:, 0], np.roll(batch.conditions["part"], 1))
    assert NONE in np.asarray(batch.foreign["part"])
    assert draw(told_apart(cross_condition=0.0), KEY, 16).foreign is None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"parameterization": "epsilon"}, "cross_condition is given for 'epsilon', a score"),
        ({"cross_condition": -1.0}, "cross_condition is -1.0"),
        ({"conditions": {}, "condition_dropout": 0.0}, "cross_condition is given without conditions"),
        ({"cross_condition": 0.0, "denoising": False}, "no loss is left"),
        ({"batch_size": 1}, "no 1 other conditions to tell apart"),
    ],
)
def test_what_cannot_work_is_refused(changes, told):
    with pytest.raises(InvalidValueError, match=told):
        told_apart(**changes)
