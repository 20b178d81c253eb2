"""Fold the batch norms of models of torchvision and timm, and compare before and after.

python benchmarks/fold_models.py --out benchmarks/results
python benchmarks/fold_models.py --quick                    four models

Writes fold_models.csv, fold_models_reasons.csv and fold_models.json (what it was measured on).
Weights are random, and statistics are those of random images (`recalibrate`), one batch norm after
another, so that values neither vanish nor grow; the examples are other random images.

fold_models.csv
    A line for the model as it is and one for the folded one: batch norms that were folded, refused,
    and left because no linear layer is next to them; how far outputs differ (``error``, and over
    the largest output ``relative_error``), how far each model is from its run in float64
    (``float64_error``), the largest error of a pair over its bound (``share``), and the time of an
    inference, interleaved; ``ratio`` is to the model as it is.

fold_models_reasons.csv
    A line for each batch norm that was not folded.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import command

from batchnorm.bench.rows import Row, TimedRow, timed
from batchnorm.bench.timing import interleave, sample
from batchnorm.progress import steps

ORIGINAL, FOLDED = "as it is", "folded"
BATCH = 2

TORCHVISION = (
    "vgg11_bn", "resnet18", "resnet50", "resnext50_32x4d", "densenet121", "googlenet",
    "inception_v3", "mobilenet_v2", "mobilenet_v3_large", "mnasnet1_0", "shufflenet_v2_x1_0",
    "efficientnet_b0", "efficientnet_v2_s", "regnet_y_400mf", "lraspp_mobilenet_v3_large",
    "deeplabv3_mobilenet_v3_large", "r3d_18", "mc3_18",
)  # fmt: skip
TIMM = (
    "resnet26d", "resnetv2_50", "resnest14d", "res2net50_26w_4s", "skresnet18", "seresnet33ts",
    "cspresnet50", "ese_vovnet19b_dw", "hrnet_w18_small", "dla34", "dpn68", "densenet121",
    "xception41", "inception_v4", "selecsls42", "efficientnet_b0", "tf_efficientnet_b0",
    "mobilenetv3_small_100", "mobilenetv4_conv_small", "ghostnet_100", "mixnet_s", "rexnet_100",
    "regnetx_002", "tinynet_a", "lcnet_050", "hardcorenas_a", "repvgg_a0", "mobileone_s0",
    "repvit_m0_9", "fastvit_t8", "levit_128s", "mobilevit_xxs", "vit_tiny_patch16_224",
)  # fmt: skip
QUICK = {"torchvision": ("resnet18", "densenet121"), "timm": ("mobilenetv3_small_100", "repvgg_a0")}


@dataclass(frozen=True, kw_only=True)
class ModelRow(TimedRow):
    """A model as it is, or folded; a line of ``fold_models.csv``."""

    library: str
    model: str
    shape: str = ""
    folded: int = 0
    refused: int = 0
    left: int = 0
    error: float = math.nan
    relative_error: float = math.nan
    float64_error: float = math.nan
    share: float = math.nan


@dataclass(frozen=True, kw_only=True)
class ReasonRow(Row):
    """A batch norm that was not folded; a line of ``fold_models_reasons.csv``."""

    model: str
    norm: str
    kind: str
    why: str


def make_model(library: str, name: str) -> tuple[Any, tuple[int, ...]]:
    """A model with random weights, and the shape of its input."""
    if library == "timm":
        import timm

        model = timm.create_model(name)
        config: dict[str, Any] = model.pretrained_cfg
        size = config["input_size"][-1] if config.get("fixed_input_size") else 160
        return model, (BATCH, 3, size, size)
    import torchvision

    options: dict[str, Any] = {"weights": None}
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False  # which takes a minute
    if name.startswith(("lraspp", "deeplab", "fcn")):
        options["weights_backbone"] = None
    model = torchvision.models.get_model(name, **options)
    if name in ("r3d_18", "mc3_18"):
        return model, (1, 3, 8, 64, 64)
    size = 299 if name == "inception_v3" else 160
    return model, (BATCH, 3, size, size)


def prepared(model: Any, shape: tuple[int, ...], seed: int) -> Any:
    """The model in evaluation, with random scales and shifts and its statistics on random input."""
    import torch

    from batchnorm.torch import recalibrate
    from batchnorm.torch.diagnose.wiring import is_batch_norm

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in filter(is_batch_norm, model.modules()):
            if module.weight is not None:
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.uniform_(-0.3, 0.3, generator=generator)
    model.eval()
    data = [torch.randn(shape, generator=generator) for _ in range(2)]
    if any(map(is_batch_norm, model.modules())):
        recalibrate(model, data, method="exact", progress=False)
    return model


def examine(library: str, name: str, options: argparse.Namespace) -> tuple[list[Any], list[Any]]:
    """The lines of one model in both files."""
    import torch

    from batchnorm.torch import fold

    torch.manual_seed(options.seed)
    model, shape = make_model(library, name)
    model = prepared(model, shape, options.seed)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(options.seed + 1))
    folded, report = fold(model, x)
    common = {"library": library, "model": name, "shape": "x".join(map(str, shape))}
    before = ModelRow(provider=ORIGINAL, float64_error=report.original_error or math.nan, **common)
    after = ModelRow(
        provider=FOLDED,
        folded=len(report.folded),
        refused=len(report.refused),
        left=len(report.alone),
        error=math.nan if report.error is None else report.error,
        relative_error=math.nan if report.relative_error is None else report.relative_error,
        float64_error=report.folded_error or math.nan,
        share=report.share,
        **common,
    )
    if not (after.share <= 1 and after.relative_error < 1e-4):
        after = replace(after, status="wrong", detail=f"share {after.share:.3g}")
    reasons = [
        ReasonRow(provider=library, model=name, norm=norm, kind=kind, why=why)
        for kind, found in (("refused", report.refused), ("left", report.alone))
        for norm, why in found.items()
    ]
    with torch.inference_mode():
        takes = {
            each: partial(sample, partial(run, x), untimed=1)
            for each, run in ((ORIGINAL, model), (FOLDED, folded))
        }
        samples = interleave(takes, min_rounds=options.rounds, seed=options.seed)
    rows = [timed(row, samples[row.provider], samples[ORIGINAL]) for row in (before, after)]
    return rows, reasons


def measure(options: argparse.Namespace, files: command.Files) -> list[str]:
    """Fill in `files`."""
    import torch

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    known = QUICK if options.quick else {"torchvision": TORCHVISION, "timm": TIMM}
    chosen = [
        (library, name)
        for library, names in known.items()
        for name in names
        if options.models is None or name in options.models
    ]
    rows: list[ModelRow] = []
    reasons: list[ReasonRow] = []
    with steps(len(chosen)) as started:
        for library, name in chosen:
            started(name)
            try:
                found, why = examine(library, name, options)
            except Exception as error:  # whatever another library's model does
                text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                row = ModelRow(
                    provider=FOLDED, library=library, model=name, status="failed", detail=text
                )
                found, why = [row], []
            rows += found
            reasons += why
    columns = {
        "library": "{0.library}",
        "model": "{0.model}",
        "folded": "{0.folded}",
        "refused": "{0.refused}",
        "left": "{0.left}",
        "relative error": "{0.relative_error:.1e}",
        "of the bound": "{0.share:.3f}",
        "ms": "{0.p50_ms:.1f}",
        "ratio": "{0.ratio:.2f}",
        "": "{0.detail}",
    }
    command.show([row for row in rows if row.provider == FOLDED], columns)
    files["fold_models.csv"], files["fold_models_reasons.csv"] = rows, reasons
    versions = {"torch": torch.__version__}
    for library in known:
        versions[library] = getattr(sys.modules.get(library), "__version__", "")
    files["fold_models.json"] = {
        "rounds": options.rounds,
        "torch_threads": torch.get_num_threads(),
        "versions": versions,
    }
    return [f"{row.model}: {row.status}, {row.detail}" for row in rows if row.status != "ok"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out the benchmark."""
    parser = command.make_parser(__file__, __doc__ or "", rounds=10)
    parser.add_argument("--quick", action="store_true", help="four models")
    every: Callable[[str], tuple[str, ...]] = command.among((*TORCHVISION, *TIMM))
    parser.add_argument("--models", type=every, help="names joined by commas; all if left out")
    parser.add_argument("--threads", type=command.at_least(1), help="of PyTorch")
    return command.main(parser, measure, arguments, needs=("torch", "torchvision", "timm"))


if __name__ == "__main__":
    sys.exit(main())
