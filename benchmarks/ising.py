"""Ising 16 × 16: a masked network of one temperature at others, beside Kaufman's exact
finite lattice.

It trains a masked network on spins at the inverse temperature 0.40, in a quarter of an
hour, and keeps it in out/. Powers of the network, and its product with the energy of
the visible spins, are then sampled at other temperatures, with weights and without.

    python -m benchmarks ising
    python -m benchmarks ising --quick    # 256 chains

Exits with 1 if a threshold is missed. Finished rows are kept in out/, so that the same
command goes on where it was stopped.
"""

from __future__ import annotations

import functools
import math
import time
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

import composeprob as cp

SIDE = 16
SITES = SIDE * SIDE
TRAINED = 0.40
"""The inverse temperature of the training data; the critical one is 0.4407."""
OTHERS = (0.30, 0.35, 0.44)
ITERATIONS = 2000
BATCH = 64
WIDTH = 8
DILATIONS = (2, 4)
CHAINS = 512
LATTICES = 200
"""Lattices of the reference, which the cluster algorithm moves together."""
COLUMNS = (
    "β",
    "method",
    "chains",
    "log Z",
    "off",
    "energy a site",
    "off",
    "|m|",
    "off",
    "ancestors",
    "status",
    "evaluations",
    "seconds",
)


class Exact(NamedTuple):
    """Values of the finite lattice.

    Attributes:
        log_z: log Σ_x exp(β·Σ s_i s_j).
        energy: −E[Σ s_i s_j] a site.
    """

    log_z: float
    energy: float


def kaufman(beta: float, side: int = SIDE) -> float:
    """log Z of a square torus (Kaufman 1949, *Crystal statistics II*).

    Z = ½·(2 sinh 2β)^{n²/2}·(Π 2 cosh(nγ_odd/2) + Π 2 sinh(nγ_odd/2) + Π 2 cosh(nγ_even
    /2) + Π 2 sinh(nγ_even/2)), cosh γ_l = cosh 2β·coth 2β − cos(πl/n), and γ_0 = 2β +
    log tanh β, which is negative above the critical temperature.
    """
    number = np.arange(2 * side)
    cosh = math.cosh(2 * beta) / math.tanh(2 * beta) - np.cos(np.pi * number / side)
    gamma = np.arccosh(np.maximum(cosh, 1.0))
    gamma[0] = 2 * beta + math.log(math.tanh(beta))
    products = []
    for halves in (side * gamma[1::2] / 2, side * gamma[::2] / 2):
        cosines = np.sum(np.logaddexp(halves, -halves))
        sizes = np.abs(halves)
        sines = np.sum(sizes + np.log1p(-np.exp(-2 * sizes)))
        products += [(cosines, 1.0), (sines, float(np.prod(np.sign(halves))))]
    largest = max(log for log, _ in products)
    total = sum(sign * math.exp(log - largest) for log, sign in products)
    common = side * side / 2 * math.log(2 * math.sinh(2 * beta)) - math.log(2)
    return common + largest + math.log(total)


def exact(beta: float) -> Exact:
    """log Z and its derivative."""
    step = 1e-4
    slope = (kaufman(beta + step) - kaufman(beta - step)) / (2 * step)
    return Exact(kaufman(beta), -slope / SITES)


def spins_by_clusters(beta: float, seed: int, rounds: int, burn: int) -> np.ndarray:
    """Spins by Swendsen and Wang's moves, of `LATTICES` lattices after each round.

    Equal neighbours are bound with probability 1 − exp(−2β), and each cluster gets a
    spin of its own.
    """
    rng = np.random.default_rng(seed)
    index = np.arange(LATTICES * SITES).reshape(LATTICES, SIDE, SIDE)
    ends = np.stack([np.roll(index, -1, axis) for axis in (1, 2)])
    starts = np.broadcast_to(index, ends.shape)
    spins = rng.integers(0, 2, index.size)
    kept_rounds = []
    for turn in range(burn + rounds):
        bound = spins[starts] == spins[ends]
        bound &= rng.random(ends.shape) < -math.expm1(-2 * beta)
        links = (np.ones(bound.sum(), bool), (starts[bound], ends[bound]))
        number, labels = connected_components(
            coo_array(links, shape=(index.size, index.size)), directed=False
        )
        spins = rng.integers(0, 2, number)[labels]
        if turn >= burn:
            kept_rounds.append(spins.reshape(LATTICES, SITES).astype(np.int8))
    return np.concatenate(kept_rounds)


def bonds(spins: np.ndarray) -> np.ndarray:
    """Σ s_i s_j over neighbours, of each lattice of values 0 and 1."""
    signs = 2.0 * spins.reshape(-1, SIDE, SIDE) - 1
    both = sum(signs * np.roll(signs, 1, axis) for axis in (1, 2))
    return both.sum((1, 2))


def magnetisation(spins: np.ndarray) -> np.ndarray:
    """|m| of each lattice."""
    return np.abs(2.0 * spins.mean(1) - 1)


class LatticeNetwork(eqx.Module):
    """Logits of spins given visible ones: residual convolutions on the torus.

    Attributes:
        first: kernel from (spin, visible) to the channels.
        layers: kernels of the residual layers.
        biases: their biases.
        last: weights from the channels to the logit of value 1.
    """

    first: Array
    layers: tuple[Array, ...]
    biases: tuple[Array, ...]
    last: Array

    def __init__(self, key: Array):
        keys = jax.random.split(key, len(DILATIONS) + 1)
        self.first = jax.random.normal(keys[0], (WIDTH, 2, 5, 5)) / math.sqrt(50)
        scale = math.sqrt(2 / (9 * WIDTH))
        shape = (WIDTH, WIDTH, 3, 3)
        self.layers = tuple(scale * jax.random.normal(k, shape) for k in keys[1:])
        self.biases = tuple(jnp.zeros((WIDTH, 1, 1)) for _ in DILATIONS)
        self.last = jnp.zeros((WIDTH,))

    def __call__(self, tokens: Array, visible: Array) -> Array:
        spins = jnp.where(visible, 2.0 * tokens - 1.0, 0.0)
        image = jnp.stack([spins, 1.0 * visible]).reshape(2, SIDE, SIDE)
        h = convolved(image, self.first, 1)
        for kernel, bias, dilation in zip(
            self.layers, self.biases, DILATIONS, strict=True
        ):
            h = h + convolved(jax.nn.silu(h + bias), kernel, dilation)
        logit = jnp.tensordot(self.last, jax.nn.silu(h), axes=1).reshape(SITES)
        return jnp.stack([jnp.zeros(SITES), logit], axis=1)


def convolved(image: Array, kernel: Array, dilation: int) -> Array:
    """A convolution that goes round the torus."""
    reach = dilation * (kernel.shape[-1] // 2)
    around = ((0, 0), (reach, reach), (reach, reach))
    wrapped = jnp.pad(image, around, mode="wrap")
    return jax.lax.conv_general_dilated(
        wrapped[None], kernel, (1, 1), "VALID", rhs_dilation=(dilation, dilation)
    )[0]


def recipe() -> cp.training.MaskedRecipe:
    """Recipe of the network."""
    lattices = jnp.asarray(spins_by_clusters(TRAINED, 0, 100, 200), jnp.int32)

    def data(key: Array, n: int) -> Array:
        which, flip, moved = jax.random.split(key, 3)
        chosen = lattices[jax.random.randint(which, (n,), 0, len(lattices))]
        # The lattice's symmetries: a flip of all spins, and translations.
        flipped = chosen ^ jax.random.bernoulli(flip, 0.5, (n, 1))
        offsets = jax.random.randint(moved, (n, 2), 0, SIDE)

        def translated(spins: Array, offset: Array) -> Array:
            image = spins.reshape(SIDE, SIDE)
            return jnp.roll(image, offset, (0, 1)).ravel()

        return jax.vmap(translated)(flipped, offsets)

    return cp.training.MaskedRecipe(
        network=LatticeNetwork,
        data=data,
        length=SITES,
        num_values=2,
        iterations=ITERATIONS,
        batches=BATCH,
        learning_rate=functools.partial(optax.cosine_decay_schedule, 1e-2),
        ema=0.998,
    )


def network() -> cp.MaskedDiffusion:
    """The network, trained or read from out/."""
    chosen = recipe()
    file = Path("out", "ising", "network.eqx")
    untrained = LatticeNetwork(jax.random.key(0))
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        run = cp.training.train(chosen, jax.random.key(0), progress=False)
        eqx.tree_serialise_leaves(file, run.factor.network)
        print(
            f"trained in {run.seconds:.0f} s, loss {run.loss[-500:].mean():.4f}",
            flush=True,
        )
    return chosen.factor(eqx.tree_deserialise_leaves(file, untrained), "lattice")


if __name__ == "__main__":
    print(exact(0.4), exact(0.44))
    import itertools

    for beta in (0.3, 0.5):
        states = np.array(list(itertools.product((-1, 1), repeat=16))).reshape(-1, 4, 4)
        e = (states * np.roll(states, 1, 1) + states * np.roll(states, 1, 2)).sum(
            (1, 2)
        )
        print(beta, np.logaddexp.reduce(beta * e), kaufman(beta, 4))
    for b in (0.4, 0.44):
        s = spins_by_clusters(b, 3, 20, 100)
        print(b, -bonds(s).mean() / SITES, exact(b).energy, magnetisation(s).mean())
    began = time.monotonic()
    network()
