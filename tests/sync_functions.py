"""What the processes of test_torch_sync.py do; see ranks.py."""

from __future__ import annotations

import copy
import os
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from batchnorm.torch import DistributedDataParallel, SyncBatchNorm, convert, native


def arrays(*tensors: Tensor | None) -> list[Any]:
    return [None if t is None else t.detach().clone() for t in tensors]


def step(
    layer: nn.Module, x: Tensor, grad: Tensor, force_torch: bool = False, **more: Any
) -> dict[str, Any]:
    """One forward and backward pass; everything that came of it."""
    supports = native.supports
    if force_torch:
        native.supports = lambda *tensors: False
    try:
        x = x.clone().requires_grad_()
        residual = more.get("residual")
        if residual is not None:
            more["residual"] = residual = residual.clone().requires_grad_()
        y = layer(x, **more)
        y.backward(grad)
    finally:
        native.supports = supports
    return {
        "y": y.detach(),
        "grad_x": x.grad,
        "grad_residual": None if residual is None else residual.grad,
        "grad_weight": None if layer.weight is None else layer.weight.grad,
        "grad_bias": None if layer.bias is None else layer.bias.grad,
        "running_mean": layer.running_mean,
        "running_var": layer.running_var,
        "tracked": layer.num_batches_tracked,
    }


def layer_step(channels: int, keywords: dict[str, Any], **given: Any) -> dict[str, Any]:
    return step(SyncBatchNorm(channels, **keywords), **given)


def in_groups(
    sizes: list[int],
    parts: dict[int, list[Tensor]],
    keywords: dict[str, Any],
    masks: dict[int, list[Tensor]] | None = None,
) -> Any:
    """Running statistics of the same batch over the first n ranks, for every n of `sizes`."""
    rank, found = dist.get_rank(), {}
    for size in sizes:
        group = dist.new_group(range(size))
        if rank < size:
            part = parts[size][rank]
            layer = SyncBatchNorm(part.shape[1], process_group=group, momentum=1.0, **keywords)
            layer.double()
            y = layer(part, mask=None if masks is None else masks[size][rank])
            found[size] = (layer.running_mean, layer.running_var, y.detach())
        dist.barrier()
    return found


def train(model: nn.Module, batches: list[tuple[Tensor, Tensor]], scale: list[float]) -> Any:
    """SGD under DistributedDataParallel; the loss is summed, so that shares may differ."""
    model = DistributedDataParallel(convert(model, sync=True))
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for (x, target), factor in zip(batches, scale, strict=True):
        optimizer.zero_grad()
        loss = ((model(x) - target) ** 2).sum() * factor
        loss.backward()
        optimizer.step()
    return {k: v.clone() for k, v in model.module.state_dict().items()}


def raise_in_layer(channels: int, name: str, reproducible: bool, **given: Tensor) -> Any:
    net = nn.Sequential(nn.BatchNorm1d(channels))
    net = nn.ModuleDict({name: net})
    convert(net, sync=True, reproducible=reproducible)
    x = given.pop("x")
    return net[name][0](x, **given)


def gradients_where_needed(x: Tensor, need: bool) -> Any:
    x = x.clone().requires_grad_(need)
    SyncBatchNorm(x.shape[1])(x).pow(3).sum().backward()
    return x.grad


def negated(x: Tensor, lazily: bool) -> Any:
    """y and the gradient, where both x and the gradient of y are negated."""
    pair = torch.complex(torch.zeros_like(x), x)
    x = pair.conj().imag if lazily else -x
    x = x.detach().requires_grad_()
    y = SyncBatchNorm(x.shape[1])(x)
    y.backward(pair.conj().imag if lazily else -pair.imag)
    return y.detach(), x.grad


def transformed(x: Tensor) -> Any:
    return torch.func.vmap(SyncBatchNorm(x.shape[1]))(x[None])


def leave(rank_that_leaves: int, how: str, backward: bool = False) -> Any:
    """One rank ends, or does not come; the others wait in the layer."""
    layer = SyncBatchNorm(3)
    layer._name = "features.bn"
    x = torch.randn(4, 3, requires_grad=True)
    y = layer(x)
    if dist.get_rank() == rank_that_leaves:
        if how == "killed":
            os._exit(1)
        time.sleep(1000)
    if backward:
        y.sum().backward()
    else:
        layer(x)
    return "not reached"


def checkpointed(x: Tensor, reentrant: bool) -> Any:
    from torch.utils.checkpoint import checkpoint

    layer = SyncBatchNorm(x.shape[1])
    x = x.clone().requires_grad_()
    checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    return layer.running_mean, layer.num_batches_tracked, x.grad


def compiled(x: Tensor) -> Any:
    model = nn.Sequential(nn.Linear(x.shape[1], 4), SyncBatchNorm(4), nn.ReLU())
    torch.manual_seed(0)
    nn.init.normal_(model[0].weight)
    other = copy.deepcopy(model)
    a = torch.compile(model, backend="eager")(x)
    b = other(x)
    return float((a - b).abs().max().detach()), torch.equal(
        model[1].running_mean, other[1].running_mean
    )
