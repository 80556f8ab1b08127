"""The command `composeprob`, which runs programs, lists the zoo, trains models and runs benchmarks.

`shell` has the application, `run` and `app` its commands, `programs` finds a program in a file, `samplers` reads the
options of `run`, `output` writes its files, `benchmarks` finds the benchmarks. It may import everything, and nothing
imports it.
"""

from composeprob.cli.app import app

__all__ = ["app"]
