"""Statistics of CSV and Parquet files, and what is written of them."""

import gzip
import sys

import numpy as np
import pytest

from batchnorm import dataset
from batchnorm.dataset import table_writers
from batchnorm.dataset.sources import blocks, csv_files, parquet_files, tables
from batchnorm.errors import ArgumentError, BatchNormError, DTypeError, ShapeError

pa = pytest.importorskip("pyarrow")
csv = pytest.importorskip("pyarrow.csv")
parquet = pytest.importorskip("pyarrow.parquet")

SMALL = """a,b,name
1,2,x
3,,y
5,4,"z, w"
"""


def written(path, text):
    path.write_text(text)
    return path


@pytest.fixture(params=[".csv", ".parquet"])
def table(request, tmp_path, rng, monkeypatch):
    """Write columns to a file that takes many batches to read."""
    monkeypatch.setattr(csv_files, "CSV_BYTES", 1 << 10)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1 << 10)

    def write(columns, name="t"):
        path = tmp_path / f"{name}{request.param}"
        values = pa.table(columns)
        if request.param == ".csv":
            csv.write_csv(values, path)
        else:
            parquet.write_table(values, path, row_group_size=300)
        return path

    return write


def test_measure_of_columns_is_exact(table, rng):
    x = rng.normal(1e4, 1.0, (1000, 3))
    found = dataset.measure(table(dict(zip("abc", x.T, strict=True))))
    assert found.names == ("a", "b", "c")
    np.testing.assert_allclose(found.mean, x.mean(0, np.longdouble).astype(float), rtol=1e-12)
    np.testing.assert_allclose(found.var(), x.var(0, np.longdouble).astype(float), rtol=1e-9)
    np.testing.assert_array_equal(found.count, 1000)


def test_measure_counts_null_in_each_column(table, rng):
    x = rng.standard_normal((1000, 2))
    gone = rng.random(x.shape) < 0.2
    columns = {n: pa.array(x[:, k], mask=gone[:, k]) for k, n in enumerate("ab")}
    found = dataset.measure(table(columns), missing="skip")
    np.testing.assert_array_equal(found.missing, gone.sum(0))
    for k in range(2):
        np.testing.assert_allclose(found.mean[k], x[~gone[:, k], k].mean(), rtol=1e-12)


def test_measure_says_which_column_and_row_is_missing(table, rng):
    mask = np.zeros(1000, bool)
    mask[700] = True
    path = table({"a": np.ones(1000), "b": pa.array(np.ones(1000), mask=mask)})
    with pytest.raises(ArgumentError, match=rf"{path.name}: .* in feature 1 \('b'\) at row 700 "):
        dataset.measure(path)


def test_measure_takes_the_columns_asked_for_in_their_order(table):
    path = table({"a": [1.0, 3.0], "s": ["x", "y"], "b": [10, 30]})
    found = dataset.measure(path, columns=["b", "a"])
    assert found.names == ("b", "a")
    assert found.mean.tolist() == [20.0, 2.0]


def test_measure_refuses_a_column_of_text_and_names_it(table):
    path = table({"a": [1.0, 3.0], "s": ["x", "y"]})
    with pytest.raises(DTypeError, match=r"got 's' of type string\. .*--columns a"):
        dataset.measure(path)


def test_measure_refuses_a_column_that_is_not_there(table):
    path = table({"a": [1.0, 3.0]})
    with pytest.raises(
        ArgumentError, match=r"has no column 'c'\. It has 'a'\. Choose among these\."
    ):
        dataset.measure(path, columns=["c"])
    with pytest.raises(ArgumentError, match="named once each"):
        dataset.measure(path, columns=["a", "a"])


def test_measure_defines_a_table_without_rows(table):
    found = dataset.measure(table({"a": pa.array([], pa.float64())}))
    assert found.count.tolist() == [0.0]


def test_measure_refuses_tables_of_other_columns(table):
    a, b = table({"a": [1.0], "b": [2.0]}, "one"), table({"b": [1.0], "a": [2.0]}, "two")
    with pytest.raises(ShapeError, match=r"two\..* columns of .*one\..*, got 'b' for 'a'"):
        dataset.measure([a, b])
    assert dataset.measure([a, b], columns=["a", "b"]).mean.tolist() == [1.5, 1.5]


def test_measure_refuses_another_axis_than_that_of_columns(table):
    with pytest.raises(ArgumentError, match="channel_axis 1, got 0"):
        dataset.measure(table({"a": [1.0]}), channel_axis=0)


def test_measure_refuses_an_array_of_a_table(table):
    with pytest.raises(ArgumentError, match=r"array names one in a \.npz file"):
        dataset.measure(table({"a": [1.0]}), array="x")


def test_measure_has_the_same_bits_each_time(table, rng):
    path = table({"a": rng.standard_normal(5000)})
    assert dataset.measure(path) == dataset.measure(path)


def test_measure_takes_csv_without_a_line_of_names(tmp_path):
    found = dataset.measure(written(tmp_path / "t.csv", "1,2\n3,4\n"), header=False)
    assert found.names == ("f0", "f1")
    assert found.mean.tolist() == [2.0, 3.0]


def test_measure_takes_whole_numbers_that_become_fractions_later(tmp_path, monkeypatch):
    monkeypatch.setattr(csv_files, "CSV_BYTES", 64)
    text = "a\n" + "1\n" * 100 + "0.5\n" * 100
    assert dataset.measure(written(tmp_path / "t.csv", text)).mean.tolist() == [0.75]


def test_measure_refuses_text_further_down_and_names_the_column(tmp_path, monkeypatch):
    monkeypatch.setattr(csv_files, "CSV_BYTES", 64)
    path = written(tmp_path / "t.csv", "a\n" + "1\n" * 100 + "oops\n")
    said = r"t\.csv: column 'a' must be numbers, got 'oops' in row 100 .*--nulls 'oops'"
    with pytest.raises(ArgumentError, match=said) as caught:
        dataset.measure(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("t.csv", "", "must begin with a line of names, and is empty"),
        ("t.csv", "a,b\n1,2\n1\n", r"must have 2 values each.*got 1 in row 1 .*, '1'\. Quote"),
        ("t.csv", "a,a\n1,2\n", "different names, got 'a' more than once"),
        ("t.parquet", "text", r"damaged, cut short or not a \.parquet file"),
        ("t.parquet", "", r"damaged, cut short or not a \.parquet file"),
    ],
)
def test_measure_refuses_what_is_no_table(name, text, said, tmp_path):
    with pytest.raises(ArgumentError, match=said) as caught:
        dataset.measure(written(tmp_path / name, text))
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_measure_refuses_infinity_in_a_csv_file(tmp_path):
    with pytest.raises(ArgumentError, match=r"got inf in feature 0 \('a'\) at row 1 "):
        dataset.measure(written(tmp_path / "t.csv", "a\n1\ninf\n"), missing="skip")


def test_measure_takes_every_type_of_number_that_parquet_has(tmp_path):
    columns = {
        "half": pa.array(np.array([1, 3], np.float16)),
        "single": pa.array(np.array([1, 3], np.float32)),
        "whole": pa.array([1, 3], pa.int8()),
        "large": pa.array([2**52, 2**52], pa.uint64()),
        "truth": pa.array([True, False]),
        "gaps": pa.array([None, 3], pa.int32()),
        "decimal": pa.array([1, 3], pa.decimal128(10, 2)),
        "none": pa.array([None, None]),
    }
    parquet.write_table(pa.table(columns), tmp_path / "t.parquet")
    found = dataset.measure(tmp_path / "t.parquet", missing="skip")
    assert found.mean.tolist() == [2, 2, 2, 2.0**52, 0.5, 3, 2, 0]
    assert found.missing.tolist() == [0, 0, 0, 0, 0, 1, 0, 2]


@pytest.mark.parametrize("kind", [pa.int64(), pa.uint64()])
def test_measure_refuses_integers_that_float64_rounds(kind, table):
    path = table({"a": pa.array([1.0, 2.0]), "b": pa.array([None, 2**53 + 1], kind)})
    said = r"column 'b'.*: integers must be below 2\*\*53.* got 9007199254740993\."
    with pytest.raises(ArgumentError, match=said):
        dataset.measure(path, missing="skip")


def test_measure_keeps_empty_lines_of_a_single_column_as_missing(tmp_path):
    path = written(tmp_path / "t.csv", "a\n1\n\n3\n\n")
    found = dataset.measure(path, missing="skip")
    assert (found.count.tolist(), found.missing.tolist()) == ([2], [2])
    dataset.normalize(path, found, tmp_path / "y.csv", eps=0.0)
    assert (tmp_path / "y.csv").read_text() == '"a"\n-1\n\n1\n\n'
    again = dataset.measure(tmp_path / "y.csv", missing="skip")
    assert (again.count.tolist(), again.missing.tolist()) == ([2], [2])


@pytest.mark.parametrize("text", ["1,2\n3,4\n", "1,1\n3,4\n", "0.5,,nan\n1,2,3\n"])
def test_measure_refuses_a_first_row_of_numbers_for_names(text, tmp_path):
    path = written(tmp_path / "t.csv", text)
    with pytest.raises(ArgumentError, match="must begin with a line of names.*--no-header"):
        dataset.measure(path)
    dataset.measure(path, header=False, missing="skip")


def test_measure_takes_names_that_are_numbers_if_they_are_given(tmp_path):
    path = written(tmp_path / "t.csv", "1,2\n3,4\n5,6\n")
    found = dataset.measure(path, columns=["1", "2"])
    assert found.count.tolist() == [2, 2]
    dataset.normalize(path, found, tmp_path / "y.csv", eps=0.0)
    assert (tmp_path / "y.csv").read_text() == '"1","2"\n-1,-1\n1,1\n'


def test_measure_takes_what_csv_files_have_for_missing_values(tmp_path):
    texts = ["", "NA", "N/A", "n/a", "#N/A", "NULL", "null", "NaN", "nan", "-nan", "-NaN", "#NA"]
    path = written(tmp_path / "t.csv", "a,b\n" + "".join(f"1,{text}\n" for text in texts))
    assert dataset.measure(path, missing="skip").missing.tolist() == [0, len(texts)]


def test_measure_compares_names_with_the_first_table_and_keeps_them(tmp_path):
    np.save(tmp_path / "x.npy", np.ones((2, 2)))
    written(tmp_path / "y.csv", "a,b\n1,2\n")
    assert dataset.measure(tmp_path).names == ("a", "b")
    written(tmp_path / "z.csv", "b,a\n1,2\n")
    with pytest.raises(ShapeError, match=r"z\.csv.* columns of .*y\.csv.*got 'b' for 'a'"):
        dataset.measure(tmp_path)


@pytest.mark.parametrize("separator", [";", "\t"])
def test_measure_says_that_values_are_separated_by_commas(separator, tmp_path):
    path = written(tmp_path / "t.csv", f"a{separator}b\n1{separator}2\n")
    with pytest.raises(DTypeError, match="single column: values must be separated by ','"):
        dataset.measure(path)
    with pytest.raises(ArgumentError, match="single column: values must be separated by ','"):
        dataset.measure(path, columns=["a"])


def test_measure_says_of_text_in_parquet_nothing_about_lines_of_names(tmp_path):
    parquet.write_table(pa.table({"a": ["x"], "b,c": [1.0]}), tmp_path / "t.parquet")
    with pytest.raises(DTypeError, match='--columns \'?"b,c"') as caught:
        dataset.measure(tmp_path / "t.parquet")
    assert "header" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    ["ä,b\n1,2\n".encode("latin-1"), gzip.compress(b"a,b\n1,2\n", mtime=0)],
    ids=["latin", "gzip"],
)
def test_measure_refuses_text_that_is_not_utf8(content, tmp_path):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(ArgumentError, match=r"t\.csv: .*UTF-8.*Convert it"):
        dataset.measure(tmp_path / "t.csv")


def test_measure_reads_short_columns_of_parquet_together(tmp_path):
    names = [f"c{k}" for k in range(200)]
    parquet.write_table(pa.table(dict.fromkeys(names, np.ones(10))), tmp_path / "t.parquet")
    file = parquet_files.open_parquet(
        tmp_path / "t.parquet", columns=None, numeric=False, dialect=tables.Dialect()
    )
    assert len(list(file.blocks())) == 1


def test_measure_takes_many_columns_of_parquet(tmp_path, rng, monkeypatch):
    monkeypatch.setattr(parquet_files, "PARQUET_COLUMNS", 3)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1 << 10)
    x = rng.normal(1e4, 1.0, (500, 8))
    x[3, 7] = np.nan
    names = [f"c{k}" for k in range(8)]
    parquet.write_table(pa.table(dict(zip(names, x.T, strict=True))), tmp_path / "t.parquet")
    told = []
    found = dataset.measure(
        tmp_path / "t.parquet",
        missing="skip",
        columns=names[::-1],
        progress=lambda _, done, whole: told.append(done / whole),
    )
    np.testing.assert_allclose(found.mean, np.nanmean(x[:, ::-1], axis=0), rtol=1e-12)
    assert found.missing.tolist() == [1] + [0] * 7
    assert 0.9 < told[-1] <= 1
    with pytest.raises(ArgumentError, match=r"NaN in feature 7 \('c7'\) at row 3 "):
        dataset.measure(tmp_path / "t.parquet")


def test_measure_names_the_package_that_it_lacks(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(BatchNormError, match=r"pyarrow.*pip install pyarrow .*the extra \[data\]"):
        dataset.measure(written(tmp_path / "t.csv", SMALL))


def test_measure_takes_arrays_beside_tables(tmp_path):
    np.save(tmp_path / "x.npy", np.full((2, 1), 5.0))
    written(tmp_path / "t.csv", "a\n1\n3\n")
    assert dataset.measure(tmp_path).mean.tolist() == [3.5]


# ---- normalize ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["y.csv", "y.parquet"])
def test_normalize_passes_other_columns_and_null_on(name, tmp_path):
    path = written(tmp_path / "t.csv", SMALL)
    found = dataset.measure(path, columns=["b", "a"], missing="skip")
    dataset.normalize(path, found, tmp_path / name, eps=0.0)
    y = (csv.read_csv if name == "y.csv" else parquet.read_table)(tmp_path / name)
    assert y.column_names == ["a", "b", "name"]
    np.testing.assert_allclose(y["a"].to_numpy(), [-(1.5**0.5), 0, 1.5**0.5], rtol=1e-15)
    assert y["b"].to_pylist() == [-1.0, None, 1.0]
    assert y["name"].to_pylist() == ["x", "y", "z, w"]


def test_normalize_is_the_map_of_arrays(table, tmp_path, rng):
    x = rng.normal(1e4, 1.0, (1000, 3))
    path = table(dict(zip("abc", x.T, strict=True)))
    found = dataset.measure(path)
    dataset.normalize(path, found, tmp_path / "y.parquet")
    y = np.stack([c.to_numpy() for c in parquet.read_table(tmp_path / "y.parquet").columns], 1)
    np.testing.assert_array_equal(y, dataset.normalize(x, found))


def test_normalize_keeps_the_floating_types_of_parquet(tmp_path):
    columns = {"f": pa.array([1, 3], pa.float32()), "i": pa.array([1, 3], pa.int16())}
    parquet.write_table(pa.table(columns), tmp_path / "t.parquet")
    found = dataset.measure(tmp_path / "t.parquet")
    dataset.normalize(tmp_path / "t.parquet", found, tmp_path / "y.parquet")
    types = parquet.read_schema(tmp_path / "y.parquet").types
    assert types == [pa.float32(), pa.float64()]
    dataset.normalize(tmp_path / "t.parquet", found, tmp_path / "z.parquet", dtype="f4")
    assert parquet.read_schema(tmp_path / "z.parquet").types == [pa.float32()] * 2


def test_normalize_without_a_line_of_names_writes_none(tmp_path):
    path = written(tmp_path / "t.csv", "1,2\n3,4\n")
    found = dataset.measure(path, header=False)
    dataset.normalize(path, found, tmp_path / "y.csv", eps=0.0, header=False)
    assert (tmp_path / "y.csv").read_text() == "-1,-1\n1,1\n"


def test_normalize_of_a_table_without_rows_has_its_columns(table, tmp_path):
    found = dataset.measure(table({"a": [1.0, 2.0]}, "full"))
    empty = table({"a": pa.array([], pa.float64())}, "empty")
    dataset.normalize(empty, found, tmp_path / "y.parquet")
    assert parquet.read_schema(tmp_path / "y.parquet").names == ["a"]


def test_normalize_leaves_no_file_when_a_row_is_no_number(tmp_path, monkeypatch):
    monkeypatch.setattr(csv_files, "CSV_BYTES", 64)
    found = dataset.measure(written(tmp_path / "t.csv", "a\n1\n2\n"))
    bad = written(tmp_path / "bad.csv", "a\n" + "1\n" * 100 + "oops\n")
    with pytest.raises(ArgumentError, match=r"bad\.csv.*oops"):
        dataset.normalize(bad, found, tmp_path / "y.csv")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.csv", "t.csv"]


def test_normalize_names_a_column_that_the_file_lacks(table, tmp_path):
    found = dataset.measure(table({"a": [1.0, 2.0], "b": [1.0, 2.0]}, "both"))
    with pytest.raises(ArgumentError, match="has no column 'b'"):
        dataset.normalize(table({"a": [1.0]}, "one"), found, tmp_path / "y.parquet")


def test_blocks_of_tables_stay_below_what_a_block_may_take(tmp_path, rng, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1 << 14)
    columns = {f"c{k}": rng.standard_normal(3000) for k in range(4)}
    columns |= {"text": ["x" * 500] * 3000, "words": [f"{k:05}" for k in range(3000)]}
    path = tmp_path / "t.parquet"
    parquet.write_table(pa.table(columns), path)
    file = parquet_files.open_parquet(
        path, columns=["c0", "c1", "c2"], numeric=False, dialect=tables.Dialect()
    )
    sizes = [block.values.nbytes for block in file.blocks()]
    assert 1 << 13 < max(sizes) <= 1 << 14
    assert sum(sizes) == 3 * 3000 * 8
    batches = [batch for batch, _ in file.batches(file.columns)]
    assert sum(batch.num_rows for batch in batches) == 3000
    assert max(batch.get_total_buffer_size() for batch in batches[1:-1]) <= 1 << 14


@pytest.mark.parametrize(
    "column", [pa.array([[1], [2]]), pa.array([{"x": 1}, {"x": 2}])], ids=["list", "struct"]
)
def test_normalize_says_what_a_csv_file_cannot_hold(column, tmp_path):
    parquet.write_table(pa.table({"a": [1.0, 2.0], "other": column}), tmp_path / "t.parquet")
    found = dataset.measure(tmp_path / "t.parquet", columns=["a"])
    with pytest.raises(ArgumentError, match=r"y\.csv: cannot hold all columns.*\.parquet"):
        dataset.normalize(tmp_path / "t.parquet", found, tmp_path / "y.csv")
    assert not (tmp_path / "y.csv").exists()
    dataset.normalize(tmp_path / "t.parquet", found, tmp_path / "y.parquet")
    assert parquet.read_table(tmp_path / "y.parquet")["other"].to_pylist() == column.to_pylist()


@pytest.mark.parametrize("name", ["y.csv", "y.parquet"])
def test_normalize_names_the_table_that_cannot_be_written(name, tmp_path, monkeypatch):
    class Full:
        def write_batch(self, batch):
            raise OSError(28, "No space left on device")

        def close(self):
            pass

    path = written(tmp_path / "t.csv", SMALL)
    found = dataset.measure(path, columns=["a"])
    monkeypatch.setattr(table_writers, "_open_writer", lambda *_: Full())
    with pytest.raises(ArgumentError, match=rf"{name}: cannot be written \(No space.*Make room"):
        dataset.normalize(path, found, tmp_path / name)
    assert not (tmp_path / name).exists()


def test_normalize_refuses_bfloat16_for_tables(tmp_path):
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    path = written(tmp_path / "t.csv", "a\n1\n2\n")
    with pytest.raises(DTypeError, match=r"t\.csv: dtype must be float16, float32 or float64"):
        dataset.normalize(path, dataset.measure(path), tmp_path / "y.csv", dtype=bfloat16)


def test_normalize_refuses_columns_that_exceed_their_type(tmp_path):
    values = pa.array([3e38, 0.0], pa.float32())
    parquet.write_table(pa.table({"a": values}), tmp_path / "t.parquet")
    found = dataset.measure(np.array([[0.0], [1e-30]]))
    with pytest.raises(ArgumentError, match=r"column 'a': .*fit into float32.*--dtype"):
        dataset.normalize(tmp_path / "t.parquet", found, tmp_path / "y.parquet")
    dataset.normalize(tmp_path / "t.parquet", found, tmp_path / "y.parquet", dtype="float64")
