"""Every public name is documented, and every example in the documentation runs."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import composeprob as cp

ROOT = Path(__file__).parents[1]
REFERENCE = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs/reference").glob("*.md"))
DOCUMENTED = set(
    re.findall(r"\.\. auto(?:class|function|data|exception|module):: (?:composeprob\.)?(\w+)\s", REFERENCE)
)
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(cp.__path__, "composeprob.")
    if not module.name.startswith("composeprob._")
)


@pytest.mark.parametrize("name", sorted(cp.__all__))
def test_public_name_is_documented(name):
    public = getattr(cp, name)
    own = vars(public).get("__doc__") if inspect.isclass(public) else public.__doc__  # a base's text is not its own
    assert (own or "").strip(), f"cp.{name} has no docstring"
    if not inspect.ismodule(public):
        assert len(inspect.cleandoc(own).split("\n\n")) > 1, (
            f"cp.{name}'s docstring is one paragraph: say how it is used"
        )
    assert name in DOCUMENTED, f"cp.{name} is on no page of docs/reference/"


def test_reference_lists_only_what_exists():
    missing = {name for name in DOCUMENTED if not hasattr(cp, name)}
    assert not missing


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    outcome = doctest.testmod(importlib.import_module(name), optionflags=options)
    assert outcome.failed == 0, (
        f"{outcome.failed} of {outcome.attempted} examples in {name} fail (see the output above)"
    )


def test_readme_program_runs(tmp_path, monkeypatch):
    """The program on README's first screen does what a newcomer who pastes it expects."""
    monkeypatch.chdir(tmp_path)
    programs = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert programs, "README.md shows no program"
    for program in programs:
        # cp.program reads the source for file:line, so the program must live in a file.
        file = tmp_path / "readme_program.py"
        file.write_text(program, encoding="utf-8")
        exec(compile(program, str(file), "exec"), {"__name__": "__main__"})
