"""A 3×3 convolution whose derivatives are convolutions of the same form.

XLA's CPU backend has a fast kernel for convolutions with channels last. JAX transposes
a convolution into one with permuted dimensions, which XLA puts in order for the fast
kernel only outside of loops: inside a loop over steps or levels the gradient of a small
UNet took 15 times as long (measured with jaxlib 0.10; jax issue 12868). Here
convolution and kernel gradient are two bilinear primitives, each other's transposes,
with zeros outside of the image:

    convolve(x, w)[n, i, j] = Σ_{a, b} w[a, b]ᵀ x[n, i + a − 1, j + b − 1],
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
    """A 3×3 convolution with bias, of one image (h, w, inputs), that keeps its size."""

    def __init__(
        self, inputs: int, outputs: int, *, zero: bool = False, rngs: nnx.Rngs
    ):
        init = nnx.initializers.zeros if zero else nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(init(rngs.params(), (3, 3, inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros(outputs))

    def __call__(self, x: Array) -> Array:
        return convolve(x[None], self.kernel[...])[0] + self.bias[...]


def convolve(x: Array, w: Array) -> Array:
    """Convolve images x (n, h, w, c) with a kernel (3, 3, c, d)."""
    return _convolve.bind(x, w)


def correlate(x: Array, g: Array) -> Array:
    """Return the gradient of ⟨convolve(x, ·), g⟩, a kernel (3, 3, c, d)."""
    return _correlate.bind(x, g)


def _lax_convolve(x: Array, w: Array) -> Array:
    return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=_LAYOUT)


def _lax_correlate(x: Array, g: Array) -> Array:
    """Correlate by a convolution with kernels as large as the image.

    The batch takes the place of the channels.
    """
    channels_first = x.transpose(3, 1, 2, 0)
    kernels = g.transpose(1, 2, 0, 3)
    out = jax.lax.conv_general_dilated(
        channels_first, kernels, (1, 1), [(1, 1)] * 2, dimension_numbers=_LAYOUT
    )
    return out.transpose(1, 2, 0, 3)


def _turned(w: Array) -> Array:
    """Return the kernel of the transposed convolution."""
    return w[::-1, ::-1].transpose(0, 1, 3, 2)


def _primitive(
    name: str,
    by_lax: Callable[[Array, Array], Array],
    left: Any,
    right: Any,
    batch: Any,
) -> Primitive:
    """Return a bilinear primitive.

    ``by_lax`` computes it by operations of JAX; ``left`` and ``right`` are its
    transposes in either argument, and ``batch`` its rule for vmap.
    """
    primitive = Primitive(name)
    primitive.def_impl(jax.jit(by_lax))

    def shape(x: Any, y: Any) -> Any:
        out = jax.eval_shape(by_lax, x, y)
        return jax.core.ShapedArray(out.shape, out.dtype)

    primitive.def_abstract_eval(shape)
    lowering = mlir.lower_fun(by_lax, multiple_results=False)
    mlir.register_lowering(primitive, lowering)
    ad.defbilinear(primitive, left, right)
    batching.primitive_batchers[primitive] = batch
    # Marks a product, whose precision `cp.compile(precision=…)` may lower.
    primitive.multiplies = True
    return primitive


def _batch_convolve(arguments: Any, axes: Any) -> tuple[Array, int]:
    x, w = arguments
    x_axis, w_axis = axes
    if w_axis is not None:
        return jax.vmap(_lax_convolve, axes)(x, w), 0
    # With one kernel for all, the new axis joins that of the images.
    x = jnp.moveaxis(x, x_axis, 0)
    out = convolve(x.reshape(-1, *x.shape[2:]), w)
    return out.reshape(*x.shape[:2], *out.shape[1:]), 0


def _batch_correlate(arguments: Any, axes: Any) -> tuple[Array, int]:
    return jax.vmap(_lax_correlate, axes)(*arguments), 0


_convolve = _primitive(
    "convolve3x3",
    _lax_convolve,
    lambda g, x, w: convolve(g, _turned(w)),
    lambda g, x, w: correlate(x, g),
    _batch_convolve,
)
_correlate = _primitive(
    "correlate3x3",
    _lax_correlate,
    lambda w, x, g: convolve(g, _turned(w)),
    lambda w, x, g: convolve(x, w),
    _batch_correlate,
)
