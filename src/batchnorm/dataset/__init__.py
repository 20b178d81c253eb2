"""Statistics of data sets larger than memory, and normalization by them.

`measure` computes exact `Statistics` of files, arrays and Dask arrays, block by block, and
`normalize` normalizes data by them. .npy and .npz files need only NumPy, CSV and Parquet files the
extra ``data``, images the extra ``images``, Dask the extra ``dask``.

>>> import numpy as np
>>> from batchnorm import dataset
>>> x = np.array([[1.0, 10.0], [3.0, np.nan], [5.0, 30.0]])
>>> found = dataset.measure(x, missing="skip")
>>> found.mean, found.missing
(array([ 3., 20.]), array([0, 1]))
>>> dataset.normalize(x, found, eps=0.0).round(3)
array([[-1.225, -1.   ],
       [ 0.   ,    nan],
       [ 1.225,  1.   ]])
"""

from .measuring import measure as measure
from .normalizing import normalize as normalize
from .statistics import Statistics as Statistics
from .statistics import merge as merge

__all__ = ["Statistics", "measure", "merge", "normalize"]
