"""Random numbers of chains by counter: number i of a chain depends on nothing but its
words and i.

The hash is Threefry-2x32, bit for bit as in `jax.random`; on processors JAX compiles
that as loops, each of which takes as long to compile as the networks of a small
density.
"""

from __future__ import annotations

from enum import IntEnum
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


class Stream(IntEnum):
    """Numbers of a chain that are reserved, from 2³² − 1 down, as its levels count up
    from 0: of its first draw, of the prior's draws, of its kernel's states; and the
    streams of draws at level 0, of what closes a run, and of an averaged potential's
    points."""

    INITIAL, STATIC, STATES, DRAWS, CLOSING, POINTS = range(2**32 - 1, 2**32 - 7, -1)


def threefry(
    words: Array, number: Array | int, counter: Array | int = 0
) -> tuple[Array, Array]:
    """Two words of 32 random bits, in the shape that the arguments broadcast to: of the
    words of a key or a chain, (…, 2), NumPy's or JAX's, and of what is counted,
    unsigned of 32 bits (Salmon et al. 2011, *Parallel random numbers: as easy as 1, 2,
    3*)."""
    xp: ModuleType = np if isinstance(words, np.ndarray) else jnp
    u32 = lambda value: xp.asarray(value, xp.uint32)  # noqa: E731
    first, second = words[..., 0], words[..., 1]
    rotations = (13, 15, 26, 6), (17, 29, 16, 24)
    keys = (first, second, first ^ second ^ u32(0x1BD11BDA))
    x, y = u32(number) + keys[0], u32(counter) + keys[1]
    for i in range(5):
        for distance in rotations[i % 2]:
            x = x + y
            y = x ^ ((y << u32(distance)) | (y >> u32(32 - distance)))
        x, y = x + keys[(i + 1) % 3], y + keys[(i + 2) % 3] + u32(i + 1)
    return x, y


def normals(
    words: Array, number: Array | int, size: int, dtype: jnp.dtype = jnp.float32
) -> Array:
    """Independent standard normal numbers of one chain, (size,), by Box and Muller's
    transform."""
    x, y = threefry(words, number, jnp.arange(size, dtype=jnp.uint32))
    u = (x.astype(dtype) + 0.5) * 2.0**-32
    return jnp.sqrt(-2.0 * jnp.log(u)) * jnp.cos(
        (2 * np.pi * 2.0**-32) * y.astype(dtype)
    )


def stream(words: Array, name: Array | int) -> Array:
    """Words of a stream of numbers of its own, (2,), for one chain."""
    return jnp.stack(threefry(words, name))


def key_of(words: Array, number: Array | int) -> Array:
    """A typed key of one chain, for code that takes keys."""
    return jax.random.wrap_key_data(
        jnp.stack(threefry(words, number)), impl="threefry2x32"
    )


def words_of(key: Array, count: int, series: int = 0) -> tuple[Array, Array]:
    """The words of N chains, (N, 2), and those that they share, (2,), from a random key
    of any kind, others for another ``series`` of it; computed on the host where the key
    is there."""
    data = jax.random.key_data(key)
    xp: ModuleType = jnp if isinstance(data, jax.core.Tracer) else np
    data = xp.asarray(data).astype(xp.uint32).reshape(-1, 2)
    seed = data[0] if len(data) == 1 else data[0] ^ data[1]
    with np.errstate(over="ignore"):
        words = xp.stack(
            threefry(seed[None], xp.arange(count + 1, dtype=xp.uint32), series), axis=1
        )
    return words[1:], words[0]
