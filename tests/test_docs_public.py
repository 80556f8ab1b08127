"""Every public name is documented, and every example in the documentation runs."""

from __future__ import annotations

import doctest
import functools
import importlib
import inspect
import pkgutil
import re
import runpy
from pathlib import Path

import pytest

import composeprob as cp

ROOT = Path(__file__).parents[1]
PAGES = [page.read_text(encoding="utf-8") for page in (ROOT / "docs/reference").glob("*.md")]
DIRECTIVE = re.compile(r"\.\. auto(?:class|function|module|data)::[ ]+([\w.]+)")
IMPORT = re.compile(r"^[ >]*from (composeprob[\w.]*) import (.+)$", re.MULTILINE)
CURRENT = re.compile(r"\.\. currentmodule::[ ]+([\w.]+)")


def documented(page: str) -> set[str]:
    """Full names of what a page of the reference describes."""
    current = CURRENT.search(page)
    names = DIRECTIVE.findall(page)
    return {name if name.startswith("composeprob") else f"{current[1]}.{name}" for name in names} if names else set()


DOCUMENTED = set().union(*map(documented, PAGES))
SUBMODULES = ("metrics", "training", "errors")
PUBLIC = [f"composeprob.{name}" for name in cp.__all__ if name not in SUBMODULES]
PUBLIC += [f"composeprob.{module}.{name}" for module in SUBMODULES for name in getattr(cp, module).__all__]
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(cp.__path__, "composeprob.")
    if not module.name.startswith("composeprob.models.")
)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_is_documented(name):
    public = functools.reduce(getattr, name.split(".")[1:], cp)
    own = vars(public).get("__doc__") if inspect.isclass(public) else public.__doc__  # a base's text is not its own
    assert (own or "").strip(), f"{name} has no docstring"
    if name.count(".") == 1:
        assert len(inspect.cleandoc(own).split("\n\n")) > 1, f"{name}'s docstring is one paragraph: say how to use it"
    module = name.rpartition(".")[0]
    assert name in DOCUMENTED or module in DOCUMENTED - {"composeprob"}, f"{name} is on no page of docs/reference/"


def test_reference_lists_only_what_exists():
    for name in DOCUMENTED:
        pkgutil.resolve_name(name)


def test_imports_of_the_pages_exist():
    """Executed pages would find it too, a quarter of an hour later."""
    written = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")]
    lines = {line for page in written for line in IMPORT.findall(page.read_text(encoding="utf-8"))}
    assert lines, "no page imports anything from composeprob"
    for module, names in lines:
        for name in re.findall(r"(\w+)(?: as \w+)?(?:,|$)", names.partition("#")[0].strip("() ")):
            pkgutil.resolve_name(f"{module}.{name}")


@pytest.mark.parametrize("name", PUBLIC)
def test_an_example_shows_what_comes_out(name):
    public = functools.reduce(getattr, name.split(".")[1:], cp)
    for shown in [public, *(vars(public).values() if inspect.isclass(public) else ())]:
        for test in doctest.DocTestFinder(recurse=False).find(shown, name) if inspect.getdoc(shown) else ():
            assert not test.examples or test.examples[-1].want, f"{name}: an example that ends without output"


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    outcome = doctest.testmod(importlib.import_module(name), optionflags=options)
    assert outcome.failed == 0, (
        f"{outcome.failed} of {outcome.attempted} examples in {name} fail (see the output above)"
    )


@pytest.mark.slow
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


@pytest.mark.parametrize(
    ("page", "pictures", "told"),
    [
        ("tutorials/a", [0, 0], ["no cell of this tutorial shows a picture", "result.plot() shows no picture"]),
        ("tutorials/a", [0, 1], ["result.plot() shows no picture"]),
        ("tutorials/a", [1, 0], []),
        ("scaling", [0, 0], []),
    ],
)
def test_the_site_refuses_a_tutorial_without_a_picture(page, pictures, told, monkeypatch, caplog):
    """What the build of the site, for which warnings are fatal, checks of every page once its cells have run."""
    nodes = pytest.importorskip("docutils.nodes")
    pytest.importorskip("sphinx")
    monkeypatch.setenv("MPLBACKEND", "agg")  # the settings unset it, and this brings it back
    check = runpy.run_path(str(ROOT / "docs/conf.py"))["_require_picture"]
    tree = nodes.container()
    for source, count in zip(
        ["result = run()\nresult.plot();", "def draw():\n    run().plot()"], pictures, strict=True
    ):
        output = nodes.container("", *[nodes.image(uri="a.png") for _ in range(count)], classes=["cell_output"])
        tree += nodes.container("", nodes.literal_block(source, source), output, classes=["cell"])
    check(None, tree, page)
    assert [record.getMessage() for record in caplog.records] == told
