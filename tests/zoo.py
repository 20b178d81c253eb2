"""Networks that are sick in one way each, and healthy ones, with the data that they learn from."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from batchnorm.torch import convert, freeze, parameter_groups, recalibrate

CLASSES = 4


def images(count=256, channels=3, size=12, seed=0):
    """Noisy images of four kinds, and which kind each is."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randn(CLASSES, channels, size, size, generator=generator)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    noise = torch.randn(count, channels, size, size, generator=generator)
    return kinds[labels] + 0.7 * noise, labels


def rows(count=256, features=20, seed=0):
    """Noisy rows of four kinds."""
    x, labels = images(count, 1, 10, seed)
    return x.flatten(1)[:, :features].clone(), labels


def loader(x, y, batch_size=32, **options):
    """Shuffled batches, the same for the same call."""
    options = {"shuffle": True, "drop_last": True, **options}
    generator = torch.Generator().manual_seed(1)
    return DataLoader(TensorDataset(x, y), batch_size, generator=generator, **options)


def train(model, data, steps=80, lr=0.05, optimizer=None):
    """Plain training, which ends at a small rate."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    done = 0
    while done < steps:
        for x, y in data:
            optimizer.zero_grad()
            out = model(x)
            if out.dim() == 4:
                out = out.mean((2, 3))
            loss = F.cross_entropy(out, y) if out.shape[-1] == CLASSES else out.square().mean()
            loss.backward()
            optimizer.step()
            rates.step()
            done += 1
            if done == steps:
                break
    return model


# ---- healthy ------------------------------------------------------------------------------------


def mlp(norm=nn.BatchNorm1d, width=32, features=20, bias=False):
    return nn.Sequential(
        nn.Linear(features, width, bias=bias), norm(width), nn.ReLU(),
        nn.Linear(width, width, bias=bias), norm(width), nn.ReLU(),
        nn.Linear(width, CLASSES),
    )  # fmt: skip


def conv(inputs, outputs, stride=1, groups=1, size=3, norm=nn.BatchNorm2d, act=nn.ReLU):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False),
        norm(outputs),
        act(),
    )


def head(width):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES))


def cnn():
    return nn.Sequential(conv(3, 8), conv(8, 16, 2), conv(16, 16), head(16))


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.one, self.two = conv(width, width), conv(width, width, act=nn.Identity)

    def forward(self, x):
        return F.relu(x + self.two(self.one(x)))


def resnet():
    return nn.Sequential(conv(3, 8), Residual(8), conv(8, 16, 2), Residual(16), head(16))


class PreActivation(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, 1, 1, bias=False) for _ in range(2))

    def forward(self, x):
        y = x
        for norm, conv_ in zip(self.norms, self.convs, strict=True):
            y = conv_(F.relu(norm(y)))
        return x + y


def preactivation():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1), PreActivation(8), PreActivation(8),
        nn.BatchNorm2d(8), nn.ReLU(), head(8),
    )  # fmt: skip


class Dense(nn.Module):
    def __init__(self, inputs, growth):
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.conv = nn.Conv2d(inputs, growth, 3, 1, 1, bias=False)

    def forward(self, x):
        return torch.cat([x, self.conv(F.relu(self.norm(x)))], 1)


def densenet():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1, bias=False), Dense(8, 8), Dense(16, 8), Dense(24, 8),
        nn.BatchNorm2d(32), nn.ReLU(), head(32),
    )  # fmt: skip


class Inverted(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.body = nn.Sequential(
            conv(width, 2 * width, size=1, act=nn.ReLU6),
            conv(2 * width, 2 * width, groups=2 * width, act=nn.ReLU6),
            conv(2 * width, width, size=1, act=nn.Identity),
        )

    def forward(self, x):
        return x + self.body(x)


def mobilenet():
    return nn.Sequential(
        conv(3, 8, 2, act=nn.Hardswish), Inverted(8), Inverted(8), head(8), nn.Dropout(0.2)
    )


class Segmentation(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.inner, self.up = conv(3, 8), conv(8, 16, 2), conv(24, 8)
        self.last = nn.Conv2d(8, CLASSES, 1)

    def forward(self, x):
        high = self.down(x)
        low = F.interpolate(self.inner(high), high.shape[2:], mode="bilinear")
        return self.last(self.up(torch.cat([high, low], 1)))


class Critic(nn.Module):
    """One forward for both halves of a joint batch (CrossQ)."""

    def __init__(self):
        super().__init__()
        self.body = mlp(width=64)

    def forward(self, x):
        now, later = self.body(torch.cat([x, x.flip(0) * 1.3 + 0.5])).chunk(2)
        return now - later


HEALTHY = {
    "mlp": (mlp, rows),
    "cnn": (cnn, images),
    "resnet": (resnet, images),
    "preactivation": (preactivation, images),
    "densenet": (densenet, images),
    "mobilenet": (mobilenet, images),
    "segmentation": (Segmentation, images),
    "critic": (Critic, rows),
}


# ---- sick ---------------------------------------------------------------------------------------


@dataclass
class Case:
    """What `check` is given, which code it must find, and which others come with it."""

    model: nn.Module
    code: str
    data: Any = None
    optimizer: Any = None
    layers: tuple[str, ...] | None = None
    also: tuple[str, ...] = ()


SICK = {}


def sick(function):
    SICK[function.__name__] = function
    return function


def _trained_mlp(**options):
    x, y = rows()
    data = loader(x, y)
    return train(mlp(**options), data), data


def _trained_cnn():
    data = loader(*images())
    return train(cnn(), data), data


@sick
def never_trained_in_evaluation():
    return Case(mlp().eval(), "BN101", loader(*rows()), layers=("1", "4"), also=("BN103",))


@sick
def one_layer_left_out_of_training():
    model, _data = _trained_mlp()
    model[4] = nn.BatchNorm1d(32)
    return Case(model, "BN101", None, layers=("4",))


@sick
def frozen_before_training():
    data = loader(*rows())
    model = freeze(convert(mlp()))
    return Case(train(model, data), "BN101", data, layers=("1", "4"))


@sick
def other_data_at_test_time():
    model, _ = _trained_cnn()
    x, y = images()
    return Case(model.eval(), "BN102", loader(3 * x + 4, y), also=("BN103",))


@sick
def weights_changed_after_training():
    model, data = _trained_mlp()
    with torch.no_grad():
        model[0].weight.mul_(4)
        model[3].weight.add_(0.3)
    return Case(model.eval(), "BN102", data, also=("BN103",))


@sick
def outputs_apart():
    model, data = _trained_mlp()
    with torch.no_grad():
        for layer in (model[1], model[4]):
            layer.running_var.mul_(0.02)
    return Case(model.eval(), "BN103", data, also=("BN102",))


@sick
def nan_in_the_statistics():
    model, data = _trained_mlp()
    model[1].running_mean[3] = float("nan")
    return Case(model.eval(), "BN104", data, layers=("1",), also=("BN102", "BN103"))


@sick
def negative_variance():
    model, _ = _trained_mlp()
    model[4].running_var[0] = -1e-3
    return Case(model.eval(), "BN104", None, layers=("4",), also=("BN202",))


@sick
def few_steps_at_a_small_momentum():
    x, y = rows()
    data = loader(x + 5, y)
    model = mlp()
    for layer in (model[1], model[4]):
        layer.momentum = 0.001
    return Case(train(model, data, 150), "BN105", data, also=("BN102", "BN103"))


class Biased(nn.BatchNorm1d):
    """Stores the variance divided by n."""

    def forward(self, x):
        if self.training:
            self.num_batches_tracked += 1
            with torch.no_grad():
                self.running_mean.lerp_(x.mean(0), self.momentum)
                self.running_var.lerp_(x.var(0, unbiased=False), self.momentum)
            return F.batch_norm(x, None, None, self.weight, self.bias, True, eps=self.eps)
        return super().forward(x)


@sick
def biased_variance():
    data = loader(*rows(), batch_size=16)
    return Case(train(mlp(Biased), data), "BN106", data, layers=("1", "4"))


@sick
def half_precision_statistics():
    model, _ = _trained_mlp()
    return Case(model.half(), "BN107", None, layers=("1", "4"))


@sick
def bfloat16_statistics():
    model, _ = _trained_cnn()
    return Case(model.bfloat16(), "BN107")


def _averaged(update_buffers):
    x, y = rows()
    data = loader(3 * x + 2, y)
    models = [train(mlp(), data) for _ in range(3)]
    averaged = AveragedModel(models[0], use_buffers=update_buffers)
    for model in models:
        averaged.update_parameters(model)
    return averaged.eval(), data


@sick
def averaged_weights():
    model, data = _averaged(False)
    return Case(model, "BN109", data, also=("BN103",))


@sick
def averaged_weights_and_statistics():
    model, data = _averaged(True)
    return Case(model, "BN109", data, also=("BN103",))


@sick
def momentum_of_keras():
    data = loader(*rows())
    model = mlp(lambda n: nn.BatchNorm1d(n, momentum=0.99))
    return Case(train(model, data), "BN110", data)


@sick
def dead_channels():
    model, data = _trained_cnn()
    with torch.no_grad():
        model[1][1].bias[:5] = -50.0
    return Case(model, "BN201", data, layers=("1.1",), also=("BN102",))


@sick
def constant_input():
    x, y = rows()
    x[:, 3:6] = 2.0
    data = loader(x, y)
    model = nn.Sequential(nn.BatchNorm1d(20), *mlp())
    return Case(train(model, data, 300), "BN202", data, layers=("0",))


@sick
def filters_of_zeros():
    model, data = _trained_cnn()
    with torch.no_grad():
        model[2][0].weight[:4] = 0.0
    recalibrate(model, data, progress=False)
    return Case(model, "BN202", data, layers=("2.1",), also=())


@sick
def tiny_inputs():
    x, y = rows()
    data = loader(x * 5e-4, y)
    model = nn.Sequential(nn.BatchNorm1d(20), *mlp())
    train(model, data, 150)
    return Case(model, "BN203", data, layers=("0",))


@sick
def gamma_of_zero():
    model, _data = _trained_cnn()
    with torch.no_grad():
        model[1][1].weight[:3] = 0.0
    return Case(model, "BN204", None, layers=("1.1",))


@sick
def negative_gamma():
    model, _data = _trained_cnn()
    with torch.no_grad():
        model[1][1].weight.abs_().neg_()
    return Case(model, "BN205", None, layers=("1.1",))


@sick
def far_from_zero():
    x, y = rows()
    data = loader(x + 20_000, y)
    model = nn.Sequential(nn.BatchNorm1d(20), *mlp())
    return Case(train(model, data, 150), "BN206", data, layers=("0",))


@sick
def two_examples():
    x, y = rows()
    return Case(mlp(), "BN301", loader(x, y, 2), also=("BN103",))


@sick
def two_images():
    x, y = images()
    return Case(cnn(), "BN301", loader(x, y, 2), also=("BN103",))


@sick
def small_ghost_batches():
    data = loader(*rows())
    return Case(convert(mlp(), group_size=4), "BN301", data, also=("BN103",))


@sick
def last_batch_of_one():
    x, y = rows(257)
    data = loader(x, y, 32, drop_last=False)
    return Case(mlp(), "BN302", data)


@sick
def sorted_by_class():
    x, y = images()
    order = y.argsort()
    model, _ = _trained_cnn()
    data = loader(x[order], y[order], 16, shuffle=False)
    return Case(model, "BN303", data, also=("BN103",))


@sick
def biases_before():
    data = loader(*rows())
    return Case(train(mlp(bias=True), data), "BN401", data, layers=("1", "4"))


@sick
def biases_before_without_data():
    return Case(mlp(bias=True), "BN401", None, layers=("1", "4"))


@sick
def dropout_before():
    model = nn.Sequential(
        nn.Linear(20, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.5),
        nn.Linear(32, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, CLASSES),
    )  # fmt: skip
    data = loader(*rows())
    return Case(train(model, data), "BN402", data, layers=("5",), also=("BN102", "BN103"))


@sick
def one_after_the_activation():
    wrong = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.ReLU(), nn.BatchNorm2d(8))
    model = nn.Sequential(conv(3, 8), conv(8, 8), wrong, conv(8, 8), conv(8, 8), head(8))
    data = loader(*images())
    return Case(train(model, data), "BN403", data, layers=("2.2",))


@sick
def two_in_a_row():
    model = nn.Sequential(
        nn.Linear(20, 32, bias=False), nn.BatchNorm1d(32), nn.BatchNorm1d(32), nn.ReLU(),
        nn.Linear(32, CLASSES),
    )  # fmt: skip
    return Case(model, "BN404", loader(*rows()), layers=("2",))


class Shared(nn.Module):
    """One layer for the inputs of two sensors."""

    def __init__(self):
        super().__init__()
        self.norm, self.out = nn.BatchNorm1d(20), nn.Linear(40, CLASSES)

    def forward(self, x):
        return self.out(torch.cat([self.norm(x), self.norm(20 * x + 60)], 1))


@sick
def shared_by_two_inputs():
    data = loader(*rows())
    return Case(train(Shared(), data), "BN405", data, layers=("norm",), also=("BN102", "BN103"))


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.out = mlp()[:6], nn.Linear(32, CLASSES)

    def forward(self, x):
        return self.out(checkpoint(self.body, x, use_reentrant=False))


@sick
def checkpointed():
    data = loader(*rows())
    return Case(train(Checkpointed(), data), "BN406", data, layers=("body.1", "body.4"))


@sick
def frozen_parameters_in_training():
    model, data = _trained_cnn()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False)
    return Case(model, "BN407", data)


@sick
def evaluation_by_hand():
    model, data = _trained_cnn()
    model[1][1].eval()
    return Case(model, "BN408", data, layers=("1.1",))


@sick
def weight_decay():
    model, data = _trained_mlp()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    return Case(model, "BN410", data, optimizer, layers=("1", "4"))


@sick
def no_running_statistics():
    data = loader(*rows())
    model = mlp(lambda n: nn.BatchNorm1d(n, track_running_stats=False))
    return Case(train(model, data).eval(), "BN411", data, layers=("1", "4"))


def cured_optimizer(model):
    """As `weight_decay`, with groups."""
    return torch.optim.AdamW(parameter_groups(model, 0.05))


def averaged_and_measured():
    """As `averaged_weights`, with statistics of its own."""
    model, data = _averaged(False)
    update_bn((x for x, _ in data), model)
    return model.eval(), data


def state_of(model):
    """Everything that a look must not change."""
    return (
        copy.deepcopy(model.state_dict()),
        [m.training for m in model.modules()],
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        torch.get_rng_state(),
    )
