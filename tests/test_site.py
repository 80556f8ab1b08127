"""The site's own extensions, and the browser's check of pages."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "docs"))  # its modules import one another


def module(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


check_site = module(ROOT / "tools/check_site.py")
PAGE = (
    "<!doctype html><html lang=en><title>t</title><main><h1>t</h1>"
    "<article style='width:300px'>{}</article></main>"
)
PIXEL = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="
WRONG = {
    "<pre style='overflow:hidden'>" + "x" * 400 + "</pre>": "pre is cut off",
    "<p style='width:2000px'>wide</p>": "pixels wider than the window",
    "<img src=none.png alt=none>": "did not arrive|404",
    "<a href=none.html>none</a>": "link that leads nowhere: none.html",
    "<a href=#none>none</a>": "link that leads nowhere: #none",
    "<script>console.error('wrong')</script>": "wrong",
    "<img src=data:, alt=none>": "not drawn",
    f"<img src='{PIXEL}'>": "axe image-alt",
}
"""Bodies of pages, and the finding that each must have."""


def test_a_link_is_followed_to_its_place(tmp_path):
    (tmp_path / "a.html").write_text(
        "<p id='here'><a href='b.html#there'>b</a><a href='#here'>a</a>",
        encoding="utf-8",
    )
    (tmp_path / "b.html").write_text(
        "<p id='there'><a href='a.html#gone'>a</a><a href='c.html'>c</a>",
        encoding="utf-8",
    )
    dead = {
        "b.html": [
            "link that leads nowhere: a.html#gone",
            "link that leads nowhere: c.html",
        ]
    }
    assert check_site.dead_links(tmp_path) == dead


def needs_a_browser():
    if check_site.browser_path() is None:
        pytest.skip("there is no Chromium here: apt install chromium")
    for package in ("playwright", "axe_playwright_python"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(
                f"{package} is not installed: pip install playwright "
                "axe-playwright-python"
            )


@pytest.mark.slow
def test_the_browser_names_what_is_wrong(tmp_path):
    needs_a_browser()
    for i, body in enumerate(WRONG):
        (tmp_path / f"{i}.html").write_text(PAGE.format(body), encoding="utf-8")
    (tmp_path / "right.html").write_text(PAGE.format("<p>right</p>"), encoding="utf-8")
    found = dict(check_site.look(tmp_path))
    assert found.pop("right.html") == []
    for i, expected in enumerate(WRONG.values()):
        texts = found[f"{i}.html"]
        assert any(re.search(expected, text) for text in texts), (expected, texts)


@pytest.mark.slow
def test_every_page_of_the_site():
    needs_a_browser()
    if not (check_site.SITE / "index.html").is_file():
        pytest.skip("the site is not built: make docs")
    findings = dict(check_site.look(check_site.SITE))
    assert {name: texts for name, texts in findings.items() if texts} == {}


def test_every_example_has_a_title_and_says_what_is_learned():
    gallery = pytest.importorskip("gallery", reason="needs Sphinx")
    for path in (ROOT / "examples").glob("*.py"):
        example = gallery.Example(path)
        assert 3 < len(example.title) < 60, (
            f"{path.name}: a docstring begins with a title and a colon"
        )
        assert len(gallery.page(example, None).splitlines()) > 20
        assert '"""' not in example.text.partition("\n")[0]


def test_an_example_runs_again_only_when_it_or_the_library_changed(
    tmp_path, monkeypatch
):
    gallery = pytest.importorskip("gallery", reason="needs Sphinx")
    monkeypatch.setattr(gallery, "ROOT", tmp_path)
    monkeypatch.setattr(gallery, "KEPT", tmp_path / "kept")

    def hash_of(*paths):
        return str(hash(paths[0].read_text()))

    monkeypatch.setattr(gallery, "hash_of", hash_of)
    path = tmp_path / "one.py"
    counter = tmp_path / "runs"
    source = f"""'''One: an idea.'''
from pathlib import Path
def main(num_chains=2000, out="out"):
    with open({str(counter)!r}, "a") as file:
        file.write("x")
    Path(out, "one.png").write_bytes(b"")
    print(num_chains, out)
"""
    path.write_text(source)
    for _ in range(2):
        found = gallery.run(gallery.Example(path))
    assert found["printed"] == f"{gallery.CHAINS} out\n"
    page = gallery.page(gallery.Example(path), found)
    assert f"With at most {gallery.CHAINS} chains" in page
    assert counter.read_text() == "x"
    path.write_text(source.replace("idea", "other idea"))
    gallery.run(gallery.Example(path))
    assert counter.read_text() == "xx"
    monkeypatch.setattr(gallery, "library_hash", lambda: "other")
    gallery.run(gallery.Example(path))
    assert counter.read_text() == "xxx"
    assert len(list((tmp_path / "kept").iterdir())) == 1  # older runs are deleted
    path.write_text("'''One: an idea.'''\nimport no_such_package\n")
    assert gallery.run(gallery.Example(path))["needs"] == "no_such_package"
    path.write_text("'''One: an idea.'''\nmain = lambda out: 1 / 0\n")
    with pytest.raises(gallery.ExtensionError, match="ZeroDivisionError"):
        gallery.run(gallery.Example(path))


def test_a_notebook_for_readers_is_plain_markdown(tmp_path):
    nbformat = pytest.importorskip("nbformat")
    notebooks = pytest.importorskip("notebooks", reason="needs Sphinx")
    links = "{term}`level`, [a page](../x.md), {doc}`name <there>`, [out](https://a.b)"
    text = f"# T\n{links}, {{measured}}`growth; compilation (s); 10 levels; is`"
    cells = [
        nbformat.v4.new_markdown_cell(text),
        nbformat.v4.new_code_cell("infer(1, progress=False)"),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "t.ipynb")
    made = notebooks.notebook(tmp_path / "t.ipynb")
    assert re.fullmatch(
        r"# T\nlevel, \*a page\*, name, \[out\]\(https://a.b\), [\d.]+",
        made.cells[0].source,
    )
    assert "pip install" in made.cells[1].source
    # A reader sees the progress bar, which a page leaves out.
    assert made.cells[-1].source == "infer(1)"
    assert not made.cells[-1].outputs
    cells[1].outputs = [nbformat.v4.new_output("stream", name="stdout", text="2")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "ran.ipynb")
    # Outputs that MyST-NB takes from its cache.
    cache = notebooks.get_cache(tmp_path / "kept")
    cache.cache_notebook_file(tmp_path / "ran.ipynb", check_validity=False)
    again = notebooks.notebook(tmp_path / "t.ipynb", tmp_path / "kept")
    assert again.cells[-1].outputs[0].text == "2"
    metadata = json.loads(nbformat.writes(made))["metadata"]
    assert metadata["kernelspec"]["name"] == "python3"


def test_formulas_are_mathml_with_their_text():
    mathml = pytest.importorskip("mathml", reason="needs latex2mathml")
    made = mathml.mathml(r"\frac{a}{b} < c", "inline")
    assert made.startswith('<math alttext="\\frac{a}{b} &lt; c"')
    assert "<mfrac>" in made
