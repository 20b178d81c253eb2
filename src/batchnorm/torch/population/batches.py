"""The data, batch by batch, and the tensors in a batch."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ArgumentError
from .state import RngState

Fingerprint = list[tuple[Any, str]]


class Source:
    """The batches of `data`. Every pass starts with the same random numbers.

    Attributes
    ----------
    example_count, batch_count : int
        Of the first pass.
    length : int or None
        Number of batches, if it is known in advance.
    varies : bool
        A later pass gave other batches than the first; only with `compare_passes`.
    """

    def __init__(
        self, data: Iterable[Any], samples: int | None, rng: RngState, compare_passes: bool
    ) -> None:
        self._data, self._samples, self._rng = data, samples, rng
        self._compare_passes = compare_passes
        self.example_count = self.batch_count = 0
        self.length: int | None = None
        if samples is None and isinstance(data, Sized):
            with suppress(TypeError):  # a loader of an IterableDataset
                self.length = len(data)
        self.varies = False
        self._fingerprints: list[Fingerprint] = []

    def forget_first_pass(self) -> None:
        """Compare with the next pass: the first differs if a loader keeps its workers."""
        self.varies, self._fingerprints = False, []

    def batches(self) -> Iterator[Any]:
        """One pass over the data."""
        first, examples = self.batch_count == 0, 0
        self._rng.restore()
        for index, batch in enumerate(self._data):
            examples += _size_of(batch, self._samples is not None)
            if first:
                self.example_count, self.batch_count = examples, index + 1
            if self._compare_passes:
                found = fingerprint(batch)
                if index == len(self._fingerprints):
                    self._fingerprints.append(found)
                elif self._fingerprints[index] != found:
                    self.varies = True
            yield batch
            if self._samples is not None and examples >= self._samples:
                return


def _size_of(batch: Any, required: bool) -> int:
    """Number of examples: the length of the first axis of the first tensor."""
    first = next((t for t in tensors_in(batch) if t.dim()), None)
    if first is None and required:
        raise ArgumentError(
            "samples needs batches with tensors, whose first axis is counted, got "
            f"{type(batch).__name__} without any. Leave samples out, and pass fewer batches."
        )
    return 0 if first is None else first.size(0)


def fingerprint(batch: Any) -> Fingerprint:
    """Shapes and sums of the tensors of a batch, which tell it from another."""
    return [
        (t.shape, str(t.sum(dtype=torch.float64).item())) if is_dense(t) else (t.layout, "")
        for t in tensors_in(batch)
        if not t.is_complex()
    ]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in tuples, lists, dicts and dataclasses."""
    if isinstance(value, Tensor):
        yield value
        return
    if is_dataclass(value) and not isinstance(value, type):
        value = vars(value)
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return
    for item in value:
        yield from tensors_in(item)


def is_dense(t: Tensor) -> bool:
    """True if the values are plain numbers in the tensor's own memory."""
    return (
        t.layout is torch.strided
        and type(t) in (Tensor, nn.Parameter)
        and not (t.is_meta or t.is_nested or t.is_quantized)
    )


def address(t: Tensor) -> int:
    """Address of the storage of a tensor, which views of it share."""
    return t.untyped_storage().data_ptr()


def to_device(value: Any, device: torch.device) -> Any:
    """The batch with its tensors on `device`."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if callable(getattr(value, "to", None)):  # a PackedSequence, a batch of tokens
        return value.to(device)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(to_device(item, device) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(to_device(item, device) for item in value)
    if isinstance(value, dict):
        copied = copy.copy(value)
        copied.update((key, to_device(item, device)) for key, item in value.items())
        return copied
    if is_dataclass(value) and not isinstance(value, type):
        return replace(
            value, **{f.name: to_device(getattr(value, f.name), device) for f in fields(value)}
        )
    return value


def copy_of(batch: Any) -> Any:
    """A deep copy of a batch, or the batch itself if it cannot be copied."""
    try:
        return copy.deepcopy(batch)
    except (RuntimeError, TypeError, NotImplementedError):
        return batch


def call_with_first_item(model: nn.Module, batch: Any) -> Any:
    """Call the model with the first item of a batch: what `recalibrate` does without `forward`."""
    while not isinstance(batch, Tensor):
        if isinstance(batch, Mapping) and len(batch):
            batch = next(iter(batch.values()))
        elif isinstance(batch, (tuple, list)) and len(batch):
            batch = batch[0]
        else:
            raise ArgumentError(
                "data must give tensors, or tuples or dicts whose first item is one, got "
                f"{type(batch).__name__}. Pass forward=lambda model, batch: ..., which calls the "
                "model."
            )
    return model(batch)
