"""composeprob: new distributions from diffusion models, without retraining.

A program states which densities multiply, mix and condition; `compile` turns it into
one time-annealed unnormalised log-density; `infer` moves chains along it.
"""

import warnings
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, cast

from composeprob import rendering

__version__ = "0.1.0"

# The core draws nothing itself; Matplotlib is loaded with the first picture.
rendering.set_renderer(lambda: cast(Any, import_module(f"{__name__}.plotting")))

if TYPE_CHECKING:
    from composeprob.api import *  # noqa: F403
    from composeprob.api import __all__ as __all__
    from composeprob.core import *  # noqa: F403
else:  # a type checker would take `__getattr__` for a promise of every name

    def __getattr__(name: str) -> Any:
        """Load the public names at the first access to one of them: ``composeprob
        --help`` starts without JAX."""
        if find_spec(f"{__name__}.{name}") is not None:
            return import_module(f"{__name__}.{name}")
        if name == "__all__" or not name.startswith("__"):
            with warnings.catch_warnings():
                # NumPyro warns at its import in a notebook without ipywidgets, which
                # its progress bars need; composeprob shows none of them.
                warnings.filterwarnings("ignore", "IProgress not found")
                api = import_module(f"{__name__}.api")
            public = {each: getattr(api, each) for each in api.__all__}
            globals().update(public, __all__=api.__all__)
            if name in globals():
                return globals()[name]
        errors = import_module(f"{__name__}.errors")
        raise errors.unknown_name(__name__, name, globals().get("__all__", ()))

    def __dir__() -> list[str]:
        """Public names and dunders; neither this module's imports nor submodules."""
        dunders = [each for each in globals() if each.startswith("__")]
        return sorted({*dunders, *__getattr__("__all__")})
