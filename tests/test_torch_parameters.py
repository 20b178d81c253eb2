"""parameter_groups: which parameters weight decay is for."""

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn.utils import parametrize  # noqa: E402

import batchnorm.torch  # noqa: E402
from batchnorm.errors import ArgumentError  # noqa: E402
from batchnorm.torch import parameter_groups  # noqa: E402


def _names(model):
    """Names of the parameters that decay, and of those that do not."""
    names = {id(p): n for n, p in model.named_parameters()}
    return tuple(
        sorted(names[id(p)] for p in group["params"]) for group in parameter_groups(model, 0.1)
    )


NORMALIZATIONS = {
    "ours": lambda: batchnorm.torch.BatchNorm2d(4),
    "batch": lambda: nn.BatchNorm2d(4),
    "synchronized": lambda: nn.SyncBatchNorm(4),
    "instance": lambda: nn.InstanceNorm2d(4, affine=True),
    "layer": lambda: nn.LayerNorm(4),
    "group": lambda: nn.GroupNorm(2, 4),
}


@pytest.mark.parametrize("kind", NORMALIZATIONS)
def test_scale_and_shift_of_normalizations_do_not_decay(kind):
    assert _names(NORMALIZATIONS[kind]()) == ([], ["bias", "weight"])


@pytest.mark.skipif(not hasattr(nn, "RMSNorm"), reason="torch without RMSNorm")
def test_scale_of_rms_norm_does_not_decay():
    assert _names(nn.RMSNorm(4)) == ([], ["weight"])


class _Special(nn.LayerNorm):
    pass


def test_scale_of_a_subclass_does_not_decay():
    assert _names(_Special(4)) == ([], ["bias", "weight"])


@pytest.mark.parametrize(
    "make", [lambda: nn.BatchNorm2d(4), lambda: nn.Linear(4, 4)], ids=["batch norm", "linear"]
)
def test_bias_does_not_decay_when_parametrized(make):
    module = make()
    parametrize.register_parametrization(module, "bias", nn.Identity())
    assert "parametrizations.bias.original" in _names(module)[1]


def test_scale_does_not_decay_when_parametrized():
    module = nn.BatchNorm2d(4)
    parametrize.register_parametrization(module, "weight", nn.Identity())
    assert _names(module)[0] == []


@pytest.mark.parametrize(
    "make",
    [lambda: nn.Linear(4, 3), lambda: nn.Conv2d(4, 3, 3), lambda: nn.ConvTranspose1d(4, 3, 3)],
    ids=["linear", "convolution", "transposed convolution"],
)
def test_weights_decay_and_biases_do_not(make):
    assert _names(make()) == (["weight"], ["bias"])


@pytest.mark.parametrize("make", [nn.RNN, nn.LSTM, nn.GRU])
def test_biases_of_recurrent_layers_do_not_decay(make):
    assert _names(make(4, 3)) == (
        ["weight_hh_l0", "weight_ih_l0"],
        ["bias_hh_l0", "bias_ih_l0"],
    )


def test_biases_of_attention_do_not_decay():
    assert _names(nn.MultiheadAttention(4, 2, add_bias_kv=True)) == (
        ["in_proj_weight", "out_proj.weight"],
        ["bias_k", "bias_v", "in_proj_bias", "out_proj.bias"],
    )


class _Net(nn.Module):
    """Shares a weight and a batch norm, holds a parameter of its own and a frozen one."""

    def __init__(self):
        super().__init__()
        self.a, self.bias_free = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
        self.bias_free.weight = self.a.weight
        self.bn = nn.BatchNorm1d(3)
        self.again = self.bn
        self.scale = nn.Parameter(torch.ones(()))
        self.frozen = nn.Linear(3, 2).requires_grad_(False)

    def forward(self, x):
        return self.again(self.bias_free(self.bn(self.a(x)))) * self.scale


def test_name_of_a_module_decides_nothing():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Linear(2, 2, bias=False)

    assert _names(Net()) == (["bias.weight"], [])


def test_every_parameter_stands_in_one_group_once():
    net = _Net()
    found = [p for group in parameter_groups(net, 0.1) for p in group["params"]]
    assert len(found) == len({id(p) for p in found})
    assert {id(p) for p in found} == {id(p) for p in net.parameters()}


def test_groups_of_a_net_are_those_expected():
    assert _names(_Net()) == (
        ["a.weight", "frozen.weight", "scale"],
        ["a.bias", "bn.bias", "bn.weight", "frozen.bias"],
    )


def test_scale_shared_with_another_module_does_not_decay():
    net = nn.ModuleDict({"a": nn.PReLU(4), "bn": nn.BatchNorm1d(4)})
    net["bn"].weight = net["a"].weight
    assert _names(net) == ([], ["a.weight", "bn.bias"])


def test_groups_hold_their_decay():
    decays = [group["weight_decay"] for group in parameter_groups(_Net(), 5e-4)]
    assert decays == [5e-4, 0.0]


@pytest.mark.parametrize(
    "make", [lambda p: torch.optim.SGD(p, lr=0.1), lambda p: torch.optim.AdamW(p)]
)
def test_optimizers_take_the_groups(make):
    net = _Net()
    optimizer = make(parameter_groups(net, 0.1))
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(net.parameters()))


@pytest.mark.parametrize("model", [nn.BatchNorm1d(3), nn.Linear(3, 2, bias=False)], ids=str)
def test_optimizers_take_a_group_that_is_empty(model):
    optimizer = torch.optim.SGD(parameter_groups(model, 0.1), lr=0.1)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0]


def test_step_with_decay_leaves_scale_and_shift_when_their_gradient_is_zero():
    net = _Net()
    optimizer = torch.optim.SGD(parameter_groups(net, 0.5), lr=0.1)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    decayed = {n for n, p in net.named_parameters() if not torch.equal(p, before[n])}
    assert decayed == set(_names(net)[0])
    torch.testing.assert_close(net.a.weight, (1 - 0.1 * 0.5) * before["a.weight"])


@pytest.mark.parametrize("decay", [-1e-4, float("nan")])
def test_bad_decay_is_refused(decay):
    with pytest.raises(ArgumentError, match=f"weight_decay must not be negative, got {decay}"):
        parameter_groups(_Net(), decay)


@pytest.mark.parametrize("model", [None, nn.Linear, [nn.Linear(2, 3)]], ids=str)
def test_what_is_no_module_is_refused(model):
    with pytest.raises(ArgumentError, match=r"takes a torch\.nn\.Module, got"):
        parameter_groups(model, 0.1)
