"""The parts of `recalibrate` that run alone: threads that pass a baton, budget, order of layers."""

import threading

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from batchnorm.torch.population.baton import PausableThread, Suspended  # noqa: E402
from batchnorm.torch.population.memory import Activations, Budget, addresses_of  # noqa: E402
from batchnorm.torch.population.order import CallOrder, sorted_layers  # noqa: E402

# ---- threads ------------------------------------------------------------------------------------


def test_thread_runs_from_pause_to_pause_while_its_owner_waits():
    events = []

    def work():
        for k in range(2):
            events.append(k)
            thread.pause()
        events.append("end")

    thread = PausableThread(work)
    thread.start()
    for step in "abc":
        events.append(step)
        thread.resume()
    assert events == ["a", 0, "b", 1, "c", "end"]
    thread.stop()


def test_thread_raises_its_error_where_it_is_resumed():
    def work():
        thread.pause()
        raise ValueError("inside")

    thread = PausableThread(work)
    thread.start()
    thread.resume()
    with pytest.raises(ValueError, match="inside"):
        thread.resume()
    thread.stop()


@pytest.mark.parametrize("resumed", [False, True])
def test_thread_ends_when_it_is_stopped(resumed):
    events, before = [], threading.active_count()

    def work():
        events.append("begins")
        try:
            thread.pause()
        except Suspended:
            events.append("suspended")
            raise

    thread = PausableThread(work)
    thread.start()
    if resumed:
        thread.resume()
    thread.stop()
    thread.stop()  # as after an interrupt
    assert events == (["begins", "suspended"] if resumed else [])
    assert threading.active_count() == before


def test_thread_that_was_never_started_can_be_stopped():
    PausableThread(lambda: None).stop()


# ---- memory -------------------------------------------------------------------------------------


def test_activations_count_living_tensors_once_and_none_of_the_model():
    model = nn.Linear(4, 4)
    batch = torch.zeros(10, 4)
    part = batch[:2]  # its storage is the whole batch
    activations = Activations([part], addresses_of(model))
    y = torch.zeros(3, 4)
    activations.note([part, y, {"view": y[1:]}, model.weight])
    assert activations.nbytes() == part.nbytes + y.nbytes
    del y
    assert activations.nbytes() == part.nbytes


def test_budget_has_room_for_a_batch_like_the_last():
    budget = Budget(100)
    assert budget.has_room()
    assert budget.keep(60)
    assert not budget.has_room()
    assert not budget.keep(50)
    budget.begin_layer()
    assert budget.has_room()
    budget.release(60)
    assert budget.keep(100)
    assert not Budget(0).has_room()


# ---- order --------------------------------------------------------------------------------------


def _order(*batches, layers=3):
    calls = CallOrder(layers)
    for batch in batches:
        for layer in batch:
            calls.called(layer)
        calls.end_batch()
    return sorted_layers(calls.before), np.flatnonzero(calls.repeated).tolist()


def test_order_puts_a_layer_after_all_that_run_before_it_in_some_batch():
    assert _order([2, 0], [0, 1]) == (([2, 0, 1], set()), [])


def test_order_names_layers_that_run_before_and_after_each_other():
    (order, circular), repeated = _order([0, 1, 2], [1, 0, 2])
    assert sorted(order[:2]) == [0, 1]
    assert order[2] == 2
    assert len(circular) == 1
    assert circular < {0, 1}
    assert repeated == []


def test_order_names_layers_that_run_several_times_in_a_forward():
    assert _order([0, 1, 0, 2])[1] == [0]
