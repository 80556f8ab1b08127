"""The command `composeprob`, which runs programs, lists the zoo and trains models.

`app` has the application and its commands, `template` the files of a new project.
`programs` finds a program in a file and the file's settings of its run. It may import
everything, and nothing imports it.
"""

import sys
from collections.abc import Callable
from typing import NoReturn

from composeprob.errors import MissingPackageError
from composeprob.extras import needed

__all__ = ["app"]


def _refusing(error: MissingPackageError) -> Callable[[], NoReturn]:
    """Return a command that prints an error and exits with 2."""

    def app() -> NoReturn:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)

    return app


app: Callable[[], object]
try:
    with needed("cli", "The command composeprob"):
        from composeprob.cli.app import app
except MissingPackageError as error:
    app = _refusing(error)
