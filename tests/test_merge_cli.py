"""batchnorm merge: statistics of parts become those of the whole, and none count twice."""

import numpy as np
import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

from batchnorm import cli, dataset
from batchnorm.dataset import Statistics

X = np.random.default_rng(0).normal(3, 2, (60, 4))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, part in (("a", X[:20]), ("b", X[20:50]), ("c", X[50:]), ("wide", X.reshape(30, 8))):
        np.save(f"{name}.npy", part)
        dataset.measure(f"{name}.npy", out=f"{name}.npz")
    dataset.measure("c.npy", out="c.json")
    dataset.measure("c.npy", scale=2.0, out="half.npz")
    return tmp_path


def test_merge_saves_the_statistics_of_the_whole(capsys):
    assert cli.main(["merge", "a.npz", "b.npz", "c.json", "--out", "all.npz"]) == cli.DONE
    found, whole = Statistics.load("all.npz"), dataset.measure(X)
    np.testing.assert_allclose(found.mean, whole.mean, rtol=1e-14)
    np.testing.assert_allclose(found.var(), whole.var(), rtol=1e-14)
    assert found.files == ("a.npy", "b.npy", "c.npy")
    output, errors = capsys.readouterr()
    assert output == "merged 3 files: 4 features, 240 values, 0 missing\nwrote all.npz\n"
    assert errors == ""


def test_merge_keeps_the_order_given():
    parts = [Statistics.load(name) for name in ("c.npz", "a.npz", "b.npz")]
    assert cli.main(["merge", "c.npz", "a.npz", "b.npz", "--out", "all.npz"]) == cli.DONE
    assert Statistics.load("all.npz") == dataset.merge(parts)


def test_merge_may_add_to_one_of_its_files():
    assert cli.main(["merge", "a.npz", "b.npz", "--out", "a.npz"]) == cli.DONE
    assert Statistics.load("a.npz").count[0] == 50


def test_merge_says_which_data_may_count_twice(capsys):
    assert cli.main(["merge", "c.npz", "c.json", "--out", "all.npz"]) == cli.DONE
    assert capsys.readouterr().err == (
        "batchnorm: c.npz and c.json are both of c.npy; if that is the same file, its values "
        "count twice\n"
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a.npz", "./a.npz", "--out", "all.npz"], "a.npz: is named twice"),
        (["a.npz", "b.npz", "wide.npz", "--out", "all.npz"], "a.npz and wide.npz: "),
        (["a.npz", "half.npz", "--out", "all.npz"], "a.npz and half.npz: "),
        (["a.npz", "missing.npz", "--out", "all.npz"], "missing.npz: cannot be read"),
        (["a.npz", "b.npy", "--out", "all.npz"], "'b.npy'"),
        (["a.npz", "b.npz", "--out", "all.txt"], "'all.txt'"),
        (["a.npz", "b.npz", "--out", "no/all.npz"], "'no' is not one"),
        (["a.npz", "b.npz", "--out", "data.npz"], "out must not hold anything but statistics"),
        (["a.npz", "b.npz"], "Missing option '--out'"),
        (["--out", "all.npz"], "Missing argument"),
    ],
    ids=lambda given: " ".join(given) if isinstance(given, list) else "",
)
def test_merge_refuses_in_one_line_and_writes_nothing(arguments, said, folder, capsys):
    np.savez("data.npz", x=X)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert cli.main(["merge", *arguments]) == cli.UNUSABLE
    output, errors = capsys.readouterr()
    assert output == ""
    assert said in errors
    assert errors.count("\n") == 1
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
