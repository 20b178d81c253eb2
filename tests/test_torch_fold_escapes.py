"""Uses of layers that do not show in the graph of one forward: fold must refuse each."""

from __future__ import annotations

import collections
import functools
import random

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

from batchnorm.errors import ArgumentError  # noqa: E402
from batchnorm.torch import fold  # noqa: E402

X = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0))


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.bn.running_mean.fill_(0.5)

    def forward(self, x):
        return self.bn(self.conv(x))

    def raw(self, x):
        return self.conv(x)


class Outer(nn.Module):
    """Cannot be followed: its forward makes a number of a size."""

    def __init__(self):
        super().__init__()
        self.block = Pair()

    def forward(self, x):
        return self.block(x) + self.other(x) * int(x.shape[0])


# ---- code that cannot be followed ---------------------------------------------------------------


class BoundMethod(Outer):
    def __init__(self):
        super().__init__()
        self.other = self.block.raw


class InAList(Outer):
    def __init__(self):
        super().__init__()
        self.layers = [self.block.conv]

    def other(self, x):
        return self.layers[0](x)


class Partial(Outer):
    def __init__(self):
        super().__init__()
        self.other = functools.partial(Pair.raw, self.block)


class Delegates(Outer):
    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def other(self, x):
        return self.conv(x)


class Cached(Outer):
    @functools.cached_property
    def first(self):
        return self.block.conv

    def other(self, x):
        return self.first(x)


class Calls(Outer):
    def __call__(self, x):
        return super().__call__(x) + self.block.conv(x)

    def other(self, x):
        return x


class Parameters(Outer):
    def other(self, x):
        return sum(p.square().sum() for p in self.parameters())


class State(Outer):
    def other(self, x):
        return self.state_dict()["block.conv.weight"].sum()


def _use(modules, x):
    return modules[0].block.conv(x)


class GivesItselfAway(Outer):
    def other(self, x):
        return _use([self], x)


class Decoder(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self._encoder = [encoder]

    def forward(self, x):
        if x.mean() > 10:
            x = x / int(x.shape[0])
        return self._encoder[0].conv(x)


class Beside(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Pair()
        self.decoder = Decoder(self.block)

    def forward(self, x):
        return self.decoder(self.block(x))


class Hook:
    def __init__(self, block):
        self.block = block

    def __call__(self, module, args, output):
        return output + self.block.conv(args[0])


class Hooked(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.relu = Pair(), nn.ReLU()
        self.relu.register_forward_hook(Hook(self.block))

    def forward(self, x):
        return self.relu(self.block(x))


@pytest.mark.parametrize(
    "kind",
    [
        BoundMethod, InAList, Partial, Delegates, Cached, Calls, Parameters, State,
        GivesItselfAway, Beside, Hooked,
    ],
)  # fmt: skip
def test_layer_that_code_which_is_not_followed_may_use_is_refused(kind):
    _, report = fold(kind().eval(), X)
    assert list(report.refused) == ["block.bn"]


class TakesApart(Outer):
    def other(self, x):
        return self.block.conv(x)


def test_nothing_is_folded_if_outputs_differ_by_more_than_rounding(monkeypatch):
    """As if the text of the forward did not show that it uses the layer."""
    from batchnorm.torch.fold.pairs import make_plan

    monkeypatch.setitem(make_plan.__globals__, "may_take_apart", lambda owner, path: False)
    _, report = fold(TakesApart().eval(), X)
    assert report.error == 0
    assert "outputs of the model would differ by" in report.refused["block.bn"]


# ---- what a forward keeps, or finds changed -----------------------------------------------------


class IntoBuffer(Pair):
    def __init__(self):
        super().__init__()
        self.register_buffer("last", None)

    def forward(self, x):
        self.last = self.conv(x)
        return self.bn(self.last)


class IntoDeque(Pair):
    def __init__(self):
        super().__init__()
        self.last = collections.deque(maxlen=2)

    def forward(self, x):
        y = self.conv(x)
        self.last.append(y)
        return self.bn(y)


class ByItem(Pair):
    def __init__(self):
        super().__init__()
        self.register_buffer("largest", torch.tensor(0.0))

    def forward(self, x):
        self.largest.copy_(x.mean())
        return self.conv(x) if self.largest.item() > 50 else self.bn(self.conv(x))


class ByLength(Pair):
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(1)
        return self.bn(self.conv(x)) if len(self.seen) < 5 else self.conv(x)


class ByCounter(ByLength):
    def __init__(self):
        super().__init__()
        self.seen = collections.Counter()

    def forward(self, x):
        self.seen["calls"] += 1
        return self.bn(self.conv(x)) if self.seen["calls"] < 50 else self.conv(x)


class ByChance(Pair):
    def __init__(self):
        super().__init__()
        self.random = random.Random(0)

    def forward(self, x):
        return self.conv(x) if self.random.random() < 0.01 else self.bn(self.conv(x))


class ByGradients(Pair):
    def forward(self, x):
        return self.conv(x) if torch.is_grad_enabled() else self.bn(self.conv(x))


class ByOperation(Pair):
    def forward(self, x):
        try:
            x = x.view(2, 4, 5, 5)
        except RuntimeError:
            return self.conv(x)
        return self.bn(self.conv(x))


class Raises(nn.Module):
    def forward(self, x):
        if x.mean() > 10:
            raise ValueError("too large")
        return x


class OfAChild(Pair):
    def __init__(self):
        super().__init__()
        self.child = Raises()

    def forward(self, x):
        try:
            return self.bn(self.conv(self.child(x)))
        except ValueError:
            return self.conv(x)


class InPlace(Pair):
    def forward(self, x, inplace=False):
        x = x * 1
        y = self.bn(x)
        return self.conv(y) + F.relu(x) if not inplace else self._other(x, y)

    def _other(self, x, y):
        z = F.relu(x, inplace=True)
        return self.conv(y) + z


class Asks(Pair):
    mode = False

    def forward(self, *xs):
        if xs[0].mean() > 1e9:
            return xs[0]
        plain = self.mode or len(xs) > 1
        return self.conv(xs[0]) if plain else self.bn(self.conv(xs[0]))


class InAnotherForm(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Asks()

    def forward(self, x):
        return self.block(x, x) if x.mean() > 10 else self.block(x)


class FromOutside(InAnotherForm):
    def forward(self, x):
        self.block.mode = bool(x.mean() > 10)
        return self.block(x)


@pytest.mark.parametrize(
    "kind",
    [
        IntoBuffer, IntoDeque, ByItem, ByLength, ByCounter, ByChance, ByGradients, ByOperation,
        OfAChild, InPlace, InAnotherForm, FromOutside,
    ],
)  # fmt: skip
def test_path_that_the_examples_do_not_take_is_refused(kind):
    _, report = fold(kind().eval(), X)
    assert not report.folded
    assert len(report.refused) == 1


def test_output_that_goes_into_a_list_of_the_caller_is_refused():
    class Collects(Pair):
        def forward(self, x, features):
            y = self.conv(x)
            features.append(y)
            return self.bn(y)

    features: list = []
    _, report = fold(Collects().eval(), (X, features))
    assert "also goes to an attribute or list that keeps it" in report.refused["bn"]
    assert features == []


def test_model_whose_copy_is_itself_is_refused():
    class Same(Pair):
        def __deepcopy__(self, memo):
            return self

    model = Same().eval()
    with pytest.raises(ArgumentError, match=r"parts of the copy are those of the model itself"):
        fold(model, X)
    assert isinstance(model.bn, nn.BatchNorm2d)
    assert model.conv.weight.dtype == torch.float32


def test_what_forwards_keep_in_their_class_is_as_before():
    class Shares(Pair):
        cache = None

        def forward(self, x):
            if x.mean() > 10 and Shares.cache is None:
                Shares.cache = torch.zeros_like(x)
                Shares.made = True
            return self.bn(self.conv(x))

    fold(Shares().eval(), X)
    assert Shares.cache is None
    assert not hasattr(Shares, "made")


# ---- what is no escape --------------------------------------------------------------------------


class Lists(nn.Module):
    """Is followed as a whole, so a list of its layers does no harm."""

    def __init__(self):
        super().__init__()
        self.block = Pair()
        self.layers = [self.block]

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Records(Pair):
    """Appends in each forward what its path does not depend on."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def forward(self, x):
        self.shapes.append(x.shape)
        return self.bn(self.conv(x))


@pytest.mark.parametrize("kind", [Lists, Records])
def test_layers_whose_uses_are_all_seen_are_folded(kind):
    _, report = fold(kind().eval(), X)
    assert len(report.folded) == 1
