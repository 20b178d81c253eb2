"""Derivatives of any order; torch's transforms and compilers, all of which see one layer."""

import itertools
import sys

import pytest

torch = pytest.importorskip("torch")

from torch import func  # noqa: E402
from torch.autograd import forward_ad, gradcheck, gradgradcheck  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from batchnorm.torch import BatchNorm1d, BatchNorm2d  # noqa: E402
from batchnorm.torch.functional import batch_norm  # noqa: E402

ACTIVATIONS = [None, "relu", "leaky_relu"]
MASKS = [None, "booleans", "weights"]
PARAMETERS = ["both", "weight", "bias", "none"]
LAYOUTS = {
    "contiguous": lambda v: v,
    "channels_last": lambda v: v.movedim(1, -1).contiguous().movedim(-1, 1),
    "sliced": lambda v: v.repeat_interleave(2, -1)[..., ::2],
}
# Sums of some tens of terms of size below 100 in float64, in two orders.
CLOSE = {"rtol": 1e-9, "atol": 1e-10}

modes = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
activations = pytest.mark.parametrize("activation", [*ACTIVATIONS, "relu6", "hardswish", "silu"])


# torch's forward mode, tracers and compilers run into torch's own deprecated functions.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
]


@pytest.fixture
def randn():
    """randn(*shape): float64 from one seed."""
    generator = torch.Generator().manual_seed(20150211)

    def draw(*shape, dtype=torch.float64):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return draw


def _statistics(channels=3, dtype=torch.float64):
    return torch.linspace(-1, 1, channels, dtype=dtype), torch.linspace(0.5, 2, channels).to(dtype)


def _mask(kind, n, *sizes):
    """Weights 0, 1, 2, … or whether they are there."""
    if kind is None:
        return None
    weights = (torch.arange(n * torch.Size(sizes).numel()) % 4).view(n, *sizes).double()
    return weights > 0 if kind == "booleans" else weights


def _definition(x, mean, var, weight=None, bias=None, training=False, eps=1e-5):
    """The layer from torch's differentiable operations, for what torch's own layer gets wrong."""
    axes = [a for a in range(x.dim()) if a != 1]
    shape = [-1 if a == 1 else 1 for a in range(x.dim())]
    if training:
        mean = x.mean(axes)
        var = ((x - mean.view(shape)) ** 2).mean(axes)
    y = (x - mean.view(shape)) / (var.view(shape) + eps).sqrt()
    y = y if weight is None else y * weight.view(shape)
    return y if bias is None else y + bias.view(shape)


# ---- against differences ------------------------------------------------------------------------


def _problem(randn, training, activation, residual, mask, group_size, parameters, layout, shape):
    """A function of the tensors that it can be differentiated by, and these."""
    c = shape[1]
    tensors = {"x": LAYOUTS[layout](randn(*shape) * 2 + 1)}
    if parameters in ("both", "weight"):
        tensors["weight"] = randn(c)
    if parameters in ("both", "bias"):
        tensors["bias"] = randn(c)
    if residual:
        tensors["residual"] = LAYOUTS[layout](randn(*shape))
    fixed = {
        "training": training,
        "activation": activation,
        "negative_slope": 0.3,
        "group_size": group_size,
        "mask": _mask(mask, shape[0], *shape[2:]),
        "eps": 1e-2,
    }

    def f(*values):
        given = dict(zip(tensors, values, strict=True))
        statistics = (None, None) if training else _statistics(c)
        return batch_norm(given.pop("x"), *statistics, **given, **fixed)

    return f, tuple(t.requires_grad_() for t in tensors.values())


cases = pytest.mark.parametrize(
    ("activation", "residual", "mask", "group_size", "parameters"),
    list(itertools.product(ACTIVATIONS, [False, True], MASKS, [None, 2], PARAMETERS)),
)


# Gradients that are not defined are checked with the first derivatives, and once with the second.
# gradcheck's own tolerances: differences of step 1e-6 are right to about 1e-9 on values of size one
# and derivatives of size ten. No value of these lies so near to zero that the step passes a kink.
@modes
@cases
def test_first_derivatives_equal_differences(
    randn, training, activation, residual, mask, group_size, parameters
):
    f, tensors = _problem(
        randn, training, activation, residual, mask, group_size, parameters, "contiguous", (5, 2, 3)
    )
    assert gradcheck(f, tensors, fast_mode=True, check_forward_ad=True)


@modes
@cases
def test_second_derivatives_equal_differences(
    randn, training, activation, residual, mask, group_size, parameters
):
    f, tensors = _problem(
        randn, training, activation, residual, mask, group_size, parameters, "contiguous", (4, 2, 2)
    )
    assert gradgradcheck(
        f, tensors, fast_mode=True, check_fwd_over_rev=True, check_undefined_grad=False
    )


@modes
@activations
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layout", ["channels_last", "sliced"])
def test_derivatives_equal_differences_in_other_layouts(randn, training, activation, mask, layout):
    f, tensors = _problem(randn, training, activation, True, mask, 3, "both", layout, (5, 2, 2, 3))
    assert gradcheck(f, tensors, fast_mode=True, check_forward_ad=True)
    assert gradgradcheck(
        f, tensors, fast_mode=True, check_fwd_over_rev=True, check_undefined_grad=False
    )


@modes
@pytest.mark.parametrize("shape", [(5, 2), (2, 2, 2, 1, 2)], ids=str)
def test_derivatives_equal_differences_when_input_has_two_or_five_axes(randn, training, shape):
    f, tensors = _problem(
        randn, training, "leaky_relu", True, "weights", None, "both", "contiguous", shape
    )
    assert gradcheck(f, tensors, fast_mode=True, check_forward_ad=True)
    assert gradgradcheck(f, tensors, fast_mode=True, check_fwd_over_rev=True)


@modes
def test_whole_jacobians_equal_differences(randn, training):
    # Not along one direction, as above, but by every entry.
    f, tensors = _problem(
        randn, training, "leaky_relu", True, "weights", 2, "both", "contiguous", (3, 2, 2)
    )
    assert gradcheck(f, tensors, check_forward_ad=True)


@modes
def test_batched_gradients_equal_gradients(randn, training):
    f, tensors = _problem(
        randn, training, "relu", True, "weights", 2, "both", "contiguous", (5, 2, 3)
    )
    assert gradcheck(f, tensors, fast_mode=True, check_batched_grad=True)
    assert gradgradcheck(f, tensors, fast_mode=True, check_batched_grad=True)


# https://github.com/pytorch/pytorch/issues/186256: torch's layer takes the batch's statistics for
# constants from the third derivative on.
@modes
def test_third_derivatives_equal_those_of_the_definition(randn, training):
    x, weight, bias, g = randn(5, 2, 3), randn(2), randn(2), randn(5, 2, 3)

    def third(f):
        value = (f(x_, *_statistics(2), weight_, bias_, training) * g).sin().sum()
        for _ in range(3):
            grads = torch.autograd.grad(value, (x_, weight_), create_graph=True)
            value = sum((t * t.detach().cos()).sum() for t in grads)
        return grads

    x_, weight_, bias_ = (t.requires_grad_() for t in (x, weight, bias))
    for a, b in zip(third(batch_norm), third(_definition), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@modes
@pytest.mark.parametrize("which", [0, 1, 2])
def test_gradient_penalty_equals_torchs(randn, training, which):
    values = [randn(6, 3, 4), randn(3), randn(3)]

    def penalty(f):
        tensors = [v.clone().requires_grad_() for v in values]
        y = f(tensors[0], *_statistics(), *tensors[1:], training)
        grad = torch.autograd.grad(y.exp().sum(), tensors[which], create_graph=True)[0]
        grad.norm().backward()
        return [t.grad for t in tensors if t.grad is not None]

    ours, theirs = penalty(batch_norm), penalty(F.batch_norm)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_retained_graph_gives_the_same_gradient_twice(randn):
    x = randn(6, 3, 4).requires_grad_()
    y = batch_norm(x, None, None, training=True).exp().sum()
    first = torch.autograd.grad(y, x, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(y, x)[0], first)


def test_backward_twice_without_retaining_is_refused(randn):
    x = randn(6, 3, 4).requires_grad_()
    y = batch_norm(x, None, None, training=True).sum()
    y.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward()


@modes
def test_forward_mode_equals_reverse_mode(randn, training):
    x, dx, g = randn(6, 3, 4), randn(6, 3, 4), randn(6, 3, 4)
    with forward_ad.dual_level():
        y = batch_norm(forward_ad.make_dual(x, dx), *_statistics(), training=training)
        tangent = forward_ad.unpack_dual(y).tangent
    x.requires_grad_()
    y = batch_norm(x, *_statistics(), training=training)
    grad = torch.autograd.grad(y, x, g)[0]
    torch.testing.assert_close((tangent * g).sum(), (grad * dx).sum(), **CLOSE)


def test_forward_mode_updates_running_statistics_once(randn):
    x, dx = randn(6, 3, 4), randn(6, 3, 4)
    ours, plain = _statistics(), _statistics()
    with forward_ad.dual_level():
        batch_norm(forward_ad.make_dual(x, dx), *ours, training=True)
    batch_norm(x, *plain, training=True)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


# ---- torch.func ---------------------------------------------------------------------------------


def _loss(f, training, **extra):
    """A scalar of x, weight and bias that no derivative of which vanishes."""

    def loss(x, weight, bias):
        statistics = (None, None) if training else _statistics(x.shape[1])
        y = f(x, *statistics, weight, bias, training, **extra)
        return (y.exp() * torch.linspace(0, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum()

    return loss


def _assert_same(transform, values, training):
    """A transform of the layer's loss and of the definition's, at the same values."""
    ours, exact = (transform(_loss(f, training))(*values) for f in (batch_norm, _definition))
    torch.testing.assert_close(ours, exact, **CLOSE)


@pytest.fixture
def values(randn):
    return randn(5, 2, 3), randn(2), randn(2)


TRANSFORMS = {
    "grad": lambda f: func.grad(f, (0, 1, 2)),
    "grad_and_value": lambda f: func.grad_and_value(f, (0, 1, 2)),
    "hessian": lambda f: func.hessian(f, (0, 1, 2)),
    "jacrev of jacfwd": lambda f: func.jacrev(func.jacfwd(f, (0, 1)), (0, 1)),
    "jacrev of jacrev": lambda f: func.jacrev(func.jacrev(f, (0, 1)), (0, 1)),
    "jacfwd of jacfwd": lambda f: func.jacfwd(func.jacfwd(f, (0, 1)), (0, 1)),
    "grad of grad": lambda f: func.grad(lambda *v: func.grad(f)(*v).sin().sum(), (0, 1, 2)),
}


# https://github.com/pytorch/pytorch/issues/196699: torch's layer has wrong second derivatives by
# nested forward mode; by nested reverse mode under torch.func too (seen in 2.13).
# https://github.com/pytorch/pytorch/issues/197867: nested forward mode loses what a custom
# Function's jvp depends on.
@modes
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_equal_those_of_the_definition(values, training, transform):
    _assert_same(TRANSFORMS[transform], values, training)


@modes
def test_vjp_equals_torchs(values, randn, training):
    g = randn(5, 2, 3)

    def pulled(f):
        y, pull = func.vjp(lambda *v: f(v[0], *_statistics(2), *v[1:], training), *values)
        return y, pull(g)

    torch.testing.assert_close(pulled(batch_norm), pulled(F.batch_norm), **CLOSE)


@modes
def test_jvp_equals_torchs(values, randn, training):
    tangents = tuple(randn(*v.shape) for v in values)

    def pushed(f):
        return func.jvp(lambda *v: f(v[0], *_statistics(2), *v[1:], training), values, tangents)

    torch.testing.assert_close(pushed(batch_norm), pushed(F.batch_norm), **CLOSE)


@modes
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")  # torch's
def test_linearize_equals_jvp(values, randn, training):
    tangents = tuple(randn(*v.shape) for v in values)

    def f(*v):
        return batch_norm(v[0], *_statistics(2), *v[1:], training)

    _, push = func.linearize(f, *values)
    torch.testing.assert_close(push(*tangents), func.jvp(f, values, tangents)[1], **CLOSE)


@modes
@pytest.mark.parametrize("extra", ["residual", "mask", "group_size", "activation"])
@pytest.mark.parametrize(
    "order", [("jacfwd", "jacrev"), ("jacrev", "jacfwd"), ("jacfwd", "jacfwd")], ids=" of ".join
)
def test_hessian_is_the_same_by_every_order_of_modes(values, randn, training, extra, order):
    arguments = {
        "residual": {"residual": randn(5, 2, 3)},
        "mask": {"mask": _mask("weights", 5, 3)},
        "group_size": {"group_size": 2},
        "activation": {"activation": "leaky_relu", "negative_slope": 0.3},
    }[extra]
    loss = _loss(batch_norm, training, **arguments)
    expected = func.jacrev(func.jacrev(loss))(*values)
    outer, inner = (getattr(func, name) for name in order)
    torch.testing.assert_close(outer(inner(loss))(*values), expected, **CLOSE)


def _each(f, values, in_dims, out_dim=0):
    """What vmap means: one call for each entry."""
    size = next(v.shape[d] for v, d in zip(values, in_dims, strict=True) if d is not None)
    calls = [
        f(*(v if d is None else v.select(d, k) for v, d in zip(values, in_dims, strict=True)))
        for k in range(size)
    ]
    return torch.stack(calls, out_dim)


VMAPS = {
    "x": ((4, 5, 2, 3), (2,), (2,), (0, None, None)),
    "weight": ((5, 2, 3), (4, 2), (2,), (None, 0, None)),
    "weight and bias": ((5, 2, 3), (4, 2), (4, 2), (None, 0, 0)),
    "everything": ((4, 5, 2, 3), (4, 2), (4, 2), (0, 0, 0)),
    "other axes": ((5, 2, 4, 3), (2, 4), (4, 2), (2, 1, 0)),
    "the last axis": ((5, 2, 3, 4), (2, 4), (2,), (-1, -1, None)),
}


@modes
@pytest.mark.parametrize("case", VMAPS)
@pytest.mark.parametrize("extra", ["nothing", "activation", "mask", "group_size", "residual"])
def test_vmap_equals_one_call_for_each(randn, training, case, extra):
    *shapes, in_dims = VMAPS[case]
    values = [randn(*shape) for shape in shapes]
    arguments = {
        "nothing": {},
        "activation": {"activation": "relu"},
        "mask": {"mask": _mask("weights", 5, 3)},
        "group_size": {"group_size": 2},
        "residual": {"residual": randn(5, 2, 3)},
    }[extra]

    def f(x, weight, bias):
        statistics = (None, None) if training else _statistics(2)
        return batch_norm(x, *statistics, weight, bias, training, **arguments)

    torch.testing.assert_close(func.vmap(f, in_dims)(*values), _each(f, values, in_dims), **CLOSE)


@pytest.mark.parametrize("randomness", ["error", "same", "different"])
def test_vmap_takes_any_randomness(randn, randomness):
    # Nothing in the layer is random.
    x = randn(4, 5, 2, 3)

    def f(x):
        return batch_norm(x, None, None, training=True)

    torch.testing.assert_close(func.vmap(f, randomness=randomness)(x), _each(f, [x], [0]), **CLOSE)


@modes
def test_vmap_of_masks_equals_one_call_for_each(randn, training):
    x, masks = randn(5, 2, 3), torch.stack([_mask("weights", 5, 3), _mask("weights", 5, 3).flip(0)])

    def f(x, mask):
        return batch_norm(x, *_statistics(2), training=False, mask=mask)

    def g(x, mask):
        return batch_norm(x, None, None, training=True, mask=mask)

    h = g if training else f
    torch.testing.assert_close(
        func.vmap(h, (None, 0))(x, masks), _each(h, [x, masks], (None, 0)), **CLOSE
    )


def test_vmap_of_residuals_equals_one_call_for_each(randn):
    x, residual = randn(5, 2, 3), randn(5, 2, 3, 4)

    def f(x, residual):
        return batch_norm(x, None, None, training=True, residual=residual, activation="relu")

    torch.testing.assert_close(
        func.vmap(f, (None, 3))(x, residual), _each(f, [x, residual], (None, 3)), **CLOSE
    )


def test_vmap_of_vmap_equals_one_call_for_each(randn):
    x, weight = randn(2, 4, 5, 2, 3), randn(4, 2)

    def f(x, weight):
        return batch_norm(x, None, None, weight, training=True)

    inner = func.vmap(f)
    torch.testing.assert_close(
        func.vmap(inner, (0, None))(x, weight),
        torch.stack([_each(f, [part, weight], (0, 0)) for part in x]),
        **CLOSE,
    )


@modes
@pytest.mark.parametrize("order", ["vmap of grad", "grad of vmap", "vmap of jacrev of grad"])
def test_vmap_with_derivatives_equals_that_of_the_definition(randn, training, order):
    values = randn(4, 5, 2, 3), randn(4, 2), randn(4, 2)

    def transform(loss):
        if order == "vmap of grad":
            return func.vmap(func.grad(loss, (0, 1, 2)))
        if order == "grad of vmap":
            return func.grad(lambda *v: func.vmap(loss)(*v).sum(), (0, 1, 2))
        return func.vmap(func.jacrev(func.grad(loss, 1)))

    _assert_same(transform, values, training)


def test_vmap_of_running_statistics_updates_each(randn):
    x = randn(4, 5, 2, 3)
    ours = [t.repeat(4, 1) for t in _statistics(2)]
    theirs = [t.clone() for t in ours]

    def step(f):
        return lambda *v: f(*v, training=True)

    y = func.vmap(step(batch_norm))(x, *ours)
    expected = func.vmap(step(F.batch_norm))(x, *theirs)
    for a, b in zip((y, *ours), (expected, *theirs), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_vmap_of_running_statistics_normalizes_by_each_in_evaluation(randn):
    x, mean, var = randn(5, 2, 3), randn(4, 2), randn(2, 4).square()
    ours, theirs = (
        func.vmap(lambda x, m, v, f=f: f(x, m, v), (None, 0, 1))(x, mean, var)
        for f in (batch_norm, F.batch_norm)
    )
    torch.testing.assert_close(ours, theirs, **CLOSE)


def test_vmap_refuses_running_statistics_that_are_not_batched(randn):
    mean, var = _statistics(2)
    with pytest.raises(RuntimeError, match="running_mean and running_var.*not batched"):
        func.vmap(lambda x: batch_norm(x, mean, var, training=True))(randn(4, 5, 2, 3))
    for a, b in zip((mean, var), _statistics(2), strict=True):
        assert torch.equal(a, b)


@modes
def test_grad_updates_running_statistics_in_training_only(randn, training):
    x, ours, plain = randn(5, 2, 3), _statistics(2), _statistics(2)
    func.grad(lambda x: batch_norm(x, *ours, training=training).exp().sum())(x)
    batch_norm(x, *plain, training=training)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


# ---- torch.func on modules ----------------------------------------------------------------------


def _network(layer, momentum=0.1):
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(4, 3), layer(3, momentum=momentum), torch.nn.Linear(3, 2)
    ).double()


def _state(model):
    return dict(model.named_parameters()), {k: v.clone() for k, v in model.named_buffers()}


@modes
def test_functional_call_equals_torchs(randn, training):
    x = randn(6, 4)

    def run(layer):
        model = _network(layer).train(training)
        parameters, buffers = _state(model)
        grads, y = func.grad_and_value(
            lambda p, b: func.functional_call(model, (p, b), (x,)).exp().sum()
        )(parameters, buffers)
        return y, grads, buffers

    torch.testing.assert_close(run(BatchNorm1d), run(torch.nn.BatchNorm1d), **CLOSE)


def test_functional_call_leaves_the_module_alone(randn):
    model = _network(BatchNorm1d)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    func.functional_call(model, _state(model), (randn(6, 4),))
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


@modes
@pytest.mark.parametrize("shared", [True, False], ids=["one batch", "a batch each"])
def test_ensemble_equals_torchs(randn, training, shared):
    x = randn(6, 4) if shared else randn(3, 6, 4)

    def run(layer):
        models = [_network(layer).train(training) for _ in range(3)]
        for k, model in enumerate(models):
            torch.nn.init.constant_(model[1].running_mean, 0.1 * k)
            torch.nn.init.constant_(model[1].weight, 1.0 + k)
        parameters, buffers = func.stack_module_state(models)

        def loss(p, b, x):
            return func.functional_call(models[0], (p, b), (x,)).exp().sum()

        grads, y = func.vmap(func.grad_and_value(loss), (0, 0, None if shared else 0))(
            {k: v.detach() for k, v in parameters.items()}, buffers, x
        )
        return y, grads, buffers

    torch.testing.assert_close(run(BatchNorm1d), run(torch.nn.BatchNorm1d), **CLOSE)


def test_gradients_per_example_equal_those_of_single_calls_in_evaluation(randn):
    model = _network(BatchNorm1d).eval()
    parameters, buffers = _state(model)
    parameters = {k: v.detach() for k, v in parameters.items()}
    x = randn(6, 4)

    def loss(p, x):
        return func.functional_call(model, (p, buffers), (x[None],)).exp().sum()

    grads = func.vmap(func.grad(loss), (None, 0))(parameters, x)
    for k in range(6):
        single = func.grad(loss)(parameters, x[k])
        torch.testing.assert_close({n: g[k] for n, g in grads.items()}, single, **CLOSE)


# ---- one layer, however it is called ------------------------------------------------------------


class _Passing(TorchDispatchMode):
    """Looks on, and keeps the names of the operators."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def _plain(f, *tensors):
    with torch.no_grad():
        return f(*tensors)


def _recorded(f, *tensors):
    return f(*(t.detach().clone().requires_grad_() for t in tensors)).detach()


def _watched(f, *tensors):
    with _Passing():
        return f(*tensors)


def _watched_and_recorded(f, *tensors):
    with _Passing():
        return _recorded(f, *tensors)


def _transformed(f, *tensors):
    return func.vjp(f, *tensors)[0]


def _dual(f, *tensors):
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, torch.ones_like(t)) for t in tensors]
        return forward_ad.unpack_dual(f(*duals)).primal.clone()


WAYS = {w.__name__[1:]: w for w in (_recorded, _watched, _watched_and_recorded)}
TRANSFORMED = {w.__name__[1:]: w for w in (_transformed, _dual)}


@pytest.fixture
def in_way(randn):
    """in_way(how, training, extra): y and the running statistics, by one way of calling."""

    def run(how, training, dtype, extra):
        x, weight, bias, residual = drawn[dtype]
        arguments = {
            "nothing": {},
            "residual and relu": {"residual": residual, "activation": "relu"},
            "mask": {"mask": _mask("weights", 7, 5)},
            "group_size": {"group_size": 3},
        }[extra]
        buffers = _statistics(dtype=torch.float32)

        def f(x, weight, bias):
            return batch_norm(x, *buffers, weight, bias, training, **arguments)

        return [how(f, x, weight, bias), *buffers]

    drawn = {
        dtype: (
            randn(7, 3, 5, dtype=dtype),
            randn(3, dtype=torch.float32),
            randn(3),
            randn(7, 3, 5, dtype=dtype),
        )
        for dtype in (torch.float32, torch.bfloat16)
    }
    return run


dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
extras = pytest.mark.parametrize("extra", ["nothing", "residual and relu", "mask", "group_size"])


@modes
@dtypes
@extras
@pytest.mark.parametrize("way", WAYS)
def test_value_is_bitwise_the_same_in_every_way(in_way, training, way, dtype, extra):
    plain = in_way(_plain, training, dtype, extra)
    for a, b in zip(in_way(WAYS[way], training, dtype, extra), plain, strict=True):
        assert torch.equal(a, b)


@modes
@dtypes
@extras
@pytest.mark.parametrize("way", TRANSFORMED)
def test_transformed_value_is_that_of_the_kernels(in_way, training, way, dtype, extra):
    # In float64 and rounded once; the kernels' last step is float32 (docs/numerics.md), and a
    # half type may fall on either side of a tie.
    bound = 2e-6 if dtype is torch.float32 else torch.finfo(dtype).eps
    plain = in_way(_plain, training, dtype, extra)
    for a, b in zip(in_way(TRANSFORMED[way], training, dtype, extra), plain, strict=True):
        torch.testing.assert_close(a, b, rtol=bound, atol=bound)


@modes
@pytest.mark.parametrize("extra", ["nothing", "residual and relu", "mask", "group_size"])
def test_gradient_is_bitwise_the_same_when_a_dispatch_mode_looks_on(randn, training, extra):
    values = [randn(7, 3, 5, dtype=torch.float32), randn(3, dtype=torch.float32), randn(3)]
    g = randn(7, 3, 5, dtype=torch.float32)
    arguments = {
        "nothing": {},
        "residual and relu": {"residual": values[0].flip(0), "activation": "relu"},
        "mask": {"mask": _mask("weights", 7, 5)},
        "group_size": {"group_size": 3},
    }[extra]

    def gradients():
        tensors = [v.clone().requires_grad_() for v in values]
        y = batch_norm(
            tensors[0], *_statistics(dtype=torch.float32), *tensors[1:], training, **arguments
        )
        return torch.autograd.grad(y, tensors, g)

    expected = gradients()
    with _Passing():
        watched = gradients()
    for a, b in zip(watched, expected, strict=True):
        assert torch.equal(a, b)


@modes
@pytest.mark.parametrize("extra", ["nothing", "residual and relu", "mask", "group_size"])
def test_gradient_to_be_differentiated_equals_the_kernels(randn, training, extra):
    values = [randn(7, 3, 5), randn(3), randn(3)]
    arguments = {
        "nothing": {},
        "residual and relu": {"residual": values[0].flip(0), "activation": "relu"},
        "mask": {"mask": _mask("weights", 7, 5)},
        "group_size": {"group_size": 3},
    }[extra]
    tensors = [v.requires_grad_() for v in values]
    y = batch_norm(tensors[0], *_statistics(), *tensors[1:], training, **arguments).exp().sum()
    kernels = torch.autograd.grad(y, tensors, retain_graph=True)
    again = torch.autograd.grad(y, tensors, create_graph=True)
    torch.testing.assert_close(again, kernels, **CLOSE)


@modes
def test_tangent_is_the_same_when_a_dispatch_mode_looks_on(randn, training):
    x, dx = randn(6, 3, 4), randn(6, 3, 4)

    def tangent():
        with forward_ad.dual_level():
            y = batch_norm(forward_ad.make_dual(x, dx), *_statistics(), training=training)
            return forward_ad.unpack_dual(y).tangent

    expected = tangent()
    with _Passing():
        watched = tangent()
    torch.testing.assert_close(watched, expected, **CLOSE)


@modes
def test_second_derivative_is_the_same_when_a_dispatch_mode_looks_on(randn, training):
    x, weight = randn(6, 3, 4).requires_grad_(), randn(3).requires_grad_()

    def second():
        y = batch_norm(x, *_statistics(), weight, training=training)
        grads = torch.autograd.grad(y.exp().sum(), (x, weight), create_graph=True)
        return torch.autograd.grad(sum(g.sin().sum() for g in grads), (x, weight))

    expected = second()
    with _Passing():
        watched = second()
    for a, b in zip(watched, expected, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@modes
def test_dispatch_mode_sees_the_operator(randn, training):
    with _Passing() as mode:
        batch_norm(randn(6, 3), *_statistics(), training=training)
    assert any(name.startswith("batchnorm.") for name in mode.seen)


def test_flop_counter_counts_the_layers_beside(randn):
    from torch.utils.flop_counter import FlopCounterMode

    model = torch.nn.Sequential(torch.nn.Linear(4, 3), BatchNorm1d(3), torch.nn.ReLU()).double()
    with FlopCounterMode(display=False) as counter:
        model(randn(6, 4)).sum().backward()
    # 2·6·4·3 forward, as many for the weight's gradient.
    assert counter.get_total_flops() == 2 * 144


def test_saved_tensors_hooks_see_input(randn):
    x = randn(6, 3).requires_grad_()
    packed = []

    def pack(t):
        packed.append(t.shape)
        return t.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = batch_norm(x, None, None, training=True)
    plain = batch_norm(x, None, None, training=True)
    assert x.shape in packed
    grads = [torch.autograd.grad(v.exp().sum(), x)[0] for v in (y, plain)]
    assert torch.equal(*grads)


# ---- operators ----------------------------------------------------------------------------------

_CONFIG = (1e-5, 0, 1, 0.01)  # eps, group_size, activation, slope


def _operator_samples(randn, name):
    """Arguments of an operator, by its name; a mask is (N, *S) float64."""
    x = randn(6, 3, 4, dtype=torch.float32)
    g, residual = (randn(6, 3, 4, dtype=torch.float32) for _ in range(2))
    weight, bias = randn(3, dtype=torch.float32), randn(3, dtype=torch.float32)
    mask = _mask("weights", 6, 4)
    given = torch.ops.batchnorm.given(*_statistics(dtype=torch.float32))
    own = torch.ops.batchnorm.forward(x, None, None, None, None, *_CONFIG)[1]
    tracked, skipped = torch.tensor(3), torch.tensor(0)
    last = x.movedim(1, -1).contiguous().movedim(-1, 1)

    def asked(t):
        return t.clone().requires_grad_()

    return {
        "given": [_statistics(dtype=torch.float32), _statistics(dtype=torch.bfloat16)],
        "forward": [
            (x, None, None, None, None, *_CONFIG),
            (asked(x), asked(weight), asked(bias), asked(residual), mask, *_CONFIG),
            (asked(last), asked(weight), None, None, None, 1e-5, 4, 2, 0.1),
        ],
        "normalize": [
            (x, given, None, None, None, None, *_CONFIG),
            (asked(x), given, asked(weight), asked(bias), asked(residual), mask, *_CONFIG),
            (asked(last), given, None, asked(bias), None, None, *_CONFIG),
        ],
        "backward": [
            (g, x, own, weight, bias, residual, None, *_CONFIG, True, True, True, True, True),
            (g, x, given, weight, None, None, mask, *_CONFIG, False, True, False, False, False),
            (
                g,
                last,
                own,
                None,
                bias,
                None,
                None,
                1e-5,
                0,
                0,
                0.0,
                True,
                False,
                False,
                True,
                False,
            ),
        ],
        "update_running": [
            (*_statistics(dtype=torch.float32), tracked, skipped, own, 0.1, "skip", True, "layer"),
            (*_statistics(), None, None, own, None, "propagate", True, "layer"),
        ],
        "merge_into": [(own.clone(), own, skipped, "skip", "layer")],
    }[name]


NAMES = ["given", "forward", "normalize", "backward", "update_running", "merge_into"]


@pytest.mark.parametrize("name", NAMES)
def test_operator_keeps_torchs_rules(randn, name):
    operator = getattr(torch.ops.batchnorm, name).default
    for sample in _operator_samples(randn, name):
        torch.library.opcheck(operator, sample)


@pytest.mark.parametrize("name", ["forward", "normalize"])
def test_operator_derivatives_equal_differences(randn, name):
    x, weight, bias, residual = (
        t.requires_grad_() for t in (randn(5, 2, 3), randn(2), randn(2), randn(5, 2, 3))
    )
    given = torch.ops.batchnorm.given(*_statistics(2))

    def f(x, weight, bias, residual):
        mask = _mask("weights", 5, 3)
        if name == "forward":
            return torch.ops.batchnorm.forward(x, weight, bias, residual, mask, 1e-2, 0, 2, 0.3)[0]
        return torch.ops.batchnorm.normalize(
            x, given, weight, bias, residual, mask, 1e-2, 0, 2, 0.3
        )

    assert gradcheck(f, (x, weight, bias, residual), fast_mode=True)
    assert gradgradcheck(f, (x, weight, bias, residual), fast_mode=True)


# ---- compilers ----------------------------------------------------------------------------------


class _Block(torch.nn.Module):
    """A layer with a convolution before it, as in a residual network."""

    def __init__(self, **arguments):
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(2, 3, 3, padding=1)
        self.bn = BatchNorm2d(3, **arguments)

    def forward(self, x):
        return self.bn(self.conv(x))


class _ResidualBlock(_Block):
    def forward(self, x, residual, mask):
        return self.bn(self.conv(x), residual, mask)


@pytest.fixture
def compiled():
    """compiled(f): f as one graph; whatever was compiled before is forgotten."""
    torch._dynamo.reset()
    yield lambda f, backend="aot_eager": torch.compile(f, fullgraph=True, backend=backend)
    torch._dynamo.reset()


def _step(model, forward, *inputs):
    """Output, gradients and state after one step."""
    tensors = [t.clone().requires_grad_(t.is_floating_point()) for t in inputs]
    y = forward(*tensors)
    y.square().sum().backward()
    grads = [t.grad for t in tensors] + [p.grad for p in model.parameters()]
    return [y.detach(), *grads, *model.state_dict().values()]


def _assert_compiles(compiled, block, training, *inputs, **extra):
    ours, eager = (block(**extra).train(training) for _ in range(2))
    results = _step(ours, compiled(ours), *inputs)
    # The same kernels in the same order: the same bits, but for sums of gradients.
    for a, b in zip(results, _step(eager, eager, *inputs), strict=True):
        if b is None:
            assert a is None
        else:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def _rounding_of(block, results, x):
    """Bounds of a float32 step's rounding, one for each result of `_step`, in any order of sums.

    A sum of n products is off by at most n·u·Σ|a·b|, u = 2^-24, and by what its factors are off.
    Those of the convolution's gradients are the layer's ∂x, which is a difference of terms as large
    as 2·scale·y: it is off by some u of these, whatever is left of them. So the bounds are made of
    magnitudes, without differences, times 128 u for the n = 100 terms and the roundings of the
    layer itself, each of which is below 2e-6 (docs/numerics.md).
    """
    conv, bn, y = block.conv, block.bn, results[0]
    var = conv(x).var((0, 2, 3), correction=0) if bn.training else bn.running_var
    scale = (bn.weight / (var + bn.eps).sqrt())[:, None, None]
    of_z = 2 * scale * (y.abs() + 1 + y.abs() * y.square().mean((0, 2, 3))[:, None, None])
    of_parameter = 2 * (y.abs() * (y.abs() + 1)).sum((0, 2, 3))
    bounds = [
        1 + y.abs(),
        torch.nn.grad.conv2d_input(x.shape, conv.weight.abs(), of_z, padding=1),
        torch.nn.grad.conv2d_weight(x.abs(), conv.weight.shape, of_z, padding=1),
        of_z.sum((0, 2, 3)),
        of_parameter,
        of_parameter,
        *(1 + t.abs() for t in block.state_dict().values()),
    ]
    return [b.detach() * 128 * 2.0**-24 for b in bounds]


COMPILED = {
    "nothing": {},
    "activation": {"activation": "relu"},
    "group_size": {"group_size": 3},
    "momentum of None": {"momentum": None},
    "untracked": {"track_running_stats": False},
    "no parameters": {"affine": False},
    "propagate": {"on_nonfinite": "propagate"},
}


@modes
@pytest.mark.parametrize("case", COMPILED)
def test_compiled_layer_equals_eager(randn, compiled, training, case):
    x = randn(4, 2, 5, 5, dtype=torch.float32)
    _assert_compiles(compiled, _Block, training, x, **COMPILED[case])


@modes
def test_compiled_layer_with_residual_and_mask_equals_eager(randn, compiled, training):
    x, residual = randn(4, 2, 5, 5, dtype=torch.float32), randn(4, 3, 5, 5, dtype=torch.float32)
    mask = _mask("booleans", 4, 5, 5)
    _assert_compiles(compiled, _ResidualBlock, training, x, residual, mask, activation="relu")


@modes
def test_compiled_function_equals_eager(randn, compiled, training):
    x, weight = randn(6, 3, 4), randn(3)

    def f(x, weight, mean, var):
        return batch_norm(x, mean, var, weight, training=training, activation="leaky_relu") * 2

    ours, eager = _statistics(), _statistics()
    a = compiled(f)(x, weight, *ours)
    b = f(x, weight, *eager)
    for s, t in zip((a, *ours), (b, *eager), strict=True):
        torch.testing.assert_close(s, t, **CLOSE)


def test_compiled_layer_takes_batches_of_other_sizes(randn, compiled):
    ours, eager = _Block(), _Block()
    f = torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (4, 3, 6):
        x = randn(n, 2, 5, 5, dtype=torch.float32)
        torch.testing.assert_close(f(x), eager(x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dict(ours.state_dict()), dict(eager.state_dict()))


def test_compiled_layer_takes_batches_of_other_sizes_when_they_are_grouped(randn, compiled):
    eager = BatchNorm1d(3, group_size=3)
    f = torch.compile(
        BatchNorm1d(3, group_size=3), fullgraph=True, backend="aot_eager", dynamic=True
    )
    for n in (8, 7, 12):
        x = randn(n, 3, dtype=torch.float32)
        torch.testing.assert_close(f(x), eager(x), rtol=1e-6, atol=1e-6)


def test_compiled_layer_counts_a_batch_that_is_not_finite(randn, compiled):
    layer = BatchNorm1d(3)
    x = randn(6, 3, dtype=torch.float32)
    x[0, 1] = float("nan")
    f = compiled(layer)
    with pytest.warns(RuntimeWarning, match="not finite"):
        f(x)
    assert layer.nonfinite_batches == 1
    assert torch.equal(layer.running_mean, torch.zeros(3))


@modes
@pytest.mark.skipif(sys.platform == "darwin", reason="the compiler's OpenMP is not at hand")
def test_layer_compiled_by_inductor_rounds_as_eager_does(randn, compiled, training):
    # Inductor chooses other convolutions, which sum in another order on some processors.
    x = randn(4, 2, 5, 5, dtype=torch.float32)
    ours, eager, exact = (_Block().train(training) for _ in range(3))
    exact.double()
    right = _step(exact, exact, x.double())
    bounds = _rounding_of(exact, right, x.double())
    for results in (_step(ours, compiled(ours, "inductor"), x), _step(eager, eager, x)):
        for a, b, bound in zip(results, right, bounds, strict=True):
            assert ((a.double() - b).abs() <= bound).all()


# ---- export, fx, jit ----------------------------------------------------------------------------


@modes
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_exported_layer_equals_eager_on_other_batches(randn, training, strict):
    eager, block = (_Block(activation="relu").train(training) for _ in range(2))
    example = (randn(4, 2, 5, 5, dtype=torch.float32),)
    shapes = ({0: torch.export.Dim("batch", min=2, max=64)},)
    program = torch.export.export(block, example, dynamic_shapes=shapes, strict=strict)
    module = program.module()
    for n in (4, 7):
        x = randn(n, 2, 5, 5, dtype=torch.float32)
        torch.testing.assert_close(module(x), eager(x), rtol=1e-6, atol=1e-6)
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, eager.state_dict()[name])


def test_exported_layer_survives_a_file(randn, tmp_path):
    block = _Block().eval()
    x = randn(4, 2, 5, 5, dtype=torch.float32)
    torch.export.save(torch.export.export(block, (x,)), tmp_path / "block.pt2")
    loaded = torch.export.load(tmp_path / "block.pt2").module()
    torch.testing.assert_close(loaded(x), block(x), rtol=1e-6, atol=1e-6)


@modes
def test_symbolic_trace_keeps_the_layer_as_a_module(randn, training):
    block = _Block().train(training)
    traced = torch.fx.symbolic_trace(block)
    calls = [n.target for n in traced.graph.nodes if n.op == "call_module"]
    assert calls == ["conv", "bn"]
    assert traced.bn is block.bn
    x = randn(4, 2, 5, 5, dtype=torch.float32)
    torch.testing.assert_close(traced(x), _Block().train(training)(x), rtol=0, atol=0)


def test_symbolic_trace_keeps_residual_and_mask(randn):
    block = _ResidualBlock().eval()
    traced = torch.fx.symbolic_trace(block)
    x, residual = randn(4, 2, 5, 5, dtype=torch.float32), randn(4, 3, 5, 5, dtype=torch.float32)
    mask = _mask("booleans", 4, 5, 5)
    torch.testing.assert_close(traced(x, residual, mask), block(x, residual, mask))


# Under the tracer every size is a tensor, and a comparison of two warns.
tracing = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")


@tracing
@modes
def test_jit_trace_equals_eager_on_another_batch(randn, training):
    block, eager = (_Block(activation="relu").train(training) for _ in range(2))
    traced = torch.jit.trace(block, randn(4, 2, 5, 5, dtype=torch.float32), check_trace=False)
    x = randn(6, 2, 5, 5, dtype=torch.float32)
    torch.testing.assert_close(traced(x), eager(x), rtol=1e-6, atol=1e-6)


@tracing
def test_jit_trace_updates_running_statistics(randn):
    block, eager = _Block(), _Block()
    x = randn(4, 2, 5, 5, dtype=torch.float32)
    traced = torch.jit.trace(block, x, check_trace=False)
    for layer in (block, eager):
        layer.bn.reset_running_stats()
    traced(x)
    eager(x)
    torch.testing.assert_close(dict(traced.state_dict()), dict(eager.state_dict()))


@tracing
def test_jit_trace_takes_up_later_running_statistics(randn):
    block = _Block().eval()
    traced = torch.jit.trace(block, randn(4, 2, 5, 5, dtype=torch.float32))
    x = randn(6, 2, 5, 5, dtype=torch.float32)
    with torch.no_grad():
        block.bn.running_mean.add_(1.0)
    torch.testing.assert_close(traced(x), block(x), rtol=1e-6, atol=1e-6)


def test_jit_trace_warns_of_nothing_in_evaluation(randn):
    # Nor does torch's layer.
    torch.jit.trace(_Block().eval(), randn(4, 2, 5, 5, dtype=torch.float32))


# ---- tensors without values ---------------------------------------------------------------------


@modes
def test_fake_tensors_give_the_shape_and_strides_of_y(training):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        layer = BatchNorm2d(3, activation="relu").train(training)
        x = torch.empty(4, 3, 5, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
        y = layer(x)
        y.sum().backward()
    assert y.shape == x.grad.shape == (4, 3, 5, 5)
    assert y.stride() == x.stride()


@modes
def test_fake_tensors_leave_a_real_layer_alone(training):
    from torch._subclasses.fake_tensor import FakeTensorMode

    layer = BatchNorm2d(3).train(training)
    with FakeTensorMode(allow_non_fake_inputs=True):
        y = layer(torch.empty(4, 3, 5, 5))
    assert y.shape == (4, 3, 5, 5)
    assert torch.equal(layer.running_mean, torch.zeros(3))


@modes
@pytest.mark.parametrize("extra", ["nothing", "residual", "mask", "group_size"])
def test_meta_tensors_give_the_shape_and_type_of_y(training, extra):
    x = torch.empty(4, 3, 5, device="meta", dtype=torch.bfloat16)
    statistics = [t.to("meta") for t in _statistics(dtype=torch.float32)]
    arguments = {
        "nothing": {},
        "residual": {"residual": torch.empty_like(x), "activation": "relu"},
        "mask": {"mask": torch.empty(4, 5, device="meta", dtype=torch.bool)},
        "group_size": {"group_size": 2},
    }[extra]
    y = batch_norm(x, *statistics, training=training, **arguments)
    assert (y.shape, y.dtype, y.device.type) == ((4, 3, 5), torch.bfloat16, "meta")


@modes
def test_meta_layer_runs_forward_and_backward(training):
    layer = BatchNorm2d(3, device="meta").train(training)
    layer(torch.empty(4, 3, 5, 5, device="meta")).sum().backward()
    assert layer.weight.grad.device.type == "meta"


def test_meta_layer_becomes_real(randn):
    layer = BatchNorm1d(3, device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    x = randn(6, 3, dtype=torch.float32)
    assert torch.equal(layer(x), BatchNorm1d(3)(x))


def test_layer_made_under_a_meta_device_has_its_buffers_there():
    with torch.device("meta"):
        layer = BatchNorm1d(3)
    assert {t.device.type for t in layer.state_dict().values()} == {"meta"}
