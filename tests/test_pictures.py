"""Figures of a result by kind, its display in a notebook, and its report in one
file."""

import dataclasses
import html
import re
import shutil
import subprocess
from types import SimpleNamespace

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

import composeprob as cp
from composeprob.errors import CapabilityError, InvalidValueError, UnknownSiteError
from composeprob.findings import Code, Finding
from composeprob.plotting.figures import PALETTE, SIZES, diagnostics, wrapped
from composeprob.results.status import Status
from messages import check_wording, visible
from refusals import refused
from sampling_cases import both, normal, run, single
from test_result import UNKNOWN, Density, N, make


@pytest.fixture(autouse=True)
def no_figure_is_left():
    yield
    plt.close("all")


def texts(figure):
    """Every text of a figure that is drawn."""
    figure.canvas.draw()
    visible = [text for text in figure.findobj(plt.Text) if text.get_visible()]
    return [text.get_text() for text in visible if text.get_text()]


@pytest.fixture
def moved():
    rng = np.random.default_rng(0)
    samples = {
        "x": rng.normal(size=(N, 2)),
        "image": rng.uniform(size=(N, 8, 8)),
        "z": rng.normal(size=N),
    }
    return make(samples)


@pytest.mark.parametrize("kind", ["overview", "samples", "pairs", "levels"])
def test_every_kind_draws(moved, kind):
    shown = texts(moved.plot(kind))
    expected = {
        "overview": "run",
        "samples": "image",
        "pairs": "x[0]",
        "levels": "acceptance",
    }
    assert any(expected[kind] in text for text in shown), shown


def test_a_saved_picture_is_sharp_unless_something_else_is_asked_for(moved, tmp_path):
    figure = moved.plot("levels")

    def pixels_an_inch(**options):
        figure.savefig(tmp_path / "picture.png", **options)
        with Image.open(tmp_path / "picture.png") as image:
            return image.width / figure.get_figwidth()

    assert pixels_an_inch() == pytest.approx(SIZES.pixels_an_inch, abs=1)
    assert pixels_an_inch(dpi=50) == pytest.approx(50, abs=1)
    with plt.rc_context({"savefig.dpi": 80}):
        assert pixels_an_inch() == pytest.approx(80, abs=1)


def test_kinds_that_cannot_be_drawn_say_why(moved):
    names = "overview, samples, pairs"
    refused(lambda: moved.plot("corner"), InvalidValueError, "'corner'", names)
    refused(
        lambda: make({"x": np.zeros((N, 8, 8))}).plot("pairs"),
        InvalidValueError,
    )
    refused(
        lambda: make(**UNKNOWN).plot("levels"),
        InvalidValueError,
    )


def test_tokens_are_drawn_by_their_shares():
    """The second token is the one after the first: each pair has a share of a third."""
    first = np.arange(12) % 3
    tokens = np.stack([first, (first + 1) % 3], axis=1).astype(np.int32)
    result = make({"s": tokens}, np.zeros(12))
    (shares,) = result.plot("samples").axes[0].images
    assert np.asarray(shares.get_array()) == pytest.approx(np.full((3, 2), 1 / 3))
    (joint,) = result.plot("pairs").axes[2].images
    expected = np.roll(np.eye(3), 1, axis=0) / 3
    assert np.asarray(joint.get_array()) == pytest.approx(expected)


def test_points_are_drawn_with_their_marginals_and_those_of_the_density():
    ax = make(density=Density()).plot("samples").axes[0]
    above, right = ax.child_axes
    (line,) = above.lines
    x, density = line.get_data()
    exact = np.exp(-0.5 * x**2) / np.sqrt(2 * np.pi)
    np.testing.assert_allclose(density, exact, atol=0.02)
    assert len(right.lines) == 1
    areas = [patch.get_height() * patch.get_width() for patch in above.patches]
    assert sum(areas) == pytest.approx(1)
    assert len(ax.images) == 1

    class ScoreOnly(Density):
        capabilities = frozenset({"score"})

    for without_energy in (ScoreOnly(), None):
        assert not make(density=without_energy).plot("samples").axes[0].images


def test_the_program_stands_above_in_lines_that_fit():
    class Long(Density):
        graph = SimpleNamespace(
            name="long",
            formula="π_k(x) ∝ " + " · ".join(f"factor{i}(x)" for i in range(40)),
        )

    figure = make(density=Long()).plot()
    title = figure.get_suptitle()
    assert "π(x) ∝ factor0(x)" in title
    assert title.count("\n") == SIZES.formula_lines - 1
    assert title.endswith(" …")
    figure.canvas.draw()
    assert figure._suptitle.get_window_extent().x1 <= figure.bbox.x1
    # The panels keep their room.
    assert figure.axes[0].get_window_extent().height > 0.4 * figure.bbox.height
    assert wrapped("a b", 1) == "a\nb"


def test_colours_differ_for_the_colour_blind():
    """Colours under linear models of protanopes' and deuteranopes' vision (Vienot,
    Brettel and Mollon 1999)."""
    visions = {
        "protan": [
            [0.11238, 0.88762, 0.0],
            [0.11238, 0.88762, 0.0],
            [0.00401, -0.00401, 1.0],
        ],
        "deutan": [
            [0.29275, 0.70725, 0.0],
            [0.29275, 0.70725, 0.0],
            [-0.02234, 0.02234, 1.0],
        ],
    }
    for palette in (PALETTE.lines, (PALETTE.accent, PALETTE.second)):
        light = np.array([to_rgb(colour) for colour in palette]) ** 2.2
        for matrix in visions.values():
            visible = np.clip(light @ np.array(matrix).T, 0, 1) ** (1 / 2.2)
            distances = np.linalg.norm(visible[:, None] - visible, axis=-1)
            pairs = np.triu_indices(len(visible), 1)
            assert distances[pairs].min() > 0.1


def test_notebooks_show_findings_picture_numbers_and_program():
    page = make(density=None)._repr_html_()
    assert "No problem was found" in page
    assert "data:image/png;base64," in page
    assert "<th>mean</th>" in page
    bad = make(
        status=Status((Finding(Code.UNSETTLED, "It drifts <b>.", True),))
    )._repr_html_()
    assert "<b>unsettled</b>: It drifts &lt;b&gt;." in bad
    assert plt.get_fignums() == []


@pytest.mark.parametrize("shape", [(8, 8), (8, 9, 1), (8, 9, 3)])
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 1.0), (3.0, 40.0)])
def test_a_site_that_is_an_image_has_images(shape, low, high, tmp_path):
    values = np.random.default_rng(0).uniform(low, high, size=(N, *shape))
    result = make({"x": np.zeros((N, 2)), "image": values})
    expected = (values - values.min()) / np.ptp(values)
    channels = shape[2] if len(shape) == 3 else 1
    for each in (result, cp.Result.load(result.save(tmp_path / "run"))):
        images = each.images()
        assert images.shape == (N, *shape[:2], channels)
        assert 0 <= images.min() < images.max() <= 1
        np.testing.assert_allclose(images.reshape(values.shape), expected, atol=0.01)
        np.testing.assert_array_equal(each.images("image"), images)


@pytest.mark.parametrize(
    ("sampler", "label"), [("SMC()", "log-SNR"), ("Reveal()", "log-odds to be visible")]
)
def test_levels_of_reveals_have_no_log_snr(sampler, label):
    result = make({"x": np.zeros(N)})
    about = dataclasses.replace(result.about, sampler=sampler)
    figure = dataclasses.replace(result, about=about).plot("levels")
    assert figure.axes[0].get_xlabel().startswith(label)


@pytest.mark.parametrize(
    ("number", "title"),
    [
        (SIZES.images, "image"),
        (SIZES.images + 1, f"image (first {SIZES.images} samples)"),
    ],
)
def test_a_panel_of_images_says_how_many_it_shows(number, title):
    values = np.zeros((number, 8, 8))
    figure = make({"image": values}).plot()
    assert figure.axes[0].get_title(loc="left") == title


def test_of_two_images_one_must_be_named():
    result = make({"a": np.ones((N, 8, 8)), "b": np.zeros((N, 8, 8)), "c": np.zeros(N)})
    refused(
        lambda: result.images(),
        CapabilityError,
    )
    refused(
        lambda: result.images("c"),
        CapabilityError,
    )
    refused(lambda: make().images(), CapabilityError)
    with pytest.raises(UnknownSiteError):
        result.images("y")
    assert result.images("b").max() == 0


def test_images_of_draws_are_those_of_all_chains():
    values = np.random.default_rng(0).uniform(size=(N, 3, 8, 8))
    images = make({"x": values}, draws=3).images()
    np.testing.assert_array_equal(images[..., 0], values.reshape(-1, 8, 8))


# ── the report ────────────────────────────────────────────────────────────────────────

BROWSERS = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
BROWSER = next(filter(None, BROWSERS), None)
MEASURE = (
    "<script>parent.document.title = document.documentElement.scrollWidth "
    "+ ' of ' + window.innerWidth</script>"
)


@pytest.fixture(scope="module")
def result():
    return run(cp.compile(both, normal([0.0, 0.0]), normal([0.3, 0.0])), seed=7)


@pytest.fixture(scope="module")
def page(result, tmp_path_factory):
    return result.report(tmp_path_factory.mktemp("report") / "new" / "run.html")


def check_page(text, result):
    """Hold the visible text of a report against its snapshot."""
    for name, version in result.about.versions.items():
        text = text.replace(f"{name} {version}", f"{name} VERSION")
    check_wording(visible(text), estimated=True)


def test_the_report_has_program_samples_quality_and_cost(result, page):
    assert re.search(r"π<sub>k</sub>\(x\) ∝ f\(x\)·g\(x\)", result._repr_html_())
    text = page.read_text()
    for part in (
        "64 samples of both",
        "f(x)·g(x)",
        "jax.random.key(7)",
        "numpyro",
        f"{result.evaluations * 64:,} in all",
    ):
        assert part in text
    check_page(text, result)
    # The site, and the diagnostics by level.
    assert text.count("data:image/png;base64,") == 2
    names = list(diagnostics(result))
    assert names == ["acceptance", "step_size", "ess", "ancestors"]
    assert not re.search(r"(src|href)=['\"](?!data:)", text)  # needs no network
    assert "prefers-color-scheme: dark" in text


def test_findings_come_with_remedies_and_errors_are_withheld(result, tmp_path):
    finding = Finding(Code.UNSETTLED, "It drifts <b>. Go on with draws=.", True)
    status = result.status.with_findings(finding)
    doubtful = dataclasses.replace(result, status=status)
    text = doubtful.report(tmp_path / "run.html").read_text()
    assert "It drifts &lt;b&gt;. Go on with draws=." in text
    assert "<td>–</td>" in text
    check_page(text, doubtful)


def test_intervals_of_a_report_are_those_of_means(tmp_path):
    """Also of two chains, whose error is that of their draws."""
    z = np.random.default_rng(0).normal(size=(2, 500))
    two = make({"z": z}, np.zeros(2), draws=500)
    low, high = two.mean(lambda sample: sample["z"]).interval(0.9)
    assert low < high
    assert f"{low:.4g} … {high:.4g}" in two.report(tmp_path / "run.html").read_text()


def test_a_result_from_a_file_has_a_report_without_its_program(result, tmp_path):
    loaded = cp.Result.load(result.save(tmp_path / "saved"))
    assert loaded.about.key == "jax.random.key(7)"
    assert loaded.about.versions == result.about.versions
    text = loaded.report(tmp_path / "run.html").read_text()
    assert "f(x)·g(x)" not in text
    check_page(text, loaded)


@pytest.mark.skipif(
    BROWSER is None, reason="there is no Chromium here: apt install chromium"
)
@pytest.mark.parametrize("scheme", [0, 1], ids=["dark", "light"])
@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_shows_it_without_an_error(page, tmp_path, width, scheme):
    outer = tmp_path / "outer.html"  # Chromium's own window is never narrower than 500
    inner = html.escape(page.read_text().replace("</main>", f"</main>{MEASURE}"))
    frame = f"<iframe srcdoc='{inner}' width={width} height=900></iframe>"
    outer.write_text(f"<title>0 of 0</title>{frame}")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        f"--user-data-dir={tmp_path}/own",
        f"--blink-settings=preferredColorScheme={scheme}",
        "--window-size=1400,1000",
        "--dump-dom",
    ]
    shown = subprocess.run(
        [BROWSER, *flags, outer.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "CONSOLE" not in shown.stderr
    title = re.search(r"<title>(\d+) of (\d+)</title>", shown.stdout)
    needed, available = map(int, title.groups())
    assert available == width
    assert needed <= available  # nothing is cut off on the right


def test_images_are_not_inverted_in_the_dark(tmp_path):
    image = normal(jnp.zeros((8, 8)))
    small = run(cp.compile(single, image), chains=4, sampler=cp.Ancestral())
    text = small.report(tmp_path / "run.html").read_text()
    assert "class='pictures'" in text
