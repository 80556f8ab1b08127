"""The main job (`make demo`): ring × bar, from two diffusion models of the zoo, by three samplers.

Plain reverse diffusion adds the two scores, which samples the wrong law; HMC at each level, and sequential Monte Carlo,
sample the product. Both factors are known in closed form, so each run is judged against the exact product.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

import composeprob as cp
from composeprob.plotting import new_figure, plot_points, style

MODES = 0.5 * jnp.stack([jnp.cos(jnp.arange(8) * jnp.pi / 4), jnp.sin(jnp.arange(8) * jnp.pi / 4)], -1)
RING = dist.MixtureSameFamily(dist.Categorical(jnp.ones(8) / 8), dist.Normal(MODES, 0.075).to_event(1))
BAR = dist.Uniform(jnp.array([-0.2, -1.0]), jnp.array([0.2, 1.0]))
SAMPLERS = {
    "reverse diffusion": cp.Ancestral(),
    "annealed HMC": cp.AnnealedMCMC(cp.HMC(cp.Adaptive(), num_leapfrog=3), steps_per_level=2),
    "SMC with MALA": cp.SMC(cp.MALA(cp.Adaptive()), steps_per_level=1),
}


@cp.program
def product(ring, bar):
    return cp.sample("x", ring * bar)


def exact_product(schedule, num_draws):
    """By quadrature on a grid at level 0: the exact product's log-density, its mode weights, and draws from it."""
    density = cp.compile(product, cp.Analytic(RING, schedule), cp.Analytic(BAR, schedule))
    unnormalised = jax.jit(jax.vmap(lambda x: density.log_density({"x": x}, 0)))
    grid = np.stack(np.meshgrid(*2 * [np.linspace(-1.2, 1.2, 601)]), -1).reshape(-1, 2).astype(np.float32)
    values = np.asarray(unnormalised(grid), np.float64)
    log_sum = np.logaddexp.reduce(values)
    chosen = np.random.default_rng(0).choice(len(grid), num_draws, p=np.exp(values - log_sum))
    weights = cp.metrics.mode_weights(grid, MODES, values)
    return lambda x: np.asarray(unnormalised(x)) - log_sum - 2 * np.log(2.4 / 600), weights, grid[chosen]


def main(num_chains=1000, out="out", samplers=SAMPLERS):
    density = cp.compile(product, cp.load("ring2d"), cp.load("bar2d"))
    print(density)
    log_density, weights, draws = exact_product(density.schedule, num_chains)
    results = {}
    for name, sampler in samplers.items():
        results[name] = cp.infer(density, jax.random.key(0), num_chains=num_chains, sampler=sampler)
    points = {name: result.unweighted()["x"] for name, result in results.items()} | {"exact draws": draws}
    rows = {name: {} for name in points}
    print(f"\n{'':18}{'mode TV':>10}{'log-density':>13}{'acceptance':>12}{'evaluations':>13}{'seconds':>9}")
    with style():
        figure = new_figure(13, 3.7)
        for ax, (name, x) in zip(figure.subplots(1, len(points)), points.items(), strict=True):
            row, result = rows[name], results.get(name)
            row["mode_tv"] = cp.metrics.total_variation(cp.metrics.mode_weights(x, MODES), weights)
            # A floor, so that one point beyond the bar's hard edge does not decide the mean.
            row["mean_log_density"] = float(np.maximum(log_density(x), -20).mean())
            line = f"{name:18}{row['mode_tv']:10.3f}{row['mean_log_density']:13.2f}"
            if result is not None:
                accepted = result.acceptance[np.isfinite(result.acceptance)]  # NaN where nothing was proposed
                row["acceptance"] = float(accepted.mean()) if accepted.size else None
                row |= {"evaluations": result.evaluations, "seconds": result.seconds, "status": str(result.status)}
                line += f"{accepted.mean():12.2f}" if accepted.size else f"{'none':>12}"
                line += f"{result.evaluations:13,}{result.seconds:9.1f}"
            print(line)
            plot_points(ax, x, f"{name}\nmode TV {row['mode_tv']:.3f}", log_density, window=(-0.75, 0.75, -0.75, 0.75))
    Path(out).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(out, "demo.png"))
    Path(out, "results.json").write_text(json.dumps({"num_chains": num_chains, **rows}, indent=1) + "\n")
    print(f"\nwrote demo.png and results.json into {out}/")
    return results


if __name__ == "__main__":
    main()
