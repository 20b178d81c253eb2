# ruff: noqa: E402  # what needs an extra is imported once the extra is known to be there
import html
import io
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest

import batchnorm
from batchnorm.errors import ArgumentError, BatchNormError

for extra in ("rich", "mlxtend", "altair", "vl_convert", "threadpoolctl"):
    pytest.importorskip(extra)

from rich.console import Console

from batchnorm import demo
from batchnorm.demo.gradient_check import check_gradients
from batchnorm.demo.network import EPS, Network, cross_entropy, sigmoid
from batchnorm.demo.results import TrainingRun
from batchnorm.demo.tables import all_tables, comparisons
from batchnorm.demo.training import BINS, train
from batchnorm.digits import PIXELS, SIDE, Digits, ShiftedBatches, load_digits

STEPS = 20


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run of the whole demo: its result and what it printed."""
    out = tmp_path_factory.mktemp("demo") / "page.html"
    console = Console(file=io.StringIO(), width=100)
    result = demo.run(out=out, seed=3, steps=STEPS, console=console)
    return result, console.file.getvalue()


@pytest.fixture
def small_network():
    """A trained-looking float64 network with batch norm, and images to feed it."""
    rng = np.random.default_rng(0)
    network = Network((8, 6, 5, 3), batch_norm=True, rng=rng, weight_std=1.0, dtype=np.float64)
    for parameter in network.parameters():
        parameter.value += 0.3 * rng.standard_normal(parameter.value.shape)
    return network, rng.standard_normal((90, 8))


def test_run_measures_every_network_over_all_steps(finished):
    result, _ = finished
    assert result.steps == STEPS
    assert len(result.learning_rates) >= 3
    assert len(result.runs) == 2 * len(result.learning_rates)
    for run in result.runs:
        assert run.evaluated_steps[0] == 0
        assert run.evaluated_steps[-1] == STEPS
        assert len(run.evaluated_steps) == len(run.accuracies)
        assert all(0 <= accuracy <= 1 for accuracy in run.accuracies)
        assert all(sum(r.before) <= r.total for r in run.recordings)


def test_run_begins_both_networks_of_a_rate_at_the_same_weights():
    networks = [
        Network((4, 3, 2), batch_norm=flag, rng=np.random.default_rng(5)) for flag in (True, False)
    ]
    for one, other in zip(networks[0].layers, networks[1].layers, strict=True):
        np.testing.assert_array_equal(one.weight, other.weight)
    assert networks[0].layers[0].bias is None
    assert networks[1].layers[0].bias is not None


def test_run_folds_to_the_population_network_up_to_rounding(finished):
    result, _ = finished
    for row in result.inference:
        assert row.seconds_per_1000 > 0
        if row.form == "population":
            assert row.largest_difference == 0
        if row.form == "folded":
            # Logits of order 1 to 100 through four float32 layers.
            assert row.largest_difference < 1e-3


def test_run_prints_every_table_and_the_page_last(finished):
    result, printed = finished
    flat = " ".join(printed.split())
    for table in all_tables(result):
        assert table.title in flat
    assert printed.strip().splitlines()[-1] == f"Page written to {result.page}"


def test_page_loads_nothing_from_anywhere(finished):
    page = finished[0].page.read_text(encoding="utf-8")
    # One bundle and one script of our own: a stray end tag in either would make more.
    assert page.count("<script>") == page.count("</script>") == 2
    assert "cdn." not in page
    # The bundle holds the code of elements that it makes on demand, from data that is not here.
    own = re.sub(r"<script>.*?</script>", "", page, count=1, flags=re.DOTALL)
    assert not re.search(r"\s(src|href|srcset)\s*=|@import|url\(", own)
    assert not re.search(r"@[A-Z_]+@", own)
    addresses = set(re.findall(r"https?://[^\"'\s]+", own))
    assert all(address.startswith("https://vega.github.io/schema/") for address in addresses)
    assert len(page) < 3e6


def test_page_has_a_slider_over_training_and_every_table(finished):
    result, _ = finished
    page = result.page.read_text(encoding="utf-8")
    assert '"input":"range"' in page
    for table in all_tables(result):
        assert f"<table><caption>{html.escape(table.title)}</caption>" in page


def test_run_leaves_nothing_beside_the_page(finished):
    page = finished[0].page
    assert list(page.parent.iterdir()) == [page]


def _unwritable(tmp_path):
    return [
        (tmp_path, "a directory"),
        (tmp_path / "missing" / "page.html", "existing directory"),
        (Path(os.devnull), "not a regular file"),
    ]


@pytest.mark.parametrize("case", range(3))
def test_run_refuses_an_unusable_path_before_training(case, tmp_path, monkeypatch):
    out, reason = _unwritable(tmp_path)[case]
    monkeypatch.setattr(demo, "train", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(ArgumentError, match=reason):
        demo.run(out=out, steps=STEPS, console=Console(file=io.StringIO()))
    assert list(tmp_path.iterdir()) == []


def test_run_refuses_a_directory_it_cannot_write_in(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(ArgumentError, match=r"writable directory.*Permission denied"):
        demo.run(out=tmp_path / "page.html", steps=STEPS)


@pytest.mark.parametrize("steps", [9, 0, -5, 12.5, True])
def test_run_refuses_unusable_steps(steps, tmp_path):
    with pytest.raises(ArgumentError, match="steps must be a whole number of at least 10"):
        demo.run(out=tmp_path / "page.html", steps=steps)


def test_run_refuses_a_negative_seed(tmp_path):
    with pytest.raises(ArgumentError, match=r"seed must be .* at least 0, got -1"):
        demo.run(out=tmp_path / "page.html", seed=-1)


@pytest.mark.parametrize("missing", ["mlxtend", "altair", "vl_convert", "rich"])
def test_run_names_the_install_command_when_an_extra_is_missing(missing, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(BatchNormError, match=rf"{missing}\. .*the extra \[demo\]"):
        demo.run(out=tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []


def test_write_keeps_the_earlier_page_when_interrupted(tmp_path, monkeypatch):
    out = tmp_path / "page.html"
    out.write_text("earlier")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        demo._write(out, "later")
    assert out.read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [out]


def test_check_gradients_agrees_with_central_differences():
    errors = check_gradients(seed=0)
    kinds = {(error.batch_norm, error.kind) for error in errors}
    assert {(True, kind) for kind in ("weight", "gamma", "beta", "input")} <= kinds
    # Truncation h² and roundoff u/h are both near 1e-10; gradients are not much below 1e-2.
    assert max(error.relative_error for error in errors) < 1e-6


def test_check_gradients_notices_a_wrong_backward(monkeypatch):
    monkeypatch.setattr("batchnorm.demo.network.sigmoid_gradient", lambda grad_y, y: grad_y * y)
    assert max(error.relative_error for error in check_gradients(seed=0)) > 1e-2


def test_population_statistics_are_those_of_all_data_layer_by_layer(small_network):
    network, x = small_network
    # Uneven batches: an average of batch statistics would be wrong.
    measured = network.with_population_statistics([x[:7], x[7:40], x[40:]])
    current = x
    for layer, original in zip(measured.layers[:-1], network.layers[:-1], strict=True):
        u = current @ original.weight.T
        mean, var = u.mean(axis=0), u.var(axis=0, ddof=1)
        np.testing.assert_allclose(layer.norm.running_mean, mean, rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(layer.norm.running_var, var, rtol=1e-12)
        y = original.norm.gamma * (u - mean) / np.sqrt(var + EPS) + original.norm.beta
        current = 1 / (1 + np.exp(-y))


def test_population_statistics_leave_the_measured_network_alone(small_network):
    network, x = small_network
    network.with_population_statistics([x])
    assert all(np.all(norm.running_mean == 0) for norm in network.norms)


def test_folded_network_equals_the_frozen_one(small_network):
    network, x = small_network
    frozen = network.with_population_statistics([x])
    folded = frozen.folded()
    assert folded.norms == []
    np.testing.assert_allclose(folded(x), frozen(x), rtol=0, atol=1e-12)


def test_pre_activations_are_normalized_and_move_no_running_average(small_network):
    network, x = small_network
    before, after = network.pre_activations(x)
    norm = network.norms[-1]
    moments = batchnorm.Moments.of(after)
    np.testing.assert_allclose(moments.mean, norm.beta, atol=1e-12)
    assert before.shape == after.shape == (90, 5)
    assert norm.num_batches_tracked == 0
    assert np.all(norm.running_mean == 0)


def test_sigmoid_saturates_without_overflow():
    x = np.array([-1e4, -1.0, 0.0, 1.0, 1e4], dtype=np.float32)
    expected = [0, 1 / (1 + np.exp(1)), 0.5, 1 / (1 + np.exp(-1)), 1]
    np.testing.assert_allclose(sigmoid(x), expected, atol=1e-7)


def test_cross_entropy_of_equal_logits_is_the_log_of_the_classes():
    loss, grad = cross_entropy(np.full((2, 4), 1e4), np.array([0, 3]))
    assert loss == pytest.approx(np.log(4))
    np.testing.assert_allclose(grad[0], np.array([-0.75, 0.25, 0.25, 0.25]) / 2)


def test_load_digits_splits_evenly_and_normalizes_by_the_training_part():
    digits = load_digits(np.random.default_rng(0))
    assert digits.train_images.shape == (4000, PIXELS)
    assert np.bincount(digits.test_labels).tolist() == [100] * 10
    moments = batchnorm.Moments.of(digits.train_images.reshape(-1, 1))
    # Rounding of 3 million float32 values, nearly all of them alike.
    np.testing.assert_allclose([moments.mean[0], moments.var()[0]], [0, 1], atol=1e-6)
    assert digits.train_images.min() == np.float32(digits.background)


def _tiny_digits():
    rng = np.random.default_rng(0)
    images = rng.standard_normal((30, PIXELS)).astype(np.float32)
    labels = np.arange(30) % 10
    return Digits(images, labels, images, labels, background=-1.0)


def _batches(digits, seed=0):
    return ShiftedBatches(
        digits.train_images,
        digits.train_labels,
        batch_size=10,
        background=digits.background,
        rng=np.random.default_rng(seed),
    )


def test_shifted_batches_hold_each_image_once_an_epoch_moved_by_at_most_two_pixels():
    digits = _tiny_digits()
    stream = iter(_batches(digits))
    seen = []
    for _ in range(3):
        images, _labels = next(stream)
        for image in images.reshape(-1, SIDE, SIDE):
            padded = np.pad(image, 2, constant_values=np.nan)
            for source, original in enumerate(digits.train_images.reshape(-1, SIDE, SIDE)):
                # The middle 24×24 pixels survive every shift.
                middle = original[2:-2, 2:-2]
                if any(
                    np.array_equal(padded[i : i + 24, j : j + 24], middle)
                    for i in range(2, 7)
                    for j in range(2, 7)
                ):
                    seen.append(source)
    assert sorted(seen) == list(range(30))


def test_shifted_batches_population_holds_every_shift_once():
    digits = _tiny_digits()
    shifts = list(_batches(digits).population())
    assert len(shifts) == 25
    assert len({part.tobytes() for part in shifts}) == 25
    np.testing.assert_array_equal(shifts[12], digits.train_images)


def test_train_repeats_itself_for_the_same_seed():
    digits = _tiny_digits()

    def accuracies():
        network = Network((PIXELS, 20, 10), batch_norm=True, rng=np.random.default_rng(1))
        run = train(
            network, _batches(digits), digits,
            batch_norm=True, learning_rate=0.5, steps=30, on_evaluation=lambda *_: None,
        )  # fmt: skip
        return run.accuracies, run.recordings

    assert accuracies() == accuracies()


def test_histogram_bins_count_what_lies_inside():
    x = np.array([[-41.0, -40.0, -39.96], [0.01, 39.99, 40.0]])
    counts = BINS.counts(x)
    assert len(counts) == BINS.count
    assert (counts[0], counts[800], counts[-1], sum(counts)) == (2, 1, 1, 4)


def _comparison(finished, with_norm, without):
    result, _ = finished
    steps = (0, 100, 200)
    runs = tuple(
        TrainingRun(flag, 1.0, steps, accuracies, (), 1.0)
        for flag, accuracies in ((True, with_norm), (False, without))
    )
    return comparisons(type(result)(**{**vars(result), "runs": runs}))[0]


def test_comparisons_say_what_was_measured_whichever_network_wins(finished):
    slower = _comparison(finished, (0.1, 0.5, 0.85), (0.1, 0.85, 0.88))
    assert "80% in 200 steps with batch norm and 100 without, a factor of 2.0" in slower
    only_without = _comparison(finished, (0.1, 0.5, 0.6), (0.1, 0.85, 0.92))
    assert "90% in 200 steps without batch norm, never with" in only_without
    neither = _comparison(finished, (0.1, 0.2, 0.3), (0.1, 0.4, 0.2))
    assert "neither network reached 80%; the best was 40.0%" in neither
