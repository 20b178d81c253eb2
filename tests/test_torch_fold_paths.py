"""What `fold` proves: which batch norm gets the output of which layer, on every path."""

import json
import random

import pytest

pytest.importorskip("torch")

import torch
from torch import nn
from torch.nn import functional as F

from batchnorm.torch import fold
from foldable import filled, images

pytestmark = pytest.mark.usefixtures("one_thread")


def same(model, folded, x):
    with torch.no_grad():
        one, other = model(x), folded(x)
    # Up to a few hundred terms of size 10 in float32.
    torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)


class Net(nn.Module):
    """A convolution and a batch norm, called by the forward of a subclass."""

    def __init__(self, channels=3, **options):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        for name, value in options.items():
            setattr(self, name, value)


def folds(model, examples):
    """Fold; the result is right on the examples, and every pair is within its bound."""
    model = filled(model)
    folded, report = fold(model, examples)
    assert report.share <= 1
    for x in examples if isinstance(examples, list) else [examples]:
        same(model, folded, x)
    return folded, report


def refuses(model, examples, message, name="bn"):
    _, report = folds(model, examples)
    assert name not in report.folded
    assert message in report.refused[name]
    return report


# ---- what goes where ----------------------------------------------------------------------------


class Twice(Net):
    def forward(self, x):
        return self.bn(self.conv(x)) + self.conv(x)


def test_conv_that_is_also_called_without_its_norm_is_refused():
    refuses(Twice(), images(), "'conv' is also called without it: then its output goes to add")


class Unused(Net):
    def forward(self, x):
        self.conv(x)
        return self.bn(self.conv(x))


def test_conv_whose_output_is_dropped_once_is_refused():
    refuses(Unused(), images(), "also called without it: then its output is not used")


class Returned(Net):
    def forward(self, x):
        y = self.conv(x)
        return self.bn(y), y


def test_conv_whose_output_the_model_returns_is_refused():
    model = filled(Returned())
    _, report = fold(model, images())
    assert report.refused == {"bn": "the output of 'conv' also goes to what the model returns"}


class TwoNorms(Net):
    def __init__(self):
        super().__init__(other=nn.BatchNorm2d(3))

    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) - self.other(y)


def test_conv_that_feeds_two_norms_is_refused():
    report = refuses(TwoNorms(), images(), "the output of 'conv' also goes to 'other'")
    assert "also goes to 'bn'" in report.refused["other"]


class WrongUsers(nn.Module):
    """The batch norm has one user, and the convolution two."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.conv(x)
        return self.bn(y).relu() * y.sigmoid()


def test_users_are_those_of_the_convolution_and_not_of_the_norm():
    refuses(WrongUsers(), images(), "the output of 'conv' also goes to sigmoid")


class UsersOfNorm(Net):
    def forward(self, x):
        y = self.bn(self.conv(x))
        return y * y.sigmoid()


def test_norm_may_have_many_users():
    _, report = folds(UsersOfNorm(), images())
    assert report.folded == {"bn": "conv"}


class InPlace(Net):
    def forward(self, x):
        y = self.conv(x)
        y.add_(1)
        return self.bn(y)


def test_output_that_is_changed_in_place_is_refused():
    refuses(InPlace(), images(), "the output of 'conv' also goes to add_")


class Metadata(Net):
    def forward(self, x):
        y = self.conv(x)
        n, c = y.shape[0], y.size(1)
        return self.bn(y).view(n, c, -1)


def test_shape_of_the_output_may_be_read():
    _, report = folds(Metadata(), images())
    assert report.folded == {"bn": "conv"}


class Norms(Net):
    """The batch norm is also called on something else."""

    def forward(self, x):
        return self.bn(self.conv(x)) + self.bn(x)


def test_norm_that_is_also_called_on_something_else_is_refused():
    refuses(Norms(), images(), "it is also called on an input of the model, not only on the output")


class Shared(Net):
    """One pair for several inputs, as the heads of detectors are."""

    def forward(self, x):
        return self.bn(self.conv(x)) + F.relu(self.bn(self.conv(x.flip(2))))


def test_pair_that_is_always_called_together_may_be_called_twice():
    _, report = folds(Shared(), images())
    assert report.folded == {"bn": "conv"}


class Crossed(Net):
    def __init__(self):
        super().__init__(other=nn.Conv2d(3, 3, 1))

    def forward(self, x):
        return self.bn(self.conv(x)) + self.bn(self.other(x))


def test_norm_of_two_convolutions_is_refused():
    refuses(Crossed(), images(), "it is also called on 'other', not only on the output of 'conv'")


class Between(Net):
    def forward(self, x):
        return self.bn(F.relu(self.conv(x)))


def test_norm_behind_an_activation_is_left():
    model = filled(Between())
    _, report = fold(model, images())
    assert report.alone == {"bn": "its input is relu, and goes to what the model returns"}
    assert not report.refused


def test_identity_and_dropout_in_evaluation_are_looked_through():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Identity(), nn.Dropout2d(0.5), nn.BatchNorm2d(4), nn.ReLU()
    )
    folded, report = folds(model, images())
    assert report.folded == {"3": "0"}
    assert [type(m) for m in folded][1:4] == [nn.Identity, nn.Dropout2d, nn.Identity]


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.train(),
        lambda layer: layer.register_forward_hook(lambda module, args, y: y + 1),
        lambda layer: setattr(layer, "forward", lambda x: x + 1),
    ],
    ids=["training", "hook", "forward"],
)
def test_dropout_that_is_no_identity_is_not_looked_through(change):
    model = filled(nn.Sequential(nn.Conv2d(3, 3, 3), nn.Dropout(0.5), nn.BatchNorm2d(3)))
    change(model[1])
    _, report = fold(model, images())
    assert report.alone == {"2": "its input is '1', and goes to what the model returns"}


# ---- control flow -------------------------------------------------------------------------------


class Branches(Net):
    def forward(self, x):
        if x.sum() > 0:
            return self.bn(self.conv(x))
        return self.bn(self.conv(-x)) * 2


def test_pair_of_both_branches_is_folded():
    x = images()
    x = x - x.mean() + 1
    _, report = folds(Branches(), [x, -x])
    assert report.folded == {"bn": "conv"}


class Skips(Net):
    def forward(self, x):
        y = self.conv(x)
        if x.mean() > 100:
            return y
        return self.bn(y)


def test_conv_that_another_path_calls_without_its_norm_is_refused():
    refuses(Skips(), images(), "'conv' is also called without it: then its output goes to what")


class SkipsByArgument(Net):
    def forward(self, x, normalize=True, mask=None):
        y = self.conv(x)
        if mask is not None:
            y = y * mask
        return self.bn(y) if normalize else y


def test_arguments_that_the_example_leaves_out_are_followed():
    refuses(SkipsByArgument(), images(), "'conv' is also called without it")


class MaskedByArgument(Net):
    def forward(self, x, mask=None):
        y = self.conv(x)
        if mask is not None:
            y = y * mask
        return self.bn(y)


@pytest.mark.parametrize("given", [False, True])
def test_argument_that_is_none_may_be_a_tensor_as_well(given):
    examples = {"x": images(), "mask": torch.ones(1)} if given else images()
    _, report = fold(filled(MaskedByArgument()), examples)
    assert "'conv' is also called without it: then its output goes to mul" in report.refused["bn"]


class ByType(Net):
    def forward(self, x):
        large = x.abs()
        y = self.conv(x)
        if isinstance(large, torch.Tensor) and large.mean() > 100:
            return y
        return self.bn(y)


def test_isinstance_of_an_intermediate_is_followed_both_ways():
    refuses(ByType(), images(), "'conv' is also called without it")


class ByPattern(Net):
    def forward(self, x):
        y = self.conv(x)
        match x.abs():
            case torch.Tensor():
                return y
        return self.bn(y)


class ByClass(Net):
    def forward(self, x):
        y = self.conv(x)
        return y if x.abs().__class__ is torch.Tensor else self.bn(y)


class ByTensorType(Net):
    def forward(self, x):
        y = self.conv(x)
        return y if isinstance(x.abs(), torch.HalfTensor) else self.bn(y)


@pytest.mark.parametrize("kind", [ByPattern, ByClass])
def test_class_of_an_intermediate_is_followed_both_ways(kind):
    _, report = fold(filled(kind()), images())  # on which bn does not run
    assert "'conv' is also called without it" in report.refused["bn"]


def test_isinstance_of_a_type_of_tensors_is_followed_both_ways():
    refuses(ByTensorType(), images(), "'conv' is also called without it")


class WithToken(Net):
    """Functions in C are given a list of a parameter and a placeholder, whose memory is none."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(2, 3, 1, 8))

    def forward(self, x):
        return torch.cat([self.token, self.bn(self.conv(x))], dim=2)


def test_placeholder_beside_a_parameter_is_followed():
    _, report = folds(WithToken(), images())
    assert report.folded == {"bn": "conv"}
    assert isinstance.__module__ == "builtins"


class ByTypeOfInput(Net):
    def forward(self, x):
        if not isinstance(x, torch.Tensor):
            return self.conv(x[0])
        return self.bn(self.conv(x))


def test_input_has_the_type_that_it_has_in_the_example():
    _, report = folds(ByTypeOfInput(), images())
    assert report.folded == {"bn": "conv"}


class ByBuffer(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("flag", torch.tensor(True))

    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) if self.flag else y


def test_value_of_a_buffer_is_followed_both_ways():
    refuses(ByBuffer(), images(), "'conv' is also called without it")


class ByChance(Net):
    def forward(self, x):
        y = self.conv(x)
        return y if torch.rand(()) < 1e-9 else self.bn(y)


class ByPythonsChance(Net):
    def forward(self, x):
        y = self.conv(x)
        return y if random.random() < 1e-9 else self.bn(y)


def test_path_that_depends_on_chance_is_followed_or_refused():
    refuses(ByChance(), images(), "it draws random numbers")
    refuses(ByPythonsChance(), images(), "it draws random numbers")


class Raises(Net):
    def forward(self, x):
        if x.mean() > 100:
            raise ValueError("too large")
        assert x.mean() < 99
        return self.bn(self.conv(x))


def test_path_that_raises_is_none():
    _, report = folds(Raises(), images())
    assert report.folded == {"bn": "conv"}


class RaisesByLimit(Net):
    """On one path, `int` of a placeholder raises; the model itself does not."""

    def forward(self, x):
        y = self.conv(x)
        if x.mean() > 100:
            return y * int(x.sum())
        return self.bn(y)


def test_path_on_which_tracing_fails_is_no_path_that_raises():
    refuses(RaisesByLimit(), images(), "the model may call it in ways that cannot be followed")


class RaisesForAnother(Net):
    """On one path, tracing fails, and the model makes an error of its own of that."""

    def forward(self, x):
        y = self.conv(x)
        if x.mean() > 100:
            try:
                return y * len(json.dumps(x.mean().item()))
            except TypeError:
                raise ValueError("no number") from None
        return self.bn(y)


class RaisesInFunction(Net):
    """On one path, a function raises for what is no tensor."""

    def forward(self, x):
        y = self.conv(x)
        return dense(y) if x.mean() > 100 else self.bn(y)


def dense(x):
    if type(x) is not torch.Tensor:
        raise TypeError("no tensor")
    return x


@pytest.mark.parametrize("kind", [RaisesForAnother, RaisesInFunction], ids=lambda k: k.__name__)
def test_path_on_which_a_placeholder_is_refused_is_no_path_that_raises(kind):
    refuses(kind(), images(), "the model may call it in ways that cannot be followed")


class Catches(Net):
    def forward(self, x):
        y = self.conv(x)
        try:
            return y * int(x.shape[0])
        except TypeError:
            return self.bn(y)


class ByTracing(Net):
    def __init__(self):
        super().__init__(act=nn.Tanh())

    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) if isinstance(x, torch.fx.Proxy) else self.act(y)


def test_path_that_only_tracing_takes_is_noticed():
    refuses(Catches(), images(), "it catches exceptions, which may depend on values")
    refuses(ByTracing(), images(), "on the examples it took a path that could not be foreseen")


class Recursive(Net):
    def forward(self, x, depth=0):
        return self(self.bn(self.conv(x)), depth + 1) if depth < 2 else x


def test_model_that_calls_itself_is_refused():
    refuses(Recursive(), images(), "it calls itself")


class Keeps(Net):
    def forward(self, x):
        self.seen = {"y": [self.conv(x)]}
        return self.bn(self.seen["y"][0])


def test_output_that_is_kept_as_an_attribute_is_refused():
    message = "the output of 'conv' also goes to an attribute or list that keeps it"
    refuses(Keeps(), images(), message)


class EverySecond(Net):
    calls = 0

    def forward(self, x):
        self.calls += 1
        y = self.conv(x)
        return self.bn(y) if self.calls % 2 else y


class FromThousandth(EverySecond):
    def forward(self, x):
        self.calls += 1
        y = self.conv(x)
        return self.bn(y) if self.calls < 1000 else y


class First(Net):
    last = None

    def forward(self, x):
        y, first, self.last = self.conv(x), self.last is None, x.shape
        return self.bn(y) if first else y


class AddsLast(Net):
    last = None

    def forward(self, x):
        y, last = self.bn(self.conv(x)), self.last
        self.last = x
        return y if last is None else y + self.conv(last)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (EverySecond, "'conv' is also called without it"),
        (FromThousandth, "'conv' is also called without it"),
        (First, "its path depends on 'last', which earlier calls change"),
        (AddsLast, "its path depends on 'last', which earlier calls change"),
    ],
)
def test_path_that_depends_on_earlier_calls_is_refused(kind, message):
    refuses(kind(), images(), message)


class Remembers(Net):
    """Of which later calls are like the first."""

    ready, largest = False, 0

    def forward(self, x):
        self.ready, self.largest, self.shape = True, max(self.largest, 3), x.shape
        return self.bn(self.conv(x))


def test_attributes_that_change_no_path_do_not_matter():
    _, report = folds(Remembers(), images())
    assert report.folded == {"bn": "conv"}


class Plain(Net):
    def forward(self, x):
        return self.bn(self.conv(x))


@pytest.mark.parametrize("inside", [False, True])
def test_hooks_of_a_parent_are_followed(inside):
    net = Plain()
    net.register_forward_hook(lambda module, args, y: y + module.conv(args[0]))
    model, name = (nn.Sequential(net), "0.bn") if inside else (net, "bn")
    refuses(model, images(), "conv' is also called without it: then its output goes to add", name)


class ByTypeOfLayer(Net):
    """An isinstance of what a layer returns has one answer; a loop in the other is not followed."""

    def forward(self, x):
        y = self.conv(x)
        if not isinstance(y, torch.Tensor):
            y = [part + 1 for part in y]
        return self.bn(y)


def test_layers_return_tensors():
    _, report = folds(ByTypeOfLayer(), images())
    assert report.folded == {"bn": "conv"}


class Endless(Net):
    def forward(self, x):
        while x.abs().max() > 1:
            x = x / 2
        return self.bn(self.conv(x))


def test_loop_on_values_is_refused():
    refuses(Endless(), images(), "it asks for more than 24 decisions on values")


class Layered(nn.Module):
    """Ten blocks that each take one of two paths: 2^10 paths, and two for each block."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Branches() for _ in range(10))

    def forward(self, x):
        for block in self.blocks:
            x = block(x).tanh()
        return x


def test_modules_that_decide_are_followed_on_their_own():
    x = images()
    _, report = fold(filled(Layered()), x)
    assert report.folded == {f"blocks.{k}.bn": f"blocks.{k}.conv" for k in range(10)}


class Partly(nn.Module):
    """Has no branch of its own; a module of it has one, whose convolution is called here too."""

    def __init__(self):
        super().__init__()
        self.inner = Skips()

    def forward(self, x):
        return self.inner(x) + self.inner.conv(x)


def test_calls_from_outside_of_a_module_count():
    report = refuses(Partly(), images(), "'inner.conv' is also called without it", "inner.bn")
    assert len(report.refused) == 1


class OnlyOutside(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Branches()

    def forward(self, x):
        return self.inner(x) + self.inner.conv(x)


def test_calls_from_outside_of_a_module_that_decides_count():
    refuses(OnlyOutside(), images(), "'inner.conv' is also called without it", "inner.bn")


class NotRun(Net):
    def __init__(self):
        super().__init__(other=nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))

    def forward(self, x):
        if x.mean() > 100:
            return self.other(x)
        return self.bn(self.conv(x))


def test_what_no_example_reaches_is_refused():
    x = images()
    report = refuses(NotRun(), x, "'other.0' cannot take it: it did not run", "other.1")
    assert report.folded == {"bn": "conv"}
    _, report = folds(NotRun(), [x, x + 200])
    assert report.folded == {"bn": "conv", "other.1": "other.0"}


class Aux(Net):
    def forward(self, x):
        return self.bn(self.conv(x)) if self.training else x


def test_what_runs_in_training_only_is_left():
    _, report = folds(Aux(), images())
    assert report.alone == {"bn": "it is not called on any path of the forward"}


class ByClass(Net):
    """Which functions run depends on the class of a layer."""

    def __init__(self):
        super().__init__(other=block())

    def forward(self, x):
        for layer in (self.conv, self.bn):
            x = layer(x)
            if isinstance(layer, nn.BatchNorm2d):
                x = x.relu()
        return self.other(x)


class ByAttributeOfNorm(Net):
    """On one path, an attribute of the batch norm is read that an Identity does not have."""

    def forward(self, x):
        y = self.bn(self.conv(x))
        return y * self.bn.num_features if x.mean() > 100 else y


@pytest.mark.parametrize("kind", [ByClass, ByAttributeOfNorm], ids=lambda kind: kind.__name__)
def test_code_that_looks_at_classes_and_attributes_of_layers_is_refused(kind):
    report = refuses(kind(), images(), "it looks at classes or attributes of its layers")
    assert not report.folded


# ---- models that cannot be followed -------------------------------------------------------------


def block():
    return nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), nn.ReLU())


class Untraceable(nn.Module):
    """Its own forward has loops over values; its blocks have none."""

    def __init__(self):
        super().__init__()
        self.first, self.blocks = block(), nn.ModuleList(block() for _ in range(2))
        self.own, self.own_bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        x = self.first(x)
        for k, item in enumerate(self.blocks):
            x = item(x) + k
        for _ in range(int(x.shape[0])):
            x = self.own_bn(self.own(x))
        return x


def test_blocks_of_a_model_that_cannot_be_followed_are_folded():
    _, report = folds(Untraceable(), images())
    assert report.folded == {
        "first.1": "first.0",
        "blocks.0.1": "blocks.0.0",
        "blocks.1.1": "blocks.1.0",
    }
    why = report.refused["own_bn"]
    assert why.startswith("the model may call it in ways that cannot be followed: ")
    assert "test_torch_fold_paths.py:" in why


class WithUntraceable(Net):
    def __init__(self):
        super().__init__(inner=Untraceable())

    def forward(self, x):
        return self.inner(self.bn(self.conv(x)))


def test_layers_beside_a_module_that_cannot_be_followed_are_folded():
    _, report = folds(WithUntraceable(), images())
    assert report.folded["bn"] == "conv"
    assert list(report.refused) == ["inner.own_bn"]


class Twofold(Net):
    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) + self.bn(y).relu()


class Wasted(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        self.bn(x)
        return self.conv(self.bn(x))


def test_two_uses_of_an_output_by_the_same_layer():
    _, report = folds(Twofold(), images())
    assert report.folded == {"bn": "conv"}
    refuses(Wasted(), images(), "its output goes to 'conv', but is not used in another call")


class TakesApart(nn.Module):
    """Does with `self.block` what `act` says, in a forward that cannot be followed."""

    def __init__(self):
        super().__init__()
        self.block, self.blocks = block(), nn.ModuleList([block()])
        self.net = Shared()

    def forward(self, x):
        x = x * int(x.shape[0])
        return self.act(x)


class ByIndex(TakesApart):
    def act(self, x):
        return self.block[0](x) if x.mean() > 100 else self.block(x)


class ByLoop(TakesApart):
    def act(self, x):
        for layer in self.block:
            x = layer(x)
        return x


class ByVariable(TakesApart):
    def act(self, x):
        other = self.block
        return other[0](x) if x.mean() > 100 else other(x)


class ByName(TakesApart):
    def act(self, x):
        inner = getattr(self, "block")  # noqa: B009
        return inner[0](x) if x.mean() > 100 else inner(x)


class ByReflection(TakesApart):
    def act(self, x):
        convs = [m for m in self.modules() if isinstance(m, nn.Conv2d)]
        return convs[0](x) if x.mean() > 100 else self.block(x)


def first_layer(module, x):
    return module[0](x)


class ByFunction(TakesApart):
    def act(self, x):
        return first_layer(self.block, x) if x.mean() > 100 else self.block(x)


class BySelf(TakesApart):
    def act(self, x):
        return helper(self, x)


def helper(model, x):
    return model.block[0](x) if x.mean() > 100 else model.block(x)


class ByItem(TakesApart):
    def act(self, x):
        for item in self.blocks:
            x = item[0](x) if x.mean() > 100 else self.block(item(x))
        return x


@pytest.mark.parametrize(
    "kind",
    [ByIndex, ByLoop, ByVariable, ByName, ByReflection, ByFunction, BySelf],
    ids=lambda kind: kind.__name__,
)
def test_blocks_that_may_be_taken_apart_are_refused(kind):
    refuses(kind(), images(), "the model may call it in ways that cannot be followed", "block.1")


def test_blocks_of_a_model_whose_forward_was_replaced_are_refused():
    model = Whole()
    model.forward = lambda x: model.block(x) * int(x.shape[0])
    _, report = fold(filled(model), images())
    assert "it calls a Sequential that is no module of the model" in report.refused["block.1"]
    assert not report.folded


def test_items_that_may_be_taken_apart_are_refused():
    report = refuses(ByItem(), images(), "in ways that cannot be followed", "blocks.0.1")
    assert report.folded == {"block.1": "block.0"}


class ByAttribute(TakesApart):
    def act(self, x):
        return self.net.conv(x) if x.mean() > 100 else self.net(x)


def test_attributes_of_blocks_that_may_be_called_are_refused():
    refuses(ByAttribute(), images(), "in ways that cannot be followed", "net.bn")


class Whole(TakesApart):
    def act(self, x):
        x = self.blocks[0](self.net(x)) if self.net is not None else x
        return sum(item(x) for item in self.blocks) + self.block(x)


def test_blocks_that_are_called_as_a_whole_are_folded():
    _, report = folds(Whole(), images())
    assert report.folded == {"block.1": "block.0", "blocks.0.1": "blocks.0.0", "net.bn": "net.conv"}


class Weights(Net):
    def forward(self, x):
        return self.bn(self.conv(x)) + F.conv2d(x, self.conv.weight, padding=1)


class WeightsTransposed(Net):
    def forward(self, x):
        return self.bn(self.conv(x)) + self.conv.weight.flip(0).sum()


class WeightsData(Net):
    def forward(self, x):
        return self.bn(self.conv(x)) + self.conv.weight.data.sum()


class Forward(Net):
    def forward(self, x):
        return self.bn(self.conv(x)) + self.conv.forward(x)


@pytest.mark.parametrize(
    "kind", [Weights, WeightsTransposed, WeightsData, Forward], ids=lambda kind: kind.__name__
)
def test_weights_that_are_used_otherwise_are_refused(kind):
    refuses(kind(), images(), "'conv' cannot take it: its weight is also used outside of it")


def test_computed_weights_that_are_used_otherwise_are_refused():
    model = Weights()
    nn.utils.parametrizations.weight_norm(model.conv)
    refuses(model, images(), "its parametrization is also called outside of it")


class Holder(nn.Module):
    """Cannot be followed, and calls a layer that also has a name elsewhere."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x) * int(x.shape[0])


class Held(Net):
    def __init__(self):
        super().__init__()
        self.holder = Holder(self.conv)

    def forward(self, x):
        return self.bn(self.conv(x)) + self.holder(x)


def test_layers_that_code_calls_by_another_name_are_refused():
    refuses(Held(), images(), "'holder' may call it in ways that cannot be followed")


class Statistics(Net):
    def forward(self, x):
        return self.bn(self.conv(x)) + self.bn.running_mean.sum()


def test_statistics_that_are_used_otherwise_are_refused():
    refuses(Statistics(), images(), "its running_mean is also used outside of it")


class TypeOfNorm(Net):
    def forward(self, x):
        return self.bn(self.conv(x.to(self.bn.weight.dtype)))


class TypeOfConv(Net):
    def forward(self, x):
        return self.bn(self.conv(x.to(self.conv.weight.dtype)))


def test_type_of_a_weight_may_be_read_where_it_remains():
    refuses(TypeOfNorm(), images(), "its weight is also used outside of it")
    _, report = folds(TypeOfConv(), images())
    assert report.folded == {"bn": "conv"}


def test_shared_parameters_are_refused():
    model = nn.Sequential(block(), block())
    model[1][0].weight = model[0][0].weight
    report = refuses(model, images(), "its weight is also a parameter of '1.0'", "0.1")
    assert "its weight is also a parameter of '0.0'" in report.refused["1.1"]
    model = nn.Sequential(block(), block())
    model[1][1].weight = model[0][1].weight
    refuses(model, images(), "its weight is also a parameter of '1.1'", "0.1")


class TwoNames(Net):
    def __init__(self):
        super().__init__()
        self.again, self.bn_again = self.conv, self.bn
        self.layers = [self.conv, self.bn]  # not registered

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.bn_again(self.again(x))


def test_layers_with_two_names_are_one_layer():
    folded, report = folds(TwoNames(), images())
    assert report.folded == {"bn": "conv"}
    assert folded.bn_again is folded.bn
    assert folded.layers[1] is folded.bn


class Lambda(Net):
    """A function that holds the original: a copy of the model still calls it."""

    def __init__(self):
        super().__init__()
        self.act = lambda x: self.bn(self.conv(x))

    def forward(self, x):
        return self.act(x)


def test_layers_that_only_the_original_calls_are_refused():
    model = filled(Lambda())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    _, report = fold(model, images())
    assert not report.folded
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Stateful(Net):
    """Counts, keeps a tensor, and appends to a list, in each forward."""

    def __init__(self):
        super().__init__(count=0, kept=None, log=[])

    def forward(self, x):
        self.count += 1
        self.kept = x
        self.log.append(x)
        return self.bn(self.conv(x))


def test_state_of_python_is_as_before_in_both_models():
    model = filled(Stateful())
    folded, report = fold(model, images())
    assert report.folded == {"bn": "conv"}
    for each in (model, folded):
        assert (each.count, each.kept, each.log) == (0, None, [])


def test_parts_of_attention_are_refused():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.linear = self.layer.linear2
            self.bn = nn.BatchNorm1d(8)

        def forward(self, x):
            y = self.layer(x)
            return self.bn(self.linear(y.repeat(1, 1, 2)[:, 0]))

    x = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(0))
    refuses(Attention(), x, "it is a part of 'layer', which may use its weights")
