"""``python -m composeprob`` is the command ``composeprob``."""

from composeprob.cli import app

app()
