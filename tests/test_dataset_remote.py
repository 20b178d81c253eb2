"""Addresses that fsspec knows: files, folders, chains, changes, and whatever goes wrong there."""

import io
import sys
import uuid
import zipfile

import numpy as np
import pytest

from batchnorm import dataset
from batchnorm.dataset import addresses
from batchnorm.dataset.addresses import below, join, suffix_of
from batchnorm.errors import ArgumentError, BatchNormError

fsspec = pytest.importorskip("fsspec")


@pytest.fixture
def memory():
    """A folder in memory of its own, as an address."""
    address = f"memory://{uuid.uuid4().hex}"
    yield address
    fs, path = fsspec.url_to_fs(address)
    if fs.exists(path):
        fs.rm(path, recursive=True)


@pytest.fixture
def x(rng):
    return rng.normal(1e4, 1.0, (200, 3))


def put(address, content):
    fs, path = fsspec.url_to_fs(address)
    fs.pipe(path, content)
    return address


def npy(x):
    file = io.BytesIO()
    np.save(file, x)
    return file.getvalue()


def npz(x, save=np.savez):
    file = io.BytesIO()
    save(file, x=x)
    return file.getvalue()


def zipped(**members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "/").replace("_npy", ".npy"), content)
    return file.getvalue()


def assert_same(found, x):
    expected = dataset.measure(x)
    np.testing.assert_array_equal(found.count, expected.count)
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-12)
    np.testing.assert_allclose(found.var(), expected.var(), rtol=1e-9)


# ---- what is read -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [("x.npy", npy), ("x.npz", npz), ("X.NPZ", lambda x: npz(x, np.savez_compressed))],
)
def test_measure_reads_files(name, content, memory, x):
    address = put(f"{memory}/{name}", content(x))
    found = dataset.measure(address)
    assert_same(found, x)
    assert found.files == (address,)


def test_measure_reads_hdf5(memory, x, tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("x", data=x, chunks=(50, 2), compression="gzip")
    address = put(f"{memory}/x.h5", (tmp_path / "x.h5").read_bytes())
    assert_same(dataset.measure(address), x)
    put(address, b"text")
    with pytest.raises(ArgumentError, match=r"x\.h5: cannot be read .*signature not found"):
        dataset.measure(address)


@pytest.mark.parametrize("number", [2, 3])
def test_measure_reads_zarr(number, memory, x, tmp_path):
    zarr = pytest.importorskip("zarr")
    group = zarr.open_group(str(tmp_path / "x.zarr"), mode="w", zarr_format=number)
    group.create_array("deep/x", data=x, chunks=(50, 2))
    fs, path = fsspec.url_to_fs(f"{memory}/x.zarr")
    fs.put(str(tmp_path / "x.zarr"), path, recursive=True)
    assert_same(dataset.measure(f"{memory}/x.zarr", array="deep/x"), x)
    found = dataset.measure(memory)
    assert found.files == (f"memory:///{memory[9:]}/x.zarr",)
    assert_same(found, x)


def test_measure_reads_folders_by_name_without_hidden_files_and_statistics(memory, x, tmp_path):
    put(f"{memory}/b.npy", npy(x[100:]))
    put(f"{memory}/a/c.npy", npy(x[:100]))
    put(f"{memory}/.hidden.npy", npy(x))
    put(f"{memory}/_temporary/d.npy", npy(x))
    put(f"{memory}/readme.txt", b"")
    dataset.measure(x, out=tmp_path / "s.npz")
    put(f"{memory}/s.npz", (tmp_path / "s.npz").read_bytes())
    notes = []
    found = dataset.measure(memory, note=notes.append)
    assert [name.split("/", 4)[-1] for name in found.files] == ["a/c.npy", "b.npy"]
    assert_same(found, x)
    assert [note.split()[0] for note in notes] == ["skipped", "skipped"]
    assert dataset.measure(list(found.files)) == found


@pytest.mark.parametrize(
    "chain",
    ["zip://in/x.npy::{}/a.zip", "simplecache::zip://in/x.npy::{}/a.zip"],
)
def test_measure_reads_files_in_chains(chain, memory, x):
    put(f"{memory}/a.zip", zipped(in__x_npy=npy(x)))
    address = chain.format(memory)
    assert_same(dataset.measure(address), x)


@pytest.mark.parametrize(
    "chain",
    ["zip::{}/a.zip", "zip://in::{}/a.zip", "zip://in/::{}/a.zip", "simplecache::{}/in"],
)
def test_measure_reads_folders_in_chains(chain, memory, x):
    files = {"in__x_npy": npy(x[:50]), "in__deep__y_npy": npy(x[50:])}
    put(f"{memory}/a.zip", zipped(**files))
    put(f"{memory}/in/x.npy", files["in__x_npy"])
    put(f"{memory}/in/deep/y.npy", files["in__deep__y_npy"])
    found = dataset.measure(chain.format(memory))
    assert_same(found, x)
    assert dataset.measure(list(found.files)) == found


def test_an_address_of_this_machine_is_the_same_file_as_its_path(tmp_path, x):
    np.save(tmp_path / "x.npy", x)
    address = f"file://{tmp_path}/x.npy"
    assert_same(dataset.measure(address), x)
    with pytest.raises(ArgumentError, match="named twice"):
        dataset.measure([address, tmp_path / "x.npy"])
    with pytest.raises(ArgumentError, match="out must not be one of the input files"):
        dataset.normalize(address, dataset.measure(x), tmp_path / "x.npy")


@pytest.mark.parametrize(
    ("address", "suffix"),
    [
        ("s3://bucket/x.NPY", ".npy"),
        ("s3://bucket/x.zarr/", ".zarr"),
        ("s3://bucket/x.csv.gz", ".csv.gz"),
        ("https://host/x.npy?token=a.b", ".npy"),
        ("zip://x.npy::s3://bucket/a.zip", ".npy"),
        ("zip::s3://bucket/a.zip", ""),
        ("simplecache::s3://bucket/x.npy", ".npy"),
        ("filecache::zip://d/x.h5::s3://bucket/a.zip", ".h5"),
        ("s3://bucket.d/x", ""),
        ("dir.d/x.npy", ".npy"),
        ("dir.d/x", ""),
        (".npy", ""),
        ("x.", ""),
        ("x.zarr/", ".zarr"),
    ],
)
def test_suffix_is_that_of_the_file_that_is_read(address, suffix):
    assert suffix_of(address) == suffix


@pytest.mark.parametrize(
    "folder",
    ["memory://d", "zip://d::memory://a.zip", "simplecache::memory://d", "zip::memory://a"],
)
def test_a_file_lies_below_the_folder_that_it_is_joined_to(folder, monkeypatch):
    monkeypatch.setattr(addresses, "remote", lambda address: (Unstripped(), address))
    assert below(folder, join(folder, "in/x.npy")) == "in/x.npy"


class Unstripped:
    def unstrip_protocol(self, path):
        return addresses._split_chain(path)[1]


# ---- changes ------------------------------------------------------------------------------------


def test_a_file_that_changes_while_it_is_measured_is_refused(memory, x):
    address = put(f"{memory}/x.npy", npy(x))

    def change(label, done, whole):
        if done:
            put(address, npy(x + 1))

    with pytest.raises(ArgumentError, match=r"x\.npy: changed while it was read"):
        dataset.measure(address, progress=change)


def test_a_run_resumes_and_reads_what_has_changed(memory, x, tmp_path):
    for k in range(4):
        put(f"{memory}/{k}.npy", npy(x[50 * k : 50 * k + 50]))

    def interrupt(label, done, whole):
        if label.endswith("3.npy"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dataset.measure(memory, out=tmp_path / "s.npz", progress=interrupt)
    put(f"{memory}/1.npy", npy(x[:50]))
    read = []
    found = dataset.measure(
        memory,
        out=tmp_path / "s.npz",
        progress=lambda label, done, whole: read.append(label[-5:]),
    )
    assert sorted(set(read)) == ["1.npy", "3.npy"]
    assert found == dataset.measure(memory)


def test_a_zarr_folder_changes_with_any_of_its_files(memory):
    before = addresses.fingerprint_of(put_folder(memory, b"1", b"2"))
    assert addresses.fingerprint_of(memory) == before
    put(f"{memory}/d/b", b"3")
    changed = addresses.fingerprint_of(memory)
    assert changed != before
    fs, path = fsspec.url_to_fs(f"{memory}/d/a")
    fs.rm(path)
    assert addresses.fingerprint_of(memory) not in (before, changed)


def put_folder(address, a, b):
    put(f"{address}/d/a", a)
    put(f"{address}/d/b", b)
    return address


@pytest.mark.parametrize("change", ["rewrite", "add", "remove", "rename"])
def test_a_folder_of_this_machine_changes_with_any_of_its_files(change, tmp_path):
    inside = tmp_path / "x.zarr" / "c" / "0"
    inside.mkdir(parents=True)
    for name in ("0", "1"):
        (inside / name).write_bytes(b"12")
    before = addresses.fingerprint_of(tmp_path / "x.zarr")
    assert addresses.fingerprint_of(tmp_path / "x.zarr") == before
    if change == "rewrite":
        (inside / "0").write_bytes(b"13")
    elif change == "add":
        (inside / "2").write_bytes(b"")
    elif change == "remove":
        (inside / "1").unlink()
    else:
        (inside / "1").rename(inside / "7")
    assert addresses.fingerprint_of(tmp_path / "x.zarr") != before


# ---- normalize ----------------------------------------------------------------------------------


def test_normalize_reads_addresses_and_writes_files(memory, x, tmp_path):
    found = dataset.measure(x)
    put(f"{memory}/x.npy", npy(x))
    put(f"{memory}/deep/x.npz", npz(x, np.savez_compressed))
    dataset.normalize(f"{memory}/x.npy", found, tmp_path / "y.npy")
    expected = dataset.normalize(x, found)
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), expected)
    dataset.normalize(memory, found, tmp_path / "y")
    np.testing.assert_array_equal(np.load(tmp_path / "y" / "x.npy"), expected)
    np.testing.assert_array_equal(np.load(tmp_path / "y" / "deep" / "x.npz")["x"], expected)


def test_normalize_of_a_zipped_folder_writes_a_folder(memory, x, tmp_path):
    put(f"{memory}/a.zip", zipped(in__deep__x_npy=npy(x)))
    found = dataset.measure(f"zip://in::{memory}/a.zip")
    dataset.normalize(f"zip://in::{memory}/a.zip", found, tmp_path / "y")
    y = np.load(tmp_path / "y" / "deep" / "x.npy")
    np.testing.assert_array_equal(y, dataset.normalize(x, found))


def test_results_are_not_written_to_addresses(memory, x):
    put(f"{memory}/x.npy", npy(x))
    with pytest.raises(ArgumentError, match=r"out must be a path of this machine, got 'memory"):
        dataset.measure(memory, out=f"{memory}/s.npz")
    with pytest.raises(ArgumentError, match=r"out must be a path of this machine, got 'memory"):
        dataset.normalize(memory, dataset.measure(x), f"{memory}/y")


# ---- what goes wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("memory://none/x.npy", r"memory://none/x\.npy: there is no such file or folder"),
        ("zip://x.npy::memory://none.zip", r"zip://x\.npy::memory://none\.zip: there is no such"),
        ("nonsense://x.npy", r"nonsense://x\.npy: must be a path, .*Protocol not known: nonsense"),
        ("file:///none/x.npy", "file:///none/x.npy: there is no such file"),
    ],
)
def test_addresses_that_cannot_be_read_are_one_line(address, said):
    for source in (address, [address]):
        with pytest.raises(BatchNormError, match=said) as caught:
            dataset.measure(source)
        assert "\n" not in str(caught.value)


def test_a_missing_package_for_an_address_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(BatchNormError, match=r"^s3://bucket/x\.npy: .*s3fs.*\.$") as caught:
        dataset.measure("s3://bucket/x.npy")
    assert "\n" not in str(caught.value)


def test_addresses_need_fsspec(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "fsspec"]:
        monkeypatch.setitem(sys.modules, name, None)
    said = r"need fsspec, which is not installed. pip install fsspec adds it"
    with pytest.raises(BatchNormError, match=said):
        dataset.measure("memory://x.npy")


class Denied(Exception):
    """As packages for addresses raise."""


@pytest.fixture
def backend():
    """A file system with two files, whose methods raise what a test asks for."""
    from fsspec.implementations.memory import MemoryFileSystem

    class Backend(MemoryFileSystem):
        protocol = "backend"
        cachable = False
        refuses = None
        error = Denied

        def __init__(self, **options):
            self._refuse("init")
            super().__init__(**options)

        def _refuse(self, name):
            if name == type(self).refuses:
                raise type(self).error("Unable to locate credentials\nand more")

        def info(self, path, **options):
            self._refuse("info")
            folder = path.strip("/") == "backend:/d" or path.strip("/").endswith("d")
            kind = "directory" if folder else "file"
            return {"name": path, "size": 176, "type": kind, "ETag": "1"}

        def ls(self, path, detail=True, **options):
            self._refuse("ls")
            found = [{"name": "/d/x.npy", "size": 176, "type": "file"}]
            return found if detail else [one["name"] for one in found]

        def open(self, path, *given, **options):
            self._refuse("open")
            return Unreliable(self, npy(np.ones((3, 2))))

    class Unreliable(io.BytesIO):
        def __init__(self, fs, content):
            super().__init__(content)
            self.fs = fs

        def readinto(self, view):
            self.fs._refuse("readinto")
            return super().readinto(view)

    fsspec.register_implementation("backend", Backend, clobber=True)
    return Backend


@pytest.mark.parametrize("where", ["init", "info", "open", "readinto"])
def test_what_a_backend_raises_is_one_line(where, backend):
    assert dataset.measure("backend://d/x.npy").mean.tolist() == [1, 1]
    backend.refuses = where
    said = r"backend://d/x\.npy: cannot be read \(Denied: Unable to locate credentials\)\. Check"
    with pytest.raises(ArgumentError, match=said) as caught:
        dataset.measure("backend://d/x.npy")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [Denied, PermissionError, TimeoutError])
def test_a_folder_that_cannot_be_listed_is_one_line(error, backend):
    assert dataset.measure("backend://d").mean.tolist() == [1, 1]
    backend.refuses, backend.error = "ls", error
    with pytest.raises(ArgumentError, match=r"backend://d: cannot be read \(.*credentials\)\."):
        dataset.measure("backend://d")
