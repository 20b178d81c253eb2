"""Statistics of a data set in batches of different size: running averages and merged moments.

The last batch is small and differs from the others. In a running average its weight is a tenth, and
in an average over batches a fifth. Merged moments weight it by its size.
"""

import numpy as np

import batchnorm
from batchnorm import Moments

rng = np.random.default_rng(0)
batches = [rng.normal(0, 1, (1000, 1)) for _ in range(4)] + [rng.normal(10, 1, (10, 1))]
everything = np.concatenate(batches)

running = batchnorm.BatchNorm(1, momentum=0.1)
cumulative = batchnorm.BatchNorm(1, momentum=None)
for batch in batches:
    running(batch)
    cumulative(batch)

population = Moments.merge(Moments.of(batch) for batch in batches)
exact = batchnorm.BatchNorm(1)
exact.set_population(population)

print(f"{'':24}    mean  variance")
for name, layer in (
    ("running average", running),
    ("average over batches", cumulative),
    ("merged moments", exact),
):
    print(f"{name:24}{layer.running_mean[0]:8.4f}{layer.running_var[0]:10.4f}")
print(f"{'all values at once':24}{everything.mean():8.4f}{everything.var(ddof=1):10.4f}")

assert abs(exact.running_mean[0] - everything.mean()) < 1e-12
assert abs(exact.running_var[0] - everything.var(ddof=1)) < 1e-12
