"""Find the log-normaliser of a model at every noise level.

With it weights of mixtures with the model are shares.

    python tools/calibrate.py ring2d --replace
    python tools/calibrate.py ring2d-sharp --retraining 1 --out out/ring2d-sharp
    python tools/calibrate.py digits --given label=3 --chains 200

Writes calibration.safetensors beside the model's weights; cp.load applies it. Training
calibrates too.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from composeprob.errors import ComposeProbError
from composeprob.models.making import calibrate_model


def condition(text: str) -> tuple[str, object]:
    """Return ``"label=3"`` as a name and a number or list."""
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text} is not a condition and its value; write --given label=3."
        ) from None


def main(arguments: list[str] | None = None) -> int:
    """Read the command line, calibrate, and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a trained model of the zoo that has an energy")
    parser.add_argument(
        "--retraining", type=int, default=0, help="number of its training"
    )
    parser.add_argument(
        "--given", type=condition, action="append", default=[], metavar="NAME=NUMBER"
    )
    parser.add_argument(
        "--chains",
        type=int,
        default=1000,
        help="chains of each repeat; fewer for large models",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="the folder of its weights, and to write into; by default in the zoo",
    )
    parser.add_argument(
        "--replace", action="store_true", help="replace an existing calibration"
    )
    given = parser.parse_args(arguments)
    try:
        calibrated = calibrate_model(
            given.model,
            retraining=given.retraining,
            conditions=dict(given.given),
            num_chains=given.chains,
            out=given.out,
            replace=given.replace,
        )
        print(calibrated)
    except ComposeProbError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
