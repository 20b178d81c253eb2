"""`fold` on blocks of parallel branches that add up: RepVGG, MobileOne and their kin."""

import copy
import pickle

import pytest

pytest.importorskip("torch")

import torch
from torch import nn
from torch.nn import functional as F

from batchnorm.torch import BatchNorm2d, fold
from batchnorm.torch.fold.layers import geometry_of
from foldable import filled, images, output

pytestmark = pytest.mark.usefixtures("one_thread")


def folds(model, x=None, **options):
    x = images(2, 4, 9, 9) if x is None else x
    model = filled(model)
    folded, report = fold(model, x, **options)
    assert report.share <= 1
    if not options:
        for each in [*(x if isinstance(x, list) else [x]), images(2, 4, 12, 12, seed=5)]:
            one, two = output(model, each), output(folded, each)
            torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-4)
    return folded, report


class Unit(nn.Module):
    def __init__(self, kernel, stride=1, groups=1, padding=None, **options):
        super().__init__()
        padding = kernel // 2 if padding is None else padding
        self.conv = nn.Conv2d(4, 4, kernel, stride, padding, groups=groups, bias=False, **options)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.conv(x))


class Path(nn.Module):
    """Drops its input in training, by a function of its own."""

    def forward(self, x):
        return F.dropout(x, 0.5) if self.training else x


class Block(nn.Module):
    """As RepVGG's."""

    def __init__(self, identity=True, stride=1, groups=1):
        super().__init__()
        self.identity = nn.BatchNorm2d(4) if identity else None
        self.three, self.one = Unit(3, stride, groups), Unit(1, stride, groups)
        self.path, self.attn, self.act = Path(), nn.Identity(), nn.ReLU(inplace=True)

    def forward(self, x):
        if self.identity is None:
            x = self.one(x) + self.three(x)
        else:
            identity = self.identity(x)
            x = self.one(x) + self.three(x)
            x = self.path(x)
            x += identity
        return self.act(self.attn(x))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_block_becomes_a_sequential_under_the_same_names(groups):
    model = nn.Sequential(Block(groups=groups), Block(identity=False, stride=2, groups=groups))
    folded, report = folds(model)
    block = folded[0]
    assert type(block) is nn.Sequential
    assert list(block._modules) == ["three", "attn", "act"]
    assert type(block.three) is Unit
    assert list(folded.state_dict()) == [
        f"{k}.three.conv.{name}" for k in range(2) for name in ("weight", "bias")
    ]
    first, second = report.pairs
    assert (first.layer, first.after) == ("0.three.conv", ["0.three.bn"])
    assert sorted(first.beside) == ["0.identity", "0.one.bn"]
    assert (first.merged, second.merged) == (["0.one.conv"], ["1.one.conv"])
    assert set(report.folded) == {
        "0.identity", "0.one.bn", "0.three.bn", "1.one.bn", "1.three.bn"
    }  # fmt: skip
    assert not report.alone
    assert not report.refused


ACTIVATIONS = {
    "relu": (F.relu, "ReLU()"),
    "relu in place": (lambda x: F.relu(x, inplace=True), "ReLU(inplace=True)"),
    "torch.relu": (torch.relu, "ReLU()"),
    "method": (lambda x: x.relu(), "ReLU()"),
    "method in place": (lambda x: x.relu_(), "ReLU()"),
    "relu6": (F.relu6, "ReLU6()"),
    "hardswish": (F.hardswish, "Hardswish()"),
    "silu": (F.silu, "SiLU()"),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_functions_after_the_sum_become_modules(name):
    function, expected = ACTIVATIONS[name]

    class Functional(Block):
        def forward(self, x):
            return function(self.one(x) + self.three(x))

    folded, report = folds(nn.Sequential(Functional()))
    assert list(map(str, folded[0].children()))[1:] == [expected]
    assert report.folded == {"0.one.bn": "0.three.conv", "0.three.bn": "0.three.conv"}
    pickle.loads(pickle.dumps(folded))


def test_a_function_gets_a_name_of_its_own():
    class Named(Block):
        def __init__(self):
            super().__init__()
            self.relu = nn.Sigmoid()

        def forward(self, x):
            return F.relu(self.relu(F.relu(self.one(x) + self.three(x)))).relu()

    folded, _ = folds(nn.Sequential(Named()))
    names = list(folded[0]._modules)
    assert (len(names), names[2]) == (5, "relu")
    assert [type(m).__name__ for m in folded[0]][1:] == ["ReLU", "Sigmoid", "ReLU", "ReLU"]


class InList(Block):
    def forward(self, x):
        return [self.one(x) + self.three(x)]


class InDict(Block):
    def forward(self, x):
        return {"y": F.relu(self.one(x) + self.three(x))}


@pytest.mark.parametrize("kind", [InList, InDict])
def test_block_that_returns_no_tensor_is_folded_branch_by_branch(kind):
    _, report = fold(filled(kind()), images(2, 4, 9, 9))
    assert report.folded == {"one.bn": "one.conv", "three.bn": "three.conv"}


class Several(nn.Module):
    """As MobileOne's: branches in a list, a sum that starts at zero."""

    def __init__(self, count=3, scale=True):
        super().__init__()
        self.skip = nn.BatchNorm2d(4)
        self.scale = Unit(1, groups=4) if scale else None
        self.convs = nn.ModuleList(Unit(3, groups=4) for _ in range(count))
        self.act = nn.GELU()

    def forward(self, x):
        out = 0 if self.scale is None else self.scale(x)
        for conv in self.convs:
            out += conv(x)
        out += self.skip(x)
        return self.act(out)


@pytest.mark.parametrize("scale", [True, False])
def test_branches_in_a_list(scale):
    folded, report = folds(nn.Sequential(Several(scale=scale)))
    assert list(folded.state_dict()) == ["0.convs.0.conv.weight", "0.convs.0.conv.bias"]
    assert type(folded[0].convs) is nn.Sequential
    assert len(report.folded) == 4 + scale


class Then(nn.Module):
    """As RepViT's: a plain convolution, the input itself, and a batch norm after the sum."""

    def __init__(self, norm=None):
        super().__init__()
        self.conv, self.plain = Unit(3), nn.Conv2d(4, 4, 1)
        self.bn = norm or nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.conv(x) + self.plain(x) + x)


def test_norm_after_the_sum_is_folded():
    folded, report = folds(Then())
    assert report.folded == {"conv.bn": "conv.conv", "bn": "conv.conv"}
    assert type(folded) is nn.Sequential
    assert type(folded.bn) is nn.Identity
    folded, report = folds(nn.Sequential(Then(BatchNorm2d(4, activation="silu"))))
    assert type(folded[0].bn) is nn.SiLU


def test_block_with_hooks_stays_what_hooks_know():
    model, seen = nn.Sequential(Block()), []
    model[0].register_forward_hook(lambda block, *_: seen.append(block.three))
    folded, report = folds(model)
    assert type(folded[0]) is Block
    assert len(folded[0]._forward_hooks) == 1
    assert report.pairs
    assert not report.pairs[0].merged


class ByKeyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Block()

    def forward(self, x):
        return self.block(x=x) if x.mean() > 10 else self.block(x)


class AsksForTheClass(ByKeyword):
    def forward(self, x):
        y = self.block(x) * int(x.shape[0])
        return y + 1 if isinstance(self.block, Block) else y


@pytest.mark.parametrize("kind", [ByKeyword, AsksForTheClass])
def test_block_that_must_stay_what_it_is_keeps_its_branches(kind):
    folded, report = folds(kind())
    assert type(folded.block) is Block
    assert len(report.pairs) > 1


class Other(Block):
    """A block in which one thing differs."""

    def __init__(self, change=None, **options):
        super().__init__(**options)
        if change is not None:
            change(self)


class WithSide(Block):
    def forward(self, x):
        y = self.three(x)
        return self.act(self.one(x) + y) * y.mean()


class WithFactor(Block):
    def forward(self, x):
        return self.act(self.one(x) + 2 * self.three(x))


class WithOffset(Block):
    def forward(self, x):
        return self.act(self.one(x) + self.three(x) + 1)


class WithOtherInput(Block):
    def forward(self, x):
        return self.act(self.one(x) + self.three(x.flip(2)))


class WithFunction(Block):
    def forward(self, x):
        return F.leaky_relu(self.one(x) + self.three(x), 0.3)


class WithActivations(Block):
    def forward(self, x):
        return self.one(x) + self.three(x).relu()


class WithTraining(Block):
    def forward(self, x):
        y = self.one(x) + self.three(x)
        return self.act(F.dropout(y, 0.5, self.training) if self.training else y)


class WithArgument(Block):
    def forward(self, x, scale=None):
        y = self.one(x) + self.three(x)
        return self.act(y if scale is None else y * scale)


class WithBranch(Block):
    def forward(self, x):
        y = self.one(x) + self.three(x)
        return self.act(y) if x.mean() > 0 else y


class WithMemory(Block):
    def forward(self, x):
        self.kept = self.one(x) + self.three(x)
        return self.act(self.kept)


class WithParameter(Block):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.act(self.one(x) + self.three(x)) * self.gain


@pytest.mark.parametrize(
    "kind",
    [WithSide, WithFactor, WithOffset, WithOtherInput, WithFunction, WithActivations, WithTraining,
     WithArgument, WithBranch, WithParameter, WithMemory],
    ids=lambda kind: kind.__name__,
)  # fmt: skip
def test_blocks_that_do_more_are_folded_branch_by_branch(kind):
    x = images(2, 4, 9, 9)
    folded, report = folds(nn.Sequential(kind()), [x, x - 3] if kind is WithBranch else x)
    assert type(folded[0]) is kind
    assert not any(pair.merged for pair in report.pairs)
    expected = {"0.one.bn"} if kind is WithSide else {"0.one.bn", "0.three.bn"}
    assert expected <= set(report.folded)


@pytest.mark.parametrize(
    "change",
    [
        lambda b: setattr(b, "one", Unit(2, padding=0)),
        lambda b: setattr(b, "one", Unit(1, groups=2)),
        lambda b: setattr(b, "one", Unit(3, padding=2, dilation=2)),
        lambda b: setattr(b, "one", Unit(3, padding_mode="reflect")),
        lambda b: setattr(b, "three", Unit(3, padding=1, dilation=1).to(torch.float64)),
        lambda b: b.one.conv.weight.requires_grad_(False),
    ],
    ids=["even", "groups", "dilation", "padding mode", "type", "requires_grad"],
)
def test_branches_that_do_not_fit_together_stay(change):
    class Pad(Other):
        def forward(self, x):
            one = self.one(x)
            three = self.three(x.to(self.three.conv.weight.dtype)).to(x.dtype)
            return self.act(F.pad(one, (0, x.shape[3] - one.shape[3]) * 2) + three)

    plain = Other(change, identity=False)
    x = images(2, 4, 9, 9)
    if plain.one(x).shape != x.shape or plain.three.conv.weight.dtype != x.dtype:
        plain = Pad(change, identity=False)
    folded, report = folds(nn.Sequential(plain), x)
    assert not any(pair.merged for pair in report.pairs)
    assert {"0.one.bn", "0.three.bn"} <= set(report.folded)
    assert type(folded[0]) is type(plain)


CONV = {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "padding": 1}


@pytest.mark.parametrize(
    ("large", "small", "expected"),
    [
        ({}, {}, True),
        ({}, {"kernel_size": 1, "padding": 0}, True),
        ({"padding": "same"}, {"kernel_size": 1, "padding": "valid"}, True),
        ({"kernel_size": 5, "padding": 4, "dilation": 2}, {"padding": 2, "dilation": 2}, True),
        ({"kernel_size": (5, 3), "padding": (2, 1)}, {}, True),
        ({"padding_mode": "reflect"}, {"kernel_size": 1, "padding": 0}, True),
        ({}, {"padding_mode": "reflect"}, False),
        ({}, {"kernel_size": 1, "padding": 1}, False),
        ({}, {"kernel_size": 5, "padding": 2}, False),
        ({}, {"kernel_size": 2, "padding": 1}, False),
        ({"stride": 3}, {"stride": 3, "dilation": 2}, False),
        ({"stride": 2}, {}, False),
        ({"groups": 2}, {}, False),
        ({}, {"out_channels": 8}, False),
        ({}, {"in_channels": 8}, False),
    ],
)
def test_geometries_that_fit(large, small, expected):
    one, other = (geometry_of(nn.Conv2d(**{**CONV, **options})) for options in (large, small))
    assert other.lies_within(one) is expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, True),
        ({"padding": "same"}, True),
        ({"kernel_size": 5, "padding": 4, "dilation": 2}, True),
        ({"padding": 0}, False),
        ({"stride": 2}, False),
        ({"kernel_size": 4, "padding": "same"}, False),
        ({"kernel_size": (3, 1)}, False),
    ],
)
def test_kernels_whose_middle_is_the_input(options, expected):
    assert geometry_of(nn.Conv2d(**{**CONV, **options})).is_centred() is expected


def test_transposed_convolutions_and_linear_layers_as_geometries():
    up = geometry_of(nn.ConvTranspose2d(4, 4, 3, padding=1))
    assert not up.is_centred()
    assert not up.lies_within(up)
    line = geometry_of(nn.Linear(4, 4))
    assert line.is_centred()
    assert line.lies_within(line)
    assert not line.lies_within(geometry_of(nn.Linear(4, 5)))


class Broadcast(nn.Module):
    """Its sum repeats the only channel of its input."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.conv(x)) + x


def test_sum_that_broadcasts_stays():
    model = filled(Broadcast())
    x = images(2, 1, 9, 9)
    folded, report = fold(model, x)
    assert report.folded == {"bn": "conv"}
    assert type(folded) is Broadcast
    torch.testing.assert_close(output(folded, x), output(model, x), rtol=1e-4, atol=1e-4)


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Several()

    def forward(self, x):
        return self.block(x=x)


def test_block_that_is_called_with_a_keyword_stays():
    folded, _ = folds(Named())
    assert type(folded.block) is Several


def test_branch_with_an_activation_stays():
    block = Other(lambda b: setattr(b.one, "bn", BatchNorm2d(4, activation="relu")))
    folded, report = folds(nn.Sequential(block))
    assert type(folded[0]) is Other
    assert type(folded[0].one.bn) is nn.ReLU
    assert set(report.folded) == {"0.one.bn", "0.three.bn"}


def test_kernels_of_other_sizes_and_dilations_fit():
    large, small = Unit(5, padding=4, dilation=2), Unit(3, padding=2, dilation=2)
    block = Other(lambda b: (setattr(b, "three", large), setattr(b, "one", small)))
    _, report = folds(nn.Sequential(block))
    assert report.pairs[0].merged == ["0.one.conv"]


class Reached(nn.Module):
    """Calls a branch of its block as well."""

    def __init__(self):
        super().__init__()
        self.block = Block(identity=False)

    def forward(self, x):
        return self.block(x) + self.block.one(x)


def test_branch_that_is_also_called_elsewhere_stays():
    folded, report = folds(Reached())
    assert type(folded.block) is Block
    assert set(report.folded) == {"block.one.bn", "block.three.bn"}


class Again(Then):
    def forward(self, x):
        return self.bn(self.plain(self.bn(self.conv(x) + x)))


class TwiceBranch(Block):
    def forward(self, x):
        return self.act(self.three(x) + self.three(x))


@pytest.mark.parametrize("kind", [Again, TwiceBranch], ids=lambda kind: kind.__name__)
def test_block_that_calls_a_module_twice_stays(kind):
    folded, report = folds(nn.Sequential(kind()))
    assert type(folded[0]) is kind
    assert not any(pair.merged for pair in report.pairs)


def test_block_that_is_called_twice():
    block = Block()
    folded, report = folds(nn.Sequential(block, block))
    assert type(folded[0]) is nn.Sequential
    assert folded[1] is folded[0]
    assert report.pairs[0].merged == ["0.one.conv"]


class Opens(nn.Module):
    """Does with its block what `act` says."""

    def __init__(self):
        super().__init__()
        self.block = Several()

    def forward(self, x):
        return self.block(x) + self.act(x)


class CallsAPart(Opens):
    def __init__(self):
        super().__init__()
        self.block.spare = nn.ModuleList([nn.Conv2d(4, 4, 1), nn.Tanh()])

    def act(self, x):
        return self.block.spare[1](x)


class ReadsAWeight(Opens):
    def __init__(self):
        super().__init__()
        self.block.spare = nn.Linear(1, 1)

    def act(self, x):
        return self.block.spare.weight.sum()


class LoopsOverParts(Opens):
    def act(self, x):
        return x * int(x.shape[0]) + len(list(self.block.children()))


@pytest.mark.parametrize(
    "kind", [CallsAPart, ReadsAWeight, LoopsOverParts], ids=lambda k: k.__name__
)
def test_block_of_which_something_else_uses_a_part_stays(kind):
    folded, report = folds(kind())
    assert type(folded.block) is Several
    assert not any(pair.merged for pair in report.pairs)


def test_linear_branches():
    class Lines(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
            self.b, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, x):
            return self.a(x) + self.b(x) + self.norm(x)

    model = filled(Lines())
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    folded, report = fold(model, x)
    assert report.share <= 1
    assert list(folded.state_dict()) == ["a.0.weight", "a.0.bias"]
    torch.testing.assert_close(output(folded, x), output(model, x), rtol=1e-4, atol=1e-4)


def test_sum_that_overflows_is_folded_branch_by_branch():
    block = Block(identity=False)
    with torch.no_grad():
        for unit in (block.one, block.three):
            unit.conv.weight.fill_(0)
            unit.conv.weight[:, :, unit.conv.kernel_size[0] // 2, unit.conv.kernel_size[0] // 2] = 1
            unit.bn.weight.fill_(40_000)
            unit.bn.eps = 0.0
    model = nn.Sequential(block).eval()
    folded, report = fold(model, images(2, 4, 9, 9) * 1e-3, dtype=torch.float16)
    assert set(report.folded) == {"0.one.bn", "0.three.bn"}
    assert not any(pair.merged for pair in report.pairs)
    assert type(folded[0]) is Block


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_sum_is_within_its_bound_in_every_type(dtype):
    _, report = folds(nn.Sequential(Block(), Then(), Several()), dtype=dtype)
    assert all(0 < pair.error <= pair.bound for pair in report.pairs)
    assert all(pair.merged for pair in report.pairs)


def test_merged_weights_are_rounded_once():
    model = filled(nn.Sequential(Block()))
    folded, _ = fold(model, images(2, 4, 9, 9))
    block = model[0]

    def scale(bn):
        return bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()

    exact = block.three.conv.weight.double() * scale(block.three.bn).reshape(-1, 1, 1, 1)
    one = block.one.conv.weight.double() * scale(block.one.bn).reshape(-1, 1, 1, 1)
    exact[:, :, 1:2, 1:2] += one
    exact[:, :, 1, 1] += torch.diag(scale(block.identity))
    assert torch.equal(folded[0].three.conv.weight, exact.float())


def test_merged_block_pickles_exports_and_trains():
    model = filled(nn.Sequential(Block(), Several()))
    folded, _ = fold(model, images(2, 4, 9, 9))
    x = images(2, 4, 9, 9, seed=1)
    for other in (pickle.loads(pickle.dumps(folded)), copy.deepcopy(folded)):
        assert torch.equal(output(other, x), output(folded, x))
    program = torch.export.export(folded, (x,))
    kinds = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert kinds == ["aten.conv2d.default", "aten.relu_.default", "aten.conv2d.default",
                     "aten.gelu.default"]  # fmt: skip
    folded.train()(x).sum().backward()
    assert all(p.grad is not None for p in folded.parameters())
