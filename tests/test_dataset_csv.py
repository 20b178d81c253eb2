"""Tables as text: rows, quotation marks, spellings, and digits that float64 does not hold."""

import codecs
import contextlib
import gzip
import io
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchnorm import dataset
from batchnorm.dataset.sources import csv_files, rows
from batchnorm.errors import ArgumentError, DTypeError

pytest.importorskip("pyarrow")


def written(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# ---- rows ---------------------------------------------------------------------------------------


def row_ends(text):
    """Where rows end, and whether the text ends within quotation marks, character by character."""
    ends, quoted, at_start, k = [], False, True, 0
    while k < len(text):
        c = text[k : k + 1]
        if quoted:
            if text[k : k + 2] == b'""':
                k += 1
            elif c == b'"':
                quoted, at_start = False, False
        elif c == b'"' and at_start:
            quoted = True
        else:
            if c in b"\r\n":
                ends.append(k + 1)
            at_start = c in b",\r\n"
        k += 1
    return ends, quoted


TEXTS = st.text(alphabet='a1,"\r\n', max_size=60).map(str.encode)


@given(text=TEXTS)
def test_end_of_rows_is_the_last_line_break_that_no_marks_enclose(text):
    ends = [end for end in row_ends(text)[0] if end < len(text) or not text.endswith(b"\r")]
    assert rows.end_of_rows(text, b",") == max(ends, default=0)


@given(text=TEXTS, size=st.integers(1, 80))
def test_whole_rows_are_the_text_cut_between_rows(text, size):
    ends, quoted = row_ends(text)
    longest = max(np.diff([0, *ends, len(text)]), default=0)
    if quoted or longest > size:
        return  # refused, or a piece that would be if it came later
    pieces = list(rows.whole_rows(io.BytesIO(text).read, b",", size, "t.csv"))
    whole = text if not text or text.endswith((b"\r", b"\n")) else text + b"\n"
    assert b"".join(pieces) == whole
    ends = set(row_ends(whole)[0])
    assert ends >= set(np.cumsum([len(piece) for piece in pieces]).tolist())


@given(text=TEXTS)
def test_whole_rows_refuse_a_quotation_mark_without_another(text):
    pieces = rows.whole_rows(io.BytesIO(text).read, b",", 100, "t.csv")
    expected = pytest.raises(ArgumentError, match="must be closed")
    with expected if row_ends(text)[1] else contextlib.nullcontext():
        list(pieces)


def test_whole_rows_keep_a_line_break_of_two_characters_together():
    pieces = rows.whole_rows(io.BytesIO(b"1\r\n2\r\n").read, b",", 2, "t.csv")
    assert list(pieces) == [b"1\r\n", b"2\r\n"]


REVIEWS = ["fine", "two\nlines", 'a "word"\r\n, and more', '"', "x\n\n\ny", '5" wide', ""]


def quoted(text):
    return '"' + text.replace('"', '""') + '"'


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".csv.gz"])
def test_measure_takes_line_breaks_in_quotes_at_every_offset_of_a_block(
    suffix, tmp_path, monkeypatch
):
    monkeypatch.setattr(csv_files, "CSV_BYTES", 61)
    separator = "\t" if suffix == ".tsv" else ","
    x = np.arange(40.0)
    for offset in range(61):
        lines = ["a" + separator + "x" * offset]
        lines += [f"{k}{separator}{quoted(REVIEWS[k % len(REVIEWS)])}" for k in range(40)]
        text = "\n".join(lines).encode()
        path = written(tmp_path / f"t{suffix}", gzip.compress(text) if "gz" in suffix else text)
        found = dataset.measure(path, columns=["a"])
        assert (found.count.tolist(), found.mean.tolist()) == ([40], [x.mean()])
        np.testing.assert_allclose(found.var(), x.var(), rtol=1e-14)


def test_measure_takes_reviews_larger_than_a_block(tmp_path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(
        {"stars": np.arange(20_000) % 5, "text": ["line\n" * 200 + "end, 'of'"] * 20_000}
    )
    path = tmp_path / "t.csv"
    frame.to_csv(path, index=False)
    assert path.stat().st_size > 2 * csv_files.CSV_BYTES
    found = dataset.measure(path, numeric=True)
    assert (found.names, found.count.tolist(), found.mean.tolist()) == (("stars",), [20_000], [2.0])


def test_normalize_keeps_text_with_line_breaks(tmp_path, monkeypatch):
    pandas = pytest.importorskip("pandas")
    monkeypatch.setattr(csv_files, "CSV_BYTES", 64)
    texts = REVIEWS * 5
    frame = pandas.DataFrame({"a": np.arange(35.0), "text": texts})
    frame.to_csv(tmp_path / "t.csv", index=False)
    found = dataset.measure(tmp_path / "t.csv", columns=["a"])
    dataset.normalize(tmp_path / "t.csv", found, tmp_path / "y.csv")
    y = pandas.read_csv(tmp_path / "y.csv", keep_default_na=False)
    assert y["text"].tolist() == texts


def test_measure_refuses_a_quotation_mark_that_is_not_closed(tmp_path):
    path = written(tmp_path / "t.csv", 'a,s\n1,"x\n2,y\n')
    with pytest.raises(ArgumentError, match=r"must be closed.*'1,\"x\\n2,y\\n'.*cut short"):
        dataset.measure(path, columns=["a"])


def test_measure_refuses_a_row_that_is_longer_than_a_block(tmp_path, monkeypatch):
    monkeypatch.setattr(csv_files, "CSV_BYTES", 64)
    path = written(tmp_path / "t.csv", "a,s\n1,x\n2," + "y" * 200 + "\n")
    with pytest.raises(ArgumentError, match=r"at most 64 bytes long, got .*'2,yyy"):
        dataset.measure(path, columns=["a"])


def test_measure_names_the_row_of_a_missing_value_behind_line_breaks(tmp_path, monkeypatch):
    monkeypatch.setattr(csv_files, "CSV_BYTES", 32)
    lines = [f'{k},"x\n\ny"' for k in range(30)] + [',"z"', "1,z"]
    path = written(tmp_path / "t.csv", "a,s\n" + "\n".join(lines))
    with pytest.raises(ArgumentError, match=r"feature 0 \('a'\) at row 30 "):
        dataset.measure(path, columns=["a"])


@pytest.mark.parametrize(
    "text",
    [
        "a,b\n1,2\n3,4",
        "a,b\r\n1,2\r\n3,4\r\n",
        "a,b\r1,2\r3,4\r",
        "\n\na,b\n\n1,2\n\n\n3,4\n\n",
        codecs.BOM_UTF8 + b"a,b\n1,2\n3,4\n",
        codecs.BOM_UTF8 + b'"a","b"\n1,2\n3,4\n',
        '"a","b"\n"1","2"\n 3 , 4 \n',
        "a,b\n+1,2e0\n3.,.4e1\n",
        "a,b,\n1,2,\n3,4,\n",
    ],
    ids=["end", "crlf", "cr", "blank", "bom", "bom-quoted", "quoted", "forms", "trailing"],
)
def test_measure_reads_what_pandas_reads(text, tmp_path):
    path = written(tmp_path / "t.csv", text)
    found = dataset.measure(path)
    assert found.names == ("a", "b")
    assert (found.mean.tolist(), found.count.tolist()) == ([2.0, 3.0], [2, 2])
    pandas = pytest.importorskip("pandas")
    assert pandas.read_csv(path)[["a", "b"]].mean().tolist() == [2.0, 3.0]


@pytest.mark.parametrize("text", ["a,b\n", "a,b", codecs.BOM_UTF8 + b"a,b\r\n"])
def test_measure_takes_a_line_of_names_alone_for_a_table_without_rows(text, tmp_path):
    found = dataset.measure(written(tmp_path / "t.csv", text))
    assert (found.names, found.count.tolist()) == (("a", "b"), [0, 0])


@pytest.mark.parametrize("content", [b"", b"\n\r\n", codecs.BOM_UTF8])
def test_measure_says_that_a_file_is_empty(content, tmp_path):
    with pytest.raises(ArgumentError, match=r"t\.csv: must begin with a line of .* is empty"):
        dataset.measure(written(tmp_path / "t.csv", content))


def test_measure_has_the_same_bits_from_compressed_text(tmp_path, rng, monkeypatch):
    monkeypatch.setattr(csv_files, "CSV_BYTES", 1 << 10)
    text = "a\n" + "\n".join(map(repr, rng.normal(1e4, 1, 999).tolist()))
    plain = dataset.measure(written(tmp_path / "t.csv", text))
    parts = [text[:500].encode(), text[500:].encode()]  # gzip files may be put one after another
    whole = written(tmp_path / "t.csv.gz", b"".join(gzip.compress(part) for part in parts))
    found = dataset.measure(whole)
    assert (found.moments.m2 == plain.moments.m2).all()
    assert (found.mean == plain.mean).all()


@pytest.mark.parametrize("damage", ["cut", "flip", "text"])
def test_measure_says_that_compressed_text_is_damaged(damage, tmp_path):
    content = bytearray(gzip.compress(b"a\n" + b"1\n" * 1000))
    if damage == "cut":
        del content[-9:]
    elif damage == "flip":
        content[-6] ^= 1  # of the checksum
    else:
        content[:] = b"a\n1\n"
    with pytest.raises(ArgumentError, match=r"t\.csv\.gz: is damaged, cut short or not"):
        dataset.measure(written(tmp_path / "t.csv.gz", bytes(content)))


# ---- how it is written --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "options"),
    [
        ("t.tsv", "a\tb\n1.5\t2\n2.5\t4\n", {}),
        ("t.tsv", "a\tb\n1,5\t2\n2,5\t4\n", {"decimal": ","}),
        ("t.csv", "a;b\n1.5;2\n2.5;4\n", {"separator": ";"}),
        ("t.csv", "a;b\n1,5;2\n2,5;4\n", {"separator": ";", "decimal": ","}),
        ("t.csv", "a\tb\n1.5\t2\n2.5\t4\n", {"separator": "\\t"}),
        ("t.tsv", "a|b\n1.5|2\n2.5|4\n", {"separator": "|"}),
    ],
)
def test_measure_takes_other_separators_and_decimal_points(name, text, options, tmp_path):
    found = dataset.measure(written(tmp_path / name, text), **options)
    assert (found.names, found.mean.tolist()) == (("a", "b"), [2.0, 3.0])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"separator": ";;"}, "separator must be one character of ASCII, got ';;'"),
        ({"separator": "¦"}, "separator must be one character of ASCII, got '¦'"),
        ({"separator": '"'}, "separator must be a character that no number has"),
        ({"decimal": "1"}, "decimal must be a character that no number has"),
        ({"decimal": ","}, "separator must differ from decimal, got ',' for both.*';'"),
        ({"nulls": [-9]}, "nulls must be texts, got -9"),
        ({"nulls": "?"}, "nulls must be a list of texts"),
    ],
)
def test_measure_refuses_separators_and_decimal_points_that_cannot_be(options, said, tmp_path):
    with pytest.raises(ArgumentError, match=said):
        dataset.measure(written(tmp_path / "t.csv", "a,b\n1,2\n"), **options)


def test_measure_takes_other_spellings_of_missing_values(tmp_path):
    path = written(tmp_path / "t.csv", "a,b\n1,2\n?,NA\n-999, \n3,4\n")
    found = dataset.measure(path, nulls=["?", "-999", " "], missing="skip")
    assert (found.missing.tolist(), found.mean.tolist()) == ([2, 2], [2.0, 3.0])
    pandas = pytest.importorskip("pandas")
    assert pandas.read_csv(path, na_values=["?", "-999", " "]).mean().tolist() == [2.0, 3.0]


@pytest.mark.parametrize("cell", ["?", "-", "na", "1.2.3", "1 000", "0x10"])
@pytest.mark.parametrize("size", [1 << 23, 32])
@pytest.mark.parametrize("options", [{}, {"columns": ["b"]}, {"numeric": True}])
def test_measure_names_the_cell_that_is_no_number(cell, size, options, tmp_path, monkeypatch):
    monkeypatch.setattr(csv_files, "CSV_BYTES", size)
    lines = [f"x,{k},z" for k in range(40)]
    lines[29] = f"x,{cell},z"
    path = written(tmp_path / "t.csv", "a,b,c\n" + "\n".join(lines))
    if not options:
        path = written(path, path.read_text().replace("x,", "1,").replace("z", "2"))
    said = rf"t\.csv: column 'b' must be numbers, got {cell!r} in row 29 .*--nulls {cell!r}"
    with pytest.raises(ArgumentError, match=said.replace("?", r"\?")):
        dataset.measure(path, **options)


def test_measure_names_the_row_that_has_other_columns(tmp_path, monkeypatch):
    monkeypatch.setattr(csv_files, "CSV_BYTES", 32)
    lines = [f'"x\n",{k}' for k in range(20)] + ["y,1,2"]
    path = written(tmp_path / "t.csv", "s,a\n" + "\n".join(lines))
    with pytest.raises(ArgumentError, match=r"2 values each.*got 3 in row 20 .*'y,1,2'"):
        dataset.measure(path, columns=["a"])
    path = written(path, "\n".join(lines))
    with pytest.raises(ArgumentError, match=r"2 values each.*got 3 in row 20 .*'y,1,2'"):
        dataset.measure(path, columns=["f1"], header=False)


def test_measure_names_a_row_of_other_columns_that_is_not_utf8(tmp_path, capfd):
    path = written(tmp_path / "t.csv", b"s,a\nx,1\n\xff,2,3\n")
    with pytest.raises(ArgumentError, match=r"got 3 in row 1 .*'\ufffd,2,3'"):
        dataset.measure(path, columns=["a"])
    assert capfd.readouterr().err == ""


def test_measure_leaves_columns_out_that_are_not_numbers(tmp_path):
    text = "name,a,day,b,ok\nx,1,2020-01-01,3,true\ny,2,2020-01-02,5,false\n"
    path = written(tmp_path / "t.csv", text)
    assert dataset.measure(path, numeric=True).names == ("a", "b")
    assert dataset.measure(path, numeric=True, columns=["b", "name"]).names == ("b",)
    with pytest.raises(DTypeError, match="'name', 'day', 'ok' of type string.*numeric=True"):
        dataset.measure(path)
    with pytest.raises(DTypeError, match="must have a column of numbers"):
        dataset.measure(written(tmp_path / "u.csv", "s\nx\n"), numeric=True)


def test_measure_leaves_a_column_of_few_words_out(tmp_path):
    path = written(tmp_path / "t.csv", "a,s\n1,\n2,\n3,1\n4,word\n5,word\n")
    assert dataset.measure(path, numeric=True).names == ("a",)


# ---- digits -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "texts",
    [
        [str(10**20 + k) for k in range(100)],
        [str(-(10**20) - k) for k in range(100)],
        [str(2**64 + k) for k in range(100)],
        [str(2**53 + k) for k in range(100)],
        [f"{10**16 + k}.5" for k in range(100)],
        ["1e3", f"{10**30 + 1}"],
    ],
)
@pytest.mark.parametrize("size", [1 << 23, 64])
def test_measure_refuses_digits_that_float64_does_not_hold(texts, size, tmp_path, monkeypatch):
    monkeypatch.setattr(csv_files, "CSV_BYTES", max(size, 3 * max(map(len, texts))))
    path = written(tmp_path / "t.csv", "s,a\n" + "".join(f"x,{text}\n" for text in texts))
    first = next(k for k, text in enumerate(texts) if Fraction(text) != float(text))
    said = rf"column 'a', row {first}: \w+ must be below 2\*\*53.*, got {texts[first]}\. Subtract"
    with pytest.raises(ArgumentError, match=said):
        dataset.measure(path, columns=["a"])
    found = dataset.measure(np.array([[1.0], [3.0]]))
    found = dataset.Statistics(found.moments, found.missing, ("a",))
    with pytest.raises(ArgumentError, match=said):
        dataset.normalize(path, found, tmp_path / "y.csv")
    assert not (tmp_path / "y.csv").exists()


def test_measure_takes_large_numbers_that_are_floats(tmp_path):
    texts = ["1e20", "2E+20", "3.0e20", str(2**60), f"{2.0**70:f}", "", "nan"]
    path = written(tmp_path / "t.csv", "s,a\n" + "".join(f"x,{text}\n" for text in texts))
    found = dataset.measure(path, columns=["a"], missing="skip")
    assert (found.count.tolist(), found.missing.tolist()) == ([5], [2])
    expected = np.mean([1e20, 2e20, 3e20, 2.0**60, 2.0**70])
    np.testing.assert_allclose(found.mean, expected, rtol=1e-15)


def test_measure_quotes_large_numbers_with_their_decimal_point(tmp_path):
    path = written(tmp_path / "t.csv", "a;b\n10000000000000000,5;1\n")
    with pytest.raises(ArgumentError, match=r"row 0: numbers must be .*got 10000000000000000,5\."):
        dataset.measure(path, separator=";", decimal=",")


def test_measure_takes_large_numbers_that_stand_for_missing_values(tmp_path):
    path = written(tmp_path / "t.csv", "a,b\n1,2\n99999999999999999,3\n")
    found = dataset.measure(path, nulls=["99999999999999999"], missing="skip")
    assert found.missing.tolist() == [1, 0]


# ---- what is written ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("y.csv", b'"a","s"\n-1,"x"\n1,"p,q"\n'),
        ("y.tsv", b'"a"\t"s"\n-1\t"x"\n1\t"p,q"\n'),
        ("y.csv.gz", b'"a","s"\n-1,"x"\n1,"p,q"\n'),
        ("y.tsv.gz", b'"a"\t"s"\n-1\t"x"\n1\t"p,q"\n'),
    ],
)
def test_normalize_writes_text_as_its_name_says(name, expected, tmp_path):
    path = written(tmp_path / "t.tsv", "a\ts\n1.5\tx\n2.5\tp,q\n")
    dataset.normalize(path, dataset.measure(path, columns=["a"]), tmp_path / name, eps=0.0)
    content = (tmp_path / name).read_bytes()
    assert (gzip.decompress(content) if name.endswith(".gz") else content) == expected


def test_normalize_refuses_a_separator_that_is_the_decimal_point_of_what_it_writes(tmp_path):
    path = written(tmp_path / "t.tsv", "a\n1,5\n2,5\n")
    found = dataset.measure(path, decimal=",")
    with pytest.raises(ArgumentError, match=r"y\.csv: separator must differ from decimal"):
        dataset.normalize(path, found, tmp_path / "y.csv", decimal=",")
    assert not (tmp_path / "y.csv").exists()


def test_normalize_writes_the_separator_and_decimal_point_that_it_has_read(tmp_path):
    path = written(tmp_path / "t.csv", 'a;s\n1,25;"x;y"\n;z, z\n2,25;1.5\n')
    options = {"separator": ";", "decimal": ","}
    found = dataset.measure(path, columns=["a"], missing="skip", **options)
    dataset.normalize(path, found, tmp_path / "y.csv", eps=3.75, **options)
    text = (tmp_path / "y.csv").read_text()
    assert text == '"a";"s"\n"-0,25";"x;y"\n;"z, z"\n"0,25";"1.5"\n'
    pandas = pytest.importorskip("pandas")
    again = pandas.read_csv(tmp_path / "y.csv", sep=";", decimal=",")
    assert again["a"].tolist()[::2] == [-0.25, 0.25]
    assert dataset.measure(tmp_path / "y.csv", columns=["a"], missing="skip", **options).mean == 0
