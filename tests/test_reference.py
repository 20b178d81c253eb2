"""reference.py against numbers worked out by hand, and its gradients against differences."""

import numpy as np
import pytest

from batchnorm import reference

FD_TOLERANCE = 1e-6  # of central differences (conftest.py)


def test_reference_batch_norm_gives_the_numbers_worked_out_by_hand():
    # Channel 0: mean 3, variance 4; channel 1: mean 0, variance 1. All exact in binary.
    x = np.array([[1.0, -1.0], [5.0, 1.0]])
    y, _ = reference.batch_norm(x, [2.0, 1.0], [10.0, 0.5], eps=0.0)
    np.testing.assert_array_equal(y, [[8.0, -0.5], [12.0, 1.5]])


def test_reference_batch_norm_adds_eps_inside_the_root():
    y, _ = reference.batch_norm(np.array([[-1.0], [1.0]]), eps=3.0)
    np.testing.assert_array_equal(y, [[-0.5], [0.5]])


def test_reference_batch_norm_keeps_the_biased_variance():
    _, cache = reference.batch_norm(np.array([[1.0], [5.0]]))
    assert cache.var.item() == 4.0


def test_reference_batch_norm_reduces_over_all_axes_but_the_channel_axis(rng):
    x = rng.normal(size=(3, 4, 5, 2))
    y, _ = reference.batch_norm(x)
    flat, _ = reference.batch_norm(np.moveaxis(x, 1, -1).reshape(-1, 4))
    # Two orders of one sum of 30 terms.
    np.testing.assert_allclose(np.moveaxis(y, 1, -1).reshape(-1, 4), flat, rtol=0, atol=1e-13)


def test_reference_inference_gives_the_number_worked_out_by_hand():
    y = reference.batch_norm_inference(np.array([[7.0]]), [3.0], [4.0], [5.0], [1.0], eps=0.0)
    assert y.item() == 11.0


@pytest.mark.parametrize(("shape", "axis"), [((5, 3), 1), ((2, 3, 2, 2), 1), ((2, 2, 3), -1)])
def test_reference_backward_equals_finite_differences_in_x(rng, differences, shape, axis):
    x, g = rng.normal(size=shape), rng.normal(size=shape)
    gamma, beta = rng.normal(size=(2, shape[axis]))
    _, cache = reference.batch_norm(x, gamma, beta, 1e-3, axis)

    def loss(v):
        return float((g * reference.batch_norm(v, gamma, beta, 1e-3, axis)[0]).sum())

    grad_x, _, _ = reference.batch_norm_backward(g, cache)
    np.testing.assert_allclose(grad_x, differences(loss, x), rtol=0, atol=FD_TOLERANCE)


def test_reference_backward_equals_finite_differences_in_gamma_and_beta(rng, differences):
    x, g = rng.normal(size=(2, 5, 3))
    gamma, beta = rng.normal(size=(2, 3))
    _, cache = reference.batch_norm(x, gamma, beta)
    _, grad_gamma, grad_beta = reference.batch_norm_backward(g, cache)
    by_gamma = differences(lambda v: float((g * reference.batch_norm(x, v, beta)[0]).sum()), gamma)
    by_beta = differences(lambda v: float((g * reference.batch_norm(x, gamma, v)[0]).sum()), beta)
    np.testing.assert_allclose(
        (grad_gamma, grad_beta), (by_gamma, by_beta), rtol=0, atol=FD_TOLERANCE
    )
