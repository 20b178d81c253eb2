"""Fixtures of the core's tests: every instruction set, every layout, one seed."""

import contextlib
import signal

import numpy as np
import pytest
from hypothesis import settings

from batchnorm import _core

settings.register_profile("core", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("core")

# What a shell starts in the background ignores interrupts, and Python leaves it at that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(params=_core.instruction_sets())
def instruction_set(request):
    """Each instruction set that this machine runs, in use during the test."""
    before = _core.instruction_set()
    _core.use_instruction_set(request.param)
    yield request.param
    _core.use_instruction_set(before)


@pytest.fixture
def rng():
    return np.random.default_rng(20150211)


@pytest.fixture
def bars(monkeypatch):
    """What progress bars showed: of each, its texts."""
    found = []

    @contextlib.contextmanager
    def bar(*, shown=True, in_bytes=False, remaining=True):
        texts = []
        if shown:
            found.append(texts)
        yield lambda text, done, total: texts.append(text)

    monkeypatch.setattr("batchnorm.progress.bar", bar)
    return found


@pytest.fixture(scope="module")
def one_thread():
    """PyTorch on one thread: for tensors this small, threads cost more than they do."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Central differences on functions of third derivative below about 1e3 and values below about 10 are
# right to h²·1e3/6 + 10·u/h ≈ 2e-8; tests allow 1e-6.
H = 1e-5


def _differences(f, x):
    grad = np.empty_like(x)
    for at in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[at] += H
        down[at] -= H
        grad[at] = (f(up) - f(down)) / (2 * H)
    return grad


@pytest.fixture
def differences():
    """differences(f, x): the gradient of a scalar function, by central differences."""
    return _differences


# ---- layouts: how (N, C, H, W) values may lie in memory -----------------------------------------


def _nchw(v):
    return np.ascontiguousarray(v)


def _nhwc(v):
    return np.ascontiguousarray(np.moveaxis(v, 1, -1))


def _channels_first(v):
    return np.ascontiguousarray(np.moveaxis(v, 1, 0))


def _channels_last_memory(v):
    return np.moveaxis(_nhwc(v), -1, 1)


def _middle(v):  # (N, H, C, W)
    return np.ascontiguousarray(v.transpose(0, 2, 1, 3))


def _filler(v, shape):
    """Memory in which a layout leaves gaps; what lies there must not be read."""
    a = np.empty(shape, v.dtype)
    a.fill(np.nan)
    return a


def _sliced_last(v):
    n, c, h, w = v.shape
    a = _filler(v, (n, c, h, 2 * w))[..., ::2]
    a[...] = v
    return a


def _sliced_borders(v):
    n, c, h, w = v.shape
    a = _filler(v, (2 * n, c + 1, h, w + 3))[::2, 1:, :, 2:-1]
    a[...] = v
    return a


def _sliced_channels(v):
    n, c, h, w = v.shape
    a = _filler(v, (n, h, w, 2 * c))[..., ::2]
    a[...] = np.moveaxis(v, 1, -1)
    return a


def _sliced_grid(v):  # no (outer, channels, inner) view exists
    n, c, h, w = v.shape
    a = _filler(v, (n, c, 2 * h, 2 * w))[:, :, ::2, ::2]
    a[...] = v
    return a


def _reversed(v):
    return np.ascontiguousarray(v[::-1, ::-1, ::-1, ::-1])[::-1, ::-1, ::-1, ::-1]


def _matrix(v):  # (N·H·W, C)
    return _nhwc(v).reshape(-1, v.shape[1])


def _matrix_transposed(v):  # the same, values of a channel side by side
    return np.asfortranarray(_matrix(v))


class Layout:
    """`put` the values (N, C, H, W) into memory, and see results as (N, C, H, W) by `get`."""

    def __init__(self, name, put, channel_axis, get):
        self.name, self.put, self.channel_axis, self._get = name, put, channel_axis, get

    def get(self, y, shape):
        return self._get(y, shape)


def _to_second(axis):
    return lambda y, shape: np.moveaxis(y, axis, 1)


def _from_matrix(y, shape):
    n, c, h, w = shape
    return np.moveaxis(y.reshape(n, h, w, c), -1, 1)


_LAYOUTS = [
    Layout("nchw", _nchw, 1, _to_second(1)),
    Layout("nhwc", _nhwc, -1, _to_second(-1)),
    Layout("cnhw", _channels_first, 0, _to_second(0)),
    Layout("nhcw", _middle, 2, lambda y, shape: y.transpose(0, 2, 1, 3)),
    Layout("channels_last_memory", _channels_last_memory, 1, _to_second(1)),
    Layout("fortran", np.asfortranarray, 1, _to_second(1)),
    Layout("sliced_last", _sliced_last, 1, _to_second(1)),
    Layout("sliced_borders", _sliced_borders, 1, _to_second(1)),
    Layout("sliced_channels", _sliced_channels, -1, _to_second(-1)),
    Layout("sliced_grid", _sliced_grid, 1, _to_second(1)),
    Layout("reversed", _reversed, 1, _to_second(1)),
    Layout("matrix", _matrix, 1, _from_matrix),
    Layout("matrix_transposed", _matrix_transposed, 1, _from_matrix),
]


@pytest.fixture(params=_LAYOUTS, ids=lambda layout: layout.name)
def layout(request):
    return request.param


# ---- types --------------------------------------------------------------------------------------


def _dtype(name):
    if name == "bfloat16":
        return np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
    return np.dtype(name)


@pytest.fixture(params=["float32", "float64", "float16", "bfloat16"])
def dtype(request):
    return _dtype(request.param)


@pytest.fixture(params=["float16", "bfloat16"])
def half_dtype(request):
    return _dtype(request.param)
