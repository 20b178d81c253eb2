"""One update of the running statistics for the micro-batches of one optimizer step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..errors import ArgumentError
from ..native import ROWS
from .freeze import layers_of
from .modules import Layer
from .undo import undone_on_error

__all__ = ["accumulate"]


@contextmanager
def accumulate(model: nn.Module) -> Iterator[None]:
    """Merge the statistics of all forwards inside into one update of the running statistics.

    The moments of the micro-batches are merged (see `batchnorm.Moments`), and update the running
    statistics once, as one large batch of the same inputs would. Normalization is not affected:
    each micro-batch is still normalized by its own mean and variance.

    Parameters
    ----------
    model : Module
        Its batch-norm layers must be ours (see `convert`). Layers with constant statistics, such as
        torchvision's `FrozenBatchNorm2d`, have none to update.

    Raises
    ------
    ArgumentError
        `model` has no batch-norm layer, has one that is not ours, or is inside such a block
        already.

    Notes
    -----
    The update comes at the end of the block. If the block or the update raises an exception, all
    running statistics are as they were before. Copies made inside the block, with `copy`, `pickle`
    or `torch.save`, are not part of it. A call with other buffers, as by
    `torch.func.functional_call`, updates these instead.

    Examples
    --------
    >>> import torch
    >>> from batchnorm.torch import BatchNorm1d, accumulate
    >>> layer, x = BatchNorm1d(2), torch.randn(32, 2)
    >>> with accumulate(layer):
    ...     for micro_batch in x.chunk(4):
    ...         y = layer(micro_batch)
    >>> int(layer.num_batches_tracked), torch.allclose(layer.running_mean, 0.1 * x.mean(0))
    (1, True)
    """
    layers = layers_of(model, "accumulate")
    if any(layer._accumulated is not None for layer in layers):
        raise ArgumentError(
            "accumulate takes a model that is not inside an accumulate block already: leave the "
            "outer block first."
        )
    with undone_on_error(layers):
        for layer in layers:
            total = torch.zeros((1, ROWS, layer.num_features), dtype=torch.float64, device="cpu")
            layer._accumulated = total, layer._buffers.get("running_mean")
    try:
        yield
        _update(layers)
    finally:
        for layer in layers:
            layer.__dict__.pop("_accumulated", None)


def _update(layers: list[Layer]) -> None:
    """Update the running statistics of all layers, or of none."""
    tensors = [t for layer in layers for t in layer._buffers.values() if t is not None]
    before = [(t, t.clone()) for t in tensors]
    try:
        for layer in layers:
            layer.take_accumulated()
    except BaseException:
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)
        raise
