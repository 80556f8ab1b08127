"""Benchmark D: 25 Gaussians in eight dimensions, seen through a random linear operator.

    python -m benchmarks mixture-25 [--keys 10] [--chains 2000]

As in MCG-Diff (Cardoso et al. 2023, arXiv 2308.07983): the prior has unit Gaussians at
8·(i, j, i, j, …), i, j ∈ {−2 … 2}, with random shares; y = A·x + noise of 1 or 4
numbers, A with random singular vectors and values. Every run has a prior, an operator
and data of its own. Exits with 1 if the total variation (TV) of the modes' shares is on
average above 0.05.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from mode_weights import nearest, total_variation
from report import publish

import composeprob as cp

D = 8
MODES = np.tile(
    8.0
    * np.stack(np.meshgrid(range(-2, 3), range(-2, 3), indexing="ij"), -1).reshape(
        25, 2
    ),
    (1, D // 2),
)
SCHEDULE = cp.Schedule.log_snr(80, min=-14.0, max=9.0)
"""Modes lie up to 45 from the origin: the noisiest level must drown that."""


@cp.program
def seen_through(prior: Any, operator: Any, y: Any, sigma: Any, anneal: str) -> None:
    x = cp.sample("x", prior)
    cp.observe("y", dist.Normal(operator @ x, sigma), y, anneal=anneal)


@dataclasses.dataclass(frozen=True)
class Problem:
    """Shares of the prior, operator, data, noise, and the posterior shares of the
    modes."""

    shares: np.ndarray
    operator: np.ndarray
    y: np.ndarray
    sigma: float

    @classmethod
    def draw(cls, seed: int, measurements: int) -> Problem:
        """As MCG-Diff draws them: χ² shares, uniform singular values, σ uniform up to
        the largest of these."""
        rng = np.random.default_rng((seed, measurements))
        shares = rng.chisquare(1, 25)
        shares /= shares.sum()
        left, right = (
            np.linalg.qr(rng.normal(size=(n, n)))[0] for n in (measurements, D)
        )
        values = np.sort(rng.uniform(size=measurements))
        operator = left * values @ right[:measurements]
        sigma = float(rng.uniform(0.05, 1.0) * values.max())
        x = MODES[rng.choice(25, p=shares)] + rng.normal(size=D)
        return cls(
            shares,
            operator,
            operator @ x + sigma * rng.normal(size=measurements),
            sigma,
        )

    def posterior_shares(self) -> np.ndarray:
        """w_j·N(y; A·μ_j, A·Aᵀ + σ²·I), normalised."""
        covariance = self.operator @ self.operator.T + self.sigma**2 * np.eye(
            len(self.y)
        )
        away = self.y - MODES @ self.operator.T
        log_shares = np.log(self.shares) - 0.5 * np.einsum(
            "ji,ik,jk->j", away, np.linalg.inv(covariance), away
        )
        shares = np.exp(log_shares - log_shares.max())
        return shares / shares.sum()

    def compile(self, anneal: str) -> Any:
        """The program under a policy."""
        modes = dist.Normal(jnp.asarray(MODES, float), 1.0).to_event(1)
        mixing = dist.Categorical(probs=jnp.asarray(self.shares, float))
        prior = cp.Analytic(dist.MixtureSameFamily(mixing, modes), SCHEDULE)
        numbers = (jnp.asarray(a, float) for a in (self.operator, self.y, self.sigma))
        return cp.compile(seen_through, prior, *numbers, anneal)


SAMPLERS = {
    "exact draws of the modes": ("", None),
    "exact": ("exact", cp.SMC(cp.MALA())),
    "exact, reverse diffusion alone": ("exact", cp.Ancestral()),
    "exact, weights='density'": ("exact", cp.SMC(cp.MALA(), weights="density")),
    "denoised": ("denoised", cp.SMC(cp.MALA())),
    "tempered": ("tempered", cp.SMC(cp.MALA())),
}
JUDGED = ("exact",)


@dataclasses.dataclass
class Measured:
    """One row over all keys."""

    measurements: int
    name: str
    tv: list[float]
    evaluations: int
    seconds: list[float]


def measure(measurements: int, name: str, num_chains: int, keys: int) -> Measured:
    """All runs of a row."""
    anneal, sampler = SAMPLERS[name]
    row = Measured(measurements, name, [], 0, [])
    for seed in range(keys):
        problem = Problem.draw(seed, measurements)
        exact = problem.posterior_shares()
        if sampler is None:
            found = (
                np.random.default_rng(seed).multinomial(num_chains, exact) / num_chains
            )
        else:
            density = problem.compile(anneal)
            result = cp.infer(
                density,
                jax.random.key(seed),
                num_chains=num_chains,
                sampler=sampler,
                progress=False,
            )
            found = np.bincount(nearest(result["x"], MODES), minlength=25) / num_chains
            row.evaluations = result.evaluations
            row.seconds.append(result.about.seconds)
        row.tv.append(total_variation(found, exact))
    return row


COLUMNS = [
    "measurements",
    "policy and sampler",
    "evaluations",
    "TV",
    "runs with TV ≤ 0.05",
]


def as_text(m: Measured) -> list[str]:
    """A row of `COLUMNS`."""
    return [
        str(m.measurements),
        m.name,
        str(m.evaluations or "–"),
        f"{np.mean(m.tv):.4f} (worst {max(m.tv):.4f})",
        f"{np.sum(np.array(m.tv) <= 0.05)} of {len(m.tv)}",
    ]


def checks(rows: list[Measured]) -> dict[str, bool]:
    """Checks of benchmark D."""
    judged = [m for m in rows if m.name in JUDGED]
    return {
        f"{m.measurements} measurements, {m.name}: mean TV ≤ 0.05": float(np.mean(m.tv))
        <= 0.05
        for m in judged
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keys", type=int, default=10)
    parser.add_argument("--chains", type=int, default=2000)
    options = parser.parse_args()
    rows = []
    for measurements in (1, 4):
        for name in SAMPLERS:
            rows.append(measure(measurements, name, options.chains, options.keys))
            print("  ".join(as_text(rows[-1])), flush=True)
    notes = (
        f"{options.chains} chains, keys 0 to {options.keys - 1}, each with a problem "
        "of its own; samplers are "
    )
    notes += (
        "cp.SMC(cp.MALA()) where nothing else is said, on Schedule.log_snr(80, "
        "min=-14, max=9). "
    )
    notes += (
        "The first row is the TV that as many independent draws have by chance. Four "
        "measurements single out one "
    )
    notes += (
        "mode, so that any sampler that finds it has a TV of 0; one measurement can "
        "leave several. Only the "
    )
    notes += "default policy is judged, the other rows are there for comparison."
    details = {
        "num_chains": options.chains,
        "rows": [dataclasses.asdict(m) for m in rows],
    }
    title = "Benchmark D: 25 Gaussians in d = 8 through a random linear operator"
    return publish(
        "mixture_25",
        title,
        COLUMNS,
        [as_text(m) for m in rows],
        checks(rows),
        details,
        notes,
    )


if __name__ == "__main__":
    sys.exit(main())
