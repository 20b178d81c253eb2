"""`fold_file`: data outside of the model, damaged files, and what is written or not."""

import os
import random

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx
from onnx import TensorProto

from batchnorm.errors import ArgumentError, BatchNormError
from batchnorm.inputs import read_inputs
from batchnorm.onnx import FoldError, files, fold_file
from onnx_models import array, convolutions, operators, reference

X = {"x": array(2, 4, 6, 5)}
BODY = "z = Conv(x, w) n = BatchNormalization(z, s, b, m, v) q = Conv(n, u, c) y = Relu(q)"


def save(folder, external=False, body=BODY, **options):
    """A model in a file, whose tensors may be in another."""
    proto = convolutions(body, **options)
    where = {"save_as_external_data": True, "size_threshold": 0, "location": "model.data"}
    onnx.save(proto, folder / "model.onnx", **(where if external else {}))
    return folder / "model.onnx"


def listing(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def check_same(one, other):
    for a, b in zip(reference(onnx.load(one), X), reference(onnx.load(other), X), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("inputs", [None, X], ids=["unverified", "verified"])
@pytest.mark.parametrize("external", [False, True])
def test_fold_file_writes_the_folded_model(tmp_path, external, inputs):
    path, out = save(tmp_path, external), tmp_path / "sub" / "out.onnx"
    out.parent.mkdir()
    before = listing(tmp_path)
    report = fold_file(path, out, inputs)
    assert report.verified == (inputs is not None)
    assert set(listing(out.parent)) == {"out.onnx"} | ({"out.onnx.data"} if external else set())
    assert listing(tmp_path) == before
    assert operators(onnx.load(out).graph) == ["Conv", "Conv", "Relu"]
    onnx.checker.check_model(str(out), full_check=True)
    check_same(path, out)


def test_fold_file_keeps_data_outside_that_were_there(tmp_path):
    path, out = save(tmp_path, external=True), tmp_path / "out.onnx"
    fold_file(path, out)
    tensors = {t.name: t for t in onnx.load(out, load_external_data=False).graph.initializer}
    assert {n: t.data_location for n, t in tensors.items()} == {
        "w": TensorProto.DEFAULT,  # 576 bytes
        "w_bias": TensorProto.DEFAULT,
        "u": TensorProto.EXTERNAL,
        "c": TensorProto.EXTERNAL,
    }
    assert {e.value for e in tensors["u"].external_data if e.key == "location"} == {"out.onnx.data"}


def test_fold_file_reads_constants_of_inner_graphs_outside_of_the_model(tmp_path):
    body = """y = If(k)<then_branch = t () => (T[A, B, D, E] e) {
            z = Conv(x, w) e = BatchNormalization(z, s, b, m, v) },
        else_branch = f () => (T[F, G, I, J] g) { g = Conv(x, u) }>"""
    path, out = save(tmp_path, True, body, inputs=", bool k"), tmp_path / "out.onnx"
    report = fold_file(path, out, {**X, "k": np.array(True)})
    assert len(report.pairs) == 1
    onnx.checker.check_model(str(out), full_check=True)


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("inputs", [None, X], ids=["unverified", "verified"])
def test_fold_file_writes_data_outside_if_the_model_is_too_large(
    tmp_path, inputs, external, monkeypatch
):
    monkeypatch.setattr(files, "LIMIT", 500)
    monkeypatch.setattr(files, "SMALL", 100)
    path, out = save(tmp_path, external), tmp_path / "out.onnx"
    report = fold_file(path, out, inputs)
    assert len(report.pairs) == 1
    assert (tmp_path / "out.onnx.data").stat().st_size > 500
    assert out.stat().st_size < 1000
    check_same(path, out)


def test_fold_file_replaces_what_is_there(tmp_path):
    path, out = save(tmp_path), tmp_path / "out.onnx"
    out.write_text("something else")
    fold_file(path, out)
    check_same(path, out)


@pytest.mark.parametrize("name", ["model.onnx", "./model.onnx", "model.data", "link.onnx"])
def test_fold_file_does_not_replace_the_model_or_its_data(tmp_path, name):
    path = save(tmp_path, external=True)
    os.link(path, tmp_path / "link.onnx")
    before = listing(tmp_path)
    with pytest.raises(ArgumentError, match="out must be another file than the model"):
        fold_file(path, tmp_path / name)
    assert listing(tmp_path) == before


def test_fold_file_does_not_replace_the_data_of_the_model_by_its_own(tmp_path):
    proto = convolutions(BODY)
    path = tmp_path / "model.onnx"
    onnx.save(proto, path, save_as_external_data=True, size_threshold=0, location="out.onnx.data")
    before = listing(tmp_path)
    with pytest.raises(ArgumentError, match=r"would replace '.*out.onnx.data'"):
        fold_file(path, tmp_path / "out.onnx")
    assert listing(tmp_path) == before


def test_fold_file_writes_nothing_when_strict_and_something_is_refused(tmp_path):
    path = save(
        tmp_path, True, "z = Conv(x, w) n = BatchNormalization(z, s, b, m, v) y = Add(n, z)"
    )
    before = listing(tmp_path)
    with pytest.raises(FoldError):
        fold_file(path, tmp_path / "out.onnx", strict=True)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("external", [False, True])
def test_fold_file_writes_nothing_when_writing_fails(tmp_path, external, monkeypatch):
    path, out = save(tmp_path, external), tmp_path / "out.onnx"
    before = listing(tmp_path)
    if external:
        (tmp_path / "out.onnx.data").mkdir()  # which no file can replace
    else:
        monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(ArgumentError, match=r"out.onnx: cannot be written"):
        fold_file(path, out)
    assert listing(tmp_path) == before


# ---- damaged and hostile files ------------------------------------------------------------------


def fails(path, out, inputs=None):
    """The error of `fold_file`, which is one line and leaves nothing behind."""
    before = listing(path.parent)
    with pytest.raises(BatchNormError) as raised:
        fold_file(path, out, inputs)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 600
    assert listing(path.parent) == before
    return str(raised.value)


def set_entry(path, key, value):
    proto = onnx.load(path, load_external_data=False)
    for tensor in proto.graph.initializer:
        entries = {e.key: e.value for e in tensor.external_data}
        del tensor.external_data[:]
        for name, old in {**entries, key: value}.items():
            tensor.external_data.add(key=name, value=old)
    path.write_bytes(proto.SerializeToString())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("location", "/etc/passwd", "must lie in the folder of the model, got '/etc/passwd'"),
        ("location", "../outside.data", "must lie in the folder of the model"),
        ("location", "a/../../outside.data", "must lie in the folder of the model"),
        ("location", "missing.data", "but is no file"),
        ("location", "", "but is no file"),
        ("location", "a\0b", "must lie in the folder of the model"),
        ("location", "link.data", "must lie in the folder of the model"),
        ("offset", "100000", "but the file has"),
        ("offset", "-8", "but the file has"),
        ("offset", "eight", "cannot be read"),
        ("length", "100000", "but the file has"),
        ("length", "-1", "but the file has"),
        ("length", "12", "cannot be read"),
    ],
)
def test_fold_file_raises_for_data_that_are_not_there(tmp_path, key, value, message):
    folder = tmp_path / "folder"
    folder.mkdir()
    path = save(folder, external=True)
    (tmp_path / "outside.data").write_bytes(bytes(10_000))
    os.symlink(tmp_path / "outside.data", folder / "link.data")
    set_entry(path, key, value)
    assert message in fails(path, folder / "out.onnx")


def test_fold_file_raises_for_truncated_data(tmp_path):
    path = save(tmp_path, external=True)
    data = tmp_path / "model.data"
    data.write_bytes(data.read_bytes()[:-1])
    assert "but the file has" in fails(path, tmp_path / "out.onnx")


@pytest.mark.parametrize(
    "content", [b"", b"no model", b"PK\x03\x04" + bytes(100), b"\x0a" * 1000, b"\xff" * 1000]
)
def test_fold_file_raises_for_files_that_are_no_models(tmp_path, content):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    assert str(path) in fails(path, tmp_path / "out.onnx")


def test_fold_file_raises_for_a_file_that_is_missing(tmp_path):
    assert "there is no such file" in fails(tmp_path / "model.onnx", tmp_path / "out.onnx")
    assert "not a regular file" in fails(tmp_path, tmp_path / "out.onnx")
    assert "there is no such file" in fails(tmp_path / ("a" * 300), tmp_path / "out.onnx")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_fold_file_does_not_wait_for_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "model.onnx")
    assert "not a regular file" in fails(tmp_path / "model.onnx", tmp_path / "out.onnx")


def test_fold_file_raises_for_a_graph_that_goes_in_circles(tmp_path):
    proto = convolutions(
        "z = Conv(q, w) n = BatchNormalization(z, s, b, m, v) q = Relu(n) y = Relu(n)"
    )
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    assert "topologically sorted" in fails(path, tmp_path / "out.onnx")


def test_fold_file_raises_for_functions_that_call_themselves(tmp_path):
    proto = convolutions(
        "z = Conv(x, w) n = BatchNormalization(z, s, b, m, v) y = my.f(n)", domains=', "my": 1',
        functions='<domain: "my", opset_import: ["": 17, "my": 1]> f (h) => (r) { r = my.f(h) }',
    )  # fmt: skip
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    fails(path, tmp_path / "out.onnx", X)


def test_fold_file_reads_long_chains(tmp_path):
    """Longer than Python's stack."""
    chain = [f"w{i + 1} = Identity(w{i})" for i in range(1500)]
    chain += ["p = Conv(x, w1500) r = BatchNormalization(p, s, b, m, v)"]
    chain += ["h = Relu(r) z = Conv(h, w0) n0 = BatchNormalization(z, s, b, m, v)"]
    chain += [f"n{i + 1} = Add(n{i}, c)" for i in range(1500)]
    path = save(tmp_path, body=f"{' '.join(chain)} y = Relu(n1500)", more={"w0": array(4, 4, 1, 1)})
    report = fold_file(path, tmp_path / "out.onnx")
    assert (len(report.pairs), len(report.refused)) == (1, 1)
    assert operators(onnx.load(tmp_path / "out.onnx").graph).count("Add") == 1500


def test_fold_file_raises_for_or_folds_files_with_damage(tmp_path):
    """Bytes that are changed, lost or doubled: one line or a model that is valid."""
    small = save(tmp_path, body="z = Conv(x, w) n = BatchNormalization(z, s, b, m, v) y = Relu(n)",
                 more={"w": array(4, 4, 1, 1)})  # fmt: skip
    whole = small.read_bytes()
    path, out = tmp_path / "damaged.onnx", tmp_path / "out.onnx"
    random_numbers, messages = random.Random(0), []
    for _ in range(400):
        content = bytearray(whole)
        for _ in range(random_numbers.randint(1, 4)):
            place = random_numbers.randrange(len(content))
            how = random_numbers.randrange(4)
            if how == 0:
                content[place] ^= 1 << random_numbers.randrange(8)
            elif how == 1:
                content[place] = random_numbers.randrange(256)
            elif how == 2:
                del content[place : place + random_numbers.randint(1, 30)]
            else:
                content[place:place] = content[place : place + random_numbers.randint(1, 30)]
        path.write_bytes(content)
        out.unlink(missing_ok=True)
        try:
            fold_file(path, out)
            onnx.checker.check_model(str(out))
        except BatchNormError as error:
            messages.append(str(error))
            assert not out.exists()
    assert 20 < len(messages) < 380
    assert not any("\n" in message for message in messages)


# ---- inputs -------------------------------------------------------------------------------------


def test_read_inputs_returns_arrays_by_name(tmp_path):
    np.savez(tmp_path / "x.npz", **X)
    assert np.array_equal(read_inputs(tmp_path / "x.npz")["x"], X["x"])


def test_read_inputs_names_what_is_wrong(tmp_path):
    path = tmp_path / "x.npz"
    for missing in (path, tmp_path / ("a" * 300)):
        with pytest.raises(ArgumentError, match="there is no such file"):
            read_inputs(missing)
    for content in (b"", b"PK\x03\x04", b"\x80\x04."):
        path.write_bytes(content)
        with pytest.raises(ArgumentError, match="must be an .npz file, but it cannot be read"):
            read_inputs(path)
    np.savez(path, x=np.array([{}], object))
    with pytest.raises(ArgumentError, match="cannot be read"):
        read_inputs(path)


def test_read_inputs_of_an_npy_file_is_the_first(tmp_path):
    np.save(tmp_path / "x.npy", X["x"])
    found = read_inputs(tmp_path / "x.npy")
    assert list(found) == ["arr_0"]
    assert np.array_equal(found["arr_0"], X["x"])
