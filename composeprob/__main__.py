"""``python -m composeprob`` is the command ``composeprob``."""

from composeprob.cli import app

if __name__ == "__main__":
    app()
