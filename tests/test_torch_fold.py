"""What `fold` makes of layers of every kind, and what it says about it."""

import copy
import io
import itertools
import json
import math
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

from batchnorm.errors import ArgumentError, BatchNormError
from batchnorm.torch import BatchNorm2d, FoldError, FoldReport, convert, fold, freeze
from batchnorm.torch.fold.layers import narrowed
from foldable import filled, images, output

CONVS = [
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
]
NORMS = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d]

pytestmark = pytest.mark.usefixtures("one_thread")


def folds(model, x, expected=None, **options):
    """Fold; what comes out is as before, up to rounding, and each pair is within its bound."""
    before = {name: t.clone() for name, t in model.state_dict().items()}
    folded, report = fold(model, x, **options)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    if expected is not None:
        assert report.folded == expected, str(report)
        assert not report.refused
    assert report.share <= 1
    if not options.get("dtype") and isinstance(x, torch.Tensor):
        one, other = output(model, x).double(), output(folded, x).double()
        scale = one.abs().max().item() + 1
        few = 64 * torch.finfo(x.dtype).eps  # roundings of terms, some of which cancel
        torch.testing.assert_close(other, one, rtol=0, atol=few * scale)
    return folded, report


def why(model, x, name="1", **options):
    """The reason why a batch norm was refused; the result is right."""
    folded, report = folds(model, x, **options)
    assert name not in report.folded
    assert type(folded.get_submodule(name)) is type(model.get_submodule(name))
    return report.refused[name]


# ---- every linear layer -------------------------------------------------------------------------


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kind", CONVS)
def test_convolutions_of_every_kind(kind, groups, bias, affine):
    rank = 1 + CONVS.index(kind) % 3
    conv = kind(4, 8, 3, stride=2, padding=2, dilation=2, groups=groups, bias=bias)
    model = filled(nn.Sequential(conv, NORMS[rank - 1](8, affine=affine), nn.ReLU()))
    folded, report = folds(model, images(2, 4, *[7] * rank), {"1": "0"})
    assert [type(m) for m in folded] == [kind, nn.Identity, nn.ReLU]
    assert report.pairs[0].new_bias is not bias


@pytest.mark.parametrize("kind", CONVS)
def test_depthwise_convolutions(kind):
    rank = 1 + CONVS.index(kind) % 3
    model = filled(nn.Sequential(kind(4, 4, 3, groups=4), NORMS[rank - 1](4)))
    folds(model, images(2, 4, *[5] * rank), {"1": "0"})


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_padding_of_every_mode_before_a_norm(mode):
    model = filled(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode), NORMS[1](4)))
    folds(model, images(), {"1": "0"})


def test_padding_named_same():
    model = filled(nn.Sequential(nn.Conv2d(3, 4, 3, padding="same"), nn.BatchNorm2d(4)))
    folds(model, images(), {"1": "0"})


def test_transposed_convolution_with_a_size_of_its_output():
    class Up(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.bn = nn.ConvTranspose2d(3, 4, 3, stride=2), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.bn(self.up(x, output_size=[18, 18]))

    folds(filled(Up()), images(), {"bn": "up"})


@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers(bias):
    model = nn.Sequential(nn.Linear(5, 4, bias=bias), nn.BatchNorm1d(4), nn.Linear(4, 3))
    folds(filled(model), images(6, 5), {"1": "0"})


def test_linear_layer_on_three_axes_is_refused_also_where_sizes_agree():
    # https://github.com/pytorch/ao/issues/4116
    model = filled(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)))
    reason = why(model, images(2, 4, 5))
    assert "'0' cannot take it: its output has 3 axes, with features on the last axis" in reason


def test_convolution_without_a_batch_is_refused():
    class Unbatched(nn.Sequential):
        def forward(self, x):
            return self[1](self[0](x))

    model = filled(Unbatched(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)))
    reason = why(model, images(3, 6))
    assert "its output has 2 axes, with channels on axis 0" in reason


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_types_are_kept(dtype):
    model = filled(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))).to(dtype)
    folded, report = folds(model, images(dtype=dtype), {"1": "0"})
    assert (folded[0].weight.dtype, folded[0].bias.dtype) == (dtype, dtype)
    assert report.dtype == str(dtype).removeprefix("torch.")


def exact_weight(conv, norm):
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return conv.weight.double() * scale.reshape(-1, *[1] * (conv.weight.dim() - 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("given", [torch.float32, None])
def test_weights_are_rounded_once(dtype, given):
    torch.manual_seed(0)  # no weight is zero, whose neighbour in bits is no number
    model = filled(nn.Sequential(nn.Conv2d(16, 64, 3), nn.BatchNorm2d(64)))
    model = model if given else model.to(dtype)
    exact = exact_weight(*model).detach()
    folded, _ = fold(model, images(1, 16, 4, 4, dtype=given or dtype), dtype=dtype)
    got = folded[0].weight.detach()
    distance = (got.double() - exact).abs()
    for direction in (-math.inf, math.inf):
        other = got.float().nextafter(torch.tensor(direction)) if dtype == torch.float32 else None
        if other is None:
            bits = got.view(torch.int16) + (1 if direction > 0 else -1)
            other = bits.view(dtype)
        assert (distance <= (other.double() - exact).abs()).all()


def test_values_between_two_numbers_are_rounded_once():
    for dtype, bits in ((torch.bfloat16, 8), (torch.float16, 11)):
        values = np.array([1 + 2.0**-bits + 2.0**-40])
        assert torch.from_numpy(values).to(dtype).item() == 1  # as torch does, in two steps
        assert narrowed(values, dtype, "weight").item() == 1 + 2.0 ** (1 - bits)


# ---- every batch norm ---------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu", "relu6", "hardswish", "silu"])
def test_activation_of_our_layers_stays(activation):
    options = {"activation": activation, "negative_slope": 0.2}
    model = filled(nn.Sequential(nn.Conv2d(3, 4, 3), BatchNorm2d(4, **options)))
    folded, _ = folds(model, images(), {"1": "0"})
    assert type(folded[1]).__name__.lower() == (activation or "identity").replace("_", "")
    if activation == "leaky_relu":
        assert folded[1].negative_slope == 0.2


def test_converted_and_synchronized_layers():
    model = filled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    folds(convert(copy.deepcopy(model)), images(), {"1": "0"})
    folds(convert(copy.deepcopy(model), sync=True), images(), {"1": "0"})
    folds(nn.SyncBatchNorm.convert_sync_batchnorm(model), images(), {"1": "0"})


def test_frozen_layers_fold_in_training_mode():
    model = freeze(convert(filled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))))
    model[1].train()
    folded, _ = folds(model, images(), {"1": "0"})
    assert [m.training for m in folded] == [False, True]


def test_residual_is_refused():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), BatchNorm2d(3)

        def forward(self, x):
            return self.bn(self.conv(x), x)

    reason = why(filled(Residual()), images(), "bn")
    assert reason == "besides the output of 'conv' it is given another tensor"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda bn: bn.train(), "it is in training mode, and normalizes by the statistics"),
        (lambda bn: bn.running_var[1].fill_(math.nan), "got nan in channel 1"),
        (lambda bn: bn.running_var[2].fill_(-1), "var must be finite and not negative, got -1.0"),
        (
            lambda bn: bn.running_mean[0].fill_(math.inf),
            "mean must be finite, got inf in channel 0",
        ),
        (
            lambda bn: bn.weight.data[3].fill_(math.nan),
            "gamma must be finite, got nan in channel 3",
        ),
        (lambda bn: setattr(bn, "forward", lambda x: x), "its forward has been replaced"),
        (lambda bn: bn.register_forward_hook(print_shape), "it has a hook (print_shape)"),
        (lambda bn: bn.register_forward_pre_hook(lambda *_: None), "it has a hook"),
        (lambda bn: bn.register_full_backward_hook(lambda *_: None), "it has a hook"),
    ],
)
def test_norms_that_are_refused(change, reason):
    model = filled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    change(model[1])
    _, report = fold(model, images())
    assert reason in report.refused["1"]
    assert not report.pairs


def print_shape(module, args, result):
    pass


def test_norm_without_statistics_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    assert "it has no running statistics" in why(model, images())


def test_variance_of_zero_without_eps_is_refused():
    model = filled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=0.0)))
    model[1].running_var[1] = 0
    _, report = fold(model, images())
    assert "var + eps must be above zero, got 0.0 in channel 1" in report.refused["1"]


class Doubled(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


def test_subclasses_of_norms_are_refused():
    model = filled(nn.Sequential(nn.Conv2d(3, 4, 3), Doubled(4)))
    assert "Doubled is a subclass of BatchNorm2d, which may compute something else" in why(
        model, images()
    )


def test_scales_of_zero_and_below_are_folded():
    model = filled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([0.0, -1.0, -0.0, 2.0]))
    folded, _ = folds(model, images(), {"1": "0"})
    assert not folded[0].weight[0].any()
    assert torch.equal(folded[0].bias[0], model[1].bias[0])


# ---- before a layer, and chains -----------------------------------------------------------------


@pytest.mark.parametrize("kind", CONVS[:3])
def test_norm_before_a_convolution_without_padding(kind):
    rank = CONVS.index(kind) + 1
    model = filled(nn.Sequential(NORMS[rank - 1](4), kind(4, 6, 3, groups=2), nn.ReLU()))
    folded, report = folds(model, images(2, 4, *[5] * rank), {"0": "1"})
    assert [type(m) for m in folded] == [nn.Identity, kind, nn.ReLU]
    assert report.pairs[0].before == ["0"]


def test_norm_before_a_linear_layer():
    folds(filled(nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 4))), images(6, 5), {"0": "1"})


def test_norm_before_a_linear_layer_on_three_axes_is_refused():
    model = filled(nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 4)))
    assert "its output has 3 axes" in why(model, images(2, 5, 5), "0")


def test_norm_before_padding_with_zeros_is_refused_unless_it_does_not_shift():
    model = filled(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)))
    reason = why(model, images(), "0")
    assert reason == "'1' comes after it and pads with zeros, which do not pass through it"
    with torch.no_grad():
        model[0].running_mean.zero_()
        model[0].bias.zero_()
    folds(model, images(), {"0": "1"})


def test_norm_before_padding_with_values_is_folded():
    conv = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")
    folds(filled(nn.Sequential(nn.BatchNorm2d(3), conv)), images(), {"0": "1"})


def test_norm_before_a_transposed_convolution_is_refused():
    model = filled(nn.Sequential(nn.BatchNorm2d(3), nn.ConvTranspose2d(3, 4, 3)))
    assert "is transposed: its outputs see a shift unequally" in why(model, images(), "0")


def test_norms_on_both_sides_and_in_a_chain():
    model = nn.Sequential(
        nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4),
        nn.BatchNorm2d(4), nn.ReLU(),
    )  # fmt: skip
    folded, report = folds(filled(model), images(), {"0": "2", "1": "2", "3": "2", "4": "2"})
    assert (report.pairs[0].before, report.pairs[0].after) == (["0", "1"], ["3", "4"])
    assert sum(type(m) is nn.Identity for m in folded) == 4


def test_norm_between_two_layers_goes_into_the_first():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1))
    folds(filled(model), images(), {"1": "0"})


def test_norm_goes_into_the_second_layer_if_the_first_cannot_take_it():
    first = nn.Conv2d(3, 4, 3)
    first.register_forward_hook(print_shape)
    model = filled(nn.Sequential(first, nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1)))
    folds(model, images(), {"1": "2"})


def test_norm_behind_the_activation_of_another_is_left():
    model = filled(
        nn.Sequential(nn.Conv2d(3, 4, 3), BatchNorm2d(4, activation="relu"), NORMS[1](4))
    )
    _, report = folds(model, images())
    assert report.folded == {"1": "0"}
    assert list(report.alone) == ["2"]


# ---- weights that are computed ------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        pytest.param(lambda m: nn.utils.weight_norm(m), id="old weight_norm"),
        pytest.param(lambda m: nn.utils.spectral_norm(m), id="old spectral_norm"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("bias", [True, False])
def test_computed_weights_become_parameters(change, bias):
    model = nn.Sequential(change(nn.Conv2d(3, 4, 3, bias=bias)), nn.BatchNorm2d(4))
    model.train()(images())  # spectral norm: a power iteration
    model = filled(model)
    with torch.no_grad():
        for parameter in model[0].parameters():
            parameter.mul_(1.5)  # old weight norm computes its weight in the next forward only
    folded, _ = folds(model, images(), {"1": "0"})
    assert type(folded[0]) is nn.Conv2d
    assert sorted(folded.state_dict()) == ["0.bias", "0.weight"]
    assert not folded[0]._forward_pre_hooks


class Scaled(nn.Module):
    def forward(self, w):
        return w * 3


def test_other_parametrizations_become_parameters_as_well():
    model = filled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    parametrize.register_parametrization(model[0], "weight", Scaled())
    parametrize.register_parametrization(model[1], "weight", Scaled())
    folded, _ = folds(model, images(), {"1": "0"})
    assert sorted(folded.state_dict()) == ["0.bias", "0.weight"]


def test_parametrization_stays_where_nothing_is_folded():
    model = filled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)))
    parametrize.register_parametrization(model[2], "weight", Scaled())
    folded, _ = folds(model, images(), {"1": "0"})
    assert parametrize.is_parametrized(folded[2])


def test_pruned_weights_are_refused():
    model = filled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    prune.l1_unstructured(model[0], "weight", 0.5)
    assert "'0' cannot take it: it has a hook (L1Unstructured)" in why(model, images())
    prune.remove(model[0], "weight")
    folds(model, images(), {"1": "0"})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda conv: conv.register_forward_hook(print_shape), "it has a hook (print_shape)"),
        (lambda conv: setattr(conv, "forward", conv.forward), "its forward has been replaced"),
    ],
)
def test_layers_that_are_refused(change, reason):
    model = filled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    change(model[0])
    _, report = fold(model, images())
    assert f"'0' cannot take it: {reason}" in report.refused["1"]


class Three(nn.Conv2d):
    """Only its constructor is another, as of torchvision's Conv3DSimple."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, 3, bias=False)

    @staticmethod
    def downsampling(stride):
        return stride, stride


def test_subclass_that_only_constructs_is_folded():
    model = filled(nn.Sequential(Three(3, 4), nn.BatchNorm2d(4)))
    folded, report = fold(model, images())
    assert report.folded == {"1": "0"}
    assert type(folded[0]) is Three
    with torch.no_grad():
        torch.testing.assert_close(folded(images()), model(images()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["_conv_forward", "__call__", "__getattribute__", "stride"])
def test_subclass_that_defines_what_a_forward_uses_is_refused(name):
    stride = property(lambda _: (1, 1), lambda *_: None)
    kind = type("Other", (Three,), {name: getattr(nn.Conv2d, name, stride)})
    model = filled(nn.Sequential(kind(3, 4), nn.BatchNorm2d(4)))
    assert "1" in fold(model, images())[1].refused


def test_subclasses_of_layers_are_refused():
    class Standardized(nn.Conv2d):
        def forward(self, x):
            w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return F.conv2d(x, w, self.bias)

    model = filled(nn.Sequential(Standardized(3, 4, 3), nn.BatchNorm2d(4)))
    assert "Standardized is a subclass of Conv2d, which may compute something" in why(
        model, images()
    )


def test_weights_that_are_not_finite_are_refused():
    model = filled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    with torch.no_grad():
        model[0].weight[1, 0, 0, 0] = math.nan
    _, report = fold(model, images())
    assert "its weight is not finite" in report.refused["1"]


# ---- types and overflow -------------------------------------------------------------------------


def test_half_precision_with_a_tiny_variance_is_refused():
    model = filled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=1e-12)))
    with torch.no_grad():
        model[1].running_var.fill_(1e-12)
        model[1].weight.fill_(1)
    folded, report = fold(model, images(), dtype=torch.float16)
    assert "'0' cannot take it: its weight would be up to" in report.refused["1"]
    assert "which float16 does not hold" in report.refused["1"]
    assert type(folded[1]) is nn.BatchNorm2d
    assert "0.bias" in folded.state_dict()
    assert torch.equal(folded[0].weight, model[0].weight.half())
    folds(model, images(), {"1": "0"})


def test_computed_weights_that_overflow_stay_computed():
    model = filled(nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), NORMS[1](4)))
    model[1].running_var.fill_(0)
    model[1].eps = 1e-14
    folded, report = fold(model, images(), dtype=torch.float16)
    assert "which float16 does not hold" in report.refused["1"]
    assert parametrize.is_parametrized(folded[0])


class Autocast(nn.Sequential):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


def test_error_beyond_the_bound_is_refused():
    model = filled(Autocast(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    _, report = fold(model, images())
    assert "folded into '0', its error is" in report.refused["1"]
    assert (
        "times the bound: autocast, for example, may compute in coarser arithmetic"
        in report.refused["1"]
    )
    with torch.autocast("cpu", torch.bfloat16):  # of the caller: it does not count
        _, report = fold(filled(nn.Sequential(*model)), images())
    assert report.folded == {"1": "0"}


def test_output_that_overflows_is_refused():
    model = filled(nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1), nn.Tanh()))
    with torch.no_grad():
        model[0].weight.fill_(300)
        model[1].running_var.fill_(1)
        model[1].weight.fill_(1)
    x = torch.full((2, 2), 200.0)
    folded, report = fold(model, x, dtype=torch.float16)
    assert report.refused == {"1": "folded into '0', its output overflows"}
    assert type(folded[1]) is nn.BatchNorm1d
    folds(model, x, {"1": "0"})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_another_type_is_that_of_the_whole_model(dtype):
    layers = (nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
    model = filled(nn.Sequential(*layers))
    folded, report = folds(model, images(), {"1": "0"}, dtype=dtype)
    assert {t.dtype for t in folded.state_dict().values()} == {dtype}
    # Against the original in float32: rounding to the type is part of the error.
    small = torch.finfo(dtype).eps if dtype != torch.float64 else torch.finfo(torch.float32).eps
    assert 0 < report.relative_error < 8 * small
    assert model[0].weight.dtype == torch.float32


def test_statistics_in_float32_beside_half_precision_weights():
    model = convert(filled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))).half()
    assert model[1].running_var.dtype == torch.float32
    folds(model, images(dtype=torch.float16), {"1": "0"})


# ---- what remains as it was ---------------------------------------------------------------------


def block():
    return nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), nn.ReLU())


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.list = nn.ModuleList([block(), nn.ModuleList([block()])])
        self.dict = nn.ModuleDict({"a": nn.ModuleDict({"b": block()})})

    def forward(self, x):
        x = self.list[1][0](self.list[0](x))
        return {"y": [self.dict["a"]["b"](x)], "n": 3, "x": (x, None)}


def test_nested_containers_and_nested_outputs():
    folded, report = fold(filled(Nested()), images())
    assert report.folded == {
        "list.0.1": "list.0.0", "list.1.0.1": "list.1.0.0", "dict.a.b.1": "dict.a.b.0"
    }  # fmt: skip
    assert 0 < report.error < 1e-5
    assert [name for name, _ in folded.named_modules()] == [n for n, _ in Nested().named_modules()]


def test_names_of_the_state_are_kept():
    model = filled(Nested())
    folded, _ = fold(model, images())
    before, after = set(model.state_dict()), set(folded.state_dict())
    assert after - before == {"list.0.0.bias", "list.1.0.0.bias", "dict.a.b.0.bias"}
    assert all(".1." in name.replace("list.1", "list") for name in before - after)


def test_state_round_trip_and_a_model_that_is_built_without_biases():
    model = filled(Nested())
    folded, report = fold(model, images())
    file = io.BytesIO()
    torch.save(folded.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: .*bias"):
        Nested().load_state_dict(state)
    again = fold(filled(Nested(), seed=1), images())[0]
    again.load_state_dict(state)
    x = images(seed=2)
    assert torch.equal(output(again, x)["y"][0], output(folded, x)["y"][0])
    assert [pair.new_bias for pair in report.pairs] == [True] * 3


def test_pickle_and_deepcopy():
    folded, _ = fold(filled(block()), images())
    x = images(seed=1)
    for other in (pickle.loads(pickle.dumps(folded)), copy.deepcopy(folded)):
        assert torch.equal(output(other, x), output(folded, x))


def test_folded_model_trains_on():
    model = filled(nn.Sequential(block(), nn.Conv2d(3, 2, 1)))
    folded, _ = fold(model, images())
    optimizer = torch.optim.SGD(folded.train().parameters(), 0.1)
    before = {name: p.detach().clone() for name, p in folded.named_parameters()}
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        losses.append(folded(images()).square().mean())
        losses[-1].backward()
        optimizer.step()
    assert losses[2] < losses[0]
    assert all(p.grad is not None for p in folded.parameters())
    assert not any(torch.equal(p, before[name]) for name, p in folded.named_parameters())


def test_gradient_of_the_input_is_the_same():
    model = filled(block())
    folded, _ = fold(model, images())
    gradients = []
    for each in (model, folded):
        x = images().requires_grad_()
        each(x).square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4)


def test_requires_grad_is_kept():
    model = filled(nn.Sequential(block(), block()))
    model[0][0].weight.requires_grad_(False)
    folded, _ = fold(model, images())
    assert {name: p.requires_grad for name, p in folded.named_parameters()} == {
        "0.0.weight": False, "0.0.bias": False, "1.0.weight": True, "1.0.bias": True
    }  # fmt: skip


def test_memory_format_is_kept():
    model = filled(nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)))
    model = model.to(memory_format=torch.channels_last)
    x = images(2, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    folded, _ = folds(model, x, {"1": "0"})
    assert folded[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert output(folded, x).is_contiguous(memory_format=torch.channels_last)


def test_nothing_of_the_original_changes():
    model = filled(nn.Sequential(block(), nn.Dropout(0.5), block()))
    seen = []
    model.register_forward_hook(lambda *_: seen.append(1))
    modules, hooks = list(model.modules()), [len(m._forward_hooks) for m in model.modules()]
    state = {name: (t, t.clone(), t.data_ptr()) for name, t in model.state_dict().items()}
    model[0][0].weight.grad = gradient = torch.ones_like(model[0][0].weight)
    random.seed(3)
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    expected = random.random(), torch.rand(()), np.random.rand()  # noqa: NPY002
    random.seed(3)
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    fold(model, images())
    assert (random.random(), torch.rand(()), np.random.rand()) == expected  # noqa: NPY002
    assert torch.is_grad_enabled()
    assert list(model.modules()) == modules
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert not any(m.training for m in modules)
    assert model[0][0].weight.grad is gradient
    for name, t in model.state_dict().items():
        before, values, address = state[name]
        assert t.data_ptr() == address == before.data_ptr()
        assert torch.equal(t, values)


def test_nothing_of_the_original_changes_when_the_model_raises():
    class Breaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = block()

        def forward(self, x):
            torch.rand(3)
            raise KeyError("no")

    model = filled(Breaks())
    torch.manual_seed(3)
    expected = torch.rand(())
    torch.manual_seed(3)
    with pytest.raises(KeyError, match="no"):
        fold(model, images())
    assert torch.rand(()) == expected
    assert type(model.block[1]) is nn.BatchNorm2d
    assert nn.Module.__call__.__module__ == "torch.nn.modules.module"  # tracing patches it
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_memory_of_a_weight_that_something_else_looks_at_stays():
    model = filled(block())
    model.view = model[0].weight.data.flatten()  # a view: no parameter of its own
    folded, _ = fold(model, images())
    assert torch.equal(folded.view, model.view)
    assert not torch.equal(folded[0].weight.flatten(), folded.view)


def test_buffers_that_a_forward_changes_are_as_before():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = block()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            self.count += 1
            return self.block(x)

    model = filled(Counts())
    folded, report = fold(model, images())
    assert report.folded == {"block.1": "block.0"}
    assert (int(model.count), int(folded.count)) == (0, 0)


# ---- wrappers, exporters, compilers -------------------------------------------------------------


def test_data_parallelism_and_compiled_models_are_unwrapped():
    model = filled(block())
    for wrapped in (nn.DataParallel(model), torch.compile(model, backend="eager")):
        folded, report = fold(wrapped, images())
        assert type(folded) is nn.Sequential
        assert report.folded == {"1": "0"}
    inner = filled(nn.Sequential(nn.DataParallel(block()), nn.ReLU()))
    folded, report = folds(inner, images(), {"0.module.1": "0.module.0"})
    assert type(folded[0]) is nn.DataParallel


def test_torch_export_of_the_folded_model():
    folded, _ = fold(filled(nn.Sequential(block(), block())), images())
    program = torch.export.export(folded, (images(),))
    kinds = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any("batch_norm" in kind for kind in kinds)
    assert torch.equal(program.module()(images()), output(folded, images()))


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning")
def test_torch_jit_trace_of_the_folded_model():
    folded, _ = fold(filled(block()), images())
    traced = torch.jit.trace(folded, images())
    assert torch.equal(traced(images()), output(folded, images()))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_onnx_export_of_the_folded_model():
    onnx = pytest.importorskip("onnx")
    folded, _ = fold(filled(nn.Sequential(block(), BatchNorm2d(3).eval())), images())
    file = io.BytesIO()
    torch.onnx.export(folded, (images(),), file, dynamo=False)
    nodes = [node.op_type for node in onnx.load_from_string(file.getvalue()).graph.node]
    assert [n for n in nodes if n != "Identity"] == ["Conv", "Relu", "BatchNormalization"]


def test_inside_of_inference_mode():
    model = filled(block())
    with torch.inference_mode():
        folded, report = fold(model, images())
    assert report.folded == {"1": "0"}
    assert torch.allclose(output(folded, images()), output(model, images()), atol=1e-5)
    folded(images()).sum().backward()
    assert folded[0].weight.grad is not None


# ---- examples -----------------------------------------------------------------------------------


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = block()

    def forward(self, x, scale=None):
        return self.block(x if scale is None else x * scale)


@pytest.mark.parametrize(
    "examples",
    [
        images(),
        (images(),),
        (images(), torch.ones(1)),
        {"x": images(), "scale": torch.ones(1)},
        [images(), (images(),), {"x": images()}],
    ],
)
def test_examples_are_tensors_tuples_dicts_and_lists_of_them(examples):
    _, report = fold(filled(Keywords()), examples)
    assert report.folded == {"block.1": "block.0"}
    assert 0 < report.error < 1e-5


def test_several_examples_count_together():
    model = filled(block())
    small, large = images(), 1000 * images(seed=1)
    alone, *both = (fold(model, x)[1].pairs[0] for x in (small, [small, large], [large, small]))
    assert both[0] == both[1]
    assert both[0].error > alone.error
    assert both[0].bound > 100 * alone.bound


def test_example_is_not_changed():
    class Inplace(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = block()

        def forward(self, x):
            return self.block(x.mul_(2))

    x = images()
    _, report = fold(filled(Inplace()), x)
    assert torch.equal(x, images())
    assert report.error < 1e-5


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([], "must hold at least one example, got an empty list"),
        ("x", "must be a tensor, a tuple of arguments, a dict of keyword arguments, or a list"),
        ([images(), 3], "got int"),
    ],
)
def test_examples_that_are_none(examples, message):
    with pytest.raises(ArgumentError, match=message):
        fold(filled(block()), examples)


# ---- the report ---------------------------------------------------------------------------------


def several():
    return filled(
        nn.Sequential(
            block(), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(3)
        )
    )


def test_report_prints():
    _, report = fold(several(), images())
    lines = str(report).splitlines()
    assert lines[0] == "folded 1 of 3 batch norms; 1 refused; 1 has no layer next to it"
    assert lines[1].startswith("outputs differ by at most ")
    assert lines[2].startswith("each layer differs by at most 0.")
    assert lines[3].startswith("against float64: the original ")
    assert lines[4:6] == ["1 layer got a bias (0.0)", ""]
    assert lines[6] == "not folded:"
    assert lines[7].startswith("  1  refused: '2' comes after it and pads with zeros")
    assert lines[8].startswith("  4  alone: its input is '3', and goes to what the model returns")
    assert lines[9:11] == ["", "  error    bound    batch norm into layer"]
    assert lines[11].endswith("  0.1 into 0.0")
    assert len(lines) == 12


def _large_report():
    from batchnorm.folding import FoldedLayer, FoldReport

    long = "/features/stage_one/block_seven/depthwise/convolution_of_many_words/Conv_output_0"
    pairs = [
        FoldedLayer(f"{long}_{k}", after=[f"norm{k}"], new_bias=True, share=(k * 7 % 15) / 15)
        for k in range(15)
    ]
    why = "the output of 'conv2' also goes to what the model returns, and to another layer"
    return FoldReport(pairs, {long: why}, {"bn1": why}, "float32", 0.0, 0.0)


def test_report_on_a_terminal_is_short_and_fits():
    report = _large_report()
    lines = report.lines(80, 10)
    assert all(len(line) <= 80 and line == line.rstrip() for line in lines)
    assert lines[-1] == "  … and 5 more (--json has all)"
    assert report.lines(80, 0).count("  … and 1 more (--json has all)") == 1
    text = "".join("".join(lines).split())
    nearest = sorted(report.pairs, key=lambda pair: -pair.share)
    for place, pair in enumerate(nearest):
        assert (f"{pair.after[0]}into{pair.layer}" in text) == (place < 10)
    for name, why in [*report.refused.items(), *report.alone.items()]:
        assert "".join(why.split()) in text
        assert name in text
    # Broken between words, or behind a border in a name.
    for line, following in itertools.pairwise(lines):
        if following.startswith(" " * 5) and line[-1] not in "_./":
            assert " " + following.split()[0] in str(report)


def test_text_of_a_report_has_all_of_it():
    report = _large_report()
    text = str(report)
    assert all(pair.layer in text for pair in report.pairs)
    assert "more" not in text
    assert f"15 layers got a bias ({', '.join(pair.layer for pair in report.pairs)})" in text


def test_numbers_of_a_report_are_not_broken():
    _, report = fold(several(), images())
    numbers = [f"{report.error:.2g}", *(f"{pair.bound:.2g}" for pair in report.pairs)]
    for width in range(30, 80):
        assert all(any(n in line for line in report.lines(width)) for n in numbers)


def test_report_says_where_outputs_overflow():
    from batchnorm.folding import FoldReport

    FoldReport(error=1.0, optimized_error=None).check_finite()
    for found in ({"error": math.inf}, {"error": 0.0, "optimized_error": math.inf}):
        with pytest.raises(FoldError, match="not finite in float16 .* bfloat16 or float32"):
            FoldReport(dtype="float16", **found).check_finite()
    for found in ({"error": math.nan}, {"error": 0.0, "optimized_error": math.nan}):
        with pytest.raises(FoldError, match="no output of the original is finite"):
            FoldReport(**found).check_finite()


def test_report_is_plain_data():
    _, report = fold(several(), images())
    found = json.loads(report.to_json())
    assert found == report.to_dict()
    assert found["counts"] == {"folded": 1, "refused": 1, "alone": 1}
    assert found["folded"] == {"0.1": "0.0"}
    assert found["pairs"][0]["layer"] == "0.0"
    assert found["pairs"][0]["after"] == ["0.1"]
    assert list(found["refused"]) == ["1"]
    assert list(found["alone"]) == ["4"]
    report.error = math.inf
    assert json.loads(report.to_json())["error"] is None


def test_report_measures_what_it_says():
    model = filled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    x = images()
    folded, report = fold(model, x)
    one, other = output(model, x), output(folded, x)
    state = [t.detach() for t in folded.parameters()]
    assert report.error == report.pairs[0].error == float((one.double() - other).abs().max())
    assert report.relative_error == report.error / float(one.abs().max())
    exact = output(copy.deepcopy(model).double(), x.double())
    assert report.original_error == float((exact - one).abs().max())
    assert report.folded_error == float((exact - other).abs().max())
    assert report.pairs[0].largest_weight == max(float(t.abs().max()) for t in state)
    assert report.pairs[0].error < report.pairs[0].bound
    assert 0 < report.pairs[0].share <= 1


def test_report_of_a_model_without_real_outputs_or_batch_norms():
    class Argmax(nn.Sequential):
        def forward(self, x):
            return super().forward(x).argmax(1)

    _, report = fold(filled(Argmax(block())), images())
    assert (report.error, report.folded_error) == (None, None)
    _, report = fold(nn.Linear(3, 2).eval(), images(4, 3))
    assert (report.pairs, report.error, report.share) == ([], 0.0, 0.0)
    assert str(report).startswith("folded 0 of 0 batch norms; 0 refused; 0 have no layer")


def test_float64_has_no_second_opinion():
    _, report = fold(filled(block()).double(), images(dtype=torch.float64))
    assert (report.original_error, report.folded_error) == (None, None)


def test_models_that_do_not_run_in_float64_are_folded():
    class Demands(nn.Sequential):
        def forward(self, x):
            if x.dtype != torch.float32:
                raise TypeError("single precision, please")
            return super().forward(x)

    _, report = fold(filled(Demands(block())), images())
    assert report.folded == {"0.1": "0.0"}
    assert report.original_error is None


@pytest.mark.parametrize("progress", [True, False])
def test_progress_is_shown_if_asked_for(bars, progress):
    net = filled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    fold(net, images(), progress=progress)
    steps = (
        "running the model", "following its paths", "running it in float64", "folding",
        "comparing layers", "comparing outputs",
    )  # fmt: skip
    assert bars == [[f"fold: {step}" for step in steps]] * progress


def test_strict_raises_for_what_was_refused():
    with pytest.raises(FoldError, match=r"'1' was refused: '2' comes after it and pads") as error:
        fold(several(), images(), strict=True)
    assert isinstance(error.value, BatchNormError)
    assert isinstance(error.value.report, FoldReport)
    assert error.value.report.folded == {"0.1": "0.0"}


def test_strict_passes_what_no_linear_layer_is_next_to():
    model = filled(nn.Sequential(block(), nn.BatchNorm2d(3), nn.ReLU()))
    assert list(fold(model, images(), strict=True)[1].alone) == ["1"]


def test_strict_raises_for_an_error_above_tol():
    model = filled(block())
    fold(model, images(), strict=True, tol=1e-4)
    with pytest.raises(FoldError, match=r"'0' differs by .*, more than 1e-12 \(problem 1 of 2\)"):
        fold(model, images(), strict=True, tol=1e-12)


@pytest.mark.parametrize("norm", [torch.nn.utils.weight_norm, torch.nn.utils.spectral_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_weight_of_an_old_hook_has_the_type_of_what_it_is_made_of(norm):
    """Until the next forward, `weight` is what it was before `double()`."""
    model = filled(nn.Sequential(norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4))).double()
    folded, report = fold(model, images(dtype=torch.float64))
    assert report.folded == {"1": "0"}
    assert folded[0].weight.dtype == torch.float64


def test_type_in_which_the_model_does_not_run_is_named():
    class Mixes(nn.Sequential):
        def forward(self, x):
            return super().forward(x.float())

    model = Mixes(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    with pytest.raises(ArgumentError, match="in bfloat16 its forward raises RuntimeError"):
        fold(model, images(), dtype=torch.bfloat16)


def test_inputs_without_a_finite_value_compare_nothing():
    model = filled(block())
    _, report = fold(model, torch.full((2, 3, 8, 8), math.nan))
    assert report.refused == {"1": "folded into '0', it could not be compared on the inputs"}
    assert report.error is not None
    assert math.isnan(report.error)
    assert json.loads(report.to_json())["error"] is None
    with pytest.raises(FoldError):
        fold(nn.ReLU().eval(), torch.full((2,), math.nan), strict=True)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_left_out_of_comparisons(value):
    model, x = filled(block()), images()
    x[0, 0, 0, 0] = value
    _, report = fold(model, x)
    assert report.folded == {"1": "0"}
    (pair,) = report.pairs
    assert 0 < pair.error < pair.bound < 1
    assert 0 < pair.relative_error < 1e-5


def test_bound_holds_for_sums_that_cancel():
    model = filled(nn.Sequential(nn.Linear(512, 4), nn.BatchNorm1d(4)))
    with torch.no_grad():
        model[0].weight[:, 256:] = -model[0].weight[:, :256]
    half = images(8, 256)
    x = torch.cat([half, half], 1) * 1e3
    for dtype, given in itertools.product([torch.float32, torch.bfloat16], [x, -x, x.abs()]):
        pair = fold(copy.deepcopy(model).to(dtype), given.to(dtype))[1].pairs[0]
        assert pair.error <= pair.bound


# ---- arguments ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (3, {}, "fold takes a torch.nn.Module, got int"),
        (block().train(), {}, "model must be in evaluation mode"),
        (block().eval(), {"dtype": torch.int8}, "dtype must be one of float16, bfloat16, float32"),
        (block().eval(), {"dtype": "float16"}, "dtype must be one of float16, bfloat16, float32"),
        (block().eval(), {"tol": -1, "strict": True}, "tol must be a number that is not negative"),
        (block().eval(), {"tol": 0.1}, "tol must come with strict=True"),
        (block().to("meta").eval(), {}, "fold takes a model whose tensors have values"),
        (nn.Sequential(nn.LazyConv2d(3, 1)).eval(), {}, "uninitialized tensors in '0'"),
    ],
)
def test_arguments_that_are_refused(model, options, message):
    with pytest.raises(ArgumentError, match=message):
        fold(model, images(), **options)


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning")
def test_scripted_models_are_refused():
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = scripted

        def forward(self, x):
            return self.inner(x)

    scripted = torch.jit.trace(filled(block()), images())
    with pytest.raises(ArgumentError, match="got one compiled by TorchScript"):
        fold(scripted, images())
    _, report = fold(Part().eval(), images())
    assert not report.pairs


def test_models_that_cannot_be_copied_are_named():
    model = filled(block())
    model.stream = open(__file__)  # noqa: SIM115
    with pytest.raises(
        ArgumentError, match=r"must be one that copy.deepcopy can copy, but TypeError"
    ):
        fold(model, images())
    model.stream.close()


def test_hooks_of_every_module_are_refused():
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(ArgumentError, match="hooks are registered that every module calls"):
            fold(filled(block()), images())
    finally:
        handle.remove()


def test_what_is_exported_is_folded_before():
    program = torch.export.export(filled(block()), (images(),))
    for model in (program, program.module()):
        with pytest.raises(ArgumentError, match="Fold first, then export"):
            fold(model, images())


def test_traced_models_are_folded():
    _, report = fold(torch.fx.symbolic_trace(filled(block())), images())
    assert len(report.folded) == 1


def test_loaders_are_no_examples():
    loader = torch.utils.data.DataLoader(images())
    with pytest.raises(ArgumentError, match=r"Take next\(iter\(loader\)\)"):
        fold(filled(block()), loader)


def test_folded_model_loads_without_this_library(tmp_path):
    folded, _ = fold(
        filled(nn.Sequential(nn.Conv2d(3, 3, 3), BatchNorm2d(3, activation="relu"))), images()
    )
    torch.save(folded, tmp_path / "whole.pt")
    program = (
        "import sys; sys.modules['batchnorm'] = None\n"
        "import torch\n"
        f"model = torch.load({str(tmp_path / 'whole.pt')!r}, weights_only=False)\n"
        "print(*(type(m).__name__ for m in model))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == ["Conv2d", "ReLU"]
