"""HDF5 and zarr: the values of the same array in a .npy file, whatever the chunks."""

import pickle
import struct
import subprocess
import sys
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchnorm import cli, dataset
from batchnorm.dataset.sources import FileOptions, arrays, blocks, chunked_files, open_file
from batchnorm.errors import ArgumentError, BatchNormError, DTypeError, ShapeError

# Float64 sums of n ≤ 1e4 values, in any order, about a value of the data: n·u with room.
ROUNDING = 1e-12

FORMATS = ["hdf5", "zarr2", "zarr3"]


def write(path, format, x, *, chunks=None, shards=None, name=None, **options):
    """Write an array in a format; `name` puts it into groups. Return the path with its suffix."""
    if format == "hdf5":
        h5py = pytest.importorskip("h5py")
        path = path.with_suffix(".h5")
        with h5py.File(path, "a") as file:
            file.create_dataset(name or "x", data=x, chunks=chunks, **options)
        return path
    zarr = pytest.importorskip("zarr")
    path = path.with_suffix(".zarr")
    number = int(format[-1])
    options |= {} if chunks is None else {"chunks": chunks}
    options |= {} if shards is None else {"shards": shards}
    with warnings.catch_warnings():  # of types that the format does not name
        warnings.simplefilter("ignore")
        if name is None:
            zarr.create_array(str(path), data=x, zarr_format=number, **options)
        else:
            group = zarr.open_group(str(path), mode="a", zarr_format=number)
            group.create_array(name, data=x, **options)
    return path


@pytest.fixture(params=FORMATS)
def format(request):
    return request.param


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1024)
    monkeypatch.setattr(arrays, "BLOCK_ROWS", 1)


def assert_same(found, expected):
    np.testing.assert_array_equal(found.count, expected.count)
    spread = np.maximum(abs(expected.mean), expected.std())
    assert (abs(found.mean - expected.mean) <= ROUNDING * spread).all()
    np.testing.assert_allclose(found.var(), expected.var(), rtol=1e-11)


# ---- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [None, (60, 5, 11), (17, 3, 6), (30, 1, 11)])
def test_measure_has_the_values_of_the_same_array(chunks, format, tmp_path, rng, small_blocks):
    x = rng.normal(1e4, 2.0, (60, 5, 11)).astype(np.float32)
    path = write(tmp_path / "x", format, x, chunks=chunks)
    for axis in (0, 1, -1):
        assert_same(dataset.measure(path, channel_axis=axis), dataset.measure(x, channel_axis=axis))


@given(
    shape=st.lists(st.integers(1, 12), min_size=2, max_size=4),
    seed=st.integers(0, 999),
    block=st.sampled_from([8, 64, 500, 10_000]),
)
def test_boxes_hold_each_value_once_and_whole_chunks(shape, seed, block):
    rng = np.random.default_rng(seed)
    chunks = tuple(int(rng.integers(1, n + 3)) for n in shape)
    axis = int(rng.integers(len(shape)))
    file = Chunked(shape=tuple(shape), chunks=chunks, channel_axis=axis, block_bytes=block)
    seen = np.zeros(shape, int)
    numbers = {}
    for place, number in file.cuts():
        seen[place] += 1
        numbers.setdefault(place[axis].start, []).append(number)
        for part, side, n in zip(place, chunks, shape, strict=True):
            assert part.start % side == 0
            assert part.stop % side == 0 or part.stop == n
    assert (seen == 1).all()
    for found in numbers.values():
        assert found == list(range(len(found)))


class Chunked(chunked_files.ChunkedFile):
    def __init__(self, **given):
        fields = {"path": "x", "fingerprint": ("x", None, 0, 0), "member": None, "first": 0}
        fields |= {"last": None, "dtype": np.dtype("f8"), "element_bytes": 8}
        for name, value in (fields | given).items():
            object.__setattr__(self, name, value)

    def open_array(self, stack):
        raise AssertionError


@pytest.mark.parametrize("chunks", [(1000, 2), (3, 40), (1, 1), (1000, 40)])
def test_boxes_take_bounded_memory_and_few_reads(chunks):
    file = Chunked(shape=(1000, 40), chunks=chunks, channel_axis=1, block_bytes=8000)
    room = max(1000, int(np.prod(chunks)))
    sizes = [np.prod([part.stop - part.start for part in place]) for place, _ in file.cuts()]
    assert (
        max(sizes) <= chunked_files.WIDEST * room if hasattr(chunked_files, "WIDEST") else 2 * room
    )
    assert len(sizes) <= 2 * 40_000 // room + 1


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4", ">f8", "i1", "u2", ">i4", "i8", "?"])
def test_measure_takes_every_real_type(dtype, format, tmp_path, rng):
    x = rng.integers(0, 2 if dtype == "?" else 100, (60, 3)).astype(dtype)
    path = write(tmp_path / "x", format, x, chunks=(40, 2))
    found = dataset.measure(path, extremes=True)
    assert_same(found, dataset.measure(x.astype(float)))
    np.testing.assert_array_equal(found.extremes, [x.min(0), x.max(0)])


def test_measure_has_the_same_bits_each_time(format, tmp_path, rng, small_blocks):
    path = write(tmp_path / "x", format, rng.standard_normal((300, 5)), chunks=(40, 2))
    assert dataset.measure(path) == dataset.measure(path)


@pytest.mark.parametrize("task_blocks", [1, 3, 16])
def test_pieces_for_other_processes_add_up(task_blocks, format, tmp_path, rng, small_blocks):
    from batchnorm.dataset.block_moments import How, finish, measure_blocks
    from batchnorm.dataset.parts import PairwiseMerge

    path = write(tmp_path / "x", format, rng.standard_normal((300, 5)), chunks=(40, 2))
    file = open_file(str(path), 1, FileOptions())
    merge = PairwiseMerge()
    pieces = file.split(task_blocks)
    assert len(pieces) > 1
    for piece in reversed(pieces):
        merge.update(measure_blocks(pickle.loads(pickle.dumps(piece)), How()))
    assert finish(merge, file).moments == dataset.measure(path).moments


def test_measure_reads_compressed_chunks(tmp_path, rng, small_blocks):
    x = rng.standard_normal((300, 5))
    options = {"chunks": (50, 2), "compression": "gzip", "shuffle": True, "fletcher32": True}
    path = write(tmp_path / "x", "hdf5", x, **options)
    assert_same(dataset.measure(path), dataset.measure(x))


def test_measure_reads_shards(tmp_path, rng, small_blocks):
    x = rng.standard_normal((300, 5))
    path = write(tmp_path / "x", "zarr3", x, chunks=(10, 5), shards=(100, 5))
    assert_same(dataset.measure(path), dataset.measure(x))
    assert open_file(str(path), 1, FileOptions()).chunks == (10, 5)


def test_shards_that_fit_into_a_block_are_read_as_a_whole(tmp_path, rng):
    path = write(tmp_path / "x", "zarr3", rng.random((300, 5)), chunks=(10, 5), shards=(100, 5))
    assert open_file(str(path), 1, FileOptions()).chunks == (100, 5)


def test_measure_of_no_rows_defines_nothing(format, tmp_path):
    path = write(tmp_path / "x", format, np.ones((0, 3)))
    found = dataset.measure(path)
    assert found.count.tolist() == [0, 0, 0]


def test_measure_says_where_a_value_is_missing(format, tmp_path, small_blocks):
    x = np.ones((60, 5, 7))
    x[41, 3, 6] = np.nan
    path = write(tmp_path / "x", format, x, chunks=(9, 2, 4), name="deep/x")
    said = r"\(deep/x\): values must not be missing, got NaN in feature 3 at index \(41, 3, 6\)"
    with pytest.raises(ArgumentError, match=said):
        dataset.measure(path)
    found = dataset.measure(path, missing="skip")
    assert found.missing.tolist() == [0, 0, 0, 1, 0]


def test_measure_reads_a_folder_of_all_kinds(tmp_path, rng):
    x = rng.standard_normal((90, 4))
    for k, format in enumerate(FORMATS):
        write(tmp_path / f"{k}", format, x[30 * k : 30 * k + 30], chunks=(8, 3))
    found = dataset.measure(tmp_path)
    assert [name[-5:] for name in found.files] == ["/0.h5", ".zarr", ".zarr"]
    assert_same(found, dataset.measure(x))


# ---- names --------------------------------------------------------------------------------------


def test_the_only_array_of_numbers_with_two_axes_is_taken(format, tmp_path, rng):
    x = rng.standard_normal((20, 3))
    path = write(tmp_path / "x", format, np.arange(20), name="labels")
    write(tmp_path / "x", format, x, name="train/deep/x")
    assert_same(dataset.measure(path), dataset.measure(x))
    for name in ("train/deep/x", "/train/deep/x"):
        assert_same(dataset.measure(path, array=name), dataset.measure(x))


def test_several_arrays_are_listed(format, tmp_path):
    for name in ("a", "train/b"):
        path = write(tmp_path / "x", format, np.ones((2, 2)), name=name)
    with pytest.raises(ArgumentError, match=r"must hold one array.* 2: a, train/b\. Choose by"):
        dataset.measure(path)
    with pytest.raises(ArgumentError, match=r"has no array 'c'\. It holds: a, train/b"):
        dataset.measure(path, array="c")
    with pytest.raises(ArgumentError, match=r"has no array 'train'\. It holds: a, train/b"):
        dataset.measure(path, array="train")


def test_many_arrays_are_not_all_listed(tmp_path):
    for k in range(30):
        path = write(tmp_path / "x", "hdf5", np.ones((2, 2)), name=f"{k:02}")
    with pytest.raises(ArgumentError, match=r"got 30: 00, .*, 09 and 20 more\. Choose"):
        dataset.measure(path)


def test_one_array_alone_has_no_name(tmp_path):
    path = write(tmp_path / "x", "zarr3", np.ones((2, 2)))
    with pytest.raises(ArgumentError, match=r"x\.zarr: has no array 'x'\. It holds: none"):
        dataset.measure(path, array="x")


@pytest.mark.parametrize(
    ("x", "error", "said"),
    [
        (np.float64(3.0), ShapeError, r"\(x\): must have at least 2 axes.*got shape \(\)"),
        (np.ones(5), ShapeError, r"\(x\): must have at least 2 axes.*got shape \(5,\)"),
        (np.ones((2, 2), complex), DTypeError, r"\(x\): must hold real numbers.*got complex128"),
        (np.array([[b"a", b"b"]]), DTypeError, r"\(x\): must hold real numbers.*S1"),
        (np.ones((2, 2), "f4,i4"), DTypeError, r"\(x\): must hold real numbers"),
    ],
    ids=["scalar", "1-D", "complex", "text", "records"],
)
def test_what_has_no_statistics_is_refused(x, error, said, format, tmp_path):
    path = write(tmp_path / "x", format, x, name="x")
    with pytest.raises(error, match=said):
        dataset.measure(path, array="x")
    with pytest.raises(ArgumentError, match=r"must hold one array.* 0: none"):
        dataset.measure(path)


def test_a_channel_axis_that_is_not_there_is_refused(format, tmp_path):
    path = write(tmp_path / "x", format, np.ones((2, 3)), name="a/x")
    with pytest.raises(ShapeError, match=r"\(a/x\): has no axis 2, its shape is \(2, 3\)"):
        dataset.measure(path, channel_axis=2)


def test_array_is_refused_for_a_file_of_one(tmp_path):
    np.save(tmp_path / "x.npy", np.ones((2, 2)))
    with pytest.raises(ArgumentError, match=r"names one in a \.npz file, HDF5 or zarr, got 'x'"):
        dataset.measure(tmp_path / "x.npy", array="x")


# ---- what is not there --------------------------------------------------------------------------


def test_hdf5_values_that_were_never_written_are_refused(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("chunked", (100, 3), "f4", chunks=(10, 3))[:70] = 1.0
        file.create_dataset("none", (100, 3), "f4")
        file.create_dataset("resized", (100, 3), "f4", chunks=(10, 3), maxshape=(None, 3))[:] = 1.0
        file["resized"].resize((55, 3))
    with pytest.raises(ArgumentError, match=r"\(chunked\): .* got 7 of 10 chunks"):
        dataset.measure(tmp_path / "x.h5", array="chunked")
    with pytest.raises(ArgumentError, match=r"\(none\): .* got 0 of 1200 bytes"):
        dataset.measure(tmp_path / "x.h5", array="none")
    assert dataset.measure(tmp_path / "x.h5", array="resized").count.tolist() == [55, 55, 55]


def test_hdf5_chunks_that_damage_has_moved_out_of_the_array_are_missed(tmp_path):
    h5py = pytest.importorskip("h5py")
    path = write(tmp_path / "x", "hdf5", np.ones((100, 4)), chunks=(10, 2))
    with h5py.File(path) as file:
        if not hasattr(file["x"].id, "chunk_iter"):
            pytest.skip("this version of HDF5 does not list the chunks")
    content = path.read_bytes()
    place = struct.pack("<QQQ", 90, 2, 0)  # as the index has it
    path.write_bytes(content.replace(place, struct.pack("<QQQ", 90, 4, 0)))
    with pytest.raises(ArgumentError, match=r"\(x\): .* got 19 of 20 chunks"):
        dataset.measure(path)


def test_hdf5_values_in_other_files_are_refused(tmp_path):
    h5py = pytest.importorskip("h5py")
    write(tmp_path / "far", "hdf5", np.ones((4, 2)))
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["outside"] = h5py.ExternalLink(str(tmp_path / "far.h5"), "x")
        file["gone"] = h5py.ExternalLink(str(tmp_path / "gone.h5"), "x")
        layout = h5py.VirtualLayout((4, 2), "f8")
        layout[:] = h5py.VirtualSource(str(tmp_path / "gone.h5"), "x", (4, 2))
        file.create_virtual_dataset("view", layout)
        raw = [(str(tmp_path / "raw"), 0, h5py.h5f.UNLIMITED)]
        file.create_dataset("raw", (4, 2), "f8", external=raw)[:] = 1
        file["here"] = np.ones((4, 2))
        file["alias"] = h5py.SoftLink("/here")
    for name in ("outside", "view", "raw"):
        with pytest.raises(ArgumentError, match=rf"\({name}\): must lie in this file"):
            dataset.measure(tmp_path / "x.h5", array=name)
    with pytest.raises(ArgumentError, match=r"has no array 'gone'"):
        dataset.measure(tmp_path / "x.h5", array="gone")
    assert dataset.measure(tmp_path / "x.h5", array="alias").mean.tolist() == [1, 1]


def test_zarr_chunks_that_are_absent_consist_of_the_fill_value(tmp_path):
    zarr = pytest.importorskip("zarr")
    x = zarr.create_array(str(tmp_path / "x.zarr"), shape=(40, 2), chunks=(10, 2), dtype="f8")
    with pytest.raises(ArgumentError, match=r"x\.zarr: .*got 0 of 4 chunks"):
        dataset.measure(tmp_path / "x.zarr")
    x[:10] = 4.0
    assert dataset.measure(tmp_path / "x.zarr").mean.tolist() == [1, 1]
    x.resize((10**6, 2))
    with pytest.raises(ArgumentError, match=r"x\.zarr: .*got 1 of 100000 chunks"):
        dataset.measure(tmp_path / "x.zarr")


def test_chunks_larger_than_memory_are_refused(format, tmp_path, monkeypatch):
    monkeypatch.setattr(chunked_files, "MOST_CHUNK_BYTES", 1000)
    path = write(tmp_path / "x", format, np.ones((100, 2)), chunks=(80, 2))
    said = r"chunks of at most 1,000 bytes.* got \(80, 2\) of 1,280 bytes"
    with pytest.raises(ArgumentError, match=said):
        dataset.measure(path)


# ---- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "make", "said"),
    [
        ("x.h5", lambda p: p.write_bytes(b"text"), r"x\.h5: must be a valid \.h5 file.*signature"),
        ("x.h5", lambda p: p.write_bytes(b""), r"x\.h5: must be a valid \.h5 file"),
        ("x.hdf5", lambda p: None, r"x\.hdf5: there is no such file"),
        ("x.h5", lambda p: p.mkdir(), "must contain .* got none"),
        ("x.zarr", lambda p: p.write_bytes(b"text"), "must be a zarr folder, got a file"),
        ("x.zarr", lambda p: p.mkdir(), r"x\.zarr: must be a valid \.zarr file, but is damaged"),
        ("x.zarr", lambda p: None, r"x\.zarr: there is no such file or folder"),
    ],
)
def test_files_that_are_not_what_they_should_be_are_refused(name, make, said, tmp_path):
    pytest.importorskip("zarr" if name.endswith("zarr") else "h5py")
    make(tmp_path / name)
    with pytest.raises(ArgumentError, match=said) as caught:
        dataset.measure(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_damaged_checksums_are_noticed(tmp_path, rng):
    x = rng.standard_normal((300, 5))
    path = write(tmp_path / "x", "hdf5", x, chunks=(50, 5), fletcher32=True)
    content = bytearray(path.read_bytes())
    at = content.index(x[120, 2].tobytes())
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArgumentError, match=r"x\.h5: must be a valid .*read data"):
        dataset.measure(path)


def test_damaged_chunks_of_zarr_are_noticed(tmp_path):
    path = write(tmp_path / "x", "zarr3", np.ones((300, 5)), chunks=(50, 5))
    chunk = path / "c" / "2" / "0"
    chunk.write_bytes(chunk.read_bytes()[:-3])
    with pytest.raises(ArgumentError, match=r"x\.zarr: must be a valid \.zarr file, but is dam"):
        dataset.measure(path)


def test_a_file_that_is_being_written_is_refused(tmp_path):
    h5py = pytest.importorskip("h5py")
    path = write(tmp_path / "x", "hdf5", np.ones((4, 2)))
    code = "import sys; from batchnorm import cli; sys.exit(cli.main(['stats', 'x.h5']))"
    with h5py.File(path, "r+", locking=True):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
    if done.returncode == 0:
        pytest.skip("this file system has no locks")
    assert done.returncode == cli.UNUSABLE
    assert done.stderr.startswith("batchnorm: x.h5: is open for writing in another process.")
    assert done.stderr.count("\n") == 1


def test_a_filter_that_hdf5_does_not_have_is_named(tmp_path, monkeypatch):
    h5py = pytest.importorskip("h5py")
    path = write(tmp_path / "x", "hdf5", np.ones((4, 2)), chunks=(4, 2), compression="lzf")
    monkeypatch.setattr(h5py.h5z, "filter_avail", lambda code: False)
    monkeypatch.setitem(sys.modules, "hdf5plugin", None)
    with pytest.raises(ArgumentError, match=r"by filter 32000 \(lzf\).*pip install hdf5plugin"):
        dataset.measure(path)


@pytest.mark.parametrize(("module", "format"), [("h5py", "hdf5"), ("zarr", "zarr3")])
def test_a_missing_package_is_one_line(module, format, tmp_path, monkeypatch):
    path = write(tmp_path / "x", format, np.ones((4, 2)))
    monkeypatch.setitem(sys.modules, module, None)
    extra = format.removesuffix("3")
    with pytest.raises(
        BatchNormError, match=rf"need {module}, .*pip install {module} .*the extra \[{extra}\]"
    ):
        dataset.measure(path)


def test_a_file_that_changes_while_it_is_measured_is_refused(format, tmp_path, rng):
    x = rng.standard_normal((60, 4))
    path = write(tmp_path / "x", format, x, chunks=(20, 4))

    def change(label, done, whole):
        if done:
            inside = path if path.is_file() else next(p for p in path.rglob("*0") if p.is_file())
            inside.write_bytes(inside.read_bytes())

    with pytest.raises(ArgumentError, match=r"changed while it was read"):
        dataset.measure(path, progress=change)


def test_a_run_resumes_after_files_that_were_done(format, tmp_path, rng):
    folder = tmp_path / "data"
    folder.mkdir()
    for k in range(3):
        write(folder / f"{k}", format, rng.standard_normal((60, 4)), chunks=(20, 4))

    def interrupt(label, done, whole):
        if "2." in label:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dataset.measure(folder, out=tmp_path / "s.npz", progress=interrupt)
    read, notes = set(), []
    found = dataset.measure(
        folder,
        out=tmp_path / "s.npz",
        progress=lambda label, done, whole: read.add(label),
        note=notes.append,
    )
    assert len(read) == 1
    assert "2 of 3 files" in notes[0]
    assert found == dataset.measure(folder)


# ---- normalize ----------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [None, (60, 5, 11), (17, 3, 6), (60, 1, 11), (19, 5, 4)])
def test_normalize_writes_each_value_in_its_place(chunks, format, tmp_path, rng, small_blocks):
    x = rng.normal(1e4, 2.0, (60, 5, 11)).astype(np.float32)
    path = write(tmp_path / "x", format, x, chunks=chunks)
    found = dataset.measure(path, channel_axis=-1)
    dataset.normalize(path, found, tmp_path / "y.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), dataset.normalize(x, found))
    dataset.normalize(path, found, tmp_path / "y.npy", dtype="f8", channel_axis=2)
    y = np.load(tmp_path / "y.npy")
    assert y.dtype == np.float64
    np.testing.assert_array_equal(y, dataset.normalize(x, found, dtype="f8"))


def test_normalize_of_no_rows_writes_none(format, tmp_path):
    path = write(tmp_path / "x", format, np.ones((0, 3)))
    dataset.normalize(path, dataset.measure(np.ones((2, 3))), tmp_path / "y.npy")
    assert np.load(tmp_path / "y.npy").shape == (0, 3)


@pytest.mark.parametrize("out", ["y.h5", "y.zarr", "y.npz", "y.csv"])
def test_normalize_writes_nothing_but_npy(out, format, tmp_path):
    path = write(tmp_path / "x", format, np.ones((4, 3)))
    found = dataset.measure(path)
    with pytest.raises(ArgumentError, match=r"out must end in \.npy for .* Name it 'y\.npy'"):
        dataset.normalize(path, found, tmp_path / out)
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name]


@pytest.mark.parametrize("out", ["y.h5", "y.zarr"])
def test_normalize_writes_no_array_as_hdf5_or_zarr(out, tmp_path):
    np.save(tmp_path / "x.npy", np.ones((4, 3)))
    found = dataset.measure(tmp_path / "x.npy")
    with pytest.raises(ArgumentError, match=r"out must end in \.npy or \.npz for"):
        dataset.normalize(tmp_path / "x.npy", found, tmp_path / out)


def test_normalize_refuses_a_file_that_changes(format, tmp_path):
    path = write(tmp_path / "x", format, np.ones((60, 4)), chunks=(20, 4))
    found = dataset.measure(path)

    def change(label, done, whole):
        if done:
            inside = path if path.is_file() else next(p for p in path.rglob("*0") if p.is_file())
            inside.write_bytes(inside.read_bytes())

    with pytest.raises(ArgumentError, match="changed while it was read"):
        dataset.normalize(path, found, tmp_path / "y.npy", progress=change)
    assert not (tmp_path / "y.npy").exists()


def test_hdf5_groups_that_hold_each_other_end(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["inner/x"] = np.ones((3, 2))
        file["inner/again"] = file["inner"]
    assert dataset.measure(tmp_path / "x.h5").features == 2
