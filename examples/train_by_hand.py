"""Train a hidden layer with batch norm by gradient descent, with forward and backward by hand.

The inputs have means of 1,000 and standard deviations from 0.01 to 100. Batch normalization makes
training independent of such differences in scale.
"""

import numpy as np

import batchnorm

rng = np.random.default_rng(0)
spread = np.logspace(-2, 2, 16)
x = 1000 + spread * rng.normal(size=(512, 16))
target = np.sign((x[:, :1] - 1000) * (x[:, 1:2] - 1000))

normalize_input = batchnorm.BatchNorm(16, affine=False, dtype=np.float64)
normalize_hidden = batchnorm.BatchNorm(64, dtype=np.float64)
w1 = rng.normal(size=(16, 64)) / 4
w2 = rng.normal(size=(64, 1)) / 8
rate = 0.05

for step in range(601):
    x_hat = normalize_input(x)
    z = normalize_hidden(x_hat @ w1)
    hidden = np.maximum(z, 0)
    error = hidden @ w2 - target
    if step % 100 == 0:
        print(f"step {step:3d}  loss {np.mean(error**2):.3f}")

    grad_output = 2 * error / len(x)
    grad_w2 = hidden.T @ grad_output
    grad_z = (grad_output @ w2.T) * (z > 0)
    grad_w1 = x_hat.T @ normalize_hidden.backward(grad_z)

    w1 -= rate * grad_w1
    w2 -= rate * grad_w2
    normalize_hidden.gamma -= rate * normalize_hidden.grad_gamma
    normalize_hidden.beta -= rate * normalize_hidden.grad_beta

assert np.mean(error**2) < 0.5
