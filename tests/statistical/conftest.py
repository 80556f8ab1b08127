"""Puts the benchmarks on the path: their modules are under test here."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
