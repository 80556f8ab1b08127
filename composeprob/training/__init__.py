"""Training: a diffusion factor from a sampler of data, over Optax.

`Recipe` says what to train, `train` trains it (resumable, one compilation), `train_model` does so for a model of the
zoo and writes its weights. May import `factors`, `schedule` and `errors`; nothing imports it but the zoo and the
command line.
"""

from composeprob.training.recipe import Recipe
from composeprob.training.run import TrainingRun, train

__all__ = ["Recipe", "TrainingRun", "train"]
