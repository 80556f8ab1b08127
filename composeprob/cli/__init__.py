"""The command `composeprob`, which runs programs, lists the zoo and trains models.

`app` has the application and its commands, `template` the files of a new project.
`programs` finds a program in a file and the file's settings of its run. It may import
everything, and nothing imports it.
"""

from composeprob.cli.app import app

__all__ = ["app"]
