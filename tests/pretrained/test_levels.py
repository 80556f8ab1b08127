"""Schedulers' levels, other schedules by log-SNR, the precision of weights, and
networks of published sizes without weights."""

import re
import shutil

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import composeprob as cp
from benchmarks.sizes import of_size, sd15
from composeprob.pretrained.layers import sinusoids
from composeprob.pretrained.schedulers import trained
from composeprob.pytree import is_array
from messages import check_wording
from pretrained.test_goldens import DATA, error, golden, model
from sampling_cases import single


@pytest.mark.parametrize("name", ["ddpm", "labels", "sd", "sd1", "dit"])
def test_levels_are_the_originals(name):
    """α² of the original's table, in which a last level without signal has a little."""
    alpha = np.asarray(model(name).schedule.alpha, np.float64)
    np.testing.assert_allclose(
        alpha**2, golden(name)["alphas_cumprod"], rtol=2e-6, atol=2e-10
    )


@pytest.mark.parametrize(
    ("options", "parameterization"),
    [
        ({"beta_schedule": "sigmoid"}, "epsilon"),
        (
            {
                "trained_betas": np.linspace(1e-3, 0.5, 20).tolist(),
                "num_train_timesteps": 20,
            },
            "epsilon",
        ),
        ({"predict_epsilon": False}, "x0"),
        (
            {
                "prediction_type": "flow_prediction",
                "use_flow_sigmas": True,
                "flow_shift": 2.0,
            },
            "flow",
        ),
    ],
)
def test_kinds_of_levels(options, parameterization):
    config = {"_class_name": "DDPMScheduler", **options}
    training = trained(config, "scheduler_config.json")
    assert training.parameterization == parameterization
    alpha, sigma = training.schedule.alpha, training.schedule.sigma
    if parameterization == "flow":
        t = np.arange(1, 1001) / 1000
        np.testing.assert_allclose(sigma, 2 * t / (1 + t), rtol=1e-12)
    elif "trained_betas" in options:
        np.testing.assert_allclose(
            alpha**2, np.cumprod(1 - np.float32(options["trained_betas"])), rtol=1e-5
        )
    elif options.get("beta_schedule") == "sigmoid":
        beta = 1e-4 + (0.02 - 1e-4) / (1 + np.exp(-np.linspace(-6, 6, 1000)))
        np.testing.assert_allclose(alpha**2, np.cumprod(1 - beta), rtol=1e-5)


def test_levels_without_signal_at_the_end_are_rounded_as_the_originals():
    """diffusers' DDPMScheduler gives this first σ, which single precision moves from
    .0100 by 6·10⁻⁴ of it."""
    config = {
        "_class_name": "DDPMScheduler",
        "beta_schedule": "scaled_linear",
        "rescale_betas_zero_snr": True,
        "prediction_type": "v_prediction",
    }
    schedule = trained(config, "scheduler_config.json").schedule
    np.testing.assert_allclose(schedule.sigma[0], 0.009994867915263047, rtol=1e-6)


def test_other_levels_lie_between_those_of_the_training():
    """Halfway in log-SNR between levels 400 and 401 the network is told 400.5; at a
    level of its own, that level; and a schedule that is given at once is the same as
    one that the program is compiled with."""
    factor = model("ddpm")
    x = jnp.asarray(golden("ddpm")["x"][0])
    own = np.asarray(factor.schedule.log_snr, np.float64)
    log_snr = np.array([own[3], (own[400] + own[401]) / 2, own[999]])
    schedule = cp.Schedule.from_arrays(
        1 / np.sqrt(1 + np.exp(-log_snr)), 1 / np.sqrt(1 + np.exp(log_snr))
    )
    score = jax.jit(cp.compile(single, factor, schedule=schedule).score)
    network = jax.jit(lambda x, t: factor.network(x, t))
    given = cp.from_diffusers(DATA / "ddpm", schedule=schedule)
    assert given.schedule.same_levels(schedule)
    at_once = jax.jit(cp.compile(single, given).score)
    for k, level in enumerate((3.0, 400.5, 999.0)):
        expected = -network(x, jnp.float32(level)) / schedule.sigma[k]
        assert error(score({"x": x}, k)["x"], np.asarray(expected)) < 1e-4
        assert error(at_once({"x": x}, k)["x"], np.asarray(expected)) < 1e-4
    some = cp.compile(
        single, factor, schedule=cp.Schedule.log_snr(60, min=-9.0, max=9.0)
    )
    assert some.num_levels == 60
    assert "score" in some.capabilities
    assert "energy" not in some.capabilities
    assert "score" in str(some)


def test_a_table_of_times_has_a_row_for_each_level(tmp_path):
    """With the sinusoids of every level in it, the network is that of sinusoids; their
    timestep k is its row k."""
    place = shutil.copytree(DATA / "ddpm", tmp_path / "ddpm")
    file = place / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    config = place / "unet" / "config.json"
    row = jax.vmap(lambda t: sinusoids(t, 8, cosine_first=False, shift=1.0))
    rows = np.asarray(row(jnp.arange(1000.0)))
    save_file(load_file(file) | {"time_proj.weight": rows}, file)
    config.write_text(config.read_text().replace('"positional"', '"learned"'))
    factor = cp.from_diffusers(place)
    assert factor.time == "level"
    x = jnp.asarray(golden("ddpm")["x"][0])
    score = jax.jit(lambda f: f.evaluate(x, f.schedule.at(37), {})[1])
    assert error(score(factor), np.asarray(score(model("ddpm")))) < 1e-5


def test_a_folder_of_one_network_needs_levels(tmp_path):
    """Its levels are those of the training: level k is timestep k."""
    factor = cp.from_diffusers(
        DATA / "ddpm" / "unet", schedule=cp.Schedule.linear(1000)
    )
    assert factor.time == "real_level"
    assert factor.event_shape == model("ddpm").event_shape
    np.testing.assert_array_equal(factor.schedule.alpha, cp.Schedule.linear(1000).alpha)


@pytest.mark.parametrize("name", ["ddpm", "sd", "sd3"])
def test_weights_in_bfloat16(name):
    """All weights; events and scores stay in float32, and the output has the error of
    eight bits."""
    exact = model(name)
    rounded = cp.from_diffusers(DATA / name, dtype="bfloat16")
    kinds = {
        leaf.dtype
        for leaf in jax.tree.leaves(rounded.network)
        if eqx.is_inexact_array(leaf)
    }
    assert kinds == {jnp.dtype(jnp.bfloat16)}
    if name == "ddpm":
        x = jnp.asarray(golden("ddpm")["x"][0])
        output = jax.jit(lambda n, x: n(x, jnp.float32(500)))
        actual = output(rounded.network, x)
        expected = np.asarray(output(exact.network, x))
        assert actual.dtype == jnp.float32
        assert 1e-4 < error(actual, expected) < 0.05


@pytest.mark.slow
def test_energies_of_score_networks_store_less_with_remat():
    """⟨x, s⟩ of a loaded network: the same values and gradients, less stored, less
    memory of the compiled program."""
    loaded = model("ddpm")
    x = jnp.asarray(golden("ddpm")["x"][0])

    def energy(remat):
        options = {
            "event_shape": loaded.event_shape,
            "parameterization": "energy_inner",
            "time": "real_level",
        }
        return cp.Diffusion(loaded.network, loaded.schedule, remat=remat, **options)

    def stored(factor):
        noise = factor.schedule.at(500)
        residuals = jax.eval_shape(
            lambda x: jax.vjp(lambda x: factor.output(x, noise, {}), x)[1], x
        )
        return sum(leaf.size for leaf in jax.tree.leaves(residuals)) - weights

    weights = sum(leaf.size for leaf in jax.tree.leaves(loaded.network))
    evaluate = jax.jit(
        jax.vmap(lambda f, x: f.evaluate(x, f.schedule.at(500), {}), (None, 0))
    )
    xs = jnp.stack([x] * 32)
    factor, with_remat = energy(False), energy(True)
    assert stored(with_remat) < 0.25 * stored(factor)
    compiled = evaluate.lower(factor, xs).compile()
    compiled_with_remat = evaluate.lower(with_remat, xs).compile()
    size = compiled.memory_analysis().temp_size_in_bytes
    assert compiled_with_remat.memory_analysis().temp_size_in_bytes < 0.9 * size
    outputs = compiled(factor, xs)
    outputs_with_remat = compiled_with_remat(with_remat, xs)
    for a, b in zip(outputs, outputs_with_remat, strict=True):
        assert error(b, np.asarray(a)) < 1e-5
    assert cp.from_diffusers(DATA / "ddpm", remat=True).remat
    assert not loaded.remat


def test_weights_are_leaves():
    """Other weights reuse compiled code; nothing of the network is a constant."""
    network = model("ddpm").network
    x = jnp.asarray(golden("ddpm")["x"][0])
    jaxpr = jax.make_jaxpr(lambda n, x, t: n(x, t))(network, x, jnp.float32(3))
    # The frequencies of the time's embedding.
    assert sum(np.size(c) for c in jaxpr.consts) < 100
    weights = eqx.filter(network, eqx.is_inexact_array)
    assert len(jax.tree.leaves(network)) == len(jax.tree.leaves(weights))


@pytest.mark.parametrize(
    ("name", "weights"), [("sd15", 859_520_964), ("sdxl", 2_567_463_684)]
)
def test_sizes_are_those_of_the_models(name, weights):
    """The numbers of weights that the models' authors report; none of them is in
    memory."""
    model, prompt = of_size(name)
    leaves = [leaf for leaf in jax.tree.leaves(model.network) if is_array(leaf)]
    assert sum(int(np.prod(leaf.shape)) for leaf in leaves) == weights
    assert all(
        isinstance(leaf, jax.ShapeDtypeStruct) and leaf.dtype == "bfloat16"
        for leaf in leaves
    )
    assert prompt == {"sd15": (77, 768), "sdxl": (78, 2048)}[name]


def test_two_prompts_are_compiled_as_far_as_a_density():
    density = cp.compile(sd15)
    assert re.search("share: 2 .* 1 ", str(density))
    assert density.sites["x"].shape == (64, 64, 4)


def test_sizes_that_are_not_known():
    with pytest.raises(cp.errors.InvalidValueError, match="'sd9'") as caught:
        of_size("sd9")
    check_wording(str(caught.value))
