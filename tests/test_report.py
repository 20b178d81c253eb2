"""The report: what the page holds, and what it does in a browser."""

import importlib.util
import json
import math
import re
import shutil

import numpy as np
import pytest

pytest.importorskip("altair")
pytest.importorskip("vl_convert")

from batchnorm.diagnose.recording import Recording, Snapshot
from batchnorm.diagnose.records import BINS, QUANTILES
from batchnorm.errors import ArgumentError
from batchnorm.report.terminal import sparkline

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_browser = pytest.mark.skipif(
    BROWSER is None or importlib.util.find_spec("playwright") is None,
    reason="needs playwright and Chromium",
)
LAYERS = ("stem.bn", "body.0.bn <x>", "body.1.bn")


def _snapshot(step, layer, rng, momentum):
    """Of a layer whose input moves away from zero, and whose running statistics follow slowly."""
    channels = 4
    mean = np.full(channels, 0.05 * step)
    left = (1 - momentum) ** (step + 1)
    values = np.sort(rng.normal(mean[0], 1.0, 400))
    counts = np.histogram(values, BINS, (values[0], values[-1]))[0]
    return Snapshot(
        step, layer, values=640.0, examples=32,
        mean=mean.astype(np.float32), var=np.ones(channels, np.float32),
        running_mean=((1 - left) * mean).astype(np.float32),
        running_var=np.ones(channels, np.float32),
        weight=np.ones(channels, np.float32), bias=np.zeros(channels, np.float32),
        updates=step + 1, gradient=0.1, gradient_weight=0.2, gradient_bias=0.3,
        channels=np.array([0, 2]),
        before=np.tile(np.quantile(values, QUANTILES), 2).astype(np.float32),
        after=np.tile(np.quantile(values - mean[0], QUANTILES), 2).astype(np.float32),
        low_before=np.full(2, values[0], np.float32),
        high_before=np.full(2, values[-1], np.float32),
        counts_before=np.tile(counts, 2),
        low_after=np.full(2, values[0] - mean[0], np.float32),
        high_after=np.full(2, values[-1] - mean[0], np.float32),
        counts_after=np.tile(counts, 2),
        moved=0.1 if step else math.nan, moved_relative=0.2 if step else math.nan,
    )  # fmt: skip


def _recording(momentum):
    rng = np.random.default_rng(0)
    about = {"model": "Net", "layers": {n: {"momentum": momentum, "kind": "BN"} for n in LAYERS}}
    recording = Recording(about)
    for step in range(0, 200, 5):
        recording.add([_snapshot(step, layer, rng, momentum) for layer in LAYERS])
    return recording


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reports")
    sick, healthy = _recording(0.001), _recording(0.1)
    sick.report(folder / "sick.html")
    healthy.report(folder / "healthy.html")
    sick.report(folder / "both.html", healthy)
    return folder


def test_page_names_findings_with_links_to_their_layers(pages):
    text = (pages / "sick.html").read_text(encoding="utf-8")
    assert "BN105" in text
    assert 'href="#layer-stem.bn"' in text
    assert 'id="layer-stem.bn"' in text
    assert "<x>" not in text.replace("\\u003c", "").split("<script>\n(() =>")[0]
    assert "No findings in what was recorded" in (pages / "healthy.html").read_text(
        encoding="utf-8"
    )


def test_page_loads_nothing_from_elsewhere(pages):
    text = (pages / "both.html").read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|href)="https?:', text)


def test_page_holds_the_recorded_numbers(pages):
    text = (pages / "sick.html").read_text(encoding="utf-8")
    data = json.loads(re.search(r"^const data = (.*);$", text, re.M)[1].replace("<\\/", "</"))
    layer = data["recordings"][0]["layers"]["stem.bn"]
    assert layer["steps"] == list(range(0, 200, 5))
    assert layer["bands"]["batch mean"][10] == [2.5, 2.5, 2.5]
    assert sum(layer["histograms"]["50"][0][2:]) == 400


def test_large_recording_stays_below_three_megabytes(tmp_path):
    rng = np.random.default_rng(0)
    layers = [f"layer{k // 5}.{k % 5}.bn" for k in range(20)]
    recording = Recording({"model": "ResNet", "layers": {}})
    for step in range(0, 4000, 20):
        recording.add([_snapshot(step, layer, rng, 0.1) for layer in layers])
    recording.report(tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < 3_000_000


def test_nothing_is_written_without_snapshots_or_place(tmp_path):
    with pytest.raises(ArgumentError, match="at least one step"):
        Recording().report(tmp_path / "page.html")
    with pytest.raises(ArgumentError, match="is not one"):
        _recording(0.1).report(tmp_path / "missing" / "page.html")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("values", "bars"),
    [([], ""), ([0, 0], "▁▁"), ([0, 1, 2], "▁▅█"), ([math.nan, 1.0], "▁█")],
)
def test_sparkline(values, bars):
    assert sparkline(values) == bars


def test_recording_without_any_number_has_a_page(tmp_path):
    nothing = np.full(3, np.nan, np.float32)
    recording = Recording({"model": "Net", "layers": {}})
    recording.add([Snapshot(0, "100%", mean=nothing, var=nothing)])
    recording.report(tmp_path / "page.html")
    assert 'value="running_shift"' in (tmp_path / "page.html").read_text(encoding="utf-8")


# ---- in a browser -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


def _open(browser, page, **options):
    said = []
    opened = browser.new_page(**options)
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("request", lambda request: said.append(request.url) if "http" in request.url else 0)
    opened.goto(page)
    opened.wait_for_selector("body[data-ready]", timeout=30_000)
    return opened, said


def _histogram(page):
    return page.eval_on_selector_all(
        "#histogram .mark-rect path", "paths => paths.map(p => p.getAttribute('d')).join()"
    )


@needs_browser
@pytest.mark.parametrize("name", ["sick", "healthy", "both"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 360])
def test_page_opens_without_a_word_and_fits(pages, browser, name, scheme, width):
    page, said = _open(
        browser,
        (pages / f"{name}.html").as_uri(),
        viewport={"width": width, "height": 800},
        color_scheme=scheme,
    )
    assert said == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    for chart in ("glance", "histogram", "means", "stds", "affine", "gradients", "moved"):
        assert page.locator(f"#{chart} svg").count() == 1, chart
    page.close()


@needs_browser
def test_slider_moves_the_histogram_and_keys_move_the_slider(pages, browser):
    page, _ = _open(browser, (pages / "sick.html").as_uri())
    assert page.text_content("#at") == "195"
    before = _histogram(page)
    page.focus("#step")
    page.keyboard.press("Home")
    page.wait_for_function("document.getElementById('at').textContent === '0'")
    page.wait_for_timeout(300)
    assert _histogram(page) != before
    page.close()


@needs_browser
def test_link_of_a_finding_lands_at_its_layer(pages, browser):
    page, _ = _open(browser, (pages / "sick.html").as_uri())
    page.click('.finding a[data-layer="body.1.bn"]')
    page.wait_for_function("document.getElementById('name').textContent === 'body.1.bn'")
    assert page.input_value("#layer") == "body.1.bn"
    top = page.evaluate("document.getElementById('detail').getBoundingClientRect().top")
    assert -5 <= top < 400
    page.close()


@needs_browser
def test_address_with_a_layer_opens_it(pages, browser):
    page, _ = _open(browser, (pages / "both.html").as_uri() + "#layer-body.0.bn%20%3Cx%3E")
    page.wait_for_function("document.getElementById('name').textContent === 'body.0.bn <x>'")
    page.close()


@needs_browser
def test_click_on_the_overview_chooses_layer_and_step(pages, browser):
    page, _ = _open(browser, (pages / "sick.html").as_uri())
    page.locator("#glance .mark-rect path").nth(5).click()
    page.wait_for_function("document.getElementById('at').textContent !== '195'")
    page.close()


@needs_browser
def test_overview_shows_another_measure_and_the_other_recording(pages, browser):
    page, said = _open(browser, (pages / "both.html").as_uri())

    def colors():
        page.wait_for_timeout(300)
        return page.eval_on_selector_all(
            "#glance .mark-rect path", "paths => paths.map(p => p.getAttribute('fill')).join()"
        )

    first = colors()
    page.select_option("#which", "1")
    second = colors()
    assert second != first
    page.select_option("#measure", "ratio")
    assert colors() != second
    assert said == []
    page.close()
