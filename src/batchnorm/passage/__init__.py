"""Passage of batch norms between frameworks: momentum, ε, variance, axis, names and shapes.

`translate` takes a dict of arrays as one framework names them to one as another does; `read` and
`write` are its halves, with a `BatchNormState` for each layer between them. No framework is
imported. `batchnorm translate` does the same with files.

Examples
--------
>>> import numpy as np
>>> from batchnorm.passage import translate
>>> weights = {
...     "conv.weight": np.ones((2, 3, 1, 1)),
...     "bn.weight": np.array([1.0, 2.0]),
...     "bn.bias": np.array([0.0, 0.5]),
...     "bn.running_mean": np.array([3.0, 4.0]),
...     "bn.running_var": np.array([5.0, 6.0]),
...     "bn.num_batches_tracked": np.array(7),
... }
>>> found = translate(weights, "torch", "flax", momentum=0.1, eps=1e-5)
>>> found.arrays["batch_stats"]
{'bn': {'mean': array([3., 4.]), 'var': array([5., 6.])}}
>>> found.settings["bn"]["momentum"], found.left_out
(0.9, ['conv.weight'])
"""

from .frameworks import FRAMEWORKS as FRAMEWORKS
from .frameworks import Framework as Framework
from .translation import BatchNormState as BatchNormState
from .translation import Translation as Translation
from .translation import read as read
from .translation import translate as translate
from .translation import write as write

__all__ = [
    "FRAMEWORKS",
    "BatchNormState",
    "Framework",
    "Translation",
    "read",
    "translate",
    "write",
]
