"""`fold` on the layers and models of timm and torchvision."""

import copy

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import vision  # noqa: E402  before torchvision and timm
from batchnorm.torch import convert, fold  # noqa: E402
from foldable import images  # noqa: E402

torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")

from timm.layers import Conv2dSame, norm_act, std_conv  # noqa: E402
from torchvision.ops import FrozenBatchNorm2d, misc  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def filled(model, seed=0):
    return vision.filled(model, seed).eval()


def folds(model, x):
    folded, report = fold(model, x)
    assert 0 <= report.share <= 1
    small = torch.finfo(x.dtype).eps
    assert report.relative_error < 100 * small
    return folded, report


NORMS = {
    "BatchNormAct2d": norm_act.BatchNormAct2d,
    "with drop": lambda c: norm_act.BatchNormAct2d(c, drop_layer=nn.Dropout, act_layer=nn.SiLU),
    "without act": lambda c: norm_act.BatchNormAct2d(c, apply_act=False),
    "SyncBatchNormAct": norm_act.SyncBatchNormAct,
    "FrozenBatchNormAct2d": norm_act.FrozenBatchNormAct2d,
    "FrozenBatchNorm2d": FrozenBatchNorm2d,
    "torchvision.ops.misc": misc.FrozenBatchNorm2d,
}


def with_norm(name):
    norm = NORMS[name](4)
    if name == "SyncBatchNormAct":
        norm.act = nn.ReLU()
        norm.drop = nn.Identity()
    return filled(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), norm))


@pytest.mark.parametrize("ours", [False, True], ids=["as it is", "converted"])
@pytest.mark.parametrize("name", NORMS)
def test_norms_of_timm_and_torchvision_are_folded(name, ours):
    model = with_norm(name)
    if ours:
        model = convert(model)
    folded, report = folds(model, images(2, 3, 16, 16))
    assert report.folded == {"1": "0"}
    norm = folded[1]
    if name == "with drop":
        assert [type(m) for m in norm] == [nn.Dropout, nn.SiLU]
        assert list(norm._modules) == ["drop", "act"]  # under the names that they had
    elif "Act" in name:
        assert [type(m) for m in norm] == [nn.ReLU]
        assert list(norm._modules) == ["act"]
    else:
        assert type(norm) is nn.Identity


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", [FrozenBatchNorm2d, norm_act.FrozenBatchNormAct2d])
def test_constant_norms_that_compute_in_half_precision_are_within_the_bound(kind, dtype):
    model = filled(nn.Sequential(nn.Conv2d(3, 4, 3), kind(4))).to(dtype)
    report = fold(model, images(2, 3, 16, 16, dtype=dtype))[1]
    assert 0 < report.pairs[0].error <= report.pairs[0].bound < 10
    model[1].running_var.fill_(0)  # with eps below the normal numbers of float16
    report = fold(model, images(2, 3, 16, 16, dtype=dtype))[1]
    assert report.pairs[0].error <= report.pairs[0].bound
    if dtype == torch.float16:
        assert report.pairs[0].bound == float("inf")


def test_hooks_of_an_activation_stay():
    model = with_norm("BatchNormAct2d")
    handle = model[1].act.register_forward_hook(lambda m, args, y: y + 1)
    folded, report = folds(model, images(2, 3, 16, 16))
    assert report.folded == {"1": "0"}
    assert len(folded[1].act._forward_hooks) == 1
    handle.remove()


@pytest.mark.parametrize("size", [15, 16])
def test_convolutions_that_only_pad_are_folded(size):
    conv = Conv2dSame(3, 4, 3, stride=2)
    _, report = folds(filled(nn.Sequential(conv, nn.BatchNorm2d(4))), images(2, 3, size, size))
    assert report.folded == {"1": "0"}


def test_norm_before_a_convolution_that_pads_is_refused():
    model = filled(nn.Sequential(nn.BatchNorm2d(3), Conv2dSame(3, 4, 3, stride=2)))
    assert "pads with zeros" in folds(model, images(2, 3, 16, 16))[1].refused["0"]


def test_convolutions_that_standardize_their_weights_are_refused():
    model = filled(nn.Sequential(std_conv.StdConv2d(3, 4, 3), nn.BatchNorm2d(4)))
    assert "StdConv2d is a subclass of Conv2d" in folds(model, images(2, 3, 16, 16))[1].refused["1"]


# Name to batch norms that are folded, refused and left.
MODELS = {
    "torchvision resnet18": (lambda: torchvision.models.resnet18(), 20, 0, 0),
    "torchvision resnet18, frozen": (
        lambda: torchvision.models.resnet18(norm_layer=FrozenBatchNorm2d), 20, 0, 0
    ),
    "torchvision densenet121": (lambda: torchvision.models.densenet121(), 59, 0, 62),
    "torchvision googlenet": (
        lambda: torchvision.models.googlenet(init_weights=False), 57, 0, 2
    ),
    "torchvision mobilenet_v3_small": (lambda: torchvision.models.mobilenet_v3_small(), 34, 0, 0),
    "timm mobilenetv3_small_050": (lambda: timm.create_model("mobilenetv3_small_050"), 34, 0, 0),
    "timm tf_mobilenetv3_small_minimal_100": (
        lambda: timm.create_model("tf_mobilenetv3_small_minimal_100"), 34, 0, 0
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_models_that_nobody_here_wrote(name):
    make, count, refused, alone = MODELS[name]
    torch.manual_seed(0)
    model = filled(make())
    folded, report = folds(model, images(2, 3, 64, 64))
    found = len(report.folded), len(report.refused), len(report.alone)
    assert found == (count, refused, alone), str(report)
    assert type(folded) is type(model)
    before = {name for name, _ in model.named_modules()}
    assert before >= {name for name, _ in folded.named_modules()} >= set(report.folded)


def test_detector_that_cannot_be_followed_has_its_backbone_folded(monkeypatch):
    # In place of a compiled operator, which not every torchvision loads.
    first = lambda boxes, scores, labels, threshold: scores.argsort(descending=True)[:20]  # noqa: E731
    monkeypatch.setattr(torchvision.ops.boxes, "batched_nms", first)
    torch.manual_seed(0)
    model = torchvision.models.detection.ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=3
    )
    model = filled(model)
    _, report = fold(model, ([torch.rand(3, 64, 64)],))
    backbone = {name for name in report.folded if name.startswith("backbone.")}
    assert len(backbone) >= 40
    assert not any(name.startswith("backbone.") for name in report.refused)


def test_model_is_as_before_when_it_is_converted_first():
    torch.manual_seed(0)
    model = convert(filled(timm.create_model("mobilenetv3_small_050")))
    state = copy.deepcopy(model.state_dict())
    _, report = folds(model, images(2, 3, 64, 64))
    assert len(report.folded) == 34
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
