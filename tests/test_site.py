"""The site: formulas of its widgets against the library, and its pages in a browser."""

import hashlib
import http.server
import importlib.util
import json
import os
import re
import shutil
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import batchnorm

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
SITE = Path(os.environ.get("BATCHNORM_SITE", ROOT / "site"))
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)

needs_site = pytest.mark.skipif(
    not (SITE / "index.html").exists()
    or BROWSER is None
    or importlib.util.find_spec("playwright") is None,
    reason="needs `make docs`, playwright and Chromium",
)


def _module(name):
    spec = importlib.util.spec_from_file_location(f"site_{name}", DOCS / "site" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- what the pages hold before a script runs ---------------------------------------------------


def test_nav_names_every_page():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:")[1]
    listed = set(re.findall(r"(\S+\.md)$", nav, flags=re.M))
    pages = {
        path.relative_to(DOCS).as_posix()
        for path in DOCS.rglob("*.md")
        if path.parts[len(DOCS.parts)] != "slides"
    }
    made = {f"studies/{path.stem}.md" for path in (DOCS / "studies").glob("*.json")}
    assert listed == pages | made | {"studies/verdicts.md"}


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_picture_of_the_readme_shows_the_committed_results(theme):
    results = (DOCS / "studies" / "paper.json").read_bytes()
    picture = (DOCS / "assets" / f"overview-{theme}.svg").read_text(encoding="utf-8")
    assert hashlib.sha256(results).hexdigest()[:16] in picture, "python docs/site/overview.py"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_picture_of_folding_tools_shows_the_committed_results(theme):
    results = (ROOT / "benchmarks" / "results" / "fold_cases.csv").read_bytes()
    picture = (DOCS / "assets" / f"fold-cases-{theme}.svg").read_text(encoding="utf-8")
    assert hashlib.sha256(results).hexdigest()[:16] in picture, "python docs/site/fold_cases.py"


def test_notebook_has_the_code_of_the_tutorial():
    notebook = _module("notebook").notebook((DOCS / "learn" / "tutorial.md").read_text("utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    source = "\n".join("".join(cell["source"]) for cell in code)
    compile(source, "tutorial", "exec")
    assert "recalibrate(model" in source
    assert ">>>" not in source
    assert [c["cell_type"] for c in notebook["cells"][:2]] == ["markdown", "code"]
    outputs = [cell["outputs"][0]["text"] for cell in code if cell["outputs"]]
    converted = "converted 2 batch-norm layers, skipped 0\n  1  BatchNorm1d\n  4  BatchNorm1d\n"
    assert converted in outputs


def test_slides_say_what_to_say():
    slides = _module("slides").slides((DOCS / "slides" / "slides.md").read_text("utf-8"))
    assert 15 <= len(slides) <= 20
    assert all(len(notes) > 100 for _, notes in slides)


def test_graph_widget_starts_with_the_librarys_gradient():
    pytest.importorskip("mlxtend")
    widgets = _module("widgets")
    html = widgets.graph()
    x, g = np.array(widgets.GRAPH_X)[:, None], np.array(widgets.GRAPH_GRAD)[:, None]
    _, saved = batchnorm.batch_norm(x, [widgets.GRAPH_GAMMA], [widgets.GRAPH_BETA])
    grad_x = batchnorm.batch_norm_backward(g, saved)[0].ravel()
    for k, value in enumerate(grad_x):
        for name in ("steps", "line", "differences"):
            assert f'data-out="{name}{k}">{value:.6f}<' in html


# ---- in a browser -------------------------------------------------------------------------------


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def address():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(SITE)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        running = started.chromium.launch(
            executable_path=BROWSER,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        yield running
        running.close()


@pytest.fixture
def page(browser):
    opened = browser.new_page()
    problems = []
    opened.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("requestfailed", lambda r: problems.append(f"{r.url} {r.failure}"))
    opened.on(
        "request",
        lambda r: None if r.url.startswith(("http://127.0.0.1", "file:", "data:", "blob:"))
        else problems.append(f"asks for {r.url}"),
    )  # fmt: skip
    yield opened
    opened.close()
    assert problems == []


def _pages():
    return (
        sorted(p.relative_to(SITE).as_posix() for p in SITE.rglob("*.html"))
        if SITE.exists()
        else []
    )


@needs_site
@pytest.mark.parametrize("name", _pages())
def test_page_loads_without_an_error_or_a_dead_link(page, address, name):
    answer = page.goto(f"{address}/{name}")
    assert answer.ok
    links = page.eval_on_selector_all("a[href]", "all => all.map(a => a.href)")
    for link in {link.split("#")[0] for link in links if link.startswith(address)}:
        path = link.removeprefix(address).lstrip("/") or "index.html"
        assert (SITE / path).is_file() or (SITE / path / "index.html").is_file(), link
    if name not in ("404.html", "learn/slides.html"):
        assert page.locator("h1").count() == 1
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@needs_site
@pytest.mark.parametrize("name", ["index.html", "learn/layer.html", "learn/backward.html"])
def test_page_fits_a_phone(page, address, name):
    page.set_viewport_size({"width": 360, "height": 740})
    page.goto(f"{address}/{name}")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def playwright_timeout():
    return importlib.import_module("playwright.sync_api").TimeoutError


@needs_site
def test_site_works_from_disk(page):
    found = page.locator(".md-search-result__item").first
    for wait in (0, 1_000, 3_000):  # what is typed before the page's script has begun is lost
        page.goto((SITE / "learn" / "layer.html").as_uri())
        page.wait_for_timeout(wait)
        page.locator("input[name=query]").first.fill("momentum")
        try:
            found.wait_for(timeout=15_000)
        except playwright_timeout():
            continue
        break
    assert found.is_visible()


def _number(text):
    return float(text.replace("−", "-"))


@needs_site
def test_layer_widget_computes_what_the_library_does(page, address):
    page.goto(f"{address}/learn/layer.html")
    rng = np.random.default_rng(0)
    root = page.locator('[data-widget="layer"]')
    for eps in (1e-5, 0.5):
        x, gamma, beta = (
            rng.normal(size=(4, 3)).round(2),
            rng.normal(size=3).round(2),
            rng.normal(size=3).round(2),
        )
        for (i, j), value in np.ndenumerate(x):
            root.locator(f'[data-in="x{i}{j}"]').fill(str(value))
        for j in range(3):
            root.locator(f'[data-in="gamma{j}"]').fill(str(gamma[j]))
            root.locator(f'[data-in="beta{j}"]').fill(str(beta[j]))
        root.locator('[data-in="eps"]').fill(str(eps))
        y, saved = batchnorm.batch_norm(x, gamma, beta, eps=eps)
        for (i, j), value in np.ndenumerate(y):
            shown = root.locator(f'[data-out="y{i}{j}"]').inner_text()
            assert _number(shown) == pytest.approx(value, abs=6e-4)
        for j in range(3):
            of = {
                name: _number(root.locator(f'[data-out="{name}{j}"]').inner_text())
                for name in ("mean", "var")
            }
            assert of["mean"] == pytest.approx(saved.moments.mean[j], abs=6e-4)
            assert of["var"] == pytest.approx(saved.moments.var()[j], abs=6e-4)


@needs_site
def test_widget_shows_a_dash_where_there_is_no_number(page, address):
    page.goto(f"{address}/learn/layer.html")
    root = page.locator('[data-widget="layer"]')
    field = root.locator('[data-in="x00"]')
    field.fill("")
    assert root.locator('[data-out="y00"]').inner_text() == "–"
    assert root.locator('[data-out="y01"]').inner_text() != "–"
    assert field.get_attribute("aria-invalid") == "true"
    root.locator("[data-reset]").click()
    assert root.locator('[data-out="y00"]').inner_text() == "−1.342"


@needs_site
def test_graph_widget_computes_what_the_library_does(page, address):
    page.goto(f"{address}/learn/backward.html")
    root = page.locator('[data-widget="graph"]')
    rng = np.random.default_rng(1)
    x, g = rng.normal(size=4).round(2), rng.normal(size=4).round(2)
    for k in range(4):
        root.locator(f'[data-in="x{k}"]').fill(str(x[k]))
        root.locator(f'[data-in="g{k}"]').fill(str(g[k]))
    root.locator('[data-in="gamma"]').fill("-1.5")
    root.locator('[data-in="eps"]').fill("0.01")
    y, saved = batchnorm.batch_norm(x[:, None], [-1.5], [1.0], eps=0.01)
    grads = batchnorm.batch_norm_backward(g[:, None], saved)
    for k in range(4):
        for name, error in (("steps", 1e-6), ("line", 1e-6), ("differences", 2e-6)):
            shown = _number(root.locator(f'[data-out="{name}{k}"]').inner_text())
            assert shown == pytest.approx(grads[0][k, 0], abs=error)

    def on(kind, edge):
        text = root.locator(f'[data-{kind}="{edge}"]').text_content()
        return [_number(part) for part in text.split()]

    assert on("value", "y") == pytest.approx(y[:, 0], abs=6e-3)
    assert on("grad", "x") == pytest.approx(grads[0][:, 0], abs=6e-3)
    assert on("grad", "gamma-scaled") == pytest.approx(grads[1], abs=6e-3)
    assert on("grad", "beta-y") == pytest.approx(grads[2], abs=6e-3)
    # What flows up from x's two uses adds up to its gradient.
    both = np.add(on("grad", "x-mean"), on("grad", "x-centered"))
    assert both == pytest.approx(grads[0][:, 0], abs=1.1e-2)


@needs_site
def test_running_widget_computes_what_the_library_does(page, address):
    page.goto(f"{address}/learn/test-time.html")
    root = page.locator('[data-widget="running"]')
    stream = json.loads(root.get_attribute("data-stream"))
    for momentum, size, steps in ((0.1, 16, 60), (0.5, 4, 33), (1, 64, 200), (0.03, 2, 0)):
        for name, value in (("momentum", momentum), ("size", size), ("steps", steps)):
            root.locator(f'[data-in="{name}"]').fill(str(value))
        layer = batchnorm.BatchNorm(1, momentum=momentum, dtype=np.float64)
        for step in range(steps):
            rows = [stream[(step * size + k) % len(stream)] for k in range(size)]
            layer(np.array(rows)[:, None])
        for name, value in (("mean", layer.running_mean), ("std", np.sqrt(layer.running_var))):
            shown = _number(root.locator(f'[data-out="{name}"]').inner_text())
            assert shown == pytest.approx(float(value[0]), abs=6e-4)
        points = root.locator("[data-chart]").get_attribute("points").split()
        assert len(points) == steps + 1


@needs_site
def test_converter_widget_converts_back_and_forth(page, address):
    page.goto(f"{address}/learn/test-time.html")
    root = page.locator('[data-widget="converter"]')

    def shown(name):
        return float(root.locator(f'[data-out="{name}"]').inner_text())

    root.locator('[data-in="from"]').select_option("Keras")
    root.locator('[data-in="momentum"]').fill("0.99")
    root.locator('[data-in="variance"]').fill("3")
    root.locator('[data-in="n"]').fill("4")
    assert shown("momentum-PyTorch") == pytest.approx(0.01)
    assert shown("momentum-Flax") == 0.99
    assert shown("var-PyTorch") == pytest.approx(4.0)
    assert shown("var-ONNX") == 3.0


@needs_site
def test_widgets_work_by_keyboard(page, address):
    page.goto(f"{address}/learn/test-time.html")
    slider = page.locator('[data-widget="running"] [data-in="steps"]')
    before = page.locator('[data-widget="running"] [data-out="mean"]').inner_text()
    slider.focus()
    page.keyboard.press("ArrowRight")
    assert page.locator('[data-widget="running"] [data-out="mean"]').inner_text() != before


def test_site_needs_no_other_host():
    for path in {*(DOCS / "assets").iterdir()} - {*(DOCS / "assets").glob("*.png")}:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"(src|href|url\(|fetch\()\s*=?\s*[\"']?https?:", text), path


def test_slides_are_not_built_without_npx(monkeypatch, tmp_path):
    slides = _module("slides")
    monkeypatch.setattr(slides.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match="npx is needed"):
        slides.build(tmp_path)
