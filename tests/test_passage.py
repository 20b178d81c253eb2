"""batchnorm.passage: real layers of every framework evaluate and train on as the others' do."""

import contextlib
import doctest
import inspect
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from batchnorm import cli
from batchnorm.errors import ArgumentError, DTypeError, ShapeError
from batchnorm.passage import FRAMEWORKS, BatchNormState, files, read, translate, write
from passage_layers import CHANNELS, LAYERS, import_keras, keras_numpy

EVERY = list(FRAMEWORKS)
STATISTICS = ("mean", "var", "gamma", "beta")
PAGE = Path(__file__).parent.parent / "docs" / "howto" / "passage.md"
#: Weight of the new value: not 1/2, so that both directions differ.
MOMENTUM, EPS, STEPS = 0.2, 2e-3, 5


def _momentum(framework):
    return MOMENTUM if FRAMEWORKS[framework].momentum_of_new else 1 - MOMENTUM


def _batch(seed):
    return np.random.default_rng(seed).normal(0.5, 2, (6, CHANNELS, 3, 3)).astype(np.float32)


def _fresh(framework, axis):
    """A layer with random scale and shift, trained for some steps."""
    rng = np.random.default_rng(0)
    start = BatchNormState(
        mean=np.zeros(CHANNELS, np.float32),
        var=np.ones(CHANNELS, np.float32),
        gamma=rng.uniform(0.5, 2, CHANNELS).astype(np.float32),
        beta=rng.normal(size=CHANNELS).astype(np.float32),
        momentum=MOMENTUM,
        eps=EPS,
        count=1,
    )
    layer = _layer(framework, {"": start}, axis)
    for step in range(STEPS):
        layer.train(_batch(step))
    return layer


def _choices(framework, axis):
    """What `write` has to be told."""
    choices = {"channel_axis": axis} if FRAMEWORKS[framework].axis else {}
    return choices | ({"ndim": 4} if framework == "haiku" else {})


def _layer(framework, states, axis, **more):
    (state,) = states.values()
    kind = LAYERS[framework]
    options = _choices(framework, axis) | more
    arrays, settings = write({kind.name: state}, framework, **options)
    layer = kind(**settings[kind.name])
    layer.load(arrays)
    return layer


def _read(framework, layer):
    states, left_out = read(layer.arrays(), framework, momentum=_momentum(framework), eps=EPS)
    assert left_out == []
    (state,) = states.values()
    return state


def _carry(source, target):
    """A trained layer of one framework, and one of another that was made of it."""
    old, kind = _fresh(source, -1), LAYERS[target]
    options = _choices(target, -1)
    if "count" in FRAMEWORKS[target].paths:
        options["count"] = STEPS
    found = translate(
        old.arrays(), source, target, momentum=_momentum(source), eps=EPS,
        names={old.name: kind.name}, **options,
    )  # fmt: skip
    new = kind(**found.settings[kind.name])
    new.load(found.arrays)
    return old, new


# float32 layers compute (x − mean)·scale + shift in different orders: |y| < 10 has errors of a few
# units in the last place, 1e-6.
CLOSE = {"rtol": 1e-6, "atol": 2e-6}


@pytest.mark.parametrize("target", EVERY)
@pytest.mark.parametrize("source", EVERY)
def test_passage_evaluation_is_the_same(source, target):
    old, new = _carry(source, target)
    x = _batch(100)
    np.testing.assert_allclose(new.evaluate(x), old.evaluate(x), **CLOSE)


@pytest.mark.parametrize("target", EVERY)
@pytest.mark.parametrize("source", EVERY)
def test_passage_next_step_moves_statistics_as_the_target_does(source, target):
    old, new = _carry(source, target)
    state, x = _read(source, old), _batch(101)
    new.train(x)
    moved = _read(target, new)
    m = MOMENTUM
    before, after = 1 - m, m
    if FRAMEWORKS[target].debiased:
        before = (1 - m) * (1 - (1 - m) ** STEPS) / (1 - (1 - m) ** (STEPS + 1))
        after = m / (1 - (1 - m) ** (STEPS + 1))
    batch = x.astype(np.float64)
    mean = batch.mean((0, 2, 3))
    var = batch.var((0, 2, 3), ddof=1 if FRAMEWORKS[target].unbiased else 0)
    np.testing.assert_allclose(moved.mean, before * state.mean + after * mean, **CLOSE)
    np.testing.assert_allclose(moved.var, before * state.var + after * var, **CLOSE)
    if "count" in FRAMEWORKS[target].paths:
        assert moved.count == STEPS + 1


# ---- conventions --------------------------------------------------------------------------------


@pytest.mark.parametrize("framework", EVERY)
def test_frameworks_defaults_are_those_of_the_constructor(framework):
    defaults = _constructor_defaults(framework)
    row = FRAMEWORKS[framework]
    assert defaults[row.momentum] == row.default_momentum
    assert defaults[row.eps] == row.default_eps
    assert {row.scale, row.shift} - {None} <= defaults.keys()
    if row.axis is not None:
        default = {"channels_last": -1}.get(defaults[row.axis], defaults[row.axis])
        assert default == row.channel_axis


def _constructor_defaults(framework):
    if framework == "onnx":
        onnx = pytest.importorskip("onnx")
        attributes = onnx.defs.get_schema("BatchNormalization", 15).attributes
        values = {name: a.default_value for name, a in attributes.items()}
        return {name: float(str(np.float32(v.f))) for name, v in values.items()}
    modules = {
        "torch": ("torch.nn", "BatchNorm2d"),
        "numpy": ("batchnorm", "BatchNorm"),
        "keras": ("keras.layers", "BatchNormalization"),
        "flax": ("flax.linen", "BatchNorm"),
        "nnx": ("flax.nnx", "BatchNorm"),
        "haiku": ("haiku", "BatchNorm"),
        "equinox": ("equinox.nn", "BatchNorm"),
        "equinox-ema": ("equinox.nn", "BatchNorm"),
    }
    module, name = modules[framework]
    if framework == "keras":
        import_keras()
    parameters = inspect.signature(getattr(pytest.importorskip(module), name).__init__).parameters
    empty = inspect.Parameter.empty
    return {k: None if p.default is empty else p.default for k, p in parameters.items()}


def _state(**changes):
    values = {
        "mean": np.array([1.0, 2.0], np.float32),
        "var": np.array([3.0, 4.0], np.float32),
        "gamma": np.array([5.0, 6.0], np.float32),
        "beta": np.array([7.0, 8.0], np.float32),
        "momentum": 0.1,
        "eps": 1e-5,
    }
    return BatchNormState(**values | changes)


def _listed(tree):
    """A tree with lists for arrays, which compare."""
    if isinstance(tree, dict):
        return {key: _listed(value) for key, value in tree.items()}
    return tree.tolist()


MEAN, VAR, GAMMA, BETA = [1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]
#: One batch with momentum 0.5: the share of batches in the averages is 1/2.
WRITTEN = {
    "torch": {
        "net.bn.weight": GAMMA,
        "net.bn.bias": BETA,
        "net.bn.running_mean": MEAN,
        "net.bn.running_var": VAR,
        "net.bn.num_batches_tracked": 1,
    },
    "numpy": {
        "net.bn.gamma": GAMMA,
        "net.bn.beta": BETA,
        "net.bn.running_mean": MEAN,
        "net.bn.running_var": VAR,
        "net.bn.num_batches_tracked": 1,
    },
    "keras": {
        "net/bn/gamma": GAMMA,
        "net/bn/beta": BETA,
        "net/bn/moving_mean": MEAN,
        "net/bn/moving_variance": VAR,
    },
    "flax": {
        "params": {"net": {"bn": {"scale": GAMMA, "bias": BETA}}},
        "batch_stats": {"net": {"bn": {"mean": MEAN, "var": VAR}}},
    },
    "nnx": {"net": {"bn": {"scale": GAMMA, "bias": BETA, "mean": MEAN, "var": VAR}}},
    "haiku": {
        "params": {"net/bn": {"scale": [[GAMMA]], "offset": [[BETA]]}},
        "state": {
            "net/bn/~/mean_ema": {"average": [[MEAN]], "hidden": [[[0.5, 1.0]]], "counter": 1},
            "net/bn/~/var_ema": {"average": [[VAR]], "hidden": [[[1.5, 2.0]]], "counter": 1},
        },
    },
    "equinox": {
        "net.bn.weight": GAMMA,
        "net.bn.bias": BETA,
        "net.bn.batch_state_index.0": [0.5, 1.0],
        "net.bn.batch_state_index.1": [1.5, 2.0],
        "net.bn.batch_counter": 1,
    },
    "equinox-ema": {
        "net.bn.weight": GAMMA,
        "net.bn.bias": BETA,
        "net.bn.ema_state_index.0": MEAN,
        "net.bn.ema_state_index.1": VAR,
        "net.bn.ema_first_time_index": False,
    },
    "onnx": {
        "net/bn/scale": GAMMA,
        "net/bn/B": BETA,
        "net/bn/input_mean": MEAN,
        "net/bn/input_var": VAR,
    },
}


def _write(framework, state=None, **options):
    if framework == "haiku":
        options = {"channel_axis": -1, "ndim": 3, **options}
    name = f"net{FRAMEWORKS[framework].separator}bn"
    state = _state(momentum=0.5, count=1) if state is None else state
    return write({name: state}, framework, **options)


@pytest.mark.parametrize("framework", EVERY)
def test_write_names_and_shapes_arrays_as_the_framework_does(framework):
    arrays, _ = _write(framework)
    assert _listed(arrays) == WRITTEN[framework]


@pytest.mark.parametrize("framework", EVERY)
def test_read_undoes_write(framework):
    arrays, _ = _write(framework)
    states, left_out = read(arrays, framework, momentum=0.5, eps=1e-5)
    ((name, state),) = states.items()
    assert name.replace("/", ".") == "net.bn"
    assert left_out == []
    for field in STATISTICS:
        np.testing.assert_array_equal(getattr(state, field), getattr(_state(), field))
    assert state.unbiased == FRAMEWORKS[framework].unbiased
    assert state.count == (1 if "count" in FRAMEWORKS[framework].paths else None)


SETTINGS = {
    "torch": {"momentum": 0.1, "eps": 1e-5, "affine": True},
    "numpy": {"momentum": 0.1, "eps": 1e-5, "affine": True, "channel_axis": -1},
    "keras": {"momentum": 0.9, "epsilon": 1e-5, "scale": True, "center": True, "axis": -1},
    "flax": {"momentum": 0.9, "epsilon": 1e-5, "use_scale": True, "use_bias": True, "axis": -1},
    "nnx": {"momentum": 0.9, "epsilon": 1e-5, "use_scale": True, "use_bias": True, "axis": -1},
    "haiku": {
        "decay_rate": 0.9, "eps": 1e-5, "create_scale": True, "create_offset": True,
        "data_format": "channels_last",
    },
    "equinox": {"momentum": 0.9, "eps": 1e-5, "channelwise_affine": True},
    "equinox-ema": {"momentum": 0.9, "eps": 1e-5, "channelwise_affine": True},
    "onnx": {"momentum": 0.9, "epsilon": 1e-5},
}  # fmt: skip


@pytest.mark.parametrize("framework", EVERY)
def test_write_gives_settings_in_the_frameworks_words(framework):
    _, settings = _write(framework, _state(channel_axis=-1, count=3))
    assert list(settings.values()) == [SETTINGS[framework]]


# ---- scale and shift ----------------------------------------------------------------------------


@pytest.mark.parametrize("has", ["neither", "gamma", "beta"])
@pytest.mark.parametrize("framework", EVERY)
def test_passage_without_scale_or_shift_evaluates_the_same(framework, has):
    whole = _state(
        mean=np.linspace(-1, 1, CHANNELS, dtype=np.float32),
        var=np.linspace(1, 2, CHANNELS, dtype=np.float32),
        gamma=np.linspace(2, 3, CHANNELS, dtype=np.float32) if has == "gamma" else None,
        beta=np.linspace(2, 3, CHANNELS, dtype=np.float32) if has == "beta" else None,
        count=2,
    )
    layer, x = _layer(framework, {"": whole}, -1), _batch(0)
    gamma = 1 if whole.gamma is None else whole.gamma[:, None, None]
    beta = 0 if whole.beta is None else whole.beta[:, None, None]
    inv_std = 1 / np.sqrt(whole.var.astype(np.float64) + whole.eps)
    expected = (x - whole.mean[:, None, None]) * inv_std[:, None, None] * gamma + beta
    np.testing.assert_allclose(layer.evaluate(x), expected, **CLOSE)


def test_translate_says_which_layers_got_a_scale_or_shift():
    arrays, _ = write({"bn": _state(gamma=None)}, "keras")
    found = translate(arrays, "keras", "torch", momentum=0.9, eps=1e-5)
    assert found.arrays["bn.weight"].tolist() == [1, 1]
    assert any("in bn the missing one was added as ones or zeros" in text for text in found.notes)


# ---- whole networks -----------------------------------------------------------------------------


def test_translate_takes_the_batch_norms_of_a_network_of_torch():
    nn = pytest.importorskip("torch.nn")
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.LayerNorm(4), nn.Sequential(nn.BatchNorm2d(5))
    )
    found = translate(
        net.state_dict(), "torch", "keras", momentum=0.1, eps=1e-5,
        names={"1": "first"},
    )  # fmt: skip
    assert {name.rpartition("/")[0] for name in found.arrays} == {"first", "3/0"}
    assert found.left_out == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_translate_leaves_what_is_of_several_axes():
    arrays = {
        "bn/mean": np.zeros(2), "bn/var": np.ones(2),
        "stacked/mean": np.zeros((3, 2)), "stacked/var": np.ones((3, 2)),
        "metric/mean": np.zeros(()), "alone/mean": np.zeros(2),
    }  # fmt: skip
    found = translate(arrays, "nnx", "torch", momentum=0.9, eps=1e-5)
    assert list(found.settings) == ["bn"]
    assert found.left_out == ["stacked/mean", "stacked/var", "metric/mean", "alone/mean"]


def test_translate_keeps_indices_of_lists_for_nnx():
    arrays = {"blocks.0.running_mean": np.zeros(2), "blocks.0.running_var": np.ones(2)}
    found = translate(arrays, "torch", "nnx", momentum=0.1, eps=1e-5)
    assert list(found.arrays["blocks"]) == [0]


def test_translate_keeps_names_that_are_no_indices_for_nnx():
    """Else 01 would take the place of 1, and ² would be no integer."""
    layers = ["1", "01", "²", "9" * 5000]
    arrays = {f"blocks.{layer}.running_mean": np.full(2, k) for k, layer in enumerate(layers)}
    arrays |= {f"blocks.{layer}.running_var": np.ones(2) for layer in layers}
    found = translate(arrays, "torch", "nnx", momentum=0.1, eps=1e-5)
    assert list(found.arrays["blocks"]) == [1, *layers[1:]]
    assert [bn["mean"][0] for bn in found.arrays["blocks"].values()] == [0, 1, 2, 3]


def test_read_takes_settings_of_single_layers():
    arrays = {f"{n}/{k}": np.ones(2) for n in "ab" for k in ("moving_mean", "moving_variance")}
    own = {"b": {"momentum": 0.5, "channel_axis": 1}}
    states, _ = read(arrays, "keras", momentum=0.99, eps=1e-3, settings=own)
    assert [states[n].momentum for n in "ab"] == [0.01, 0.5]
    assert [states[n].channel_axis for n in "ab"] == [None, 1]


@pytest.mark.skipif(not PAGE.exists(), reason="no documentation in this checkout")
def test_page_lists_the_conventions():
    rows = [
        [c.strip(" `") for c in line.split("|")[1:-1]] for line in PAGE.read_text().splitlines()
    ]
    table = {row[1]: (row[0], *row[2:]) for row in rows if len(row) == 9}
    assert table.keys() >= FRAMEWORKS.keys()
    for name, row in FRAMEWORKS.items():
        assert table[name] == (
            row.title,
            f"the {'new' if row.momentum_of_new else 'old'} value",
            str(row.default_momentum or "none"),
            str(row.default_eps),
            "unbiased" if row.unbiased else "biased",
            "yes" if "count" in row.paths else "no",
            "yes" if row.debiased else "no",
            f"{'' if row.axis else 'always '}{row.channel_axis}",
        )


def _of_page(function):
    """A function that the page shows."""
    shown = doctest.DocTestParser().get_examples(PAGE.read_text(encoding="utf-8"))
    (source,) = (e.source for e in shown if e.source.startswith(f"def {function}("))
    names = {}
    exec(source, names)
    return names[function]


@pytest.mark.filterwarnings("ignore")  # of Keras
@pytest.mark.skipif(not PAGE.exists(), reason="no documentation in this checkout")
def test_page_assigns_arrays_to_a_model_of_keras():
    model, assign = _keras_model(), _of_page("assign")
    before = [keras_numpy(v) for v in model.variables]
    name = model.layers[1].variables[0].path.rpartition("/")[0]
    arrays, _ = write({name: _state(**{k: np.full(4, 9.0) for k in STATISTICS})}, "keras")
    assign(model, arrays)
    for variable, old in zip(model.variables, before, strict=True):
        new = 9.0 if variable.path in arrays else old
        assert (keras_numpy(variable) == new).all()
    with pytest.raises(AssertionError):
        assign(model, write({"norm_of_another_name": _state()}, "keras")[0])


@pytest.mark.skipif(not PAGE.exists(), reason="no documentation in this checkout")
def test_page_merges_arrays_into_variables_of_flax():
    linen, jax = pytest.importorskip("flax.linen"), pytest.importorskip("jax")
    model = linen.Sequential([linen.Dense(2), linen.BatchNorm(use_running_average=True)])
    x, merged = np.ones((3, 2), np.float32), _of_page("merged")
    variables = model.init(jax.random.key(0), x)
    state = _state()
    changed = merged(variables, write({"layers_1": state}, "flax")[0])
    z = x @ np.asarray(variables["params"]["layers_0"]["kernel"], np.float64)
    expected = (z - state.mean) / np.sqrt(state.var + state.eps) * state.gamma + state.beta
    np.testing.assert_allclose(model.apply(changed, x), expected, rtol=1e-4)
    with pytest.raises(KeyError):
        merged(variables, write({"layers_2": state}, "flax")[0])
    longer, _ = write({"layers_1": _state(**{k: np.ones(3) for k in STATISTICS})}, "flax")
    with pytest.raises(AssertionError):
        merged(variables, longer)


@pytest.mark.skipif(not PAGE.exists(), reason="no documentation in this checkout")
def test_page_merges_arrays_into_a_model_of_nnx():
    nnx, merged = pytest.importorskip("flax.nnx"), _of_page("merged")
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(3, 2, rngs=rngs), nnx.BatchNorm(2, rngs=rngs))
    state = nnx.state(model)
    variables = nnx.to_pure_dict(state)
    arrays, _ = write({"layers/1": _state()}, "nnx")
    nnx.replace_by_pure_dict(state, merged(variables, arrays))
    nnx.update(model, state)
    assert model.layers[1].mean[...].tolist() == MEAN
    np.testing.assert_array_equal(model.layers[0].kernel[...], variables["layers"][0]["kernel"])


# ---- what is said -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "target", "momentum", "said"),
    [
        ("torch", "keras", 0.1, "training goes on with biased variances"),
        ("keras", "torch", 0.99, "training goes on with unbiased variances"),
        ("torch", "haiku", 0.1, "Haiku debiases its averages, PyTorch does not"),
        ("haiku", "keras", 0.99, "Haiku debiases its averages, Keras 3 does not"),
        ("torch", "equinox-ema", 0.1, "normalizes by the running statistics"),
        ("keras", "torch", 0.99, "channels on axis 1"),
        ("torch", "keras", 0.99, "is the momentum one of PyTorch?"),
    ],
)
def test_translate_says_what_differs_when_training_goes_on(source, target, momentum, said):
    arrays, _ = _write(source, _state(count=1, momentum=0.5))
    options = _choices(target, 1) | ({"count": 9} if target == "haiku" else {})
    found = translate(arrays, source, target, momentum=momentum, eps=1e-5, **options)
    assert [text for text in found.notes if said in text]


SOME_AXIS = [name for name, row in FRAMEWORKS.items() if row.axis]


@pytest.mark.parametrize("target", SOME_AXIS)
@pytest.mark.parametrize("source", ["torch", "numpy", "equinox", "onnx", "keras"])
def test_translate_puts_channels_where_the_target_has_them_and_says_so(source, target):
    """PyTorch's axis is that of its own batches, not of those that the target will get."""
    arrays, _ = _write(source)
    options = {"momentum": 0.5, "eps": 1e-5} | (
        {"ndim": 4, "count": 9} if target == "haiku" else {}
    )
    usual = translate(arrays, source, target, **options)
    axis = FRAMEWORKS[target].channel_axis
    given = translate(arrays, source, target, channel_axis=axis, **options)
    assert usual.settings == given.settings
    said = [text for text in usual.notes if text not in given.notes]
    other = FRAMEWORKS[source].channel_axis
    if other == axis:
        assert said == []
    else:
        (note,) = said
        assert f"as is usual in {FRAMEWORKS[target].title}; channel_axis={other} (" in note


def test_translate_carries_an_axis_that_was_chosen():
    arrays, _ = _write("keras")
    own = {"net/bn": {"channel_axis": 1}}
    found = translate(arrays, "keras", "flax", momentum=0.99, eps=1e-3, settings=own)
    assert found.settings["net/bn"]["axis"] == 1
    assert found.notes == []


def test_translate_from_torch_evaluates_batches_as_flax_has_them():
    """16×16 images with 16 channels, where a wrong axis is not refused."""
    rng = np.random.default_rng(0)
    old = _fresh("torch", -1)
    found = translate(old.arrays(), "torch", "flax", momentum=MOMENTUM, eps=EPS)
    linen = pytest.importorskip("flax.linen")
    layer = linen.BatchNorm(use_running_average=True, **found.settings[""])
    x = rng.normal(size=(2, CHANNELS, CHANNELS, CHANNELS)).astype(np.float32)
    y = layer.apply(found.arrays, np.moveaxis(x, 1, -1))
    np.testing.assert_allclose(np.moveaxis(y, -1, 1), old.evaluate(x), **CLOSE)


def test_translate_has_nothing_to_say_between_equal_conventions():
    arrays, _ = _write("keras")
    assert translate(arrays, "keras", "flax", momentum=0.99, eps=1e-3).notes == []


# ---- what is refused ----------------------------------------------------------------------------

BN = {"bn.running_mean": np.zeros(2), "bn.running_var": np.ones(2)}
GIVEN = {"momentum": 0.1, "eps": 1e-5}


@pytest.mark.parametrize(
    ("arrays", "options", "error", "said"),
    [
        (BN, {"eps": 1e-5}, ArgumentError, "bn: momentum must be given .* momentum 0.1"),
        (BN, {"momentum": 0.1}, ArgumentError, "bn: eps must be given .* eps 1e-05"),
        (BN, {**GIVEN, "momentum": 1.5}, ArgumentError, "momentum must be a number from 0 to 1"),
        (BN, {**GIVEN, "eps": -1}, ArgumentError, "eps must be finite and not negative"),
        (BN, {**GIVEN, "names": {"nb": "x"}}, ArgumentError, "got 'nb'. The batch norms are bn"),
        (BN, {**GIVEN, "settings": {"nb": {}}}, ArgumentError, "got 'nb'"),
        (BN, {**GIVEN, "settings": {"bn": {"epsilon": 1}}}, ArgumentError, "'epsilon'"),
        (BN, {**GIVEN, "settings": {"bn": {"eps": 1}}}, ArgumentError, "eps is known"),
        (BN, {**GIVEN, "ndim": 4}, ArgumentError, "takes no ndim"),
        (BN, {**GIVEN, "count": 4}, ArgumentError, "takes no count"),
        ({"w": np.zeros(2)}, GIVEN, ArgumentError, "must hold batch norms of PyTorch.*hold w"),
        ({}, GIVEN, ArgumentError, "hold nothing"),
        ([1], GIVEN, ArgumentError, "arrays must be a dict"),
        (BN, {**GIVEN, "momentum": True}, ArgumentError, "momentum must be a number, got True"),
        (BN, {**GIVEN, "momentum": np.complex64(0.1)}, ArgumentError, "momentum must be a number"),
        (BN, {**GIVEN, "eps": True}, ArgumentError, "eps must be a number, got True"),
        (BN, {**GIVEN, "settings": {"bn": 5}}, ArgumentError, "'bn': 5. The batch norms are bn"),
        (BN, {**GIVEN, "settings": 5}, ArgumentError, "settings must be a dict"),
        (BN, {**GIVEN, "settings": {"bn": {"channel_axis": "x"}}}, ArgumentError,
         "bn: channel_axis must be an integer from -32 to 31, got 'x'"),
        (BN, {**GIVEN, "names": 5}, ArgumentError, "names must be a dict"),
        (BN, {**GIVEN, "names": {"bn": 5}}, ArgumentError, "must be strings, got 5"),
        (BN, {**GIVEN, "names": {1: "x", "y": "z"}}, ArgumentError, "got 1. The batch norms"),
        (BN, {**GIVEN, "channel_axis": 999}, ArgumentError, "from -32 to 31, got 999"),
        (BN, {**GIVEN, "channel_axis": "x"}, ArgumentError, "from -32 to 31, got 'x'"),
        ({**BN, "bn.num_batches_tracked": np.array(-5)}, GIVEN, ArgumentError,
         "bn: count must be an integer from 0 to 9223372036854775807, got -5"),
        ({**BN, "bn.num_batches_tracked": np.array(2**64 - 1, np.uint64)}, GIVEN, ArgumentError,
         "bn: count must be"),
        ({**BN, "bn.running_mean": np.ma.masked_equal([0, 1], 1)}, GIVEN, ArgumentError,
         "bn: mean must not have masked values"),
        ({**BN, "bn.weight": np.ones(3)}, GIVEN, ShapeError, r"bn: gamma must .* got \(3,\)"),
        ({**BN, "bn.running_var": np.ones(3)}, GIVEN, ShapeError, "bn: var must"),
        ({**BN, "bn.running_var": -np.ones(2)}, GIVEN, ArgumentError, "bn: var must be finite"),
        ({**BN, "bn.running_mean": np.full(2, np.nan)}, GIVEN, ArgumentError, "bn: mean must"),
        ({**BN, "bn.bias": np.array(["a", "b"])}, GIVEN, DTypeError, "bn: beta must be real"),
        ({**BN, "bn.running_var": np.ones(2, bool)}, GIVEN, DTypeError, "var must be real.*bool"),
        ({**BN, "bn.num_batches_tracked": np.ones(2, int)}, GIVEN, ShapeError, "one integer"),
        ({**BN, **{k.replace("n.", "n..", 1): v for k, v in BN.items()}}, GIVEN, ArgumentError,
         "two layers would be called 'bn': 'bn' and 'bn.'"),
    ],
)  # fmt: skip
def test_translate_refuses_what_it_cannot_carry(arrays, options, error, said):
    with pytest.raises(error, match=said):
        translate(arrays, "torch", "keras", **options)


@pytest.mark.skipif(np.dtype(np.longdouble).itemsize == 8, reason="longdouble is float64 here")
def test_state_refuses_types_that_no_framework_has():
    with pytest.raises(DTypeError, match="mean must be of a type that frameworks have"):
        _state(mean=np.zeros(2, np.longdouble))


@pytest.mark.parametrize(
    ("source", "target"), [(["torch"], "keras"), ("torch", ["keras"]), ("torch", "pytorch")]
)
def test_translate_refuses_frameworks_that_there_are_not(source, target):
    with pytest.raises(ArgumentError, match="a framework must be one of"):
        translate(BN, source, target, **GIVEN)


@pytest.mark.parametrize("count", ["x", 1.5, True, -5, 2**63])
def test_write_refuses_counts_that_torch_cannot_hold(count):
    with pytest.raises(ArgumentError, match="count must be an integer from 0 to"):
        _write("torch", count=count)


@pytest.mark.parametrize(
    ("arrays", "both"),
    [
        ({"a/x": 1, "a": {"x": 2}}, r"arrays\['a/x'\] and arrays\['a'\]\['x'\]"),
        ({0: {"x": 1}, "0": {"x": 2}}, r"arrays\[0\]\['x'\] and arrays\['0'\]\['x'\]"),
        ({"a": [1], "a/0": 2}, r"arrays\['a'\]\[0\] and arrays\['a/0'\]"),
    ],
)
def test_read_names_two_arrays_of_the_same_name(arrays, both):
    with pytest.raises(ArgumentError, match=both):
        read({**_write("nnx")[0], **arrays}, "nnx", momentum=0.9, eps=1e-5)


@pytest.mark.parametrize("names", [["a", "a/scale"], ["a/scale", "a"]])
@pytest.mark.parametrize("target", ["flax", "nnx"])
def test_write_refuses_layers_inside_of_arrays_of_another(target, names):
    """Else the first order raises IndexError, and the second loses a layer."""
    with pytest.raises(ArgumentError, match="a/scale/mean must not be inside of .*a/scale|"
                       "a/scale/scale must not be inside of .*a/scale, which"):  # fmt: skip
        write({name: _state() for name in names}, target)


@pytest.mark.parametrize("source", ["haiku", "equinox"])
def test_read_refuses_variances_of_no_batch(source):
    fresh, _ = _write(source)
    if source == "haiku":
        for average in fresh["state"].values():
            average |= {k: np.zeros_like(v) for k, v in average.items()}
    else:
        fresh |= {k: np.zeros_like(v) for k, v in fresh.items() if "batch_" in k}
    with pytest.raises(ArgumentError, match="net.bn: has seen no batch yet"):
        read(fresh, source, momentum=0.5, eps=1e-5)


@pytest.mark.parametrize("target", ["haiku", "equinox"])
def test_write_refuses_averages_that_debiasing_makes_too_small(target):
    small = _state(var=np.full(2, 2e-37, np.float32), eps=0, momentum=0.001, count=1)
    with pytest.raises(ArgumentError, match="bn: var must not be too small for float32"):
        _write(target, small)
    dead = _state(mean=np.full(2, 1e-40, np.float32), momentum=0.001, count=1)
    _write(target, dead)  # beside √(var + ε) it is nothing


@pytest.mark.parametrize("count", [None, 0, 2**31 - 1])
@pytest.mark.parametrize("target", ["haiku", "equinox"])
def test_write_asks_for_the_count_that_debiasing_needs(target, count):
    with pytest.raises(ArgumentError, match=r"bn: count must be .* got"):
        _write(target, _state(count=count))


@pytest.mark.parametrize("target", ["haiku", "equinox"])
def test_write_refuses_a_momentum_that_leaves_nothing_to_debias(target):
    with pytest.raises(ArgumentError, match="must leave batches a weight"):
        _write(target, _state(momentum=0.0, count=3))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ndim": None}, "ndim must be"),
        ({"ndim": 1}, "ndim must be"),
        ({"ndim": 100}, "ndim must be an integer from 2 to 32, got 100"),
        ({"ndim": "4"}, "ndim must be an integer"),
        ({"channel_axis": 2, "ndim": 4}, "channel_axis must be 1 or -1"),
    ],
)
def test_write_asks_for_the_shape_that_haiku_needs(options, said):
    with pytest.raises(ArgumentError, match=said):
        _write("haiku", **options)


@pytest.mark.parametrize(
    ("source", "change", "said"),
    [
        ("keras", {"net/bn/renorm_mean": np.zeros(2)}, "batch renormalization"),
        ("equinox-ema", {"net.bn.ema_first_time_index": np.array(True)}, "has seen no batch"),
        ("equinox", {"net.bn.batch_counter": None}, r"must have \*/batch_counter"),
    ],
)
def test_read_refuses_what_only_one_framework_has(source, change, said):
    arrays = {k: v for k, v in (_write(source)[0] | change).items() if v is not None}
    with pytest.raises(ArgumentError, match=said):
        read(arrays, source, momentum=0.5, eps=1e-5)


def test_read_refuses_variables_of_linen_as_those_of_nnx():
    """Without it, scale and bias would be lost, which are elsewhere."""
    with pytest.raises(ArgumentError, match="source='flax'"):
        read(_write("flax")[0], "nnx", momentum=0.5, eps=1e-5)


def test_translate_refuses_a_network_and_says_what_to_pass():
    nn = pytest.importorskip("torch.nn")
    with pytest.raises(ArgumentError, match=r"got BatchNorm1d. Pass net.state_dict\(\)"):
        translate(nn.BatchNorm1d(2), "torch", "keras", **GIVEN)


def test_translation_prints_a_summary_without_arrays():
    arrays = BN | {"fc.weight": np.ones((2, 2))} | {f"a{k}": np.ones((1, 1)) for k in range(30)}
    found = translate(arrays, "torch", "onnx", **GIVEN)
    first, build, left_out, *notes = repr(found).splitlines()
    assert first == "Translation of batch norms: bn"
    assert build == "build them with momentum=0.9, epsilon=1e-05"
    assert left_out.startswith("left out 31 other arrays: fc.weight, a0, a1,")
    assert left_out.endswith(", a18 and 11 more")
    assert notes == [f"note: {text}" for text in found.notes] != []


def test_translate_copies_arrays():
    arrays = dict(BN)
    found = translate(arrays, "torch", "torch", **GIVEN)
    assert not np.shares_memory(found.arrays["bn.running_mean"], arrays["bn.running_mean"])


def test_read_takes_half_precision_as_it_is():
    arrays = {name: value.astype(np.float16) for name, value in BN.items()}
    found = translate(arrays, "torch", "flax", **GIVEN)
    assert found.arrays["batch_stats"]["bn"]["mean"].dtype == np.float16


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
@pytest.mark.parametrize("target", ["haiku", "equinox"])
def test_passage_keeps_half_precision_where_averages_are_debiased(target, kind):
    kind = pytest.importorskip("ml_dtypes").bfloat16 if kind == "bfloat16" else kind
    state = _state(mean=np.array([1e-3, 3.0], kind), var=np.array([1e-6, 5.0], kind))
    options = {"channel_axis": -1, "ndim": 4} if target == "haiku" else {}
    arrays, _ = write({"bn": _state(
        mean=state.mean, var=state.var, momentum=0.001, count=1
    )}, target, **options)  # fmt: skip
    (back,) = read(arrays, target, momentum=0.999, eps=1e-5)[0].values()
    assert back.var.dtype == np.float32
    for field in ("mean", "var"):
        values = getattr(state, field).astype(np.float32)
        np.testing.assert_allclose(getattr(back, field), values, rtol=3e-7)
        if target == "haiku":
            average = arrays["state"][f"bn/~/{field}_ema"]
            np.testing.assert_array_equal(average["average"].reshape(-1), values)
            share = np.float32(1) - np.float32(0.999)
            np.testing.assert_allclose(average["hidden"].reshape(-1), values * share, rtol=3e-7)


def test_write_debiases_integers():
    arrays, _ = _write("equinox", _state(var=np.array([1, 3]), momentum=0.5, count=1))
    assert arrays["net.bn.batch_state_index.1"].tolist() == [0.5, 1.5]


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_settings_are_decimals_that_numbers_of_numpy_stand_for(kind):
    found = translate(BN, "torch", "keras", momentum=kind(0.1), eps=kind(1e-3))
    assert found.settings["bn"]["momentum"] == 0.9
    assert found.settings["bn"]["epsilon"] == 1e-3


# ---- files --------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _run(*arguments):
    pytest.importorskip("typer")
    return cli.main(["translate", *map(str, arguments)])


NUMBERS = ("--momentum", 0.1, "--eps", 1e-5)


def _save_torch(path):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    net(torch.randn(9, 3))
    torch.save(net.state_dict(), path)
    return {name: tensor.numpy() for name, tensor in net.state_dict().items()}


def test_command_prints_how_to_build_the_layers(folder, capsys):
    _save_torch("net.pt")
    assert _run("net.pt", "net.npz", "--to", "keras", "--rename", "1=net/bn", *NUMBERS) == cli.DONE
    output, errors = capsys.readouterr()
    assert output.splitlines() == [
        "translated 1 batch norm from PyTorch to Keras 3",
        "build them with momentum=0.9, epsilon=1e-05, scale=True, center=True, axis=-1",
        "left out 2 other arrays: 0.weight, 0.bias",
        "wrote net.npz",
    ]
    assert "biased variances" in errors


@pytest.mark.parametrize("out", ["net.pth", "net.safetensors", "net.npz"])
def test_command_files_hold_what_translate_returns(folder, out):
    weights = _save_torch("net.pt")
    if out.endswith("safetensors"):
        pytest.importorskip("safetensors")
    assert _run("net.pt", out, "--to", "torch", *NUMBERS) == cli.DONE
    arrays, _ = files.load(folder / out, "torch")
    assert set(arrays) == {name for name in weights if name.startswith("1.")}
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, weights[name])


def test_command_reads_half_precision_of_torch(folder):
    torch = pytest.importorskip("torch")
    layer = torch.nn.BatchNorm1d(3).bfloat16()
    torch.save({"state_dict": layer.state_dict()}, "net.pt")
    assert _run("net.pt", "net.npz", "--to", "numpy", *NUMBERS) == cli.DONE
    assert np.load("net.npz")["running_var"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("framework", ["flax", "nnx"])
def test_msgpack_files_return_what_was_saved(folder, framework):
    pytest.importorskip("msgpack")
    arrays, _ = _write(framework)
    files.save(arrays, folder / "net.msgpack", framework)
    loaded, _ = files.load(folder / "net.msgpack", framework)
    assert _listed(loaded) == WRITTEN[framework]


def test_msgpack_files_are_those_of_flax(folder):
    pytest.importorskip("msgpack")
    serialization = pytest.importorskip("flax.serialization")
    arrays, _ = _write("flax")
    files.save(arrays, folder / "net.msgpack", "flax")
    restored = serialization.msgpack_restore((folder / "net.msgpack").read_bytes())
    assert _listed(restored) == WRITTEN["flax"]
    state = {**arrays, "step": 3, "rate": np.float32(0.5)}
    (folder / "theirs.msgpack").write_bytes(serialization.msgpack_serialize(state))
    found, _ = files.load(folder / "theirs.msgpack", "flax")
    states, left_out = read(found, "flax", momentum=0.9, eps=1e-5)
    assert list(states) == ["net/bn"]
    assert sorted(left_out) == ["rate", "step"]


@pytest.mark.parametrize("out", ["net.pt", "net.safetensors", "net.npz"])
def test_files_hold_bfloat16_as_float32(folder, out):
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    if out != "net.npz":
        pytest.importorskip("torch" if out == "net.pt" else "safetensors")
    arrays, _ = write({"bn": _state(var=np.array([0.5, 3.0], bfloat16))}, "torch")
    files.save(arrays, folder / out, "torch")
    loaded = files.load(folder / out, "torch")[0]["bn.running_var"]
    assert loaded.dtype == np.float32
    assert loaded.tolist() == [0.5, 3.0]


@pytest.mark.parametrize("out", ["net.pt", "net.safetensors", "net.npz", "net.msgpack"])
def test_files_hold_numbers_of_the_other_byte_order(folder, out):
    framework = "flax" if out == "net.msgpack" else "torch"
    if framework == "torch" and out != "net.npz":
        pytest.importorskip("torch" if out == "net.pt" else "safetensors")
    elif framework == "flax":
        pytest.importorskip("msgpack")
    swapped = np.dtype(np.float32).newbyteorder()
    arrays, _ = write({"bn": _state(var=np.array([0.5, 3.0], swapped))}, framework)
    files.save(arrays, folder / out, framework)
    loaded, _ = files.load(folder / out, framework)
    ((_, state),) = read(loaded, framework, momentum=0.1, eps=1e-5)[0].items()
    assert state.var.tolist() == [0.5, 3.0]


def _save_safetensors(path, kind):
    torch, safetensors = pytest.importorskip("torch"), pytest.importorskip("safetensors.torch")
    layer = torch.nn.BatchNorm1d(3)
    layer.running_var.copy_(torch.tensor([0.5, 1.0, 3.0]))
    state = {f"bn.{name}": tensor for name, tensor in layer.state_dict().items()}
    if kind is not None:
        state["bn.running_var"] = state["bn.running_var"].to(kind)
    others = {
        f"{name}.{rank}": torch.ones([2] * rank).to(getattr(torch, name))
        for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2") for rank in (0, 1, 2)
    }  # fmt: skip
    safetensors.save_file({**state, **others}, path)
    return list(others)


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
def test_safetensors_are_read_whatever_types_they_hold(folder, kind):
    """NumPy has no bfloat16 and no float8."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("ml_dtypes")
    others = _save_safetensors("net.safetensors", getattr(torch, kind))
    states, left_out = read(files.load(folder / "net.safetensors")[0], "torch", **GIVEN)
    assert states["bn"].var.astype(float).tolist() == [0.5, 1, 3]
    assert sorted(left_out) == sorted(others)


@pytest.mark.parametrize("shape", [(1 << 40,), (2, 2)])
def test_npz_arrays_that_are_of_no_batch_norm_are_not_read(folder, shape):
    np.savez("net.npz", **BN)
    with zipfile.ZipFile("net.npz", "a") as archive, archive.open("big.npy", "w") as member:
        about = {"descr": "<f8", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(member, about)  # and no values
    with zipfile.ZipFile("net.npz", "a") as archive:
        archive.writestr("readme", b"no array")
    states, left_out = read(files.load(folder / "net.npz", "torch")[0], "torch", **GIVEN)
    assert (list(states), left_out) == (["bn"], ["big", "readme"])


def test_npz_arrays_of_bfloat16_are_read(folder):
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    np.savez("net.npz", **{name: array.astype(bfloat16) for name, array in BN.items()})
    found, _ = files.load(folder / "net.npz", "torch")
    assert found["bn.running_var"].tolist() == [1, 1]


def test_safetensors_whose_statistics_are_of_eight_bits_are_refused(folder, capsys):
    _save_safetensors("net.safetensors", pytest.importorskip("torch").float8_e4m3fn)
    assert _run("net.safetensors", "net.npz", "--to", "keras", *NUMBERS) == cli.UNUSABLE
    assert "bn: var must be real numbers, got [('F8_E4M3'" in capsys.readouterr().err


def _keras_model(**options):
    keras = import_keras()
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((3,)),
            layers.Dense(4),
            layers.BatchNormalization(momentum=0.8, epsilon=0.01, name="norm", **options),
            keras.Sequential([layers.BatchNormalization(axis=1, name="inner")], name="sub"),
        ]
    )
    rng = np.random.default_rng(0)
    for variable in model.variables:
        variable.assign(rng.uniform(1, 2, variable.shape))
    return model


@pytest.mark.filterwarnings("ignore")  # of Keras
@pytest.mark.parametrize("options", [{}, {"scale": False}, {"center": False}])
def test_keras_files_tell_settings_and_layers(folder, options):
    model = _keras_model(**options)
    model.save("net.keras")
    found, settings = files.load(folder / "net.keras", "keras")
    assert settings == {
        "norm": {"momentum": 0.8, "eps": 0.01, "channel_axis": -1},
        "inner": {"momentum": 0.99, "eps": 0.001, "channel_axis": 1},
    }
    states, _ = read(found, "keras", settings=settings)
    for layer in (model.layers[1], model.layers[2].layers[0]):
        state = states[layer.name]
        for field, name in (("mean", "moving_mean"), ("var", "moving_variance")):
            stored = keras_numpy(getattr(layer, name))
            np.testing.assert_array_equal(getattr(state, field), stored)
        for field in ("gamma", "beta"):
            stored, read_one = getattr(layer, field), getattr(state, field)
            assert (stored is None) == (read_one is None)
            if stored is not None:
                np.testing.assert_array_equal(read_one, keras_numpy(stored))


@pytest.mark.filterwarnings("ignore")  # of Keras
def test_keras_weights_are_recognized_by_the_names_that_keras_gives(folder):
    model = _keras_model()
    model.save_weights("net.weights.h5")
    found, settings = files.load(folder / "net.weights.h5", "keras")
    states, left_out = read(found, "keras", momentum=0.8, eps=0.01)
    assert settings == {}
    assert list(states) == ["norm", "inner"]
    assert len(left_out) == 2
    stored = keras_numpy(model.layers[1].moving_variance)
    np.testing.assert_array_equal(states["norm"].var, stored)


def test_keras_arrays_of_bfloat16_are_read(folder):
    h5py = pytest.importorskip("h5py")
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    with h5py.File("net.weights.h5", "w") as file:
        for k in range(4):
            values = np.full(2, k, bfloat16).view("V2")
            file[f"batch_normalization/vars/{k}"] = values
    found, _ = files.load(folder / "net.weights.h5", "keras")
    assert found["batch_normalization/moving_variance"].tolist() == [3, 3]


def test_keras_configurations_that_are_too_large_are_refused(folder, monkeypatch):
    with zipfile.ZipFile("net.keras", "w") as archive:
        archive.writestr("config.json", "[" + " " * 100 + "]")
    monkeypatch.setattr(files, "MOST_CONFIG", 100)
    with pytest.raises(ArgumentError, match=r"net.keras: config.json must have at most 100 bytes"):
        files.load(folder / "net.keras", "keras")


@pytest.mark.filterwarnings("ignore")  # of Keras
def test_keras_weights_without_names_are_refused(folder, capsys):
    _keras_model(scale=False).save_weights("net.weights.h5")
    assert _run("net.weights.h5", "net.pt", *NUMBERS) == cli.UNUSABLE
    assert "net.weights.h5: norm: has 3 arrays, so gamma cannot be" in capsys.readouterr().err


def test_keras_files_of_versions_that_do_not_name_layers_are_refused(folder, capsys):
    """There the numbers in the file count layers otherwise than their names do."""
    h5py = pytest.importorskip("h5py")
    with h5py.File("model.weights.h5", "w") as file:
        for number in range(4):
            file[f"layers/batch_normalization/vars/{number}"] = np.ones(2)
    config = {"name": "batch_normalization", "momentum": 0.9, "epsilon": 1e-5, "axis": -1}
    with zipfile.ZipFile("net.keras", "w") as archive:
        model = {"layers": [{"class_name": "BatchNormalization", "config": config}]}
        archive.writestr("config.json", json.dumps(model))
        archive.write("model.weights.h5")
    assert _run("net.keras", "net.npz", "--to", "numpy") == cli.UNUSABLE
    assert "layers/batch_normalization: has no name" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")  # of the exporters
@pytest.mark.parametrize("dynamo", [False, True])
def test_onnx_files_of_torch_keep_names_and_settings(folder, dynamo):
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnxscript")
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.BatchNorm2d(4, eps=1e-3, momentum=0.2)
    )
    net(torch.randn(5, 3, 6, 6))
    example = (torch.randn(2, 3, 6, 6),)
    torch.onnx.export(net.eval(), example, "net.onnx", dynamo=dynamo, verbose=False)
    found, settings = files.load(folder / "net.onnx", "onnx")
    assert settings == {"2": {"momentum": 0.8, "eps": 1e-3}}
    result = translate(found, "onnx", "torch", settings=settings)
    assert result.settings["2"] == {"momentum": 0.2, "eps": 1e-3, "affine": True}
    for name, array in result.arrays.items():
        np.testing.assert_array_equal(array, net.state_dict()[name].numpy())
    assert sorted(result.left_out) == ["0.bias", "0.weight"]


@pytest.mark.filterwarnings("ignore")  # of the exporter
def test_onnx_statistics_that_the_exporter_has_merged_are_found(folder):
    """Those of a layer without training equal its bias and its weight, and are one constant."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnx")
    net, example = torch.nn.BatchNorm1d(3).eval(), (torch.randn(2, 3),)
    torch.onnx.export(net, example, "net.onnx", dynamo=False)
    found, settings = files.load(folder / "net.onnx", "onnx")
    ((_, state),) = read(found, "onnx", settings=settings)[0].items()
    assert state.var.tolist() == [1, 1, 1]


def _onnx_file(path, name="bn", inside=False, computed=False, domain=""):
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    arrays, settings = write({"bn": _state()}, "onnx")
    tensors = [numpy_helper.from_array(a, k) for k, a in arrays.items()]
    inputs = ["x", *sorted(arrays, key=["bn/scale", "bn/B", "bn/input_mean", "bn/input_var"].index)]
    value = helper.make_tensor_value_info
    x, y = value("x", TensorProto.FLOAT, ["N", 2]), value("y", TensorProto.FLOAT, ["N", 2])
    given = [x]
    if computed:
        tensors = [tensor for tensor in tensors if tensor.name != inputs[-1]]
        given.append(value(inputs[-1], TensorProto.FLOAT, [2]))
    node = helper.make_node(
        "BatchNormalization", inputs, ["y"], name, domain=domain, **settings["bn"]
    )
    nodes = [node]
    if inside:
        branch = helper.make_graph([node], "branch", [], [y])
        given.append(value("flag", TensorProto.BOOL, []))
        nodes = [helper.make_node("If", ["flag"], ["y"], then_branch=branch, else_branch=branch)]
    graph = helper.make_graph(nodes, "g", given, [y], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)]), path)


def test_onnx_files_are_read_as_onnxruntime_runs_them(folder):
    runtime = pytest.importorskip("onnxruntime")
    _onnx_file("net.onnx")
    found, settings = files.load(folder / "net.onnx", "onnx")
    arrays, (built,) = (lambda r: (r.arrays, r.settings.values()))(
        translate(found, "onnx", "numpy", settings=settings, names={"bn": ""}, channel_axis=1)
    )
    from batchnorm import BatchNorm

    layer = BatchNorm(2, **built).eval()
    layer.load_state_dict({**arrays, "num_batches_tracked": np.array(0)})
    x = np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32)
    (y,) = runtime.InferenceSession("net.onnx").run(None, {"x": x})
    np.testing.assert_allclose(layer(x), y, **CLOSE)


@pytest.mark.parametrize("domain", ["", "ai.onnx"])
def test_onnx_nodes_are_found_in_the_domain_of_onnx(folder, domain):
    _onnx_file("net.onnx", domain=domain)
    assert list(files.load(folder / "net.onnx")[1]) == ["bn"]


def test_onnx_nodes_of_other_domains_are_none_of_onnx(folder, capsys):
    _onnx_file("net.onnx", domain="com.custom")
    assert _run("net.onnx", "net.pt") == cli.UNUSABLE
    assert "arrays must hold batch norms of ONNX" in capsys.readouterr().err


def test_onnx_nodes_in_subgraphs_and_without_names_are_found(folder):
    _onnx_file("net.onnx", name="", inside=True)
    found, settings = files.load(folder / "net.onnx", "onnx")
    assert list(settings) == ["BatchNormalization_0", "BatchNormalization_1"]
    assert found["BatchNormalization_1/input_var"].tolist() == VAR


def test_onnx_nodes_without_names_get_some_that_others_have_not(folder):
    onnx = pytest.importorskip("onnx")
    one = onnx.numpy_helper.from_array(np.ones(2, np.float32), "one")
    names = ["BatchNormalization_1", "", "", "BatchNormalization_2"]
    nodes = [
        onnx.helper.make_node("BatchNormalization", [f"x{k}", *["one"] * 4], [f"x{k + 1}"], name)
        for k, name in enumerate(names)
    ]
    ends = (
        [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", 2])]
        for name in ("x0", "x4")
    )
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", *ends, [one])), "net.onnx")
    found = list(files.load(folder / "net.onnx", "onnx")[1])
    assert found == [names[0], "BatchNormalization_3", "BatchNormalization_4", names[3]]


def test_onnx_nodes_whose_statistics_are_computed_are_refused(folder, capsys):
    _onnx_file("net.onnx", computed=True)
    assert _run("net.onnx", "net.pt") == cli.UNUSABLE
    assert "net.onnx: bn: must have constants" in capsys.readouterr().err


def test_onnx_nodes_in_functions_are_found(folder):
    onnx = pytest.importorskip("onnx")
    _onnx_file("net.onnx")
    model = onnx.load("net.onnx")
    (node,) = model.graph.node
    constants = [
        onnx.helper.make_node("Constant", [], [tensor.name], value=tensor)
        for tensor in model.graph.initializer
    ]
    opset = [onnx.helper.make_opsetid("", 15)]
    function = onnx.helper.make_function("own", "Norm", ["x"], ["y"], [*constants, node], opset)
    model.functions.append(function)
    model.opset_import.append(onnx.helper.make_opsetid("own", 1))
    node.CopyFrom(onnx.helper.make_node("Norm", ["x"], ["y"], domain="own"))
    onnx.save(model, "net.onnx")
    found, settings = files.load(folder / "net.onnx", "onnx")
    assert list(settings) == ["bn"]
    assert found["bn/input_var"].tolist() == VAR


DAMAGED = ["net.pt", "net.safetensors", "net.npz", "net.msgpack", "net.keras", "net.weights.h5",
           "net.onnx"]  # fmt: skip
READERS = {".pt": "torch", ".safetensors": "safetensors", ".msgpack": "msgpack",
           ".keras": "h5py", ".h5": "h5py", ".onnx": "onnx"}  # fmt: skip


@pytest.mark.parametrize("content", [b"", b"damaged" * 100, b"PK\x03\x04", b"\x89HDF\r\n\x1a\n"])
@pytest.mark.parametrize("name", DAMAGED)
def test_command_refuses_damaged_files_in_one_line(name, content, folder, capsys):
    (folder / name).write_bytes(content)
    if (reader := READERS.get((folder / name).suffix)) is not None:
        pytest.importorskip(reader)
    old = ("--from", "keras" if "h5" in name or "keras" in name else "onnx" if "onnx" in name
           else "flax" if "msgpack" in name else "torch")  # fmt: skip
    assert _run(name, "out.npz", *old, "--to", "torch", *NUMBERS) == cli.UNUSABLE
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.count("\n") == 1
    assert errors.startswith(f"batchnorm: {name}: ")
    assert [path.name for path in folder.iterdir()] == [name]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["none.pt", "net.npz", "--to", "keras"], "none.pt: there is no such file. Name another."),
        (["other.npz", "out.npz", "--to", "keras", *NUMBERS], "names its arrays so. Pass --from"),
        (["net.npz", "out.npz", "--from", "torch", *NUMBERS], "Pass --to"),
        (["net.npz", "out.npz", "--from", "pytorch", "--to", "keras"], "one of torch (PyTorch),"),
        (["net.npz", "out.npz", "--to", "jax"], "nnx (Flax NNX), haiku (Haiku), equinox ("),
        (["net.npz", "out.h5"], "end in .pt, .pth, .safetensors, .npz, .msgpack. Name it so."),
        (["net.h5", "out.npz", "--to", "keras"], "Save the weights in such a file."),
        (["net.npz", "out.pt", "--from", "torch", "--to", "keras"], "is a file of torch, not of"),
        (["net.npz", "out.keras", "--from", "torch", *NUMBERS], "hold whole models"),
        (["net.npz", "out.onnx", "--from", "torch", *NUMBERS], "hold whole models"),
        (["net.npz", "./net.npz", "--to", "torch", *NUMBERS], "OUT must be another file than IN"),
        (["net.npz", "other.npz", "--to", "keras", *NUMBERS], "other.npz: exists, and"),
        (["net.npz", "other.npz", "--to", "keras"], "net.npz: bn: momentum and eps must be given"),
        (["net.npz", "no/out.npz", "--from", "torch", "--to", "torch"], "'no' is not one"),
        (["net.npz", "out.npz", "--from", "torch", "--to", "keras"], "net.npz: bn: momentum and"),
        (["net.npz", "out.npz", "--from", "torch", "--to", "keras", "--rename", "bn"], "OLD=NEW"),
        (["net.npz", "out.npz", "--to", "keras", "--rename", "bn=\udcff"], "in printable text"),
        (
            ["net.npz", "out.npz", "--to", "keras", "--rename", "bn=a", "--rename", "bn=b"],
            "--rename must name a layer once, got bn=a and bn=b.",
        ),
        (
            [
                "net.npz",
                "out.npz",
                "--to",
                "haiku",
                "--channel-axis",
                1,
                "--ndim",
                100,
                "--count",
                3,
                *NUMBERS,
            ],
            "net.npz: ndim must be an integer from 2 to 32, got 100.",
        ),
        (["net.npz", "out.pt", "--count", 10**23, *NUMBERS], "count must be an integer from 0 to"),
    ],
)
def test_command_refuses_in_one_line_and_writes_nothing(arguments, said, folder, capsys):
    np.savez("net.npz", **BN, **{"fc.weight": np.ones((2, 2))})
    np.savez("other.npz", values=np.ones(2))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert _run(*arguments) == cli.UNUSABLE
    output, errors = capsys.readouterr()
    assert output == ""
    assert said in errors
    assert errors.count("\n") == 1
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_command_replaces_what_it_has_written(folder):
    np.savez("net.npz", **BN)
    for mean in (1, 2):
        np.savez("net.npz", **BN | {"bn.running_mean": np.full(2, mean)})
        assert _run("net.npz", "out.npz", "--to", "flax", *NUMBERS) == cli.DONE
        assert np.load("out.npz")["batch_stats/bn/mean"].tolist() == [mean, mean]


def test_trees_that_are_too_deep_are_refused():
    circle = {"bn": {}}
    circle["bn"]["again"] = circle
    deep = {f"{'a.' * 2000}{name}": array for name, array in BN.items()}
    for arrays, old, new in [(circle, "flax", "torch"), (deep, "torch", "nnx")]:
        with pytest.raises(ArgumentError, match="at most 100 parts, got .{7,20}/… Is a dict"):
            translate(arrays, old, new, momentum=0.1, eps=1e-5)
    with pytest.raises(ArgumentError, match="at most 100 parts"):
        translate(BN, "torch", "nnx", momentum=0.1, eps=1e-5, names={"bn": "a/" * 2000})


def test_command_escapes_control_characters_of_names(folder, capsys):
    np.savez("net.npz", **BN, **{"a\n\x1b[1m": np.ones((2, 2))})
    assert _run("net.npz", "out.npz", "--to", "flax", *NUMBERS) == cli.DONE
    assert "left out 1 other array: a\\n\\x1b[1m\n" in capsys.readouterr().out


@pytest.mark.parametrize("framework", EVERY)
def test_command_recognizes_frameworks_by_the_names_of_arrays(framework, folder, capsys):
    arrays, _ = _write(framework)
    files.save(arrays, folder / "net.npz", framework)
    numbers = ("--momentum", 0.5, "--eps", 1e-5)
    assert _run("net.npz", "out.npz", "--to", "torch", *numbers) == cli.DONE
    assert f"from {FRAMEWORKS[framework].title} to PyTorch\n" in capsys.readouterr().out


def test_command_recognizes_nnx_in_files_that_are_mostly_of_linen(folder, capsys):
    pytest.importorskip("msgpack")
    files.save(_write("nnx")[0], folder / "net.msgpack", "nnx")
    assert _run("net.msgpack", "out.npz", "--to", "torch", "--momentum", 0.9, "--eps", 0.1) == 0
    assert "from Flax NNX to" in capsys.readouterr().out


def test_save_leaves_nothing_when_writing_fails(folder):
    with pytest.raises(ArgumentError, match="cannot be written"):
        files.save({"bn.weight": _Unwritable()}, folder / "out.npz", "torch")
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("name", ["out.pt", "out.safetensors", "out.npz", "out.msgpack"])
def test_save_names_the_file_if_the_system_cannot_write_it(name, folder, monkeypatch):
    pytest.importorskip(READERS.get(Path(name).suffix, "numpy"))
    nowhere = contextlib.nullcontext(folder / "none" / name)
    monkeypatch.setattr(files, "replacing", lambda path: nowhere)
    framework = "flax" if "msgpack" in name else "torch"
    arrays = translate(BN, "torch", framework, momentum=0.1, eps=1e-5).arrays
    with pytest.raises(ArgumentError, match=rf"{name}: cannot be written \(No such"):
        files.save(arrays, folder / name, framework)


class _Unwritable:
    dtype = np.dtype(float)

    def __array__(self, dtype=None, copy=None):
        raise OSError("no space")
