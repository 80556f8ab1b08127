"""The command `composeprob`: run a program from a file, look at the zoo, train a model.

`app` has the commands, `programs` finds a program in a file, `samplers` reads the options of `run`. On top of the
house: may import everything, nothing imports it.
"""

from composeprob.cli.app import app

__all__ = ["app"]
