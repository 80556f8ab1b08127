"""The main job (`make demo`): ring × bar, from two diffusion models of the zoo, by
three samplers.

Plain reverse diffusion adds the two scores, which samples the wrong law; HMC at each
level, and sequential Monte Carlo, sample the product. Each run is judged against the
exact product, beside what as many exact draws show by chance."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

import composeprob as cp
from composeprob.results.plotting import (
    log_density_at,
    new_figure,
    plot_density,
    plot_points,
    style,
)

MODES = 0.5 * jnp.stack(
    [jnp.cos(jnp.arange(8) * jnp.pi / 4), jnp.sin(jnp.arange(8) * jnp.pi / 4)], -1
)
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
WINDOW, SETS = (-0.75, 0.75, -0.75, 0.75), 100


@cp.program
def product(*factors):
    return cp.sample("x", cp.product(*factors))


def exact_product(schedule, shape):
    """By quadrature on a grid at level 0: the exact product's log-density, its mode
    weights, and draws from it."""
    unnormalised = log_density_at(
        cp.compile(product, *(cp.Analytic(law, schedule) for law in (RING, BAR))),
        "x",
        0,
    )
    grid = np.stack(
        np.meshgrid(*2 * [np.linspace(-1.2, 1.2, 601, dtype=np.float32)]), -1
    ).reshape(-1, 2)
    values = np.asarray(unnormalised(grid), np.float64)
    log_sum = np.logaddexp.reduce(values)
    draws = grid[
        np.random.default_rng(0).choice(len(grid), shape, p=np.exp(values - log_sum))
    ]
    weights = cp.metrics.mode_weights(grid, MODES, values)
    return (
        lambda x: np.asarray(unnormalised(x)) - log_sum - 2 * np.log(2.4 / 600),
        weights,
        draws,
    )


def main(num_chains=1000, out="out", samplers=SAMPLERS):
    inputs = {"ring2d": cp.load("ring2d"), "bar2d": cp.load("bar2d")}
    density = cp.compile(product, *inputs.values())
    log_density, weights, draws = exact_product(density.schedule, (SETS, num_chains))

    def judge(
        x,
    ):  # a floor, so that one point beyond the bar's hard edge does not decide the mean
        tv = cp.metrics.total_variation(cp.metrics.mode_weights(x, MODES), weights)
        return float(tv), float(np.maximum(log_density(x), -20).mean())

    print(
        f"{density}\n\n{'':18}{'mode TV':>10}{'log-density':>13}{'evaluations':>13}{'seconds':>9}"
    )
    rows = {}
    with style():
        axes = (
            new_figure(9.6, 7)
            .subplots(2, 3, subplot_kw={"xticks": (-0.5, 0, 0.5)})
            .ravel()
        )
        for ax, (name, factor) in zip(axes, inputs.items(), strict=False):
            plot_density(
                ax, log_density_at(cp.compile(product, factor), "x", 0), WINDOW
            )
            ax.set_title(f"{name}\na model of the zoo")
        for ax, (name, sampler) in zip(axes[3:], samplers.items(), strict=True):
            result = cp.infer(
                density, jax.random.key(0), num_chains=num_chains, sampler=sampler
            )
            tv, height = judge(x := result.unweighted()["x"])
            rows[name] = {"mode_tv": tv, "mean_log_density": height, **result.numbers()}
            print(
                f"{name:18}{tv:10.3f}{height:13.2f}{result.evaluations:13,}{result.about.seconds:9.1f}"
            )
            plot_points(ax, x, f"{name}\nmode TV {tv:.3f}", log_density, WINDOW)
        sets = np.array([judge(x) for x in draws])
        (tv, height), (tv_sd, height_sd) = sets.mean(0), sets.std(0)
        plot_points(
            axes[2],
            draws[0],
            f"exact draws\nmode TV {tv:.3f} ± {tv_sd:.3f}",
            log_density,
            WINDOW,
        )
    rows["exact draws"] = {
        "mode_tv": tv,
        "mean_log_density": height,
        "mode_tv_sd": tv_sd,
        "log_density_sd": height_sd,
    }
    print(
        f"{'exact draws':18}{tv:10.3f}{height:13.2f}   by chance ± {tv_sd:.3f}, ± {height_sd:.2f} ({SETS} sets)"
    )
    Path(out).mkdir(parents=True, exist_ok=True)
    axes[0].figure.savefig(Path(out, "demo.png"))
    Path(out, "results.json").write_text(
        json.dumps({"num_chains": num_chains, **rows}, indent=1) + "\n"
    )
    print(f"\nwrote demo.png and results.json into {out}/")
    return rows


if __name__ == "__main__":
    main()
