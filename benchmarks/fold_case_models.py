"""The PyTorch models of `fold_cases.py`: pairs of every kind, and what may look like a pair.

A model has random weights, statistics, scales and shifts of its own, so that a wrong fold cannot
give a right answer, and is in evaluation mode.
"""

from __future__ import annotations

import itertools
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

CONVOLUTIONS = "convolution"
TRANSPOSED = "transposed convolution"
LINEAR = "linear"
BEFORE = "batch norm before"
CHAINS = "chains and branches"
REUSED = "used more than once"
CODE = "Python in between"
CLASSES = "other classes"
NUMBERS = "numbers"
STATE = "statistics"

ONE_PATH = "an ONNX file holds one path of it"
NOT_HELD = "an ONNX file does not hold this"

#: Rebuilt with ``bias=False`` after it was folded, and given the folded state.
REBUILT = "state dict loaded where bias=False, strict=False"
#: `torch.nn.utils.fusion` is not told that the convolution is transposed.
NOT_ASKED = "transpose=True left out"


#: Makes the arguments of a call, or the only one.
Maker = Callable[[torch.Generator], Any]


def image(*shape: int, mean: float = 0.0, std: float = 1.0) -> Maker:
    """A maker of random input."""
    return lambda generator: mean + std * torch.randn(shape or (2, 4, 8, 8), generator=generator)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, and the inputs to fold and to judge it with.

    Attributes
    ----------
    row
        The line of the table in the docs; several cases may share one.
    build
        Makes the model, whose statistics and scales are then drawn; `change` is applied to it last.
    example, other
        Makers of inputs: those that a tool may see, and more that the result is judged by.
    pairs
        Names of layers and of the batch norms behind them that someone would name who reads the
        model's constructor.
    stays
        Whether no batch norm can be folded by other values of the modules' parameters.
    no_onnx
        Why there is no ONNX file of it.
    """

    name: str
    kind: str
    build: Callable[[], nn.Module]
    row: str = ""
    example: tuple[Maker, ...] = (image(),)
    other: tuple[Maker, ...] = ()
    pairs: tuple[tuple[str, str], ...] = (("conv", "bn"),)
    stays: bool = False
    dtype: torch.dtype = torch.float32
    change: Callable[[Any], object] = field(default=lambda model: None)
    no_onnx: str = ""

    @property
    def line(self) -> str:
        """The line of the table that it belongs to."""
        return self.row or self.name

    def generator(self, more: int = 0) -> torch.Generator:
        """Random numbers of this case alone."""
        return torch.Generator().manual_seed(zlib.crc32(self.name.encode()) + more)

    def model(self) -> nn.Module:
        """The model, the same each time."""
        with torch.random.fork_rng(), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the old weight_norm is deprecated, and in use
            torch.manual_seed(self.generator().initial_seed())
            model = self.build()
            draw(model, self.generator())
            model.eval().to(self.dtype)
            self.change(model)
        return model

    def calls(self, *, examples: bool = False) -> list[tuple[Any, ...]]:
        """Arguments of the calls that judge the model, or of those that tools may see."""
        generator = self.generator(1)
        makers = self.example if examples else (*self.example, *self.other, *self.example)
        made = [make(generator) for make in makers]
        return [
            tuple(
                part.to(self.dtype) if isinstance(part, Tensor) else part
                for part in (call if isinstance(call, tuple) else (call,))
            )
            for call in made
        ]


def draw(model: nn.Module, generator: torch.Generator) -> None:
    """Draw what the batch norms have."""
    for module in model.modules():
        if "BatchNorm" not in type(module).__name__:
            continue
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.3, 3, generator=generator)
        if module.weight is not None:
            size = module.weight.uniform_(0.5, 1.5, generator=generator)
            size *= torch.where(torch.rand(size.shape, generator=generator) < 0.5, -1.0, 1.0)
            module.bias.normal_(generator=generator)


# --- models -----------------------------------------------------------------------------------


class Pair(nn.Module):
    """A batch norm behind a layer."""

    def __init__(self, conv: nn.Module, bn: nn.Module) -> None:
        super().__init__()
        self.conv, self.bn = conv, bn

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class Before(Pair):
    """A batch norm before a layer."""

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.bn(x))


class PreActivation(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.relu(self.bn(x)))


class ReluBetween(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(F.relu(self.conv(x)))


class DropoutBetween(Pair):
    def __init__(self) -> None:
        super().__init__(conv2d(), nn.BatchNorm2d(8))
        self.dropout = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.dropout(self.conv(x)))


class Shuffled(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x).unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2))


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.bn2 = conv2d(), nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.bn(self.conv(x)))


class Sandwich(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn0, self.conv, self.bn = nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(self.bn0(x)))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv2d(4, 4), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = conv2d(4, 4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn(self.conv(x))))))


class RepVGG(nn.Module):
    """Ding et al. (2021): a convolution, one of a single pixel, and the input itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv2d(4, 4, bias=False), nn.BatchNorm2d(4)
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.bn0, self.relu = nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)) + self.bn1(self.conv1(x)) + self.bn0(x))


class MobileOne(nn.Module):
    """Vasu et al. (2023): several depthwise convolutions side by side, and the input itself."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(conv2d(4, 4, groups=4, bias=False) for _ in range(3))
        self.bns = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))
        self.bn0, self.relu = nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn0(x)
        for conv, bn in zip(self.convs, self.bns, strict=True):
            y = y + bn(conv(x))
        return self.relu(y)


class RepBN(nn.Module):
    """Guo et al. (2024): a batch norm and its input are added."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.alpha = nn.BatchNorm1d(6), nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x) + self.alpha * x


class Concatenated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv2d(), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = conv2d(), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.bn(self.conv(x)), self.bn2(self.conv2(x))], 1)


class TwoNorms(nn.Module):
    """One convolution feeds two batch norms."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.bn2 = conv2d(), nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y).sigmoid() + self.bn2(y)


class AlsoAlone(Pair):
    """The convolution is called a second time, without the batch norm."""

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + self.conv(x.flip(-1))


class AlsoReturned(Pair):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x)
        return self.bn(y), y


class AlsoAdded(Pair):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y + F.relu(self.bn(y))


class OneNorm(nn.Module):
    """One batch norm behind two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.conv2, self.bn = conv2d(), conv2d(), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) * self.bn(self.conv2(x))


class NormElsewhere(Pair):
    """The batch norm is called a second time, on something else."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return y + self.bn(x.repeat(1, 2, 1, 1))


class Twice(Pair):
    """Both are called twice, always together."""

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) * self.bn(self.conv(x.flip(-1)))


class NormTwice(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.bn(self.conv(x)))


class Tied(nn.Module):
    """Two convolutions share a weight, and one has a batch norm behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.conv2, self.bn = conv2d(), conv2d(), nn.BatchNorm2d(8)
        self.conv2.weight = self.conv.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) * self.conv2(x)


class TwoNames(nn.Module):
    """The forward calls the pair by other names than those that come first."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv2d(), nn.BatchNorm2d(8)
        self.body = nn.Sequential(self.conv, self.bn, nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class WeightRead(Pair):
    """The forward also uses the convolution's weight itself."""

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + F.conv2d(x, self.conv.weight, padding=1)


class Gated(Pair):
    """A path without the batch norm, for inputs whose mean is above 1."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if x.mean() > 1:
            return y
        return self.bn(y)


class BothPaths(Pair):
    """Two paths, and the pair stays together on both."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return F.relu(y) if x.mean() > 1 else y.sigmoid()


class Flagged(Pair):
    """A path that is chosen when the model is built."""

    skip = False

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y if self.skip else self.bn(y)


class OnRequest(Pair):
    """A path without the batch norm, for callers who ask for it."""

    def forward(self, x: Tensor, raw: bool = False) -> Tensor:
        y = self.conv(x)
        return y if raw else self.bn(y)


class EverySecond(Pair):
    """A path without the batch norm, in every second call."""

    called = 0

    def forward(self, x: Tensor) -> Tensor:
        self.called += 1
        y = self.conv(x)
        return self.bn(y) if self.called % 2 else y


class Loop(nn.Module):
    """As often as the image is wide."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv2d(4, 4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(x.shape[-1] // 4):
            x = self.bn(self.conv(x)).tanh()
        return x


class Blocks(nn.Module):
    """Blocks in a list, each with a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Pair(conv2d(4, 4), nn.BatchNorm2d(4)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = F.relu(block(x))
        return x


class StandardizedConv2d(nn.Conv2d):
    """A subclass whose weight is standardized in each call (Qiao et al. 2019)."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        mean, std = w.mean((1, 2, 3), keepdim=True), w.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, (w - mean) / (std + 1e-5), self.bias, padding=self.padding)


class DoublingBatchNorm2d(nn.BatchNorm2d):
    """A subclass that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def conv2d(channels: int = 4, features: int = 8, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(channels, features, 3, **{"padding": 1, **options})


def pair(**options: Any) -> Pair:
    """The ordinary pair, with options of its convolution."""
    return Pair(conv2d(**options), nn.BatchNorm2d(8))


def doubled(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
    """A forward hook."""
    return 2 * output


# --- cases ------------------------------------------------------------------------------------


def said(**flags: bool) -> str:
    """Flags as words: ", bias, no affine"."""
    return "".join(f", {'' if on else 'no '}{name}" for name, on in flags.items())


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def convolutions() -> Iterator[Case]:
    for rank, groups in itertools.product((1, 2, 3), (1, 2, 4)):
        for transposed in (False, True):
            stem = f"Conv{'Transpose' * transposed}{rank}d"
            layer: Any = getattr(nn, stem)
            norm: Any = getattr(nn, f"BatchNorm{rank}d")
            of_groups = {1: "", 2: ", 2 groups", 4: ", depthwise"}[groups]
            features = 6 if transposed and groups < 4 else 8
            for bias, affine in itertools.product((True, False), repeat=2):
                options: dict[str, Any] = {"padding": 1, "groups": groups, "bias": bias}

                def build(
                    layer: Any = layer,
                    norm: Any = norm,
                    features: int = features,
                    options: dict[str, Any] = options,
                    affine: bool = affine,
                ) -> nn.Module:
                    return Pair(layer(4, features, 3, **options), norm(features, affine=affine))

                case = Case(
                    name=stem + of_groups + said(bias=bias, affine=affine),
                    kind=TRANSPOSED if transposed else CONVOLUTIONS,
                    row=f"{stem[:-2]}1d to 3d{of_groups}",
                    build=build,
                    example=(image(2, 4, *[7, 7, 5][:rank] if rank < 3 else [5, 5, 5]),),
                )
                yield case
                if rank == 2 and not bias and affine:
                    for dtype in (torch.float64, torch.bfloat16, torch.float16):
                        yield replace(
                            case,
                            name=f"{case.name}, {short(dtype)}",
                            row=f"{stem}, {short(dtype)}",
                            dtype=dtype,
                        )


OF_MODES = "Conv2d, padding_mode 'circular', 'reflect', 'replicate'"


def options() -> Iterator[Case]:
    for name, options in {
        "stride 2": {"stride": 2},
        "dilation 2": {"dilation": 2, "padding": 2},
        "padding='same'": {"padding": "same"},
        "padding_mode='circular'": {"padding_mode": "circular"},
        "padding_mode='reflect'": {"padding_mode": "reflect"},
        "padding_mode='replicate'": {"padding_mode": "replicate"},
    }.items():
        yield Case(
            name=f"Conv2d, {name}",
            kind=CONVOLUTIONS,
            row=OF_MODES if "mode" in name else "Conv2d, stride 2, dilation 2, padding='same'",
            build=lambda options=options: pair(**options),
        )
    for name, options in {
        "stride 2, output_padding 1": {"stride": 2, "output_padding": 1},
        "dilation 2": {"dilation": 2},
        NOT_ASKED: {},
    }.items():
        features = 6 if options else 4
        yield Case(
            name=f"ConvTranspose2d, {name}",
            kind=TRANSPOSED,
            row="" if name == NOT_ASKED else "ConvTranspose2d, stride 2, dilation 2",
            build=lambda options=options, features=features: Pair(
                nn.ConvTranspose2d(4, features, 3, **options), nn.BatchNorm2d(features)
            ),
        )
    yield Case(
        name="ConvTranspose2d, depthwise, 4 channels to 4",
        kind=TRANSPOSED,
        build=lambda: Pair(nn.ConvTranspose2d(4, 4, 3, groups=4), nn.BatchNorm2d(4)),
    )


def linear() -> Iterator[Case]:
    for bias, affine in itertools.product((True, False), repeat=2):
        case = Case(
            name="Linear" + said(bias=bias, affine=affine),
            kind=LINEAR,
            row="Linear",
            build=lambda bias=bias, affine=affine: Pair(
                nn.Linear(6, 5, bias=bias), nn.BatchNorm1d(5, affine=affine)
            ),
            example=(image(7, 6),),
        )
        yield case
        if not bias and affine:
            for dtype in (torch.float64, torch.bfloat16, torch.float16):
                name = f"Linear, {short(dtype)}"
                yield replace(case, name=name, row=name, dtype=dtype)
    yield Case(
        name="Linear on (N, L, F), L = F",
        kind=LINEAR,
        build=lambda: Pair(nn.Linear(5, 6), nn.BatchNorm1d(6)),
        example=(image(2, 6, 5),),
        stays=True,
    )
    yield Case(
        name="Linear on (N, L, F), L ≠ F",
        kind=LINEAR,
        build=lambda: Pair(nn.Linear(5, 6), nn.BatchNorm1d(4)),
        example=(image(2, 4, 5),),
        stays=True,
    )
    yield Case(
        name="Conv1d on (C, L) without a batch, C = L",
        kind=CONVOLUTIONS,
        build=lambda: Pair(nn.Conv1d(4, 6, 3, padding=1), nn.BatchNorm1d(6)),
        example=(image(4, 6),),
        stays=True,
    )


def before() -> Iterator[Case]:
    def of(name: str, layer: Callable[[], nn.Module], norm: Any = nn.BatchNorm2d, **more: Any):
        build: Callable[[], nn.Module] = lambda: Before(layer(), norm(4))  # noqa: E731
        return Case(
            **{"name": name, "kind": BEFORE, "build": build, "pairs": (), **more}
        )  # fmt: skip

    yield of("then Conv2d without padding", lambda: conv2d(padding=0))
    yield of("then Conv2d with zero padding", conv2d, stays=True)
    yield of(
        "then Conv2d with zero padding, no shift",
        conv2d,
        change=lambda model: (model.bn.running_mean.zero_(), model.bn.bias.zero_()),
    )
    yield of("then Conv2d, padding_mode='circular'", lambda: conv2d(padding_mode="circular"))
    yield of("then depthwise Conv2d", lambda: conv2d(padding=0, groups=4))
    yield of("then ConvTranspose2d", lambda: nn.ConvTranspose2d(4, 6, 3), stays=True)
    yield of(
        "then Linear", lambda: nn.Linear(4, 5), nn.BatchNorm1d, example=(image(7, 4),)
    )  # fmt: skip
    yield of(
        "then ReLU, Conv2d (pre-activation)",
        conv2d,
        build=lambda: PreActivation(conv2d(padding=0), nn.BatchNorm2d(4)),
        stays=True,
    )
    yield Case(
        name="BatchNorm2d, Conv2d, BatchNorm2d", kind=BEFORE, build=Sandwich
    )  # fmt: skip


def chains() -> Iterator[Case]:
    yield Case(name="Conv2d, two batch norms", kind=CHAINS, build=Chain)
    yield Case(
        name="Conv2d, dropout, batch norm",
        kind=CHAINS,
        build=DropoutBetween,
    )
    yield Case(
        name="Conv2d, ReLU, batch norm",
        kind=CHAINS,
        build=lambda: ReluBetween(conv2d(), nn.BatchNorm2d(8)),
        pairs=(),
        stays=True,
    )
    yield Case(
        name="Conv2d, channel shuffle, batch norm",
        kind=CHAINS,
        build=lambda: Shuffled(conv2d(), nn.BatchNorm2d(8)),
        pairs=(),
        stays=True,
    )
    two = (("conv", "bn"), ("conv2", "bn2"))
    yield Case(name="residual block", kind=CHAINS, build=Residual, pairs=two)
    yield Case(name="two branches, concatenated", kind=CHAINS, build=Concatenated, pairs=two)
    yield Case(
        name="RepVGG block",
        kind=CHAINS,
        build=lambda: nn.Sequential(RepVGG()),
        pairs=(("0.conv", "0.bn"), ("0.conv1", "0.bn1")),
    )
    yield Case(
        name="MobileOne block",
        kind=CHAINS,
        build=lambda: nn.Sequential(MobileOne()),
        pairs=tuple((f"0.convs.{i}", f"0.bns.{i}") for i in range(3)),
    )
    yield Case(
        name="RepBN, then Linear",
        kind=CHAINS,
        build=lambda: nn.Sequential(RepBN(), nn.Linear(6, 5)),
        example=(image(7, 6),),
        pairs=(),
    )


def reused() -> Iterator[Case]:
    def of(name: str, build: Callable[[], nn.Module], **more: Any) -> Case:
        return Case(**{"name": name, "kind": REUSED, "build": build, "stays": True, **more})

    def paired(kind: type[Pair]) -> Callable[[], nn.Module]:
        return lambda: kind(conv2d(), nn.BatchNorm2d(8))

    yield of("Conv2d feeds two batch norms", TwoNorms)
    yield of("Conv2d also called without its batch norm", paired(AlsoAlone))
    yield of("output of Conv2d also returned", paired(AlsoReturned))
    yield of("output of Conv2d also added", paired(AlsoAdded))
    yield of("one batch norm behind two Conv2d", OneNorm, stays=False)
    yield of("batch norm also called on something else", paired(NormElsewhere))
    yield of("both called twice, together", paired(Twice), stays=False)
    yield of("batch norm called twice in a row", paired(NormTwice), stays=False)
    yield of("weight shared with another Conv2d", Tied)
    yield of("both under two names", TwoNames, stays=False)
    yield of("weight also read by the forward", paired(WeightRead))


def code() -> Iterator[Case]:
    def of(name: str, kind: type[nn.Module], **more: Any) -> Case:
        build: Callable[[], nn.Module] = (
            (lambda: kind(conv2d(), nn.BatchNorm2d(8))) if issubclass(kind, Pair) else kind
        )
        return Case(**{"name": name, "kind": CODE, "build": build, "no_onnx": ONE_PATH, **more})

    far = image(mean=3)

    def raw(generator: torch.Generator) -> tuple[Tensor, bool]:
        return image()(generator), True

    yield of("branch on a value skips the batch norm", Gated, example=(image(), far), stays=True)
    yield of("the same, never in the example", Gated, other=(far,), stays=True)
    yield of("branch on a value after the pair", BothPaths, other=(far,))
    yield of("branch on an argument skips the batch norm", OnRequest, other=(raw,), stays=True)
    yield of("every second call skips the batch norm", EverySecond, stays=True)
    yield of("branch on a constant of the model", Flagged, no_onnx="")
    yield of("loop over the width", Loop, other=(image(2, 4, 8, 16),))
    yield of(
        "loop over blocks",
        Blocks,
        pairs=tuple((f"blocks.{i}.conv", f"blocks.{i}.bn") for i in range(3)),
        no_onnx="",
    )
    yield of(
        "Conv2d has a forward hook",
        Pair,
        change=lambda model: model.conv.register_forward_hook(doubled),
        no_onnx="",
        stays=True,
    )
    yield of(
        "batch norm has a forward hook",
        Pair,
        change=lambda model: model.bn.register_forward_hook(doubled),
        no_onnx="",
        stays=True,
    )
    for name, wrap in {
        "weight norm": parametrizations.weight_norm,
        "weight norm of torch.nn.utils": nn.utils.weight_norm,
        "spectral norm": parametrizations.spectral_norm,
        "pruned Conv2d": lambda conv: prune.l1_unstructured(conv, "weight", 0.5),
    }.items():
        yield of(
            name,
            Pair,
            build=lambda wrap=wrap: Pair(wrap(conv2d()), nn.BatchNorm2d(8)),
            no_onnx="",
        )


def classes() -> Iterator[Case]:
    def of(name: str, norm: Callable[[], nn.Module], **more: Any) -> Case:
        build: Callable[[], nn.Module] = lambda: Pair(conv2d(bias=False), norm())  # noqa: E731
        return Case(**{"name": name, "kind": CLASSES, "build": build, **more})

    def frozen() -> nn.Module:
        from torchvision.ops import FrozenBatchNorm2d

        return FrozenBatchNorm2d(8)

    def timm() -> nn.Module:
        from timm.layers import BatchNormAct2d

        return BatchNormAct2d(8)

    def ours(activation: str | None = None) -> nn.Module:
        from batchnorm.torch import BatchNorm2d

        return BatchNorm2d(8, activation=activation)

    yield of("FrozenBatchNorm2d of torchvision", frozen)
    yield of("BatchNormAct2d of timm", timm)
    yield of("SyncBatchNorm", lambda: nn.SyncBatchNorm(8))
    yield of("BatchNorm2d of batchnorm", ours)
    yield of("BatchNorm2d(activation='relu') of batchnorm", lambda: ours("relu"))
    yield of(
        "subclass of Conv2d, weight standardized",
        lambda: nn.Identity(),
        build=lambda: Pair(StandardizedConv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8)),
    )
    yield of("subclass of BatchNorm2d, output doubled", lambda: DoublingBatchNorm2d(8))


def numbers() -> Iterator[Case]:
    def of(name: str, change: Callable[[Any], object], **more: Any) -> Case:
        return Case(**{"name": name, "kind": NUMBERS, "build": pair, "change": change, **more})

    half = torch.float16
    yield of("γ = 0", lambda model: model.bn.weight.zero_())
    yield of("γ < 0", lambda model: model.bn.weight.abs_().neg_())
    yield of("variance 0 in one channel", lambda model: model.bn.running_var[2].zero_())
    faint = (image(std=1e-4),)
    yield of("variance and ε 1e-12", tiny_variance, example=faint)
    yield of("ε = 0.1", lambda model: setattr(model.bn, "eps", 0.1))
    yield of("mean 10,000", lambda model: model.bn.running_mean.add_(1e4))
    name = "variance and ε 1e-12, float16"
    yield of(name, tiny_variance, example=faint, dtype=half, stays=True)
    yield of("bfloat16 Conv2d, float32 batch norm", lambda m: m.bn.float(), dtype=torch.bfloat16)
    yield of("float16 Conv2d, float32 batch norm", lambda m: m.bn.float(), dtype=half)


def tiny_variance(model: Any) -> None:
    """Weights of a half type would have to be larger than it holds."""
    model.bn.running_var.fill_(1e-12)
    model.bn.eps = 1e-12
    model.bn.running_mean.zero_()
    model.conv.bias.zero_()


def state() -> Iterator[Case]:
    yield Case(
        name="momentum=None",
        kind=STATE,
        build=lambda: Pair(conv2d(), nn.BatchNorm2d(8, momentum=None)),
    )
    yield Case(
        name="track_running_stats=False",
        kind=STATE,
        build=lambda: Pair(conv2d(), nn.BatchNorm2d(8, track_running_stats=False)),
        stays=True,
    )
    yield Case(
        name="batch norm in training mode",
        kind=STATE,
        build=pair,
        change=lambda model: model.bn.train(),
        stays=True,
    )
    yield Case(
        name="model in training mode",
        kind=STATE,
        build=pair,
        change=lambda model: model.train(),
        stays=True,
    )
    yield Case(
        name=REBUILT,
        kind=STATE,
        build=lambda: pair(bias=False),
        no_onnx=NOT_HELD,
    )


def cases() -> list[Case]:
    """All of them; without torchvision or timm, without theirs."""
    made = [
        case
        for part in (
            convolutions, options, linear, before, chains, reused, code, classes, numbers, state
        )
        for case in part()
    ]  # fmt: skip
    order = [
        CONVOLUTIONS, TRANSPOSED, LINEAR, BEFORE, CHAINS, REUSED, CODE, CLASSES, NUMBERS,
        STATE,
    ]  # fmt: skip
    return sorted(made, key=lambda case: order.index(case.kind))
