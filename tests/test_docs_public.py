"""Every public name is documented, every example runs, and numbers of the pages come
from results files."""

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
    """Full names of what a page of the reference describes."""
    current = CURRENT.search(page)
    names = DIRECTIVE.findall(page)
    return (
        {
            name if name.startswith("composeprob") else f"{current[1]}.{name}"
            for name in names
        }
        if names
        else set()
    )


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
    own = (
        vars(public).get("__doc__") if inspect.isclass(public) else public.__doc__
    )  # a base's text is not its own
    assert (own or "").strip(), f"{name} has no docstring"
    if name.count(".") == 1:
        assert len(inspect.cleandoc(own).split("\n\n")) > 1, (
            f"{name}'s docstring is one paragraph: say how to use it"
        )
    module = name.rpartition(".")[0]
    assert name in DOCUMENTED or module in DOCUMENTED - {"composeprob"}, (
        f"{name} is on no page of docs/reference/"
    )
    for shown in [public, *(vars(public).values() if inspect.isclass(public) else ())]:
        for test in (
            doctest.DocTestFinder(recurse=False).find(shown, name)
            if inspect.getdoc(shown)
            else ()
        ):
            assert not test.examples or test.examples[-1].want, (
                f"{name}: an example that ends without output"
            )


def test_the_reference_and_imports_of_the_pages_name_only_what_exists():
    """Executed pages would find it too, a quarter of an hour later."""
    for name in DOCUMENTED:
        pkgutil.resolve_name(name)
    written = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")]
    lines = {
        line
        for page in written
        for line in IMPORT.findall(page.read_text(encoding="utf-8"))
    }
    assert lines, "no page imports anything from composeprob"
    for module, names in lines:
        for name in re.findall(
            r"(\w+)(?: as \w+)?(?:,|$)", names.partition("#")[0].strip("() ")
        ):
            pkgutil.resolve_name(f"{module}.{name}")


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    outcome = doctest.testmod(importlib.import_module(name), optionflags=options)
    assert outcome.failed == 0, (
        f"{outcome.failed} of {outcome.attempted} examples in {name} fail: see the output above"
    )


@pytest.mark.slow
def test_readme_program_runs(tmp_path, monkeypatch):
    """The program on README's first screen does what a newcomer who pastes it
    expects."""
    monkeypatch.chdir(tmp_path)
    programs = re.findall(
        r"```python\n(.*?)```",
        (ROOT / "README.md").read_text(encoding="utf-8"),
        re.DOTALL,
    )
    assert programs, "README.md shows no program"
    for program in programs:
        # cp.program reads the source for file:line, so the program must live in a file.
        file = tmp_path / "readme_program.py"
        file.write_text(program, encoding="utf-8")
        exec(compile(program, str(file), "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize(
    ("page", "pictures", "told"),
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
    page, pictures, told, monkeypatch, caplog
):
    """What the build of the site, for which warnings are fatal, checks of every page
    once its cells have run."""
    nodes = pytest.importorskip("docutils.nodes")
    pytest.importorskip("sphinx")
    monkeypatch.setenv(
        "MPLBACKEND", "agg"
    )  # the settings unset it, and this brings it back
    check = runpy.run_path(str(ROOT / "docs/conf.py"))["_require_picture"]
    tree = nodes.container()
    sources = "result = run()\nresult.plot();", "def draw():\n    run().plot()"
    for source, count in zip(sources, pictures, strict=True):
        output = nodes.container(
            "",
            *[nodes.image(uri="a.png") for _ in range(count)],
            classes=["cell_output"],
        )
        tree += nodes.container(
            "", nodes.literal_block(source, source), output, classes=["cell"]
        )
    check(None, tree, page)
    assert [record.getMessage() for record in caplog.records] == told


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
    """Three digits or two after the point are a measurement, but for settings,
    thresholds and sizes in the text."""
    settings = {"1.10", "1.05", "0.1·σ²"}
    text = re.sub(
        r"```.*?```", "", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL
    )
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
    ("address", "said"),
    [
        ("table; MALA; is", "has 2 rows that begin with MALA"),
        ("table; Mixture; HMC; is", "has 0 rows"),
        ("table; HMC; was", "no column 'was' there; it has: kernel, steps, is, is"),
        ("table; HMC; is#3", "no column 'is#3'"),
        ("table; HMC; is#2", "nothing in 'is#2'"),
        ("elsewhere; HMC; is", "no elsewhere.md"),
        ("table", "is not FILE; CELL; …; COLUMN"),
    ],
)
def test_what_is_not_there_is_named(results, address, said):
    with pytest.raises(pages.NotMeasured, match=said):
        pages.measured(address, results)


def test_failed_checks_are_listed(results):
    assert pages.failing(["table"], results) == ["second"]
    assert pages.failing(["good", "table"], results) == ["table: second"]
    assert pages.failing(["good"], results) == []
    with pytest.raises(pages.NotMeasured, match=r"no other\.json"):
        pages.failing(["other"], results)
