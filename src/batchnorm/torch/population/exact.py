"""Layer by layer, each through those before it, without running these again."""

from __future__ import annotations

import contextvars
import copy
import ctypes
import itertools
import math
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from ...errors import ArgumentError
from ...moments import Moments
from .batches import is_dense, mark_of, place, tensors_in
from .state import Rng, seed, uses_cuda
from .target import Input, Target, Visit

if TYPE_CHECKING:
    from .session import Session

# A thread that has used OpenMP keeps a pool of its own: so many wait at most, pools included.
_THREADS = 1024

# Once half of what may be kept is, memory is given back to the system after each so many bytes.
_GIVE_BACK = 1 << 25


# Why a sweep over the layers has to be made once more: layers do not run in the order that was
# thought, or batches cannot wait.
_ORDER, _VARIES, _OVERWRITES, _GLOBALS = 1, 2, 3, 4
_REASONS = {
    _VARIES: "the data differ from pass to pass",
    _OVERWRITES: "the data overwrite a batch when they give the next",
    _GLOBALS: "the forward changes settings of the process between layers",
}


class _Left(BaseException):  # not to be caught on the way
    """The forward of a batch ends here: it will be run again, or is not needed."""


class _Run:
    """One batch on its way through the model.

    Attributes
    ----------
    at : Target
        The layer before which it waits; None once it is through.
    thread : Thread
        That in which it waits; None if it has to be run again from the start.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self.at: Target | None = None
        self.last: Moments | None = None
        self.thread: threading.Thread | None = None
        self.go = threading.Semaphore(0)
        self.leaves = False
        self.error: BaseException | None = None
        self.rng: Rng | None = None
        self.calls: Counter[Target] = Counter()
        self.passed = 0
        self.inputs: dict[int, int] = {}  # bytes by where they lie
        self.tensors: list[weakref.ref[Tensor]] = []
        self.bytes = 0


class Exact:
    """Layer by layer: batches run up to the first layer without population statistics, and wait.

    Exactly one of the threads runs at a time, this one or that of a batch, and they pass each other
    a baton: to a batch by `_Run.go`, back by `_back`.
    """

    def __init__(self, session: Session) -> None:
        self.session, self.ranks, self.source = session, session.ranks, session.source
        self.targets = session.targets
        self.memory = session.memory if _may_wait() else 0.0
        self.most = max(1, _room_for_threads() // max(1, torch.get_num_threads()))
        self.runs: list[_Run] = []
        self.order: dict[int, int] | None = None  # rank of each target, once it had to be found out
        self.ahead: set[Target] = set()  # targets measured by running past them
        self.trouble = 0
        self.witness: tuple[_Run, Any, dict[Target, Moments]] | None = None
        self._active = _Run(-1)
        self._back = threading.Semaphore(0)
        self._settings = _settings()
        self._noted = False
        self._held = self._expected = self._waiting = self._seen = 0
        self._surroundings = _Surroundings(session.model)
        tensors = itertools.chain(session.model.parameters(), session.model.buffers())
        self._models = {place(t) for t in tensors if is_dense(t)}
        session.note, session.close, session.visit = self._note, self._close, self._visit

    def measure(self) -> None:
        """Find the statistics of all targets."""
        renewed = False
        while True:
            trouble = self._sweep()
            if trouble == _ORDER:
                self._find_order()
            elif trouble == _VARIES and not renewed:
                renewed = True
                self.source.renew()
            elif trouble:
                self._keep_nothing(_REASONS[trouble])
            elif self.ranks.any(self.ranks.together(self._is_mixed_up)):
                self._keep_nothing("the forward keeps something between layers")
            else:
                break
        if self.ranks.any(self.source.varies) and not self._noted:
            self._note_passes(_REASONS[_VARIES])

    def _keep_nothing(self, why: str) -> None:
        self.memory = 0.0
        self._note_passes(why)

    def _note_passes(self, why: str) -> None:
        self._noted = True
        self.session.notes.append(
            f"{why}; no batch has waited for a layer therefore, and each layer has taken a pass "
            "over the layers before it"
        )

    def _sweep(self) -> int:
        """Measure layer after layer; what went wrong, or 0."""
        self._close()
        for each in self.targets:
            each.forget()
        self.trouble, self.witness = 0, None
        self.ranks.together(self._begin)
        self.session.check_data()
        done = 0
        while True:
            trouble, target = self._next()
            if trouble or target is None:
                return trouble
            if target in self.ahead:
                self.ranks.together(partial(self._look_ahead, target))
            self.session.settle(target)
            done += 1
            self.session.show(f"layer {target.name}", done, len(self.targets))
            self.ranks.together(partial(self._advance, target))

    def _next(self) -> tuple[int, Target | None]:
        """Trouble, and the layer to settle now, before which the least advanced batch waits."""
        best: tuple[float, int] | None = None
        for run in self.runs:
            if run.at is not None:
                place: float = run.passed
                if self.order is not None:
                    place = self.order.get(run.at.index, len(self.targets))
                if best is None or place < best[0]:
                    best = place, run.at.index
        rows = self.ranks.gather([self.trouble, *((math.inf, -1) if best is None else best)])
        # Of processes that are as far advanced, the first is followed.
        _, least, index = min(rows, key=lambda row: float(row[1]))
        return int(rows[:, 0].max()), None if math.isinf(least) else self.targets[int(index)]

    def _begin(self) -> None:
        """Run every batch up to its first layer."""
        self.runs, self._expected = [], 0
        last, mark = None, None
        for index, batch in enumerate(self.source.batches()):
            self._check_source()
            if mark is not None and mark_of(last) != mark:
                self.trouble = _OVERWRITES
            run = _Run(index)
            self.runs.append(run)
            self._start(run, batch)
            self.session.show("first layer, batch", index + 1, self.source.length)
            if self.trouble:
                return
            last, mark = batch, None if run.thread is None else mark_of(batch)

    def _advance(self, target: Target) -> None:
        """Run every batch that waits before a layer, now settled, up to the next one."""
        waiting = [run for run in self.runs if run.at is target]
        self._expected = 0
        if all(run.thread is not None for run in waiting):
            for run in waiting:
                self._resume(run)
                if self.trouble:
                    return
            return
        left = {run.index: run for run in waiting}
        for index, batch in enumerate(self.source.batches()):
            self._check_source()
            if index in left and not self.trouble:
                run = left.pop(index)
                if run.thread is None:
                    self._start(run, batch)
                else:
                    self._resume(run)
            if self.trouble or not left:
                return
        raise ArgumentError(
            f"data must give the same number of batches in every pass, got {len(self.runs)} in the "
            f"first, and then no batch {min(left)}. Pass a list, or use method='precise'."
        )

    def _check_source(self) -> None:
        if self.source.varies and self.memory:
            self.trouble = _VARIES

    # ---- running a batch

    def _start(self, run: _Run, batch: Any) -> None:
        """Run a batch from the beginning."""
        if self.trouble:
            return
        run.at, run.rng, run.passed, run.tensors = None, None, 0, []
        run.calls.clear()
        # Of a tensor that batches are parts of, each holds its part.
        run.inputs = {place(t): t.nbytes for t in tensors_in(batch) if is_dense(t)}
        room = self.memory > 0 and self._held + self._expected <= self.memory
        if room and self._waiting < self.most:
            run.thread = threading.Thread(
                target=contextvars.copy_context().run, args=(self._body, run, [batch]), daemon=True
            )
            try:
                run.thread.start()
                self._waiting += 1
            except RuntimeError:  # the system allows no more of them
                run.thread, self.most = None, self._waiting
        if run.thread is None:
            with self._random_of(run):
                self._active = run
                with suppress(_Left):
                    self.session.call(batch)
            return
        copied = _copy(batch) if self.witness is None else None  # the forward may change it
        self._switch(run)
        if run.thread is not None and self.witness is None and run.at is not None:
            assert run.last is not None
            self.witness = run, copied, {run.at: run.last}

    def _resume(self, run: _Run) -> None:
        self._held -= run.bytes
        run.bytes = 0
        self._switch(run)

    def _body(self, run: _Run, batch: list[Any]) -> None:
        """What the thread of a batch does."""
        run.go.acquire()
        try:
            if not run.leaves:
                with self._surroundings.again():
                    self.session.call(batch.pop())
        except _Left:
            pass
        except BaseException as error:
            run.error = error
        finally:
            self._back.release()

    def _switch(self, run: _Run) -> None:
        """Let the thread of a batch run until it waits or ends."""
        with self._random_of(run):
            self._pass_baton(run)
        if run.error is not None:
            error, run.error = run.error, None
            raise error
        if run.at is not None and _settings() != self._settings:
            # Another batch would begin with these, and leave them behind when it ends.
            self.trouble = _GLOBALS
        if run.at is None or self.trouble:  # it has come to an end
            self._end(run)
            return
        run.bytes = self._expected = self._weight(run)
        if self._held + run.bytes > self.memory:
            self._end(run)
        else:
            self._held += run.bytes
        self._seen += self._expected
        if self._seen >= _GIVE_BACK and self._held > self.memory / 2:
            self._seen = 0
            _give_back_memory()

    def _pass_baton(self, run: _Run) -> None:
        self._active = run
        run.go.release()
        self._back.acquire()

    def _end(self, run: _Run) -> None:
        """End the thread of a batch; it will be run again if it has to go on."""
        assert run.thread is not None
        run.leaves, self._active = True, run
        run.go.release()
        run.thread.join()
        run.thread, run.leaves, run.bytes, run.rng = None, False, 0, None
        run.go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._waiting -= 1

    def _close(self) -> None:
        """End all threads, whatever they do."""
        runs, self.runs, self._held, self._waiting = self.runs, [], 0, 0
        for run in runs:
            run.leaves = True
        for run in runs:
            if run.thread is not None and run.thread.ident is not None:
                run.go.release()
                run.thread.join()
            run.thread = None
        self._back = threading.Semaphore(0)

    @contextmanager
    def _random_of(self, run: _Run) -> Iterator[None]:
        """The random numbers of this batch: the same ones each time that it is run."""
        outside = Rng()
        if run.rng is None:
            seed(run.index)
        else:
            run.rng.restore()
        try:
            yield
        finally:
            run.rng = Rng()
            outside.restore()

    # ---- at a layer

    def _visit(self, target: Target, x: Tensor, mask: Tensor | None) -> Input | None:
        run = self._active
        if run.leaves or (run.thread is None and run.at is not None):  # caught on the way
            raise _Left
        run.calls[target] += 1
        if target.settled:
            if target not in self.ahead and (
                run.calls[target] > 1 or run.index not in target.seen_in
            ):
                self._missed(target)
            run.passed += 1
            return None
        seen = target.measure(x, mask)
        if seen is None:
            return None
        target.add(seen.moments, run.index)
        run.at, run.last = target, seen.moments
        if self.witness is not None and self.witness[0] is run:
            self.witness[2][target] = seen.moments
        if run.thread is None:
            raise _Left
        self._back.release()
        run.go.acquire()
        if run.leaves:
            raise _Left
        run.at = None
        run.passed += 1
        return None

    def _missed(self, target: Target) -> None:
        """Something comes to a layer that was thought to be finished."""
        if self.order is None:
            self.trouble = _ORDER
            raise _Left
        note = (
            f"'{target.name}': which layers run depends on statistics, and some of its inputs were "
            "not measured"
        )
        if note not in self.session.notes:
            self.session.notes.append(note)

    def _whole(self, visit: Visit, after: Callable[[], None] = lambda: None) -> None:
        """Run every batch from the beginning to the end."""
        self.session.visit, self._active = visit, _Run(-1)
        for index, batch in enumerate(self.source.batches()):
            with self._random_of(_Run(index)):
                self.session.call(batch)
            after()
        self.session.visit = self._visit

    def _look_ahead(self, target: Target) -> None:
        """Measure a layer over all its calls; what is not settled normalizes by the batch."""

        def visit(other: Target, x: Tensor, mask: Tensor | None) -> Input | None:
            seen = None if other.settled else other.measure(x, mask)
            if seen is not None and other is target:
                target.add(seen.moments)
            return seen

        target.parts, target.calls = [], 0
        self._whole(visit)

    def _find_order(self) -> None:
        """Run all batches once to see which layers run in what order, and how often.

        A layer comes after all that run before it in some batch. Those that run several times in a
        forward, or before and after each other, are measured by looking ahead.
        """
        self._close()
        for target in self.targets:
            target.forget()
        n = len(self.targets)
        before, again = np.zeros((n, n)), np.zeros(n)
        calls: Counter[int] = Counter()

        def visit(target: Target, x: Tensor, mask: Tensor | None) -> Input | None:
            calls[target.index] += 1
            return target.measure(x, mask)

        def after() -> None:
            sequence = list(calls)  # in the order of first calls
            for i, first in enumerate(sequence):
                before[first, sequence[i + 1 :]] = 1
                again[first] += calls[first] > 1
            calls.clear()

        self.ranks.together(lambda: self._whole(visit, after))
        rows = self.ranks.gather(np.append(before.ravel(), again))
        before, again = rows[:, : n * n].max(0).reshape(n, n), rows[:, n * n :].max(0)
        self.ahead = {self.targets[i] for i in np.flatnonzero(again)}
        left, self.order = list(range(n)), {}
        while left:
            open_before = {i: sum(before[j, i] for j in left if j != i) for i in left}
            first = min(left, key=lambda i: open_before[i])
            if open_before[first]:
                self.ahead.add(self.targets[first])
            self.order[first] = len(self.order)
            left.remove(first)
        for target in self.targets:
            if target in self.ahead:
                self.session.notes.append(
                    f"'{target.name}': it runs several times in a forward, or in another order "
                    "from batch to batch, and was measured while it normalized by the batch"
                )

    def _is_mixed_up(self) -> bool:
        """Whether a batch that has waited saw other inputs than it sees when run in one go."""
        if self.witness is None or len(self.runs) == 1:
            return False
        run, batch, recorded = self.witness
        same = True

        def visit(target: Target, x: Tensor, mask: Tensor | None) -> None:
            nonlocal same
            moments = recorded.get(target)
            if moments is not None and target not in self.ahead and same:
                seen = target.measure(x, mask)
                same = seen is not None and _agree(seen, moments)

        self.session.visit, self._active = visit, _Run(-1)
        with self._random_of(_Run(run.index)):
            self.session.call(batch)
        self.session.visit = self._visit
        return not same

    # ---- what a waiting batch holds

    def _note(self, *values: Any) -> None:
        """Remember the tensors that go into modules and come out, as long as they live."""
        if self._active.thread is not None:
            self._active.tensors += map(weakref.ref, tensors_in(values))

    def _weight(self, run: _Run) -> int:
        """Bytes of the tensors of a batch that are still alive."""
        run.tensors = [ref for ref in run.tensors if ref() is not None]
        sizes: dict[int, int] = {}
        for ref in run.tensors:
            t = ref()
            if t is not None and is_dense(t):
                at = place(t)
                sizes[at] = run.inputs.get(at, t.untyped_storage().nbytes())
        return sum(size for at, size in sizes.items() if at not in self._models)


def _agree(seen: Input, recorded: Moments) -> bool:
    """Whether two moments of the same input differ by no more than rounding.

    What is not deterministic may differ by some units of the type; more than the power 3/4 of one
    is taken for something else. A false alarm costs time, and nothing else.
    """
    allowed = torch.finfo(seen.x.dtype).eps ** 0.75
    mean = np.abs(seen.moments.mean - recorded.mean) <= allowed * recorded.std()
    var = np.abs(seen.moments.m2 - recorded.m2) <= allowed * recorded.m2
    same = np.array_equal(seen.moments.count, recorded.count)
    return bool(seen.moments == recorded or (same and mean.all() and var.all()))


def _copy(batch: Any) -> Any:
    try:
        return copy.deepcopy(batch)
    except (
        RuntimeError,
        TypeError,
        NotImplementedError,
    ):  # what cannot be copied is taken as it is
        return batch


def _room_for_threads() -> int:
    """How many threads may be there at once: an eighth of what the system allows, or _THREADS."""
    limits = [8 * _THREADS]
    with suppress(ImportError, OSError, ValueError):  # not on Windows
        import resource

        limits.append(resource.getrlimit(resource.RLIMIT_NPROC)[0])
    for name in ("/sys/fs/cgroup/pids.max", "/sys/fs/cgroup/pids/pids.max"):
        with suppress(OSError, ValueError):  # "max"
            limits.append(int(Path(name).read_text()))
    return min(limit for limit in limits if limit > 0) // 8


def _give_back_memory() -> None:
    """Return to the system what the C library keeps of memory that was freed.

    glibc keeps some for each thread alone; together it may be as much as is in use.
    """
    with suppress(OSError, TypeError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _settings() -> tuple[Any, ...]:
    """What a forward may set for the while, and what holds for all threads."""
    cudnn, cuda = torch.backends.cudnn, cast(Any, torch.backends.cuda)
    return (
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.mkldnn.enabled,
        (cudnn.enabled, cudnn.benchmark, cudnn.deterministic),
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        tuple(warnings.filters),
    )


def _may_wait() -> bool:
    """Whether a forward can go on in another thread: modes that look on belong to this one."""
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and all(
            isinstance(mode, DeviceContext)
            for mode in _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
        )
    )


class _Surroundings:
    """What torch keeps for each thread, as it is in this one."""

    def __init__(self, model: nn.Module) -> None:
        self.inference = torch.is_inference_mode_enabled()
        self.device = torch.get_default_device()
        tensors = itertools.chain(model.parameters(), model.buffers())
        self.autocasts = [
            (kind, torch.get_autocast_dtype(kind))
            for kind in sorted({"cpu", *(t.device.type for t in tensors)})
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        ]
        self.cache = torch.is_autocast_cache_enabled()
        self.stream = torch.cuda.current_stream() if uses_cuda() else None

    @contextmanager
    def again(self) -> Iterator[None]:
        """The same in the thread that enters."""
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode() if self.inference else torch.no_grad())
            if self.device.type != "cpu":
                stack.enter_context(self.device)
            if self.stream is not None:
                stack.enter_context(torch.cuda.stream(self.stream))
            for kind, dtype in self.autocasts:
                stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=self.cache))
            yield
