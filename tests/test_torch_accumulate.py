"""accumulate: one update of the running statistics for the micro-batches of one step."""

import copy
import io
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from batchnorm.errors import ArgumentError  # noqa: E402
from batchnorm.torch import (  # noqa: E402
    BatchNorm1d,
    BatchNorm2d,
    NonFiniteError,
    accumulate,
    convert,
    freeze,
)

UNEVEN = [5, 2, 8, 3]
# Statistics are merged in float64, and rounded to the buffers' type once: for float32, by 2⁻²⁴ of
# values below 8, before and after momentum, by each of the two ways.
EXACT = {torch.float64: {"rtol": 0, "atol": 1e-12}, torch.float32: {"rtol": 0, "atol": 2**-19}}
momenta = pytest.mark.parametrize("momentum", [0.1, 1.0, 0.0, None])


@pytest.fixture
def x():
    """Examples whose mean moves on, so that the spread between micro-batches counts."""
    generator = torch.Generator().manual_seed(20150211)
    x = torch.randn((sum(UNEVEN), 3, 4), generator=generator, dtype=torch.float64)
    return x + torch.linspace(-2, 2, len(x)).view(-1, 1, 1)


def _layer(**keywords):
    layer = BatchNorm1d(3, dtype=torch.float64, **keywords)
    with torch.no_grad():
        layer.running_mean.copy_(torch.tensor([0.5, -1.0, 2.0]))
        layer.running_var.copy_(torch.tensor([0.5, 1.0, 2.0]))
        layer.num_batches_tracked.fill_(3)
    return layer


def _state(net):
    return copy.deepcopy(net.state_dict())


def _assert_state(net, state, **bound):
    for key, value in net.state_dict().items():
        torch.testing.assert_close(
            value, state[key], **(bound or {"rtol": 0, "atol": 0}), msg=lambda m, k=key: f"{k}: {m}"
        )


def _accumulated(layer, parts, masks=None):
    with accumulate(layer):
        for i, part in enumerate(parts):
            layer(part) if masks is None else layer(part, mask=masks[i])
    return layer


# ---- what it makes equal ------------------------------------------------------------------------


@momenta
def test_running_statistics_are_those_of_one_large_batch(x, momentum):
    layer, large = _layer(momentum=momentum), _layer(momentum=momentum)
    _accumulated(layer, x.split(UNEVEN))
    large(x)
    _assert_state(layer, large.state_dict(), **EXACT[torch.float64])


@momenta
def test_running_statistics_follow_their_definition(x, momentum):
    layer = _layer(momentum=momentum)
    before = _state(layer)
    _accumulated(layer, x.split(UNEVEN))
    share = 1 / 4 if momentum is None else momentum
    for name, new in (("mean", x.mean((0, 2))), ("var", x.var((0, 2), correction=1))):
        expected = (1 - share) * before[f"running_{name}"] + share * new
        torch.testing.assert_close(
            getattr(layer, f"running_{name}"), expected, **EXACT[torch.float64]
        )


def test_running_statistics_in_float32_are_those_of_one_large_batch(x):
    layer, large = _layer().float(), _layer().float()
    _accumulated(layer, x.float().split(UNEVEN))
    large(x.float())
    _assert_state(layer, large.state_dict(), **EXACT[torch.float32])


def test_micro_batches_count_as_one_batch(x):
    assert int(_accumulated(_layer(), x.split(UNEVEN)).num_batches_tracked) == 4


def test_each_block_is_a_batch_of_the_plain_average(x):
    # In the third block the counter is six.
    layer, large = _layer(momentum=None), _layer(momentum=None)
    for part in x.split(6):
        _accumulated(layer, part.split([2, 3, 1]))
        large(part)
    _assert_state(layer, large.state_dict(), **EXACT[torch.float64])


@pytest.mark.parametrize("group_size", [1, 2, 4, 100])
def test_running_statistics_are_those_of_one_large_batch_when_groups_normalize(x, group_size):
    layer, large = _layer(group_size=group_size), _layer()
    _accumulated(layer, x.split(UNEVEN))
    large(x)
    _assert_state(layer, large.state_dict(), **EXACT[torch.float64])


@pytest.mark.parametrize("kind", ["boolean", "weights"])
def test_running_statistics_are_those_of_one_large_batch_under_masks(x, kind):
    mask = torch.arange(len(x) * 4).view(len(x), 4) % 3
    mask = mask > 0 if kind == "boolean" else mask.double()
    layer, large = _layer(), _layer()
    _accumulated(layer, x.split(UNEVEN), mask.split(UNEVEN))
    large(x, mask=mask)
    _assert_state(layer, large.state_dict(), **EXACT[torch.float64])


def test_micro_batch_that_is_masked_altogether_has_no_part(x):
    layer, large = _layer(), _layer()
    mask = torch.ones(len(x), 4, dtype=torch.bool)
    mask[: UNEVEN[0]] = False
    _accumulated(layer, x.split(UNEVEN), mask.split(UNEVEN))
    large(x[UNEVEN[0] :])
    _assert_state(layer, large.state_dict(), **EXACT[torch.float64])


def test_empty_micro_batch_has_no_part(x):
    layer, large = _layer(), _layer()
    _accumulated(layer, [x, x[:0]])
    large(x)
    _assert_state(layer, large.state_dict(), **EXACT[torch.float64])


def test_statistics_far_from_zero_merge_exactly(x):
    # Squares of 1e8 would lose the variance: merged, it is right to 1e8·u·1e2.
    layer, offset = _layer(momentum=1.0), 1e8
    _accumulated(layer, (x + offset).split(UNEVEN))
    exact = (x + offset - offset).var((0, 2), correction=1)
    torch.testing.assert_close(layer.running_var, exact, rtol=1e-6, atol=0)


def test_all_layers_of_a_model_take_part(x):
    net = convert(nn.ModuleList([nn.BatchNorm1d(3), nn.BatchNorm1d(3)])).double()
    large = copy.deepcopy(net)
    with accumulate(net):
        for part in x.split(UNEVEN):
            net[0](part), net[1](2 * part)
    large[0](x), large[1](2 * x)
    _assert_state(net, large.state_dict(), **EXACT[torch.float64])


def test_layer_used_twice_merges_both_uses(x):
    layer, large = _layer(), _layer()
    _accumulated(layer, [x, 3 * x])
    large(torch.cat([x, 3 * x]))
    _assert_state(layer, large.state_dict(), **EXACT[torch.float64])


def test_statistics_with_gradient_accumulation_are_those_of_one_large_batch(x):
    layer, large = _layer(), _layer()
    with accumulate(layer):
        for part in x.split(UNEVEN):
            layer(part).square().sum().backward()
    large(x)
    _assert_state(layer, large.state_dict(), **EXACT[torch.float64])


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointed_micro_batches_are_counted_once(x, reentrant):
    layer, large = _layer(), _layer()
    with accumulate(layer):
        for part in x.split(UNEVEN):
            y = checkpoint(layer, part.requires_grad_(), use_reentrant=reentrant)
            y.square().sum().backward()
    large(x)
    _assert_state(layer, large.state_dict(), **EXACT[torch.float64])


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointed_micro_batches_are_counted_once_when_the_backward_comes_later(x, reentrant):
    layer, large = _layer(), _layer()
    with accumulate(layer):
        y = checkpoint(layer, x.requires_grad_(), use_reentrant=reentrant)
    y.square().sum().backward()
    large(x)
    _assert_state(layer, large.state_dict(), **EXACT[torch.float64])


# ---- what it does not make equal ----------------------------------------------------------------


def test_each_micro_batch_is_normalized_by_itself(x):
    layer, alone, large = _layer(), _layer(), _layer()
    with accumulate(layer):
        ys = [layer(part) for part in x.split(UNEVEN)]
    for y, part in zip(ys, x.split(UNEVEN), strict=True):
        torch.testing.assert_close(y, alone(part), **EXACT[torch.float64])
    # By its own mean: those of the micro-batches differ by some tenths at least.
    assert float((torch.cat(ys) - large(x)).detach().abs().max()) > 0.1


def test_gradients_are_not_those_of_one_large_batch(x):
    layer, large = _layer(), _layer()
    with accumulate(layer):
        for part in x.split(UNEVEN):
            layer(part).pow(3).sum().backward()
    large(x).pow(3).sum().backward()
    assert float((layer.weight.grad - large.weight.grad).abs().max()) > 0.1


# ---- what changes nothing -----------------------------------------------------------------------


def test_running_statistics_stay_until_the_end(x):
    layer = _layer()
    before = _state(layer)
    with accumulate(layer):
        layer(x)
        _assert_state(layer, before)


def test_empty_block_changes_nothing():
    layer = _layer()
    before = _state(layer)
    with accumulate(layer):
        pass
    _assert_state(layer, before)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_evaluation_inside_changes_nothing(x, momentum):
    layer = _layer(momentum=momentum).eval()
    before = _state(layer)
    with accumulate(layer):
        y = layer(x)
    _assert_state(layer, before)
    torch.testing.assert_close(y, layer(x), rtol=0, atol=0)


def test_evaluation_between_micro_batches_has_no_part(x):
    layer, large = _layer(), _layer()
    with accumulate(layer):
        layer.train()(x[:9])
        layer.eval()(100 * x)
        layer.train()(x[9:])
    large(x)
    _assert_state(layer, large.state_dict(), **EXACT[torch.float64])


def test_frozen_layer_stays_as_it_is(x):
    layer = freeze(_layer())
    before = _state(layer)
    _accumulated(layer, x.split(UNEVEN))
    _assert_state(layer, before)


def test_layer_without_running_statistics_has_none_afterwards(x):
    layer = BatchNorm1d(3, track_running_stats=False, dtype=torch.float64)
    _accumulated(layer, x.split(UNEVEN))
    assert layer.running_mean is None


def test_layer_that_was_not_called_stays_as_it_is(x):
    net = nn.ModuleList([_layer(), _layer()])
    before = _state(net[1])
    with accumulate(net):
        net[0](x)
    _assert_state(net[1], before)


def _interrupted(layer, x):
    with accumulate(layer):
        layer(x)
        raise KeyError


def test_exception_inside_leaves_the_running_statistics(x):
    layer = _layer()
    before = _state(layer)
    with pytest.raises(KeyError):
        _interrupted(layer, x)
    _assert_state(layer, before)


def test_layer_goes_on_as_usual_after_an_exception(x):
    layer, usual = _layer(), _layer()
    with pytest.raises(KeyError):
        _interrupted(layer, 3 * x)
    for net in (layer, usual):
        net(x)
    _assert_state(layer, usual.state_dict())


def test_layer_goes_on_as_usual_afterwards(x):
    layer, usual = _layer(), _layer()
    _accumulated(layer, [x])
    for part in (x, x):
        usual(part)
    layer(x)
    _assert_state(layer, usual.state_dict(), **EXACT[torch.float64])


def test_blocks_follow_each_other(x):
    layer, usual = _layer(), _layer()
    for part in x.split(9):
        _accumulated(layer, part.split([4, 5]))
        usual(part)
    _assert_state(layer, usual.state_dict(), **EXACT[torch.float64])


def test_state_dict_inside_is_torchs(x):
    layer = _layer()
    with accumulate(layer):
        layer(x)
        assert list(layer.state_dict()) == list(nn.BatchNorm1d(3).state_dict())


# ---- copies, other buffers, threads -------------------------------------------------------------


def _saved(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), _saved],
    ids=["copy", "pickle", "save"],
)  # fmt: skip
def test_copy_made_inside_has_no_part_in_the_block(x, way):
    layer, usual, twice = _layer(), _layer(), _layer()
    with accumulate(layer):
        layer(x)
        other, third = way(layer), way(layer)
        other(x)  # updates at once
        usual(x)
        _assert_state(other, usual.state_dict())
        with accumulate(third):
            third(x[:9]), third(x[9:])
    _assert_state(layer, usual.state_dict(), **EXACT[torch.float64])
    _assert_state(third, usual.state_dict(), **EXACT[torch.float64])
    for net in (twice, other):
        net(x)
    twice(x)
    _assert_state(other, twice.state_dict())
    assert other.__dict__.keys() == _layer().__dict__.keys()


def test_nothing_stays_on_the_layer_afterwards(x):
    layer = _layer()
    keys = set(layer.__dict__)
    _accumulated(layer, [x])
    assert set(layer.__dict__) == keys


def test_forward_with_other_buffers_updates_these(x):
    layer, large = _layer(), _layer()
    others = {name: value.clone() for name, value in large.named_buffers()}
    with accumulate(layer):
        layer(x[:9])
        torch.func.functional_call(layer, others, x)
        layer(x[9:])
    large(x)
    _assert_state(layer, large.state_dict(), **EXACT[torch.float64])
    for name, value in large.named_buffers():
        torch.testing.assert_close(others[name], value, rtol=0, atol=0)


def _double(layer):
    layer.double()


def _assign(layer):
    layer.load_state_dict(_state(layer), assign=True)


@pytest.mark.parametrize("change", [_double, _assign])
def test_layer_that_gets_new_buffers_inside_goes_on(x, change):
    layer, large = _layer(), _layer()
    with accumulate(layer):
        layer(x[:9])
        change(layer)
        layer(x[9:])
    large(x)
    _assert_state(layer, large.state_dict(), **EXACT[torch.float64])


def test_no_forward_of_several_threads_is_lost(x):
    layer, large = _layer(), _layer()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with accumulate(layer), ThreadPoolExecutor(8) as pool:
            list(pool.map(layer, [x] * 200))
    finally:
        sys.setswitchinterval(interval)
    large(x.repeat(200, 1, 1))
    # 200 merges, each right to a few u of values below 8.
    _assert_state(layer, large.state_dict(), **EXACT[torch.float64])


def test_compiled_model_is_accumulated(x):
    torch._dynamo.reset()
    layer, large = _layer(), _layer()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with accumulate(layer):
        compiled(x[:9]), compiled(x[9:])
    large(x)
    torch._dynamo.reset()
    _assert_state(layer, large.state_dict(), **EXACT[torch.float64])


# ---- all or nothing -----------------------------------------------------------------------------


def _end(net, x):
    with accumulate(net):
        for layer in net:
            layer(x)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, ValueError])
def test_update_that_raises_midway_has_changed_nothing(x, kind):
    net, usual = nn.ModuleList([_layer(), _layer(), _layer()]), _layer()
    before = _state(net)

    def broken():
        raise kind

    net[1].take_accumulated = broken
    with pytest.raises(kind):
        _end(net, x)
    _assert_state(net, before)
    del net[1].take_accumulated
    _end(net, x)
    usual(x)
    for layer in net:
        _assert_state(layer, usual.state_dict(), **EXACT[torch.float64])


def test_block_that_cannot_begin_has_changed_nothing():
    net = nn.ModuleList([_layer(), _layer()])
    del net[1].num_features
    keys = [set(layer.__dict__) for layer in net]
    with pytest.raises(AttributeError), accumulate(net):
        pass
    assert [set(layer.__dict__) for layer in net] == keys


# ---- what is not finite -------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_micro_batch_that_is_not_finite_is_left_out(x, bad):
    layer, large = _layer(), _layer()
    parts = list(x.clone().split(UNEVEN))
    parts[1][0, 1, 0] = bad
    with pytest.warns(RuntimeWarning, match="the batch's statistics are not finite"):
        _accumulated(layer, parts)
    large(torch.cat([*parts[:1], *parts[2:]]))
    _assert_state(layer, large.state_dict(), **EXACT[torch.float64])
    assert layer.nonfinite_batches == 1


def test_block_of_nothing_but_what_is_not_finite_changes_nothing(x):
    layer = _layer()
    before = _state(layer)
    with pytest.warns(RuntimeWarning, match="the batch's statistics are not finite"):
        _accumulated(layer, [torch.full_like(x, float("nan"))])
    _assert_state(layer, before)


def test_micro_batch_that_is_not_finite_raises_when_asked_and_changes_nothing(x):
    layer = _layer(on_nonfinite="raise")
    before = _state(layer)
    with pytest.raises(NonFiniteError, match="channel 1"):
        _accumulated(layer, [x, x.clone().index_fill_(1, torch.tensor([1]), float("nan"))])
    _assert_state(layer, before)


def test_micro_batch_that_is_not_finite_propagates_when_asked(x):
    layer = _layer(on_nonfinite="propagate")
    _accumulated(layer, [x, x.clone().index_fill_(1, torch.tensor([1]), float("nan"))])
    assert torch.isnan(layer.running_mean).tolist() == [False, True, False]


# ---- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["the same model", "a part of it"])
def test_nested_blocks_are_refused(x, inner):
    net = nn.Sequential(_layer())
    large = copy.deepcopy(net)
    with accumulate(net):
        net(x[:9])
        with (
            pytest.raises(ArgumentError, match="already"),
            accumulate(net if inner == "the same model" else net[0]),
        ):
            pass
        net(x[9:])
    large(x)
    _assert_state(net, large.state_dict(), **EXACT[torch.float64])  # the outer block went on


def test_blocks_of_different_models_may_nest(x):
    a, b, large = _layer(), _layer(), _layer()
    with accumulate(a), accumulate(b):
        for part in x.split(UNEVEN):
            a(part), b(part)
    large(x)
    for layer in (a, b):
        _assert_state(layer, large.state_dict(), **EXACT[torch.float64])


def test_models_with_torchs_own_layers_are_refused():
    net = nn.Sequential(BatchNorm2d(3), nn.BatchNorm2d(3))
    with pytest.raises(ArgumentError, match="torch's at '1'"), accumulate(net):
        pass


@pytest.mark.parametrize("model", [nn.Linear(2, 3), None], ids=["no batch norm", "no module"])
def test_what_has_no_batch_norms_is_refused(model):
    with pytest.raises(ArgumentError, match="accumulate takes a"), accumulate(model):
        pass


def test_accumulated_statistics_lie_on_the_cpu_whatever_the_default_device_is(x):
    layer, usual = _layer(), _layer()
    with torch.device("meta"), accumulate(layer):
        layer(x)
    usual(x)
    assert torch.equal(layer.running_mean, usual.running_mean)
