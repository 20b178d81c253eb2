"""Measure and normalize damaged tables, and print what came of each as JSON.

A process of its own, since pyarrow may end it. Called with a folder for the tables.
"""

import json
import random
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import csv, feather, parquet

from batchnorm import dataset
from batchnorm.errors import BatchNormError

FEATURES = ["a", "b", "f", "d", "m"]
CASES = 60


def undamaged():
    rng = np.random.default_rng(0)
    n = 60
    return pa.table(
        {
            "a": rng.normal(size=n),
            "b": pa.array(rng.integers(0, 100, n), pa.int32()),
            "s": [f"text {k % 7}\n" for k in range(n)],
            "f": pa.array(rng.normal(size=n).astype("f4")),
            "d": pa.array([None if k % 9 == 0 else k for k in range(n)], pa.int64()),
            "m": pa.array(range(n), pa.int32()).cast(pa.decimal128(14, 2)),
        }
    )


def write(table, path):
    if path.suffix == ".parquet":
        parquet.write_table(table, path, row_group_size=25, write_page_checksum=True)
    elif path.suffix == ".feather":
        feather.write_feather(table, path, chunksize=25)
    elif path.suffix == ".arrow":
        with pa.ipc.new_stream(str(path), table.schema) as stream:
            stream.write_table(table, max_chunksize=25)
    else:
        with pa.output_stream(str(path), "gzip" if path.suffix == ".gz" else None) as stream:
            csv.write_csv(table, stream)


def read(path):
    """Mean of each feature as pyarrow reads them, of whatever is there."""
    if path.suffix == ".parquet":
        table = parquet.ParquetFile(path, page_checksum_verification=True).read(FEATURES)
    elif path.suffix == ".feather":
        options = pa.ipc.IpcReadOptions(included_fields=[0, 1, 3, 4, 5])
        table = pa.ipc.open_file(str(path), options=options).read_all()
    elif path.suffix == ".arrow":
        table = pa.ipc.open_stream(pa.OSFile(str(path))).read_all()
    else:
        content = path.read_bytes()
        table = csv.read_csv(
            pa.BufferReader(content if content.endswith(b"\n") else content + b"\n"),
            csv.ReadOptions(block_size=len(content) + 1),
            convert_options=csv.ConvertOptions(
                column_types=dict.fromkeys(FEATURES, pa.float64()),
                include_columns=FEATURES,
                strings_can_be_null=False,
            ),
        )
    # A type that was damaged into float16 has no cast in older versions of pyarrow.
    half = pa.types.is_float16
    values = [
        table[name].to_numpy().astype(float)
        if half(table[name].type)
        else table[name].cast(pa.float64(), safe=False).to_numpy()
        for name in FEATURES
    ]
    return [np.nanmean(v) if np.isfinite(v).any() else 0.0 for v in values]


def damage(content, random):
    content = bytearray(content)
    at = random.randrange(len(content))
    how = random.choice(["flip", "flip", "cut", "insert", "erase"])
    if how == "flip":
        content[at] ^= 1 << random.randrange(8)
    elif how == "cut":
        del content[at:]
    elif how == "insert":
        content[at:at] = random.randbytes(random.randrange(1, 9))
    else:
        content[at : at + 16] = bytes(len(content[at : at + 16]))
    return f"{how} at {at}", bytes(content)


def outcome(path, true):
    out = path.with_name("y.parquet")
    found, said = None, ""
    try:
        found = dataset.measure(path, columns=FEATURES, missing="skip")
    except BatchNormError as error:
        said = str(error)
    assert "\n" not in said
    try:
        dataset.normalize(path, true, out)
    except BatchNormError:
        assert not out.exists()
    out.unlink(missing_ok=True)
    if found is None:
        return "refused"
    if (found.mean == true.mean).all() and (found.moments.m2 == true.moments.m2).all():
        return "true"
    return "as read" if np.allclose(found.mean, read(path), rtol=1e-9) else "wrong"


def main(folder):
    for suffix in (".parquet", ".feather", ".arrow", ".csv", ".csv.gz"):
        path = Path(folder) / f"t{suffix}"
        write(undamaged(), path)
        true = dataset.measure(path, columns=FEATURES, missing="skip")
        content, source = path.read_bytes(), random.Random(suffix)
        for _ in range(CASES):
            what, damaged = damage(content, source)
            path.write_bytes(damaged)
            try:
                said = outcome(path, true)
            except BaseException as error:
                said = f"{type(error).__name__}: {error}"
            print(json.dumps([suffix, what, said]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
