"""composeprob: new distributions from diffusion models, without retraining.

A program states which densities multiply, mix and condition; `compile` turns it into
one time-annealed unnormalised log-density; `infer` moves chains along it.
"""

import warnings
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from composeprob.api import *  # noqa: F403
    from composeprob.api import __all__ as __all__
else:  # a type checker that saw this would believe in every name

    def __getattr__(name: str) -> Any:
        """Loads the public names when the first of them is asked for: ``composeprob
        --help`` starts without JAX."""
        if find_spec(f"{__name__}.{name}") is not None:
            return import_module(f"{__name__}.{name}")
        if name == "__all__" or not name.startswith("__"):
            with warnings.catch_warnings():
                # In a notebook without ipywidgets NumPyro's bars warn when it is
                # imported; composeprob needs none.
                warnings.filterwarnings("ignore", "IProgress not found")
                api = import_module(f"{__name__}.api")
            globals().update(
                {public: getattr(api, public) for public in api.__all__},
                __all__=api.__all__,
            )
            if name in globals():
                return globals()[name]
            if name in api.RENAMED:
                new = api.RENAMED[name]
                warnings.warn(
                    f"cp.{name} is called cp.{new} now; the old name works until "
                    "version 0.3.",
                    DeprecationWarning,
                    stacklevel=2,
                )
                return globals()[new]
        errors = import_module(f"{__name__}.errors")
        raise errors.unknown_name(__name__, name, globals().get("__all__", ()))

    def __dir__() -> list[str]:
        return sorted({*globals(), *__getattr__("__all__")})
