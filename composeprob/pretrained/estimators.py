"""Posteriors that other packages have trained, as factors."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import PyTree

from composeprob.errors import LoadError, ShapeError, WrongTypeError
from composeprob.factors.diffusion import Diffusion
from composeprob.schedule import Schedule

if TYPE_CHECKING:
    from composeprob.pretrained.readings import Reading


class Units:
    """θ = location + scale·u, both of the event's shape. Part of what is compiled, equal by its numbers."""

    def __init__(self, location: ArrayLike, scale: ArrayLike, shape: tuple[int, ...]):
        self.location, self.scale = (np.array(np.broadcast_to(a, shape), float) for a in (location, scale))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Units) and hash(self) == hash(other)

    def __hash__(self) -> int:
        return hash((self.location.tobytes(), self.scale.tobytes()))


class Denoiser(eqx.Module):
    """The network of an `Estimator`: the mean of u given x = α·u + σ·ε, α² + σ² = 1, at s = σ/α."""

    denoise: Callable[..., Array] = eqx.field(static=True)
    arrays: PyTree[Array]

    def __call__(self, z: Array, s: Array, /, x: Array) -> Array:
        return self.denoise(self.arrays, z * jnp.sqrt(1 + s**2), s, x)


class Estimator(Diffusion):
    r"""An `Estimator` is a posterior q(u | x) that another package has trained; made by `from_estimator`.

    Its events are u = (θ − location)/scale, the units that its network was trained in. Noise of one size for all
    entries of u is of another size for each of θ, so programs are written in u, and `parameters` makes θ of samples:
    under a prior N(m, c²) of θ that of u is N((m − location)/scale, (c/scale)²).

    Attributes:
        units: ``units.location`` and ``units.scale``, of the event's shape; 0 and 1 where nothing is standardised.
        adapter: what makes conditions of data.
    """

    units: Units = eqx.field(static=True)
    adapter: Callable[..., Array] = eqx.field(static=True)
    declared: ClassVar[bool] = True

    def __init__(self, reading: Reading, schedule: Schedule | None, label: str):
        low, high = (float(np.log(s)) * -2 for s in reversed(reading.sigmas))
        if schedule is None:
            schedule = Schedule.log_snr(60, min=max(low, -9.0), max=min(high, 11.0))
        shape = reading.event_shape
        self.units, self.adapter = Units(reading.location, reading.scale, shape), reading.adapt
        super().__init__(
            Denoiser(reading.denoise, reading.arrays), schedule, event_shape=shape, parameterization="x0",
            time="sigma", conditions=("x",), log_snr_range=(low, high), label=label,
        )  # fmt: skip

    def adapt(self, x: ArrayLike | None = None, /, **data: ArrayLike) -> Array:
        """Makes conditions of data, by the rules of the package that trained the network.

        Args:
            x: (n, …), n observations; for packages with data of several names these as keywords.
            data: the same by name.

        Returns:
            (n, …), for `given` in a plate, or over which ``cp.product(…, over={"x": …})`` runs; ``[0]`` is one.
        """
        return self.adapter(**data) if x is None else self.adapter(x, **data)

    def parameters(self, u: ArrayLike) -> np.ndarray:
        """Makes θ = location + scale·u of samples u, whose last axes are those of the event."""
        if np.shape(u)[np.ndim(u) - len(self.event_shape) :] != self.event_shape:
            raise ShapeError(
                f"Events of '{self.label}' have shape {self.event_shape}; got an array {np.shape(u)}.",
                fix="pass samples of this factor's site, such as result['theta'].",
            )
        return self.units.location + self.units.scale * np.asarray(u)


def from_estimator(estimator: object, schedule: Schedule | None = None, *, label: str = "posterior") -> Estimator:
    """Makes a factor of a posterior estimator that another package has trained: q(u | x), with the condition ``x``.

    Read are GenSBI's conditional pipelines (flow matching, score matching, EDM), BayesFlow's ``BasicEstimator`` with
    a diffusion or flow-matching network, on Keras's JAX backend, sbijax's ``fmpe``, ``npse`` and ``aio``, and sbi's
    NPSE and FMPE, from a file that ``tools/export_sbi.py`` writes beside torch. Nothing is trained. A score only: such
    a factor has no log-density.

    Args:
        estimator: the trained estimator; of sbijax the pair (estimator, params); of sbi the path of its file.
        schedule: the levels; left out, 60 of equal distance in log-SNR over the range of the network's training, at
            most from −9 to 11.
        label: the name to show.

    Raises:
        WrongTypeError: an object of no package that is read.
        LoadError: another version of its package than was tried, or no file that the script wrote.
        InvalidValueError: an estimator of another kind than a diffusion or flow-matching network, or of which
            something (a source distribution, a transformation of θ) has no noised law of this form.

    Example:
        Data of many subjects under one network, ``posterior`` being ``cp.from_estimator(estimator)``::

            xs = posterior.adapt(data)                                     # (n, …)
            cp.sample("u", prior * cp.product(posterior / prior, over={"x": xs}))

    References:
        Amerio 2026, *GenSBI*, arXiv 2605.27499. Radev et al. 2023, *BayesFlow*, JOSS 8(89). Dirmeier et al. 2024,
        *Simulation-based inference with the Python package sbijax*, arXiv 2409.19435.
    """
    # The versions whose estimators were read, and compared with the packages' own samples.
    tried = {"gensbi": "0.5", "bayesflow": "2.1", "sbi": "0.27", "sbijax": "0.4"}
    from composeprob.pretrained import readings

    # A plain tuple, and not sbijax's own kinds of it.
    parts = estimator if type(estimator) is tuple and estimator else (estimator,)
    packages = {base.__module__.partition(".")[0] for base in type(parts[0]).__mro__}
    package = next((name for name in tried if name in packages), None)
    if isinstance(estimator, str | Path):
        described, arrays = readings.sbi_file(Path(estimator))
        package, version = "sbi", str(described.get("version"))
        read: Callable[[], Reading] = partial(readings.sbi, Path(estimator), described, arrays)
    elif package == "sbi":
        raise WrongTypeError(
            f"{type(estimator).__name__} of sbi is a network of torch, which is not read here.",
            fix="write it to a file by tools/export_sbi.py, beside torch, and pass the file's path.",
        )
    elif package is None:
        raise WrongTypeError(
            f"from_estimator reads estimators of {', '.join(tried)}; got {type(parts[0]).__module__}."
            f"{type(parts[0]).__name__}.",
            fix="wrap another package's network yourself: cp.Diffusion(lambda theta, s, x: …, schedule, event_shape=…, "
            'parameterization="score", time="sigma", conditions=("x",)).',
        )
    else:
        version, read = importlib.metadata.version(package), partial(getattr(readings, package), *parts)
    if ".".join(version.split(".")[:2]) != tried[package]:
        raise LoadError(
            f"This is {package} {version}; its estimators were read and compared for {tried[package]}.",
            fix=f"pip install '{package}=={tried[package]}.*', or wrap the network yourself by cp.Diffusion.",
        )
    return Estimator(read(), schedule, label)
