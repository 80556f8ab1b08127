"""Training: makes a diffusion factor from a sampler of data, by Optax.

`Recipe` states what to train, `train` trains it (resumable, one compilation); what
makes the zoo of this lies in ``models/making.py``. May import everything but `api` and
`cli`; nothing imports it but those and the zoo.
"""

from typing import TYPE_CHECKING, NoReturn

from composeprob.arguments import add_errors_of_calls
from composeprob.errors import unknown_name
from composeprob.training.conditionals import misfit_of_mixture
from composeprob.training.distil import Distilled, Flow, distil
from composeprob.training.estimator import estimator
from composeprob.training.loop import TrainingRun, train
from composeprob.training.masked import MaskedRecipe
from composeprob.training.quality import sample_quality, score_errors
from composeprob.training.recipe import (
    Batches,
    Conditions,
    CrossCondition,
    CrossLevel,
    Denoising,
    LogSNR,
    Recipe,
)
from composeprob.training.weight_files import load_weights, save_weights

__all__ = [
    "Batches",
    "Conditions",
    "CrossCondition",
    "CrossLevel",
    "Denoising",
    "Distilled",
    "Flow",
    "LogSNR",
    "MaskedRecipe",
    "Recipe",
    "TrainingRun",
    "distil",
    "estimator",
    "load_weights",
    "misfit_of_mixture",
    "sample_quality",
    "save_weights",
    "score_errors",
    "train",
]

add_errors_of_calls(globals(), __all__)


def __dir__() -> list[str]:
    """Public names, without this module's imports and submodules."""
    return sorted(__all__)


if not TYPE_CHECKING:  # a type checker would take it for a promise of every name

    def __getattr__(name: str) -> NoReturn:
        raise unknown_name(__name__, name, __all__)
