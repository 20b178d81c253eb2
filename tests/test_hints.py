"""hints: what they find, what they leave alone, and the page of a data set's features."""

import importlib.util
import json
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from batchnorm import dataset
from batchnorm.dataset import hints
from batchnorm.dataset.hints import CODES, FLOAT32, LOST, axis_hint
from batchnorm.errors import ArgumentError


def _measure(x, **options):
    return dataset.measure(np.asarray(x), missing="skip", extremes=True, **options)


def _kinds(x, **options):
    return [hint.kind for hint in hints(_measure(x, **options))]


def _beside_normal(rng, *columns):
    """Columns to look at, and one in which nothing is wrong."""
    return np.column_stack([*columns, rng.normal(size=len(columns[0]))])


# ---- the axis -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "axis", "remedy"),
    [
        ((1000, 224, 224, 3), 1, -1),
        ((1000, 32, 32, 3), 1, -1),
        ((1797, 8, 8, 1), 1, -1),
        ((50, 480, 640, 4), 1, -1),
        ((10, 16, 112, 112, 3), 1, -1),  # videos
        ((480, 640, 3), 1, -1),  # one photo
        ((1000, 128, 3), 1, -1),  # sequences
        ((1000, 60, 1), 1, -1),
        ((1000, 3, 224, 224), -1, 1),
        ((1000, 1, 28, 28), 3, 1),
    ],
)
def test_hint_axis_when_another_axis_looks_like_channels(shape, axis, remedy):
    hint = axis_hint(shape, axis)
    assert hint.kind == "axis"
    assert f"channel_axis={remedy}, --channel-axis {remedy}." in hint.remedy
    assert f"gives {shape[axis]} features" in hint.what


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((1000, 3), 1),
        ((3, 1_000_000), 1),
        ((1000, 3), 0),
        ((1000, 3, 224, 224), 1),
        ((1000, 224, 224, 3), -1),
        ((1000, 224, 224, 3), 3),
        ((1000, 64, 56, 56), 1),
        ((1000, 512, 4, 4), 1),
        ((1000, 64, 8, 4), 1),
        ((1000, 512, 1, 1), 1),
        ((1000, 16, 8, 4), 1),
        ((1000, 64, 1000, 1), 1),  # electrodes and time
        ((1000, 64, 500), 1),
        ((1000, 3, 128), 1),
        ((1000, 3, 128), -1),
        ((1000, 8, 4), 1),
        ((1000, 224, 224, 3), 2),  # chosen on purpose
        ((1000, 3, 224, 224), 2),
        ((1000, 4, 4, 3), 1),
        ((10, 4, 112, 112, 3), 1),
        ((10, 64, 64, 0), 1),
        ((0, 224, 0, 0), 1),
        ((5,), 0),
        ((), 0),
    ],
)
def test_hint_axis_is_silent_when_the_shape_may_be_meant(shape, axis):
    assert axis_hint(shape, axis) is None


def _images(kind, folder):
    x = np.zeros((4, 32, 32, 3), np.float32)
    if kind == "file":
        np.save(folder / "x.npy", x)
        return folder / "x.npy"
    if kind == "dask":
        return pytest.importorskip("dask.array").from_array(x)
    return [x[:2], x[2:]] if kind == "batches" else x


@pytest.mark.parametrize("kind", ["array", "file", "batches", "dask"])
def test_measure_notes_a_wrong_axis_once(kind, tmp_path):
    source, said = _images(kind, tmp_path), []
    found = dataset.measure(source, note=said.append)
    assert found.features == 32
    assert len(said) == 1
    assert "axis 1 gives 32 features" in said[0]
    assert said[0].startswith({"file": str(tmp_path), "batches": "batch 0"}.get(kind, "x"))


def test_measure_notes_a_wrong_axis_before_it_reads():
    def stop(text):
        raise KeyboardInterrupt(text)

    with pytest.raises(KeyboardInterrupt, match="channel_axis=-1"):
        dataset.measure(np.full((4, 32, 32, 3), np.nan), note=stop)


def test_hints_begin_with_the_axis_when_given_the_shape():
    x = np.ones((4, 32, 32, 3))
    found = dataset.measure(x)
    assert [hint.kind for hint in hints(found, shape=x.shape)] == ["axis", "constant"]
    assert [hint.kind for hint in hints(found)] == ["constant"]


# ---- what is found ------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, 0.1, -7.0, 1e300, 1e-300])
def test_hint_constant(rng, value):
    (hint,) = hints(dataset.measure(_beside_normal(rng, np.full(1000, value))))
    assert hint.kind == "constant"
    assert hint.features == (0,)
    assert str(hint).startswith("1 of 2 features is constant: feature 0. ")


def test_hint_names_a_few_features_and_counts_the_others():
    x = np.ones((3, 8))
    x[0, 7] = 2
    found = replace(dataset.measure(x), names=(*"abcdef", "long" * 99, "h"))
    (hint,) = hints(found)
    assert hint.what == "7 of 8 features are constant: 'a', 'b', 'c', 'd', 'e' and 2 more."
    assert hint.features == tuple(range(7))
    (hint,) = hints(replace(found, names=("long" * 99, *"bcdefgh")))
    assert len(hint.what) < 120


def test_hint_missing_and_empty(rng):
    x = rng.normal(size=(100, 3))
    x[:51, 0] = np.nan
    x[:50, 1] = np.nan
    x[:, 2] = np.nan
    empty, missing = hints(_measure(x))
    assert (empty.kind, empty.features) == ("empty", (2,))
    assert (missing.kind, missing.features) == ("missing", (0,))
    assert "feature 0 (51%)" in missing.what


def test_hint_empty_when_there_are_no_rows():
    assert _kinds(np.zeros((0, 3))) == ["empty"]


def test_hint_float32_says_when_a_normalized_value_is_off_by_a_hundredth(rng):
    """The bound on the error is the one that float32 reaches."""
    x = rng.normal(size=100_000)
    for ratio, expected in ((0.5 * LOST / FLOAT32, []), (2 * LOST / FLOAT32, ["float32"])):
        column = ratio + x
        assert _kinds(_beside_normal(rng, column)) == expected
        rounded = (column.astype(np.float32).astype(float) - column) / column.std()
        assert 0.4 * ratio * FLOAT32 < np.abs(rounded).max() < 1.01 * ratio * FLOAT32


def test_hint_float32_remedy_keeps_the_spread(rng):
    x = 1.7e9 + 100 * rng.normal(size=(1000, 1))
    found = dataset.measure(x)
    assert "more than a standard deviation" in hints(found)[0].remedy
    y = dataset.normalize(x, found, dtype=np.float32)
    assert np.abs(y - (x - x.mean()) / x.std()).max() < 1e-5
    assert np.unique(x.astype(np.float32)).size < 20


def test_hint_float64_when_a_constant_was_computed_in_two_ways(rng):
    column = np.full(1000, 0.3)
    column[::2] = 0.1 + 0.2
    assert _kinds(_beside_normal(rng, column)) == ["float64"]


@pytest.mark.parametrize("size", [100, 10_000, 1_000_000])
@pytest.mark.parametrize("sign", [-1, 1])
def test_hint_outlier_when_a_value_is_mistyped(rng, size, sign):
    column = rng.normal(10, 1, size)
    column[7] = sign * 1e5
    (hint,) = hints(_measure(_beside_normal(rng, column)))
    assert (hint.kind, hint.features) == ("outlier", (0,))
    assert f"feature 0 ({sign * 100000})" in hint.what


@pytest.mark.parametrize("value", [1e5, 3e9, 3e12])
def test_hint_outlier_among_counts_with_zeros(rng, value):
    column = rng.poisson(2, 10_000).astype(float)
    column[0] = value
    assert _kinds(_beside_normal(rng, column)) == ["outlier"]


@pytest.mark.parametrize("share", [0.0001, 0.01, 0.2])
@pytest.mark.parametrize("code", [-999, -9999, 9999, 1e9, 1e20, -1e30, 3.4028234663852886e38])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_hint_code_for_missing_values(rng, code, share, dtype):
    column = rng.normal(20, 5, 10_000)
    column[: int(share * column.size)] = code
    (hint,) = hints(_measure(_beside_normal(rng, column).astype(dtype)))
    assert (hint.kind, hint.features) == ("code", (0,))
    assert re.search(rf"feature 0 \({re.escape(f'{code:.8g}'[:6])}", hint.what)


def test_hint_code_is_told_in_the_units_of_the_data(rng):
    column = rng.normal(20, 5, 1000)
    column[0] = -999
    (hint,) = hints(_measure(_beside_normal(rng, column), scale=3))
    assert hint.kind == "code"
    assert "(-999)" in hint.what


def test_hint_constant_alone_when_the_constant_is_a_code(rng):
    assert _kinds(_beside_normal(rng, np.full(1000, -999.0))) == ["constant"]


@pytest.mark.parametrize(("dtype", "most"), [("uint8", 255), ("uint16", 65535)])
def test_hint_scale_for_images_of_whole_numbers(rng, dtype, most):
    x = rng.integers(0, most, (20, 3, 64, 64), endpoint=True).astype(dtype)
    x[0, :, 0, :2] = [0, most]
    (hint,) = hints(_measure(x))
    assert hint.kind == "scale"
    assert f"scale={most}, --scale {most}." in hint.remedy
    assert _kinds(x, scale=most) == []


def test_hint_eps_says_what_normalization_makes_of_a_small_spread(rng):
    x = rng.normal(0, 1e-3, (1000, 1))
    (hint,) = hints(found := _measure(x))
    assert hint.kind == "eps"
    std = dataset.normalize(x, found).std()
    assert f"becomes {std:.2g} instead" in hint.remedy
    assert dataset.normalize(x, found, eps=1e-12).std() == pytest.approx(1, abs=1e-5)


# ---- what is left alone -------------------------------------------------------------------------

DRAWS = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "normal far from zero": lambda rng, shape: rng.normal(1000, 1, shape),
    "uniform": lambda rng, shape: rng.uniform(0, 255, shape),
    "exponential": lambda rng, shape: rng.exponential(size=shape),
    "student": lambda rng, shape: rng.standard_t(4, size=shape),
    "log-normal": lambda rng, shape: rng.lognormal(size=shape),
    "counts": lambda rng, shape: rng.poisson(3, shape).astype(float),
    "thousands": lambda rng, shape: rng.integers(-1000, 1000, shape).astype(float),
}


@pytest.mark.parametrize("size", [1, 2, 5, 20, 100, 1000, 100_000])
@pytest.mark.parametrize("name", DRAWS)
def test_hints_are_silent_on_healthy_data(rng, name, size):
    x = DRAWS[name](rng, (size, 10))
    constant = np.ptp(x, axis=0) == 0  # small counts may be
    assert _kinds(x[:, ~constant] if size > 1 else x) == []


@pytest.mark.parametrize("size", [100, 10_000, 1_000_000])
@pytest.mark.parametrize("count", [1, 2, 3, 50])
def test_hints_are_silent_on_indicators_and_sparse_features(rng, size, count):
    ones, amounts = np.zeros((2, size))
    ones[:count] = 1
    amounts[:count] = rng.exponential(size=count)
    assert _kinds(_beside_normal(rng, ones, amounts, 1 - ones)) == []


@pytest.mark.parametrize("constant", [0.1, -1 / 3, 1e6 + 0.1])
@pytest.mark.parametrize("size", [101, 9973, 999_983])
def test_hints_see_no_outlier_when_one_value_differs_from_a_constant(rng, constant, size):
    column = np.full(size, constant)
    column[0] = constant + 7.3
    assert "outlier" not in _kinds(_beside_normal(rng, column))


def test_hints_are_silent_on_images_that_were_divided(rng):
    assert _kinds(rng.integers(0, 256, (20, 3, 64, 64)) / 255) == []


def test_hints_are_silent_on_columns_that_happen_to_reach_255(rng):
    found = _measure(rng.integers(0, 256, (10_000, 2)))
    assert [hint.kind for hint in hints(found)] == ["scale"]
    assert hints(replace(found, names=("red", "green"))) == []


@pytest.mark.parametrize("code", CODES)
def test_hints_are_silent_on_codes_that_belong_to_the_data(rng, code):
    column = code + np.abs(code) * rng.uniform(-1, 1, 1000)
    column[0] = code * 2  # the code is not at the end of the range, or not far from the rest
    assert "code" not in _kinds(_beside_normal(rng, column, code * rng.uniform(0, 1, 1000)))


def test_hints_need_extremes_for_outliers(rng):
    column = rng.normal(size=1000)
    column[0] = 1e6
    assert hints(dataset.measure(column[:, None])) == []


# ---- the page -----------------------------------------------------------------------------------

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_browser = pytest.mark.skipif(
    BROWSER is None or importlib.util.find_spec("playwright") is None,
    reason="needs playwright and Chromium",
)
PAGES = ("table", "images", "pixels", "plain", "none")


def _found(name):
    """Statistics of data of one kind."""
    rng = np.random.default_rng(0)
    if name == "table":
        x = rng.normal(size=(1000, 6)) * 10.0 ** np.arange(6)
        x[:, 0], x[:700, 1], x[:, 2], x[0, 3] = 7, np.nan, np.nan, -1e9
        alike = (f"{'a' * 150}{k}{'a' * 150}" for k in range(2))
        names = ("age", "score <b>", 'a "quoted", name', "price", *alike)
        return replace(_measure(x), names=names, files=("data/a.csv", "data/b<i>.csv"))
    if name == "images":
        found = _measure(rng.integers(0, 256, (20, 3, 16, 16)), scale=255)
        report = SimpleNamespace(rows=lambda: [("darkest", "a/<1>.png (0.25), b.png (0.5)")])
        object.__setattr__(found, "images", report)  # as of a folder of images
        return found
    if name == "pixels":
        return _measure((rng.random((50, 784)) * rng.random(784) * 250).astype(np.uint8))
    return dataset.measure(rng.normal(size=(50, 4)) if name == "plain" else np.zeros((0, 2)))


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    pytest.importorskip("altair")
    pytest.importorskip("vl_convert")
    folder = tmp_path_factory.mktemp("features")
    for name in PAGES:
        notes = ["skipped 2 <files>"] if name == "table" else []
        _found(name).report(folder / f"{name}.html", notes=notes)
    return folder


def _read(pages, name):
    """The page without its scripts, and its data."""
    text = (pages / f"{name}.html").read_text(encoding="utf-8")
    data = json.loads(re.search(r"^const data = (.*);$", text, re.M)[1].replace("<\\/", "</"))
    return re.sub(r"<script>.*?</script>", "", text, flags=re.S), data


def test_page_shows_title_counts_files_notes_and_hints(pages):
    text, _ = _read(pages, "table")
    assert "<h1>data</h1>" in text
    assert "6 features, 0 to 1,000 values each; 28 % of all values missing." in text
    assert "<li>data/b&lt;i&gt;.csv</li>" in text
    assert "skipped 2 &lt;files&gt;" in text
    for hint in hints(_found("table")):
        assert hint.kind in ("empty", "missing", "constant", "code")
        assert hint.remedy.replace("'", "&#x27;") in text
    assert "<b>" not in text
    assert "<i>" not in text


def test_page_holds_every_digit_of_each_feature(pages):
    found, (_, data) = _found("table"), _read(pages, "table")
    columns = data["columns"]
    seen = found.count > 0
    for name, values in (
        ("mean", found.mean), ("std", found.std()), ("count", found.count),
        ("missing", found.missing), ("min", found.extremes[0]), ("max", found.extremes[1]),
    ):  # fmt: skip
        assert [v for v, s in zip(columns[name], seen, strict=True) if s] == values[seen].tolist()
    assert columns["mean"][2] is None
    assert data["marks"] == ["constant", "missing", "empty", "code", "", ""]
    assert len(set(columns["name"])) == 6
    assert max(map(len, columns["name"])) < 100


def test_page_of_healthy_data_says_so(pages):
    text, data = _read(pages, "plain")
    assert "Nothing looks wrong." in text
    assert "Extremes were not measured" in text
    assert data["marks"] == []
    assert "min" not in data["columns"]


def test_page_of_images_shows_the_line_for_torchvision_and_tables(pages):
    found, (text, _) = _found("images"), _read(pages, "images")
    line = re.search(r"transforms\.Normalize\(mean=(\[.*\]), std=(\[.*\])\)", text)
    np.testing.assert_allclose(json.loads(line[1]), found.mean, rtol=1e-5)
    np.testing.assert_allclose(json.loads(line[2]), found.std(), rtol=1e-5)
    assert "divided by 255 first" in text
    assert "<th>darkest</th><td>a/&lt;1&gt;.png (0.25), b.png (0.5)</td>" in text
    assert "transforms.Normalize" not in _read(pages, "plain")[0]


def test_page_loads_nothing_from_elsewhere(pages):
    text = (pages / "table.html").read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|href)="https?:', text)


def test_page_of_many_features_stays_below_three_megabytes(tmp_path, rng):
    pytest.importorskip("altair")
    x = rng.normal(size=(3, 50_000))
    x[:, 40_000] = 5
    names = tuple(f"a name of some length for feature number {k}" for k in range(50_000))
    replace(_measure(x), names=names).report(tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < 3_000_000
    text, data = _read(tmp_path, "page")
    assert "holds 5,000 of them" in text
    at = data["columns"]["name"].index(names[40_000])
    assert data["marks"][at] == "constant"
    assert data["columns"]["name"][:4900] == list(names[:4900])


def test_page_is_whole_or_not_written(tmp_path, monkeypatch):
    pytest.importorskip("altair")
    found = _found("plain")
    with pytest.raises(ArgumentError, match="is not one"):
        found.report(tmp_path / "missing" / "page.html")
    (tmp_path / "page.html").write_text("before")
    monkeypatch.setattr("os.replace", None)
    with pytest.raises(TypeError):
        found.report(tmp_path / "page.html")
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]
    assert (tmp_path / "page.html").read_text() == "before"


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
    opened.goto(page.as_uri())
    opened.wait_for_selector("body[data-ready]", timeout=30_000)
    return opened, said


@needs_browser
@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 360])
def test_page_opens_without_a_word_and_fits(pages, browser, name, scheme, width):
    page, said = _open(
        browser,
        pages / f"{name}.html",
        viewport={"width": width, "height": 800},
        color_scheme=scheme,
    )
    assert said == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.locator("#rows svg").count() == (name != "none")
    assert page.locator("#overview svg").count() == (name == "pixels")
    assert page.locator("#table tbody tr").count() == min(_found(name).features, 40)
    page.close()


@needs_browser
def test_page_orders_finds_and_turns(pages, browser):
    found = _found("pixels")
    page, said = _open(browser, pages / "pixels.html")

    def first():
        return page.text_content("#table tbody td")

    assert (first(), page.text_content("#at")) == ("0", "1–40 of 784")
    page.select_option("#order", "mean")
    page.wait_for_function("document.querySelector('#table td').textContent !== '0'")
    order = np.argsort(-found.mean, kind="stable")
    assert first() == str(order[0])
    page.click("#next")
    page.wait_for_function("document.getElementById('at').textContent === '41–80 of 784'")
    assert first() == str(order[40])
    page.locator("#overview").click(position={"x": 700, "y": 50})
    page.wait_for_function("document.getElementById('at').textContent !== '41–80 of 784'")
    page.fill("#find", "783")
    page.wait_for_function("document.getElementById('at').textContent === '1–1 of 1'")
    assert first() == "783"
    page.check("#digits")
    assert page.text_content("#table tbody tr td:nth-child(2)") == repr(float(found.mean[783]))
    assert said == []
    page.close()


@needs_browser
def test_page_copies_all_features_with_every_digit(pages, browser):
    found = _found("table")
    page, _ = _open(browser, pages / "table.html")
    page.evaluate("navigator.clipboard.writeText = text => { window.copied = text; }")
    page.click("[data-copy=csv]")
    lines = page.evaluate("window.copied").splitlines()
    assert lines[0] == "name,count,missing,mean,std,min,max"
    numbers = [found.mean[3], found.std()[3], *found.extremes[:, 3]]
    assert lines[4].startswith("price,1000,0,")
    assert [float(v) for v in lines[4].split(",")[3:]] == numbers
    assert lines[3] == '"a ""quoted"", name",0,1000,,,,'
    page.close()
