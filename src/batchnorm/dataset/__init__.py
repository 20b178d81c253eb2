"""Statistics of data sets larger than memory, and normalization by them.

`measure` computes exact `Statistics` of files, arrays and Dask arrays, block by block, and
`normalize` normalizes data by them, or undoes that. Arrays may lie in

- .npy and .npz files, also compressed ones, in either order, with any axis of the features;
- HDF5 files, .h5 and .hdf5 (extra ``hdf5``), and .zarr folders of formats 2 and 3 (extra
  ``zarr``), of which the chunks are read as a whole;
- memory, also masked, memory-mapped or in batches, and Dask arrays (extra ``dask``).

Tables (extra ``data``) are .csv, .tsv, .csv.gz, .tsv.gz, .parquet, .arrow and .feather files, and
folders written by ``save_to_disk`` of Hugging Face's ``datasets``. Their features are columns of
numbers, and in Parquet and Arrow files the entries of lists that all have one length.

Images (extra ``images``) are PNG, JPEG, WebP and TIFF files. They, and arrays of one example, may
lie in .tar archives.

Files are named by path, or by an address such as ``s3://bucket/x.npy`` (extra ``remote``, and the
package for this kind of address, here s3fs).

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

from .hints import Hint as Hint
from .hints import hints as hints
from .measuring import measure as measure
from .normalizing import normalize as normalize
from .statistics import Statistics as Statistics
from .statistics import merge as merge

__all__ = ["Hint", "Statistics", "hints", "measure", "merge", "normalize"]
