"""`result.report`: one file that needs nothing else, and that a real browser shows without an error."""

import html
import re
import shutil
import subprocess

import jax.numpy as jnp
import pytest

import composeprob as cp
from composeprob.results.plotting import diagnostics
from sampling_cases import both, normal, run, single

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MEASURE = "<script>parent.document.title = document.documentElement.scrollWidth + ' of ' + window.innerWidth</script>"


@pytest.fixture(scope="module")
def result():
    return run(cp.compile(both, normal([0.0, 0.0]), normal([0.3, 0.0])), seed=7)


@pytest.fixture(scope="module")
def page(result, tmp_path_factory):
    return result.report(tmp_path_factory.mktemp("report") / "new" / "run.html")


def test_it_says_what_was_sampled_how_well_and_what_it_cost(result, page):
    text = page.read_text()
    for part in ("64 samples of both", "f(x)·g(x)", "Status: ok", "90 % interval", "jax.random.key(7)", "numpyro"):
        assert part in text
    assert f"{result.evaluations * 64:,} in all" in text
    assert text.count("data:image/png;base64,") == 2  # the site, and the diagnostics by level
    assert [each.name for each in diagnostics(result).values()] == ["acceptance", "step_size", "ess", "ancestors"]
    assert not re.search(r"(src|href)=['\"](?!data:)", text)  # needs no network
    assert "prefers-color-scheme: dark" in text


def test_findings_come_with_what_to_try_and_errors_are_withheld(result, tmp_path):
    import dataclasses

    status = result.status.with_findings((cp.results.status.Code.UNSETTLED, "It drifts <b>. Go on with draws=."))
    text = dataclasses.replace(result, status=status).report(tmp_path / "run.html").read_text()
    assert "Status: 1 finding, the gravest first" in text
    assert "It drifts &lt;b&gt;. Go on with draws=." in text
    assert "Standard errors are withheld" in text
    assert "<td>–</td>" in text


def test_a_result_from_a_file_has_a_report_without_its_program(result, tmp_path):
    loaded = cp.Result.load(result.save(tmp_path / "saved"))
    assert loaded.about.key == "jax.random.key(7)"
    assert loaded.about.versions == result.about.versions
    assert "The program is not in the file." in loaded.report(tmp_path / "run.html").read_text()


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here: apt install chromium")
@pytest.mark.parametrize("scheme", [0, 1], ids=["dark", "light"])
@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_shows_it_without_an_error(page, tmp_path, width, scheme):
    outer = tmp_path / "outer.html"  # Chromium's own window is never narrower than 500
    inner = html.escape(page.read_text().replace("</main>", f"</main>{MEASURE}"))
    outer.write_text(f"<title>0 of 0</title><iframe srcdoc='{inner}' width={width} height=900></iframe>")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    flags += [f"--user-data-dir={tmp_path}/own"]
    flags += [f"--blink-settings=preferredColorScheme={scheme}", "--window-size=1400,1000", "--dump-dom"]
    shown = subprocess.run([BROWSER, *flags, outer.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in shown.stderr
    needed, had = map(int, re.search(r"<title>(\d+) of (\d+)</title>", shown.stdout).groups())
    assert had == width
    assert needed <= had  # nothing is cut off on the right


def test_images_are_not_inverted_in_the_dark(tmp_path):
    image = normal(jnp.zeros((8, 8)))
    small = run(cp.compile(single, image), chains=4, sampler=cp.Ancestral())
    text = small.report(tmp_path / "run.html").read_text()
    assert "class='pictures'" in text
