"""Fold the batch norms of models of torchvision and timm, and compare before and after.

python benchmarks/fold_models.py --out benchmarks/results
python benchmarks/fold_models.py --quick                    four models

Writes fold_models.csv, fold_models_reasons.csv and fold_models.json (what it was measured on).
Weights are random, and statistics are those of random images (`recalibrate`), one batch norm after
another, so that values neither vanish nor grow; the examples are other random images. Detection
models are fed one image; where torchvision's own operators are not there, boxes are suppressed in
Python, and so their times say little.

fold_models.csv
    For each program that runs the model (``by``: PyTorch, onnxruntime with its own optimizations,
    without them, and with them on a default export) a line for the model as it is and one for the
    folded one: batch norms that were folded, refused, and left because no linear layer is next to
    them; how far outputs differ (``error``, and over the largest output ``relative_error``), how
    far each model is from its run in float64 (``float64_error``), the largest error of a pair over
    its bound (``share``), and the time of an inference, interleaved; ``ratio`` is to the model as
    it is. ONNX models are exported by ``torch.onnx.export(dynamo=True, optimize=False)``, which
    leaves batch norms in place; in a default export PyTorch has folded what it can.

fold_models_reasons.csv
    A line for each batch norm that was not folded.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import command

from batchnorm.bench.rows import Row, TimedRow, timed
from batchnorm.bench.timing import interleave, sample
from batchnorm.progress import steps

ORIGINAL, FOLDED = "as it is", "folded"
TORCH, RUNTIME, PLAIN = "PyTorch", "onnxruntime", "onnxruntime, not optimizing"
DEFAULT = "onnxruntime, default export"
BATCH = 2
NEEDS = ("torch", "torchvision", "timm", "onnxscript", "onnxruntime")

TORCHVISION = (
    "vgg11_bn",
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "densenet121",
    "googlenet",
    "inception_v3",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "mnasnet1_0",
    "shufflenet_v2_x1_0",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "regnet_y_400mf",
    "lraspp_mobilenet_v3_large",
    "deeplabv3_mobilenet_v3_large",
    "r3d_18",
    "mc3_18",
    "fasterrcnn_resnet50_fpn_v2",
    "retinanet_resnet50_fpn_v2",
    "ssdlite320_mobilenet_v3_large",
)
DETECTION = TORCHVISION[-3:]  # fmt: skip
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
    by: str = TORCH
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
    by: str
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
    if name.startswith(("lraspp", "deeplab")) or name in DETECTION:
        options["weights_backbone"] = None
    if name in DETECTION[:2]:
        options |= {"min_size": 320, "max_size": 320}
    model = torchvision.models.get_model(name, **options)
    if name in ("r3d_18", "mc3_18"):
        return model, (1, 3, 8, 64, 64)
    if name in DETECTION:
        if not torchvision.extension._has_ops():
            torchvision.ops.boxes.nms = suppress
        return model, (3, 160, 160)
    size = 299 if name == "inception_v3" else 160
    return model, (BATCH, 3, size, size)


def suppress(boxes: Any, scores: Any, threshold: float) -> Any:
    """The indices of boxes that no better one overlaps by more than `threshold`."""
    import torch
    from torchvision.ops import box_iou

    left = scores.argsort(descending=True, stable=True)
    kept = []
    while len(left):
        kept.append(left[:1])
        left = left[1:]
        left = left[box_iou(boxes[kept[-1]], boxes[left])[0] <= threshold]
    return torch.cat(kept) if kept else left


def prepare(model: Any, data: list[Any], generator: Any) -> Any:
    """The model in evaluation, with random scales and shifts, and statistics of `data`."""
    import torch

    from batchnorm.torch import recalibrate
    from batchnorm.torch.diagnose.wiring import is_batch_norm

    norms = [module for module in model.modules() if is_batch_norm(module)]
    with torch.no_grad():
        for module in norms:
            if module.weight is not None:
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.uniform_(-0.3, 0.3, generator=generator)
    model.eval()
    if norms:
        recalibrate(
            model, data, method="exact", forward=lambda model, batch: model(*batch), progress=False
        )
    return model


def rows_of(
    report: Any,
    own: float,
    runs: Mapping[str, Mapping[str, Any]],
    common: dict[str, Any],
    rounds: int,
) -> tuple[list[ModelRow], list[ReasonRow]]:
    """The lines of a report, and the times of `runs`: a call of each model, by what runs it.

    `own` is how far the model itself is from its run in float64: some networks of random weights
    magnify rounding errors by thousands.
    """
    found = []
    for by, calls in runs.items():
        optimized = by in (RUNTIME, DEFAULT)
        error = report.optimized_error if optimized else report.error
        relative = None if optimized else report.relative_error
        before = ModelRow(
            provider=ORIGINAL, by=by, float64_error=_known(report.original_error), **common
        )
        after = ModelRow(
            provider=FOLDED,
            by=by,
            folded=len(report.folded),
            refused=len(report.refused),
            left=len(report.alone),
            error=_known(error),
            relative_error=_known(relative),
            float64_error=_known(report.folded_error),
            share=report.share,
            **common,
        )
        if not (after.share <= 1 and (after.error <= 8 * own or not after.relative_error > 1e-4)):
            after = replace(after, status="wrong", detail=f"error {after.error:.3g}, own {own:.3g}")
        takes = {each: partial(sample, call, untimed=1) for each, call in calls.items()}
        samples = interleave(takes, min_rounds=rounds, seed=0)
        found += [timed(row, samples[row.provider], samples[ORIGINAL]) for row in (before, after)]
    reasons = [
        ReasonRow(
            provider=common["library"], model=common["model"], by=next(iter(runs)), norm=norm,
            kind=kind, why=why,
        )
        for kind, norms in (("refused", report.refused), ("left", report.alone))
        for norm, why in norms.items()
    ]  # fmt: skip
    return found, reasons


def _known(value: float | None) -> float:
    return math.nan if value is None else value


def examine(
    library: str, name: str, options: argparse.Namespace
) -> tuple[list[ModelRow], list[ReasonRow]]:
    """The lines of one model in both files."""
    import torch

    from batchnorm.torch import fold

    torch.manual_seed(options.seed)
    model, shape = make_model(library, name)
    generator = torch.Generator().manual_seed(options.seed)
    images = [torch.randn(shape, generator=generator) for _ in range(3)]
    examples = [([x],) if name in DETECTION else (x,) for x in images]
    model = prepare(model, examples[:2], generator)
    folded, report = fold(model, examples[2])
    own = _known(report.original_error)
    common = {"library": library, "model": name, "shape": "x".join(map(str, shape))}
    calls = {ORIGINAL: partial(model, *examples[2]), FOLDED: partial(folded, *examples[2])}
    with torch.inference_mode():
        rows, reasons = rows_of(report, own, {TORCH: calls}, common, options.rounds)
    if name in DETECTION:  # whose forward is not exported without torchvision's operators
        return rows, reasons
    for optimize, levels in EXPORTS.items():
        try:
            more, why = examine_onnx(model, images[2], optimize, own, common, options)
        except Exception as error:  # whatever an exporter does with a model
            text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            by = next(iter(levels))
            row = ModelRow(provider=FOLDED, by=by, status="failed", detail=text, **common)
            more, why = [row], []
        rows += more
        reasons += why
    return rows, reasons


#: Whether PyTorch optimizes what it exports, and how far onnxruntime then optimizes each run.
EXPORTS = {
    False: {RUNTIME: "ORT_ENABLE_ALL", PLAIN: "ORT_DISABLE_ALL"},
    True: {DEFAULT: "ORT_ENABLE_ALL"},
}


def examine_onnx(
    model: Any, x: Any, optimize: bool, own: float, common: dict[str, Any],
    options: argparse.Namespace,
) -> tuple[list[ModelRow], list[ReasonRow]]:  # fmt: skip
    """The lines of one model that was exported."""
    import onnxruntime
    import torch

    from batchnorm.onnx import fold

    program: Any = torch.onnx.export(model, (x,), dynamo=True, optimize=optimize, verbose=False)
    original = program.model_proto
    inputs = {original.graph.input[0].name: x.numpy()}
    folded, report = fold(original, inputs)
    runs: dict[str, dict[str, Any]] = {}
    for by, level in EXPORTS[optimize].items():
        for provider, each in ((ORIGINAL, original), (FOLDED, folded)):
            chosen = onnxruntime.SessionOptions()
            chosen.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
            chosen.intra_op_num_threads = torch.get_num_threads()
            # Or threads of the session before wait in a loop, on the processors of this one.
            chosen.add_session_config_entry("session.intra_op.allow_spinning", "0")
            session = onnxruntime.InferenceSession(
                each.SerializeToString(), chosen, providers=["CPUExecutionProvider"]
            )
            runs.setdefault(by, {})[provider] = partial(session.run, None, inputs)
    return rows_of(report, own, runs, common, options.rounds)


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
        "by": "{0.by}",
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
    for library in (*known, "onnx", "onnxruntime"):
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
    return command.main(parser, measure, arguments, needs=NEEDS)


if __name__ == "__main__":
    sys.exit(main())
