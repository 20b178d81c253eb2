"""Processes: messages between processes, and the promise that all succeed or all raise."""

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from batchnorm.errors import BatchNormError  # noqa: E402
from batchnorm.torch.processes import Processes, SynchronizationError  # noqa: E402
from ranks import Ranks  # noqa: E402

FUNCTIONS = Path(__file__).parent / "processes_functions.py"
CPU = torch.device("cpu")
needs_gloo = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="needs gloo",
)


@pytest.fixture(scope="module")
def three():
    ranks = Ranks(3, FUNCTIONS)
    yield ranks
    ranks.close()


# ---- one process --------------------------------------------------------------------------------


def test_processes_of_one_gather_their_own_values():
    processes = Processes(None, "here")
    assert (processes.size, processes.rank, processes.device) == (1, 0, CPU)
    values = np.ones((2, 3))
    gathered = processes.gather(values)
    assert gathered.shape == (1, 2, 3)
    gathered[:] = 0
    assert values.all()  # not the same memory
    assert processes.any(True)
    assert processes.add("sums", torch.ones(2)).tolist() == [1, 1]
    assert processes.gather_from(lambda: torch.ones(2), 2, CPU).tolist() == [[1, 1]]


@pytest.mark.parametrize("how", ["together", "gather_from"])
def test_processes_of_one_raise_what_is_raised(how):
    def work():
        raise KeyError("inside")

    processes = Processes(None, "here")
    with pytest.raises(KeyError, match="inside"):
        processes.together(work) if how == "together" else processes.gather_from(work, 2, CPU)


def test_synchronization_error_is_ours_and_a_runtime_error():
    assert issubclass(SynchronizationError, BatchNormError)
    assert issubclass(SynchronizationError, RuntimeError)


# ---- several ------------------------------------------------------------------------------------


@needs_gloo
def test_processes_exchange_in_the_order_of_ranks(three):
    for rank, (rows, sums, flags, own) in enumerate(three.run("exchanged")):
        assert rows == [[0, 0.5], [1, 0.5], [2, 0.5]]
        assert sums == [3, 6]
        assert flags == [True, False]
        assert own == rank


@needs_gloo
def test_processes_of_a_group_exchange_among_themselves(three):
    answers = three.run("about", groups=[[0, 2], [1]])
    assert answers[0] == (2, 0, [[0, 0], [2, 0]])
    assert answers[1] == (1, 0, [[1, 1]])
    assert answers[2] == (2, 1, [[0, 0], [2, 0]])


@needs_gloo
def test_processes_refuse_a_group_without_this_process(three):
    answers = three.run("outside")
    assert answers[0] == 1
    for name, message in answers[1:]:
        assert name == "ArgumentError"
        assert "process_group must include this process" in message


@needs_gloo
@pytest.mark.parametrize("interrupt", [False, True])
@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("together", "layer 'a' failed in process 1 of 3"),
        ("gather_from", "layer 'a': rank 1 of the layer's process group raised"),
    ],
)
def test_processes_all_raise_if_one_does(how, text, interrupt, three):
    answers = three.run("failing", how=how, interrupt=interrupt)
    assert answers[1][0] == ("KeyboardInterrupt" if interrupt else "ValueError")
    for name, message, _ in (answers[0], answers[2]):
        assert name == "SynchronizationError"
        assert message.startswith(text)
    # All have left the failed exchange behind them.
    assert [after for _, _, after in answers] == [[0, 1, 2]] * 3


@needs_gloo
def test_processes_say_that_another_one_has_ended():
    ranks = Ranks(2, FUNCTIONS, timeout=20)
    try:
        ranks.start("without_the_last", [{}, {}])
        name, message = ranks.result(0)
    finally:
        ranks.close()
    assert name == "SynchronizationError"
    assert message.startswith("layer 'a': rank 0 of 2 could not exchange numbers")
