"""Uses of layers that do not show in the graph of one forward: fold must refuse each."""

from __future__ import annotations

import collections
import contextlib
import enum
import functools
import gc
import itertools
import random
import sys
import threading
from typing import ClassVar

import numpy as np
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


class Box:
    calls = 0


class ByAnotherClass(Pair):
    def forward(self, x):
        Box.calls += 1
        return self.bn(self.conv(x)) if Box.calls < 1000 else self.conv(x)


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
        IntoBuffer, IntoDeque, ByItem, ByLength, ByCounter, ByAnotherClass, ByChance, ByGradients,
        ByOperation, OfAChild, InPlace, InAnotherForm, FromOutside,
    ],
)  # fmt: skip
def test_path_that_the_examples_do_not_take_is_refused(kind):
    _, report = fold(kind().eval(), X)
    assert not report.folded
    assert len(report.refused) == 1


class Mode(enum.Enum):
    RAW = 1
    NORM = 2


QUESTIONS = {
    "size in a set": lambda x, **_: x.shape[0] in {1, 5},
    "size as a key": lambda x, **_: {1: "raw"}.get(x.shape[0]),
    "type in a set": lambda x, **_: x.dtype in {torch.float64},
    "argument in a set": lambda x, mode, **_: mode in {"raw", "features"},
    "argument is True": lambda x, raw, **_: raw is True,
    "argument is None": lambda x, scale, **_: scale is None,
    "argument is a member": lambda x, kind, **_: kind is Mode.RAW,
    "argument is another": lambda x, other, **_: x is other,
    "type is a type": lambda x, **_: x.dtype is torch.float64,
    "gradient is None": lambda x, **_: x.mean() > 10 and x.grad is None,
    "size is an int": lambda x, **_: isinstance(x.shape[0], int) and x.shape[0] > 4,
    "shape is a tuple": lambda x, **_: x.mean() > 10 and isinstance(x.shape, (torch.Size, tuple)),
    "number is a float": lambda x, **_: isinstance(x.mean().item(), float) and x.mean() > 10,
    "type of a size": lambda x, **_: type(x.shape[0]) is int and x.shape[0] > 4,
    "type of an argument": lambda x, mode, **_: type(mode) in (list, tuple),
    "class of an argument": lambda x, mode, **_: issubclass(type(mode), torch.Tensor),
    "name of a type": lambda x, mode, **_: type(mode).__name__ == "Tensor",
    "tensor has no such attribute": lambda x, **_: x.mean() > 10 and not hasattr(x, "tensors"),
    "item of a default": lambda x, layers, **_: 3 in layers,
    "global counter": lambda x, **_: _count() > 1000,
    "key of a default": lambda x, options={}, **_: options.setdefault("n", x) is not x,
}  # fmt: skip
CALLS = 0


def _count():
    global CALLS
    CALLS += 1
    return CALLS


class Skips(Pair):
    """Whose batch norm is skipped in some calls."""

    def __init__(self, skips):
        super().__init__()
        self.skips = skips

    def forward(self, x, other=None, mode="norm", raw=False, scale=1.0, kind=Mode.NORM, layers=()):
        y = self.conv(x)
        skipped = self.skips(
            x, other=other, mode=mode, raw=raw, scale=scale, kind=kind, layers=layers
        )
        return y if skipped else self.bn(y)


@pytest.mark.parametrize("question", QUESTIONS)
def test_question_that_leads_to_another_path_is_seen(question):
    examples = (X, X + 1) if question == "argument is another" else X
    _, report = fold(Skips(QUESTIONS[question]).eval(), examples)
    assert not report.folded
    assert len(report.refused) == 1


def test_questions_that_lead_nowhere_else_do_no_harm():
    def skips(x, other, **_):
        return x is None or (other is not None and other is None) or isinstance(x, int)

    _, report = fold(Skips(skips).eval(), X)
    assert report.folded == {"bn": "conv"}


def _safe(function, x):
    try:
        return function(x)
    except RuntimeError:
        return None


def _decorated(function):
    @functools.wraps(function)
    def inner(self, x):
        try:
            return function(self, x)
        except RuntimeError:
            return self.conv(x)

    return inner


class Leaves:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return True


@contextlib.contextmanager
def _leaves():
    try:  # noqa: SIM105  # it is what is tested
        yield
    except RuntimeError:
        pass


class ByFunction(Pair):
    def forward(self, x):
        y = _safe(lambda x: x.view(2, 4, 5, 5), x)
        return self.conv(x) if y is None else self.bn(self.conv(y))


class ByDecorator(Pair):
    @_decorated
    def forward(self, x):
        return self.bn(self.conv(x.view(2, 4, 5, 5)))


class ByContext(Pair):
    context = staticmethod(Leaves)

    def forward(self, x):
        y = self.conv(x)
        with self.context():
            x.view(2, 4, 5, 5)
            return self.bn(y)
        return y


class BySuppress(ByContext):
    @staticmethod
    def context():
        return contextlib.suppress(RuntimeError)


class ByGenerator(ByContext):
    context = staticmethod(_leaves)


@pytest.mark.parametrize("kind", [ByFunction, ByDecorator, ByContext, BySuppress, ByGenerator])
def test_exception_that_may_be_caught_anywhere_is_seen(kind):
    _, report = fold(kind().eval(), X)
    assert "it catches exceptions" in report.refused["bn"]


class State(Pair):
    """Whose path depends on what calls change."""

    def __init__(self, state, later):
        super().__init__()
        self.state, self.later = state, later

    def forward(self, x):
        y = self.conv(x)
        return y if self.later(self) else self.bn(y)


def _down(self):
    self.state -= 1
    return self.state < 0


def _every_seventh(self):
    self.state += 1
    return self.state % 7 == 0


def _longer(self):
    self.state += self.state[:1]
    return self.state[50:51] == self.state[:1]


def _nested(self):
    self.state["a"]["n"] += 1
    return self.state["a"]["n"] > 50


def _in_a_list(self):
    self.state[0][0] += 1
    return self.state[0][0] > 50


def _in_an_array(self):
    self.state[0] += 1
    return self.state[0] > 50


def _of_a_class(self):
    type(self).made = getattr(type(self), "made", 0) + 1
    return type(self).made > 50


STATES = {
    "countdown": (50, _down),
    "remainder": (0, _every_seventh),
    "text": ("a", _longer),
    "tuple": ((1,), _longer),
    "nested dict": ({"a": {"n": 0}}, _nested),
    "nested list": ([[0]], _in_a_list),
    "array": (np.zeros(1), _in_an_array),
    "count": (itertools.count(), lambda self: next(self.state) > 50),
    "cycle": (itertools.cycle([0, 0, 1]), lambda self: next(self.state)),
    "class": (None, _of_a_class),
}


@pytest.mark.parametrize("name", STATES)
def test_path_that_depends_on_what_calls_change_is_seen(name):
    _, report = fold(State(*STATES[name]).eval(), X)
    assert not report.folded
    assert len(report.refused) == 1


class Trains(Pair):
    def forward(self, x):
        if x.shape[0] > 4:
            self.bn.train()
        y = self.bn(self.conv(x))
        self.bn.eval()
        return y


class Swaps(Pair):
    def __init__(self):
        super().__init__()
        self.other = torch.ones(4, 4, 1, 1)

    def forward(self, x):
        own = self.conv._parameters["weight"]
        if x.shape[0] > 4:
            self.conv._parameters["weight"] = nn.Parameter(self.other)
        y = self.bn(self.conv(x))
        self.conv._parameters["weight"] = own
        return y


class Calls(Pair):
    def forward(self, x):
        if x.shape[0] > 4:
            given = {name: p * 2 for name, p in self.conv.named_parameters()}
            return self.bn(torch.func.functional_call(self.conv, given, (x,)))
        return self.bn(self.conv(x))


class Hooks(Pair):
    def forward(self, x):
        if x.shape[0] > 4:
            hook = self.conv.register_forward_hook(lambda *a: a[-1] * 2)
            y = self.bn(self.conv(x))
            hook.remove()
            return y
        return self.bn(self.conv(x))


@pytest.mark.parametrize("kind", [Trains, Swaps, Calls, Hooks])
def test_layer_that_is_changed_before_a_call_is_seen(kind):
    _, report = fold(kind().eval(), X)
    assert not report.folded
    assert len(report.refused) == 1


def test_tensors_in_a_dict_of_another_class_are_tensors():
    class Takes(Pair):
        def forward(self, given):
            x = given["x"]
            return self.conv(x) if x.shape[0] > 4 else self.bn(self.conv(x))

    _, report = fold(Takes().eval(), (collections.OrderedDict(x=X),))
    assert "also called without it" in report.refused["bn"]


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


CACHE: dict = {}


@pytest.mark.parametrize("kept", ["global dict", "class dict"])
def test_caches_of_tensors_hold_no_placeholders(kept):
    class Caches(Pair):
        cache: ClassVar[dict] = {}

        def forward(self, x):
            cache = CACHE if kept == "global dict" else self.cache
            if "grid" not in cache or cache["grid"].shape[0] < x.shape[0]:
                cache["grid"] = torch.arange(x.shape[0]).to(x)
            return self.bn(self.conv(x))

    CACHE.clear()
    model = Caches().eval()
    fold(model, X)
    model(X)
    cache = CACHE if kept == "global dict" else Caches.cache
    assert type(cache["grid"]) is torch.Tensor


def test_other_threads_run_their_models_meanwhile():
    other = nn.Sequential(nn.Linear(2, 2))
    found = []

    def run():
        found.append(other(torch.ones(1, 2)).shape)

    class Starts(Pair):
        def forward(self, x):
            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
            return self.bn(self.conv(x))

    _, report = fold(Starts().eval(), X)
    assert report.folded == {"bn": "conv"}
    assert len(found) > 4
    assert set(found) == {(1, 2)}


def test_interrupted_tracing_leaves_torch_as_it_was(monkeypatch):
    """torch.fx replaces `nn.Module.__call__`, and may be interrupted as it puts it back."""

    def interrupted(self):
        raise KeyboardInterrupt

    place, before = torch.fx._symbolic_trace, (nn.Module.__call__, nn.Module.__getattr__)
    with monkeypatch.context() as patches:
        patches.setattr(place._Patcher, "revert_all_patches", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fold(Pair().eval(), X)
    assert (nn.Module.__call__, nn.Module.__getattr__) == before
    with place._maybe_revert_all_patches():  # as torch.compile does, and applies them again
        pass
    assert (nn.Module.__call__, nn.Module.__getattr__) == before


def test_tracers_of_others_go_on():
    def trace(frame, event, arg):
        return None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        fold(Pair().eval(), X)
        found = sys.gettrace()
    finally:
        sys.settrace(before)
    assert found is trace
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


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


class Raw(Pair):
    """Asks of the output of its batch norm what no tensor is."""

    def forward(self, x):
        y = self.bn(self.conv(x))
        if y is None or y is x or isinstance(y, (list, tuple)):
            return x
        if y.dim() > 9:
            raise TypeError(f"Got {type(y)} with {y.dim()} axes.")
        return y + x


class Wraps(nn.Module):
    def __init__(self):
        super().__init__()
        self.pair = Pair()

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("pair"), name)

    def forward(self, x):
        return self.pair(x)


@pytest.mark.parametrize("kind", [Lists, Records, Raw, Wraps])
def test_layers_whose_uses_are_all_seen_are_folded(kind):
    _, report = fold(kind().eval(), X)
    assert len(report.folded) == 1
