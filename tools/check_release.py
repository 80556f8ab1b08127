"""Check a release: build it, and run it in an empty environment of every Python.

    make release-check                               # or: python tools/check_release.py
    python tools/check_release.py --python PATH --only 3.14 --only lowest

For each Python of `PYTHONS` on this machine it installs the wheel, samples a program
without any extra, installs the extra `all`, and runs the first steps of a user:
README's program, the command line, a project of `composeprob new`, the
error of an absent model. Then it installs the zoo's wheel, loads one of its models, and
lists the dependencies (tools/dependencies.py). The oldest Python is checked once more
with the lowest versions that pyproject.toml allows. The wheel made from the sdist must
hold the same files. A Python that is not installed is named, and fails nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.12", "3.13", "3.14")
LARGEST = 25_000_000
"""Greatest size of composeprob's own wheel, in bytes."""
EXTRAS = "all,zoo"
"""Extras that any machine can install; those for accelerators are resolved only."""
CORE = """
import jax, numpyro.distributions as dist
import composeprob as cp
normal = cp.Analytic(dist.Normal(0.0, 1.0), cp.Schedule.log_snr(20))
program = cp.program(lambda normal: cp.sample("x", normal * normal))
density = cp.compile(program, normal)
print(cp.infer(density, jax.random.key(0), num_chains=100).summary())
try: cp.load("ring2d")
except cp.errors.MissingPackageError as error: print(error)
else: raise SystemExit("flax is a dependency of the core")
"""
"""A program for an environment without extras."""
ACCELERATORS = ("cuda12", "cuda13", "tpu")


def command(*parts: str | Path, cwd: Path | None = None) -> str:
    """Run a command, and return its output.

    Raises:
        RuntimeError: it failed, with the end of its output.
    """
    # With these the command would find this checkout, or this environment.
    environment = dict(os.environ)
    for name in ("PYTHONPATH", "VIRTUAL_ENV"):
        environment.pop(name, None)
    run = subprocess.run(
        [str(part) for part in parts],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode:
        end = "\n".join((run.stdout + run.stderr).strip().splitlines()[-15:])
        raise RuntimeError(f"{' '.join(map(str, parts[:6]))} …\n{end}")
    return run.stdout


def built(folder: Path) -> tuple[Path, Path]:
    """Build everything, and return composeprob's wheel and the zoo's.

    Raises:
        RuntimeError: the wheel is too large, or that of the sdist holds other files.
    """
    build = (sys.executable, "-m", "build", "--no-isolation")
    command(*build, "--outdir", folder, ROOT)  # the sdist, and the wheel from it
    command(*build, "--wheel", "--outdir", folder, ROOT / "models")
    direct = folder / "direct"
    command(*build, "--wheel", "--outdir", direct, ROOT)
    wheel = next(folder.glob("composeprob-*.whl"))
    zoo = next(folder.glob("composeprob_zoo-*.whl"))
    files = set(zipfile.ZipFile(wheel).namelist())
    direct_files = set(zipfile.ZipFile(next(direct.glob("*.whl"))).namelist())
    if files != direct_files:
        differing = sorted(files ^ direct_files)[:5]
        raise RuntimeError(f"sdist and checkout give other wheels: {differing}")
    if wheel.stat().st_size > LARGEST:
        raise RuntimeError(
            f"{wheel.name} has {wheel.stat().st_size:,} bytes, more than {LARGEST:,}"
        )
    for each in (wheel, zoo, next(folder.glob("*.tar.gz"))):
        print(f"built {each.name}: {each.stat().st_size / 1e6:.1f} MB")
    return wheel, zoo


def find_python(version: str, named: list[Path]) -> Path | None:
    """Return a Python of this version, or None.

    It is one of those named, on the path, or installed by pyenv or uv.
    """
    candidates: list[str | Path] = list(named)
    on_path = shutil.which(f"python{version}")
    if on_path is not None:
        candidates.append(on_path)
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    installed = sorted(pyenv.glob(f"versions/{version}.*/bin/python"))
    candidates += reversed(installed)
    with contextlib.suppress(RuntimeError):
        by_uv = command("uv", "python", "find", "--no-python-downloads", version)
        candidates.append(by_uv.strip())
    show_version = "import sys; print('%d.%d' % sys.version_info[:2])"
    for candidate in candidates:
        try:
            shown = command(candidate, "-c", show_version)
        except (RuntimeError, OSError):
            continue  # a shim, or another machine's
        if shown.strip() == version:
            return Path(candidate)
    return None


def first_steps(python: Path, folder: Path) -> None:
    """Do the first steps of a user, away from the checkout.

    The environment has nothing but the wheel and its extras.
    """
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    program = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)[0]
    program += "\nresult.plot().savefig('readme.png')\nresult.to_arviz()\n"
    file = folder / "readme.py"
    file.write_text(program, encoding="utf-8")
    command(python, "-I", file, cwd=folder)
    composeprob = python.with_name("composeprob")
    command(composeprob, "--version")
    command(composeprob, "zoo", cwd=folder)
    command(composeprob, "new", "project", cwd=folder)
    command(composeprob, "run", "program.py", "--chains", "100", cwd=folder / "project")
    absent = (
        "import composeprob as cp\n"
        "try: cp.load('box2d')\n"
        "except cp.errors.LoadError as error:\n"
        "    assert 'composeprob[zoo]' in str(error), error\n"
        "else: raise SystemExit('box2d is in the wheel')"
    )
    command(python, "-I", "-c", absent)


def lowest_versions(python: Path, folder: Path) -> Path:
    """Write the lowest versions of the direct dependencies, those of extras too;
    return the file."""
    resolution = ("--resolution", "lowest-direct", "--only-binary", ":all:")
    names = command(
        "uv",
        "pip",
        "compile",
        "--quiet",
        "--no-header",
        *resolution,
        "--extra",
        "all",
        "--python",
        python,
        ROOT / "pyproject.toml",
    )
    pins = folder / "lowest.txt"
    pins.write_text(names, encoding="utf-8")
    return pins


def check(python: Path, wheel: Path, zoo: Path, folder: Path, lowest: bool) -> None:
    """Install and run the release with one Python.

    Raises:
        RuntimeError: something failed.
    """
    command("uv", "venv", "--quiet", "--python", python, folder)
    own = folder / "bin" / "python"
    install = ["uv", "pip", "install", "--quiet", "--python", own]
    if lowest:
        install += ["--constraint", lowest_versions(own, folder)]
    command(*install, wheel)
    command("uv", "pip", "check", "--python", own)
    work = folder / "work"
    work.mkdir()
    command(own, "-I", "-c", CORE, cwd=work)
    command(*install, f"composeprob[all] @ {wheel.as_uri()}")
    first_steps(own, work)
    print(command(own, ROOT / "tools" / "dependencies.py", "composeprob[all]"))
    if lowest:
        return
    command(*install, zoo)
    load = "import composeprob as cp; print(cp.load('box2d'), cp.zoo('box2d'))"
    command(own, "-I", "-c", load)
    with_extras = f"composeprob[{EXTRAS}] @ {wheel.as_uri()}"
    command(*install, "--find-links", zoo.parent, with_extras)
    command(own, ROOT / "tools" / "dependencies.py", f"composeprob[{EXTRAS}]")
    for extra in ACCELERATORS:
        command(*install, "--dry-run", f"composeprob[{extra}] @ {wheel.as_uri()}")


def main() -> int:
    """Check every Python, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--python",
        type=Path,
        action="append",
        default=[],
        help="a Python to use, once for each",
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        help="3.12 … 3.14 or lowest; once for each",
    )
    options = parser.parse_args()
    here = {}
    for version in PYTHONS:
        python = find_python(version, options.python)
        if python is not None:
            here[version] = python
    failed = []
    with tempfile.TemporaryDirectory(prefix="composeprob-release-") as folder:
        wheel, zoo = built(Path(folder) / "dist")
        cases = dict(here)
        if here:
            cases["lowest"] = next(iter(here.values()))
        for case, python in cases.items():
            if options.only and case not in options.only:
                continue
            began = time.monotonic()
            try:
                check(python, wheel, zoo, Path(folder) / case, case == "lowest")
                seconds = time.monotonic() - began
                print(f"ok      {case} ({python}), {seconds:.0f} s", flush=True)
            except RuntimeError as error:
                failed.append(case)
                print(f"FAILED  {case} ({python}): {error}", flush=True)
    for version in PYTHONS:
        if version not in here:
            print(
                f"absent  {version}: no Python of this version is here; name one by "
                "--python PATH"
            )
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
