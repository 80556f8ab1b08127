"""Former names, which work for one release and warn at the line that uses them."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

PUBLIC = {"Meet": "Resampler"}
"""Former public names, with those that they have now."""

MODULES = {
    "composeprob.factors.base": "composeprob.factors.factor",
    "composeprob.kernels.base": "composeprob.kernels.kernel",
    "composeprob.language.program": "composeprob.language.decorator",
    "composeprob.samplers.closing": "composeprob.samplers.finishers",
    "composeprob.samplers.meet": "composeprob.samplers.resampling",
    "composeprob.training.run": "composeprob.training.loop",
    "composeprob.training.weights": "composeprob.training.weight_files",
}
"""Former names of modules, with those that they have now."""

_BETWEEN = {"composeprob", "equinox", "abc", "importlib"}
"""Packages whose frames stand between a user's line and the warning."""


def warn_renamed(old: str, new: str) -> None:
    """Warn, at the user's line, that a name has changed."""
    warnings.warn(
        f"{old} is now called {new}; the former name goes with the next release.",
        DeprecationWarning,
        stacklevel=_users_level(),
    )


def _users_level() -> int:
    """Return the stack level, seen from the caller, of the first frame of a user's."""
    level = 1
    frame = sys._getframe(1)
    while frame.f_back is not None:
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if package not in _BETWEEN:
            break
        frame = frame.f_back
        # `warnings` counts no frames of the import system.
        if "importlib._bootstrap" not in frame.f_code.co_filename:
            level += 1
    return level


def former_names(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """Return the ``__getattr__`` of a module that knows former names.

    Args:
        module: its ``__name__``.
        names: former names, with those that stand in the module now.
    """

    def __getattr__(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warn_renamed(f"{module}.{name}", f"{module}.{names[name]}")
        return getattr(sys.modules[module], names[name])

    return __getattr__


class FormerModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Importer of modules by their former names."""

    def find_spec(
        self, fullname: str, path: object = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in MODULES:
            return None
        return importlib.machinery.ModuleSpec(fullname, self)

    def exec_module(self, module: ModuleType) -> None:
        new = MODULES[module.__name__]
        warn_renamed(module.__name__, new)
        # A module of its own that forwards every name: under two names in
        # `sys.modules` the module itself would take the former one's `__spec__`.
        current = importlib.import_module(new)
        vars(module)["__getattr__"] = current.__getattribute__


def install() -> None:
    """Let Python import modules by their former names."""
    if not any(isinstance(finder, FormerModules) for finder in sys.meta_path):
        sys.meta_path.append(FormerModules())
