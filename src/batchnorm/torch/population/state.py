"""State outside the model: random numbers, settings of the process, and settings of a thread."""

from __future__ import annotations

import itertools
import random
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from ..internals import has_dispatch_modes, has_function_modes, is_transformed


class RngState:
    """The state of the random number generators of torch, NumPy and Python, and of `others`."""

    def __init__(self, others: Iterable[torch.Generator] = ()) -> None:
        self._torch = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if _uses_cuda() else None
        self._numpy = np.random.get_state()  # noqa: NPY002 (it is what others may use)
        self._python = random.getstate()
        self._others = [(generator, generator.get_state()) for generator in others]

    def restore(self) -> None:
        """Set all generators to this state."""
        torch.set_rng_state(self._torch)
        if self._cuda is not None:
            torch.cuda.set_rng_state_all(self._cuda)
        np.random.set_state(self._numpy)  # noqa: NPY002
        random.setstate(self._python)
        for generator, state in self._others:
            generator.set_state(state)


def seed(number: int) -> None:
    """Seed the generators of torch, NumPy and Python."""
    torch.default_generator.manual_seed(number)
    if _uses_cuda():
        torch.cuda.manual_seed_all(number)
    np.random.seed(number)  # noqa: NPY002
    random.seed(number)


def generators_of(data: Any) -> list[torch.Generator]:
    """The random number generators of a data loader and its samplers."""
    samplers = [getattr(data, "sampler", None), getattr(data, "batch_sampler", None)]
    samplers.append(getattr(samplers[1], "sampler", None))
    found = (getattr(owner, "generator", None) for owner in (data, *samplers))
    return [generator for generator in found if isinstance(generator, torch.Generator)]


def _uses_cuda() -> bool:
    """True if CUDA is in use; asking does not initialize it."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def process_settings() -> tuple[Any, ...]:
    """The settings that a forward may change for a while, and that hold for all threads."""
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


def other_threads_can_run_the_model() -> bool:
    """True unless a mode or transformation of the caller's is active, which its thread alone has.

    A default device is such a mode, too, but `ThreadSettings` carries it over.
    """
    return not (has_dispatch_modes() or has_function_modes() or is_transformed())


class ThreadSettings:
    """What torch keeps per thread, taken from the thread that makes this."""

    def __init__(self, model: nn.Module) -> None:
        self._inference = torch.is_inference_mode_enabled()
        self._device = torch.get_default_device()
        tensors = itertools.chain(model.parameters(), model.buffers())
        self._autocasts = [
            (kind, torch.get_autocast_dtype(kind))
            for kind in sorted({"cpu", *(t.device.type for t in tensors)})
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        ]
        self._cache = torch.is_autocast_cache_enabled()
        self._stream = torch.cuda.current_stream() if _uses_cuda() else None

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Apply them to the thread that enters, without gradients."""
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode() if self._inference else torch.no_grad())
            if self._device.type != "cpu":
                stack.enter_context(self._device)
            if self._stream is not None:
                stack.enter_context(torch.cuda.stream(self._stream))
            for kind, dtype in self._autocasts:
                stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=self._cache))
            yield
