"""Normalize sequences of different length in one padded array; a mask hides the padding."""

import numpy as np

import batchnorm

rng = np.random.default_rng(0)
lengths = [7, 3, 5]
sequences = [rng.normal(50, 4, (length, 2)) for length in lengths]

padded = np.full((3, 7, 2), np.nan)  # (N, L, C); the padding may hold any value
for row, sequence in zip(padded, sequences, strict=True):
    row[: len(sequence)] = sequence
mask = np.arange(7) < np.array(lengths)[:, None]  # (N, L)

y, saved = batchnorm.batch_norm(padded, channel_axis=-1, weights=mask)
unpadded = batchnorm.normalize(np.concatenate(sequences))
print(f"values per channel: {saved.moments.count:.0f} of {mask.size}")
print(f"difference from the unpadded values: {abs(y[mask] - unpadded).max():.0e}")
print(f"largest |y| in the padding: {abs(y[~mask]).max():.0f}")

grad_x, _, _ = batchnorm.batch_norm_backward(np.where(mask[..., None], y**2, np.nan), saved)
print(f"largest |gradient| in the padding: {abs(grad_x[~mask]).max():.0f}")

assert abs(y[mask] - unpadded).max() < 1e-12
assert not y[~mask].any()
assert not grad_x[~mask].any()
