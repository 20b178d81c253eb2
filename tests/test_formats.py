"""Every format of data sets: right values, damage, nothing, missing values, and interruption."""

import gzip
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from batchnorm import Moments, dataset
from batchnorm.errors import BatchNormError

pa = pytest.importorskip("pyarrow")
for needed in ("pandas", "h5py", "zarr", "fsspec", "PIL"):
    pytest.importorskip(needed)

DOCS = Path(__file__).parents[1] / "docs" / "howto" / "large-data.md"


def some_data(seed=0, rows=300):
    return np.random.default_rng(seed).normal([1e3, -5.0, 0.1], [1.0, 20.0, 1e-3], (rows, 3))


# ---- writers: each makes a file or folder of an (N, 3) array, of which NaN are missing ----------


def write_npy(path, x):
    np.save(path, x)


def write_npz(path, x):
    np.savez_compressed(path, x=x)


def write_hdf5(path, x):
    import h5py

    with h5py.File(path, "w") as file:
        # Rows of a chunk: none for an empty array.
        chunks = (min(64, len(x)), 3) if len(x) else None
        file.create_dataset("x", data=x, chunks=chunks, fletcher32=chunks is not None)


def write_zarr(path, x):
    import zarr

    zarr.save_array(str(path), x)


def frame(x):
    import pandas as pd

    return pd.DataFrame(x, columns=["a", "b", "c"])


def write_csv(path, x):
    frame(x).to_csv(path, index=False)


def write_tsv(path, x):
    frame(x).to_csv(path, index=False, sep="\t")


def write_csv_gz(path, x):
    path.write_bytes(gzip.compress(frame(x).to_csv(index=False).encode()))


def table(x):
    columns = [pa.array(x[:, k], mask=np.isnan(x[:, k])) for k in range(3)]
    return pa.table(columns, names=["a", "b", "c"])


def write_parquet(path, x):
    import pyarrow.parquet as pq

    pq.write_table(table(x), path, row_group_size=100, write_page_checksum=True)


def write_arrow(path, x):
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table(x).schema) as writer:
        writer.write_table(table(x), max_chunksize=100)


def write_feather(path, x):
    import pyarrow.feather as feather

    feather.write_feather(table(x), str(path), compression="zstd", chunksize=100)


def write_hugging_face(path, x):
    path.mkdir()
    name = "data-00000-of-00001.arrow"
    with pa.OSFile(str(path / name), "wb") as f, pa.ipc.new_stream(f, table(x).schema) as writer:
        writer.write_table(table(x), max_chunksize=100)
    (path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    (path / "dataset_info.json").write_text("{}")


def add_to_tar(tar, name, data):
    about = tarfile.TarInfo(name)
    about.size = len(data)
    tar.addfile(about, io.BytesIO(data))


def write_tar(path, x):
    with tarfile.open(path, "w") as tar:
        for k, row in enumerate(x):
            file = io.BytesIO()
            np.save(file, row)
            add_to_tar(tar, f"{k:04}.npy", file.getvalue())


FORMATS = {
    ".npy": write_npy,
    ".npz": write_npz,
    ".h5": write_hdf5,
    ".zarr": write_zarr,
    ".csv": write_csv,
    ".tsv": write_tsv,
    ".csv.gz": write_csv_gz,
    ".parquet": write_parquet,
    ".arrow": write_arrow,
    ".feather": write_feather,
    "Hugging Face": write_hugging_face,
    ".tar of .npy": write_tar,
}


def place(folder, kind, name="x"):
    return folder / f"{name}{kind.split()[0] if kind.startswith('.') else '_saved'}"


@pytest.fixture(params=FORMATS, ids=[kind.replace(" ", "_") for kind in FORMATS])
def kind(request):
    return request.param


def written(folder, kind, x, name="x"):
    path = place(folder, kind, name)
    FORMATS[kind](path, x)
    return path


def test_formats_give_the_right_values(kind, tmp_path):
    x = some_data()
    found = dataset.measure(written(tmp_path, kind, x), extremes=True)
    expected = Moments.of(x)
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-12)
    np.testing.assert_allclose(found.var(), expected.var(), rtol=1e-9)
    np.testing.assert_array_equal(found.extremes, [x.min(0), x.max(0)])
    np.testing.assert_array_equal(found.count, [300] * 3)


def test_formats_of_no_rows_have_no_values(kind, tmp_path):
    path = written(tmp_path, kind, some_data(rows=0))
    if kind.startswith(".tar"):  # says nothing of its features
        with pytest.raises(BatchNormError, match=r"x\.tar"):
            dataset.measure(path)
        return
    found = dataset.measure(path)
    np.testing.assert_array_equal(found.count, [0, 0, 0])


def test_formats_with_missing_values_leave_them_out(kind, tmp_path):
    x = some_data()
    x[7, 1] = np.nan
    path = written(tmp_path, kind, x)
    with pytest.raises(BatchNormError, match="missing"):
        dataset.measure(path)
    found = dataset.measure(path, missing="skip")
    np.testing.assert_array_equal(found.missing, [0, 1, 0])
    np.testing.assert_allclose(found.mean, np.nanmean(x, axis=0), rtol=1e-12)


def largest_file(path):
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return max(files, key=lambda p: p.stat().st_size)


def test_formats_cut_short_are_refused(kind, tmp_path):
    path = written(tmp_path, kind, some_data())
    inside = largest_file(path)
    inside.write_bytes(inside.read_bytes()[: inside.stat().st_size // 2])
    if kind in (".csv", ".tsv"):  # text has no end of its own, but for a line that is torn
        inside.write_bytes(inside.read_bytes().rpartition(b"," if kind == ".csv" else b"\t")[0])
    with pytest.raises(BatchNormError, match=path.name):
        dataset.measure(path)


@pytest.mark.parametrize("where", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("summed", [".npz", ".h5", ".csv.gz", ".parquet"])
def test_formats_with_checksums_notice_a_changed_byte(summed, where, tmp_path):
    x = some_data()
    path = written(tmp_path, summed, x)
    data = bytearray(path.read_bytes())
    data[int(len(data) * where)] ^= 0x10
    path.write_bytes(bytes(data))
    try:
        found = dataset.measure(path)
    except BatchNormError:
        return
    np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-12)  # a byte that means nothing


def test_formats_go_on_after_an_interruption_with_the_same_bits(kind, tmp_path):
    folder, out = tmp_path / "data", tmp_path / "s.npz"
    folder.mkdir()
    for k in range(3):
        written(folder, kind, some_data(seed=k), name=f"{k}")
    expected = dataset.measure(folder)
    last = sorted(folder.iterdir())[-1].name

    def stop(label, done, whole):
        if last in label:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dataset.measure(folder, out=out, progress=stop)
    assert not out.exists()
    read, notes = set(), []
    found = dataset.measure(
        folder, out=out, progress=lambda label, *_: read.add(label), note=notes.append
    )
    assert found == expected
    assert all(last in label for label in read)
    assert any("resuming: 2 of 3" in text for text in notes)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "s.npz"]


def test_formats_are_the_same_at_an_address(kind, tmp_path):
    path = written(tmp_path, kind, some_data())
    found = dataset.measure(f"file://{path}")
    assert found.moments == dataset.measure(path).moments


def test_docs_list_the_formats():
    table = DOCS.read_text().partition("## What each kind of file notices")[2].partition("##")[0]
    for kind in FORMATS:
        assert kind.split()[0] in table, kind
