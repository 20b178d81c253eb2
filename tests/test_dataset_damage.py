"""Damaged files: one line that names the file, or the values that it holds now."""

import io
import json
import pickle
import warnings
import zipfile

import numpy as np
import pytest

from batchnorm import cli, dataset
from batchnorm.dataset import Statistics, journal
from batchnorm.errors import ArgumentError, BatchNormError

X = np.random.default_rng(0).normal(10.0, 1.0, (40, 3)).astype(np.float32)


def damaged(content, seed):
    """Flip a bit, set a byte, cut, or insert; mostly in the first 300 bytes, where headers are."""
    rng = np.random.default_rng([seed, len(content)])
    at = int(rng.integers(min(300, len(content)) if rng.random() < 0.7 else len(content)))
    result = bytearray(content)
    kind = rng.integers(4)
    if kind == 0:
        result[at] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        result[at] = int(rng.integers(256))
    elif kind == 2:
        del result[at:]
    else:
        result[at:at] = rng.bytes(int(rng.integers(1, 9)))
    return bytes(result)


def outcome(function, *given, **options):
    """What a function returns, or None if it raises one line."""
    try:
        return function(*given, **options)
    except BatchNormError as error:
        said = str(error)
    assert "\n" not in said
    return None


def assert_values(found, values):
    """That statistics are those of an array, which need not have been the original."""
    values = np.asarray(values, float)
    with np.errstate(invalid="ignore", over="ignore"):
        expected = dataset.measure(values, missing="skip")
    np.testing.assert_array_equal(found.count, expected.count)
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-9, atol=1e-300)


def npy(path):
    np.save(path, X)


def npz(path):
    np.savez(path, x=X)


def deflated(path):
    np.savez_compressed(path, x=X)


def hdf5(path):
    with pytest.importorskip("h5py").File(path, "w") as file:
        file.create_dataset("g/x", data=X, chunks=(9, 2), compression="gzip", fletcher32=True)


def hdf5_latest(path):
    with pytest.importorskip("h5py").File(path, "w", libver="latest") as file:
        file.create_dataset("x", data=X)


def zarr2(path):
    pytest.importorskip("zarr").create_array(str(path), data=X, chunks=(30, 2), zarr_format=2)


def zarr3(path):
    pytest.importorskip("zarr").create_array(str(path), data=X, chunks=(30, 2))


def values_of(path):
    """The array in a file as the library of its format reads it."""
    if path.suffix == ".npy":
        return np.load(path)
    if path.suffix == ".npz":
        return X  # checksums cover all
    if path.suffix == ".h5":
        h5py = pytest.importorskip("h5py")
        with h5py.File(path) as file:
            names = []
            file.visititems(lambda name, one: names.append(name) if hasattr(one, "ndim") else None)
            return file[names[0]][...]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("zarr").open(str(path), mode="r")[...]


@pytest.mark.parametrize(
    ("name", "write", "cases"),
    [
        ("x.npy", npy, 60),
        ("x.npz", npz, 40),
        ("x.npz", deflated, 40),
        ("x.h5", hdf5, 40),
        ("x.h5", hdf5_latest, 30),
        ("x.zarr", zarr2, 30),
        ("x.zarr", zarr3, 30),
    ],
)
def test_a_damaged_array_is_one_line_or_its_values(name, write, cases, tmp_path):
    path = tmp_path / name
    write(path)
    files = sorted(p for p in path.rglob("*") if p.is_file()) or [path]
    contents = [file.read_bytes() for file in files]
    refused = 0
    for seed in range(cases):
        which = seed % len(files)
        files[which].write_bytes(damaged(contents[which], seed))
        found = outcome(dataset.measure, path, missing="skip")
        if found is None:
            refused += 1
        else:
            assert_values(found, values_of(path))
        files[which].write_bytes(contents[which])
    assert refused > cases // 4


@pytest.mark.parametrize("name", ["s.npz", "s.json"])
def test_damaged_statistics_are_one_line_or_statistics(name, tmp_path):
    path = tmp_path / name
    before = dataset.measure(X, extremes=True)
    before.save(path)
    content = path.read_bytes()
    refused = 0
    for seed in range(50):
        path.write_bytes(damaged(content, seed))
        found = outcome(Statistics.load, path)
        if found is None:
            refused += 1
        elif name == "s.npz":  # which has checksums
            assert found == before
        else:
            assert np.isfinite(found.var()).all()
    assert refused > 12


def test_a_damaged_journal_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "WRITE_SECONDS", 0)
    (tmp_path / "data").mkdir()
    for k in range(3):
        np.save(tmp_path / "data" / f"{k}.npy", X + k)
    expected = dataset.measure(tmp_path / "data")
    kept, out = tmp_path / "s.npz.partial", tmp_path / "s.npz"

    def interrupt(label, done, whole):
        if label.endswith("2.npy"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dataset.measure(tmp_path / "data", out=out, progress=interrupt)
    content = kept.read_bytes()
    for seed in range(40):
        kept.write_bytes(damaged(content, seed))
        found = outcome(dataset.measure, tmp_path / "data", out=out)
        assert found is None or found == expected
        out.unlink(missing_ok=True)


def test_a_journal_whose_numbers_are_damaged_is_not_believed():
    from batchnorm.dataset.parts import Part
    from batchnorm.moments import Moments

    data = journal.to_bytes(Part(Moments.of(X), 40))
    assert journal.from_bytes(data, 3).moments == Moments.of(X)
    for k in range(len(data)):
        assert journal.from_bytes(data[:k] + bytes([data[k] ^ 1]) + data[k + 1 :], 3) is None
        assert journal.from_bytes(data[:k], 3) is None


# ---- headers ------------------------------------------------------------------------------------


def header(shape, descr="'<f4'", order="False", version=b"\1\0"):
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}".encode()
    size = 2 if version == b"\1\0" else 4
    return b"\x93NUMPY" + version + len(text).to_bytes(size, "little") + text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (header("(2, 1000000000000000000000000000000)"), "at most 10,000,000 features"),
        (header("(1000000000000000000000000000000, 2)"), "must have .* bytes"),
        (header("(-1, 2)"), r"shape \(-1, 2\)"),
        (header("((2, 2), 2)"), "NumPy's format"),
        (header("(2.0, 2)"), "NumPy's format"),
        (header("'ab'"), "NumPy's format"),
        (header("(" * 500 + ")" * 500), "NumPy's format"),
        (header("-" * 5000 + "1"), "NumPy's format"),
        (header(f"({'1, ' * 100})"), "NumPy's format"),
        (header("(2, 2)", "'<V0'"), "real numbers"),
        (header("(2, 2)", "'nonsense'"), "NumPy's format"),
        (header("(2, 2)", "[('a', '<f4', (1000000000,))]"), "NumPy's format|real numbers"),
        (header("(2, 2)", "'|O'"), "real numbers.*got object"),
        (header("(2, 2)", order="None"), "NumPy's format"),
        (header("(2, 2)", version=b"\3\0") + bytes(16), "version"),
        (header("(2, 2)", version=b"\x09\0"), "NumPy's format"),
        (header("(2, 2)")[:9], "NumPy's format"),
        (header("(2, 2)")[:30], "NumPy's format"),
        (b"\x93NUMPY\2\0\xff\xff\xff\xff" + b"{" * 50_000, "header of more than 10000 bytes"),
        (header("(2, 2)\0"), "NumPy's format"),
        (header("__import__('os').abort()"), "NumPy's format"),
    ],
    ids=range(21),
)
def test_absurd_headers_are_one_line(content, said, tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("x.npy", content)
    (tmp_path / "x.npy").write_bytes(content)
    for name in ("x.npy", "x.npz"):
        with pytest.raises(BatchNormError, match=said) as caught:
            dataset.measure(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_a_header_of_python_2_is_read_without_a_word(tmp_path):
    (tmp_path / "x.npy").write_bytes(header("(2L, 3L)") + np.ones(6, "f4").tobytes())
    assert dataset.measure(tmp_path / "x.npy").count.tolist() == [2, 2, 2]


class Harmful:
    def __reduce__(self):
        return pytest.fail, ("was unpickled",)


def pickled():
    file = io.BytesIO()
    np.save(file, np.array([[Harmful()]], object), allow_pickle=True)
    return file.getvalue()


def test_nothing_is_unpickled(tmp_path):
    (tmp_path / "x.npy").write_bytes(pickled())
    (tmp_path / "p.npy").write_bytes(pickle.dumps(Harmful()))
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("x.npy", pickled())
    for name in ("x.npy", "p.npy", "x.npz"):
        with pytest.raises(BatchNormError):
            dataset.measure(tmp_path / name)
    dataset.measure(X).save(tmp_path / "s.npz")
    for member in ("format", "mean", "names"):
        with zipfile.ZipFile(tmp_path / "s.npz") as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(tmp_path / "h.npz", "w") as archive:
            for name, content in (members | {f"{member}.npy": pickled()}).items():
                archive.writestr(name, content)
        with pytest.raises(ArgumentError, match="must hold statistics"):
            Statistics.load(tmp_path / "h.npz")


@pytest.mark.parametrize("codec", ["filters", "compressor"])
def test_nothing_is_unpickled_from_zarr(codec, tmp_path):
    zarr2(tmp_path / "x.zarr")
    about = tmp_path / "x.zarr" / ".zarray"
    content = json.loads(about.read_text())
    harmful = {"id": "pickle", "protocol": 5}
    content[codec] = [harmful] if codec == "filters" else harmful
    about.write_text(json.dumps(content))
    for chunk in tmp_path.glob("x.zarr/[0-9]*"):
        chunk.write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(ArgumentError, match=r"x\.zarr: must be a valid \.zarr file"):
        dataset.measure(tmp_path / "x.zarr")


def test_sizes_that_a_zip_file_only_claims_take_no_memory(tmp_path):
    path = tmp_path / "x.npz"
    content = header("(250000000, 1000)")  # 1 TB
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", content + bytes(1000))
    claimed = (len(content) + 10**12).to_bytes(8, "little")
    data = bytearray(path.read_bytes())
    place = data.index(b"PK\1\2")  # what the directory says; sizes of more than 4 GiB follow it
    data[place + 24 : place + 28] = b"\xff" * 4
    data[place + 30 : place + 32] = (12).to_bytes(2, "little")
    name_end = place + 46 + 5
    data[name_end:name_end] = b"\1\0\x08\0" + claimed
    end = data.index(b"PK\5\6")
    size = int.from_bytes(data[end + 12 : end + 16], "little") + 12
    data[end + 12 : end + 16] = size.to_bytes(4, "little")
    path.write_bytes(data)
    with zipfile.ZipFile(path) as archive:
        assert archive.infolist()[0].file_size > 10**12
    with pytest.raises(ArgumentError, match=r"x\.npz"):
        dataset.measure(path)


def test_statistics_that_unpack_to_more_than_memory_are_refused(tmp_path, monkeypatch):
    from batchnorm.dataset import statistics

    dataset.measure(X).save(tmp_path / "s.npz")
    monkeypatch.setattr(statistics, "MOST_BYTES", 1000)
    with pytest.raises(ArgumentError, match=r"must hold statistics, and does not \(\d{4} bytes\)"):
        Statistics.load(tmp_path / "s.npz")


def test_other_archives_are_not_unpacked_to_see_whether_they_hold_statistics(tmp_path):
    np.savez_compressed(tmp_path / "x.npz", x=np.zeros((1 << 16, 64)), y=X)
    with zipfile.ZipFile(tmp_path / "x.npz") as archive:
        place = archive.getinfo("x.npy").header_offset
    with (tmp_path / "x.npz").open("r+b") as file:
        file.seek(place)
        file.write(b"damaged!")
    with pytest.raises(ArgumentError, match="no item named 'format.npy'|format"):
        Statistics.load(tmp_path / "x.npz")
    assert dataset.measure(tmp_path / "x.npz", array="y").count.tolist() == [40, 40, 40]


@pytest.mark.parametrize(
    "change",
    [
        {"mean": ["a", 1, 2]},
        {"mean": [float("nan"), 1, 2]},
        {"mean": [float("inf"), 1, 2]},
        {"m2": [-1, 1, 1]},
        {"m2": [[1, 1, 1]]},
        {"count": [1, 2]},
        {"missing": [0, 0]},
        {"missing": [-1, 0, 0]},
        {"missing": [0, 0, 10**30]},
        {"channel_axis": "one"},
        {"channel_axis": None},
        {"channel_axis": 1.5},
        {"names": ["a"]},
        {"names": 3},
        {"files": 3},
        {"scale": 0},
        {"scale": "x"},
        {"min": [1, 2]},
        {"min": [1, 2, 3], "max": None},
        {"format": "batchnorm statistics 2"},
        {"format": None},
    ],
    ids=str,
)
def test_statistics_that_do_not_fit_are_one_line(change, tmp_path):
    path = tmp_path / "s.json"
    dataset.measure(X).save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(
        ArgumentError, match=r"s\.json: must hold statistics, and does not"
    ) as caught:
        Statistics.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "1" * 10_000, "\ud800", "", "null", "{", '"x"']
)
def test_json_that_is_no_statistics_is_one_line(text, tmp_path):
    (tmp_path / "s.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ArgumentError, match=r"s\.json: must hold statistics, and does not"):
        Statistics.load(tmp_path / "s.json")


def test_damaged_files_are_one_line_and_status_2(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    npz(tmp_path / "x.npz")
    dataset.measure(X).save(tmp_path / "s.npz")
    for name in ("x.npz", "s.npz"):
        content = bytearray((tmp_path / name).read_bytes())
        content[200] ^= 8
        (tmp_path / name).write_bytes(content)
    np.save("y.npy", X)
    (tmp_path / "y.npy").write_bytes((tmp_path / "y.npy").read_bytes()[:-1])
    for arguments in (
        ["stats", "x.npz"],
        ["stats", "y.npy", "--out", "t.npz"],
        ["normalize", "y.npy", "--stats", "s.npz", "--out", "z.npy"],
    ):
        assert cli.main(arguments) == cli.UNUSABLE
        output, errors = capsys.readouterr()
        assert output == ""
        assert errors.startswith("batchnorm: ")
        assert errors.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.npz", "x.npz", "y.npy"]
