"""Public names are documented, examples run, and numbers of pages are of results."""

import doctest
import functools
import importlib
import importlib.util
import inspect
import pkgutil
import re
import runpy
from pathlib import Path

import pytest

import composeprob as cp

ROOT = Path(__file__).parents[1]
PAGES = [
    page.read_text(encoding="utf-8") for page in (ROOT / "docs/reference").glob("*.md")
]
DIRECTIVE = re.compile(r"\.\. auto(?:class|function|module|data)::[ ]+([\w.]+)")
IMPORT = re.compile(r"^[ >]*from (composeprob[\w.]*) import (.+)$", re.MULTILINE)
CURRENT = re.compile(r"\.\. currentmodule::[ ]+([\w.]+)")


def documented(page: str) -> set[str]:
    """Full names that a page of the reference documents."""
    current = CURRENT.search(page)
    names = set()
    for name in DIRECTIVE.findall(page):
        if name.startswith("composeprob"):
            names.add(name)
        else:
            assert current is not None, f"{name} is documented without a module"
            names.add(f"{current[1]}.{name}")
    return names


DOCUMENTED = set().union(*map(documented, PAGES))
SUBMODULES = ("metrics", "training", "errors")
PUBLIC = [f"composeprob.{name}" for name in cp.__all__ if name not in SUBMODULES]
PUBLIC += [
    f"composeprob.{module}.{name}"
    for module in SUBMODULES
    for name in getattr(cp, module).__all__
]
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(cp.__path__, "composeprob.")
    if not module.name.startswith("composeprob.models.")
)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_is_documented_and_its_examples_show_what_comes_out(name):
    public = functools.reduce(getattr, name.split(".")[1:], cp)
    docstring = public.__doc__
    members = []
    if inspect.isclass(public):
        # The class's own text, not that of a base.
        docstring = vars(public).get("__doc__")
        members = list(vars(public).values())
    assert (docstring or "").strip(), f"{name} has no docstring"
    if name.count(".") == 1:
        paragraphs = inspect.cleandoc(docstring).split("\n\n")
        assert len(paragraphs) > 1, (
            f"{name}'s docstring is one paragraph: say how to use it"
        )
    module = name.rpartition(".")[0]
    assert name in DOCUMENTED or module in DOCUMENTED - {"composeprob"}, (
        f"{name} is on no page of docs/reference/"
    )
    finder = doctest.DocTestFinder(recurse=False)
    for shown in [public, *members]:
        if not inspect.getdoc(shown):
            continue
        for test in finder.find(shown, name):
            assert not test.examples or test.examples[-1].want, (
                f"{name}: an example that ends without output"
            )


def test_the_reference_and_imports_of_the_pages_name_only_what_exists():
    """The build of the site would find it too, a quarter of an hour later."""
    for name in DOCUMENTED:
        pkgutil.resolve_name(name)
    written = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")]
    lines = set()
    for page in written:
        lines |= set(IMPORT.findall(page.read_text(encoding="utf-8")))
    assert lines, "no page imports anything from composeprob"
    for module, imported in lines:
        names = imported.partition("#")[0].strip("() ")
        for name in re.findall(r"(\w+)(?: as \w+)?(?:,|$)", names):
            pkgutil.resolve_name(f"{module}.{name}")


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    outcome = doctest.testmod(importlib.import_module(name), optionflags=options)
    assert outcome.failed == 0, (
        f"{outcome.failed} of {outcome.attempted} examples in {name} fail: "
        "see the output above"
    )


@pytest.mark.slow
def test_readme_program_runs(tmp_path, monkeypatch):
    """The program on README's first screen runs when it is pasted into a file."""
    monkeypatch.chdir(tmp_path)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    programs = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert programs, "README.md shows no program"
    for program in programs:
        # cp.program reads the source for file:line, so the program must live in a file.
        file = tmp_path / "readme_program.py"
        file.write_text(program, encoding="utf-8")
        exec(compile(program, str(file), "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize(
    ("page", "pictures", "warnings"),
    [
        (
            "tutorials/a",
            [0, 0],
            [
                "no cell of this tutorial shows a picture",
                "result.plot() shows no picture",
            ],
        ),
        ("tutorials/a", [0, 1], ["result.plot() shows no picture"]),
        ("tutorials/a", [1, 0], []),
        ("scaling", [0, 0], []),
    ],
)
def test_the_site_refuses_a_tutorial_without_a_picture(
    page, pictures, warnings, monkeypatch, caplog
):
    """The build checks every page after its cells have run; its warnings are fatal."""
    nodes = pytest.importorskip("docutils.nodes")
    pytest.importorskip("sphinx")
    # The site's settings unset it; the fixture restores it.
    monkeypatch.setenv("MPLBACKEND", "agg")
    check = runpy.run_path(str(ROOT / "docs/conf.py"))["_require_picture"]
    tree = nodes.container()
    sources = ("result = run()\nresult.plot();", "def draw():\n    run().plot()")
    for source, count in zip(sources, pictures, strict=True):
        images = [nodes.image(uri="a.png") for _ in range(count)]
        output = nodes.container("", *images, classes=["cell_output"])
        block = nodes.literal_block(source, source)
        tree += nodes.container("", block, output, classes=["cell"])
    check(None, tree, page)
    assert [record.getMessage() for record in caplog.records] == warnings


# ── numbers that were measured ────────────────────────────────────────────────────────

DOCS = Path(__file__).parents[1] / "docs"
spec = importlib.util.spec_from_file_location("measured", DOCS / "measured.py")
pages = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pages)

ROLE = re.compile(r"\{measured\}`([^`]*)`")
FAILING = re.compile(r"^```\{failing\} (.*)$", re.MULTILINE)
TABLE = """# A title

| kernel | steps | is | is |
| --- | --- | --- | --- |
| **Product: narrow ring** | | | |
| MALA | few | 0.325 ± 0.012 | 3,100 |
| HMC | few | -1.40 | |
| **Mixture** | | | |
| MALA | few | +0.5 nats, TV -0.034 | 62% |

| task | is |
| --- | --- |
| sharp | 0.436 |
"""


@pytest.fixture
def results(tmp_path):
    (tmp_path / "table.md").write_text(TABLE, encoding="utf-8")
    (tmp_path / "table.json").write_text(
        '{"checks": {"first": true, "second": false}}', encoding="utf-8"
    )
    (tmp_path / "good.json").write_text('{"checks": {"first": true}}', encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: page.stem)
def test_every_number_that_a_page_asks_for_is_in_the_results(page):
    text = page.read_text(encoding="utf-8")
    for address in ROLE.findall(text):
        assert pages.measured(address)
    for names in FAILING.findall(text):
        pages.failing(names.split())


@pytest.mark.parametrize("page", ["experiments-2d.md", "performance.md", "scaling.md"])
def test_measured_numbers_are_not_typed_by_hand(page):
    """Numbers with two digits after the point are measurements, besides settings."""
    settings = {"1.10", "1.05", "0.1·σ²"}
    text = (DOCS / page).read_text(encoding="utf-8")
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    typed = re.findall(r"\d+\.\d{2,}", ROLE.sub("", text))
    assert set(typed) <= settings
    assert ROLE.search(text)


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("table; narrow ring; MALA; is", "0.325 ± 0.012"),
        ("table; narrow ring; MALA; few; is#2", "3,100"),
        ("table; HMC;\n is", "-1.40"),
        ("table; Mixture; MALA; is", "+0.5 nats, TV -0.034"),
        ("table; Mixture; MALA; is#2", "62%"),
        ("table; sharp; is", "0.436"),
    ],
)
def test_a_cell_is_found_by_what_its_row_begins_with(results, address, shown):
    assert pages.measured(address, results) == shown


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("table; MALA; is", "2 .*MALA"),
        ("table; Mixture; HMC; is", " 0 "),
        ("table; HMC; was", "'was'.*kernel, steps, is, is"),
        ("table; HMC; is#3", "'is#3'"),
        ("table; HMC; is#2", "'is#2'"),
        ("elsewhere; HMC; is", "elsewhere.md"),
        ("table", "FILE; CELL; …; COLUMN"),
    ],
)
def test_what_is_not_there_is_named(results, address, message):
    with pytest.raises(pages.NotMeasured, match=message):
        pages.measured(address, results)


def test_failed_checks_are_listed(results):
    assert pages.failing(["table"], results) == ["second"]
    assert pages.failing(["good", "table"], results) == ["table: second"]
    assert pages.failing(["good"], results) == []
    with pytest.raises(pages.NotMeasured, match=r"no other\.json"):
        pages.failing(["other"], results)
