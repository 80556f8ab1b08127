"""A 3×3 convolution whose derivatives are convolutions of the same form, so that loops
on CPUs run them fast.

XLA's CPU backend has a fast kernel for convolutions with channels last. JAX transposes
a convolution into one with permuted dimensions, which XLA puts in order for the fast
kernel only outside of loops: inside a loop over steps or levels the gradient of a small
UNet took 15 times as long (measured with jaxlib 0.10; jax issue 12868). Here
convolution and kernel gradient are two bilinear primitives, each other's transposes:

    convolve(x, w)[n, i, j] = Σ_{a, b} w[a, b]ᵀ x[n, i + a − 1, j + b − 1],   zero outside,
    correlate(x, g)[a, b]   = Σ_{n, i, j} x[n, i + a − 1, j + b − 1] g[n, i, j]ᵀ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

_LAYOUT = ("NHWC", "HWIO", "NHWC")


class Conv3x3(nnx.Module):
    """A convolution of 3×3 with bias that keeps the image's size, for one image (h, w,
    inputs)."""

    def __init__(
        self, inputs: int, outputs: int, *, zero: bool = False, rngs: nnx.Rngs
    ):
        init = nnx.initializers.zeros if zero else nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(init(rngs.params(), (3, 3, inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros(outputs))

    def __call__(self, x: Array) -> Array:
        return convolve(x[None], self.kernel[...])[0] + self.bias[...]


def convolve(x: Array, w: Array) -> Array:
    """Images x (n, h, w, c) with a kernel (3, 3, c, d): images (n, h, w, d)."""
    return _convolve.bind(x, w)


def correlate(x: Array, g: Array) -> Array:
    """The kernel (3, 3, c, d) that is the gradient of ⟨convolve(x, ·), g⟩."""
    return _correlate.bind(x, g)


def _plain_convolve(x: Array, w: Array) -> Array:
    return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=_LAYOUT)


def _plain_correlate(x: Array, g: Array) -> Array:
    """The batch takes the place of the channels: a convolution with kernels as large as
    the image."""
    channels_first, kernels = x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3)
    out = jax.lax.conv_general_dilated(
        channels_first, kernels, (1, 1), [(1, 1)] * 2, dimension_numbers=_LAYOUT
    )
    return out.transpose(1, 2, 0, 3)


def _turned(w: Array) -> Array:
    """The kernel of the transposed convolution."""
    return w[::-1, ::-1].transpose(0, 1, 3, 2)


def _primitive(
    name: str, plain: Callable[[Array, Array], Array], left: Any, right: Any, batch: Any
) -> Primitive:
    """A bilinear primitive: its plain form, its transposes in either argument, and its
    rule for vmap."""
    made = Primitive(name)
    made.def_impl(jax.jit(plain))

    def shape(x: Any, y: Any) -> Any:
        return jax.core.ShapedArray(
            (out := jax.eval_shape(plain, x, y)).shape, out.dtype
        )

    made.def_abstract_eval(shape)
    mlir.register_lowering(made, mlir.lower_fun(plain, multiple_results=False))
    ad.defbilinear(made, left, right)
    batching.primitive_batchers[made] = batch
    made.multiplies = True  # what `cp.compile(precision=…)` may round
    return made


def _batch_convolve(arguments: Any, axes: Any) -> tuple[Array, int]:
    (x, w), (x_axis, w_axis) = arguments, axes
    if w_axis is not None:
        return jax.vmap(_plain_convolve, axes)(x, w), 0
    x = jnp.moveaxis(x, x_axis, 0)
    out = convolve(x.reshape(-1, *x.shape[2:]), w)
    return out.reshape(*x.shape[:2], *out.shape[1:]), 0


def _batch_correlate(arguments: Any, axes: Any) -> tuple[Array, int]:
    return jax.vmap(_plain_correlate, axes)(*arguments), 0


_convolve = _primitive(
    "convolve3x3",
    _plain_convolve,
    lambda g, x, w: convolve(g, _turned(w)),
    lambda g, x, w: correlate(x, g),
    _batch_convolve,
)
_correlate = _primitive(
    "correlate3x3",
    _plain_correlate,
    lambda w, x, g: convolve(g, _turned(w)),
    lambda w, x, g: convolve(x, w),
    _batch_correlate,
)
