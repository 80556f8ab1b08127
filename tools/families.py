"""Families of tests beside the core, and those whose files a change touches.

    python tools/families.py    # their names, for `make test FAMILIES="pretrained …"`

`make test` runs the core: what is in no family, and of each family the cases that would
notice if it were broken. Files are compared with the main branch where this one left
it, or on the main branch with the commit before. Without a history every family counts.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
CORE = "core"
"""Mark of the tests that `make test` runs."""


class Family(NamedTuple):
    """Tests of one feature that most changes do not reach.

    Attributes:
        tests: files and folders of its tests, which are a change of it too.
        sources: files and folders that it tests.
        cases: the tests that belong to the core: one that would notice if the family
            were broken, and those that must find a mutant.
    """

    tests: tuple[str, ...]
    sources: tuple[str, ...]
    cases: tuple[str, ...]


FAMILIES = {
    "pretrained": Family(
        tests=("tests/pretrained",),
        sources=("composeprob/pretrained", "tools/small_models.py"),
        cases=(
            "tests/pretrained/test_bad_folders.py::"
            "test_folders_that_cannot_be_loaded[cut short]",
            "tests/pretrained/test_goldens.py::"
            "test_the_score_at_level_k_is_that_of_timestep_k[ddpm]",
        ),
    ),
    "training": Family(
        tests=(
            "tests/calibration",
            "tests/networks",
            "tests/training",
            "tests/worlds",
            "tests/zoo",
        ),
        sources=(
            "composeprob/calibration",
            "composeprob/model_zoo.py",
            "composeprob/training",
            "models",
        ),
        cases=(
            "tests/calibration/test_calibrate.py::test_quadrature_is_exact[two modes]",
            "tests/training/test_cross.py::"
            "test_symmetric_similar_conditions_keep_the_optimum",
            "tests/training/test_cross.py::"
            "test_the_loss_is_least_at_the_true_normalisers",
            "tests/training/test_cross.py::"
            "test_the_loss_is_least_at_the_true_ratios_of_conditions",
            "tests/training/test_train.py::"
            "test_it_starts_from_the_weights_that_are_given",
            "tests/zoo/test_zoo.py::test_every_model_is_as_good_as_its_card_says[ring2d]",
        ),
    ),
    "estimators": Family(
        tests=(
            "tests/pretrained/test_estimators.py",
            "tests/training/test_distil.py",
            "tests/training/test_estimator.py",
        ),
        sources=(
            "composeprob/pretrained/estimators.py",
            "composeprob/training/distil.py",
            "composeprob/training/estimator.py",
        ),
        cases=(
            "tests/pretrained/test_estimators.py::"
            "test_a_network_of_noise_in_the_place_of_a_score_is_found",
            "tests/training/test_estimator.py::"
            "test_the_posterior_of_a_gaussian_is_exact_in_the_units_of_theta",
        ),
    ),
    "likelihoods": Family(
        tests=("tests/metrics",),
        sources=("composeprob/metrics",),
        cases=(
            "tests/metrics/test_distances.py::test_mmd_is_the_u_statistic",
            "tests/metrics/test_likelihood.py::"
            "test_mean_of_p_hat_is_the_gaussian_that_the_sampler_draws_from",
        ),
    ),
    "processes": Family(
        tests=(
            "tests/sampling/test_devices.py",
            "tests/sampling/test_parts.py",
            "tests/sampling/test_processes.py",
        ),
        sources=(
            "composeprob/runtime/compiled.py",
            "composeprob/runtime/writer.py",
            "composeprob/samplers/spread.py",
            "tests/same_bits.py",
        ),
        cases=(
            "tests/sampling/test_devices.py::"
            "test_eight_devices_give_the_samples_of_two_with_the_fewest_collectives",
        ),
    ),
    "benchmarks": Family(
        tests=(
            "tests/statistical",
            "tests/test_benchmarks_command.py",
            "tests/test_tpu_benchmark.py",
        ),
        sources=("benchmarks",),
        cases=(
            "tests/test_benchmarks_command.py::"
            "test_every_benchmark_is_listed_with_what_it_measures",
        ),
    ),
}
EVERY = (
    ".ci",
    "Makefile",
    "constraints.txt",
    "pyproject.toml",
    "tests/conftest.py",
    "tools/families.py",
)
"""Files whose change touches every family."""


def _within(file: str, places: Iterable[str]) -> int:
    """Length of the longest of the files and folders that a file is in; 0 for none."""
    lengths = [0]
    for place in places:
        if file == place or file.startswith(f"{place}/"):
            lengths.append(len(place))
    return max(lengths)


def family_of(file: str) -> str | None:
    """Return the family of a test file; None for the core."""
    lengths = {name: _within(file, family.tests) for name, family in FAMILIES.items()}
    nearest = max(lengths, key=lambda name: lengths[name])
    return nearest if lengths[nearest] else None


def marks(test: str) -> list[str]:
    """Return the marks of a test, by its id without or with its parameters."""
    name = family_of(test.partition("::")[0])
    if name is None:
        return [CORE]
    if {test, test.partition("[")[0]} & set(FAMILIES[name].cases):
        return [name, CORE]
    return [name]


def touched(files: Iterable[str]) -> list[str]:
    """Return the families whose tests or sources are among these files."""
    names = []
    files = list(files)
    if any(_within(file, EVERY) for file in files):
        return list(FAMILIES)
    for name, family in FAMILIES.items():
        own = [file for file in files if family_of(file) == name]
        if own or any(_within(file, family.sources) for file in files):
            names.append(name)
    return names


def git(root: Path, *arguments: str) -> list[str]:
    """Return the lines that git prints.

    Raises:
        OSError, subprocess.CalledProcessError: there is no git, or no such commit.
    """
    run = subprocess.run(
        ["git", *arguments], cwd=root, capture_output=True, text=True, check=True
    )
    return run.stdout.splitlines()


def base(root: Path) -> str:
    """Return the commit that the checkout is compared with: where its branch left the
    main one, or else the one before."""
    head = git(root, "rev-parse", "HEAD")
    for main in ("origin/main", "main"):
        try:
            left = git(root, "merge-base", "HEAD", main)
        except subprocess.CalledProcessError:
            continue  # there is no such branch here
        if left != head:
            return left[0]
    return "HEAD~1"


def changed(root: Path) -> list[str] | None:
    """Return the files that differ from the `base`, untracked ones too; None without a
    history."""
    try:
        differing = git(root, "diff", "--name-only", "--no-renames", base(root))
        new = git(root, "ls-files", "--others", "--exclude-standard")
    except (OSError, subprocess.CalledProcessError):
        return None
    return differing + new


def main() -> int:
    """Print the families that a change touches."""
    files = changed(ROOT)
    names = list(FAMILIES) if files is None else touched(files)
    print(*names)
    return 0


if __name__ == "__main__":
    sys.exit(main())
