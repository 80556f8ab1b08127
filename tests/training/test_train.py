"""Training: learning, exact resumption, averages, and refusals."""

import dataclasses
import signal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import composeprob as cp
from composeprob.checkpoint import CheckpointFolder
from composeprob.errors import (
    ConditionError,
    InvalidValueError,
    LoadError,
    NetworkError,
    WrongTypeError,
)
from composeprob.models.networks.residual_mlp_eqx import ResidualMLP
from composeprob.training import Conditions, Denoising, LogSNR, score_errors, train
from composeprob.training import loop as loop_module
from composeprob.training.loop import initial, losses, make_advance
from refusals import refused
from training.recipes import NORMAL, batch_of, cosine, tiny, untrained

KEY = jax.random.key(3)
NO_STYLE = np.zeros(3)


@pytest.mark.slow
def test_it_learns_the_score_of_a_gaussian():
    recipe = tiny(
        parameterization="energy_residual",
        iterations=400,
        size=128,
        ema=0.98,
        antithetic=True,
    )
    result = train(recipe, KEY, progress=False)
    assert result.finished
    assert result.loss.shape == (400,)
    assert result.loss[-100:].mean() < 0.95 * result.loss[:10].mean()
    rows = score_errors(result.factor, NORMAL, KEY, num=500)
    rows = [row for row in rows if -6 <= row["log_snr"] <= 2]
    assert max(row["error"] for row in rows) < 0.02, rows
    # Under much noise ε is nearly known; under little noise it cannot be predicted.
    assert result.loss_by_log_snr.shape == (len(result.log_snr_edges) - 1,)
    assert result.loss_by_log_snr[0] < 0.1 < 0.5 < result.loss_by_log_snr[-1]


@pytest.mark.parametrize(
    "form", ["energy", "energy_norm", "energy_inner", "x0", "v", "score"]
)
def test_the_loss_of_every_parameterization(form):
    outputs = {"outputs": 1} if form == "energy" else {}
    network = ResidualMLP(2, hidden=8, blocks=0, embedding=4, key=KEY, **outputs)
    factor = tiny(parameterization=form).factor(network)
    batch = batch_of(tiny(), KEY, 16)
    alpha = batch.noise.alpha[:, None]
    sigma = batch.noise.sigma[:, None]
    x = alpha * batch.events + sigma * batch.epsilon

    @jax.jit
    def both(batch, x):
        scores = jax.vmap(lambda x, noise: factor.evaluate(x, noise, {})[1])
        return losses(factor, batch), scores(x, batch.noise)

    (each, *crossed), score = both(batch, x)
    expected = jnp.mean((batch.epsilon + sigma * score) ** 2, axis=1)
    np.testing.assert_allclose(each, expected, rtol=1e-4)
    # There is neither a level nor a condition to compare with.
    np.testing.assert_array_equal(crossed, np.zeros((2, 16)))


def test_it_starts_from_the_weights_that_are_given():
    trained = untrained(tiny(), jax.random.key(8))
    other = untrained(tiny(), jax.random.key(9))
    result = train(
        tiny(iterations=1, learning_rate=1e-12),
        KEY,
        progress=False,
        start=lambda network: trained,
    )
    chex.assert_trees_all_close(result.factor.network, trained, rtol=0, atol=1e-6)
    assert not np.allclose(jax.tree.leaves(other)[0], jax.tree.leaves(trained)[0])


@pytest.mark.slow
def test_interrupted_and_resumed_is_bitwise_the_same_as_not_interrupted(
    tmp_path, monkeypatch
):
    def network(key):
        return ResidualMLP(2, hidden=8, blocks=1, embedding=4, outputs=1, key=key)

    recipe = tiny(
        parameterization="energy",
        network=network,
        learning_rate=cosine(3e-3),
        chunk=8,
        losses=(Denoising(lambda log_snr: jax.nn.sigmoid(log_snr)),),
    )
    whole = train(recipe, KEY, progress=False)
    folder = tmp_path / "checkpoints"
    calls = []

    def interrupted(*args, **values):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)  # Ctrl-C in the middle of training

    monkeypatch.setattr(loop_module.Progress, "update", interrupted)
    partial = train(recipe, KEY, checkpoint_dir=folder, progress=False)
    assert not partial.finished
    assert 0 < len(partial.loss) < recipe.iterations
    np.testing.assert_array_equal(partial.loss, whole.loss[: len(partial.loss)])

    resumed = train(recipe, KEY, checkpoint_dir=folder, progress=False)
    assert resumed.finished
    np.testing.assert_array_equal(resumed.loss, whole.loss)
    chex.assert_trees_all_equal(resumed.factor.network, whole.factor.network)
    # A third call finds the run finished, and has nothing to do.
    done = len(calls)
    again = train(recipe, KEY, checkpoint_dir=folder, progress=False)
    chex.assert_trees_all_equal(again.factor.network, whole.factor.network)
    assert len(calls) == done


def test_a_checkpoint_of_another_run_is_refused_unless_cleared(tmp_path):
    state = {"weights": jnp.arange(3.0)}
    CheckpointFolder(tmp_path, {"learning_rate": 3e-3}).save(2, state)
    other = CheckpointFolder(tmp_path, {"learning_rate": 1e-2})
    refused(
        lambda: other.restore(state),
        LoadError,
    )
    sampling = CheckpointFolder(tmp_path, {"number of chains": 24})
    refused(lambda: sampling.restore(state), LoadError, "of cp.training.train")
    other.clear()
    assert other.restore(state) is None


def test_the_fix_of_a_refused_checkpoint_is_an_argument_of_train(tmp_path):
    folder = tmp_path / "run"
    recipe = tiny(iterations=2)
    train(recipe, KEY, checkpoint_dir=folder, progress=False)

    def again(**settings):
        key = jax.random.key(1)
        return train(recipe, key, checkpoint_dir=folder, progress=False, **settings)

    refused(again, LoadError, "key", r"train\(…, resume=False\)")
    assert again(resume=False).finished


def test_data_networks_and_schedules_are_what_a_checkpoint_is_made_of():
    """Without them in the fingerprint, a call returned the network of other data."""

    def fingerprint(**changes):
        recipe = tiny(**changes)
        return loop_module._fingerprint(recipe, untrained(recipe, KEY), KEY)

    def wide(key):
        return ResidualMLP(2, hidden=20, blocks=1, embedding=8, key=key)

    first = fingerprint()
    changes = {
        "data": {"data": lambda key, n: 1.01 * NORMAL.sample(key, (n,))},
        "network": {"network": wide},
        "schedule": {
            "schedule": cp.Schedule.log_snr(10, min=-6.0, max=3.0),
            "log_snr": (-6.0, 4.0),
        },
    }
    assert fingerprint(data=lambda key, n: NORMAL.sample(key, (n,))) == first
    for name, change in changes.items():
        other = fingerprint(**change)
        assert [key for key in other if other[key] != first[key]] == [name]


def test_the_average_follows_its_formula_and_one_compilation_serves_all_steps():
    # Traced once in the compiled step, once for the shape of events.
    @chex.assert_max_traces(2)
    def data(key, n):
        return NORMAL.sample(key, (n,))

    recipe = tiny(data=data, ema=0.9)
    network = untrained(recipe, KEY)
    advance = make_advance(recipe, network, KEY)
    state = initial(recipe, network)
    expected = state.parameters
    for steps in (1, 1, 1):
        state = advance(state, np.int32(steps))
        expected = jax.tree.map(
            lambda a, p: 0.9 * a + 0.1 * p, expected, state.parameters
        )
    chex.assert_trees_all_close(state.average, expected, rtol=1e-6, atol=1e-8)
    state = advance(state, np.int32(5))
    assert int(state.step) == 8


def test_pairs_and_strata():
    recipe = tiny(antithetic=True, log_snr=LogSNR(-6.0, 4.0, focus=(0.0, 4.0)))
    batch = batch_of(recipe, KEY, 400)
    np.testing.assert_array_equal(batch.epsilon[:200], -batch.epsilon[200:])
    np.testing.assert_array_equal(batch.events[:200], batch.events[200:])
    log_snr = np.asarray(batch.noise.log_snr)
    assert log_snr.min() > -6.01
    assert log_snr.max() < 4.01
    # Half of the events are in focus, and its share of the others.
    assert np.mean(log_snr > 0) == pytest.approx(0.5 + 0.5 * 0.4, abs=0.01)


def test_conditions_are_dropped_together_at_the_given_rate():
    def data(key, n):
        label = jax.random.randint(key, (n,), 1, 3)
        events = NORMAL.sample(key, (n,)) + label[:, None]
        return events, {"label": label, "style": jnp.ones((n, 3))}

    class Net(ResidualMLP):
        def __call__(self, x, t, label=0, style=NO_STYLE):
            return self.unscaled(x + 0.1 * label + jnp.sum(style), t)

    def network(key):
        return Net(2, hidden=8, blocks=0, embedding=8, key=key)

    conditions = Conditions({"label": 0, "style": NO_STYLE}, dropout=0.25)
    recipe = tiny(network=network, data=data, conditions=conditions, iterations=3)
    batch = batch_of(recipe, KEY, 2000)
    dropped = np.asarray(batch.conditions["label"] == 0)
    without_style = np.asarray(batch.conditions["style"]).sum(1) == 0
    np.testing.assert_array_equal(dropped, without_style)
    assert dropped.mean() == pytest.approx(0.25, abs=0.05)
    factor = recipe.factor(untrained(recipe, KEY))
    assert factor.traits.conditions == ("label", "style")
    chex.assert_tree_all_finite(jax.jit(losses)(factor, batch))


def test_levels_of_a_schedule():
    schedule = cp.Schedule.cosine(20)
    recipe = tiny(schedule=schedule, log_snr=None, time="level")
    batch = batch_of(recipe, KEY, 200)
    expected = schedule.levels.alpha[batch.noise.index]
    np.testing.assert_allclose(batch.noise.alpha, expected)
    assert sorted(set(np.asarray(batch.noise.index).tolist())) == list(range(20))
    ends = (float(schedule.log_snr[-1]), float(schedule.log_snr[0]))
    assert recipe.log_snr_range() == pytest.approx(ends)


def test_variance_exploding_range():
    recipe = tiny(schedule=cp.Schedule.edm(10), log_snr=(-9.0, 13.0), time="sigma")
    noise = recipe.noise(KEY, 400)
    np.testing.assert_allclose(noise.alpha, 1.0)
    assert float(noise.sigma.max()) == pytest.approx(np.exp(4.5), rel=0.05)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: tiny(iterations=0), id="iterations is 0"),
        pytest.param(lambda: tiny(size=0), id="the batch has 0 events"),
        pytest.param(lambda: tiny(chunk=5), id="chunk 5 does not divide a batch of 16"),
        pytest.param(lambda: tiny(size=15, antithetic=True), id="a batch of 15 is odd"),
        pytest.param(lambda: tiny(learning_rate=0.0), id="learning_rate is 0.0"),
        # A schedule in place of a function of the number of steps.
        pytest.param(
            lambda: tiny(learning_rate=optax.cosine_decay_schedule(1e-3, 24)),
            id="functools.partial",
        ),
        pytest.param(lambda: tiny(losses=()), id="losses is ()"),
        pytest.param(
            lambda: tiny(losses=(Denoising(), Denoising())), id="each at most once"
        ),
        pytest.param(lambda: tiny(losses=("denoising",)), id="losses is"),
        pytest.param(lambda: tiny(ema=1.0), id="ema is 1.0"),
        pytest.param(
            lambda: Conditions(("label",), dropout=0.1), id="no value to put in place"
        ),
        pytest.param(
            lambda: Conditions({"label": 0}, dropout=1.5), id="dropout is 1.5"
        ),
        pytest.param(lambda: tiny(log_snr=(4.0, -6.0)), id="log_snr is"),
        pytest.param(
            lambda: tiny(time="level"), id="defined at the schedule's levels only"
        ),
        pytest.param(lambda: tiny(time="real_level"), id="of levels as real numbers"),
        pytest.param(
            lambda: tiny(schedule=cp.Schedule.log_snr(10, min=-6.0, max=9.0)),
            id="a schedule that ends outside of the range",
        ),
        pytest.param(lambda: LogSNR(-6.0, 4.0, focus=(-9.0, 0.0)), id="focus is"),
        pytest.param(
            lambda: tiny(schedule=cp.Schedule.from_arrays([0.9, 0.5], [0.1, 0.7])),
            id="neither",
        ),
    ],
)
def test_bad_recipes(make):
    refused(make, InvalidValueError)


def test_a_recipe_has_few_fields_and_its_events_their_shape_from_the_data():
    assert len(dataclasses.fields(cp.training.Recipe)) <= 12
    assert tiny().event_shape == (2,)


def test_recipes_that_cannot_be_trained():
    refused(lambda: train(tiny(), 0), WrongTypeError)
    refused(
        lambda: train(tiny(parameterization="energy"), KEY),
        NetworkError,
    )
    refused(lambda: train(tiny(network=3), KEY), NetworkError)
    for data, kind in (
        (lambda key, n: np.random.randn(n, 2), InvalidValueError),  # noqa: NPY002
        (lambda key, n: jax.random.randint(key, (n, 2), 0, 9), WrongTypeError),
        (lambda key, n: (jnp.zeros((n, 2)), jnp.zeros(n)), WrongTypeError),
    ):
        refused(lambda data=data: train(tiny(data=data), KEY), kind)
    refused(lambda: tiny(iterations=1e2), WrongTypeError)
    refused(lambda: tiny(learning_rate=optax.adam(1e-3)), InvalidValueError)
    refused(lambda: tiny(losses=Denoising()), InvalidValueError)
    refused(
        lambda: train(tiny(data=jnp.zeros((9, 2))), KEY),
        NetworkError,
    )

    def five(key, n):
        return jax.random.normal(key, (5, 2))

    refused(
        lambda: train(tiny(data=five), KEY),
        NetworkError,
    )

    def transposed(key, n):
        return jax.random.normal(key, (2, n))

    refused(
        lambda: train(tiny(data=transposed), KEY),
        NetworkError,
        fix="the first axis",
    )


def labelled(*names):
    """Data whose events come with conditions of these names."""

    def data(key, n):
        return jnp.zeros((n, 2)), {name: jnp.zeros(n, int) for name in names}

    return data


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        pytest.param({"conditions": ("label",)}, "label", id="data return none"),
        pytest.param({"conditions": {"label": 0}}, "label", id="only a null value"),
        pytest.param(
            {"conditions": "style", "data": labelled("label")},
            "style",
            id="data return another",
        ),
        pytest.param({"data": labelled("label")}, "label", id="undeclared"),
        pytest.param(
            {"conditions": ("label",), "data": labelled("label", "foo")},
            "foo",
            id="one of two undeclared",
        ),
        pytest.param(
            {"parameterization": "classifier"}, "label", id="a classifier's label"
        ),
        pytest.param(
            {"parameterization": "classifier", "data": labelled("label", "foo")},
            "foo",
            id="a classifier's other condition",
        ),
    ],
)
def test_conditions_of_a_recipe_are_those_of_its_data(changes, name):
    refused(lambda: train(tiny(**changes), KEY), ConditionError, name, name)


def test_training_stops_where_weights_are_not_finite_any_more():
    values = NORMAL.sample(KEY, (100,)).at[7].set(jnp.nan)

    def holed(key, n):
        return values[jax.random.randint(key, (n,), 0, len(values))]

    refused(lambda: train(tiny(data=holed), KEY), InvalidValueError, "of the data")
    steep = tiny(learning_rate=lambda iterations: optax.constant_schedule(1e30))
    refused(lambda: train(steep, KEY), InvalidValueError, "step", "smaller")


def test_a_network_without_weights_is_not_trained():
    def minus(x, log_snr):
        return -x

    refused(lambda: train(tiny(network=lambda key: minus), KEY), NetworkError)
