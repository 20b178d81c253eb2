"""Folders that the package `datasets` has written: which files in them are the data."""

import json
import os

import pytest

from batchnorm import dataset
from batchnorm.errors import ArgumentError

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def write(table, path):
    """Write a stream of Arrow, as `datasets` does."""
    with pa.ipc.new_stream(path, table.schema) as stream:
        stream.write_table(table)


def save_to_disk(folder, shards, **state):
    """Write a folder as Dataset.save_to_disk of the package `datasets` does."""
    folder.mkdir(parents=True)
    kinds = {"int64": "int64", "double": "float64", "string": "string"}
    features = {
        field.name: {"dtype": kinds[str(field.type)], "_type": "Value"}
        for field in shards[0].schema
    }
    note = json.dumps({"info": {"features": features}, "fingerprint": "0"})
    files = [{"filename": f"data-{k:05}-of-{len(shards):05}.arrow"} for k in range(len(shards))]
    for shard, file in zip(shards, files, strict=True):
        write(shard.replace_schema_metadata({"huggingface": note}), folder / file["filename"])
    said = {"_data_files": files, "_fingerprint": "0", "_format_type": None, "_split": None}
    (folder / "state.json").write_text(json.dumps(said | state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    return folder


@pytest.fixture
def saved(tmp_path):
    shards = [pa.table({"a": [1, 3], "s": ["x", "y"]}), pa.table({"a": [5], "s": ["z"]})]
    return save_to_disk(tmp_path / "train", shards)


def test_measure_reads_the_data_of_a_folder_of_hugging_face_and_not_its_cache(saved):
    write(pa.table({"a": [99]}), saved / "cache-0123456789abcdef.arrow")
    notes = []
    found = dataset.measure(saved, numeric=True, note=notes.append)
    assert (found.mean.tolist(), found.count.tolist()) == ([3.0], [3])
    assert any("skipped 1 .arrow" in note and "cache-0123" in note for note in notes)


def test_normalize_writes_what_hugging_face_can_read(saved, tmp_path):
    found = dataset.measure(saved, numeric=True)
    dataset.normalize(saved, found, tmp_path / "y")
    y = pa.ipc.open_stream(tmp_path / "y" / "data-00000-of-00002.arrow").read_all()
    noted = json.loads(y.schema.metadata[b"huggingface"])["info"]["features"]
    assert noted["a"] == {"dtype": "float64", "_type": "Value"}
    assert y.schema.field("a").type == pa.float64()


def test_measure_refuses_a_folder_of_splits(saved):
    folder = saved.parent
    (folder / "dataset_dict.json").write_text('{"splits": ["test", "train"]}')
    said = rf"one split of a data set, got test, train\..*such as {folder}/train"
    with pytest.raises(ArgumentError, match=said):
        dataset.measure(folder)


def test_measure_refuses_the_cache_of_several_splits_unless_one_is_chosen(tmp_path):
    for split, value in (("train", 1), ("test", 100)):
        write(pa.table({"a": [value]}), tmp_path / f"name-{split}.arrow")
    write(pa.table({"a": [50]}), tmp_path / "cache-0.arrow")
    (tmp_path / "dataset_info.json").write_text('{"splits": {"train": {}, "test": {}}}')
    with pytest.raises(ArgumentError, match=r"one split.*--only, such as '\*-train\*\.arrow'"):
        dataset.measure(tmp_path)
    assert dataset.measure(tmp_path, only="*-train*.arrow").mean.tolist() == [1.0]


@pytest.mark.parametrize("key", ["_indices_files", "_indices_data_files"])
def test_measure_refuses_rows_that_an_index_selects(key, tmp_path):
    shard = pa.table({"a": [1, 2]})
    folder = save_to_disk(tmp_path / "f", [shard], **{key: [{"filename": "indices.arrow"}]})
    with pytest.raises(ArgumentError, match="flatten_indices"):
        dataset.measure(folder)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is damaged"),
        ("[]", "it is no object"),
        ("{}", "lists no files of data"),
        ('{"_data_files": [{"filename": "gone.arrow"}]}', "'gone.arrow', which is not there"),
    ],
)
def test_measure_says_that_the_list_of_files_is_damaged(content, said, saved):
    (saved / "state.json").write_text(content)
    with pytest.raises(ArgumentError, match=rf"state\.json: .*{said}"):
        dataset.measure(saved)


def test_measure_reads_a_folder_of_parquet_as_on_the_hub(tmp_path):
    (tmp_path / "data").mkdir()
    for name, value in (("train-00000-of-00002", 1), ("train-00001-of-00002", 3), ("test-0", 9)):
        parquet.write_table(pa.table({"a": [value]}), tmp_path / "data" / f"{name}.parquet")
    (tmp_path / "README.md").write_text("card")
    assert dataset.measure(tmp_path, only="train-*").mean.tolist() == [2.0]


def test_measure_reads_a_folder_of_hugging_face_by_fsspec(saved):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    memory.put(os.fspath(saved), "/hf", recursive=True)
    try:
        assert dataset.measure("memory://hf", numeric=True).mean.tolist() == [3.0]
    finally:
        memory.rm("/hf", recursive=True)
