"""Files that are whole or not there, and what is said when they cannot be written."""

import errno
import os

import pytest

from batchnorm.atomic import check_place, explain_write_errors, replacing
from batchnorm.errors import ArgumentError


def test_replacing_leaves_what_was_there_when_the_block_raises(tmp_path):
    path = tmp_path / "deep" / "x"
    with replacing(path) as beside:
        beside.write_text("earlier")

    def interrupted():
        with replacing(path) as beside:
            beside.write_text("torn")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [(p.name, p.read_text()) for p in path.parent.iterdir()] == [("x", "earlier")]


def test_explain_write_errors_names_the_file_and_the_reason(tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "x"
    said = "file/x: cannot be written .*Make room, or name another"
    with pytest.raises(ArgumentError, match=said), explain_write_errors(path), replacing(path):
        pytest.fail("there is no such folder")
    said = r"x: cannot be written \(No space left on device\)"
    with pytest.raises(ArgumentError, match=said), explain_write_errors(tmp_path / "x"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_explain_write_errors_passes_on_that_the_reader_of_a_pipe_has_gone(tmp_path):
    with pytest.raises(BrokenPipeError), explain_write_errors(tmp_path / "x"):
        raise BrokenPipeError


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", r"is a directory\. Name a file, such as .*example"),
        ("none/x", "Create the directory first"),
        ("x" * 300, "File name too long"),
        ("x" * 250, "File name too long"),  # of what is written beside it
        ("a\0b", "null"),
    ],
    ids=["directory", "no directory", "long", "too long in the end", "NUL"],
)
def test_check_place_refuses_what_could_not_be_written(name, said, tmp_path):
    with pytest.raises(ArgumentError, match=said):
        check_place(tmp_path / name, "a file", "example")
    assert list(tmp_path.iterdir()) == []
