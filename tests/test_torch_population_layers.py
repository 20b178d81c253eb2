"""recalibrate on layers that are not torch's own: subclasses, and those of torchvision and timm."""

import copy

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.func import functional_call  # noqa: E402
from torch.nn import functional as F  # noqa: E402

import vision  # noqa: E402, F401
from batchnorm.torch import convert, recalibrate  # noqa: E402

C = 3
methods = pytest.mark.parametrize("method", ["precise", "exact"])


@pytest.fixture
def x():
    return 2 * torch.randn(12, C, 4, 4, generator=torch.Generator().manual_seed(1)).double() + 5


def _assert_measured(layer, given):
    """The layer holds the statistics of `given`, (N, C, H, W), to rounding in float64."""
    bound = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(layer.running_mean, given.mean((0, 2, 3)), **bound)
    torch.testing.assert_close(layer.running_var, given.var((0, 2, 3)), **bound)


# ---- subclasses of torch's layer ----------------------------------------------------------------


class ByHelper(nn.BatchNorm2d):
    """Reaches the inherited forward by a method of its own, with another input."""

    def forward(self, x):
        return self.inner(x + 1)

    def inner(self, x):
        return super().forward(x)


class CallsAnotherForward(nn.BatchNorm2d):
    """Names `forward`, but not the inherited one."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x):
        mean, var = self.running_mean, self.running_var
        y = F.batch_norm(x + 1, mean, var, weight=self.weight, bias=self.bias, eps=self.eps)
        return self.act.forward(y)


class NormalizesTwice(nn.BatchNorm2d):
    """Uses the function for something else besides, without and with other statistics."""

    def forward(self, x):
        F.batch_norm(100 * x, None, None, training=True)
        F.batch_norm(100 * x, torch.zeros(C).double(), torch.ones(C).double())
        return super().forward(x + 1)


@methods
@pytest.mark.parametrize("kind", [ByHelper, CallsAnotherForward, NormalizesTwice])
def test_recalibrate_measures_what_a_subclass_normalizes(kind, method, x):
    model = nn.Sequential(kind(C), nn.Conv2d(C, C, 1), kind(C)).double()
    report = recalibrate(model, x.split(5), method=method)
    assert len(report.layers) == 2
    _assert_measured(model[0], x + 1)
    if method == "exact":
        with torch.no_grad():
            _assert_measured(model[2], model.eval()[:2](x) + 1)


@methods
def test_recalibrate_does_not_update_a_layer_that_normalizes_by_the_batch_in_evaluation(method, x):
    class Always(nn.BatchNorm2d):
        def forward(self, x):
            return F.batch_norm(x, self.running_mean, self.running_var, training=True)

    model = nn.Sequential(Always(C), nn.BatchNorm2d(C)).double()
    own = model[0].running_mean
    recalibrate(model, x.split(6), method=method)
    assert model[0].running_mean is own
    _assert_measured(model[0], x)
    normalized = [F.batch_norm(part, None, None, training=True) for part in x.split(6)]
    _assert_measured(model[1], torch.cat(normalized))


@methods
def test_recalibrate_skips_a_subclass_that_does_not_normalize_by_the_function(method, x):
    class ByHand(nn.BatchNorm2d):
        def forward(self, x):
            mean, var = (t.view(-1, 1, 1) for t in (self.running_mean, self.running_var))
            return (x - mean) / (var + self.eps).sqrt()

    model = nn.Sequential(ByHand(C), nn.BatchNorm2d(C)).double()
    state = copy.deepcopy(model[0].state_dict())
    report = recalibrate(model, x.split(5), method=method)
    assert [layer.name for layer in report.layers] == ["1"]
    assert "does not call torch.nn.functional.batch_norm" in report.skipped["0"]
    assert all(torch.equal(v, state[k]) for k, v in model[0].state_dict().items())


@methods
@pytest.mark.parametrize("library", ["torch", "ours"])
def test_recalibrate_measures_a_model_that_runs_with_other_tensors(library, method, x):
    model = nn.Sequential(nn.BatchNorm2d(C), nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)).double()
    model = convert(model) if library == "ours" else model
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    others = {k: t.detach().clone() for k, t in own.items()}
    others["1.weight"] += 1
    report = recalibrate(
        model, x.split(5), method=method, forward=lambda m, batch: functional_call(m, others, batch)
    )
    now = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert all(now[k] is t for k, t in own.items())
    _assert_measured(model[0], x)
    if method == "exact":
        # While batches wait, each would put back what another one has put in place.
        assert "tensors of the model" in report.notes[0]
        with torch.no_grad():
            model[1].weight += 1
            _assert_measured(model[2], model.eval()[:2](x))


# ---- torchvision and timm -----------------------------------------------------------------------


def _frozen_classes():
    torchvision = pytest.importorskip("torchvision")
    own = torchvision.ops.FrozenBatchNorm2d
    return own, type("Ours", (own,), {})


@methods
@pytest.mark.parametrize("which", [0, 1], ids=["torchvision's", "a subclass"])
def test_recalibrate_reports_frozen_batch_norm_as_frozen(which, method, x):
    frozen = _frozen_classes()[which](C)
    frozen.running_mean += 1
    model = nn.Sequential(frozen, nn.BatchNorm2d(C)).double()
    report = recalibrate(model, x.split(5), method=method)
    assert report.skipped == {"0": "its statistics are frozen"}
    assert frozen.running_mean.tolist() == [1.0] * C
    with torch.no_grad():
        _assert_measured(model[1], frozen(x))


def test_recalibrate_takes_a_model_whose_layers_are_all_frozen(x):
    frozen = _frozen_classes()[0](C).double()
    assert recalibrate(frozen, [x]).skipped == {"": "its statistics are frozen"}


def _with_activations():
    pytest.importorskip("timm")
    from timm.layers import BatchNormAct2d

    torch.manual_seed(0)
    return nn.Sequential(
        BatchNormAct2d(C, act_layer=nn.SiLU, drop_layer=nn.Dropout),
        nn.Conv2d(C, C, 1),
        BatchNormAct2d(C),  # ReLU
        BatchNormAct2d(C, apply_act=False),
    ).double()


@methods
@pytest.mark.parametrize("converted", [False, True])
def test_recalibrate_measures_batch_norm_with_activation(converted, method, x):
    model = convert(_with_activations()) if converted else _with_activations()
    report = recalibrate(model.train(), x.split(5), method=method)
    assert len(report.layers) == 3
    _assert_measured(model[0], x)
    assert [int(model[k].num_batches_tracked) for k in (0, 2, 3)] == [3, 3, 3]
    if method == "exact":
        with torch.no_grad():
            model.eval()
            for k in (2, 3):
                _assert_measured(model[k], model[:k](x))
    else:  # all layers in training mode, without dropout
        expected = _with_activations()
        expected[0].drop = nn.Identity()
        with torch.no_grad():
            behind = torch.cat([expected.train()[:2](part) for part in x.split(5)])
        _assert_measured(model[2], behind)
