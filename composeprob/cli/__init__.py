"""The command `composeprob`: run a program from a file, look at the zoo, train a model, run a benchmark.

`shell` is what commands join, `run` and `app` have them, `programs` finds a program in a file, `samplers` reads the
options of `run`, `output` writes its files, `benchmarks` finds the benchmarks. On top of the house: may import
everything, nothing imports it.
"""

from composeprob.cli.app import app

__all__ = ["app"]
