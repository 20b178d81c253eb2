"""freeze and unfreeze: batch norms that stay as they are, whatever mode the model is put into."""

import copy
import pickle

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn.utils import parametrize, prune  # noqa: E402
from torch.optim.swa_utils import update_bn  # noqa: E402

from batchnorm.errors import ArgumentError  # noqa: E402
from batchnorm.torch import BatchNorm1d, convert, freeze, unfreeze  # noqa: E402

functions = pytest.mark.parametrize("function", [freeze, unfreeze])
# Sums of some tens of terms of size below 10 in float64, in two orders.
FLOAT64 = {"rtol": 0, "atol": 1e-12}


def _net(**keywords):
    """Two batch norms whose statistics and parameters are not the initial ones, in float64."""
    net = nn.Sequential(
        nn.Linear(4, 3), nn.BatchNorm1d(3, **keywords), nn.ReLU(),
        nn.Linear(3, 3), nn.BatchNorm1d(3, **keywords),
    )  # fmt: skip
    with torch.no_grad():
        for k, t in enumerate(net.state_dict().values()):
            if t.is_floating_point():
                t.copy_(torch.linspace(0.3, 0.5 + 0.1 * k, t.numel()).view(t.shape))
    return convert(net).double()


def _layers(net):
    return [m for m in net.modules() if isinstance(m, BatchNorm1d)]


@pytest.fixture
def x():
    generator = torch.Generator().manual_seed(20150211)
    return torch.randn((8, 4), generator=generator, dtype=torch.float64)


def _step(net, x):
    """One step of SGD with momentum and decay; the output and the gradient of the input."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    leaf = x.clone().requires_grad_()
    y = net(leaf)
    y.pow(3).sum().backward()
    optimizer.step()
    return y.detach(), leaf.grad


def _values(net, *names):
    return [getattr(layer, name).detach().clone() for layer in _layers(net) for name in names]


# ---- statistics ---------------------------------------------------------------------------------


def test_freeze_returns_the_model():
    net = _net()
    assert freeze(net) is net
    assert unfreeze(net) is net


def test_freeze_takes_a_model_that_is_a_batch_norm():
    assert freeze(BatchNorm1d(3)).stats_frozen


def test_frozen_statistics_stay_in_training(x):
    net = freeze(_net())
    before = _values(net, "running_mean", "running_var", "num_batches_tracked")
    net.train()
    _step(net, x)
    after = _values(net, "running_mean", "running_var", "num_batches_tracked")
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("first", [True, False], ids=["freeze first", "train first"])
def test_frozen_layer_gives_the_output_and_gradient_of_evaluation_in_training(x, first):
    reference, net = _net().eval(), _net()
    if first:
        freeze(net).eval().train()
    else:
        freeze(net.train())
    for ours, theirs in zip(_step(net, x), _step(reference, x), strict=True):
        torch.testing.assert_close(ours, theirs, **FLOAT64)


def test_frozen_layer_keeps_its_training_flag():
    net = freeze(_net().train())
    assert all(layer.training for layer in _layers(net))


def test_frozen_statistics_leave_scale_and_shift_to_train(x):
    net = freeze(_net())
    before = _values(net, "weight", "bias")
    _step(net, x)
    assert not any(
        torch.equal(a, b) for a, b in zip(_values(net, "weight", "bias"), before, strict=True)
    )


def test_frozen_layer_takes_a_batch_of_one():
    layer = freeze(BatchNorm1d(3))
    x = torch.tensor([[1.0, 2.0, 3.0]])
    torch.testing.assert_close(layer(x), x / (1 + layer.eps) ** 0.5)


def test_layer_without_running_statistics_goes_on_with_those_of_the_batch(x):
    net, reference = freeze(_net(track_running_stats=False)), _net(track_running_stats=False)
    torch.testing.assert_close(net(x), reference(x), **FLOAT64)


def test_unfrozen_statistics_move_again(x):
    net, reference = unfreeze(freeze(_net())), _net()
    net(x), reference(x)
    for ours, theirs in zip(net.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, **FLOAT64)


@pytest.mark.parametrize("method", ["reset_running_stats", "reset_parameters"])
def test_frozen_statistics_stay_when_they_are_reset(method):
    net = freeze(_net())
    before = _values(net, "running_mean", "running_var", "num_batches_tracked")
    for layer in _layers(net):
        getattr(layer, method)()
    after = _values(net, "running_mean", "running_var", "num_batches_tracked")
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    for layer in _layers(unfreeze(net)):
        layer.reset_running_stats()
        assert torch.equal(layer.running_mean, torch.zeros(3, dtype=torch.float64))


def test_frozen_statistics_stay_in_update_bn(x):
    net = _net()
    freeze(net[1])
    before = _values(net, "running_mean", "running_var", "num_batches_tracked")
    update_bn(x.split(4), net)
    after = _values(net, "running_mean", "running_var", "num_batches_tracked")
    assert [torch.equal(a, b) for a, b in zip(after, before, strict=True)] == [True] * 3 + [
        False
    ] * 3
    assert [layer.momentum for layer in _layers(net)] == [0.1, 0.1]


# ---- scale and shift ----------------------------------------------------------------------------


def test_frozen_scale_and_shift_get_no_gradient(x):
    net = freeze(_net(), affine=True)
    _step(net, x)
    assert [p.grad for layer in _layers(net) for p in layer.parameters()] == [None] * 4


def test_frozen_scale_and_shift_get_no_gradient_when_asked_for_by_hand(x):
    layer = freeze(_net(), affine=True)[1]
    layer.weight.requires_grad_(True)
    layer(x[:, :3].clone().requires_grad_()).sum().backward()
    assert layer.weight.grad is None


def test_freeze_drops_the_gradient_that_is_there(x):
    net = _net()
    net(x).sum().backward()
    freeze(net, affine=True)
    assert [p.grad for layer in _layers(net) for p in layer.parameters()] == [None] * 4


def test_frozen_scale_and_shift_stay_when_an_optimizer_with_momentum_goes_on(x):
    net = _net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    net(x).sum().backward()
    optimizer.step()
    freeze(net, affine=True)
    before = _values(net, "weight", "bias")
    net(x).sum().backward()
    optimizer.step()
    after = _values(net, "weight", "bias")
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_freeze_of_scale_and_shift_alone_lets_statistics_move(x):
    net, reference = freeze(_net(), stats=False, affine=True), _net()
    net(x), reference(x)
    for ours, theirs in zip(net.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, **FLOAT64)


def test_frozen_layer_passes_the_gradient_of_its_input_on(x):
    # In training, by the batch's statistics, as before.
    ours = _step(freeze(_net(), stats=False, affine=True), x)
    for a, b in zip(ours, _step(_net(), x), strict=True):
        torch.testing.assert_close(a, b, **FLOAT64)


def test_unfreeze_gives_the_gradient_back_only_to_those_that_had_it():
    net = _net()
    net[1].bias.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in net.named_parameters()}
    freeze(net, affine=True)
    assert not any(p.requires_grad for layer in _layers(net) for p in layer.parameters())
    unfreeze(net)
    assert {n: p.requires_grad for n, p in net.named_parameters()} == flags


def test_unfreeze_gives_the_gradient_back_when_frozen_twice():
    net = unfreeze(freeze(freeze(_net(), affine=True), affine=True))
    assert all(p.requires_grad for p in net.parameters())


def test_unfreeze_gives_the_gradient_back_when_parameters_were_loaded_by_assignment(x):
    net = freeze(_net(), affine=True)
    net.load_state_dict(_net().state_dict(), assign=True)
    unfreeze(net)
    net(x).sum().backward()
    assert all(p.requires_grad and p.grad is not None for p in net.parameters())


def test_unfreeze_gives_the_gradient_back_when_the_type_was_changed():
    net = unfreeze(freeze(_net(), affine=True).float())
    assert all(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("kept", ["stats", "affine"])
def test_unfreeze_leaves_frozen_what_it_is_not_asked_for(kept):
    net = unfreeze(freeze(_net(), affine=True), **{kept: False})
    layer = net[1]
    assert (layer.stats_frozen, layer.affine_frozen) == (kept == "stats", kept == "affine")
    assert layer.weight.requires_grad == (kept == "stats")


def test_unfreeze_of_what_is_not_frozen_changes_nothing():
    net = _net()
    net[1].weight.requires_grad_(False)
    unfreeze(net)
    assert not net[1].weight.requires_grad


def test_freeze_takes_layers_without_scale_and_shift(x):
    net = freeze(_net(affine=False), affine=True)
    torch.testing.assert_close(net(x), _net(affine=False).eval()(x), **FLOAT64)


def _pruned(net):
    prune.l1_unstructured(net[4], "weight", 1)
    return net


def _parametrized(net):
    class Doubled(nn.Module):
        def forward(self, x):
            return 2 * x

    parametrize.register_parametrization(net[4], "weight", Doubled())
    return net


computed = pytest.mark.parametrize("change", [_pruned, _parametrized])


@computed
def test_scale_that_is_computed_is_frozen_with_what_it_is_computed_from(change, x):
    net = freeze(change(_net()), affine=True)
    before = copy.deepcopy(net.state_dict())
    net.eval()  # statistics are frozen as well
    _step(net, x)
    after = net.state_dict()
    for name, value in before.items():
        assert torch.equal(after[name], value) == name.startswith(("1.", "4.")), name
    assert not any(p.requires_grad for p in net[4].parameters())
    unfreeze(net)
    assert all(p.requires_grad for p in net.parameters())
    _step(net, x)
    assert not any(torch.equal(p, before[n]) for n, p in net.named_parameters())


def test_scale_that_is_pruned_while_frozen_is_unfrozen():
    net = unfreeze(_pruned(freeze(_net(), affine=True)))
    assert all(p.requires_grad for p in net.parameters())


def test_scale_whose_pruning_ends_while_frozen_is_unfrozen():
    net = freeze(_pruned(_net()), affine=True)
    prune.remove(net[4], "weight")
    assert not net[4].weight.requires_grad
    assert all(p.requires_grad for p in unfreeze(net).parameters())


# ---- all or nothing -----------------------------------------------------------------------------


def _flags(net):
    return [
        (m.__dict__.copy(), [(p.requires_grad, p.grad) for p in m.parameters()])
        for m in _layers(net)
    ]


class _BrokenError(Exception):
    pass


@functions
def test_freeze_that_raises_midway_has_changed_nothing(function, monkeypatch, x):
    net = _net()
    net(x).sum().backward()
    if function is unfreeze:
        freeze(net, affine=True)
    before, calls = _flags(net), []

    def set_attribute(self, name, value):
        calls.append(name)
        if calls.count("affine_frozen") == 2:  # of the second layer
            raise _BrokenError
        nn.Module.__setattr__(self, name, value)

    monkeypatch.setattr(BatchNorm1d, "__setattr__", set_attribute, raising=False)
    with pytest.raises(_BrokenError):
        function(net, affine=True)
    for (attributes, flags), (earlier, earlier_flags) in zip(_flags(net), before, strict=True):
        assert attributes == earlier
        assert [f for f, _ in flags] == [f for f, _ in earlier_flags]
        assert all(a is b for (_, a), (_, b) in zip(flags, earlier_flags, strict=True))


# ---- what shows it, and what keeps it -----------------------------------------------------------


@pytest.mark.parametrize(
    ("keywords", "shown"),
    [
        ({}, "frozen=stats)"),
        ({"affine": True}, "frozen=stats+affine)"),
        ({"stats": False, "affine": True}, "frozen=affine)"),
    ],
    ids=str,
)
def test_repr_shows_what_is_frozen(keywords, shown):
    net = _net()
    plain = repr(net)
    assert "frozen" not in plain
    assert repr(freeze(net, **keywords)).count(shown) == 2
    assert repr(unfreeze(net)) == plain


def test_state_dict_of_a_frozen_model_is_torchs():
    theirs = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    net = freeze(convert(copy.deepcopy(theirs)), affine=True)
    assert list(net.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(net.state_dict(), strict=True)


def _copied(net):
    return copy.deepcopy(net)


def _pickled(net):
    return pickle.loads(pickle.dumps(net))


@pytest.mark.parametrize("way", [_copied, _pickled])
def test_copy_of_a_frozen_model_is_frozen(x, way):
    net = freeze(_net(), affine=True)
    other = way(net)
    before = copy.deepcopy(other.state_dict())
    torch.testing.assert_close(other(x), net.eval()(x), **FLOAT64)
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())
    assert not other[1].weight.requires_grad


@pytest.mark.parametrize("way", [_copied, _pickled])
def test_copy_of_a_frozen_model_is_unfrozen_by_itself(way):
    net = freeze(_net(), affine=True)
    other = unfreeze(way(net))
    assert all(p.requires_grad for p in other.parameters())
    assert not net[1].weight.requires_grad
    assert net[1].stats_frozen


# ---- refusals -----------------------------------------------------------------------------------


@functions
def test_models_with_torchs_own_layers_are_refused_and_nothing_changes(function):
    net = nn.Sequential(BatchNorm1d(3), nn.Sequential(nn.BatchNorm1d(3)))
    net[0].stats_frozen = function is unfreeze
    with pytest.raises(ArgumentError, match=r"BatchNorm1d of torch's at '1\.0'.*convert\(model\)"):
        function(net, affine=True)
    assert net[0].stats_frozen == (function is unfreeze)
    assert net[0].weight.requires_grad


@functions
def test_models_with_layers_that_synchronize_are_refused(function):
    with pytest.raises(ArgumentError, match="SyncBatchNorm of torch's at '0'"):
        function(nn.Sequential(nn.SyncBatchNorm(3)))


@functions
def test_models_without_batch_norms_are_refused(function):
    with pytest.raises(ArgumentError, match="got one without"):
        function(nn.Linear(2, 3))


@functions
@pytest.mark.parametrize("model", [None, BatchNorm1d, [BatchNorm1d(3)]], ids=str)
def test_what_is_no_module_is_refused(function, model):
    with pytest.raises(ArgumentError, match=r"takes a torch\.nn\.Module, got"):
        function(model)
