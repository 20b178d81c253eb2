"""Damaged tables give what is there, or an error of one line; seeded, in a process of its own."""

import collections
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pyarrow")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    script = Path(__file__).with_name("damaged_tables.py")
    folder = tmp_path_factory.mktemp("damaged")
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", script, folder],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("suffix", [".parquet", ".feather", ".arrow", ".csv", ".csv.gz"])
def test_measure_and_normalize_refuse_damage_or_give_what_is_there(suffix, outcomes):
    mine = [(what, said) for kind, what, said in outcomes if kind == suffix]
    assert len(mine) == 60
    assert not [case for case in mine if case[1] not in ("refused", "true", "as read")]
    assert collections.Counter(said for _, said in mine)["refused"] > 10


@pytest.mark.parametrize("suffix", [".parquet", ".csv.gz"])
def test_measure_never_gives_another_value_where_there_are_checksums(suffix, outcomes):
    said = {said for kind, _, said in outcomes if kind == suffix}
    assert said <= {"refused", "true"}
