"""recalibrate on unusual models and data, each of which gave a wrong result once."""

import contextlib
import copy
import json
import threading
import warnings
from dataclasses import dataclass

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.func import functional_call  # noqa: E402

from batchnorm.errors import ArgumentError  # noqa: E402
from batchnorm.torch import BatchNorm1d, recalibrate  # noqa: E402
from batchnorm.torch.population import system  # noqa: E402
from batchnorm.torch.population.batches import to_device  # noqa: E402
from batchnorm.torch.population.state import process_settings  # noqa: E402

C = 3
methods = pytest.mark.parametrize("method", ["precise", "exact"])
memories = pytest.mark.parametrize("memory", [0, 1e9])
libraries = pytest.mark.parametrize("library", [nn.BatchNorm1d, BatchNorm1d], ids=["torch", "ours"])


@pytest.fixture
def x():
    return 2 * torch.randn(60, C, generator=torch.Generator().manual_seed(1)).double() + 5


class Chain(nn.Module):
    """Two batch norms with something between and around them."""

    def __init__(self, around=None, first=nn.BatchNorm1d):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.linear, self.b = first(C), nn.Linear(C, C), nn.BatchNorm1d(C)
        self.around = around
        self.double()

    def inside(self, x):
        return self.b(self.linear(self.a(x)).relu() + x)

    def forward(self, x):
        return self.inside(x) if self.around is None else self.around(self, x)


def right(model, x, given=None):
    """Whether both layers hold the statistics of what they get in evaluation."""
    with torch.no_grad():
        given = x if given is None else given
        behind = model.linear(model.eval().a(x)).relu() + given
    for layer, value in ((model.a, given), (model.b, behind)):
        torch.testing.assert_close(layer.running_mean, value.mean(0), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(layer.running_var, value.var(0), rtol=1e-9, atol=1e-9)


# ---- what a layer normalizes --------------------------------------------------------------------


class Routed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.rare, self.b = nn.BatchNorm1d(C), nn.BatchNorm1d(C), nn.BatchNorm1d(C)
        self.double()

    def forward(self, x):
        x = self.a(x)
        self.rare(x[x[:, 0] > 1e9])
        return self.b(x)


@memories
def test_recalibrate_exact_passes_a_layer_that_gets_empty_inputs_only(memory, x):
    model = Routed()
    report = recalibrate(model, x.split(20), method="exact", memory=memory)
    assert report.skipped == {"rare": "only empty inputs reached it"}
    assert model.rare.running_mean.tolist() == [0] * C
    torch.testing.assert_close(model.a.running_mean, x.mean(0))


@methods
def test_recalibrate_measures_the_input_whatever_the_order_of_keywords(method, x):
    class Keywords(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = BatchNorm1d(C).double()

        def forward(self, x):
            return self.a(mask=torch.ones(len(x)), residual=100 * x, input=x)

    model = Keywords()
    recalibrate(model, [x], method=method)
    torch.testing.assert_close(model.a.running_var, x.var(0))


@methods
def test_recalibrate_honours_a_mask_that_a_subclass_hands_on(method, x):
    class Masked(BatchNorm1d):
        def forward(self, both):
            return super().forward(both[0], mask=both[1])

    model, mask = Masked(C).double(), torch.arange(60) % 2 == 0
    spoilt = torch.where(mask[:, None], x, 1000.0)
    data = [(spoilt, mask)]
    recalibrate(model, data, method=method, forward=lambda model, both: model(both))
    torch.testing.assert_close(model.running_mean, x[mask].mean(0))


@methods
@libraries
def test_recalibrate_runs_the_forward_of_a_subclass_once(library, method, x):
    class Adds(library):
        def forward(self, x):
            self.times += 1
            return super().forward(x.add_(1))

    model = Chain(first=Adds)
    model.a.times = 0
    recalibrate(model, [x.clone()], method=method, memory=0)
    assert model.a.times == {"precise": 1, "exact": 3}[method]  # 3 prefixes
    torch.testing.assert_close(model.a.running_mean, (x + 1).mean(0))


def test_recalibrate_measures_a_layer_inside_another(x):
    class Nested(nn.BatchNorm1d):
        def __init__(self, channels):
            super().__init__(channels)
            self.pre = nn.BatchNorm1d(channels)

        def forward(self, x):
            return super().forward(3 * self.pre(x))

    model = Nested(C).double()
    recalibrate(model, x.split(20), method="exact")
    torch.testing.assert_close(model.pre.running_mean, x.mean(0))
    torch.testing.assert_close(model.running_mean, torch.zeros(C).double())
    var = x.var(0)
    torch.testing.assert_close(model.running_var, 9 * var / (var + model.eps))


@methods
def test_recalibrate_sees_through_a_forward_that_was_replaced(method):
    layer = nn.BatchNorm1d(4).double()
    inner = layer.forward
    layer.forward = lambda x: inner(x.transpose(1, 2)).transpose(1, 2)
    x = torch.randn(10, 4, 4, generator=torch.Generator().manual_seed(2)).double()
    recalibrate(nn.Sequential(layer), [x], method=method)
    torch.testing.assert_close(layer.running_mean, x.mean((0, 1)))


@methods
def test_recalibrate_keeps_methods_of_an_instance(method, x):
    layer = nn.BatchNorm1d(C).double()
    seen = []
    layer._check_input_dim = check = lambda x: seen.append(x.shape)
    inner = layer.forward
    layer.forward = forward = lambda x: inner(x)
    recalibrate(layer, [x], method=method)
    assert layer._check_input_dim is check
    assert layer.forward is forward
    assert torch.Size([60, C]) in seen


def test_recalibrate_reports_an_input_whose_channels_are_elsewhere():
    class Last(nn.BatchNorm1d):
        def forward(self, x):
            with contextlib.suppress(RuntimeError):
                return super().forward(x)
            return x

    report = recalibrate(Last(4), [torch.randn(10, 6, 4)])
    assert report.skipped == {"": "its input, (10, 6, 4), is not (N, 4, …)"}


@memories
def test_recalibrate_accepts_functional_call_with_the_own_tensors(memory, x):
    model = Chain()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    recalibrate(
        model,
        x.split(20),
        method="exact",
        memory=memory,
        forward=lambda model, batch: functional_call(model, tensors, (batch,)),
    )
    right(model, x)


def test_recalibrate_precise_normalizes_in_groups_where_the_layer_does(x):
    model = nn.Sequential(BatchNorm1d(C, group_size=10), nn.BatchNorm1d(C)).double()
    recalibrate(model, [x])
    alone = copy.deepcopy(model[0]).train()
    torch.testing.assert_close(model[1].running_var, alone(x).detach().var(0))


def test_recalibrate_reports_what_torchscript_has_compiled(x):
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(C)

        def forward(self, x):
            return self.norm(x)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        inner = torch.jit.script(Inner().double())
    model = nn.Sequential(nn.BatchNorm1d(C).double(), inner)
    report = recalibrate(model, x.split(20), method="exact")
    assert [layer.name for layer in report.layers] == ["0"]
    assert report.skipped == {"1.norm": "it is compiled by TorchScript"}


# ---- what a forward does beside -----------------------------------------------------------------


def settled(model, x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.inside(x)


def without_cudnn(model, x):
    with torch.backends.cudnn.flags(enabled=False):
        return model.inside(x)


def in_float64(model, x):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return model.inside(x)
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("around", [settled, without_cudnn, in_float64])
def test_recalibrate_exact_restores_settings_that_a_forward_changes_temporarily(around, x):
    before = process_settings()
    model = Chain(around)
    report = recalibrate(model, x.split(20), method="exact")
    assert process_settings() == before
    assert "settings of the process" in report.notes[0]
    right(model, x)


def test_recalibrate_without_memory_stays_in_the_thread_of_the_caller(x):
    lock, threads = threading.Lock(), set()

    def locked(model, x):
        threads.add(threading.current_thread())
        with lock:
            return model.inside(x)

    model = Chain(locked)
    recalibrate(model, x.split(20), method="exact", memory=0)
    assert threads == {threading.current_thread()}
    right(model, x)


@memories
def test_recalibrate_exact_is_right_where_a_forward_catches_everything(memory, x):
    class Careless(Chain):
        def inside(self, x):
            try:
                h = self.a(x)
            except:  # noqa: E722
                h = 1000 * x
            return self.b(self.linear(h).relu() + x)

    model = Careless()
    report = recalibrate(model, x.split(20), method="exact", memory=memory)
    assert report.notes == ()
    right(model, x)


@memories
def test_recalibrate_exact_counts_once_where_a_forward_calls_a_layer_in_the_end(memory, x):
    class Finally(Chain):
        def inside(self, x):
            try:
                h = self.a(x)
            finally:
                h = self.b(x)
            return h

    model = Finally()
    report = recalibrate(model, x.split(20), method="exact", memory=memory)
    assert {layer.name: layer.count for layer in report.layers} == {"a": 60, "b": 60}


def test_recalibrate_exact_takes_a_forward_that_changes_its_input(x):
    class Shifts(Chain):
        def inside(self, x):
            return super().inside(x.sub_(5))

    class Fresh:
        def __iter__(self):
            return iter([part.clone() for part in x.split(20)])

    model = Shifts()
    report = recalibrate(model, Fresh(), method="exact")
    assert report.notes == ()
    right(model, x - 5)


# ---- data ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 1, 0)], ids=["all", "first is last"])
def test_recalibrate_exact_accepts_a_loader_that_reuses_memory(order, x):
    parts = x.split(20)

    class Reuses:
        def __iter__(self):
            buffer = torch.empty_like(parts[0])
            for k in order:
                yield buffer.copy_(parts[k])

    model = Chain()
    report = recalibrate(model, Reuses(), method="exact")
    assert "reuses a batch's memory" in report.notes[0]
    right(model, torch.cat([parts[k] for k in order]))


def test_recalibrate_exact_takes_the_same_batch_again_and_again(x):
    model = Chain()
    report = recalibrate(model, [x, x, x], method="exact")
    assert report.notes == ()
    assert report.forwards == 4


class Varies:
    """Other values in each pass up to the last that is counted, then always the same."""

    def __init__(self, x, passes):
        self.x, self.left = x, passes

    def __iter__(self):
        self.left -= 1
        return iter((self.x + max(self.left, 0)).split(20))


@pytest.mark.parametrize("memory", [0, 700])  # one batch
def test_recalibrate_exact_says_that_passes_differ(memory, x):
    report = recalibrate(Chain(), Varies(x, 99), method="exact", memory=memory)
    assert ["differ from pass to pass" in note for note in report.notes] == [True]


def test_recalibrate_exact_begins_again_where_only_the_first_pass_differs(x):
    model = Chain()
    # Room for one batch, so that there are several passes.
    report = recalibrate(model, Varies(x, 2), method="exact", memory=700)
    assert report.notes == ()
    right(model, x)


@dataclass
class Labelled:
    inputs: torch.Tensor
    labels: list


def test_recalibrate_counts_examples_in_dataclasses(x):
    data = [Labelled(part, [0]) for part in x.split(20)]
    report = recalibrate(Chain(), data, forward=lambda model, batch: model(batch.inputs))
    assert report.examples == 60


def test_batches_are_moved_to_the_device_whatever_holds_them():
    packed = nn.utils.rnn.pack_sequence([torch.ones(2), torch.ones(1)])
    sent = to_device(
        {"a": [torch.ones(2)], "b": (Labelled(torch.ones(2), []), packed), "c": 3}, "meta"
    )
    assert sent["a"][0].is_meta
    assert sent["b"][0].inputs.is_meta
    assert sent["b"][1].data.is_meta
    assert not sent["b"][1].batch_sizes.is_meta
    assert sent["c"] == 3


def test_recalibrate_takes_nested_tensors_beside_the_input(x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.strided)
        report = recalibrate(Chain(), [(x, nested)] * 2, method="exact")
    assert report.notes == ()


def test_recalibrate_takes_what_can_only_be_indexed(x):
    class Indexed:
        def __getitem__(self, k):
            return x.split(20)[k]

    model = Chain()
    recalibrate(model, Indexed(), method="exact")
    right(model, x)


# ---- arguments and reports ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": "many"}, "samples must be a positive integer or None, got 'many'"),
        ({"samples": 2.5}, "samples must be a positive integer or None, got 2.5"),
        ({"memory": "1GB"}, "memory must be a number of bytes.*got '1GB'"),
        ({"device": "gpu"}, "device must be one of torch's.*got 'gpu'"),
        ({"data": "abc"}, "data must be an iterable of batches, got str"),
    ],
)
def test_recalibrate_refuses_with_a_remedy(arguments, message):
    arguments = {"data": [torch.zeros(3, 2)], **arguments}
    with pytest.raises(ArgumentError, match=message):
        recalibrate(nn.BatchNorm1d(2), **arguments)


def test_recalibrate_refuses_a_model_that_cannot_be_written_to(x):
    with torch.inference_mode():
        model = Chain()
    with pytest.raises(ArgumentError, match="inference_mode"):
        recalibrate(model, [x])
    with torch.inference_mode():
        recalibrate(model, [x])
    torch.testing.assert_close(model.a.running_mean, x.mean(0))


def test_report_is_finite_or_infinite_where_the_old_variance_was_negative(x):
    layer = nn.BatchNorm1d(C).double()
    layer.running_var.fill_(-1)
    (moved,) = recalibrate(layer, [x]).layers
    assert moved.std_ratio == float("inf")
    assert "NaN" not in json.dumps(recalibrate(layer, [x]).to_dict())


def test_recalibrate_skips_layers_without_channels():
    assert recalibrate(nn.BatchNorm1d(0), [torch.zeros(3, 0)]).skipped == {"": "it has no channels"}


def test_most_threads_is_a_share_of_what_the_system_allows(monkeypatch):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrlimit", lambda what: (80, 80))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert system.most_threads() == 5
