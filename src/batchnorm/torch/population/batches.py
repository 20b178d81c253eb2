"""The data, batch by batch, and the tensors in them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ArgumentError
from .state import Rng


class Source:
    """The batches of `data`, the same ones in every pass as far as random numbers make them."""

    def __init__(self, data: Iterable[Any], samples: int | None, rng: Rng, again: bool) -> None:
        self.data, self.samples, self.rng, self.again = data, samples, rng, again
        self.examples = self.number = 0
        #: Number of batches, where it is known beforehand.
        self.length: int | None = None
        if samples is None and isinstance(data, Sized):
            with suppress(TypeError):  # a loader of an IterableDataset
                self.length = len(data)
        self.varies = False
        self._marks: list[Any] = []

    def renew(self) -> None:
        """Take the next pass for the first: a loader that keeps its workers begins otherwise."""
        self.varies, self._marks = False, []

    def batches(self) -> Iterator[Any]:
        """One pass."""
        first, seen = self.number == 0, 0
        self.rng.restore()
        for index, batch in enumerate(self.data):
            size = _examples(batch, self.samples is not None)
            seen += size
            if first:
                self.examples, self.number = seen, index + 1
            if self.again:
                mark = mark_of(batch)
                if index == len(self._marks):
                    self._marks.append(mark)
                elif self._marks[index] != mark:
                    self.varies = True
            yield batch
            if self.samples is not None and seen >= self.samples:
                return


def _examples(batch: Any, needed: bool) -> int:
    first = next((t for t in tensors_in(batch) if t.dim()), None)
    if first is None and needed:
        raise ArgumentError(
            "samples needs batches with tensors, whose first axis is counted, got "
            f"{type(batch).__name__} without any. Leave samples out, and pass fewer batches."
        )
    return 0 if first is None else first.size(0)


def mark_of(batch: Any) -> list[tuple[Any, str]]:
    """What tells one batch from another."""
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
    """Whether its values lie in memory of its own, and nothing but torch says what they are."""
    return (
        t.layout is torch.strided
        and type(t) in (Tensor, nn.Parameter)
        and not (t.is_meta or t.is_nested or t.is_quantized)
    )


def place(t: Tensor) -> int:
    """Where the memory of a tensor begins."""
    return t.untyped_storage().data_ptr()


def sent(value: Any, device: torch.device) -> Any:
    """A batch on a device."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if callable(getattr(value, "to", None)):  # a PackedSequence, a batch of tokens
        return value.to(device)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(sent(item, device) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(sent(item, device) for item in value)
    if isinstance(value, dict):
        copied = copy.copy(value)
        copied.update((key, sent(item, device)) for key, item in value.items())
        return copied
    if is_dataclass(value) and not isinstance(value, type):
        return replace(
            value, **{f.name: sent(getattr(value, f.name), device) for f in fields(value)}
        )
    return value


def first_item(model: nn.Module, batch: Any) -> Any:
    """Call the model as `recalibrate` does without `forward`."""
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
