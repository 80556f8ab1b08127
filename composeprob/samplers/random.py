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
from jax.typing import DTypeLike
from jaxtyping import Float, Int, Key, UInt32


class Stream(IntEnum):
    """Reserved numbers of a chain, from 2³² − 1 down, as its levels count up from 0."""

    INITIAL = 2**32 - 1  # its initial draw
    STATIC = 2**32 - 2  # draws of the prior
    STATES = 2**32 - 3  # states of its kernel
    DRAWS = 2**32 - 4  # the stream of draws at level 0
    CLOSING = 2**32 - 5  # the stream of finishers
    POINTS = 2**32 - 6  # the stream of an averaged potential's points


ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
"""Threefry-2x32's, of even and of odd rounds."""
PARITY = 0x1BD11BDA
"""Threefry's constant, with which the third word of a key is made."""


def threefry(
    words: Array, number: Array | int, counter: Array | int = 0
) -> tuple[Array, Array]:
    """Return two words of 32 random bits, in the shape that the arguments broadcast to
    (Salmon et al. 2011, *Parallel random numbers: as easy as 1, 2, 3*).

    Args:
        words: of a key or a chain, (…, 2), NumPy's or JAX's.
        number: the first word that is hashed, unsigned of 32 bits.
        counter: the second one.
    """
    xp: ModuleType = np if isinstance(words, np.ndarray) else jnp

    def u32(value: object) -> Array:
        return xp.asarray(value, xp.uint32)

    first = words[..., 0]
    second = words[..., 1]
    keys = (first, second, first ^ second ^ u32(PARITY))
    x = u32(number) + keys[0]
    y = u32(counter) + keys[1]
    for i in range(5):
        for distance in ROTATIONS[i % 2]:
            x = x + y
            y = x ^ ((y << u32(distance)) | (y >> u32(32 - distance)))
        x = x + keys[(i + 1) % 3]
        y = y + keys[(i + 2) % 3] + u32(i + 1)
    return x, y


def normals(
    words: UInt32[Array, " 2"],
    number: Array | int,
    size: int,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, " {size}"]:
    """Independent standard normal numbers of one chain, by Box and Muller's
    transform."""
    x, y = threefry(words, number, jnp.arange(size, dtype=jnp.uint32))
    u = (x.astype(dtype) + 0.5) * 2.0**-32  # in (0, 1): never 0
    angle = (2 * np.pi * 2.0**-32) * y.astype(dtype)
    return jnp.sqrt(-2.0 * jnp.log(u)) * jnp.cos(angle)


def uniforms(
    words: UInt32[Array, " 2"], number: Array | int, size: int
) -> Float[Array, " {size}"]:
    """Independent uniform numbers of one chain, none of them 0 or 1."""
    x, _ = threefry(words, number, jnp.arange(size, dtype=jnp.uint32))
    # As many bits as a float holds beside the half: rounding never gives 1.
    return ((x >> 9).astype(jnp.float32) + 0.5) * 2.0**-23


def stream(words: UInt32[Array, " 2"], name: Array | int) -> UInt32[Array, " 2"]:
    """Words of a separate stream of numbers for one chain."""
    return jnp.stack(threefry(words, name))


def key_of(words: UInt32[Array, " 2"], number: Array | int) -> Key[Array, ""]:
    """Return a typed key of one chain, for code that takes keys."""
    return jax.random.wrap_key_data(
        jnp.stack(threefry(words, number)), impl="threefry2x32"
    )


def words_of(
    key: Key[Array, ""], count: int, series: int = 0
) -> tuple[UInt32[Array, "{count} 2"], UInt32[Array, " 2"]]:
    """Return the words of N chains, and those that they share.

    They are computed on the host where the key is there.

    Args:
        key: a random key of any kind.
        count: N.
        series: of the key's words; each has others.
    """
    data = jax.random.key_data(key)
    xp: ModuleType = jnp if isinstance(data, jax.core.Tracer) else np
    data = xp.asarray(data).astype(xp.uint32).reshape(-1, 2)
    # Kinds of keys have two words or four.
    seed = data[0]
    if len(data) > 1:
        seed = data[0] ^ data[1]
    numbers = xp.arange(count + 1, dtype=xp.uint32)
    with np.errstate(over="ignore"):
        words = xp.stack(threefry(seed[None], numbers, series), axis=1)
    return words[1:], words[0]


def categorical(
    u: Float[Array, ""], logits: Float[Array, " values"]
) -> tuple[Int[Array, ""], Float[Array, ""]]:
    """Draw a value in proportion to exp(logits) by a uniform number; return it with its
    log-probability, −∞ where no value is possible."""
    total = jax.nn.logsumexp(logits)
    cumulative = jnp.cumsum(jnp.exp(logits - jnp.max(logits)))
    # Strictly below the total: a value without probability is never chosen.
    value = jnp.sum(cumulative <= u * cumulative[-1])
    value = jnp.minimum(value, len(logits) - 1).astype(jnp.int32)
    possible = ~jnp.isneginf(total)
    return value, jnp.where(possible, logits[value] - total, -jnp.inf)
