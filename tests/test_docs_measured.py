"""Numbers of the pages come from results files; one that no file has is an error, and so is one typed by hand."""

import importlib.util
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
spec = importlib.util.spec_from_file_location("measured", DOCS / "measured.py")
pages = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pages)

ROLE = re.compile(r"\{measured\}`([^`]*)`")
DIRECTIVE = re.compile(r"^```\{failing\} (.*)$", re.MULTILINE)
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
    (tmp_path / "table.json").write_text('{"checks": {"first": true, "second": false}}', encoding="utf-8")
    (tmp_path / "good.json").write_text('{"checks": {"first": true}}', encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: page.stem)
def test_every_number_that_a_page_asks_for_is_in_the_results(page):
    text = page.read_text(encoding="utf-8")
    for address in ROLE.findall(text):
        assert pages.measured(address)
    for names in DIRECTIVE.findall(text):
        pages.failing(names.split())


@pytest.mark.parametrize("page", ["experiments-2d.md", "performance.md", "scaling.md"])
def test_measured_numbers_are_not_typed_by_hand(page):
    """Three digits or two after the point are a measurement, but for settings, thresholds and sizes in the text."""
    settings = {"1.10", "1.05", "0.1·σ²"}
    text = re.sub(r"```.*?```", "", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL)
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
