"""The exceptions that composeprob raises on purpose.

Each states what was found, where in the user's program, and how to fix it. The place is
the ``where`` that a site or statement recorded when the program ran; without one, the
line of the innermost frame outside of libraries (`caller`). All derive from
`ComposeProbError`; each also derives from `ValueError`, `TypeError` or `ImportError`,
so that generic handlers keep working.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import FrameType

from composeprob.text import printable


class ComposeProbError(Exception):
    """Base of every deliberate exception of this library.

    Args:
        found: the mistake, with the value that was found.
        where: the place in the user's program, such as ``"scene.py:14"``; left out, the
            user's line that is being executed.
        fix: what to write instead.
    """

    def __init__(self, found: str, *, where: str | None = None, fix: str | None = None):
        self.found = found
        self.where = where or caller()
        self.fix = fix
        text = found
        if self.where:
            text += f" ({self.where})"
        if fix:
            text += f"\n  Fix: {fix}"
        super().__init__(printable(text))


class InvalidValueError(ComposeProbError, ValueError):
    """An argument has a value that cannot be used (a negative count, NaN weights, an
    unknown option)."""


class WrongTypeError(ComposeProbError, TypeError):
    """An argument has the wrong type."""


class ShapeError(ComposeProbError, ValueError):
    """Shapes that must agree do not."""


class LevelError(ComposeProbError, ValueError):
    """A noise level lies outside the schedule."""


class ProgramError(ComposeProbError, ValueError):
    """A program's statements contradict each other (two sites with one name, a
    statement outside a program)."""


class ConditionError(ComposeProbError, ValueError):
    """A condition is unknown, missing, or given twice."""


class NetworkError(ComposeProbError, ValueError):
    """A network cannot be called as its factor declares, or returns something of the
    wrong shape."""


class AlignmentError(ComposeProbError, ValueError):
    """A factor cannot be evaluated at the levels of the schedule in use."""


class CapabilityError(ComposeProbError, ValueError):
    """A kernel, sampler or node needs something that a factor does not offer."""


class ImproperError(ComposeProbError, ValueError):
    """The density of the noisiest level cannot be normalised."""


class DoublyIntractableError(ComposeProbError, ValueError):
    """A factor's unknown normaliser depends on a latent of the same program."""


class UnknownSiteError(InvalidValueError, KeyError):
    """A site that a result does not have."""

    __str__ = Exception.__str__  # a KeyError would show its text in quotes


class UnknownNameError(WrongTypeError, AttributeError):
    """A name that the library, or an object of it, does not have."""


class LoadError(ComposeProbError, ValueError):
    """A model or a saved result cannot be found or read."""


class MissingPackageError(ComposeProbError, ImportError):
    """A package that one feature needs is not installed."""


class VerificationError(ComposeProbError, ValueError):
    """The intermediate representation broke one of its own rules: a defect of
    composeprob, not of the program."""


__all__ = sorted(
    name
    for name, value in globals().items()
    if isinstance(value, type) and issubclass(value, ComposeProbError)
)

_DISTRIBUTIONS = (
    "Normal",
    "MultivariateNormal",
    "Uniform",
    "Gamma",
    "Beta",
    "HalfNormal",
    "Poisson",
)
_EVALUATE = (
    "a factor is evaluated in a compiled program: "
    "density = cp.compile(cp.program(lambda f: cp.sample('x', f)), f); "
    "then density.log_density({'x': point}, 0) or density.score({'x': point}, 0), or "
    "draw samples by cp.infer(density, key, num_chains=1000)."
)
_MINIBATCH = (
    "in a program all data count at every step: a minibatch would leave noise in "
    "importance weights and accept tests; block= of cp.product and cp.factor bounds "
    "memory. In training it is cp.training.Batches(size=…)."
)

MEANT: dict[str, dict[str, str]] = {
    "composeprob": {
        "dist": "import numpyro.distributions as dist.",
        "NUTS": "write cp.HMC(…), or cp.BlackJAX(blackjax.nuts); "
        "density.to_numpyro() is for NumPyro's NUTS.",
        "MCMC": "write cp.AnnealedMCMC(cp.MALA()), a sampler of "
        "cp.infer(density, key, num_chains=…, sampler=…).",
        "run": "write cp.infer(density, jax.random.key(0), num_chains=1000).",
        "deterministic": "write numpyro.deterministic(name, value).",
        "plate": "write numpyro.plate(name, size).",
        **{
            name: "distributions are NumPyro's: import numpyro.distributions as dist, "
            f"and write dist.{name}(…)."
            for name in _DISTRIBUTIONS
        },
    },
    "Factor": dict.fromkeys(
        ("log_prob", "log_density", "logpdf", "score", "sample", "draw", "infer"),
        _EVALUATE,
    ),
    "AnnealedDensity": {
        **dict.fromkeys(
            ("log_prob", "logpdf", "energy", "potential"),
            "write density.log_density({'x': point}, 0) for one chain's values at "
            "level 0, the cleanest.",
        ),
        **dict.fromkeys(
            ("sample", "samples", "infer", "run", "draw"),
            "write result = cp.infer(density, jax.random.key(0), num_chains=1000), "
            "whose samples are result['x'].",
        ),
        **dict.fromkeys(("grad", "gradient"), "write density.score({'x': point}, 0)."),
    },
    "Result": {
        **dict.fromkeys(
            ("posterior", "get_samples", "chains"),
            "samples are result['x'], and result.samples; result.to_arviz() has groups "
            "of ArviZ's.",
        ),
        **dict.fromkeys(
            ("arviz", "idata", "inference_data", "to_inference_data"),
            "write result.to_arviz().",
        ),
        **dict.fromkeys(
            ("to_dataset", "to_datatree", "to_netcdf", "to_xarray"),
            "write result.to_arviz(), whose groups are data sets of xarray.",
        ),
        **dict.fromkeys(
            ("to_dataframe", "to_df", "dataframe", "to_csv", "pandas"),
            "write result.to_pandas(), for pandas; its to_csv writes a file.",
        ),
        **dict.fromkeys(("log_z", "logZ", "evidence"), "write result.log_evidence."),
        **dict.fromkeys(
            ("diagnostics", "print_summary"),
            "write print(result.summary()), and result.status.",
        ),
        **dict.fromkeys(
            ("std", "var", "median"),
            "result.summary() shows them; result.quantile(fn, 0.5) has errors.",
        ),
    },
    "composeprob.training": dict.fromkeys(
        ("fit", "Trainer"),
        "write cp.training.train(recipe, key), with a cp.training.Recipe.",
    ),
    "composeprob.metrics": {},
    "arguments": {
        "obs": "data are the value of cp.observe(name, distribution, value); "
        "cp.sample takes none.",
        "num_samples": "num_chains= is the number of chains, "
        "draws= the number of draws that each keeps.",
        "device": "chains go to every device of jax.devices(), or to those of mesh=.",
        "seed": "randomness comes from a key: jax.random.key(0).",
        **dict.fromkeys(("minibatch", "batch_size", "subsample_size"), _MINIBATCH),
        "anneal": "an annealing policy belongs to cp.observe and cp.factor.",
    },
}
"""Fixes for names that other libraries use and this one lacks, by the module or class
that lacks them; ``"arguments"`` has those of any public call."""


def unknown_name(
    kind: str,
    name: str,
    names: Iterable[str],
    further: Mapping[str, str] | None = None,
) -> AttributeError:
    """Return the error for a name that a module, or an object of a class, lacks.

    Args:
        kind: the module or class, a key of `MEANT`, which has the fix of some names.
        name: the name that it lacks. Names with a leading underscore get Python's own
            error: Python and JAX look them up on their own.
        names: the names that it has.
        further: fixes of further names.
    """
    if name.startswith("_"):
        return AttributeError(f"{kind} has no {name!r}.")
    public = sorted(n for n in names if not n.startswith("_"))
    close = difflib.get_close_matches(name, public, 1)
    # The name of another library goes before a similar name of this one.
    fix = {**MEANT[kind], **(further or {})}.get(name)
    if not fix and close:
        fix = f"did you mean {close[0]!r}?"
    elif not fix:
        fix = f"it has: {', '.join(public)}."
    return UnknownNameError(f"{kind} has no {name!r}.", fix=fix)


def a_kind(value: object) -> str:
    """Name of a value's type for a message; ``an array``, whatever library made it."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return "an array"
    return type(value).__name__


_LIBRARIES = {
    "contextlib",
    "dataclasses",
    "equinox",
    "flax",
    "jax",
    "jaxlib",
    "jaxtyping",
    "numpy",
    "numpyro",
    "scipy",
}


def is_library(module: str) -> bool:
    """Return whether a module belongs to a library that programs are written with,
    other than this one."""
    return module.split(".")[0] in _LIBRARIES


def place(file: str, line: int) -> str:
    """Return ``"file.py:line"``, or ``"In[3], line 2"`` for a notebook's cell."""
    cell = _cell_of(file)
    if cell is None:
        return f"{Path(file).name}:{line}"
    return f"{cell}, line {line}"


def _cell_of(file: str) -> str | None:
    """Return the label of a notebook's cell, whose file is named by a number."""
    # IPython may be half imported: then it lacks some of its attributes.
    ipython = sys.modules.get("IPython")
    if ipython is None or not hasattr(ipython, "get_ipython"):
        return None
    compiler = getattr(ipython.get_ipython(), "compile", None)
    if compiler is None or not hasattr(compiler, "format_code_name"):
        return None
    kind_and_label = compiler.format_code_name(file)
    return kind_and_label[1] if kind_and_label else None


def caller(inside: FrameType | None = None) -> str | None:
    """Return the `place` of the innermost frame outside of libraries.

    The search goes outwards from ``inside``, or from the caller. None where there is
    only the command line.
    """
    frame = sys._getframe(1) if inside is None else inside
    while frame is not None:
        module = frame.f_globals.get("__name__") or ""
        if module.startswith("composeprob.cli"):
            return None
        if module.split(".")[0] != "composeprob" and not is_library(module):
            return place(frame.f_code.co_filename, frame.f_lineno)
        frame = frame.f_back  # type: ignore[assignment]
    return None
