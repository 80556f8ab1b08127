"""The main job (`make demo`): ring × bar, from two diffusion models of the zoo, by
three samplers.

Reverse diffusion alone adds the two scores, which samples the wrong law; HMC at each
level, and sequential Monte Carlo, sample the product. Each run is compared with the
exact product, and so are as many exact draws, which differ from it by chance.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

import composeprob as cp
from composeprob.plotting import (
    log_density_at,
    new_figure,
    plot_density,
    plot_points,
    style,
)

ANGLE = jnp.arange(8) * jnp.pi / 4
MODES = 0.5 * jnp.stack([jnp.cos(ANGLE), jnp.sin(ANGLE)], -1)
RING = dist.MixtureSameFamily(
    dist.Categorical(jnp.ones(8) / 8), dist.Normal(MODES, 0.075).to_event(1)
)
BAR = dist.Uniform(jnp.array([-0.2, -1.0]), jnp.array([0.2, 1.0]))
SAMPLERS = {
    "reverse diffusion": cp.Ancestral(),
    "annealed HMC": cp.AnnealedMCMC(
        cp.HMC(cp.Adaptive(), num_leapfrog=3), steps_per_level=2
    ),
    "SMC with MALA": cp.SMC(cp.MALA(cp.Adaptive()), steps_per_level=1),
}
WINDOW = (-0.75, 0.75, -0.75, 0.75)
SETS = 100
"""Sets of exact draws, which show the variation by chance."""


@cp.program
def product(*factors):
    return cp.sample("x", cp.product(*factors))


def exact_product(schedule, shape):
    """The exact product's log-density, its mode weights, and draws from it.

    They are computed by quadrature on a grid, at level 0.
    """
    density = cp.compile(product, *(cp.Analytic(law, schedule) for law in (RING, BAR)))
    unnormalised = log_density_at(density, "x", 0)
    axis = np.linspace(-1.2, 1.2, 601, dtype=np.float32)
    grid = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    values = np.asarray(unnormalised(grid), np.float64)
    log_sum = np.logaddexp.reduce(values)
    rng = np.random.default_rng(0)
    draws = grid[rng.choice(len(grid), shape, p=np.exp(values - log_sum))]
    weights = cp.metrics.mode_weights(grid, MODES, values)
    log_cell = 2 * np.log(2.4 / 600)

    def log_density(x):
        return np.asarray(unnormalised(x)) - log_sum - log_cell

    return log_density, weights, draws


def main(num_chains=1000, out="out", samplers=SAMPLERS):
    inputs = {"ring2d": cp.load("ring2d"), "bar2d": cp.load("bar2d")}
    density = cp.compile(product, *inputs.values())
    log_density, weights, draws = exact_product(density.schedule, (SETS, num_chains))

    def judge(x):
        tv = cp.metrics.total_variation(cp.metrics.mode_weights(x, MODES), weights)
        # Without a floor, one point beyond the bar's hard edge would dominate the mean.
        height = np.maximum(log_density(x), -20).mean()
        return float(tv), float(height)

    print(f"{density}\n")
    heads = f"{'mode TV':>10}{'log-density':>13}{'evaluations':>13}{'seconds':>9}"
    print(f"{'':18}{heads}")
    rows = {}
    with style():
        figure = new_figure(9.6, 7)
        grid = figure.subplots(2, 3, subplot_kw={"xticks": (-0.5, 0, 0.5)})
        axes = grid.ravel()
        for ax, (name, factor) in zip(axes, inputs.items(), strict=False):
            model = cp.compile(product, factor)
            plot_density(ax, log_density_at(model, "x", 0), WINDOW)
            ax.set_title(f"{name}\na model of the zoo")
        for ax, (name, sampler) in zip(axes[3:], samplers.items(), strict=True):
            result = cp.infer(
                density, jax.random.key(0), num_chains=num_chains, sampler=sampler
            )
            x = result.unweighted()["x"]
            tv, height = judge(x)
            rows[name] = {"mode_tv": tv, "mean_log_density": height, **result.numbers()}
            cost = f"{result.evaluations:13,}{result.about.seconds:9.1f}"
            print(f"{name:18}{tv:10.3f}{height:13.2f}{cost}")
            plot_points(ax, x, f"{name}\nmode TV {tv:.3f}", log_density, WINDOW)
        sets = np.array([judge(x) for x in draws])
        tv, height = sets.mean(0)
        tv_sd, height_sd = sets.std(0)
        title = f"exact draws\nmode TV {tv:.3f} ± {tv_sd:.3f}"
        plot_points(axes[2], draws[0], title, log_density, WINDOW)
    rows["exact draws"] = {
        "mode_tv": tv,
        "mean_log_density": height,
        "mode_tv_sd": tv_sd,
        "log_density_sd": height_sd,
    }
    chance = f"by chance ± {tv_sd:.3f}, ± {height_sd:.2f} ({SETS} sets)"
    print(f"{'exact draws':18}{tv:10.3f}{height:13.2f}   {chance}")
    Path(out).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(out, "demo.png"))
    text = json.dumps({"num_chains": num_chains, **rows}, indent=1)
    Path(out, "results.json").write_text(text + "\n")
    print(f"\nwrote demo.png and results.json into {out}/")
    return rows


if __name__ == "__main__":
    main()
