"""The two back ends of `contract`, one after the other, against float64 NumPy."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from batchnorm import Moments  # noqa: E402
from batchnorm.torch import native, portable  # noqa: E402
from batchnorm.torch.contract import (  # noqa: E402
    ACTIVATIONS,
    COUNT,
    DOF,
    LOW,
    M2,
    MEAN,
    Config,
    groups_of,
    saved_y,
)

backends = pytest.mark.parametrize("backend", [native, portable], ids=["native", "portable"])
masks = pytest.mark.parametrize("mask", [None, "booleans", "weights"])
groups = pytest.mark.parametrize("group_size", [0, 3])
activations = pytest.mark.parametrize("activation", list(ACTIVATIONS))
CURVED = ("hardswish", "silu")  # not after a residual

EPS, SLOPE, N, C, S = 1e-3, 0.25, 8, 3, (4, 5)
# The last step of the kernels runs in float32, with values of order one (docs/numerics.md).
OUTPUT = {"rtol": 2e-6, "atol": 2e-6}
# Σ of n = 160 float32 products of order one: n · 2^-24.
GRADIENT = {"rtol": 2e-5, "atol": 2e-5}
STATISTICS = {"rtol": 1e-12, "atol": 1e-12}


def _sigmoid(z):
    return 1 / (1 + np.exp(-z))


FLOAT64 = {  # each activation and its derivative
    None: (lambda z: z, np.ones_like),
    "relu": (lambda z: np.maximum(z, 0), lambda z: z > 0),
    "leaky_relu": (lambda z: np.where(z > 0, z, SLOPE * z), lambda z: np.where(z > 0, 1, SLOPE)),
    "relu6": (lambda z: np.clip(z, 0, 6), lambda z: (z > 0) & (z < 6)),
    "hardswish": (
        lambda z: z * np.clip(z + 3, 0, 6) / 6,
        lambda z: np.where(z < -3, 0, np.where(z < 3, z / 3 + 0.5, 1)),
    ),
    "silu": (lambda z: z * _sigmoid(z), lambda z: _sigmoid(z) * (1 + z * (1 - _sigmoid(z)))),
}


class Case:
    """Tensors of one call, and what float64 makes of them."""

    def __init__(self, mask=None, group_size=0, activation=None):
        g = torch.Generator().manual_seed(7)

        def randn(*shape, **kw):
            return torch.randn(*shape, generator=g, **kw)

        self.x = 3 * randn(N, C, *S) + 5
        self.grad_y = randn(N, C, *S)
        self.weight, self.bias = randn(C) + 1, randn(C)
        self.residual = None if activation in CURVED else randn(N, C, *S)
        drawn = randn(N, *S, dtype=torch.float64)
        self.mask = {
            None: None, "booleans": (drawn > -0.5).double(), "weights": drawn.relu()
        }[mask]  # fmt: skip
        self.config = Config(EPS, group_size, ACTIVATIONS[activation], SLOPE)
        self.activate, self.slope_at = FLOAT64[activation]
        self.number = groups_of(self.x, group_size)

    @property
    def parts(self):
        size = self.config.group_size
        ends = [(k + 1) * size for k in range(self.number - 1)] + [N]
        return [slice(k * size, end) for k, end in enumerate(ends)]

    def moments(self, part):
        w = None if self.mask is None else self.mask[part].numpy()
        return Moments.of(self.x[part].double().numpy(), weights=w)

    def of_float64(self, given=None):
        """y, and gradients with respect to x, weight, bias and residual; all as NumPy arrays."""
        ys, dxs, drs, dw, db = [], [], [], 0, 0
        for part in self.parts:
            m = given or self.moments(part)
            x, g = (t[part].double().numpy() for t in (self.x, self.grad_y))
            w = np.ones((len(x), 1, *S))
            if self.mask is not None:
                w = self.mask[part].numpy()[:, None]
            column = (slice(None), None, None)
            inv_std = 1 / np.sqrt(m.var() + EPS)[column]
            gamma, beta = (t.double().numpy()[column] for t in (self.weight, self.bias))
            x_hat = (x - m.mean[column]) * inv_std
            z = gamma * x_hat + beta
            if self.residual is not None:
                z = z + self.residual[part].double().numpy()
            seen = w > 0
            ys.append(seen * self.activate(z))
            gz = seen * g * self.slope_at(z)
            sums = [v.sum((0, 2, 3))[column] for v in (gz, gz * x_hat)]
            share = 0 if given else w / m.count
            dxs.append(seen * gamma * inv_std * (gz - share * (sums[0] + x_hat * sums[1])))
            drs.append(gz)
            db, dw = db + sums[0].ravel(), dw + sums[1].ravel()
        return np.concatenate(ys), np.concatenate(dxs), dw, db, np.concatenate(drs)


def _array(statistics):
    return np.asarray(statistics)


@backends
@masks
def test_moments_are_those_of_moments(backend, mask):
    case = Case(mask)
    found = _array(backend.moments(case.x, case.mask))[0]
    right = case.moments(slice(None))
    np.testing.assert_allclose(found[COUNT], right.count, **STATISTICS)
    np.testing.assert_allclose(found[MEAN] + found[LOW], right.mean, **STATISTICS)
    np.testing.assert_allclose(found[M2], right.m2, **STATISTICS)
    np.testing.assert_allclose(found[DOF], right.dof, **STATISTICS)


@backends
@masks
@groups
@activations
def test_forward_equals_float64(backend, mask, group_size, activation):
    case = Case(mask, group_size, activation)
    arguments = (case.weight, case.bias, case.residual, case.mask, case.config)
    y, statistics = backend.forward(case.x, *arguments)
    np.testing.assert_allclose(y, case.of_float64()[0], **OUTPUT)
    for part, found in zip(case.parts, _array(statistics), strict=True):
        np.testing.assert_allclose(found[M2], case.moments(part).m2, **STATISTICS)
    again = backend.normalize(case.x, statistics, *arguments)
    np.testing.assert_allclose(again, y, **OUTPUT)


@backends
@masks
@activations
def test_normalize_by_given_statistics_equals_float64(backend, mask, activation):
    case = Case(mask, 0, activation)
    mean, var = torch.tensor([4.0, 5.0, 6.0]), torch.tensor([8.0, 9.0, 10.0])
    statistics = backend.given(mean, var)
    arguments = (case.weight, case.bias, case.residual, case.mask, case.config)
    y = backend.normalize(case.x, statistics, *arguments)
    right = case.of_float64(Moments(1, mean.numpy(), var.numpy()))[0]
    np.testing.assert_allclose(y, right, **OUTPUT)


@backends
@masks
@groups
@activations
@pytest.mark.parametrize("measured", [True, False])
def test_gradients_equal_float64(backend, mask, group_size, activation, measured):
    case = Case(mask, group_size, activation)
    given = None
    forward = (case.weight, case.bias, case.residual, case.mask, case.config)
    if measured:
        y, statistics = backend.forward(case.x, *forward)
    else:
        given = Moments(1, np.array([4.0, 5, 6]), np.array([8.0, 9, 10]))
        statistics = backend.given(*(torch.tensor(v) for v in (given.mean, given.m2)))
        y = backend.normalize(case.x, statistics, *forward)
    y = saved_y(y, case.residual, case.config)
    needs = (True, True, True, case.residual is not None)
    rest = (case.weight, case.bias, y, case.mask, case.config, measured, needs)
    found = backend.gradients(case.grad_y, case.x, statistics, *rest)
    for a, b, needed in zip(found, case.of_float64(given)[1:], needs, strict=True):
        if needed:
            np.testing.assert_allclose(a, b, **GRADIENT)
        else:
            assert a is None


@backends
@masks
@activations
def test_backward_by_sums_equals_float64(backend, mask, activation):
    case = Case(mask, 0, activation)
    y, statistics = backend.forward(
        case.x, case.weight, case.bias, case.residual, case.mask, case.config
    )
    y = saved_y(y, case.residual, case.config)
    rest = (case.weight, case.bias, y, case.mask, case.config)
    sums = backend.backward_sums(case.grad_y, case.x, statistics, *rest)
    _, of_x, of_weight, of_bias, of_residual = case.of_float64()
    np.testing.assert_allclose(sums, [of_bias, of_weight], **GRADIENT)
    with_residual = case.residual is not None
    grad_x, grad_residual = backend.backward(
        case.grad_y, case.x, statistics, sums, *rest, with_residual
    )
    np.testing.assert_allclose(grad_x, of_x, **GRADIENT)
    if with_residual:
        np.testing.assert_allclose(grad_residual, of_residual, **GRADIENT)


@backends
@masks
def test_merged_groups_are_the_moments_of_all(backend, mask):
    case = Case(mask)
    parts = [
        _array(backend.moments(case.x[s], None if case.mask is None else case.mask[s]))
        for s in (slice(0, 1), slice(1, 6), slice(6, 6), slice(6, 8))
    ]
    stacked = np.concatenate(parts)
    merged = backend.merge(stacked if backend is native else torch.from_numpy(stacked))
    right = case.moments(slice(None))
    found = native.as_moments(_array(merged)[0])
    for name in ("count", "mean", "m2", "dof"):
        right_value = np.broadcast_to(getattr(right, name), C)
        np.testing.assert_allclose(getattr(found, name), right_value, **STATISTICS)


@backends
@masks
@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
def test_running_update_takes_up_mean_and_unbiased_variance(backend, mask, momentum):
    case = Case(mask)
    mean, var = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0])
    before = mean.double().numpy(), var.double().numpy()
    tracked, batch = torch.tensor(3), backend.moments(case.x, case.mask)
    if backend is native:
        native.update_running(mean, var, tracked, batch, momentum, False, True)
    else:
        portable.update_running(mean, var, tracked, None, batch, momentum, False, True)
    share, right = momentum or 1 / 4, case.moments(slice(None))
    for found, old, new in zip((mean, var), before, (right.mean, right.var(ddof=1)), strict=True):
        np.testing.assert_allclose(found, (1 - share) * old + share * new, rtol=3e-7)
    assert int(tracked) == 4


@backends
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e21])
def test_running_update_leaves_out_what_is_not_finite(backend, bad):
    case = Case()
    case.x[0, 1, 0, 0] = bad
    mean, var, tracked = torch.zeros(C), torch.ones(C), torch.tensor(3)
    batch = backend.moments(case.x, None)
    if backend is native:
        assert native.update_running(mean, var, tracked, batch, 0.1, False, True) == 1
    else:
        portable.update_running(mean, var, tracked, None, batch, 0.1, False, True)
        assert portable.finite_channels(batch, mean, var).tolist() == [True, False, True]
    assert (mean.tolist(), var.tolist(), int(tracked)) == ([0.0] * C, [1.0] * C, 3)


@pytest.mark.parametrize("name", ["moments", "given", "normalize", "forward", "backward_sums",
                                  "backward", "gradients", "merge"])  # fmt: skip
def test_back_ends_have_the_same_signatures(name):
    import inspect

    signatures = [inspect.signature(getattr(backend, name)) for backend in (native, portable)]
    assert list(signatures[0].parameters) == list(signatures[1].parameters)


# ---- as on other devices ------------------------------------------------------------------------


@pytest.fixture
def in_float32(monkeypatch):
    """The portable back end as it computes on devices where float64 is slow."""
    monkeypatch.setattr(portable, "_widened", lambda x: x.float())


@masks
def test_portable_in_float32_is_right_at_large_offsets(in_float32, mask):
    # At a mean of 1e4 in float32, x is known to 2^-11 of a standard deviation of one; given these
    # values, y and the variance are right to a few u.
    case = Case(mask)
    case.x = case.x / 3 + 1e4
    arguments = (case.weight, case.bias, case.residual, case.mask, case.config)
    y, statistics = portable.forward(case.x, *arguments)
    right = case.moments(slice(None))
    np.testing.assert_allclose(y, case.of_float64()[0], **OUTPUT)
    found = _array(statistics)[0]
    np.testing.assert_allclose(found[MEAN] + found[LOW], right.mean, rtol=1e-10)
    np.testing.assert_allclose(found[M2], right.m2, rtol=1e-6)


def test_portable_in_float32_keeps_the_mean_of_given_statistics(in_float32):
    x = torch.full((4, C, 2), 1e4) + torch.arange(4.0)[:, None, None]
    mean, var = torch.full((C,), 1e4 + 1e-4, dtype=torch.float64), torch.ones(C)
    y = portable.normalize(x, portable.given(mean, var), None, None, None, None, Config(0.0))
    exact = torch.arange(4.0, dtype=torch.float64) - 1e-4
    np.testing.assert_allclose(y[:, 0, 0], exact, rtol=0, atol=3e-7)  # y of three, rounded


@backends
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_a_mask_hides_matters_nowhere(backend, bad):
    case, hidden = Case("booleans", 0, "relu"), Case("booleans", 0, "relu")
    where = (case.mask == 0)[:, None].expand_as(case.x)
    for t in (hidden.x, hidden.grad_y, hidden.residual):
        t[where] = bad
    found = []
    for c in (case, hidden):
        forward = (c.weight, c.bias, c.residual, c.mask, c.config)
        y, statistics = backend.forward(c.x, *forward)
        rest = (c.weight, c.bias, y, c.mask, c.config, True, (True,) * 4)
        found.append([y, *backend.gradients(c.grad_y, c.x, statistics, *rest)])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_portable_is_differentiated_where_a_mask_hides_nan():
    case = Case("booleans")
    x = case.x.clone()
    x[(case.mask == 0)[:, None].expand_as(x)] = float("nan")
    x.requires_grad_()
    y, _ = portable.forward(x, case.weight, case.bias, None, case.mask, case.config)
    (grad,) = torch.autograd.grad(y, x, case.grad_y)
    assert bool(grad.isfinite().all())


def test_portable_running_update_keeps_channels_without_degrees_of_freedom():
    mean, var = torch.zeros(C), torch.ones(C)
    one = portable.moments(torch.ones(1, C), None)
    portable.update_running(mean, var, None, None, one, 0.5, False, True)
    assert (mean.tolist(), var.tolist()) == ([0.0] * C, [1.0] * C)
