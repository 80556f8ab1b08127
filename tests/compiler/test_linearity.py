"""Linearity in some inputs, and the pattern of slopes that can be other than zero, read
off a function's equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.sparse import BCOO

from composeprob.compiler.linearity import Kind, Linearity, entries

SIZE = 6
RNG = np.random.default_rng(0)
M = jnp.asarray(RNG.normal(size=(SIZE, SIZE)) + 3 * np.eye(SIZE), float)
T = jnp.tril(M)
BLOCKS = jnp.kron(jnp.eye(3), jnp.array([[2.0, 1.0], [1.0, 2.0]]))
SPARSE_T = BCOO.fromdense(T)
LATENTS = [-40.0, -1.0, 0.3, 1.0, 2.5, 3.5, 5.0, 35.0]
"""Draws of N(0, 1) would show few of these."""


@jax.custom_jvp
def thrice(x):
    return 3 * x


thrice.defjvp(lambda x, dx: (3 * x[0], 3 * dx[0]))


@jax.custom_vjp
def twice(x):
    return 2 * x


twice.defvjp(lambda x: (2 * x, None), lambda _, g: (2 * g,))


def alternating(x, z):
    """z₂ − z₁ + z₀ times x₀, in a loop: the same random number in every pass would
    leave z."""
    return jax.lax.scan(
        lambda c, a: (jnp.exp(z * a) * x[0] - c, c), 0.0, jnp.arange(4.0)
    )[0][None]


SPARSE = {  # the pattern is known entry by entry
    "where latents say": lambda x, z: jnp.where(z > 2.4, x, 0.0),
    "where latents say of two": lambda x, z: jnp.where(z > 2.4, x[:3], x[3:]),
    "sum far out": lambda x, z: x[:3] + jnp.maximum(z - 30.0, 0.0) * x[3:],
    "cond": lambda x, z: jax.lax.cond(z > 3.0, lambda x: x[:3], lambda x: 2 * x[3:], x),
    "switch": lambda x, z: jax.lax.switch(
        z.astype(int), [lambda x: x[:3], lambda x: 0 * x[3:], lambda x: x[::2]], x
    ),
    "scan": lambda x, z: jax.lax.scan(
        lambda c, a: (c * z + a, jnp.where(z > 2.0, c, a)), 0.0, x
    )[1],
    "scan back": lambda x, z: jax.lax.scan(
        lambda c, a: (c + a, c * z), 0.0, x, reverse=True
    )[1],
    "no passes": lambda x, z: jax.lax.scan(
        lambda c, a: (c + a, c), x, jnp.zeros((0, SIZE))
    )[0],
    "alternating": alternating,
    "plate": lambda x, z: jax.vmap(lambda a: a * jnp.exp(z) + 1.0)(x),
    "map": lambda x, z: jax.lax.map(lambda a: a * z, x),
    "cancelled": lambda x, z: z * x - z * x + x[::-1],
    "places": lambda x, z: x.at[2].set(z).at[0].add(z)[jnp.array([0, 2, 4])],
    "scaled places": lambda x, z: x.at[jnp.array([1, 1, 3])].multiply(z) ** 1,
    "sparse": lambda x, z: SPARSE_T @ (x * z),
    "segments": lambda x, z: jax.ops.segment_sum(x, jnp.array([0, 0, 1, 1, 2, 2]), 3),
    "convolution": lambda x, z: jnp.convolve(x, jnp.stack([1.0, z]), "same"),
    "averages": lambda x, z: jax.lax.reduce_window(
        x, 0.0, jax.lax.add, (2,), (1,), "VALID"
    ),
    "blocks": lambda x, z: (
        jnp.kron(jnp.eye(2), jnp.stack([1.0, z, 0.0, 1.0]).reshape(2, 2)) @ x[:4]
    ),
    "blocks of a root": lambda x, z: jnp.linalg.cholesky(jnp.exp(z / 9) * BLOCKS) @ x,
    "triangular": lambda x, z: jax.scipy.linalg.solve_triangular(
        T * jnp.exp(z), x, lower=True
    ),
    "resized": lambda x, z: jax.image.resize(x.reshape(2, 3), (4, 6), "linear").ravel(),
    "grid": lambda x, z: jnp.interp(jnp.array([0.3, 2.5]), jnp.arange(6.0), x),
    "pieces": lambda x, z: jnp.concatenate(
        [jnp.tile(jnp.split(x, 2)[0] * z, 2), jnp.pad(x, 2, "reflect")]
    ),
    "remat": lambda x, z: jax.checkpoint(lambda x: thrice(x) * 2)(x),
}
DENSE = {  # more may be said than is true, never less
    "solve": lambda x, z: jnp.linalg.solve(M * jnp.exp(z / 9), x),
    "known solve": lambda x, z: jnp.linalg.solve(M, x),
    "kernel": lambda x, z: (
        jnp.linalg.cholesky(M @ M.T + jnp.exp(z / 9) * jnp.eye(SIZE)) @ x
    ),
    "fourier": lambda x, z: jnp.fft.irfft(jnp.fft.rfft(x) * jnp.exp(1j * z)),
    "while": lambda x, z: jax.lax.while_loop(
        lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] * 2), (0, x)
    )[1],
    "place of a latent": lambda x, z: x[z.astype(int)][None],
    "shift by a latent": lambda x, z: jnp.roll(x, z.astype(int)),
}
LINEAR = SPARSE | DENSE
NONLINEAR = ("round", "floor", "ceil", "trunc", "sign", "sort", "abs", "sin")
OTHER = {
    "step": lambda x, z: jnp.where(x > 0.5, 2.0, 0.0),
    **{name: lambda x, z, name=name: getattr(jnp, name)(x) for name in NONLINEAR},
    "int": lambda x, z: 1.0 * x.astype(int),
    "bool": lambda x, z: 1.0 * (x > 0),
    "few bits": lambda x, z: x.astype(jnp.float8_e4m3fn).astype(float),
    "fmod": lambda x, z: jnp.fmod(x, 1.0),
    "mod": lambda x, z: x % 1.0,
    "quotient": lambda x, z: x // 1.0,
    "argmax": lambda x, z: 1.0 * jnp.argmax(x)[None],
    "rank": lambda x, z: 1.0 * jnp.argsort(x),
    "table": lambda x, z: jnp.arange(6.0)[x.astype(int)],
    "digitize": lambda x, z: 1.0 * jnp.digitize(x, jnp.arange(3.0)),
    "straight through": lambda x, z: x + jax.lax.stop_gradient(jnp.round(x) - x),
    "stopped": lambda x, z: jax.lax.stop_gradient(x),
    "relu": lambda x, z: jax.nn.relu(x),
    "clip": lambda x, z: jnp.clip(x, -9.0, 9.0),
    "max": lambda x, z: jnp.maximum(x, -9.0),
    "largest": lambda x, z: x.max(keepdims=True),
    "cond": lambda x, z: jax.lax.cond(x[0] > 3, lambda x: x, lambda x: 2 * x, x),
    "while": lambda x, z: jax.lax.while_loop(lambda c: c[0] < 3, lambda c: c * 2, x),
    "in a loop": lambda x, z: jax.lax.scan(lambda c, a: (c + jnp.sign(a), c), 0.0, x)[
        0
    ][None],
    "carried": lambda x, z: jax.lax.fori_loop(0, 3, lambda i, c: c * x, jnp.ones(SIZE)),
    "of itself": lambda x, z: jnp.outer(x, x).ravel(),
    "square over itself": lambda x, z: x * x / x,
    "under": lambda x, z: 1.0 / x,
    "no derivative": lambda x, z: twice(x),
    "called back": lambda x, z: jax.pure_callback(
        np.floor, jax.ShapeDtypeStruct(x.shape, x.dtype), x
    ),
}
FREE = {
    "of latents": lambda x, z: jnp.floor(z) + jnp.zeros_like(x),
    "like x": lambda x, z: jnp.ones_like(x),
    "counted": lambda x, z: (
        jax.lax.while_loop(lambda c: c < 3, lambda c: c + 1, 0) * z[None]
    ),
}


def value(function):
    """The value of a function of x and a latent; to be called under a
    transformation."""
    jaxpr = jax.make_jaxpr(function)(jnp.zeros(SIZE), jnp.zeros(()))
    walk = Linearity(SIZE, np.random.default_rng(0))
    x, z = jaxpr.in_avals
    _, sites = entries([("x", (SIZE,))], {"x": x})
    inputs = [sites["x"], walk.any_latent(z)]
    facts = walk.evaluate(jaxpr.jaxpr, jaxpr.consts, inputs)
    return walk.value_of(facts, jaxpr.jaxpr.outvars[0])


def kind(function):
    kinds = []
    jax.eval_shape(lambda: kinds.append(value(function).kind))
    return kinds[0]


@pytest.mark.parametrize(
    "kinds", [(LINEAR, Kind.LINEAR), (OTHER, Kind.OTHER)], ids=["linear", "other"]
)
def test_linear_functions_are_told_from_others(kinds):
    functions, expected = kinds
    actual = {name: kind(f) for name, f in functions.items()}
    assert actual == dict.fromkeys(functions, expected)


def test_what_is_free_of_x_is_no_function_of_it():
    assert all(kind(f) <= Kind.LATENT for f in FREE.values())


def test_every_slope_that_some_latent_makes_is_found():
    def patterns():
        return {name: value(f).array.T for name, f in LINEAR.items()}

    found = jax.jit(patterns)()

    def slopes(z):
        return {name: jax.jacfwd(f)(jnp.zeros(SIZE), z) for name, f in LINEAR.items()}

    true = jax.jit(lambda z: jax.lax.map(slopes, z))(jnp.array(LATENTS))
    for name in LINEAR:
        at_some = np.any(np.abs(true[name]) > 1e-5, 0)  # beyond rounding
        can = np.asarray(found[name] != 0)
        assert not (at_some & ~can).any(), name
        assert name in DENSE or not (can & ~at_some).any(), name
