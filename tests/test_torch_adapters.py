"""The table of adapters, and register_adapter."""

import copy
import pickle
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from batchnorm.errors import ArgumentError  # noqa: E402
from batchnorm.torch import (  # noqa: E402
    BatchNorm1d,
    SyncBatchNorm,
    adapters,
    convert,
    explain,
    freeze,
    register_adapter,
    revert,
)

C = 4
U = 2.0**-24  # half a unit in the last place of float32


def test_convert_imports_neither_timm_nor_torchvision():
    code = """
import sys, torch
from batchnorm.torch import convert, explain, freeze, revert
model = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.ReLU())
print(explain(revert(freeze(convert(model)))))
print([name for name in sys.modules if "timm" in name or "torchvision" in name])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


# ---- adapters of users --------------------------------------------------------------------------


class Doubled(nn.BatchNorm1d):
    def forward(self, x):
        return 2 * super().forward(x)


class OurDoubled(Doubled, BatchNorm1d):
    pass


class Synchronized(Doubled, SyncBatchNorm):
    pass


class Constant(nn.Module):
    """With the attributes of a layer with constant statistics."""

    def __init__(self):
        super().__init__()
        self.eps = 1e-3
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(C) + 0.5)

    def forward(self, x):
        v = [b.view(C, 1, 1) for b in (self.running_mean, self.running_var, self.weight, self.bias)]
        return (x - v[0]) / (v[1] + self.eps).sqrt() * v[2] + v[3]


class OurConstant(adapters.FrozenLayer, Constant):
    pass


@pytest.fixture
def table(monkeypatch):
    """The table of adapters, restored afterwards."""
    monkeypatch.setattr(adapters, "_ADAPTERS", adapters._ADAPTERS.copy())


@pytest.fixture
def registered(table):
    register_adapter(Doubled, OurDoubled)
    register_adapter(Constant, OurConstant)


def test_registered_adapter_converts_and_reverts(registered):
    x, theirs = torch.randn(6, C), Doubled(C)
    ours = convert(copy.deepcopy(theirs), group_size=6)
    assert type(ours) is OurDoubled
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=16 * U)
    ours = pickle.loads(pickle.dumps(ours))
    assert type(revert(ours)) is Doubled
    assert ours.__dict__.keys() == theirs.__dict__.keys()


def test_registered_adapter_of_constant_statistics_converts_and_reverts(registered):
    x, theirs = torch.rand(6, C, 5, 5), Constant()
    ours = convert(copy.deepcopy(theirs))
    assert type(ours) is OurConstant
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=16 * U)
    assert type(revert(freeze(ours))) is Constant


def test_registering_the_same_again_is_harmless(registered):
    register_adapter(Doubled, OurDoubled)


def test_sync_without_a_synchronized_class_is_refused_and_changes_nothing(registered):
    net = nn.Sequential(nn.BatchNorm1d(C), Doubled(C))
    with pytest.raises(ArgumentError, match="'1' cannot be synchronized.*for Doubled"):
        convert(net, sync=True)
    assert [type(m) for m in net] == [nn.BatchNorm1d, Doubled]
    with pytest.raises(ArgumentError, match="'1' cannot be synchronized.*for Doubled"):
        convert(convert(net), sync=True)
    assert [type(m) for m in net] == [BatchNorm1d, OurDoubled]


def test_sync_makes_the_synchronized_class(table):
    register_adapter(Doubled, OurDoubled, synchronized=Synchronized)
    net = convert(nn.Sequential(Doubled(C)), sync=True)
    assert type(net[0]) is Synchronized
    assert explain(net).synchronized == {"0"}
    assert type(convert(net, sync=False)[0]) is OurDoubled
    assert type(revert(convert(net, sync=True))[0]) is Doubled


class _Slots(Doubled, BatchNorm1d):
    __slots__ = ("more",)


BAD = {
    "original no class": (Doubled(C), OurDoubled, {}, "original must be a subclass of Module"),
    "original no module": (int, OurDoubled, {}, "original must be a subclass of Module"),
    "ours no class": (Doubled, OurDoubled(C), {}, "ours must be a subclass of Doubled"),
    "not a subclass": (Doubled, BatchNorm1d, {}, "ours must be a subclass of Doubled, got"),
    "ours already": (OurDoubled, OurDoubled, {}, "original must be the class that convert"),
    "every module": (nn.Module, OurDoubled, {}, "original must be the class that convert"),
    "not of ours": (nn.Linear, nn.Bilinear, {}, "ours must be a subclass of Linear"),
    "itself": (Doubled, Doubled, {}, "must be a subclass of a layer of batchnorm"),
    "taken": (nn.BatchNorm1d, OurDoubled, {}, "BatchNorm1d already has an adapter"),
    "sync": (
        Doubled, OurDoubled, {"synchronized": OurDoubled}, "must be a subclass of SyncBatchNorm",
    ),
    "slots": (Doubled, _Slots, {}, "cannot become _Slots.*layout.*__slots__"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_adapters_are_refused(table, case):
    original, ours, keywords, message = BAD[case]
    with pytest.raises(ArgumentError, match=message):
        register_adapter(original, ours, **keywords)
    assert Doubled not in adapters._ADAPTERS


class _Raises(OurDoubled):
    def adopt(self, name=""):
        super().adopt(name)
        raise KeyError(name)


def test_adapter_that_raises_in_the_middle_has_changed_nothing(table):
    register_adapter(Doubled, _Raises)
    net = nn.Sequential(nn.BatchNorm1d(C), nn.BatchNorm2d(C).half(), Doubled(C), nn.BatchNorm1d(C))
    before = [(type(m), dict(m.__dict__), dict(m._buffers)) for m in net]
    with pytest.raises(KeyError, match="2"):
        convert(net, on_single="population", sync=False)
    assert [(type(m), m.__dict__, m._buffers) for m in net] == before
