"""What a run can be repeated with: its random key as code, and the versions of what it ran on."""

from __future__ import annotations

import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import jax
import numpy as np
from jax import Array


def as_code(key: Array) -> str:
    """Returns the call that makes a key: of a seed where it has the form of one."""
    data, kind = np.asarray(jax.random.key_data(key)).ravel().tolist(), str(jax.random.key_impl(key))
    if kind == "threefry2x32":
        if data[0] == 0:
            return f"jax.random.key({data[1]})"
        return f"jax.random.wrap_key_data(jax.numpy.array({data}, jax.numpy.uint32))"
    return f"jax.random.wrap_key_data(jax.numpy.array({data}, jax.numpy.uint32), impl={kind!r})"


def versions() -> dict[str, str]:
    """Returns the versions of this library and of what it computes with, of Python, and the kind of device."""
    return {"python": platform.python_version(), **_installed(), "device": jax.devices()[0].device_kind}


@cache
def _installed() -> dict[str, str]:
    """The version of each package, read from its metadata once in a process."""
    found = {}
    for name in ("composeprob", "jax", "numpyro", "equinox", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a folder that is not installed
            found[name] = "not installed"
    return found
