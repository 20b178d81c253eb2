"""Averaged weights need their own statistics; this compares three ways to measure them.

A network with dropout is trained in small batches, with an exponential moving average (EMA) of its
weights. The running statistics of the averaged model do not belong to the averaged weights.
"""

import copy

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from batchnorm.torch import recalibrate

torch.manual_seed(0)
x = 2 * torch.randn(1024, 8) + 4
label = (x[:, :4].prod(1) > x[:, 4:].prod(1)).long()


def block() -> list[nn.Module]:
    return [nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2)]


network = nn.Sequential(
    nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), *block(), *block(), nn.Linear(32, 2)
)
averaged = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.99))
optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
for _ in range(8):
    for batch, target in zip(x.split(16), label.split(16), strict=True):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(batch), target).backward()
        optimizer.step()
        averaged.update_parameters(network)


def loss(model: nn.Module) -> float:
    with torch.no_grad():
        return float(nn.functional.cross_entropy(model.eval()(x), label))


batches = x.split(16)
by_update_bn, precise, exact = (copy.deepcopy(averaged) for _ in range(3))
update_bn(batches, by_update_bn)
recalibrate(precise, batches)
report = recalibrate(exact, batches, method="exact")
found = {
    "as averaging left them": loss(averaged),
    "update_bn": loss(by_update_bn),
    "recalibrate, precise": loss(precise),
    "recalibrate, exact": loss(exact),
}
print(report, "\n")
for name, value in found.items():
    print(f"{name:24}{value:8.4f}")

# After "exact", each layer has the statistics of its input in evaluation.
inside = exact.module
for k, layer in enumerate(inside):
    if isinstance(layer, nn.BatchNorm1d):
        with torch.no_grad():
            given = inside[:k](x)
        assert torch.allclose(layer.running_mean, given.mean(0), atol=1e-5)
        assert torch.allclose(layer.running_var, given.var(0), rtol=1e-4)
