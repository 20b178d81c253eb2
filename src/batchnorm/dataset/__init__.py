"""Statistics of data sets larger than memory, and normalization by them.

`measure` computes exact `Statistics` of files, arrays and Dask arrays, block by block, and
`normalize` normalizes data by them. .npy and .npz files need only NumPy, tables the extra ``data``,
Dask the extra ``dask``, and addresses such as ``s3://bucket/x.csv`` the extra ``remote``.

Tables are .csv, .tsv, .csv.gz, .tsv.gz, .parquet, .arrow and .feather files, and folders written by
``save_to_disk`` of Hugging Face's ``datasets``. Their features are columns of numbers, and in
Parquet and Arrow files the entries of lists that all have one length.

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
