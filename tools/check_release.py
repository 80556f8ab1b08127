"""Checks a release: builds it, and installs and runs it in an empty environment of
every Python that is found here.

    make release-check                                        # or: python tools/check_release.py
    python tools/check_release.py --python PATH --only 3.14 --only lowest

For each Python of `PYTHONS` it installs the wheel and runs `inside` (README's program,
the command line, a project of `composeprob new`, what an absent model says), then the
zoo's wheel and one of its models, and lists what was pulled in (tools/dependencies.py).
The oldest Python found is done once more with the lowest versions that pyproject.toml
allows. The wheel that the sdist gives must hold the same files. A Python that is not
here is named, and fails nothing.
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
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
LARGEST = 25_000_000
"""Bytes of composeprob's own wheel."""
EXTRAS = "zoo,digits,text,hub"
"""Extras that any machine can install; those for accelerators are resolved only."""
ACCELERATORS = ("cuda12", "cuda13", "tpu")


def command(*parts: str | Path, cwd: Path | None = None) -> str:
    """Runs a command; returns what it printed.

    Raises:
        RuntimeError: it failed, with the end of what it said.
    """
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "VIRTUAL_ENV")
    }
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
    """Builds everything; returns composeprob's wheel and the zoo's.

    Raises:
        RuntimeError: the wheel is too large, or that of the sdist holds other files.
    """
    build = (sys.executable, "-m", "build", "--no-isolation")
    command(*build, "--outdir", folder, ROOT)  # the sdist, and the wheel from it
    command(*build, "--wheel", "--outdir", folder, ROOT / "models")
    direct = folder / "direct"
    command(*build, "--wheel", "--outdir", direct, ROOT)
    wheel, zoo = (
        next(folder.glob("composeprob-*.whl")),
        next(folder.glob("composeprob_zoo-*.whl")),
    )
    files, own = (
        set(zipfile.ZipFile(each).namelist())
        for each in (wheel, next(direct.glob("*.whl")))
    )
    if files != own:
        raise RuntimeError(
            f"sdist and checkout give other wheels: {sorted(files ^ own)[:5]}"
        )
    if wheel.stat().st_size > LARGEST:
        raise RuntimeError(
            f"{wheel.name} has {wheel.stat().st_size:,} bytes, more than {LARGEST:,}"
        )
    for each in (wheel, zoo, next(folder.glob("*.tar.gz"))):
        print(f"built {each.name}: {each.stat().st_size / 1e6:.1f} MB")
    return wheel, zoo


def found(version: str, named: list[Path]) -> Path | None:
    """Finds a Python of this version: among those named, on the path, or where uv and
    pyenv keep theirs."""
    pyenv = sorted(
        Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob(
            f"versions/{version}.*/bin/python"
        )
    )
    candidates = [
        *named,
        *filter(None, [shutil.which(f"python{version}")]),
        *reversed(pyenv),
    ]
    with contextlib.suppress(RuntimeError):
        candidates.append(
            command("uv", "python", "find", "--no-python-downloads", version).strip()
        )
    for candidate in candidates:
        try:
            says = command(
                candidate, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"
            )
        except (RuntimeError, OSError):
            continue  # a shim, or another machine's
        if says.strip() == version:
            return Path(candidate)
    return None


def inside(python: Path, folder: Path) -> None:
    """What a user does first, in an environment with nothing but the wheel, away from
    the checkout."""
    program = re.findall(
        r"```python\n(.*?)```",
        (ROOT / "README.md").read_text(encoding="utf-8"),
        re.DOTALL,
    )[0]
    file = folder / "readme.py"
    file.write_text(
        program + "\nresult.plot().savefig('readme.png')\nresult.to_arviz()\n",
        encoding="utf-8",
    )
    command(python, "-I", file, cwd=folder)
    composeprob = python.with_name("composeprob")
    command(composeprob, "--version")
    command(composeprob, "zoo", cwd=folder)
    command(composeprob, "new", "project", cwd=folder)
    command(composeprob, "run", "program.py", "--chains", "100", cwd=folder / "project")
    absent = (
        "import composeprob as cp\n"
        "try: cp.load('box2d')\n"
        "except cp.errors.LoadError as error: assert 'composeprob[zoo]' in str(error), error\n"
        "else: raise SystemExit('box2d is in the wheel')"
    )
    command(python, "-I", "-c", absent)


def check(python: Path, wheel: Path, zoo: Path, folder: Path, lowest: bool) -> None:
    """Installs and runs the release with one Python.

    Raises:
        RuntimeError: something failed.
    """
    command("uv", "venv", "--quiet", "--python", python, folder)
    own = folder / "bin" / "python"
    install = ["uv", "pip", "install", "--quiet", "--python", own]
    resolution = (
        ["--resolution", "lowest-direct", "--only-binary", ":all:"] if lowest else []
    )
    if lowest:  # the lowest of what the wheel asks for, which is what it names itself
        names = command(
            "uv",
            "pip",
            "compile",
            "--quiet",
            "--no-header",
            *resolution,
            "--python",
            own,
            ROOT / "pyproject.toml",
        )
        pins = folder / "lowest.txt"
        pins.write_text(names, encoding="utf-8")
        install += ["--constraint", pins]
    command(*install, wheel)
    command("uv", "pip", "check", "--python", own)
    work = folder / "work"
    work.mkdir()
    inside(own, work)
    print(command(own, ROOT / "tools" / "dependencies.py"))
    if lowest:
        return
    command(*install, zoo)
    command(
        own,
        "-I",
        "-c",
        "import composeprob as cp; print(cp.load('box2d'), cp.zoo('box2d'))",
    )
    command(
        *install,
        "--find-links",
        zoo.parent,
        f"composeprob[{EXTRAS}] @ {wheel.as_uri()}",
    )
    command(own, ROOT / "tools" / "dependencies.py", f"composeprob[{EXTRAS}]")
    for extra in ACCELERATORS:
        command(*install, "--dry-run", f"composeprob[{extra}] @ {wheel.as_uri()}")


def main() -> int:
    """Runs all; returns the exit status."""
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
        help="3.11 … 3.14 or lowest; once for each",
    )
    options = parser.parse_args()
    known = {version: found(version, options.python) for version in PYTHONS}
    here = {version: python for version, python in known.items() if python is not None}
    failed = []
    with tempfile.TemporaryDirectory(prefix="composeprob-release-") as folder:
        wheel, zoo = built(Path(folder) / "dist")
        cases = {**here, **({"lowest": next(iter(here.values()))} if here else {})}
        for case, python in cases.items():
            if options.only and case not in options.only:
                continue
            began = time.monotonic()
            try:
                check(python, wheel, zoo, Path(folder) / case, case == "lowest")
                print(
                    f"ok      {case} ({python}), {time.monotonic() - began:.0f} s",
                    flush=True,
                )
            except RuntimeError as error:
                failed.append(case)
                print(f"FAILED  {case} ({python}): {error}", flush=True)
    for version in PYTHONS:
        if version not in here:
            print(
                f"absent  {version}: no Python of this version is here; name one by --python PATH"
            )
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
