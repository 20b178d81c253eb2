"""Folders of Hugging Face's `datasets`: which of their files are the data.

Dataset.save_to_disk writes state.json, which lists the files of the data; beside them lie results
of map and filter, as cache-….arrow. The cache of load_dataset has dataset_info.json alone, and the
files of all splits in one folder. DatasetDict.save_to_disk writes a folder for each split, and
dataset_dict.json.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Callable
from typing import Any

from ..errors import ArgumentError
from .addresses import explain_read_errors, join, open_binary

STATE, INFO, SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"


def data_files(
    folder: str, names: list[str], only: str | None, note: Callable[[str], None] | None
) -> list[str]:
    """Return the names of the files in a folder that are data; all, if it is none of `datasets`.

    Parameters
    ----------
    folder, names
        The folder, and its files.
    only
        Pattern of the names of files to take, if any.
    note
        Called with a line about the files that are left out.

    Raises
    ------
    ArgumentError
        The folder holds several splits, or rows that only an index selects, or a file that it lists
        is not there.
    """
    if SPLITS in names:
        splits = _read(folder, SPLITS).get("splits", [])
        _refuse_splits(folder, splits, f"Name one, such as {join(folder, str(_training(splits)))}.")
    if INFO not in names:
        return names
    caches = [name for name in names if fnmatch.fnmatchcase(name, "cache-*.arrow")]
    if STATE in names:
        state = _read(folder, STATE)
        if state.get("_indices_files") or state.get("_indices_data_files"):
            raise ArgumentError(
                f"{folder}: must hold all rows of its files, and selects some by an index. Write "
                "it anew by dataset.flatten_indices().save_to_disk(…)."
            )
        try:
            data = [file["filename"] for file in state["_data_files"]]
        except (KeyError, TypeError) as error:
            raise _damaged(folder, STATE, "it lists no files of data") from error
        if missing := sorted(set(data) - set(names)):
            raise _damaged(folder, STATE, f"it lists {missing[0]!r}, which is not there")
    else:
        data = [name for name in names if name not in caches]
        splits = list(_read(folder, INFO).get("splits") or ())
        if len(splits) > 1 and only is None and any(name.endswith(".arrow") for name in data):
            pattern = f"*-{_training(splits)}*.arrow"
            _refuse_splits(folder, splits, f"Choose one by only=, --only, such as '{pattern}'.")
    others = [name for name in names if name.endswith(".arrow") and name not in data]
    if others and note is not None:
        note(
            f"skipped {len(others)} .arrow in {folder}, such as {others[0]}: what datasets has "
            "computed, not its data"
        )
    return data


def _refuse_splits(folder: str, splits: list[str], remedy: str) -> None:
    raise ArgumentError(
        f"{folder}: must be one split of a data set, got {', '.join(map(str, splits))}. "
        f"Statistics for training must not see the others. {remedy}"
    )


def _training(splits: list[str]) -> str:
    return "train" if "train" in splits or not splits else splits[0]


def _read(folder: str, name: str) -> dict[str, Any]:
    with explain_read_errors(join(folder, name)), open_binary(join(folder, name)) as file:
        content = file.read()
    try:
        said = json.loads(content)
    except ValueError as error:
        raise _damaged(folder, name, str(error)) from error
    if not isinstance(said, dict):
        raise _damaged(folder, name, "it is no object")
    return said


def _damaged(folder: str, name: str, said: str) -> ArgumentError:
    return ArgumentError(
        f"{join(folder, name)}: is damaged ({said}). Copy the folder again, or name its files."
    )
