"""The 3×3 convolution and its derivatives are XLA's.

None of them is a transposed convolution.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from composeprob.factors.networks import as_network
from composeprob.factors.precision import Rounded
from composeprob.models.networks.convolution import Conv3x3, convolve, correlate

X = jax.random.normal(jax.random.key(0), (4, 6, 5, 3))
W = jax.random.normal(jax.random.key(1), (3, 3, 3, 5))


def by_lax(x, w):
    return jax.lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def loss(conv):
    """A function of two convolutions, nonlinear in image and kernel."""
    second = jnp.linspace(-1, 1, 90).reshape(3, 3, 5, 2)

    def function(x, w):
        return jnp.sum(jnp.sin(conv(jnp.tanh(conv(x, w)), second)))

    return function


same = functools.partial(chex.assert_trees_all_close, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("order", ["value", "gradient", "second", "forward"])
def test_it_is_the_convolution_and_so_are_its_derivatives(order):
    def of(conv):
        f = loss(conv)
        gradient = jax.grad(f, (0, 1))

        def of_gradient(x, w):
            return sum(jnp.sum(jnp.cos(g)) for g in gradient(x, w))

        def forward(x, w):
            _, tangent = jax.jvp(gradient, (x, w), (w.sum() * x, w))
            return tangent

        return {
            "value": conv,
            "gradient": gradient,
            "second": jax.grad(of_gradient, (0, 1)),
            "forward": forward,
        }[order]

    same(jax.jit(of(convolve))(X, W), jax.jit(of(by_lax))(X, W))


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0)])
def test_it_maps(axes):
    x = X
    if axes[0] == 0:
        x = X[None] * jnp.arange(1.0, 4).reshape(3, 1, 1, 1, 1)
    w = W
    if axes[1] == 0:
        w = W[None] * jnp.arange(2.0, 5).reshape(3, 1, 1, 1, 1)

    def mapped(conv):
        def both(x, w):
            return conv(x, w), jax.grad(loss(conv), (0, 1))(x, w)

        return jax.jit(jax.vmap(both, axes))(x, w)

    same(mapped(convolve), mapped(by_lax))


def test_the_kernel_gradient_of_mapped_images_is_one_correlation():
    def total(w):
        return jnp.sum(jax.vmap(lambda x: convolve(x[None], w))(X) ** 2)

    equations = jax.make_jaxpr(jax.grad(total))(W).eqns
    names = [equation.primitive.name for equation in equations]
    assert names.count("correlate3x3") == names.count("convolve3x3") == 1

    def half_square(w):
        return 0.5 * jnp.sum(by_lax(X, w) ** 2)

    same(correlate(X, by_lax(X, W)), jax.grad(half_square)(W))


def transposed(f, *arguments):
    """Convolutions of the lowered program that the fast kernel does not take.

    Their dimensions are in another order.
    """
    text = jax.jit(f).lower(*arguments).as_text()
    lines = [line for line in text.splitlines() if "stablehlo.convolution" in line]
    assert lines
    order = "[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"
    return [line for line in lines if order not in line or "reverse = [true" in line]


def test_no_derivative_is_a_transposed_convolution():
    def second(conv):
        def of_gradient(x, w):
            return jnp.sum(jax.grad(loss(conv))(x, w) ** 3)

        return jax.grad(of_gradient, (0, 1))

    assert not transposed(second(convolve), X, W)
    assert transposed(second(by_lax), X, W)  # what loops on CPUs run slowly


def test_the_layer_is_flax_s():
    bias = jnp.arange(5.0)

    def both(x):
        ours = Conv3x3(3, 5, rngs=nnx.Rngs(0))
        theirs = nnx.Conv(3, 5, (3, 3), rngs=nnx.Rngs(1))
        theirs.kernel[...] = ours.kernel[...]
        theirs.bias[...] = bias
        ours.bias[...] = bias
        return ours(x), theirs(x), jnp.std(ours.kernel[...]) * 27**0.5

    ours, theirs, spread = jax.jit(both)(X[0])
    same(ours, theirs)
    assert 0.8 < float(spread) < 1.2


def test_it_is_rounded_where_a_precision_is_asked_for():
    conv = Rounded(as_network(lambda x, t: convolve(x, W)), "bfloat16")

    def rounded(a):
        return jnp.asarray(jnp.asarray(a, "bfloat16"), jnp.float32)

    out = by_lax(rounded(X), rounded(W))
    np.testing.assert_allclose(jax.jit(conv)(X, 0), out, rtol=2**-8, atol=1e-5)
    gradient = jax.make_jaxpr(jax.grad(lambda x: jnp.sum(jnp.sin(conv(x, 0)))))(X)
    types = []
    for equation in gradient.eqns:
        if equation.primitive.name.endswith("3x3"):
            types.append({variable.aval.dtype for variable in equation.invars})
    assert types == [{jnp.dtype("bfloat16")}] * 2
