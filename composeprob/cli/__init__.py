"""The command `composeprob`, which runs programs, lists the zoo, trains models and runs benchmarks.

`shell` has the application; `new`, `run`, `trust` and `app` its commands; `template` the files of a new
project. `programs` finds a program in a file, `samplers` reads the options of `run`, `output` writes its files,
`benchmarks` finds the benchmarks. It may import everything, and nothing imports it.
"""

from composeprob.cli.app import app

__all__ = ["app"]
