"""The tools of `fold_cases.py`, each as its documentation says, and the judge of their results."""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import io
import math
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fold_case_graphs as graphs
import fold_case_models as models
import numpy as np
import onnx
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from batchnorm.bench.worker import one_line
from batchnorm.errors import BatchNormError

RIGHT, REFUSED, WRONG, CRASHED, NOT_APPLICABLE = "right", "refused", "wrong", "crashed", "n/a"

#: A job that takes longer ends the process, and counts as a crash.
TIMEOUT_S = 120
#: How many times the error of the model as it is, and how many roundings of its largest output, an
#: error may be.
TIMES, ROUNDINGS = 8, 16

ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}

TENSOR_TYPES = {
    "float64": "DOUBLE", "float32": "FLOAT", "float16": "FLOAT16", "bfloat16": "BFLOAT16"
}  # fmt: skip


class Inapplicable(Exception):
    """The tool is not for this case; the message says why."""


class Refused(Exception):
    """The tool says that it does not fold this."""


@dataclass
class Result:
    """What a tool makes of a model."""

    outputs: list[Any]
    left: int
    weights: Iterable[Any] = ()
    detail: str = ""
    numbers: dict[str, float] = field(default_factory=dict)


# --- PyTorch ----------------------------------------------------------------------------------


def ours_torch(model: nn.Module, case: models.Case) -> tuple[nn.Module, str, dict[str, float]]:
    """`batchnorm.torch.fold`."""
    from batchnorm.torch import fold

    folded, report = fold(model, case.calls(examples=True))
    why = "; ".join([*report.refused.values(), *report.alone.values()])
    return folded, why, {"share": report.share} if report.pairs else {}


def torch_fusion(model: nn.Module, case: models.Case) -> tuple[nn.Module, str, dict[str, float]]:
    """`torch.nn.utils.fusion` on the pairs that the case names."""
    from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

    if not case.pairs:
        raise Inapplicable("takes a layer and the batch norm behind it, and there is none")
    for layer_name, norm_name in case.pairs:
        layer, norm = model.get_submodule(layer_name), model.get_submodule(norm_name)
        if isinstance(norm, nn.Identity):  # it has been folded already, with another layer
            continue
        try:
            if isinstance(layer, nn.Linear):
                fused: nn.Module = fuse_linear_bn_eval(layer, norm)
            else:
                transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
                asked = transposed and not case.name.endswith(models.NOT_ASKED)
                fused = fuse_conv_bn_eval(layer, norm, transpose=asked)
        except AssertionError as error:
            raise Refused(one_line(error)) from error
        put(model, layer_name, fused)
        activation = getattr(norm, "act", None)
        if getattr(norm, "activation", None) == "relu":
            activation = nn.ReLU()
        put(model, norm_name, activation or nn.Identity())
    return model, "", {}


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def torch_fx(model: nn.Module, case: models.Case) -> tuple[nn.Module, str, dict[str, float]]:
    """`torch.fx.experimental.optimization.fuse`."""
    from torch.fx.experimental.optimization import fuse

    try:
        torch.fx.symbolic_trace(model)
    except Exception as error:  # Python that cannot be traced, as its documentation says
        raise Refused(one_line(error)) from error
    try:
        return fuse(model), "", {}
    except AssertionError as error:
        raise Refused(one_line(error)) from error


# --- ONNX -------------------------------------------------------------------------------------


def ours_onnx(model: onnx.ModelProto, feeds: list[graphs.Arrays]) -> tuple[Any, str]:
    """`batchnorm.onnx.fold`, verified if onnxruntime runs the model."""
    from batchnorm.onnx import fold

    folded, report = fold(model, feeds or None)
    return folded, "; ".join([*report.refused.values(), *report.alone.values()])


def onnxruntime(
    model: onnx.ModelProto, feeds: list[graphs.Arrays], *, level: str = "ALL"
) -> tuple[Any, str]:
    """All optimizations of onnxruntime, in the file that it saves."""
    import onnxruntime as runtime

    with tempfile.TemporaryDirectory() as folder:
        options = session_options(getattr(runtime.GraphOptimizationLevel, f"ORT_ENABLE_{level}"))
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        runtime.InferenceSession(model.SerializeToString(), options)
        return onnx.load(options.optimized_model_filepath), ""


def onnxoptimizer(model: onnx.ModelProto, feeds: list[graphs.Arrays]) -> tuple[Any, str]:
    """`onnxoptimizer.optimize` with its default passes."""
    import onnxoptimizer as optimizer

    return optimizer.optimize(model), ""


def onnxoptimizer_alone(model: onnx.ModelProto, feeds: list[graphs.Arrays]) -> tuple[Any, str]:
    """`onnxoptimizer.optimize` with its pass for batch norm alone."""
    import onnxoptimizer as optimizer

    return optimizer.optimize(model, ["fuse_bn_into_conv"]), ""


def onnxsim(model: onnx.ModelProto, feeds: list[graphs.Arrays]) -> tuple[Any, str]:
    """`onnxsim.simplify`."""
    from onnxsim import simplify

    held = {tensor.name for tensor in model.graph.initializer}
    overridable = model.ir_version > 3 and any(i.name in held for i in model.graph.input)
    # Else it drops these inputs, as its documentation says.
    simplified, checked = simplify(model, mutable_initializer=overridable)
    return simplified, "" if checked else "its own check failed"


def onnxslim(model: onnx.ModelProto, feeds: list[graphs.Arrays]) -> tuple[Any, str]:
    """`onnxslim.slim`."""
    from onnxslim import slim

    return slim(model), ""


#: Name of a tool in the results to what calls it, and the packages whose versions matter.
TORCH_TOOLS: dict[str, Callable[..., Any]] = {
    "batchnorm.torch.fold": ours_torch,
    "torch.nn.utils.fusion": torch_fusion,
    "torch.fx fuse": torch_fx,
}
ONNX_TOOLS: dict[str, Callable[..., Any]] = {
    "batchnorm.onnx.fold": ours_onnx,
    "onnxruntime": onnxruntime,
    "onnxoptimizer": onnxoptimizer,
    "onnxoptimizer fuse_bn_into_conv": onnxoptimizer_alone,
    "onnxsim": onnxsim,
    "onnxslim": onnxslim,
}


def session_options(level: Any) -> Any:
    import onnxruntime as runtime

    options = runtime.SessionOptions()
    options.graph_optimization_level = level
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return options


def run_with_onnxruntime(
    model: onnx.ModelProto, feeds: list[graphs.Arrays], *, optimized: bool = False
) -> list[Any]:
    import onnxruntime as runtime

    levels = runtime.GraphOptimizationLevel
    options = session_options(levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL)
    session = runtime.InferenceSession(model.SerializeToString(), options)
    return [np.asarray(y, np.float64) for feed in feeds for y in session.run(None, feed)]


def run_with_reference(model: onnx.ModelProto, feeds: list[graphs.Arrays]) -> list[Any]:
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(model)
    return [np.asarray(y, np.float64) for feed in feeds for y in evaluator.run(None, feed)]


def count_norms(model: onnx.ModelProto) -> int:
    """Batch norms of the graph, its subgraphs and its functions."""

    def of(nodes: Iterable[onnx.NodeProto]) -> int:
        found = 0
        for node in nodes:
            found += node.op_type == "BatchNormalization"
            found += sum(of(a.g.node) for a in node.attribute if a.HasField("g"))
        return found

    return of(model.graph.node) + sum(of(function.node) for function in model.functions)


def all_tensors(model: onnx.ModelProto) -> Iterable[Any]:
    for tensor in model.graph.initializer:
        if tensor.data_type in graphs.FLOATS:
            yield numpy_helper.to_array(tensor)


def exported(case: models.Case) -> onnx.ModelProto:
    """The model as an ONNX file that keeps its batch norms.

    The exporter by TorchScript folds batch norms itself, unless it is asked to keep the training
    mode as it is.
    """
    stream = io.BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # this exporter is the older one
            torch.onnx.export(
                case.model(),
                case.calls()[0],
                stream,
                dynamo=False,
                training=torch.onnx.TrainingMode.PRESERVE,
                do_constant_folding=False,
                opset_version=graphs.OPSET,
            )
    except torch.onnx.errors.UnsupportedOperatorError as error:
        raise Inapplicable(f"torch.onnx.export: {error.args[0].split(chr(10))[0]}") from error
    model = onnx.load_from_string(stream.getvalue())
    if case.dtype == torch.bfloat16:
        # Convolutions of bfloat16 are of opset 22; nothing else has changed for these nodes.
        model.opset_import[0].version, model.ir_version = 22, 10
    return model


def in_float32(epsilon: float) -> float:
    """As ONNX files have it."""
    return float(np.float32(epsilon))


def as_array(x: Any) -> Any:
    """A tensor as an array, of ml_dtypes' bfloat16 if it is of that type."""
    if x.dtype == torch.bfloat16:
        kind = onnx.helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16)
        return x.view(torch.int16).numpy().view(kind)
    return x.numpy()


# --- the judge --------------------------------------------------------------------------------


@dataclass
class Reference:
    """What is known about a case in one form before a tool sees it.

    `examples` is empty if onnxruntime does not run the model.
    """

    outputs: list[Any]
    norms: int
    own_error: float
    tolerance: float
    model: Any = None
    examples: list[graphs.Arrays] = field(default_factory=list)
    feeds: list[graphs.Arrays] = field(default_factory=list)
    run: Callable[..., list[Any]] = run_with_onnxruntime


def largest_difference(got: Sequence[Any], wanted: Sequence[Any]) -> float:
    """Infinite if shapes differ or something is not a number."""
    if len(got) != len(wanted) or any(a.shape != b.shape for a, b in zip(got, wanted, strict=True)):
        return math.inf
    found = max(float(np.max(np.abs(a - b), initial=0.0)) for a, b in zip(got, wanted, strict=True))
    return math.inf if math.isnan(found) else found


def tolerance(own_error: float, wanted: Sequence[Any], dtype: str) -> float:
    """What the error of a right result may be at most."""
    largest = max(float(np.max(np.abs(y))) for y in wanted)
    return TIMES * own_error + ROUNDINGS * ROUNDOFF[dtype] * largest


def outputs_of(model: nn.Module, calls: Sequence[tuple[Any, ...]]) -> list[Any]:
    with torch.no_grad():
        made = [model(*copy.deepcopy(call)) for call in calls]
    return [y.detach().double().numpy() for y in tree_leaves(made)]


def norms_of(model: nn.Module) -> int:
    return sum("BatchNorm" in type(module).__name__ for module in model.modules())


def exact_weights(
    case: models.Case, epsilon: Callable[[float], float], computed: bool
) -> list[Any]:
    """Weights of the folded pairs in float64, before they are rounded.

    Those that the forward computes are left out unless `computed`: nodes of ONNX round otherwise.
    """
    model, found = case.model(), []
    for layer_name, norm_name in case.pairs:
        layer: Any = model.get_submodule(layer_name)
        norm: Any = model.get_submodule(norm_name)
        if getattr(norm, "running_var", None) is None:
            continue
        if not (computed or isinstance(layer._parameters.get("weight"), nn.Parameter)):
            continue
        scale = 1 / torch.sqrt(norm.running_var.double() + epsilon(norm.eps))
        if norm.weight is not None:
            scale = scale * norm.weight.double()
        weight = layer.weight.detach().double()
        if isinstance(layer, nn.modules.conv._ConvTransposeNd):
            parts = weight.reshape(layer.groups, -1, *weight.shape[1:])
            factors = scale.reshape(layer.groups, 1, -1, *[1] * len(layer.kernel_size))
            found.append((parts * factors).reshape(weight.shape).detach().numpy())
        else:
            factors = scale.reshape(-1, *[1] * (weight.ndim - 1))
            found.append((weight * factors).detach().numpy())
    return found


def in_type(array: Any, dtype: str) -> Any:
    """In the type of the model, if a tool has put its numbers into a wider one."""
    kind = onnx.helper.tensor_dtype_to_np_dtype(getattr(TensorProto, TENSOR_TYPES[dtype]))
    narrow = array.astype(kind)
    return narrow if np.array_equal(narrow.astype(np.float64), array) else array


def count_misrounded(exact: Iterable[Any], weights: Iterable[Any], dtype: str) -> tuple[int, int]:
    """How many of the folded weights are not what is nearest to the exact ones, and of how many."""
    wrong = total = 0
    arrays = [in_type(np.asarray(one), dtype) for one in weights]
    for wanted in exact:
        for array in arrays:
            for one in (array, array.T) if array.ndim == 2 else (array,):
                near = one.shape == wanted.shape and np.allclose(
                    one.astype(np.float64), wanted, rtol=0.05, atol=1e-3 * np.abs(wanted).max()
                )
                if near:
                    wrong += int(np.sum(is_misrounded(one, wanted)))
                    total += wanted.size
                    break
            else:
                continue
            break
    return wrong, total


def is_misrounded(values: Any, exact: Any) -> Any:
    """Whether a neighbour in the type of `values` is nearer to the exact number."""
    bits = np.ascontiguousarray(values).view(f"i{values.dtype.itemsize}")
    distance = np.abs(values.astype(np.float64) - exact)
    wrong = np.zeros(values.shape, bool)
    for step in (-1, 1):
        with np.errstate(all="ignore"):
            neighbour = (bits + bits.dtype.type(step)).view(values.dtype).astype(np.float64)
        wrong |= np.abs(neighbour - exact) < distance
    return wrong


class Judge:
    """Answers what becomes of a case with a tool; lives in a process of its own."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._cases: dict[str, Any] = {
            case.name: case for case in (*models.cases(), *graphs.cases())
        }
        self._known: dict[tuple[str, str], Any] = {}

    def judge(self, case: str, tool: str) -> dict[str, Any]:
        """Verdict and numbers of one tool on one case."""
        signal.alarm(TIMEOUT_S)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return self._judged(self._cases[case], tool)
        finally:
            signal.alarm(0)

    def versions(self) -> dict[str, str]:
        """Of everything that takes part."""
        names = ("torch", "torchvision", "timm", "onnx", "onnxruntime", "onnxoptimizer")
        return {name: importlib.metadata.version(name) for name in (*names, "onnxsim", "onnxslim")}

    def _judged(self, case: Any, tool: str) -> dict[str, Any]:
        form = "torch" if tool in TORCH_TOOLS else "onnx"
        try:
            reference = self._reference(case, form)
            if tool == "onnxruntime" and reference.run is not run_with_onnxruntime:
                raise Inapplicable("it does not run this type on a CPU")
        except Inapplicable as error:
            return {"verdict": NOT_APPLICABLE, "detail": str(error)}
        found: dict[str, Any] = {
            "norms": reference.norms,
            "own_error": reference.own_error,
            "tolerance": reference.tolerance,
        }
        attempt = self._on_torch if form == "torch" else self._on_onnx
        try:
            result = attempt(case, tool, reference)
        except Inapplicable as error:
            return {"verdict": NOT_APPLICABLE, "detail": str(error)}
        except (Refused, BatchNormError) as error:
            text = str(error) if isinstance(error, Refused) else one_line(error)
            return {**found, "verdict": REFUSED, "left": reference.norms, "detail": text}
        except ImportError:
            raise
        except (Exception, SystemExit) as error:
            return {**found, "verdict": CRASHED, "detail": one_line(error)}
        error_ = largest_difference(result.outputs, reference.outputs)
        if not error_ <= reference.tolerance:
            verdict = WRONG
        else:
            verdict = RIGHT if result.left < reference.norms else REFUSED
        found |= {"verdict": verdict, "left": result.left, "error": error_, **result.numbers}
        found["detail"] = result.detail
        if verdict == RIGHT and isinstance(case, models.Case) and case.dtype != torch.float64:
            wrong, total = count_misrounded(
                exact_weights(
                    case, float if form == "torch" else in_float32, computed=form == "torch"
                ),
                result.weights,
                models.short(case.dtype),
            )
            if total:
                found |= {"misrounded": wrong, "weights": total}
        if case.name == models.REBUILT:
            return self._rebuilt(case, found)
        return found

    def _reference(self, case: Any, form: str) -> Reference:
        key = (case.name, form)
        if key not in self._known:
            self._known = {key: self._prepare(case, form), **self._known}
            while len(self._known) > 2:
                self._known.popitem()
        if isinstance(self._known[key], Inapplicable):
            raise self._known[key]
        return self._known[key]  # type: ignore[no-any-return]

    def _prepare(self, case: Any, form: str) -> Reference | Inapplicable:
        try:
            if form == "onnx":
                return of_onnx(case)
            if isinstance(case, graphs.GraphCase):
                raise Inapplicable("it is an ONNX graph")
            return of_torch(case)
        except Inapplicable as error:
            return error

    def _on_torch(self, case: models.Case, tool: str, reference: Reference) -> Result:
        model, detail, numbers = TORCH_TOOLS[tool](case.model(), case)
        self._model = model
        try:
            outputs = outputs_of(copy.deepcopy(model), case.calls())
        except Exception as error:
            raise RuntimeError(f"the result does not run: {one_line(error)}") from error
        arrays = [as_array(value.detach()) for value in model.state_dict().values()]
        return Result(outputs, norms_of(model), arrays, detail, numbers)

    def _on_onnx(self, case: Any, tool: str, reference: Reference) -> Result:
        given = onnx.ModelProto()
        given.CopyFrom(reference.model)
        model, detail = ONNX_TOOLS[tool](given, copy.deepcopy(reference.examples))
        left = count_norms(model)
        try:
            outputs = reference.run(model, reference.feeds)
            if tool == "onnxruntime":
                # As it is mostly used: without a file in between.
                again = run_with_onnxruntime(reference.model, reference.feeds, optimized=True)
                outputs = max(
                    (outputs, again), key=lambda y: largest_difference(y, reference.outputs)
                )
                # At the last level, batch norms that are left become depthwise convolutions.
                left = count_norms(onnxruntime(reference.model, [], level="EXTENDED")[0])
        except Exception as error:
            raise RuntimeError(f"the result does not run: {one_line(error)}") from error
        more = len(model.graph.node) - len(reference.model.graph.node)
        if more > 0 and left < reference.norms and not detail:
            detail = f"the graph has {more} nodes more"
        return Result(outputs, left, list(all_tensors(model)), detail)

    def _rebuilt(self, case: models.Case, found: dict[str, Any]) -> dict[str, Any]:
        """Load the folded state where there is no place for a bias."""
        deployed: Any = case.model()
        deployed.bn = nn.Identity()
        deployed.load_state_dict(self._model.state_dict(), strict=False)
        wanted = outputs_of(case.model().double(), doubled(case.calls()))
        error = largest_difference(outputs_of(deployed, case.calls()), wanted)
        why = "load_state_dict(strict=False) drops the folded bias, whatever has folded it"
        return {**found, "verdict": NOT_APPLICABLE, "error": error, "detail": why}


def doubled(calls: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    return [
        tuple(part.double() if isinstance(part, Tensor) else part for part in call)
        for call in calls
    ]


def of_torch(case: models.Case, *, epsilon: Callable[[float], float] = float) -> Reference:
    """The original in float64, and how far it is from that in its own type."""
    exact = case.model().double()
    for module in exact.modules():
        if hasattr(module, "eps"):
            module.eps = epsilon(module.eps)
    wanted = outputs_of(exact, doubled(case.calls()))
    own = largest_difference(outputs_of(case.model(), case.calls()), wanted)
    if not math.isfinite(own):
        raise AssertionError(f"{case.name}: the model as it is must not overflow")
    return Reference(
        wanted, norms_of(case.model()), own, tolerance(own, wanted, models.short(case.dtype))
    )


def of_onnx(case: Any) -> Reference:
    """The same of an ONNX file, run by onnxruntime without optimizations or by onnx's reference."""
    most = math.inf
    if isinstance(case, models.Case):
        if case.no_onnx:
            raise Inapplicable(case.no_onnx)
        reference = of_torch(case, epsilon=in_float32)
        model = exported(case)
        name = model.graph.input[0].name
        feeds = [{name: as_array(call[0])} for call in case.calls()]
        examples = [{name: as_array(call[0])} for call in case.calls(examples=True)]
        wanted, dtype, most = reference.outputs, models.short(case.dtype), reference.tolerance
    else:
        model, feeds, examples = case.model(), case.feeds(), case.feeds(examples=True)
        in_double = [
            {k: v.astype(np.float64) if v.dtype.kind == "f" else v for k, v in feed.items()}
            for feed in feeds
        ]
        wanted, dtype = run_with_reference(graphs.in_float64(model), in_double), case.dtype
    norms = count_norms(model)
    if not norms:
        raise Inapplicable("torch.onnx.export writes it as other operators")
    run: Callable[..., list[Any]] = run_with_onnxruntime
    try:
        outputs = run(model, feeds)
    except Exception:  # a type that it has no kernels for
        run = run_with_reference
        try:
            outputs = run(model, feeds)
        except Exception as error:
            why = "neither onnxruntime on a CPU nor onnx's reference runs it"
            raise Inapplicable(why) from error
        examples = []
    own = largest_difference(outputs, wanted)
    if not own <= most:
        raise AssertionError(f"{case.name}: the file as it is is off by {own:.3g}")
    allowed = tolerance(own, wanted, dtype)
    return Reference(wanted, norms, own, allowed, model, examples, feeds, run)
