"""One update of the running statistics for the micro-batches of one optimizer step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..errors import ArgumentError
from .contract import ROWS
from .freeze import layers_of

__all__ = ["accumulate"]


@contextmanager
def accumulate(model: nn.Module) -> Iterator[None]:
    """Merge the statistics of all forwards inside into one update of the running statistics.

    The moments of the micro-batches merge exactly (`batchnorm.Moments`), so that the running
    statistics take up what one large batch of the same inputs would have given them, as one batch.
    What it does not make equal is the normalization: each micro-batch is still normalized by its
    own mean and variance, and so are the gradients.

    Parameters
    ----------
    model : Module
        Its batch norms are ours (see `convert`).

    Raises
    ------
    ArgumentError
        `model` has no batch norm, or one of torch's own, or is being accumulated already.

    Notes
    -----
    The update comes at the end. If an exception leaves the block, the running statistics are those
    from before it.

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
    layers = list(layers_of(model, "accumulate"))
    if any(layer._accumulated is not None for layer in layers):
        raise ArgumentError(
            "accumulate takes a model that is not being accumulated already: leave the outer block "
            "first."
        )
    try:
        for layer in layers:
            total = torch.zeros((1, ROWS, layer.num_features), dtype=torch.float64, device="cpu")
            layer._accumulated = total
        yield
        for layer in layers:
            layer.take_accumulated()
    finally:
        for layer in layers:
            layer._accumulated = None
