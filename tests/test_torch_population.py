"""recalibrate: population statistics, equal to brute force, and everything else as it was."""

import copy
import gc
import importlib
import json
import math
import random
import signal
import sys
import threading
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn.modules import module as torchs_module  # noqa: E402
from torch.nn.modules.batchnorm import _BatchNorm  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

import batchnorm.torch  # noqa: E402
from batchnorm.errors import ArgumentError, ShapeError  # noqa: E402
from batchnorm.torch import (  # noqa: E402
    BatchNorm1d,
    BatchNorm2d,
    NonFiniteError,
    SynchronizationError,
    convert,
    freeze,
    population,
    recalibrate,
)
from ranks import Ranks  # noqa: E402

methods = pytest.mark.parametrize("method", ["precise", "exact"])
libraries = pytest.mark.parametrize("library", [batchnorm.torch, nn], ids=["ours", "torch"])

# Means and variances of some hundred values of size below 100 in float64, each by another order of
# summation, through at most 9 layers that pass errors on by factors of a few.
FLOAT64 = {"rtol": 1e-10, "atol": 1e-10}
UNEVEN = [64, 64, 2, 64, 9]
BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
WIDTH = 16


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors here are too small to be worth more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def randn():
    """randn(*shape): float64 from one seed."""
    generator = torch.Generator().manual_seed(20150211)
    return lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def batches(randn):
    """Inputs at mean 20, in uneven batches whose means differ."""
    return [2 * randn(n, WIDTH) + 20 + k for k, n in enumerate(UNEVEN)]


def _deep(library=nn, depth=8):
    torch.manual_seed(0)
    layers = []
    for _ in range(depth):
        layers += [
            nn.Linear(WIDTH, WIDTH),
            library.BatchNorm1d(WIDTH),
            nn.ReLU(),
            nn.Dropout(0.3),
        ]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 3)).double()


def _norms(model):
    return [m for m in model.modules() if isinstance(m, _BatchNorm)]


def _statistics(model):
    return [(layer.running_mean, layer.running_var) for layer in _norms(model)]


def _brute_force(model, batches):
    """All data in float64, layer after layer, through those that are done."""
    model = copy.deepcopy(model).eval()
    x = torch.cat(batches).double()
    with torch.no_grad():
        for layer in _norms(model):
            handle = layer.register_forward_pre_hook(_take)
            with pytest.raises(_Taken) as taken:
                model(x)
            handle.remove()
            x_in = taken.value.x
            axes = [a for a in range(x_in.dim()) if a != 1]
            layer.running_mean.copy_(x_in.mean(axes))
            layer.running_var.copy_(x_in.var(axes))
    return _statistics(model)


class _Taken(Exception):
    def __init__(self, x):
        super().__init__()
        self.x = x


def _take(layer, args):
    raise _Taken(args[0])


def _inputs(model, batches):
    """All inputs of each layer, put together."""
    inputs = {layer: [] for layer in _norms(model)}
    handles = [
        layer.register_forward_pre_hook(lambda m, args: inputs[m].append(args[0]))
        for layer in inputs
    ]
    with torch.no_grad():
        for x in batches:
            model(x)
    for handle in handles:
        handle.remove()
    return {layer: torch.cat(parts) for layer, parts in inputs.items()}


def _in_batch_mode(model, batches):
    """Statistics of each layer's inputs while every layer normalizes by the batch."""
    model = copy.deepcopy(model).eval()
    for layer in _norms(model):
        layer.train()
    together = (x.movedim(1, 0).flatten(1) for x in _inputs(model, batches).values())
    return [(x.mean(1), x.var(1)) for x in together]


def _assert_equal(statistics, expected, **bound):
    assert len(statistics) == len(expected)
    for k, (ours, theirs) in enumerate(zip(statistics, expected, strict=True)):
        for a, b, what in zip(ours, theirs, ("mean", "variance"), strict=True):
            torch.testing.assert_close(
                a, b, **(bound or FLOAT64), msg=lambda m, k=k, what=what: f"{what} {k}: {m}"
            )


def _error(statistics, expected):
    """Largest error over layers and channels: of means in deviations, of variances relative."""
    return max(
        max(
            float(((mean - true_mean).abs() / true_var.sqrt()).max()),
            float(((var - true_var).abs() / true_var).max()),
        )
        for (mean, var), (true_mean, true_var) in zip(statistics, expected, strict=True)
    )


# ---- values -------------------------------------------------------------------------------------


@libraries
def test_recalibrate_exact_equals_brute_force(library, batches):
    model = _deep(library)
    expected = _brute_force(model, batches)
    recalibrate(model, batches, method="exact")
    _assert_equal(_statistics(model), expected)


def test_recalibrate_exact_is_right_where_others_are_far_off(monkeypatch):
    if not BENCHMARKS.exists():
        pytest.skip("no benchmarks in this installation")
    monkeypatch.syspath_prepend(BENCHMARKS)
    rows, _ = importlib.import_module("recalibrate").measure_errors()
    errors = {}
    for row in rows:
        errors.setdefault(row.estimator, []).append(row.error)
    worst = {name: max(found) for name, found in errors.items()}
    others = {name: error for name, error in worst.items() if name not in ("exact", "precise")}
    assert set(others) == {"running averages", "update_bn", "fvcore"}
    assert worst["exact"] < 1e-4 < 0.1 < worst["precise"] < min(others.values())


def test_sweeps_over_all_layers_at_once_diverge_until_there_is_one_for_each_layer(batches):
    model = _deep().eval()
    x, expected = torch.cat(batches), _brute_force(model, batches)
    errors = []
    for _ in _norms(model):
        given = _inputs(model, [x])
        for layer in _norms(model):
            layer.running_mean.copy_(given[layer].mean(0))
            layer.running_var.copy_(given[layer].var(0))
        errors.append(_error(_statistics(model), expected))
    assert max(errors[1:]) > 1000 * errors[0] > 1
    assert min(errors[:-1]) > 1
    assert errors[-1] < 1e-12


@libraries
def test_recalibrate_precise_measures_all_values_while_layers_normalize_by_the_batch(
    library, batches
):
    model = _deep(library)
    expected = _in_batch_mode(model, batches)
    recalibrate(model, batches)
    _assert_equal(_statistics(model), expected)


def test_recalibrate_precise_measures_the_first_layer_exactly(batches):
    layer = nn.BatchNorm1d(WIDTH).double()
    recalibrate(layer, batches)
    x = torch.cat(batches)
    _assert_equal(_statistics(layer), [(x.mean(0), x.var(0))])


def test_recalibrate_precise_normalizes_by_the_batch_as_exactly_as_the_layer(randn):
    model = nn.Sequential(BatchNorm1d(3), BatchNorm1d(3))
    recalibrate(model, [(randn(64, 3) + 1e4).float() for _ in range(3)])
    # By a batch's mean rounded to float32, off by up to 2⁻²⁴ of 1e4, y would be off by 5e-4.
    assert float(model[1].running_mean.abs().max()) < 1e-6


@methods
def test_recalibrate_rounds_once_to_float32(method, batches):
    layer = BatchNorm1d(WIDTH)
    batches = [x.float() for x in batches]
    recalibrate(layer, batches, method=method)
    x = torch.cat(batches).double()
    torch.testing.assert_close(layer.running_mean, x.mean(0).float(), rtol=2**-23, atol=0)
    torch.testing.assert_close(layer.running_var, x.var(0).float(), rtol=2**-23, atol=0)


@pytest.mark.parametrize("memory", [0, 1, 20_000, 40_000, 2 << 30, math.inf])
def test_recalibrate_exact_gives_the_same_with_any_memory(memory, batches):
    model = _deep()
    expected = _brute_force(model, batches)
    recalibrate(model, batches, method="exact", memory=memory)
    _assert_equal(_statistics(model), expected)


def test_recalibrate_exact_runs_each_batch_once_and_one_again_with_memory(batches):
    report = recalibrate(_deep(), batches, method="exact")
    assert report.forwards == len(batches) + 1


def test_recalibrate_exact_runs_prefixes_without_memory(batches):
    model = _deep(depth=4)
    calls = []
    for k in range(4):
        model[4 * k].register_forward_hook(lambda *_, k=k: calls.append(k))
    report = recalibrate(model, batches, method="exact", memory=0)
    # Up to each of four layers, and once to the end, to see that there is no other.
    assert report.forwards == 5 * len(batches)
    assert [calls.count(k) for k in range(4)] == [5 * len(batches) - k * 5 for k in range(4)]


def test_recalibrate_exact_keeps_as_many_batches_as_memory_allows(batches):
    some, none = (
        recalibrate(_deep(), batches, method="exact", memory=memory) for memory in (40_000, 0)
    )
    assert len(batches) + 1 < some.forwards < none.forwards


def test_recalibrate_exact_lets_no_more_batches_wait_than_there_may_be_threads(
    batches, monkeypatch
):
    most = []
    start = threading.Thread.start
    monkeypatch.setattr(population.system, "_MOST_THREADS", 2)
    monkeypatch.setattr(
        threading.Thread, "start", lambda t: (start(t), most.append(threading.active_count()))[0]
    )
    before = threading.active_count()
    model = _deep()
    expected = _brute_force(model, batches)
    recalibrate(model, batches, method="exact")
    assert max(most) == before + 2
    _assert_equal(_statistics(model), expected)


def test_recalibrate_exact_does_without_threads_that_the_system_refuses(batches, monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    model = _deep()
    expected = _brute_force(model, batches)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    recalibrate(model, batches, method="exact")
    _assert_equal(_statistics(model), expected)


def test_recalibrate_exact_counts_a_part_of_a_larger_tensor_as_what_it_is(batches):
    parts = torch.cat(batches).split(UNEVEN)
    apart, together = (
        recalibrate(_deep(), data, method="exact", memory=50_000) for data in (batches, parts)
    )
    assert apart.forwards == together.forwards


@methods
def test_recalibrate_ends_all_threads(method, batches):
    before = threading.active_count()
    recalibrate(_deep(), batches, method=method)
    assert threading.active_count() == before


@libraries
def test_recalibrate_exact_takes_batches_of_one_and_empty_ones(library, batches):
    model = _deep(library)
    expected = _brute_force(model, batches)
    parts = [p for x in batches for p in (x[:1], x[1:1], x[1:])]
    recalibrate(model, parts, method="exact")
    _assert_equal(_statistics(model), expected)


class Block(nn.Module):
    def __init__(self, channels, out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


def _residual(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        Block(8, 8, 1),
        Block(8, 12, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 5),
    ).to(dtype)


@pytest.fixture
def images(randn):
    return [randn(n, 3, 12, 12) + k for k, n in enumerate([6, 1, 4])]


@pytest.mark.parametrize("converted", [True, False], ids=["converted", "torch"])
def test_recalibrate_exact_equals_brute_force_on_a_residual_network(converted, images):
    model = _residual()
    expected = _brute_force(model, images)
    # The shortcut's layer runs after the branch's, as it stands in the model.
    if converted:
        model = convert(model)
    recalibrate(model, images, method="exact")
    _assert_equal(_statistics(model), expected)


@methods
def test_recalibrate_converted_layers_measure_what_torchs_do(method, images):
    model, converted = _residual(), convert(_residual())
    for m in (model, converted):
        recalibrate(m, images, method=method)
    _assert_equal(_statistics(converted), _statistics(model))


@methods
def test_recalibrate_channels_last_gives_the_same(method, images):
    model, other = _residual(), _residual().to(memory_format=torch.channels_last)
    recalibrate(model, images, method=method)
    recalibrate(other, [x.to(memory_format=torch.channels_last) for x in images], method=method)
    _assert_equal(_statistics(other), _statistics(model))


@methods
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_recalibrate_takes_half_precision(method, dtype, images):
    model = convert(_residual(torch.float32)).to(dtype)
    recalibrate(model, [x.to(dtype) for x in images], method=method)
    assert all(layer.running_var.dtype is torch.float32 for layer in _norms(model))
    expected = _residual()  # same numbers, in float64
    recalibrate(expected, images, method=method)
    # Eleven bits of significand or eight, through five layers; rounding averages out.
    assert _error(_statistics(model), _statistics(expected)) < 30 * torch.finfo(dtype).eps


@methods
def test_recalibrate_honours_masks(method, randn):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = BatchNorm1d(3)

        def forward(self, x, mask):
            return self.bn(x, mask=mask)

    x, keep = randn(8, 3, 5), torch.arange(40).view(8, 5) % 3 > 0
    x[~keep.unsqueeze(1).expand_as(x)] = math.nan
    model = Masked().double()
    recalibrate(
        model,
        list(zip(x.split(3), keep.split(3), strict=True)),
        method=method,
        forward=lambda m, batch: m(*batch),
    )
    values = x.movedim(1, -1)[keep]
    _assert_equal(_statistics(model), [(values.mean(0), values.var(0))])


@methods
def test_recalibrate_precise_in_evaluation_measures_what_it_measures_in_training(method, batches):
    model, other = _deep().train(), _deep().eval()
    recalibrate(model, batches, method=method)
    recalibrate(other, batches, method=method)
    _assert_equal(_statistics(model), _statistics(other), rtol=0, atol=0)


@methods
def test_recalibrate_does_not_depend_on_the_old_statistics(method, batches):
    model, other = _deep(), _deep()
    for layer in _norms(other):
        layer.running_mean.fill_(math.nan)
        layer.running_var.fill_(math.inf)
    recalibrate(model, batches, method=method)
    recalibrate(other, batches, method=method)
    _assert_equal(_statistics(model), _statistics(other), rtol=0, atol=0)


@methods
@pytest.mark.parametrize("momentum", [0.1, None])
def test_recalibrate_counts_batches_and_keeps_momentum(method, momentum, batches):
    model = _deep()
    for layer in _norms(model):
        layer.momentum = momentum
        layer.num_batches_tracked.fill_(77)
    recalibrate(model, [*batches, batches[0][:0]], method=method)
    assert {int(layer.num_batches_tracked) for layer in _norms(model)} == {len(batches)}
    assert {layer.momentum for layer in _norms(model)} == {momentum}


def test_recalibrate_takes_autocast_into_its_threads(batches):
    batches = [x.float() for x in batches]
    seen = []

    class Look(nn.Module):
        def forward(self, x):
            seen.append((x.dtype, torch.is_grad_enabled()))
            return x

    models = [_deep(batchnorm.torch).float() for _ in range(2)]
    for model, memory in zip(models, (0, math.inf), strict=True):
        model.insert(1, Look())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            recalibrate(model, batches, method="exact", memory=memory)
    assert set(seen) == {(torch.bfloat16, False)}
    _assert_equal(_statistics(models[0]), _statistics(models[1]), rtol=0, atol=0)


@methods
def test_recalibrate_runs_in_inference_mode(method, batches):
    model, expected = _deep(), _deep()
    recalibrate(expected, batches, method=method)
    with torch.inference_mode():
        recalibrate(model, batches, method=method)
    assert not any(b.is_inference() for b in model.buffers())
    _assert_equal(_statistics(model), _statistics(expected), rtol=0, atol=0)


# ---- networks that are not a chain --------------------------------------------------------------


class Siamese(nn.Module):
    """One branch for two inputs, whose layers so run twice."""

    def __init__(self):
        super().__init__()
        self.branch = nn.Sequential(
            nn.BatchNorm1d(4), nn.Linear(4, 4), nn.ReLU(), nn.BatchNorm1d(4)
        )

    def forward(self, pair):
        return self.branch(pair[0]) - self.branch(pair[1])


def test_recalibrate_exact_merges_all_calls_of_a_layer(randn):
    pairs = [(randn(n, 4) + 3, 2 * randn(n, 4)) for n in (5, 8, 3)]
    torch.manual_seed(0)
    model = Siamese().double()
    expected = _brute_force(model.branch, [x for pair in pairs for x in pair])
    report = recalibrate(model, pairs, method="exact", forward=lambda m, pair: m(pair))
    _assert_equal(_statistics(model), expected)
    assert [int(layer.num_batches_tracked) for layer in _norms(model)] == [6, 6]
    assert len(report.notes) == 2


def test_recalibrate_exact_measures_a_layer_behind_itself_while_it_normalizes_by_the_batch(randn):
    torch.manual_seed(0)
    shared, linear = nn.BatchNorm1d(4).double(), nn.Linear(4, 4).double()
    model = nn.Sequential(shared, linear, shared, nn.Linear(4, 4).double(), nn.BatchNorm1d(4))
    model = model.double()
    parts = [randn(n, 4) + 2 for n in (6, 9)]
    with torch.no_grad():
        behind = [
            linear((x - x.mean(0)) / (x.var(0, correction=0) + shared.eps).sqrt()) for x in parts
        ]
        values = torch.cat([*parts, *behind])
    report = recalibrate(model, parts, method="exact")
    _assert_equal(_statistics(model)[:1], [(values.mean(0), values.var(0))])
    # The one behind sees what it sees in evaluation.
    with torch.no_grad():
        h = model.eval()[:4](torch.cat(parts))
    _assert_equal(_statistics(model)[1:], [(h.mean(0), h.var(0))])
    assert "'0': it runs several times" in report.notes[0]


class Routed(nn.Module):
    """Batches take different ways, told by their first value."""

    def __init__(self, ways):
        super().__init__()
        self.norms = nn.ModuleDict({name: nn.BatchNorm1d(3) for name in "abc"})
        self.linears = nn.ModuleDict({name: nn.Linear(3, 3) for name in "abc"})
        self.ways = ways

    def forward(self, x):
        for name in self.ways[int(x[0, 0]) % 10]:
            x = self.linears[name](self.norms[name](x)).tanh()
        return x


def _routed(ways, randn):
    torch.manual_seed(0)
    parts = []
    for k in range(6):
        x = randn(5 + k, 3)
        x[0, 0] = 10 + k % len(ways)
        parts.append(x)
    return Routed(ways).double(), parts


@pytest.mark.parametrize("memory", [0, math.inf])
@pytest.mark.parametrize(
    "ways", [["ac", "bc"], ["bc", "ac"], ["abc", "c"], ["c", "abc"], ["c", "abc", "b"]]
)
def test_recalibrate_exact_measures_layers_that_not_all_batches_reach(ways, memory, randn):
    model, parts = _routed(ways, randn)
    recalibrate(model, parts, method="exact", memory=memory)
    # Each layer, in evaluation, has statistics of what it then gets.
    inputs = {layer: [] for layer in model.norms.values()}
    for layer in inputs:
        layer.register_forward_pre_hook(lambda m, args: inputs[m].append(args[0]))
    with torch.no_grad():
        for x in parts:
            model.eval()(x)
    for layer, xs in inputs.items():
        x = torch.cat(xs)
        _assert_equal([(layer.running_mean, layer.running_var)], [(x.mean(0), x.var(0))])


def test_recalibrate_exact_ends_where_layers_run_before_and_after_each_other(randn):
    model, parts = _routed(["ab", "ba"], randn)
    report = recalibrate(model, parts, method="exact")
    assert {layer.name for layer in report.layers} == {"norms.a", "norms.b"}
    assert "in another order from batch to batch" in report.notes[0]
    assert [int(model.norms[name].num_batches_tracked) for name in "abc"] == [6, 6, 0]


class Stash(nn.Module):
    """Keeps something between two layers, as an attribute."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.BatchNorm1d(WIDTH), nn.BatchNorm1d(WIDTH)
        self.kept = None

    def forward(self, x):
        self.kept = x.tanh()
        return self.b(self.a(x)[:, :1] + self.kept)


def test_recalibrate_exact_notices_that_a_forward_keeps_something_between_layers(randn):
    parts = [randn(7, WIDTH) + k for k in range(3)]
    model = Stash().double()
    expected = Stash().double()
    recalibrate(expected, parts, method="exact", memory=0)
    report = recalibrate(model, parts, method="exact")
    assert "keeps something between layers" in report.notes[0]
    _assert_equal(_statistics(model), _statistics(expected), rtol=0, atol=0)


class Noisy(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x) + np.random.rand() + random.random()  # noqa: NPY002


def test_recalibrate_exact_draws_the_same_random_numbers_for_a_batch_that_waits(batches):
    models = []
    for memory in (0, 30_000, math.inf):
        model = _deep(depth=3)
        model.insert(2, Noisy())
        model.insert(5, Noisy())
        report = recalibrate(model, batches, method="exact", memory=memory)
        assert report.notes == ()
        models.append(model)
    for model in models[1:]:
        _assert_equal(_statistics(model), _statistics(models[0]), rtol=0, atol=0)


# ---- data ---------------------------------------------------------------------------------------

Pair = namedtuple("Pair", "image label")


@methods
@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: (x, 0),
        lambda x: [x, "label"],
        lambda x: {"image": x, "label": None},
        lambda x: Pair(x, torch.zeros(len(x))),
    ],
    ids=["tuple", "list", "dict", "namedtuple"],
)
def test_recalibrate_takes_the_first_item_of_a_batch(method, wrap, batches):
    model, expected = _deep(), _deep()
    recalibrate(model, [wrap(x) for x in batches], method=method)
    recalibrate(expected, batches, method=method)
    _assert_equal(_statistics(model), _statistics(expected), rtol=0, atol=0)


@methods
def test_recalibrate_calls_forward_with_model_and_batch(method, batches):
    model, expected = _deep(), _deep()
    recalibrate(
        model,
        [("label", x) for x in batches],
        method=method,
        forward=lambda m, batch: m(batch[1]),
    )
    recalibrate(expected, batches, method=method)
    _assert_equal(_statistics(model), _statistics(expected), rtol=0, atol=0)


def test_recalibrate_precise_takes_a_generator(batches):
    model, expected = _deep(), _deep()
    recalibrate(model, (x for x in batches))
    recalibrate(expected, batches)
    _assert_equal(_statistics(model), _statistics(expected), rtol=0, atol=0)


@methods
def test_recalibrate_stops_after_the_batch_that_completes_the_samples(method, batches):
    model, expected = _deep(), _deep()
    report = recalibrate(model, batches, method=method, samples=129)
    recalibrate(expected, batches[:3], method=method)
    assert (report.examples, report.batches) == (130, 3)
    _assert_equal(_statistics(model), _statistics(expected), rtol=0, atol=0)


def test_recalibrate_draws_no_batch_that_it_does_not_need(batches):
    data = iter(batches)
    recalibrate(_deep(), data, samples=128)
    assert len(list(data)) == len(batches) - 2


@pytest.mark.parametrize("memory", [0, 30_000, math.inf])
@pytest.mark.parametrize("own", [False, True], ids=["global generator", "own generator"])
def test_recalibrate_exact_accepts_a_loader_that_shuffles(memory, own, batches):
    model = _deep()
    expected = _brute_force(model, batches)
    loader = DataLoader(
        TensorDataset(torch.cat(batches)),
        batch_size=40,
        shuffle=True,
        generator=torch.Generator() if own else None,
    )
    report = recalibrate(model, loader, method="exact", memory=memory)
    assert report.notes == ()
    _assert_equal(_statistics(model), expected)


class Different:
    """The same examples, in another order each time."""

    def __init__(self, batches):
        self.x, self.rng = torch.cat(batches), np.random.default_rng(0)

    def __iter__(self):
        return iter(self.x[self.rng.permutation(len(self.x))].split(40))


def test_recalibrate_exact_keeps_nothing_where_passes_differ(batches):
    model = _deep(depth=3)
    expected = _brute_force(model, batches)
    report = recalibrate(model, Different(batches), method="exact", memory=30_000)
    assert "differ from pass to pass" in report.notes[0]
    _assert_equal(_statistics(model), expected)


def test_recalibrate_exact_refuses_data_that_become_fewer(batches):
    class Fewer:
        left = 5

        def __iter__(self):
            self.left -= 1
            return iter(batches[: self.left])

    model = _deep(depth=3)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ArgumentError, match=r"same number of batches in every pass, got 4 .* no batch 3"
    ):
        recalibrate(model, Fewer(), method="exact", memory=0)
    _assert_state(model, before)


# ---- which layers -------------------------------------------------------------------------------


@methods
def test_recalibrate_skips_frozen_layers(method, batches):
    model = _deep(batchnorm.torch).train()
    freeze(model[5])
    model[5].running_mean.fill_(0.5)
    before = copy.deepcopy(model[5].state_dict())
    report = recalibrate(model, batches, method=method)
    _assert_state(model[5], before)
    assert report.skipped == {"5": "its statistics are frozen"}
    with torch.no_grad():
        expected = model.eval()[:9](torch.cat(batches))
    if method == "exact":
        _assert_equal(_statistics(model[9]), [(expected.mean(0), expected.var(0))])


@methods
def test_recalibrate_skips_layers_in_evaluation_mode_while_the_model_trains(method, batches):
    model = _deep().train()
    model[1].eval()
    before = copy.deepcopy(model[1].state_dict())
    report = recalibrate(model, batches, method=method)
    _assert_state(model[1], before)
    assert [*report.skipped] == ["1"]
    assert len(report.layers) == 7


@methods
def test_recalibrate_skips_layers_without_running_statistics(method, batches):
    model = _deep(depth=2)
    model[1] = nn.BatchNorm1d(WIDTH, track_running_stats=False).double()
    report = recalibrate(model, batches, method=method)
    assert report.skipped == {"1": "it has no running statistics"}
    assert model[1].running_mean is None


@methods
def test_recalibrate_skips_layers_that_the_data_never_reach(method, batches):
    model = _deep(depth=2)
    model[0].register_module("unused", nn.BatchNorm1d(3))
    before = copy.deepcopy(model[0].unused.state_dict())
    report = recalibrate(model, batches, method=method)
    _assert_state(model[0].unused, before)
    assert report.skipped == {"0.unused": "never reached by the data"}
    assert len(report.layers) == 2


@methods
def test_recalibrate_measures_a_layer_that_stands_in_two_places_once(method, batches):
    model = _deep(depth=2)
    model[4].register_module("alias", model[1])
    report = recalibrate(model, batches, method=method)
    assert len(report.layers) == 2


class Plain(nn.BatchNorm1d):
    pass


class ChannelsLast(nn.BatchNorm1d):
    """Takes (N, L, C)."""

    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class OurChannelsLast(BatchNorm1d):
    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class Own(nn.BatchNorm1d):
    """A forward of its own, as timm's BatchNormAct2d."""

    def forward(self, x):
        mean, var = (self.running_mean, self.running_var) if not self.training else (None, None)
        return nn.functional.batch_norm(
            x, mean, var, self.weight, self.bias, self.training, 0.1, self.eps
        ).relu()


@methods
@pytest.mark.parametrize("kind", [Plain, ChannelsLast, OurChannelsLast, Own])
def test_recalibrate_measures_subclasses(method, kind, randn):
    model = nn.Sequential(kind(4), nn.Linear(4, 4), kind(4)).double()
    parts = [randn(n, 4, 4) + 2 for n in (3, 5)]
    report = recalibrate(model, parts, method=method)
    x = torch.cat(parts)
    last = "ChannelsLast" in kind.__name__
    axes = (0, 1) if last else (0, 2)
    _assert_equal(_statistics(model)[:1], [(x.mean(axes), x.var(axes))])
    assert report.layers[0].kind == kind.__name__
    if method == "exact":
        with torch.no_grad():
            h = model.eval()[:2](x)
        _assert_equal(_statistics(model)[1:], [(h.mean(axes), h.var(axes))])


@methods
def test_recalibrate_runs_compiled_models_uncompiled(method, batches):
    expected = _deep(depth=2)
    recalibrate(expected, batches, method=method)
    whole = torch.compile(_deep(depth=2), backend="eager")
    part = _deep(depth=2)
    part[1] = torch.compile(part[1], backend="eager")
    in_place = _deep(depth=2)
    in_place.compile(backend="eager")
    for model in (whole, part, in_place):
        with torch.no_grad():
            model(batches[0])
        recalibrate(model, batches, method=method)
        _assert_equal(_statistics(model), _statistics(expected), rtol=0, atol=0)


def test_recalibrate_takes_the_module_inside_data_parallelism(batches):
    model, expected = nn.DataParallel(_deep()), _deep()
    report = recalibrate(model, batches)
    recalibrate(expected, batches)
    assert report.layers[0].name == "1"
    _assert_equal(_statistics(model), _statistics(expected), rtol=0, atol=0)


def test_recalibrate_takes_an_averaged_model(batches):
    model = torch.optim.swa_utils.AveragedModel(_deep())
    expected = _brute_force(model.module, batches)
    recalibrate(model, batches, method="exact")
    _assert_equal(_statistics(model), expected)


# ---- everything else stays ----------------------------------------------------------------------


def _assert_state(model, state):
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key


def _surroundings(model):
    """All that must be as before, but for values of statistics."""
    return {
        "modes": [m.training for m in model.modules()],
        "momenta": [layer.momentum for layer in _norms(model)],
        "buffers": [(id(b), b.dtype) for b in model.buffers()],
        "hooks": [
            [*getattr(m, name).values()]
            for m in model.modules()
            for name in ("_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs")
        ],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "global hooks": [
            len(torchs_module._global_forward_pre_hooks),
            len(torchs_module._global_forward_hooks),
        ],
        "gradients": [(p.requires_grad, id(p.grad)) for p in model.parameters()],
        "gradient mode": torch.is_grad_enabled(),
        "threads": threading.active_count(),
        "signal": signal.getsignal(signal.SIGINT),
        "torch": torch.get_rng_state().tolist(),
        "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002
        "random": random.getstate(),
    }  # fmt: skip


def _lively(library=nn):
    """A model whose modes, gradients and hooks are not the usual ones."""
    model = _deep(library, depth=3).train()
    model[3].eval()
    model[0].weight.requires_grad_(False)
    model[4].weight.grad = torch.ones_like(model[4].weight)
    model[5].register_forward_pre_hook(lambda m, args: None)
    model[5].momentum = None
    return model


class Draws:
    """Data that draw random numbers, and do something at a batch."""

    def __init__(self, batches, at=None, action=None):
        self.batches, self.at, self.action = batches, at, action

    def __iter__(self):
        for k, x in enumerate(self.batches):
            if k == self.at:
                self.action()
            yield x + torch.randn_like(x) + np.random.rand() + random.random()  # noqa: NPY002


class Boom(Exception):
    pass


def _boom():
    raise Boom


def _interrupt():
    signal.raise_signal(signal.SIGINT)


@methods
@libraries
@pytest.mark.parametrize("memory", [0, math.inf])
def test_recalibrate_leaves_everything_else_as_it_was(method, library, memory, batches):
    model = _lively(library)
    before = _surroundings(model)
    parameters = copy.deepcopy([*model.parameters()])
    recalibrate(model, Draws(batches), method=method, memory=memory)
    assert _surroundings(model) == before
    assert all(map(torch.equal, model.parameters(), parameters))


@methods
@pytest.mark.parametrize("memory", [0, math.inf])
@pytest.mark.parametrize(("action", "error"), [(_boom, Boom), (_interrupt, KeyboardInterrupt)])
@pytest.mark.parametrize("where", ["data 0", "data 3", "call 0", "call 1", "call 7", "call -1"])
def test_recalibrate_restores_everything_when_something_raises(
    method, memory, action, error, where, batches
):
    model = _lively()
    kind, number = where.split()
    data, calls, at = Draws(batches), [], int(number)

    def count(layer, args, output):
        calls.append(layer)
        if kind == "call" and len(calls) == at + 1:
            action()

    for layer in _norms(model):
        layer.register_forward_hook(count)
    if kind == "data":
        data = Draws(batches, at, action)
    elif at < 0:  # from the end, hence in "exact" where a batch is run again to compare
        recalibrate(copy.deepcopy(model), data, method=method, memory=memory)
        at += len(calls)
        calls.clear()
    before, state = _surroundings(model), copy.deepcopy(model.state_dict())
    with pytest.raises(error):
        recalibrate(model, data, method=method, memory=memory)
    assert _surroundings(model) == before
    _assert_state(model, state)


@methods
def test_recalibrate_restores_everything_when_an_input_is_not_finite(method, batches):
    model = _lively()
    before, state = _surroundings(model), copy.deepcopy(model.state_dict())
    batches[3][5, 2] = math.inf
    with pytest.raises(
        NonFiniteError, match=r"layer '1' has no finite mean and variance in channel"
    ):
        recalibrate(model, batches, method=method)
    assert _surroundings(model) == before
    _assert_state(model, state)


def _recalibrated(model, batches, method, interrupt_at):
    """How many lines of the code that enters and leaves ran, and whether it was not interrupted."""
    names = {
        "recalibrate",
        "enter",
        "leave",
        "write",
        "measure",
        "interrupts_delayed",
        "_restore_modes",
    }
    lines = 0

    def trace(frame, event, arg):
        nonlocal lines
        code = frame.f_code
        if Path(code.co_filename).parent.name != "population" or code.co_name not in names:
            return None
        if event == "line":
            lines += 1
            if lines == interrupt_at:
                signal.raise_signal(signal.SIGINT)
        return trace

    outer = sys.gettrace()
    sys.settrace(trace)
    try:
        recalibrate(model, batches, method=method)
        return lines, True
    except KeyboardInterrupt:
        return lines, False
    finally:
        sys.settrace(outer)


@pytest.mark.parametrize("part", range(60))
@methods
def test_recalibrate_restores_everything_when_interrupted_at_any_line(method, part, batches):
    model, batches = _lively(), batches[:2]
    before, state = _surroundings(model), copy.deepcopy(model.state_dict())
    lines, _ = _recalibrated(copy.deepcopy(model), batches, method, 0)
    _, through = _recalibrated(model, batches, method, 1 + part * lines // 60)
    assert _surroundings(model) == before
    changed = [
        not torch.equal(v, state[k]) for k, v in model.state_dict().items() if "running" in k
    ]
    assert all(changed) or (not any(changed) and not through)


def test_recalibrate_shows_where_a_forward_raised(batches):
    model = _deep(depth=2)
    model.insert(3, _Failing())
    with pytest.raises(Boom) as raised:
        recalibrate(model, batches, method="exact")
    assert any(entry.name == "_boom" for entry in raised.traceback)


class _Failing(nn.Module):
    def forward(self, x):
        _boom()


def test_recalibrate_writes_all_or_nothing(batches):
    model = _deep(depth=3)
    state = copy.deepcopy(model.state_dict())
    last = _norms(model)[-1]
    # One that cannot be written to, behind all others.
    last.num_batches_tracked = torch.zeros(1, dtype=torch.int64).expand(4)
    with pytest.raises(RuntimeError, match="single memory location"):
        recalibrate(model, batches)
    last.num_batches_tracked = torch.zeros((), dtype=torch.int64)
    _assert_state(model, state)


def test_recalibrate_keeps_no_activations(batches):
    model = _deep(depth=2)
    alive = []
    model[0].register_forward_hook(lambda m, args, y: alive.append(torch.utils.weak.ref(y)))
    recalibrate(model, batches, method="exact")
    gc.collect()
    assert [ref() for ref in alive] == [None] * len(alive)


# ---- the report ---------------------------------------------------------------------------------


def test_report_tells_how_far_each_layer_moved(batches):
    layer = nn.BatchNorm1d(WIDTH, eps=0.25).double()
    x = torch.cat(batches)
    std = (x.var(0) + 0.25).sqrt()
    shift, ratio = x.mean(0) / std, math.sqrt(1.25) / std
    (moved,) = recalibrate(nn.Sequential(layer), batches).layers
    assert moved.name == "0"
    assert moved.kind == "BatchNorm1d"
    assert (moved.calls, moved.count) == (len(batches), len(x))
    assert moved.shift == pytest.approx(float(shift.max()))
    assert moved.channel == int(shift.argmax())
    assert moved.rms_shift == pytest.approx(float(shift.square().mean().sqrt()))
    assert moved.std_ratio == pytest.approx(float(ratio.min()))


@methods
def test_report_ranks_layers_by_their_shift(method, batches):
    shifts = [layer.shift for layer in recalibrate(_deep(), batches, method=method).layers]
    assert shifts == sorted(shifts, reverse=True)
    assert len(shifts) == 8


@methods
def test_report_of_a_second_recalibration_shows_no_shift(method, batches):
    model = _deep()
    recalibrate(model, batches, method=method)
    assert all(layer.shift < 1e-12 for layer in recalibrate(model, batches, method=method).layers)


@methods
def test_report_shift_is_infinite_where_statistics_were_lost(method, batches):
    model = _deep(depth=2)
    model[5].running_var[3] = math.nan
    model[5].running_mean[3] = math.nan
    first = recalibrate(model, batches, method=method).layers[0]
    assert (first.name, first.channel, first.shift) == ("5", 3, math.inf)


@methods
def test_report_is_a_dict_for_json(method, batches):
    report = recalibrate(freeze(_deep(batchnorm.torch)), batches, method=method)
    again = json.loads(json.dumps(report.to_dict()))
    assert again == report.to_dict()
    assert again["skipped"]["1"] == "its statistics are frozen"


def test_report_prints_a_table(batches):
    model = _deep(batchnorm.torch, depth=3)
    freeze(model[5])
    lines = str(recalibrate(model, batches, method="exact")).splitlines()
    assert lines[0].startswith(
        "recalibrated 2 batch-norm layers (exact): 203 examples, 5 batches, 6 forwards, "
    )
    assert lines[1].endswith("values  shift  channel  rms shift  std old/new")
    assert len({len(line) for line in lines[1:4]}) == 1
    assert lines[-1] == "skipped 5: its statistics are frozen"


def test_report_prints_the_layers_with_the_largest_shifts(batches):
    report = recalibrate(_deep(depth=30), batches)
    lines = str(report).splitlines()
    assert len(lines) == 28
    assert lines[-1] == "  … and 5 that moved less"


@methods
def test_recalibrate_shows_progress_on_a_terminal_only(method, batches, capsys, monkeypatch):
    recalibrate(_deep(), batches, method=method)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    recalibrate(_deep(), batches, method=method, progress=False)
    assert capsys.readouterr().err == ""
    recalibrate(_deep(), batches, method=method)
    shown = capsys.readouterr().err
    assert "recalibrate: " in shown
    assert ("layer 29" if method == "exact" else f"{len(batches)}/{len(batches)}") in shown


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": 3}, r"takes a torch.nn.Module, got int"),
        ({"model": nn.Linear(2, 2)}, r"takes a model with batch norms, got one without"),
        ({"method": "fast"}, r"method must be one of precise, exact, got 'fast'"),
        ({"data": torch.zeros(3, 2)}, r"iterable of batches, got Tensor.*tensor\.split"),
        ({"data": 3}, r"iterable of batches, got int"),
        ({"data": iter([]), "method": "exact"}, r"more than once.*list_iterator.*list\(data\)"),
        ({"data": []}, r"at least one batch, got none"),
        ({"data": [], "method": "exact"}, r"at least one batch, got none"),
        ({"data": [3]}, r"first item is one, got int.*forward="),
        ({"data": [()]}, r"first item is one, got tuple"),
        ({"data": ["a"], "samples": 2}, r"samples needs batches with tensors"),
        ({"samples": 0}, r"samples must be a positive integer or None, got 0"),
        ({"memory": -1}, r"memory must be a number of bytes.*got -1"),
        ({"model": nn.BatchNorm1d(2, device="meta")}, r"got one with meta tensors in ''"),
        ({"model": nn.LazyBatchNorm1d()}, r"uninitialized tensors"),
    ],
)  # fmt: skip
def test_recalibrate_refuses(arguments, message):
    arguments = {"model": nn.BatchNorm1d(2), "data": [torch.zeros(3, 2)], **arguments}
    with pytest.raises(ArgumentError, match=message):
        recalibrate(arguments.pop("model"), arguments.pop("data"), **arguments)


@libraries
def test_recalibrate_precise_refuses_a_batch_of_one(library, batches):
    model = _deep(library)
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ShapeError, match=r"got input \(1, 16\) at the layer '1'.*method='exact'"):
        recalibrate(model, [*batches, batches[0][:1]])
    _assert_state(model, state)


def test_recalibrate_precise_takes_a_batch_of_one_where_the_layer_does(batches):
    model = nn.Sequential(BatchNorm1d(WIDTH, on_single="population")).double()
    recalibrate(model, [*batches, batches[0][:1]])
    x = torch.cat([*batches, batches[0][:1]])
    _assert_equal(_statistics(model), [(x.mean(0), x.var(0))])


def test_recalibrate_refuses_one_value_in_all(batches):
    with pytest.raises(ShapeError, match=r"more than one value per channel.*got 1 in all"):
        recalibrate(_deep(), [batches[0][:1]], method="exact")


@methods
def test_recalibrate_refuses_statistics_that_the_buffers_cannot_hold(method, randn):
    layer = nn.BatchNorm1d(3).half()
    with pytest.raises(NonFiniteError, match=r"running_var.*torch.float16, which cannot hold"):
        recalibrate(nn.Sequential(layer), [(400 * randn(50, 3)).half()], method=method)
    assert torch.equal(layer.running_var, torch.ones(3).half())


@methods
def test_recalibrate_lets_a_layer_say_what_is_wrong_with_its_input(method):
    with pytest.raises(ValueError, match="expected 4D input"):
        recalibrate(BatchNorm2d(3), [torch.zeros(2, 3)], method=method)


# ---- processes ----------------------------------------------------------------------------------

FUNCTIONS = Path(__file__).parent / "population_functions.py"
needs_gloo = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="needs gloo",
)


@pytest.fixture(scope="module")
def four():
    ranks = Ranks(4, FUNCTIONS)
    yield ranks
    ranks.close()


def _on_one_process(method):
    sys.path.insert(0, str(FUNCTIONS.parent))
    try:
        import population_functions as functions
    finally:
        sys.path.pop(0)
    model = functions.net()
    data = [x for share in functions.shares(method) for x in share]
    return model, recalibrate(model, data, method=method)


@needs_gloo
@pytest.mark.parametrize(("method", "memory"), [("precise", 0), ("exact", 0), ("exact", 1e9)])
def test_recalibrate_on_several_processes_is_recalibrate_on_one(method, memory, four):
    answers = four.run("measured", method=method, memory=memory)
    model, report = _on_one_process(method)
    for answer in answers:
        for key, value in answer["state"].items():
            assert torch.equal(value, answers[0]["state"][key]), key
            torch.testing.assert_close(value, model.state_dict()[key], rtol=1e-12, atol=1e-12)
        for what in ("examples", "batches"):
            assert answer["report"][what] == getattr(report, what)


@needs_gloo
@pytest.mark.parametrize(
    ("how", "raised"),
    [
        ("data", "ValueError"),
        ("interrupt", "KeyboardInterrupt"),
        ("writing", "RuntimeError"),
    ],
)
@methods
def test_recalibrate_ends_everywhere_when_a_process_fails(method, how, raised, four):
    answers = four.run("with_a_failing_process", method=method, how=how)
    assert (answers[2][0], answers[2][2]) == (raised, True)
    for rank in (0, 1, 3):
        name, message, same = answers[rank]
        assert name == SynchronizationError.__name__
        assert "failed in process 2 of 4" in message
        assert same


@needs_gloo
@methods
def test_recalibrate_refuses_no_data_on_all_processes(method, four):
    for name, message in four.run("without_data", method=method):
        assert name == "ArgumentError"
        assert "at least one batch" in message


@needs_gloo
@pytest.mark.parametrize("what", ["width", "order", "method"])
def test_recalibrate_refuses_models_that_differ_between_processes(what, four):
    for name, message in four.run("with_another_model", what=what):
        assert name == "ArgumentError"
        assert "same batch norms to measure in every process" in message


@needs_gloo
def test_recalibrate_measures_in_a_group_of_processes(four):
    answers = four.run("in_a_group")
    assert [examples for examples, _ in answers] == [10, 10, 17, 17]
    for (_, mean), share in zip(answers, (0, 0, 1, 1), strict=True):
        assert torch.equal(mean, answers[2 * share][1])
