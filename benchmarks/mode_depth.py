"""Effect of a cross-level loss on mode shares of energies, under density weights.

    python -m benchmarks mode-depth

`ring2d` and `ring2d-depth` are energies of the same ring of 8 Gaussians; the second was
trained with a cross-level loss beside denoising. Density weights trust differences of
log f between separated modes, which matching scores does not teach. Exits with 1 if a
threshold is missed.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from mode_weights import (
    COLUMNS,
    SPREAD,
    Gaussians,
    Measured,
    Problem,
    Row,
    as_text,
    measure,
    nearest,
    ring_product,
    smc,
)
from mode_weights import total_variation as variation
from report import publish

import composeprob as cp
from composeprob import model_zoo
from composeprob.schedule import Noise

CHAINS, KEYS = 2000, 3
LOG_SNR = (-8.0, 0.0, 2.0, 4.0, 6.0, 9.5)
SD = 0.075
BAR = np.array([0.2, 0.6])
CENTRES = ring_product().centres


@cp.program
def alone(ring: Any) -> Any:
    return cp.sample("x", ring)


@cp.program
def both(ring: Any, bar: Any) -> Any:
    return cp.sample("x", ring * bar)


def rings() -> dict[str, Any]:
    """The exact ring, and the learned ones as they were trained, each with the claim
    that it knows mode depth.

    For `ring2d` that claim is false, which is the point: without it
    `cp.SMC(weights="density")` refuses the factor.
    """
    schedule = cp.Schedule.log_snr(60, min=-9.0, max=9.5)
    found: dict[str, Any] = {
        "exact": cp.Analytic(model_zoo.reference("ring2d"), schedule)
    }
    trained = cp.load("ring2d")
    # A calibration knows the depth of modes, also if the energy does not.
    uncalibrated = getattr(trained, "uncalibrated", trained)
    found["ring2d"] = cp.Diffusion(
        uncalibrated.network,
        uncalibrated.schedule,
        event_shape=uncalibrated.event_shape,
        parameterization=uncalibrated.parameterization,
        time=uncalibrated.time,
        log_snr_range=uncalibrated.log_snr_range,
        mode_depth=True,
        label="ring2d",
    )
    deep = cp.load("ring2d-depth")
    found["ring2d-depth"] = getattr(deep, "uncalibrated", deep)
    return found


def problems(ring: Any) -> dict[str, Problem]:
    """The ring alone, where every mode holds an eighth, and its product with an exact
    Gaussian bar."""

    def law(alpha: float, sigma: float) -> Gaussians:
        return Gaussians(
            np.full(8, 1 / 8),
            alpha * CENTRES,
            np.full((8, 2), (alpha * SD) ** 2 + sigma**2),
        )

    def product(schedule: cp.Schedule) -> Any:
        bar = cp.Analytic(dist.Normal(jnp.zeros(2), jnp.asarray(BAR)), schedule)
        return cp.compile(both, ring, bar)

    return {
        "ring": Problem(lambda schedule: cp.compile(alone, ring), law, CENTRES),
        "ring × bar": dataclasses.replace(ring_product(), compile=product),
    }


def by_quadrature(
    ring: Any, log_snr: float, points: int = 301
) -> tuple[float, np.ndarray]:
    """log ∫ f and the shares of the modes at a log-SNR, on a grid."""
    alpha, sigma = (float(np.sqrt(1 / (1 + np.exp(s * log_snr)))) for s in (-1, 1))
    half = alpha + 5.5 * sigma
    line = np.linspace(-half, half, points)
    grid = (
        np.stack(np.meshgrid(line, line, indexing="ij"), -1)
        .reshape(-1, 2)
        .astype(np.float32)
    )
    noise = Noise(jnp.zeros((), int), jnp.float32(alpha), jnp.float32(sigma))
    log_f = jax.jit(
        lambda x: jax.lax.map(
            lambda p: ring.evaluate(p, noise, {})[0], x, batch_size=2000
        )
    )(grid)
    mass = np.exp(np.asarray(log_f, np.float64)) * (line[1] - line[0]) ** 2
    shares = np.bincount(nearest(grid, alpha * CENTRES), mass, 8)
    return float(np.log(mass.sum())), shares / mass.sum()


def checks(
    rows: dict[str, Measured], quadrature: dict[str, list[Any]]
) -> dict[str, bool]:
    """Checks of the benchmark."""
    even = np.full(8, 1 / 8)
    target = {
        name: max(variation(shares, even) for *_, shares in table)
        for name, table in quadrature.items()
    }
    log_z = max(abs(z) for _, z, _ in quadrature["ring2d-depth"])
    plain, deep, exact = (
        rows[f"{name}, ring, density"] for name in ("ring2d", "ring2d-depth", "exact")
    )
    return {
        "exact energies: pooled TV ≤ 0.03": exact.pooled <= 0.03,
        "the trap, ring2d alone: pooled TV ≥ 0.10": plain.pooled >= 0.10,
        "ring2d-depth alone: pooled TV ≤ 0.05": deep.pooled <= 0.05,
        "ring2d-depth alone: at most a third of ring2d's": deep.pooled
        <= plain.pooled / 3,
        "by quadrature, at the worst level: TV of ring2d ≥ 0.10, of ring2d-depth ≤ "
        "0.03": target["ring2d"] >= 0.10 and target["ring2d-depth"] <= 0.03,
        "by quadrature, the normaliser that ring2d-depth learned: |log Z| ≤ 0.1 at "
        "every level": log_z <= 0.1,
    }


def main() -> int:
    rows, quadrature = {}, {}
    for name, ring in rings().items():
        for target, problem in problems(ring).items():
            for weights in (
                ("density",) if target == "ring" else ("density", "feynman_kac")
            ):
                label = f"{name}, {target}, {weights}"
                rows[label] = measure(
                    problem, Row(label, smc(weights), ring.schedule), CHAINS, KEYS
                )
                print("  ".join(as_text(rows[label])), flush=True)
        quadrature[name] = [(level, *by_quadrature(ring, level)) for level in LOG_SNR]
    notes = (
        f"{CHAINS} chains, keys 0 to {KEYS - 1}; {SPREAD} The bar is an exact "
        "Gaussian, N(0, diag(0.2², 0.6²)); exact log Z is that of the exact product. "
        "Density weights are tried on ring2d against its own card. By quadrature on "
        "a grid, log ∫ f and the TV of the modes' shares at log-SNR "
        f"{', '.join(f'{level:g}' for level in LOG_SNR)}: "
    )
    even = np.full(8, 1 / 8)
    told = [
        f"{name}: "
        + ", ".join(
            f"{log_z:+.3f} / {variation(shares, even):.4f}"
            for _, log_z, shares in table
        )
        for name, table in quadrature.items()
    ]
    details = {
        "num_chains": CHAINS,
        "rows": [dataclasses.asdict(m) | {"mean_tv": m.mean} for m in rows.values()],
        "quadrature": {
            name: [
                {"log_snr": level, "log_z": z, "shares": list(shares)}
                for level, z, shares in table
            ]
            for name, table in quadrature.items()
        },
    }
    title = "Mode depth: what a cross-level loss buys SMC weighted by densities"
    columns = ["model, target, weights", *COLUMNS[1:]]
    lines = [as_text(m) for m in rows.values()]
    return publish(
        "mode_depth",
        title,
        columns,
        lines,
        checks(rows, quadrature),
        details,
        notes + "; ".join(told) + ".",
    )


if __name__ == "__main__":
    sys.exit(main())
