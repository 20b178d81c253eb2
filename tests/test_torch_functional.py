"""The layer as a function of torch tensors: values, layouts, refusals, and what stays untouched."""

import copy
import io
import math
import os
import platform
import subprocess
import sys
from itertools import permutations
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from torch.nn import functional as F  # noqa: E402

from batchnorm.errors import ArgumentError, ShapeError  # noqa: E402
from batchnorm.torch.functional import batch_norm  # noqa: E402

EPS = 1e-5
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# What one rounding to a type may change, relative to the value.
ROUNDING = {
    torch.float32: 0.0,
    torch.float64: 0.0,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
# Below the smallest normal float16 a rounding is up to half of its smallest positive number.
SUBNORMAL = {torch.float16: 2.0**-25}
OUTPUT = 1e-6  # docs on numerics, promise 2
GRADIENT = 1e-5  # promise 3, in norm
# A few thousand terms of size below 10 in float64, in two orders.
FLOAT64 = 1e-11

SHAPES = [(2, 1), (7, 3), (3, 5, 4), (2, 3, 4, 5), (1, 4, 6), (2, 3, 2, 3, 2)]

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
modes = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.fixture
def randn():
    """randn(*shape, dtype=...): normal values from one seed, rounded from float64."""
    generator = torch.Generator().manual_seed(20150211)

    def draw(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return draw


@pytest.fixture
def threads():
    """threads(n): use n threads until the test is over."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# ---- the oracle ---------------------------------------------------------------------------------


def _column(v, x):
    return v.double().view(-1, *[1] * (x.dim() - 2))


def _exact(
    x,
    weight=None,
    bias=None,
    statistics=None,
    residual=None,
    mask=None,
    activation=None,
    slope=0.01,
    eps=EPS,
    groups=None,
):
    """The layer's definition in float64, differentiable; `groups`: (start, stop) of each."""
    parts = []
    for start, stop in groups or [(0, len(x))]:
        part = x[start:stop].double()
        axes = [a for a in range(x.dim()) if a != 1]
        if statistics is not None:
            mean, var = (_column(s, x) for s in statistics)
        elif mask is None:
            mean = part.mean(axes, keepdim=True)
            var = ((part - mean) ** 2).mean(axes, keepdim=True)
        else:
            share = mask[start:stop].double().unsqueeze(1)
            share = share / share.sum()
            mean = (share * part).sum(axes, keepdim=True)
            var = (share * (part - mean) ** 2).sum(axes, keepdim=True)
        z = (part - mean) / (var + eps).sqrt()
        parts.append(z)
    y = torch.cat(parts)
    y = y if weight is None else y * _column(weight, x)
    y = y if bias is None else y + _column(bias, x)
    y = y if residual is None else y + residual.double()
    if activation == "leaky_relu":
        y = F.leaky_relu(y, slope)
    elif activation is not None:
        y = getattr(F, activation)(y)
    return y if mask is None else y * (mask.unsqueeze(1) > 0)


def _assert_output(y, exact, weight=None, bias=None):
    """Promise 2, and one rounding to the type of y on top."""
    scale = 1.0 if weight is None else _column(weight.detach().abs().clamp(min=1), y)
    shift = 0.0 if bias is None else _column(bias.detach().abs(), y) * 2.0**-23
    size = exact.detach().abs()
    bound = OUTPUT * size.clamp(min=1) * scale + shift
    bound = bound + ROUNDING[y.dtype] * size + SUBNORMAL.get(y.dtype, 0.0)
    if y.dtype == torch.float64:
        bound = torch.full_like(size, FLOAT64)
    error = (y.detach().double() - exact.detach()).abs()
    assert bool((error <= bound).all()), f"largest error {float(error.max())}"


def _assert_gradient(grad, exact):
    """Promise 3, and one rounding to the type of the gradient on top."""
    bound = GRADIENT + ROUNDING[grad.dtype]
    error = (grad.double() - exact.double()).norm()
    # Where the exact gradient vanishes, what is left is the roundings of terms of size one.
    assert float(error) <= bound * float(exact.double().norm()) + OUTPUT * exact.numel() ** 0.5


def _leaves(*tensors):
    return [None if t is None else t.detach().requires_grad_() for t in tensors]


def _gradients(y, grad_y, tensors):
    return torch.autograd.grad(y, [t for t in tensors if t is not None], grad_y.to(y.dtype))


def _statistics(channels, dtype=torch.float32):
    return torch.linspace(-1, 1, channels, dtype=dtype), torch.linspace(0.5, 2, channels).to(dtype)


def _assert_equals_the_definition(x, grad_y, weight, bias, training, exact=None, **arguments):
    statistics = None if training else _statistics(x.shape[1])
    ours = _leaves(x, weight, bias)
    y = batch_norm(ours[0], *(statistics or (None, None)), *ours[1:], training, **arguments)
    theirs = _leaves(*(None if t is None else t.double() for t in (x, weight, bias)))
    expected = _exact(*theirs, statistics, **(arguments if exact is None else exact))
    _assert_output(y, expected, weight, bias)
    for a, b in zip(_gradients(y, grad_y, ours), _gradients(expected, grad_y, theirs), strict=True):
        _assert_gradient(a, b)


# ---- values -------------------------------------------------------------------------------------


@modes
@dtypes
@shapes
def test_batch_norm_equals_the_definition(randn, shape, dtype, training):
    x, g = randn(*shape, dtype=dtype) * 2 + 3, randn(*shape, dtype=dtype)
    weight, bias = randn(shape[1]), randn(shape[1])
    _assert_equals_the_definition(x, g, weight, bias, training)


@modes
@dtypes
@shapes
def test_batch_norm_equals_torch(randn, shape, dtype, training):
    c = shape[1]
    x, weight, bias = randn(*shape, dtype=dtype), randn(c, dtype=dtype), randn(c, dtype=dtype)
    buffers, theirs = ([t.clone() for t in _statistics(c, dtype)] for _ in range(2))
    y = batch_norm(x, *buffers, weight, bias, training)
    expected = F.batch_norm(x, *theirs, weight, bias, training)
    # Two results in float32 from 60 values of size below 10, each rounded once to the type.
    bound = FLOAT64 if dtype == torch.float64 else 1e-5 + 2 * ROUNDING[dtype]
    torch.testing.assert_close(y, expected, rtol=bound, atol=bound)


@modes
@pytest.mark.parametrize("parameters", ["weight", "bias", "none"])
def test_batch_norm_takes_absent_parameters_as_one_and_zero(randn, training, parameters):
    x, g = randn(5, 3, 4), randn(5, 3, 4)
    weight = randn(3) if parameters == "weight" else None
    bias = randn(3) if parameters == "bias" else None
    _assert_equals_the_definition(x, g, weight, bias, training)


@modes
@dtypes
def test_batch_norm_y_has_the_type_of_input(randn, dtype, training):
    y = batch_norm(randn(4, 3, dtype=dtype), *_statistics(3), torch.ones(3), None, training)
    assert y.dtype == dtype


@pytest.mark.parametrize("parameter", DTYPES, ids=str)
@dtypes
def test_batch_norm_takes_parameters_of_any_floating_type(randn, dtype, parameter):
    x, g = randn(6, 3, 4, dtype=dtype), randn(6, 3, 4, dtype=dtype)
    weight, bias = randn(3, dtype=parameter), randn(3, dtype=parameter)
    _assert_equals_the_definition(x, g, weight, bias, True)


def test_batch_norm_takes_weight_and_bias_of_two_types(randn):
    x, g = randn(6, 3, 4), randn(6, 3, 4)
    _assert_equals_the_definition(x, g, randn(3, dtype=torch.float16), randn(3).double(), True)


def test_batch_norm_uses_the_digits_of_a_wider_bias():
    # 1 + 2⁻¹² is 1 in float16, and then y would be 0.
    x = torch.tensor([[-1.0], [1.0]], dtype=torch.float16)
    weight, bias = torch.tensor([1.0]), torch.tensor([1 + 2.0**-12])
    assert batch_norm(x, None, None, weight, bias, True, eps=1e-12)[0, 0] == 2.0**-12


@dtypes
def test_batch_norm_gradients_have_the_types_of_what_they_belong_to(randn, dtype):
    tensors = _leaves(randn(6, 3, dtype=dtype), randn(3), randn(3, dtype=torch.float64))
    y = batch_norm(tensors[0], None, None, *tensors[1:], True)
    grads = torch.autograd.grad(y.double().square().sum(), tensors)
    assert [g.dtype for g in grads] == [dtype, torch.float32, torch.float64]


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (1, 2)])
@modes
def test_batch_norm_gives_only_the_gradients_that_are_wanted(randn, wanted, training):
    x, weight, bias, g = randn(6, 3, 4), randn(3), randn(3), randn(6, 3, 4)
    tensors = [x, weight, bias]
    every = _leaves(*tensors)
    expected = _gradients(batch_norm(every[0], *_statistics(3), *every[1:], training), g, every)
    for k in wanted:
        tensors[k].requires_grad_()
    batch_norm(tensors[0], *_statistics(3), *tensors[1:], training).backward(g)
    for k, t in enumerate(tensors):
        assert (t.grad is None) == (k not in wanted)
        if k in wanted:
            assert torch.equal(t.grad, expected[k])


@modes
def test_batch_norm_y_does_not_require_grad_when_nothing_does(randn, training):
    assert not batch_norm(randn(6, 3), *_statistics(3), training=training).requires_grad


@modes
def test_batch_norm_leaves_its_arguments_alone(randn, training):
    arguments = [randn(6, 3, 4), torch.ones(3), torch.zeros(3), randn(6, 3, 4), randn(6, 4) > 0]
    before = [t.clone() for t in arguments]
    x, weight, bias, residual, mask = arguments
    x.requires_grad_()
    y = batch_norm(x, *_statistics(3), weight, bias, training, residual=residual, mask=mask)
    y.sum().backward()
    for a, b in zip(arguments, before, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_batch_norm_confines_what_is_not_finite_to_its_channel(randn, bad):
    x = randn(6, 3, 4)
    expected = batch_norm(x, None, None, training=True)
    x[2, 1, 3] = bad
    y = batch_norm(x, None, None, training=True)
    assert torch.equal(y[:, ::2], expected[:, ::2])
    assert bool(y[:, 1].isnan().all())


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (2, 3, 0), (2, 0), (2, 0, 4)], ids=str)
@modes
def test_batch_norm_takes_axes_of_no_length(shape, training):
    x, weight, bias = _leaves(torch.ones(shape), torch.ones(shape[1]), torch.zeros(shape[1]))
    y = batch_norm(x, *_statistics(shape[1]), weight, bias, training)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape
    assert torch.equal(weight.grad, torch.zeros(shape[1]))
    assert torch.equal(bias.grad, torch.zeros(shape[1]))


def test_batch_norm_reads_a_negated_view(randn):
    # The imaginary part of a conjugate has its sign in a flag, not in memory.
    z = torch.complex(randn(6, 3), randn(6, 3))
    x = z.conj().imag
    assert x.is_neg()
    y = batch_norm(x, None, None, training=True)
    assert torch.equal(y, batch_norm(x.resolve_neg(), None, None, training=True))


def test_batch_norm_works_in_inference_mode(randn):
    x, buffers, others = randn(6, 3), _statistics(3), _statistics(3)
    with torch.inference_mode():
        y = batch_norm(x, *buffers, training=True)
    assert torch.equal(y, batch_norm(x, *others, training=True))
    assert torch.equal(buffers[0], others[0])


def test_batch_norm_takes_running_statistics_made_in_inference_mode(randn):
    with torch.inference_mode():
        buffers = _statistics(3)
    x, others = randn(6, 3), _statistics(3)
    with torch.inference_mode():
        batch_norm(x, *buffers, training=True)
        batch_norm(x, *others, training=True)
    assert torch.equal(buffers[1], others[1])


class _Marked(torch.Tensor):
    pass


def test_batch_norm_keeps_a_subclass_of_tensor(randn):
    x = randn(6, 3)
    y = batch_norm(x.as_subclass(_Marked), None, None, training=True)
    assert type(y) is _Marked
    assert torch.equal(y.as_subclass(torch.Tensor), batch_norm(x, None, None, training=True))


class _Overriding(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return function


def test_batch_norm_can_be_overridden_by_a_subclass(randn):
    x = randn(6, 3).as_subclass(_Overriding)
    assert batch_norm(x, None, None, training=True) is batch_norm


# ---- accuracy -----------------------------------------------------------------------------------


formats = pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)


@formats
@pytest.mark.parametrize(("offset", "channels"), [(1e2, 8), (1e4, 64), (1e6, 8)])
def test_batch_norm_y_is_within_its_promise_when_the_mean_is_large(
    randn, offset, channels, memory_format
):
    # torch 2.13 is wrong by 6e-4, and by 1.8e-2 in channels_last, at 1e4.
    x = (randn(16, channels, 28, 28) + offset).contiguous(memory_format=memory_format)
    _assert_output(batch_norm(x, None, None, training=True), _exact(x))


@formats
def test_batch_norm_evaluation_is_within_its_promise_when_the_mean_is_large(randn, memory_format):
    # torch 2.13 is wrong by 2.1e-3.
    x = (randn(4, 8, 6, 6) * 0.1 + 1e4).contiguous(memory_format=memory_format)
    statistics = torch.full((8,), 1e4), torch.full((8,), 1e-2)
    _assert_output(batch_norm(x, *statistics), _exact(x, statistics=statistics))


@formats
def test_batch_norm_gradients_are_within_their_promise_when_the_mean_is_large(randn, memory_format):
    x = (randn(16, 16, 14, 14) + 1e4).contiguous(memory_format=memory_format)
    _assert_equals_the_definition(x, randn(16, 16, 14, 14), randn(16), randn(16), True)


@formats
def test_batch_norm_running_statistics_are_right_when_the_mean_is_large(randn, memory_format):
    x = (randn(16, 16, 14, 14) + 1e4).contiguous(memory_format=memory_format)
    mean, var = torch.zeros(16, dtype=torch.float64), torch.ones(16, dtype=torch.float64)
    batch_norm(x, mean, var, training=True, momentum=1.0)
    columns = x.double().movedim(1, -1).reshape(-1, 16)
    # The bounds of a training step, with a standard deviation of 1.
    torch.testing.assert_close(mean, columns.mean(0), rtol=0, atol=1e-6)
    torch.testing.assert_close(var, columns.var(0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e7, 1e30])
def test_batch_norm_of_a_constant_channel_is_its_bias(constant):
    y = batch_norm(torch.full((7, 1, 3), constant), None, None, None, torch.tensor([0.3]), True)
    assert torch.equal(y, torch.full((7, 1, 3), 0.3))


# ---- layouts ------------------------------------------------------------------------------------


def _gaps(v, *shape):
    """Memory in which a layout leaves gaps; what lies there must not be read."""
    return torch.full(shape, float("nan"), dtype=v.dtype)


def _sliced(v):
    n, c, h, w = v.shape
    return _gaps(v, 2 * n, c + 1, h, w + 3)[::2, 1:, :, 2:-1].copy_(v)


def _sliced_last(v):
    n, c, h, w = v.shape
    return _gaps(v, n, c, h, 2 * w)[..., ::2].copy_(v)


def _sliced_grid(v):
    n, c, h, w = v.shape
    return _gaps(v, n, c, 2 * h, 2 * w)[:, :, ::2, ::2].copy_(v)


def _sliced_channels(v):
    n, c, h, w = v.shape
    return _gaps(v, n, h, w, 2 * c)[..., ::2].permute(0, 3, 1, 2).copy_(v)


LAYOUTS = {
    "contiguous": lambda v: v.contiguous(),
    "channels_last": lambda v: v.contiguous(memory_format=torch.channels_last),
    "transposed": lambda v: v.transpose(0, 1).contiguous().transpose(0, 1),
    "fortran": lambda v: v.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "sliced": _sliced,
    "sliced_last": _sliced_last,
    "sliced_grid": _sliced_grid,
    "sliced_channels": _sliced_channels,
    "expanded_examples": lambda v: v[:1].expand(v.shape),
    "expanded_channels": lambda v: v[:, :1].expand(v.shape),
    "expanded_pixels": lambda v: v[..., :1].expand(v.shape),
}
layouts = pytest.mark.parametrize("layout", LAYOUTS)


@modes
@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batch_norm_equals_the_definition_in_any_layout(randn, layout, dtype, training):
    x = LAYOUTS[layout](randn(4, 3, 5, 2, dtype=dtype))
    g = randn(4, 3, 5, 2, dtype=dtype)
    _assert_equals_the_definition(x, g, randn(3), randn(3), training)


@modes
@layouts
def test_batch_norm_takes_grad_y_in_any_layout(randn, layout, training):
    g = LAYOUTS[layout](randn(4, 3, 5, 2))
    _assert_equals_the_definition(randn(4, 3, 5, 2), g, randn(3), randn(3), training)


@layouts
def test_batch_norm_takes_a_residual_in_any_layout(randn, layout):
    residual = LAYOUTS[layout](randn(4, 3, 5, 2))
    x, g = randn(4, 3, 5, 2), randn(4, 3, 5, 2)
    _assert_equals_the_definition(x, g, None, None, True, residual=residual, activation="relu")


@modes
def test_batch_norm_takes_the_gradient_of_a_sum(randn, training):
    # Its grad_y is one number, expanded.
    x, weight, bias = _leaves(randn(4, 3, 5, 2), randn(3), randn(3))
    batch_norm(x, *_statistics(3), weight, bias, training).sum().backward()
    torch.testing.assert_close(bias.grad, torch.full((3,), 40.0), rtol=0, atol=0)


def test_batch_norm_sums_the_gradient_of_an_expanded_input(randn):
    x, g = randn(4, 1, 5), randn(4, 3, 5)
    ours, theirs = _leaves(x, x.double())
    y = batch_norm(ours.expand(4, 3, 5), None, None, training=True)
    expected = _exact(theirs.expand(4, 3, 5))
    _assert_gradient(*(_gradients(a, g, [b])[0] for a, b in ((y, ours), (expected, theirs))))


def test_batch_norm_takes_strided_parameters_and_statistics(randn):
    x, memory = randn(6, 3, 4), randn(4, 6).abs() + 0.5
    strided = list(memory[:, ::2])
    dense = [t.clone() for t in strided]
    y = batch_norm(x, *strided, training=True)
    assert torch.equal(y, batch_norm(x, *dense, training=True))
    for a, b in zip(strided, dense, strict=True):
        assert torch.equal(a, b)


def test_batch_norm_writes_strided_running_statistics_between_the_gaps_only(randn):
    memory = torch.full((2, 6), 7.0)
    batch_norm(randn(6, 3, 4), memory[0, ::2], memory[1, ::2], training=True)
    assert torch.equal(memory[:, 1::2], torch.full((2, 3), 7.0))


# Outputs of 4 MiB and more are made in another place.
@pytest.mark.parametrize("shape", [(4, 3, 5, 2), (8, 16, 96, 96)], ids=["small", "large"])
@formats
@modes
def test_batch_norm_y_keeps_the_memory_format(randn, shape, memory_format, training):
    x = randn(*shape).contiguous(memory_format=memory_format)
    y = batch_norm(x, *_statistics(shape[1]), training=training)
    assert y.stride() == x.stride()


@pytest.mark.parametrize("shape", [(4, 3, 5, 2), (8, 16, 32, 32)], ids=["small", "large"])
@formats
def test_batch_norm_grad_x_keeps_the_memory_format(randn, shape, memory_format):
    x = randn(*shape).contiguous(memory_format=memory_format).requires_grad_()
    y = batch_norm(x, None, None, training=True)
    grad_x = torch.autograd.grad(y, x, randn(*shape))[0]
    assert grad_x.stride() == x.stride()


@pytest.mark.parametrize("shape", [(2, 3, 4, 2, 3), (4, 16, 16, 16, 16)], ids=["small", "large"])
def test_batch_norm_keeps_channels_last_of_volumes(randn, shape):
    x = randn(*shape).contiguous(memory_format=torch.channels_last_3d)
    y = batch_norm(x, None, None, training=True)
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    _assert_output(y, _exact(x))


@pytest.mark.parametrize("shape", [(4, 1, 5, 2), (4, 3, 1, 1), (1, 3, 5, 2)], ids=str)
@formats
def test_batch_norm_y_has_torchs_strides_when_an_axis_is_one_long(randn, shape, memory_format):
    x = randn(*shape).contiguous(memory_format=memory_format)
    expected = F.batch_norm(x, None, None, training=True)
    assert batch_norm(x, None, None, training=True).stride() == expected.stride()


@pytest.mark.parametrize("layout", ["sliced", "sliced_grid", "expanded_examples"])
def test_batch_norm_y_is_dense_when_input_is_not(randn, layout):
    x = LAYOUTS[layout](randn(4, 3, 5, 2))
    y = batch_norm(x, None, None, training=True)
    assert y.untyped_storage().nbytes() == y.numel() * 4
    assert y.stride() == torch.empty_like(x).stride()


@formats
def test_batch_norm_large_y_can_be_resized_in_place(memory_format):
    x = torch.zeros(8, 64, 64, 64).contiguous(memory_format=memory_format)
    y = batch_norm(x, None, None, training=True)
    y.resize_(16, 64, 64, 64)
    assert y.untyped_storage().nbytes() == 2 * x.nbytes


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists(), reason="no huge pages"
)
def test_batch_norm_largest_outputs_are_in_huge_pages():
    x = torch.zeros(9, 64, 128, 128)  # more than any allocator keeps
    y = batch_norm(x, None, None, training=True)
    middle = y.data_ptr() + y.nbytes // 2
    found = None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if " " in line and "-" in (head := line.split(maxsplit=1)[0]):
            begin, end = (int(number, 16) for number in head.split("-"))
            found = begin <= middle < end
        elif found and line.startswith("VmFlags:"):
            assert "hg" in line.split()
            return
    pytest.fail("the output is in no mapping")


# A small block that lands behind the output makes the next call take a new place: once or twice in
# a process, hence the median.
_FAULTS = """
import resource, statistics, torch
from batchnorm.torch.functional import batch_norm
x = torch.zeros(8, 64, 100, 100)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    batch_norm(x, None, None, training=True)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(statistics.median_low(faults() for _ in range(21)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's thresholds")
@pytest.mark.parametrize("variable", [None, "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"])
def test_batch_norm_keeps_memory_unless_the_environment_sets_thresholds(variable):
    values = {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=131072"}
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    if variable:
        environment[variable] = values.get(variable, "131072")
    command = [sys.executable, "-c", _FAULTS]
    found = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    # An output of 20 MB that is mapped anew is not all huge pages: some 400 are of 4 KB.
    assert (int(found.stdout) < 100) == (variable is None)


# ---- running statistics -------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, 0.37])
@pytest.mark.parametrize("shape", [(7, 3), (5, 3, 4), (2, 3, 4, 5)], ids=str)
def test_batch_norm_running_statistics_equal_torchs_after_steps(randn, shape, momentum):
    ours, theirs = (_statistics(3, torch.float64) for _ in range(2))
    for _ in range(5):
        x = randn(*shape, dtype=torch.float64)
        batch_norm(x, *ours, training=True, momentum=momentum)
        F.batch_norm(x, *theirs, training=True, momentum=momentum)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=FLOAT64)


def test_batch_norm_running_variance_takes_up_the_unbiased_one():
    mean, var = torch.zeros(1), torch.ones(1)
    batch_norm(torch.tensor([[1.0], [3.0]]), mean, var, training=True, momentum=1.0)
    assert (float(mean), float(var)) == (2.0, 2.0)


@dtypes
def test_batch_norm_updates_running_statistics_of_any_floating_type(randn, dtype):
    x, ours, exact = randn(6, 3, 4), _statistics(3, dtype), _statistics(3, torch.float64)
    exact = [t.to(dtype).double() for t in exact]
    batch_norm(x, *ours, training=True)
    F.batch_norm(x.double(), *exact, training=True)
    for a, b in zip(ours, exact, strict=True):
        # One rounding to the type (2⁻²⁴ in float32) of values of size two.
        bound = 2 * max(ROUNDING[dtype], 2.0**-24)
        torch.testing.assert_close(a.double(), b, rtol=0, atol=bound)


def test_batch_norm_leaves_running_statistics_alone_in_evaluation(randn):
    buffers = _statistics(3)
    versions = [t._version for t in buffers]
    batch_norm(randn(6, 3), *buffers)
    assert [t._version for t in buffers] == versions


def test_batch_norm_tells_autograd_that_running_statistics_changed(randn):
    # A graph that holds the old values must not silently use the new ones.
    mean, var = _statistics(3)
    scale = torch.ones(3, requires_grad=True)
    product = scale * mean
    batch_norm(randn(6, 3), mean, var, training=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_batch_norm_leaves_running_statistics_alone_when_the_batch_is_empty():
    mean, var = _statistics(3)
    batch_norm(torch.ones(0, 3), mean, var, training=True)
    assert torch.equal(torch.stack((mean, var)), torch.stack(_statistics(3)))


ACTIVATIONS = ["relu", "leaky_relu", "relu6", "hardswish", "silu"]


# ---- residual -----------------------------------------------------------------------------------


@modes
@dtypes
@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu", "relu6"])
def test_residual_is_added_before_the_activation(randn, dtype, training, activation):
    x, g, residual = (randn(5, 3, 4, dtype=dtype) for _ in range(3))
    _assert_equals_the_definition(
        x, g, randn(3), randn(3), training, residual=residual, activation=activation
    )


@modes
@pytest.mark.parametrize("activation", ["hardswish", "silu"])
def test_residual_is_added_before_an_activation_of_its_own_pass(randn, training, activation):
    x, g, residual = (randn(5, 3, 4) for _ in range(3))
    _assert_equals_the_definition(
        x, g, randn(3), randn(3), training, residual=residual, activation=activation
    )


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_residual_gradient_is_that_of_a_sum(randn, activation):
    x, residual, g = randn(5, 3, 4), randn(5, 3, 4), randn(5, 3, 4)
    ours, theirs = _leaves(residual, residual.double())
    y = batch_norm(x, None, None, training=True, residual=ours, activation=activation)
    expected = _exact(x, residual=theirs, activation=activation)
    _assert_gradient(*(_gradients(a, g, [b])[0] for a, b in ((y, ours), (expected, theirs))))


@pytest.mark.parametrize("shape", [(1, 3, 4), (3, 1), (1,), (), (5, 1, 4)], ids=str)
@modes
def test_residual_broadcasts(randn, shape, training):
    x, g, residual = randn(5, 3, 4), randn(5, 3, 4), randn(*shape)
    _assert_equals_the_definition(
        x, g, randn(3), randn(3), training, residual=residual, activation="relu"
    )


def test_residual_gradient_has_its_shape_when_it_broadcasts(randn):
    residual = randn(3, 1).requires_grad_()
    batch_norm(randn(5, 3, 4), None, None, training=True, residual=residual).sum().backward()
    torch.testing.assert_close(residual.grad, torch.full((3, 1), 20.0), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_residual_of_another_type_is_added(randn, dtype):
    x, g, residual = randn(5, 3, 4), randn(5, 3, 4), randn(5, 3, 4, dtype=dtype)
    _assert_equals_the_definition(x, g, None, None, True, residual=residual)


@pytest.mark.parametrize("residual", [torch.float32, torch.float64], ids=str)
def test_residual_of_a_wider_type_widens_y_as_an_addition_does(randn, residual):
    x = randn(5, 3, 4, dtype=torch.float16)
    y = batch_norm(x, None, None, training=True, residual=randn(5, 3, 4, dtype=residual))
    assert y.dtype == residual


def test_residual_that_does_not_broadcast_is_refused(randn):
    with pytest.raises(ValueError, match="residual"):
        batch_norm(randn(5, 3, 4), None, None, training=True, residual=randn(5, 2, 4))


def test_residual_of_a_larger_shape_enlarges_y_as_an_addition_does(randn):
    x, residual = randn(1, 3, 4), randn(5, 3, 4)
    y = batch_norm(x, None, None, training=True, residual=residual)
    torch.testing.assert_close(y, batch_norm(x, None, None, training=True) + residual)


def test_residual_may_be_input_itself(randn):
    x, g = randn(5, 3, 4), randn(5, 3, 4)
    ours, theirs = _leaves(x, x.double())
    y = batch_norm(ours, None, None, training=True, residual=ours, activation="relu")
    expected = _exact(theirs, residual=theirs, activation="relu")
    _assert_gradient(*(_gradients(a, g, [b])[0] for a, b in ((y, ours), (expected, theirs))))


def test_residual_may_be_changed_before_backward(randn):
    # As where torch adds and activates: what an addition was given is not needed again.
    x, residual, g = randn(5, 3, 4), randn(5, 3, 4), randn(5, 3, 4)
    grads = []
    for change in (False, True):
        leaf, added = x.clone().requires_grad_(), residual.clone()
        y = batch_norm(leaf, None, None, training=True, residual=added, activation="relu")
        if change:
            added.zero_()
        y.backward(g)
        grads.append(leaf.grad)
    assert torch.equal(*grads)


def test_y_changed_before_backward_is_noticed_when_the_gradient_depends_on_it(randn):
    x, residual = randn(5, 3, 4).requires_grad_(), randn(5, 3, 4)
    y = batch_norm(x, None, None, training=True, residual=residual, activation="relu")
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# ---- mask ---------------------------------------------------------------------------------------


def _lengths(n, length):
    """(n, length) booleans, as of sequences of different lengths."""
    return torch.arange(length) < torch.arange(1, n + 1)[:, None]


@modes
@dtypes
def test_mask_of_booleans_equals_the_definition(randn, dtype, training):
    x, g = randn(4, 3, 5, dtype=dtype) + 2, randn(4, 3, 5, dtype=dtype)
    _assert_equals_the_definition(x, g, randn(3), randn(3), training, mask=_lengths(4, 5))


@modes
@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.float16, torch.int64])
def test_mask_of_weights_equals_the_definition(randn, kind, training):
    x, g = randn(4, 3, 5) + 2, randn(4, 3, 5)
    mask = (torch.arange(20) % 4).view(4, 5).to(kind)
    _assert_equals_the_definition(x, g, randn(3), randn(3), training, mask=mask)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mask_with_residual_and_activation_equals_the_definition(randn, activation):
    x, g, residual = randn(4, 3, 5), randn(4, 3, 5), randn(4, 3, 5)
    _assert_equals_the_definition(
        x, g, randn(3), randn(3), True,
        residual=residual, mask=_lengths(4, 5), activation=activation,
    )  # fmt: skip


@modes
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_mask_hides_what_is_not_finite(randn, bad, training):
    mask = _lengths(4, 5)
    values, weight, bias = [randn(4, 3, 5) for _ in range(3)], randn(3), randn(3)

    def results(hidden):
        x, residual, g = (torch.where(mask[:, None], v, hidden) for v in values)
        tensors = _leaves(x, weight, bias, residual)
        y = batch_norm(
            tensors[0], *_statistics(3), *tensors[1:3], training,
            residual=tensors[3], mask=mask, activation="leaky_relu",
        )  # fmt: skip
        return [y, *_gradients(y, g, tensors)]

    for a, b in zip(results(bad), results(0.0), strict=True):
        assert torch.equal(a, b)


@modes
def test_mask_leaves_zeros_where_it_hides(randn, training):
    mask = _lengths(4, 5)
    bias = torch.ones(3)
    y = batch_norm(randn(4, 3, 5), *_statistics(3), None, bias, training, mask=mask)
    assert torch.equal(y != 0, mask[:, None].expand(4, 3, 5))


def test_mask_gives_the_statistics_of_the_values_it_shows(randn):
    x, mask = randn(4, 3, 5), _lengths(4, 5)
    ours, packed = _statistics(3), _statistics(3)
    batch_norm(x, *ours, training=True, mask=mask)
    batch_norm(x.movedim(1, -1)[mask], *packed, training=True)
    for a, b in zip(ours, packed, strict=True):
        # Sums of 14 terms in float64 in two orders, then two roundings to float32.
        torch.testing.assert_close(a, b, rtol=2.0**-22, atol=2.0**-24)


@modes
def test_mask_of_zeros_gives_zeros(randn, training):
    x, weight, bias = _leaves(randn(4, 3, 5), randn(3), randn(3))
    mask = torch.zeros(4, 5, dtype=torch.bool)
    y = batch_norm(x, *_statistics(3), weight, bias, training, mask=mask)
    y.sum().backward()
    for t in (y, x.grad, weight.grad, bias.grad):
        assert not t.any()


def test_mask_of_zeros_leaves_running_statistics_alone(randn):
    buffers = _statistics(3)
    batch_norm(randn(4, 3, 5), *buffers, training=True, mask=torch.zeros(4, 5))
    assert torch.equal(torch.stack(buffers), torch.stack(_statistics(3)))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
@modes
def test_mask_of_ones_changes_nothing(randn, dtype, training):
    x = randn(4, 3, 5)
    y = batch_norm(x, *_statistics(3), training=training, mask=torch.ones(4, 5, dtype=dtype))
    expected = batch_norm(x, *_statistics(3), training=training)
    # Two results that keep promise 2.
    torch.testing.assert_close(y, expected, rtol=2 * OUTPUT, atol=2 * OUTPUT)


@pytest.mark.parametrize(
    "shape",
    [(4, 5, 6), (4, 1, 5, 6), (5, 6), (4, 1, 6), (4, 1, 1, 1), (6,), (1, 5, 1), ()],
    ids=str,
)
def test_mask_broadcasts(shape):
    x = torch.arange(360.0).sin().view(4, 3, 5, 6)
    mask = (torch.arange(math.prod(shape)) % 3 + 1).double().view(shape)
    full = mask.squeeze(1) if mask.dim() == 4 else mask
    y = batch_norm(x, None, None, training=True, mask=mask)
    assert torch.equal(y, batch_norm(x, None, None, training=True, mask=full.expand(4, 5, 6)))


@pytest.mark.parametrize("shape", [(6,), (6, 1), ()], ids=str)
def test_mask_of_examples_broadcasts_when_input_has_two_axes(randn, shape):
    x, mask = randn(6, 3), torch.ones(6)
    mask[2] = 0 if shape else 1
    y = batch_norm(x, None, None, training=True, mask=mask.view(shape) if shape else mask[0])
    assert torch.equal(y, batch_norm(x, None, None, training=True, mask=mask))


@modes
@pytest.mark.parametrize("shape", [(4, 3, 5), (5, 4), (4,), (3, 1, 5), (1, 1, 4, 5)], ids=str)
def test_mask_of_a_wrong_shape_is_refused(randn, shape, training):
    with pytest.raises(ShapeError, match=r"mask must broadcast to .* \(4, 5\), got \("):
        batch_norm(randn(4, 3, 5), *_statistics(3), training=training, mask=torch.ones(shape) > 0)


@modes
@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_mask_that_is_no_weight_is_refused(randn, bad, training):
    mask = torch.ones(4, 5)
    mask[1, 2] = bad
    with pytest.raises(ArgumentError, match="mask must be finite and not negative"):
        batch_norm(randn(4, 3, 5), *_statistics(3), training=training, mask=mask)


def test_mask_that_is_complex_is_refused(randn):
    mask = torch.ones(4, 5, dtype=torch.complex64)
    with pytest.raises(ArgumentError, match=r"mask must be real.*complex64"):
        batch_norm(randn(4, 3, 5), None, None, training=True, mask=mask)


def test_mask_that_requires_grad_is_refused(randn):
    mask = torch.ones(4, 5, requires_grad=True)
    with pytest.raises(ArgumentError, match=r"mask is not differentiated; pass mask.detach\(\)"):
        batch_norm(randn(4, 3, 5), None, None, training=True, mask=mask)


def test_mask_that_shows_one_value_is_refused_in_training(randn):
    mask = torch.zeros(4, 5)
    mask[1, 2] = 2.0
    with pytest.raises(ShapeError, match="Expected more than 1 value per channel when training"):
        batch_norm(randn(4, 3, 5), None, None, training=True, mask=mask)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.float64], ids=str)
def test_mask_may_be_changed_before_backward(randn, dtype):
    mask = _lengths(4, 5).to(dtype)

    def gradient(change):
        x, m = torch.arange(60.0).sin().view(4, 3, 5).requires_grad_(), mask.clone()
        y = batch_norm(x, None, None, training=True, mask=m)
        if change:
            m.fill_(1)
        return torch.autograd.grad(y, x, torch.arange(60.0).cos().view(4, 3, 5))[0]

    assert torch.equal(gradient(True), gradient(False))


# ---- activations --------------------------------------------------------------------------------


@modes
@dtypes
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_equals_the_definition(randn, dtype, training, activation):
    x, g = randn(5, 3, 4, dtype=dtype), randn(5, 3, 4, dtype=dtype)
    _assert_equals_the_definition(x, g, randn(3), randn(3), training, activation=activation)


@pytest.mark.parametrize("slope", [0.0, 0.3, -0.5, 2.0])
def test_leaky_relu_takes_any_slope(randn, slope):
    x, g = randn(5, 3, 4), randn(5, 3, 4)
    exact = {"activation": "leaky_relu", "slope": slope}
    _assert_equals_the_definition(
        x, g, randn(3), randn(3), True, exact, activation="leaky_relu", negative_slope=slope
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_derivative_at_zero_is_torchs(activation):
    # A constant channel is its bias exactly: zero.
    bias = torch.zeros(1, requires_grad=True)
    y = batch_norm(torch.ones(4, 1), None, None, None, bias, True, activation=activation)
    y.sum().backward()
    z = torch.zeros(4, requires_grad=True)
    getattr(F, activation)(z).sum().backward()
    torch.testing.assert_close(bias.grad, z.grad.sum()[None], rtol=2.0**-23, atol=0)


def test_relu_lets_nan_through(randn):
    x = randn(4, 3)
    x[0, 1] = float("nan")
    assert bool(batch_norm(x, None, None, training=True, activation="relu")[:, 1].isnan().all())


@pytest.mark.parametrize("activation", ["ReLU", "gelu", 1, ""])
def test_activation_that_is_unknown_is_refused(randn, activation):
    with pytest.raises(ArgumentError, match="activation must be None or one of 'relu'"):
        batch_norm(randn(4, 3), None, None, training=True, activation=activation)


# ---- groups -------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize(
    ("group_size", "groups"),
    [
        (4, [(0, 4), (4, 8)]),
        (3, [(0, 3), (3, 6), (6, 8)]),
        (5, [(0, 5), (5, 8)]),
        (8, [(0, 8)]),
        (7, [(0, 8)]),  # one value per channel would be left over: it joins the last group
        (100, [(0, 8)]),
    ],
)
def test_group_size_splits_the_examples(randn, dtype, group_size, groups):
    x, g = randn(8, 3, dtype=dtype), randn(8, 3, dtype=dtype)
    exact = {"groups": groups}
    _assert_equals_the_definition(x, g, randn(3), randn(3), True, exact, group_size=group_size)


def test_group_size_keeps_a_tail_of_one_example_when_it_has_several_pixels(randn):
    x, g = randn(5, 3, 4), randn(5, 3, 4)
    exact = {"groups": [(0, 2), (2, 4), (4, 5)]}
    _assert_equals_the_definition(x, g, randn(3), randn(3), True, exact, group_size=2)


def test_group_size_of_one_is_taken_when_examples_have_several_pixels(randn):
    x, g = randn(3, 2, 4), randn(3, 2, 4)
    exact = {"groups": [(0, 1), (1, 2), (2, 3)]}
    _assert_equals_the_definition(x, g, None, None, True, exact, group_size=1)


def test_group_size_with_residual_mask_and_activation_equals_the_definition(randn):
    x, g, residual = randn(7, 3, 4), randn(7, 3, 4), randn(7, 3, 4)
    mask = (torch.arange(28) % 3).view(7, 4)
    arguments = {"residual": residual, "mask": mask, "activation": "relu"}
    exact = {**arguments, "groups": [(0, 3), (3, 6), (6, 7)]}
    _assert_equals_the_definition(x, g, randn(3), randn(3), True, exact, group_size=3, **arguments)


@formats
def test_group_size_equals_the_definition_in_either_memory_format(randn, memory_format):
    x = randn(6, 3, 4, 2).contiguous(memory_format=memory_format)
    exact = {"groups": [(0, 4), (4, 6)]}
    _assert_equals_the_definition(
        x, randn(6, 3, 4, 2), randn(3), randn(3), True, exact, group_size=4
    )


def test_group_size_is_ignored_in_evaluation(randn):
    x = randn(8, 3)
    assert torch.equal(batch_norm(x, *_statistics(3), group_size=3), batch_norm(x, *_statistics(3)))


def test_group_size_leaves_the_running_statistics_those_of_the_batch(randn):
    x = randn(8, 3)
    ours, whole = (_statistics(3, torch.float64) for _ in range(2))
    batch_norm(x, *ours, training=True, group_size=3)
    batch_norm(x, *whole, training=True)
    for a, b in zip(ours, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=FLOAT64)


def test_group_size_that_leaves_one_value_per_group_is_refused(randn):
    with pytest.raises(ShapeError, match=r"Expected more than 1 value per channel.*groups of 1"):
        batch_norm(randn(8, 3), None, None, training=True, group_size=1)


@pytest.mark.parametrize("group_size", [0, -2, 1.5])
def test_group_size_that_is_no_count_is_refused(randn, group_size):
    with pytest.raises(ArgumentError, match="group_size must be a positive integer or None, got"):
        batch_norm(randn(8, 3), None, None, training=True, group_size=group_size)


# ---- threads ------------------------------------------------------------------------------------


def _everything(x, **arguments):
    """y, gradients and running statistics, in training and in evaluation."""
    c = x.shape[1]
    g = x.detach().flip(0)
    results = []
    for training in (True, False):
        buffers = _statistics(c)
        tensors = _leaves(x, torch.linspace(-1, 2, c), torch.linspace(0, 1, c))
        y = batch_norm(tensors[0], *buffers, *tensors[1:], training, **arguments)
        results += [y.detach(), *_gradients(y, g, tensors), *buffers]
    return results


THREADED = {
    "images": (16, 64, 20, 20),
    "features": (2000, 64),
    "few channels": (3, 2, 40_000),
    "many channels": (4, 3000, 3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", THREADED)
def test_batch_norm_is_bitwise_the_same_on_any_number_of_threads(randn, threads, case, dtype):
    x = randn(*THREADED[case], dtype=dtype) + 3
    results = []
    for number in (1, 2, 3):
        threads(number)
        results.append(_everything(x))
    for one, two, three in zip(*results, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


@pytest.mark.parametrize("arguments", ["channels_last", "masked", "grouped"])
def test_batch_norm_variants_are_bitwise_the_same_on_any_number_of_threads(
    randn, threads, arguments
):
    x = randn(16, 64, 20, 20) + 3
    if arguments == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    extra = {
        "channels_last": {},
        "masked": {"mask": (torch.arange(16 * 400) % 3).view(16, 20, 20), "residual": x * 2},
        "grouped": {"group_size": 5, "activation": "relu"},
    }[arguments]
    results = []
    for number in (1, 2):
        threads(number)
        results.append(_everything(x, **extra))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


# ---- what is refused ----------------------------------------------------------------------------


def _refused(c=3):
    x = torch.arange(24.0).sin().view(4, 3, 2)
    good = torch.ones(3)
    mean, var = torch.zeros(3), torch.ones(3)
    return {
        "one axis": (x[0, 0], None, None, None, None, True),
        "no axis": (x[0, 0, 0], None, None, None, None, True),
        "one value": (x[:1, :, 0], mean, var, good, good, True),
        "one value of an image": (x[:1, :, :1, None], mean, var, good, good, True),
        "eps of zero in training": (x, mean, var, good, good, True, 0.1, 0.0),
        "negative eps in training": (x, mean, var, good, good, True, 0.1, -1e-5),
        "negative eps in evaluation": (x, mean, var, good, good, False, 0.1, -1e-5),
        "no statistics in evaluation": (x, None, None, good, good, False),
        "no mean in evaluation": (x, None, var, good, good, False),
        "no variance in evaluation": (x, mean, None, good, good, False),
        "no mean in training": (x, None, var, good, good, True),
        "no variance in training": (x, mean, None, good, good, True),
        "mean of wrong size": (x, torch.zeros(5), var, good, good, True),
        "variance of wrong size": (x, mean, torch.ones(5), good, good, True),
        "mean of wrong size in evaluation": (x, torch.zeros(5), var, good, good, False),
        "variance of wrong size in evaluation": (x, mean, torch.ones(5), good, good, False),
        "weight of wrong size": (x, mean, var, torch.ones(5), good, True),
        "bias of wrong size": (x, mean, var, good, torch.ones(5), True),
        "weight of wrong size in evaluation": (x, mean, var, torch.ones(5), good, False),
        "bias of wrong size in evaluation": (x, mean, var, good, torch.ones(5), False),
        "mean of two axes": (x, torch.zeros(3, 1), var, good, good, True),
        "integers": (x.long(), None, None, None, None, True),
        "integers in evaluation": (x.long(), mean, var, None, None, False),
        "booleans": (x > 0, None, None, None, None, True),
        "complex numbers": (x.to(torch.complex64), None, None, None, None, True),
        "weight of integers": (x, mean, var, good.long(), good, True),
        "statistics of integers": (x, mean.long(), var.long(), good, good, True),
        "weight on another device": (x, mean, var, good.to("meta"), good, True),
    }


refused = pytest.mark.parametrize("case", _refused())


@refused
def test_batch_norm_raises_what_torch_raises(case):
    arguments = _refused()[case]
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        F.batch_norm(*arguments)
    with pytest.raises(type(theirs.value)) as ours:
        batch_norm(*arguments)
    assert type(ours.value) is type(theirs.value)
    assert str(ours.value) == str(theirs.value)


@refused
def test_batch_norm_changes_nothing_when_it_raises(case):
    arguments = _refused()[case]
    tensors = [t for t in arguments if isinstance(t, torch.Tensor) and t.device.type == "cpu"]
    before = [(t.clone(), t._version) for t in tensors]
    with pytest.raises(Exception):  # noqa: B017, PT011
        batch_norm(*arguments)
    for t, (values, version) in zip(tensors, before, strict=True):
        assert torch.equal(t, values)
        assert t._version == version


@pytest.mark.parametrize(
    "extra",
    [
        {"activation": "gelu"},
        {"group_size": 0},
        {"mask": torch.ones(9, 9)},
        {"mask": -torch.ones(4, 2)},
        {"residual": torch.ones(5, 7, 7)},
        {"momentum": "a tenth"},
    ],
    ids=lambda extra: next(iter(extra)),
)
def test_batch_norm_changes_nothing_when_it_refuses_an_argument_that_torch_lacks(randn, extra):
    mean, var = _statistics(3)
    with pytest.raises((ValueError, TypeError)):
        batch_norm(randn(4, 3, 2), mean, var, training=True, **extra)
    assert torch.equal(torch.stack((mean, var)), torch.stack(_statistics(3)))


@pytest.mark.parametrize("which", ["running_mean", "running_var"])
@modes
def test_batch_norm_refuses_running_statistics_that_require_grad(randn, which, training):
    mean, var = _statistics(3)
    {"running_mean": mean, "running_var": var}[which].requires_grad_()
    with pytest.raises(RuntimeError, match=f"not differentiable with respect to .*{which}"):
        batch_norm(randn(4, 3), mean, var, training=training)


def test_batch_norm_refuses_a_negative_running_variance_by_its_channel(randn):
    var = torch.tensor([1.0, 2.0, -0.5])
    with pytest.raises(ArgumentError, match=r"running_var must not be negative, got -0.5 in .* 2"):
        batch_norm(randn(4, 3), torch.zeros(3), var)


def test_batch_norm_with_eps_of_zero_is_taken_in_evaluation(randn):
    x = randn(4, 3)
    y = batch_norm(x, torch.zeros(3), torch.full((3,), 4.0), eps=0.0)
    assert torch.equal(y, x / 2)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("which", ["input", "running_mean", "running_var", "weight", "bias"])
def test_batch_norm_refuses_a_tensor_whose_storage_was_freed(randn, which, training):
    tensors = {"input": randn(5, 3), "weight": torch.ones(3), "bias": torch.zeros(3)}
    tensors |= {"running_mean": torch.zeros(3), "running_var": torch.ones(3)}
    tensors[which].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="must have memory for its values"):
        batch_norm(**tensors, training=training)
    for name in {"running_mean", "running_var"} - {which}:
        assert (tensors[name] == float(name == "running_var")).all()


def test_batch_norm_refuses_a_part_of_a_tensor_whose_storage_was_freed(randn):
    x = randn(640, 30)[1:]
    x.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="must have memory for its values"):
        batch_norm(x, None, None, training=True)


def test_gradients_refuse_an_input_whose_storage_was_freed(randn):
    x = randn(5, 3).requires_grad_()
    y = batch_norm(x, None, None, training=True)
    x.data.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="must have memory for its values"):
        y.sum().backward()


# ---- outputs are tensors like any other ----------------------------------------------------------

LARGE = (64, 8, 48, 48)  # 4.5 MiB of float32, for which the system is told what to expect


def _in_place(name, y):
    if name == "add":
        y += 1
    elif name == "relu":
        y.relu_()
    elif name == "multiply":
        y *= 3
    elif name == "zero a part":
        y[:, 2:4] = 0
    elif name == "mask":
        y.masked_fill_(torch.arange(y.shape[-1]) > 7, 2.0)
    return y


@pytest.mark.parametrize("shape", [(4, 8, 2, 2), LARGE], ids=["small", "large"])
@pytest.mark.parametrize("name", ["add", "relu", "multiply", "zero a part", "mask"])
@modes
def test_batch_norm_y_may_be_changed_in_place(randn, shape, name, training):
    if name == "mask" and shape != LARGE:
        shape = (4, 8, 2, 16)
    tensors = _leaves(randn(*shape), randn(8), randn(8))
    g = randn(*shape)

    def gradients(clone):
        y = batch_norm(tensors[0], *_statistics(8), *tensors[1:], training, activation="leaky_relu")
        y = _in_place(name, y.clone() if clone else y)
        return [y.detach(), *torch.autograd.grad(y, tensors, g)]

    for a, b in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(a, b)


def test_batch_norm_y_is_no_view(randn):
    y = batch_norm(randn(*LARGE).requires_grad_(), None, None, training=True)
    assert not y._is_view()


def test_batch_norm_y_stays_when_later_calls_take_memory(randn):
    x = randn(*LARGE)
    y = batch_norm(x, None, None, training=True)
    before = y.clone()
    for _ in range(4):
        batch_norm(-x, None, None, training=True)
    assert torch.equal(y, before)


def test_batch_norm_y_stays_when_only_a_view_of_it_is_left(randn):
    x = randn(*LARGE)
    part = batch_norm(x, None, None, training=True)[3]
    before = part.clone()
    for _ in range(4):
        batch_norm(-x, None, None, training=True)
    assert torch.equal(part, before)


def test_batch_norm_y_can_be_saved_and_copied(randn):
    y = batch_norm(randn(*LARGE), None, None, training=True)
    stream = io.BytesIO()
    torch.save(y, stream)
    stream.seek(0)
    assert torch.equal(torch.load(stream), y)
    assert torch.equal(copy.deepcopy(y), y)


def test_batch_norm_y_can_be_seen_as_an_array(randn):
    y = batch_norm(randn(*LARGE), None, None, training=True)
    y.numpy()[0] = 5.0
    assert bool((y[0] == 5.0).all())


# ---- memory formats, odd shapes, and what torch's own samples hold -------------------------------


def _in_any_order(values, order):
    """`values`, laid out so that the axes lie in memory as `order` says."""
    inverse = [order.index(a) for a in range(len(order))]
    return values.permute(order).contiguous().permute(inverse)


STRIDES = {
    "2 axes, transposed": lambda v: v[:, :, 0, 0].t().contiguous().t(),
    "2 axes, sliced": lambda v: v[:, :, 0, 0].repeat(1, 2)[:, ::2],
    "3 axes, transposed": lambda v: _in_any_order(v[..., 0], (0, 2, 1)),
    "channels_last, sliced": lambda v: v.repeat(1, 1, 1, 2).to(memory_format=torch.channels_last)[
        ..., ::2
    ],
    **{str(order): lambda v, o=order: _in_any_order(v, o) for order in permutations(range(4))},
    # Axes of length one, of which a stride says nothing.
    "transposed, with an axis more": lambda v: v[..., 0].transpose(1, 2).contiguous()
    .transpose(1, 2).unsqueeze(-1),
    "channels_last of width 1": lambda v: v[..., :1].to(memory_format=torch.channels_last),
    "channels_last of height 1": lambda v: v[:, :, :1].to(memory_format=torch.channels_last),
    "turned": lambda v: v[:, :, :1].to(memory_format=torch.channels_last).transpose(2, 3),
    **{
        f"{order} of width 1": lambda v, o=order: _in_any_order(v[..., :1], o)
        for order in permutations(range(4))
    },
    **{
        f"{order} of one example": lambda v, o=order: _in_any_order(v[:1], o)
        for order in permutations(range(4))
    },
    **{
        f"{order}, 5 axes": lambda v, o=order: _in_any_order(v[:, :, None].repeat(1, 1, 2, 1, 1), o)
        for order in permutations(range(5))
    },
}  # fmt: skip


@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("training", [True, False])
def test_output_and_gradient_have_torchs_memory_format(randn, strides, training):
    x = STRIDES[strides](randn(4, 3, 5, 6))
    found = []
    for function in (batch_norm, F.batch_norm):
        leaf = x.detach().requires_grad_()
        y = function(leaf, torch.zeros(3), torch.ones(3), training=training)
        found.append((y.stride(), torch.autograd.grad(y.sum(), leaf)[0].stride()))
    assert found[0] == found[1]


@modes
@pytest.mark.parametrize("shape", [(2560, 129), (256, 512, 1, 1)], ids=str)
def test_rows_that_repeat_one_are_normalized(randn, shape, training):
    # More than 256 KiB, from which on rows are prefetched.
    x = randn(1, *shape[1:]).expand(shape).detach().requires_grad_()
    y = batch_norm(x, *_statistics(shape[1]), training=training)
    expected = batch_norm(x.contiguous(), *_statistics(shape[1]), training=training)
    assert torch.equal(y, expected)
    g = randn(*shape)
    grads = [torch.autograd.grad(one, x, g)[0] for one in (y, expected)]
    assert torch.equal(*grads)


def test_output_of_large_arrays_has_torchs_memory_format(randn):
    x = randn(64, 3, 80, 81).permute(0, 1, 3, 2)  # above 4 MiB
    assert batch_norm(x, None, None, training=True).is_contiguous()


def test_transposed_input_gives_output_that_can_be_viewed(randn):
    z = randn(4, 6, 3)
    assert batch_norm(z.transpose(1, 2), None, None, training=True).view(4, -1).shape == (4, 18)


@pytest.mark.parametrize("training", [True, False])
def test_empty_input_of_one_axis_gives_empty_output(training):
    empty = torch.empty(0)
    assert batch_norm(empty, empty, empty.clone(), training=training).shape == (0,)


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("shape", [(3, 1), (1, 3), (3, 1, 1)])
@pytest.mark.parametrize("layout", [torch.clone, lambda x: x.permute(0, 1, 3, 2)])
def test_parameters_of_odd_shapes_are_refused_by_name(randn, name, shape, layout):
    x = layout(randn(4, 3, 5, 5))
    with pytest.raises(ShapeError, match=rf"{name} must have shape \(3,\), got \({shape[0]}, "):
        batch_norm(x, None, None, training=True, **{name: torch.ones(shape)})


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(3, 1), (3, 2), (5,), ()])
def test_no_internal_assertion_of_torchs_reaches_the_caller(randn, training, shape):
    x = randn(4, 5, 5, 3).permute(0, 3, 2, 1)
    with pytest.raises(Exception, match="running_mean|TensorAccessor|must have") as raised:
        batch_norm(x, torch.ones(shape), torch.ones(3), training=training)
    assert "INTERNAL ASSERT" not in str(raised.value)


# ---- what is no tensor, and masks under transforms -----------------------------------------------


@pytest.mark.parametrize("name", ["input", "running_mean", "weight", "bias", "residual", "mask"])
@pytest.mark.parametrize("bad", [1.0, "a", [1.0]], ids=str)
def test_what_is_no_tensor_is_refused_by_name(randn, name, bad):
    arguments = {"input": randn(4, 3), "running_mean": None, "running_var": None, name: bad}
    with pytest.raises(TypeError, match=f"{name} must be a tensor, got {type(bad).__name__}"):
        batch_norm(**arguments, training=True)


def test_residual_on_another_device_is_refused(randn):
    with pytest.raises(ArgumentError, match="residual must be on the device of input, cpu"):
        batch_norm(randn(4, 3), None, None, training=True, residual=torch.ones(4, 3, device="meta"))


@pytest.mark.parametrize("group_size", ["a", 2.0, float("nan"), [2], 10**30, 0])
def test_group_size_that_is_no_positive_integer_is_refused(randn, group_size):
    with pytest.raises(ArgumentError, match="group_size must be a positive integer"):
        batch_norm(randn(4, 3), None, None, training=True, group_size=group_size)


@pytest.mark.parametrize("transform", [torch.func.grad, lambda f: lambda x: torch.func.vjp(f, x)])
@pytest.mark.parametrize("mask", [-torch.ones(4), torch.full((4,), float("nan"))])
def test_transforms_refuse_masks_that_are_no_weights(randn, transform, mask):
    def f(x):
        return batch_norm(x, None, None, training=True, mask=mask).sum()

    with pytest.raises(ArgumentError, match="mask must be finite and not negative"):
        transform(f)(randn(4, 3))


def test_transforms_refuse_what_torch_refuses_in_its_words(randn):
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        torch.func.vjp(
            lambda x: batch_norm(x, torch.zeros(3), torch.ones(3), training=True), randn(1, 3)
        )


def test_residual_before_a_negative_slope_has_its_gradient(randn):
    # y has not the sign of z then.
    x, residual, g = randn(5, 3, 4), randn(5, 3, 4), randn(5, 3, 4)
    exact = {"activation": "leaky_relu", "slope": -0.5, "residual": residual}
    _assert_equals_the_definition(
        x, g, randn(3), randn(3), True, exact, residual=residual, activation="leaky_relu",
        negative_slope=-0.5,
    )  # fmt: skip


# ---- what the short way must leave to the long one -----------------------------------------------


@pytest.mark.parametrize("which", range(5))
def test_batch_norm_reads_the_negative_of_complex_parts(randn, which):
    arguments = [randn(6, 3), randn(3), randn(3).square(), randn(3), randn(3)]
    plain = batch_norm(*arguments)
    negative = torch.imag(torch.complex(randn(*arguments[which].shape), -arguments[which]).conj())
    assert negative.is_neg()
    arguments[which] = negative
    torch.testing.assert_close(batch_norm(*arguments), plain)


def test_batch_norm_second_derivative_after_a_plain_call(randn):
    x, weight = randn(5, 3).double().requires_grad_(), randn(3).double().requires_grad_()
    y = batch_norm(x, None, None, weight, None, True)
    assert y.grad_fn.name() == "PlainFunctionBackward"
    assert torch.autograd.gradgradcheck(
        lambda *t: batch_norm(t[0], None, None, t[1], None, True), (x, weight)
    )


def test_batch_norm_reads_the_negative_of_a_single_weight(randn):
    x, weight = randn(6, 1), torch.imag(torch.complex(randn(1), randn(1)).conj())
    y = batch_norm(x, None, None, weight, training=True)
    torch.testing.assert_close(y, batch_norm(x, None, None, weight.resolve_neg(), training=True))


@pytest.mark.parametrize("eps", [None, "a"])
def test_batch_norm_says_what_is_wrong_with_eps(randn, eps):
    with pytest.raises(TypeError, match="not supported between"):
        batch_norm(randn(6, 3), None, None, training=True, eps=eps)
