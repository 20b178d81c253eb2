"""The check that every wheel passes (smoke.py), on the installed package."""

import sys

import pytest

import smoke
from batchnorm import _core


def test_smoke_values_are_right(instruction_set):
    smoke.check_values(instruction_set)


@pytest.mark.skipif(sys.platform != "linux" or not _core.has_openmp(), reason="no libgomp here")
@pytest.mark.parametrize("first", ["batchnorm", "torch"])
def test_smoke_torch_and_batchnorm_load_one_libgomp(first):
    pytest.importorskip("torch")
    assert len(smoke.libgomps(first)) == 1
