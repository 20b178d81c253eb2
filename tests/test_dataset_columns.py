"""Parquet and Arrow files: decimals, lists, notes of pandas, addresses."""

import base64
import contextlib
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

from batchnorm import dataset
from batchnorm.dataset.sources import arrow_files, blocks, columns, parquet_files
from batchnorm.errors import ArgumentError, DTypeError

pa = pytest.importorskip("pyarrow")
csv = pytest.importorskip("pyarrow.csv")
feather = pytest.importorskip("pyarrow.feather")
parquet = pytest.importorskip("pyarrow.parquet")


def write(table, path, **options):
    """Write a table as the suffix of `path` says; .arrow is a stream."""
    if path.suffix == ".parquet":
        parquet.write_table(table, path, **{"row_group_size": 30, **options})
    elif path.suffix == ".feather":
        feather.write_feather(table, path, **{"chunksize": 30, **options})
    elif path.suffix == ".arrow":
        with pa.ipc.new_stream(path, table.schema, **options) as stream:
            stream.write_table(table, max_chunksize=30)
    else:
        with pa.output_stream(path, "gzip" if path.suffix == ".gz" else None) as stream:
            separator = "\t" if ".tsv" in path.name else ","
            csv.write_csv(table, stream, csv.WriteOptions(delimiter=separator))
    return path


def read(path):
    """Read a table that `dataset.normalize` has written."""
    if path.suffix == ".parquet":
        return parquet.read_table(path)
    opened = pa.ipc.open_file if path.read_bytes()[:6] == b"ARROW1" else pa.ipc.open_stream
    return opened(path).read_all()


ARROW = [".parquet", ".arrow", ".feather"]
EVERY = [*ARROW, ".csv", ".tsv", ".csv.gz", ".tsv.gz"]


@pytest.fixture(params=ARROW)
def path(request, tmp_path):
    return tmp_path / f"t{request.param}"


# ---- every kind of table ------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", EVERY)
@pytest.mark.parametrize("block_bytes", [1 << 25, 1 << 8])
def test_measure_has_the_same_values_from_every_kind_of_table(
    suffix, block_bytes, tmp_path, rng, monkeypatch
):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", block_bytes)
    x = rng.normal(1e4, 1.0, (100, 3))
    gone = rng.random(x.shape) < 0.2
    table = pa.table({n: pa.array(x[:, k], mask=gone[:, k]) for k, n in enumerate("abc")})
    table = table.append_column("s", pa.array(["text"] * 100))
    path = write(table, tmp_path / f"t{suffix}")
    found = dataset.measure(path, numeric=True, missing="skip")
    assert found.names == ("a", "b", "c")
    assert found.missing.tolist() == gone.sum(0).tolist()
    present = [x[~gone[:, k], k].astype(np.longdouble) for k in range(3)]
    np.testing.assert_allclose(found.mean, [float(v.mean()) for v in present], rtol=1e-14)
    np.testing.assert_allclose(found.var(), [float(v.var()) for v in present], rtol=1e-9)


@pytest.mark.parametrize("suffix", EVERY)
def test_measure_and_normalize_read_every_kind_of_table_by_fsspec(suffix, tmp_path):
    fsspec = pytest.importorskip("fsspec")
    table = pa.table({"a": np.arange(100.0), "b": np.arange(100.0) ** 2})
    local = write(table, tmp_path / f"t{suffix}")
    memory = fsspec.filesystem("memory")
    memory.pipe(f"/tables/t{suffix}", local.read_bytes())
    try:
        address = f"memory://tables/t{suffix}"
        here, there = dataset.measure(local), dataset.measure(address)
        assert there.files == (address,)
        assert (there.mean == here.mean).all()
        assert (there.moments.m2 == here.moments.m2).all()
        assert dataset.measure("memory://tables").files == ("memory:///" + address[9:],)
        dataset.normalize(local, here, tmp_path / f"y{suffix}")
        dataset.normalize(address, here, tmp_path / f"z{suffix}")
        assert (tmp_path / f"y{suffix}").read_bytes() == (tmp_path / f"z{suffix}").read_bytes()
        memory.pipe(f"/tables/t{suffix}", local.read_bytes()[:-12])
        if ".gz" in suffix or suffix in ARROW:
            with pytest.raises(ArgumentError, match=rf"{address}: is damaged, cut short"):
                dataset.measure(address)
    finally:
        memory.rm("/tables", recursive=True)


@pytest.mark.parametrize("source", EVERY)
@pytest.mark.parametrize("target", EVERY)
def test_normalize_writes_every_kind_of_table(source, target, tmp_path):
    table = pa.table({"s": ["x", "y"] * 50, "a": np.arange(100.0), "n": [None] * 99 + [1.5]})
    path = write(table, tmp_path / f"t{source}")
    found = dataset.measure(path, columns=["a", "n"], missing="skip")
    out = tmp_path / f"y{target}"
    dataset.normalize(path, found, out)
    again = dataset.measure(out, columns=["a", "n"], missing="skip")
    np.testing.assert_allclose(again.mean, 0, atol=1e-14)
    np.testing.assert_allclose(again.var()[0], 1, rtol=1e-5)
    assert again.missing.tolist() == [0, 99]
    if target in ARROW:
        y = read(out)
        assert y.column_names == ["s", "a", "n"]
        assert y["s"].to_pylist() == ["x", "y"] * 50
        assert y["n"].null_count == 99


def test_measure_does_not_take_a_network_that_fails_for_damage(tmp_path, monkeypatch):
    def fail(path):
        raise TimeoutError("no answer")

    path = write(pa.table({"a": [1.0]}), tmp_path / "t.parquet")
    monkeypatch.setattr(parquet_files, "open_arrow", fail)
    with pytest.raises(ArgumentError, match=r"t\.parquet: cannot be read \(no answer\)"):
        dataset.measure(path)


@pytest.mark.parametrize("suffix", EVERY)
def test_measure_defines_every_kind_of_table_without_rows(suffix, tmp_path):
    path = write(pa.table({"a": pa.array([], pa.float64())}), tmp_path / f"t{suffix}")
    found = dataset.measure(path)
    assert (found.names, found.count.tolist()) == (("a",), [0])


@pytest.mark.parametrize("suffix", EVERY)
def test_measure_says_where_every_kind_of_table_lacks_a_value(suffix, tmp_path):
    table = pa.table({"a": np.arange(100.0), "b": [*range(70), None, *range(29)]})
    path = write(table, tmp_path / f"t{suffix}")
    with pytest.raises(ArgumentError, match=rf"t\{suffix}: .* feature 1 \('b'\) at row 70 "):
        dataset.measure(path)


@pytest.mark.parametrize("suffix", EVERY)
def test_measure_resumes_every_kind_of_table(suffix, tmp_path, rng):
    (tmp_path / "x").mkdir()
    for k in range(3):
        write(pa.table({"a": rng.normal(1e4, 1, 100)}), tmp_path / "x" / f"{k}{suffix}")
    begun, notes = [], []

    def stop_at_the_last(label, done, whole):
        begun.append(label)
        if label.endswith(f"2{suffix}"):
            raise KeyboardInterrupt

    out = tmp_path / "s.npz"
    with pytest.raises(KeyboardInterrupt):
        dataset.measure(tmp_path / "x", out=out, progress=stop_at_the_last)
    found = dataset.measure(tmp_path / "x", out=out, note=notes.append)
    assert "2 of 3 files were measured by an interrupted run" in notes[0]
    assert found == dataset.measure(tmp_path / "x")


# ---- digits -------------------------------------------------------------------------------------


def decimals(values, precision=38, scale=0):
    return pa.array([Decimal(v) for v in values], pa.decimal128(precision, scale))


def test_measure_refuses_decimals_that_float64_rounds(path):
    write(pa.table({"a": decimals(range(10**20, 10**20 + 100))}), path)
    greatest = 99 if path.suffix == ".parquet" else 29  # of the first batch
    said = rf"column 'a': decimals must be below 2\*\*53.* got {10**20 + greatest}\."
    with pytest.raises(ArgumentError, match=said):
        dataset.measure(path)
    one = dataset.measure(np.array([[1.0], [3.0]]))
    one = dataset.Statistics(one.moments, one.missing, ("a",))
    with pytest.raises(ArgumentError, match=said):
        dataset.normalize(path, one, path.with_name("y.parquet"))
    assert not path.with_name("y.parquet").exists()


def test_measure_refuses_decimals_whose_spread_float64_rounds(path):
    # 1e15 + k/100: float64 has steps of 1/8 there.
    values = [Decimal(10**15) + Decimal(k) / 100 for k in range(100)]
    write(pa.table({"a": decimals(values, 38, 2)}), path)
    said = r"column 'a': decimal128\(38, 2\) values must differ.* 1000000000000000\.00 to "
    with pytest.raises(ArgumentError, match=said):
        dataset.measure(path)
    one = dataset.measure(np.array([[1.0], [3.0]]))
    one = dataset.Statistics(one.moments, one.missing, ("a",))
    with pytest.raises(ArgumentError, match=said):
        dataset.normalize(path, one, path.with_name("y.parquet"))
    assert not path.with_name("y.parquet").exists()


@pytest.mark.parametrize(
    ("values", "precision", "scale"),
    [
        ([Decimal(k) / 8 for k in range(100)], 38, 18),  # zeros that Spark and others append
        ([Decimal("0.1")] * 100, 38, 18),  # constant
        ([Decimal(10**15 + k) for k in range(100)], 18, 0),
        ([Decimal(-k) / 100 for k in range(100)], 9, 2),
        ([Decimal(k) * 1000 for k in range(100)], 10, -3),
        ([None] * 100, 38, 18),
    ],
)
def test_measure_is_exact_for_decimals(values, precision, scale, path):
    table = pa.table({"a": pa.array(values, pa.decimal128(precision, scale))})
    if scale < 0:  # which Parquet does not have
        path = path.with_suffix(".arrow")
    write(table, path)
    found = dataset.measure(path, missing="skip")
    present = [Fraction(v) for v in values if v is not None]
    mean = sum(present) / max(len(present), 1)
    var = sum((v - mean) ** 2 for v in present) / max(len(present), 1)
    assert found.count.tolist() == [len(present)]
    np.testing.assert_allclose(found.mean, float(mean), rtol=1e-15)
    if present:
        np.testing.assert_allclose(found.var(), float(var), rtol=1e-12)


def test_decimals_become_the_nearest_float64(rng):
    lengths, numbers = rng.integers(1, 19, 500), rng.integers(2**62, size=500)
    unscaled = [str(a)[:k] for k, a in zip(lengths, numbers, strict=True)]
    values = [Decimal(f"{text}e-9") for text in unscaled]
    found = columns.to_float64(decimals(values, 38, 9), columns.Column("a"))
    assert found[0].tolist() == [float(value) for value in values]


@pytest.mark.parametrize("kind", [pa.int64(), pa.uint64()])
def test_measure_refuses_integers_in_lists_that_float64_rounds(kind, path):
    values = pa.array([[1, 2], [2**53 + 1, 0]], pa.list_(kind, 2))
    write(pa.table({"e": values}), path)
    with pytest.raises(ArgumentError, match=rf"column 'e': integers .* got {2**53 + 1}\."):
        dataset.measure(path)


# ---- lists --------------------------------------------------------------------------------------


def test_measure_takes_each_entry_of_lists_of_one_length(path, rng, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1 << 10)
    x = rng.normal(1e3, 1.0, (200, 4)).astype(np.float32)
    y = rng.normal(size=200)
    lists = pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), 4)
    write(pa.table({"e": lists, "y": y}), path)
    found = dataset.measure(path)
    assert found.names == ("e[0]", "e[1]", "e[2]", "e[3]", "y")
    np.testing.assert_allclose(found.mean, [*x.astype(float).mean(0), y.mean()], rtol=1e-13)
    assert dataset.measure(path, columns=["y", "e"]).names == ("y", *found.names[:4])
    assert dataset.measure(path, columns=found.names) == found


def test_measure_leaves_null_lists_and_null_entries_out(path):
    lists = pa.array([[1, None], None, [3, 4], [None, 8]], pa.list_(pa.int16(), 2))
    write(pa.table({"e": lists}), path)
    found = dataset.measure(path, missing="skip")
    assert (found.missing.tolist(), found.mean.tolist()) == ([2, 2], [2.0, 6.0])
    with pytest.raises(ArgumentError, match=r"feature 0 \('e\[0\]'\) at row 1 "):
        dataset.measure(path)


@pytest.mark.parametrize("kind", [pa.float32(), pa.int16()])
def test_normalize_keeps_lists(kind, path):
    lists = pa.array([[1, None], None, [3, 4], [None, 8]], pa.list_(kind, 2))
    write(pa.table({"e": lists, "s": list("wxyz")}), path)
    found = dataset.measure(path, columns=["e"], missing="skip")
    out = path.with_name("y" + path.suffix)
    dataset.normalize(path, found, out, eps=0.0)
    y = read(out)
    assert y["e"].to_pylist() == [[-1, None], None, [1, -1], [None, 1]]
    assert y.schema.field("e").type.value_type == (kind if kind == pa.float32() else pa.float64())
    assert y["s"].to_pylist() == list("wxyz")


def test_normalize_names_a_list_of_another_length(path):
    write(pa.table({"e": pa.array([[1, 2], [3, 4]], pa.list_(pa.int16(), 2))}), path)
    found = dataset.measure(path)
    write(pa.table({"e": pa.array([[1, 2, 3]], pa.list_(pa.int16(), 3))}), path)
    with pytest.raises(ArgumentError, match=r"no column 'e\[0\]'\. It has 'e'"):
        dataset.normalize(path, found, path.with_name("y.parquet"))


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.float32()), pa.large_list(pa.float32()), pa.list_(pa.string(), 1)]
)
def test_measure_refuses_other_lists(kind, path):
    write(pa.table({"e": pa.array([None], kind), "a": [1.0]}), path)
    said = "or lists of numbers of one fixed length" if "large" in str(kind) else "'e' of type"
    with pytest.raises(DTypeError, match=said):
        dataset.measure(path)
    assert dataset.measure(path, numeric=True).names == ("a",)


def test_measure_refuses_a_name_that_a_column_and_an_entry_have(path):
    lists = pa.array([[1, 2]], pa.list_(pa.int16(), 2))
    write(pa.table({"e": lists, "e[0]": [1.0]}), path)
    with pytest.raises(ArgumentError, match=r"different names, got 'e\[0\]' for a column and"):
        dataset.measure(path)


# ---- pandas -------------------------------------------------------------------------------------


def write_frame(frame, path):
    if path.suffix == ".parquet":
        frame.to_parquet(path)
    else:
        write(pa.Table.from_pandas(frame), path)


@pytest.mark.parametrize("index", ["range", "dates", "numbers"])
def test_normalize_keeps_what_pandas_notes_of_a_table(index, path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(
        {
            "a": np.array([1, 3, 5], np.int32),
            "b": pandas.array([1, None, 3], "Int64"),
            "f": np.array([1, 3, 5], np.float32),
            "kept": np.array([1, 2, 3], np.int8),
            "kind": pandas.Categorical(["x", "y", "x"]),
        }
    )
    if index == "dates":
        frame.index = pandas.date_range("2020-01-01", periods=3, name="day")
    elif index == "numbers":
        frame.index = [30, 10, 20]
    write_frame(frame, path)
    found = dataset.measure(path, columns=["a", "b", "f"], missing="skip")
    out = path.with_name("y" + path.suffix)
    dataset.normalize(path, found, out, eps=0.0)
    y = read(out).to_pandas()
    assert y.index.equals(frame.index)
    assert y.index.name == frame.index.name
    assert [str(kind) for kind in y.dtypes] == ["float64", "float64", "float32", "int8", "category"]
    assert y["b"].isna().tolist() == [False, True, False]
    np.testing.assert_allclose(y["a"], [-(1.5**0.5), 0, 1.5**0.5], rtol=1e-15)
    assert y["kept"].tolist() == [1, 2, 3]
    assert y["kind"].tolist() == ["x", "y", "x"]


def test_measure_does_not_take_the_index_of_pandas_for_a_feature(path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"a": [1.0, 3.0]}, index=[10, 20])
    write_frame(frame, path)
    assert dataset.measure(path).names == ("a",)
    assert dataset.measure(path, columns=["__index_level_0__"]).mean.tolist() == [15.0]


# ---- Parquet ------------------------------------------------------------------------------------


def _ends_of_pages(metadata):
    """Where the last page of each column ends, in each group of rows."""
    ends = []
    for group in range(metadata.num_row_groups):
        for k in range(metadata.num_columns):
            column = metadata.row_group(group).column(k)
            begin = column.dictionary_page_offset
            begin = column.data_page_offset if begin is None else begin
            ends.append(begin + column.total_compressed_size)
    return ends


def test_normalize_keeps_codecs_and_groups_and_writes_checksums(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1 << 10)
    path, out = tmp_path / "t.parquet", tmp_path / "y.parquet"
    x = np.arange(1000.0)
    lists = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(2000.0)), 2)
    table = pa.table({"a": x, "b": x, "e": lists, "s": ["x"] * 1000})
    codecs = {"a": "zstd", "b": "none", "e.list.element": "gzip", "s": "snappy"}
    with parquet.ParquetWriter(path, table.schema, compression=codecs) as writer:
        for start, rows in ((0, 100), (100, 30), (130, 0), (130, 120), (250, 150), (400, 600)):
            writer.write_table(table.slice(start, rows), row_group_size=max(rows, 1))
    found = dataset.measure(path, columns=["a", "b", "e"])
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1 << 13)  # a group takes up to 4 blocks
    dataset.normalize(path, found, out)
    before, after = parquet.read_metadata(path), parquet.read_metadata(out)
    sizes = [after.row_group(k).num_rows for k in range(after.num_row_groups)]
    assert sizes[:4] == [100, 30, 120, 150]
    assert sum(sizes) == 1000
    assert len(sizes) <= 7
    for k in range(after.num_columns):
        assert after.row_group(0).column(k).compression == before.row_group(0).column(k).compression
    assert parquet.read_table(out)["s"].to_pylist() == ["x"] * 1000
    content = bytearray(out.read_bytes())
    content[_ends_of_pages(after)[0] - 2] ^= 1
    out.write_bytes(bytes(content))
    with pytest.raises(ArgumentError, match="verify page integrity"):
        dataset.measure(out, columns=["a", "b"])


def test_normalize_gathers_rows_into_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1 << 12)
    path = write(pa.table({"a": np.arange(1000.0)}), tmp_path / "t.feather")
    dataset.normalize(path, dataset.measure(path), tmp_path / "y.parquet")
    assert parquet.read_metadata(tmp_path / "y.parquet").num_row_groups == 1


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_measure_refuses_each_damaged_page_of_parquet(compression, tmp_path):
    path = tmp_path / "t.parquet"
    table = pa.table({"a": np.arange(90.0), "b": np.arange(90)})
    write(table, path, compression=compression, write_page_checksum=True, use_dictionary=["b"])
    content, metadata = path.read_bytes(), parquet.read_metadata(path)
    found = dataset.measure(path)
    ends = _ends_of_pages(metadata)
    assert len(ends) == 6
    for end in ends:
        damaged = bytearray(content)
        damaged[end - 2] ^= 4
        path.write_bytes(bytes(damaged))
        with pytest.raises(ArgumentError, match=r"t\.parquet: is damaged.*verify page integrity"):
            dataset.measure(path)
    path.write_bytes(content)
    assert dataset.measure(path) == found


def test_measure_refuses_parquet_whose_types_were_damaged(tmp_path):
    path = write(pa.table({"a": decimals([1, 2], 9, 2)}), tmp_path / "t.parquet")
    written = parquet.read_metadata(path).metadata[b"ARROW:schema"]
    schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(written)))
    other = schema.set(0, pa.field("a", pa.decimal128(9, 3))).serialize().to_pybytes()
    assert len(other) == len(base64.b64decode(written))
    path.write_bytes(path.read_bytes().replace(written, base64.b64encode(other)))
    with pytest.raises(ArgumentError, match=r"'a' is decimal128\(9, 2\) in one place and"):
        dataset.measure(path)


# ---- Arrow --------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", [None, "lz4", "zstd"])
@pytest.mark.parametrize("new", [pa.ipc.new_file, pa.ipc.new_stream])
@pytest.mark.parametrize("name", ["t.arrow", "t.feather"])
def test_measure_reads_both_formats_of_arrow(compression, new, name, tmp_path):
    path = tmp_path / name
    table = pa.table({"s": ["x"] * 100, "a": np.arange(100.0), "b": np.arange(100.0)})
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with new(path, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=7)
    told = []
    found = dataset.measure(
        path, columns=["b", "a"], progress=lambda _, done, whole: told.append(done / whole)
    )
    assert (found.mean.tolist(), found.count.tolist()) == ([49.5] * 2, [100] * 2)
    assert 0.5 < told[-1] <= 1


def test_measure_reads_wide_batches_of_arrow_some_columns_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1 << 10)
    monkeypatch.setattr(arrow_files, "BATCH_BLOCKS", 2)
    table = pa.table({f"c{k}": np.arange(500.0) + k for k in range(8)})
    path = write(table, tmp_path / "t.feather", chunksize=500, compression="uncompressed")
    file = arrow_files.open_arrow_file(
        str(path), columns=None, numeric=False, dialect=arrow_files.Dialect()
    )
    assert file.together == 1
    assert max(block.values.nbytes for block in file.blocks()) <= 1 << 10
    assert dataset.measure(path).mean.tolist() == [249.5 + k for k in range(8)]


def test_measure_refuses_a_stream_that_ends_between_batches(tmp_path):
    path = write(pa.table({"a": np.arange(90.0)}), tmp_path / "t.arrow")
    content = path.read_bytes()
    stream = pa.BufferReader(content)
    reader = pa.ipc.open_stream(stream)
    reader.read_next_batch()
    path.write_bytes(content[: stream.tell()])
    assert pa.ipc.open_stream(path).read_all().num_rows == 30  # pyarrow does not notice
    with pytest.raises(ArgumentError, match=r"t\.arrow: is damaged, cut short"):
        dataset.measure(path)
    path.write_bytes(content + content[-64:])
    with pytest.raises(ArgumentError, match="goes on behind the mark of its end"):
        dataset.measure(path)


def test_measure_refuses_an_index_of_arrow_that_has_lost_all_rows(tmp_path):
    path = write(pa.table({"a": np.arange(90.0)}), tmp_path / "t.feather", chunksize=90)
    content = path.read_bytes()
    lost = []
    for at in range(len(content) - 300, len(content) - 10):
        damaged = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
        with contextlib.suppress(pa.ArrowException, OSError):
            if pa.ipc.open_file(damaged).num_record_batches == 0:
                lost.append(damaged)
    assert lost
    for damaged in lost:
        path.write_bytes(damaged)
        with pytest.raises(ArgumentError, match=r"t\.feather: is damaged.*lists no rows"):
            dataset.measure(path)


def test_measure_takes_arrow_files_without_rows(path):
    write(pa.table({"a": pa.array([], pa.float64())}), path)
    assert dataset.measure(path).count.tolist() == [0]


def test_measure_refuses_version_1_of_feather(tmp_path):
    (tmp_path / "t.feather").write_bytes(b"FEA1" + bytes(60) + b"FEA1")
    with pytest.raises(ArgumentError, match="version 2 of Feather, got version 1"):
        dataset.measure(tmp_path / "t.feather")


def test_normalize_keeps_the_format_of_arrow_files(tmp_path):
    table = pa.table({"a": np.arange(90.0)}, metadata={"note": "kept"})
    stream = write(table, tmp_path / "t.arrow")
    file = tmp_path / "u.arrow"
    with pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    found = dataset.measure(stream)
    dataset.normalize(stream, found, tmp_path / "y.arrow")
    dataset.normalize(file, found, tmp_path / "z.arrow")
    assert (tmp_path / "z.arrow").read_bytes()[:6] == b"ARROW1" != stream.read_bytes()[:6]
    y, z = pa.ipc.open_stream(tmp_path / "y.arrow").read_all(), read(tmp_path / "z.arrow")
    assert y.equals(z, check_metadata=True)
    assert y.schema.metadata == {b"note": b"kept"}
