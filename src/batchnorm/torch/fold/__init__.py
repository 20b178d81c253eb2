"""Fold the batch norms of a model into its linear layers and convolutions, and prove it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils.data import DataLoader

from ...errors import ArgumentError, one_line
from ...folding import FoldedLayer, FoldError, FoldReport
from ...folding.report import check_tol
from ...progress import steps
from ..internals import has_global_hooks, is_aten
from ..population.layers import check_values, unwrapped
from ..population.state import RngState
from .branches import become_sequential
from .calls import Call, record
from .foldings import Folding
from .groups import Group, Plan
from .layers import absorb, release, short
from .outside import kept_outside
from .pairs import make_plan, of_layer
from .paths import Paths, explore, outline
from .verify import Examples, compare_groups, compare_outputs, tolerance

__all__ = ["FoldError", "FoldReport", "FoldedLayer", "fold"]

M = TypeVar("M", bound=nn.Module)

_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
#: Of which `_folded` tells, unless it has to take something back.
_STEPS = 6


def fold(
    model: nn.Module,
    example_inputs: Any,
    *,
    dtype: torch.dtype | None = None,
    strict: bool = False,
    tol: float | None = None,
    progress: bool = True,
) -> tuple[nn.Module, FoldReport]:
    """Fold batch norms into the linear layers and convolutions before or after them.

    A batch norm is folded only where it is proven that, on every path through the forward, it and
    the linear layer are used for nothing but each other; otherwise it stays, and the report says
    why. Then both models run on the examples, and their outputs are compared.

    Parameters
    ----------
    model : Module
        In evaluation mode; on any device. It is not changed.
    example_inputs : Tensor, tuple, dict or list
        A tensor, a tuple of arguments, or a dict of keyword arguments; or a list of several such
        examples. What no example reaches is not folded.
    dtype : torch.dtype
        Type of the folded model: float16, bfloat16, float32 or float64; None to keep types.
        Weights are folded before they are rounded to it.
    strict : bool
        Whether to raise if a batch norm next to a linear layer was refused, or an error is too
        large.
    tol : float
        With `strict`, the largest error allowed of a pair and of the model's outputs. None allows
        the outputs any error that is finite; no pair is folded whose error exceeds its bound.
    progress : bool
        Show a progress bar on the terminal.

    Returns
    -------
    folded : Module
        A copy of `model`, without data parallelism and `torch.compile` around it. Linear layers
        keep their names and classes and have a bias; a folded batch norm is an `Identity`, or its
        activation.
    report : FoldReport
        Prints as text.

    Raises
    ------
    ArgumentError
        `model` is not a Module in evaluation mode, has tensors without values, or cannot be
        copied; `example_inputs`, `dtype` or `tol` are not as above.
    FoldError
        With `strict`; it has the report.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from batchnorm.torch import fold
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()).eval()
    >>> folded, report = fold(net, torch.randn(2, 3, 16, 16))
    >>> folded
    Sequential(
      (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
      (1): Identity()
      (2): ReLU()
    )
    >>> report.folded, report.share < 1
    ({'1': '0'}, True)
    """
    check_tol(tol, strict=strict)
    model = _checked(model, dtype)
    if isinstance(example_inputs, DataLoader):
        raise ArgumentError(
            "example_inputs must be one batch or a list of them, got a DataLoader. Take "
            "next(iter(loader)), without the targets."
        )
    rng = RngState()
    try:
        # The copies must be able to train.
        with (
            torch.inference_mode(False),
            kept_outside(model),
            steps(_STEPS, shown=progress) as step,
        ):
            report, folded = _folded(model, Examples(example_inputs), dtype, step)
    finally:
        rng.restore()
    if strict:
        report.check(tol)
    return folded, report


def _checked(model: object, dtype: Any) -> nn.Module:
    if _is_exported(model):
        raise ArgumentError(
            "fold takes a model before its export, got a program of torch.export, which has no "
            "modules any more. Fold first, then export."
        )
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"fold takes a torch.nn.Module, got {type(model).__name__}.")
    model = unwrapped(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise ArgumentError(
            "model must be an ordinary Module, got one compiled by TorchScript. Fold before "
            "torch.jit.script or torch.jit.trace."
        )
    if model.training:
        raise ArgumentError(
            "model must be in evaluation mode, got one in training mode, in which batch norm "
            "depends on the batch. Call model.eval() first."
        )
    if dtype is not None and dtype not in _TYPES:
        raise ArgumentError(
            f"dtype must be one of {', '.join(map(short, _TYPES))}, or None, got {dtype!r}."
        )
    if has_global_hooks():
        raise ArgumentError(
            "fold must see all that happens to a model, and hooks are registered that every module "
            "calls (torch.nn.modules.module.register_module_forward_hook). Remove them first."
        )
    for name, module in model.named_modules():
        check_values(module, name, "fold")
    return model


def _is_exported(model: object) -> bool:
    """Whether it is a program of `torch.export`, or what its `module()` returns."""
    if isinstance(model, GraphModule):
        return any(is_aten(node.target) for node in model.graph.nodes)
    return isinstance(model, torch.export.ExportedProgram)


def copied(model: M) -> M:
    """A deep copy, also of a model that keeps tensors computed from others."""
    memo: dict[int, Any] = {
        id(t): t.detach().clone()
        for module in model.modules()
        for t in vars(module).values()
        if isinstance(t, Tensor) and not t.is_leaf
    }
    try:
        found = copy.deepcopy(model, memo)
    except Exception as error:  # whatever the attributes of a model do
        raise ArgumentError(
            f"model must be one that copy.deepcopy can copy, but {type(error).__name__}: {error}"
        ) from error
    both = set(map(id, model.modules())).intersection(map(id, found.modules()))
    if both or set(map(id, model.parameters())).intersection(map(id, found.parameters())):
        raise ArgumentError(
            "model must be one that copy.deepcopy can copy, but parts of the copy are those of the "
            "model itself (__deepcopy__)."
        )
    return found


def _folded(
    model: nn.Module,
    examples: Examples,
    dtype: torch.dtype | None,
    step: Callable[[str], None],
) -> tuple[FoldReport, nn.Module]:
    # Each run has a copy of its own, since forwards may change what belongs to a model.
    step("fold: running the model")
    probe = copied(model)
    calls = record(probe, examples.run)
    step("fold: following its paths")
    probe = copied(model)
    paths = explore(probe, calls)
    plan = make_plan(probe, paths, calls, partial(copied, model))
    del probe
    report = FoldReport(refused=plan.refused, alone=plan.alone)
    step("fold: running it in float64")
    exact = _in_float64(model, examples)
    while True:
        step("fold: folding")
        result = copied(model)
        foldings, problems = _apply(result, plan, dtype)
        problems = problems or _changes(model, result, plan, paths, calls)
        if not problems:
            step("fold: comparing layers")
            outputs = compare_groups(copied(model), examples, foldings, dtype)
            report.pairs = [folding.report for folding in foldings]
            whys = [(folding.group, folding.problem()) for folding in foldings]
            problems = [(group, why) for group, why in whys if why]
        if not problems:
            step("fold: comparing outputs")
            try:
                got = examples.run(copied(result), dtype)
            except Exception as error:
                if dtype is None:
                    raise
                raise ArgumentError(
                    f"dtype must be one that the model runs in, but in {short(dtype)} its forward "
                    f"raises {type(error).__name__}: {one_line(error)}."
                ) from error
            report.error, report.relative_error = compare_outputs(outputs, got)
            if exact is not None:
                report.original_error = compare_outputs(exact, outputs)[0]
                report.folded_error = compare_outputs(exact, got)[0]
            if foldings and (why := _too_far(report, model, outputs, examples, dtype)):
                problems = [(group, why) for group in plan.groups]
        if not problems:
            break
        for group, why in problems:
            _refuse(plan, group, why)
    report.dtype = ", ".join(sorted({short(f.layer.weight.dtype) for f in foldings}))
    return report, result


def _too_far(
    report: FoldReport,
    model: nn.Module,
    outputs: list[Any],
    examples: Examples,
    dtype: torch.dtype | None,
) -> str:
    """Why outputs differ by more than rounding does, though each layer is within its bound.

    Then something uses layers in a way that was not seen. Rounding changes the outputs of the
    original as well, by `own`: some networks magnify it by thousands.
    """
    error = report.error
    if error is None or not math.isfinite(error) or not report.relative_error:
        return ""
    if report.relative_error <= tolerance(model, *filter(None, [dtype])):
        return ""
    own = report.original_error or 0.0
    if dtype is not None:
        try:
            rounded = examples.run(copied(model).to(dtype), dtype)
        except Exception:  # a type that its forward does not take
            return ""
        own = max(own, compare_outputs(outputs, rounded)[0] or 0.0)
    if error <= 64 * own:
        return ""
    return (
        f"folded, outputs of the model would differ by {error:.3g}, far more than by rounding "
        f"({own:.3g}): something uses its layers in a way that cannot be seen"
    )


def _changes(
    model: nn.Module, result: nn.Module, plan: Plan, paths: Paths, calls: Call
) -> list[tuple[Group, str]]:
    """Groups whose folding changes a path, as where code looks at classes of layers, and why."""
    blocks = [group.block for group in plan.groups if group.beside]
    norms = {norm for group in plan.groups for norm in group.norms}
    if blocks:
        paths = explore(copied(model), calls, blocks)
    found = []
    for node in (n for graphs in paths.graphs.values() for graph in graphs for n in graph.nodes):
        if node.op == "call_module" and node.target in blocks and node.kwargs:
            why = f"'{node.target}' is also called by keyword, which a Sequential cannot be"
            found += [(g, why) for g in plan.groups if g.block == node.target]
    kept = {name for name, _ in result.named_modules()}
    again = explore(copied(result), calls, [*blocks, *(norms & kept)])
    for name, graphs in paths.graphs.items():
        one, other = (list(map(outline, each)) for each in (graphs, again.graphs.get(name, [])))
        if one != other and name not in blocks:
            called = {str(node.target) for graph in graphs for node in graph.nodes}
            where = f"'{name}'" if name else "the model"
            why = f"{where} would take other paths: it looks at classes or attributes of its layers"
            found += [(g, why) for g in plan.groups if called & {g.block or g.layer, *g.norms}]
    return list({id(group): (group, why) for group, why in found}.values())


def _in_float64(model: nn.Module, examples: Examples) -> list[Any] | None:
    """What the model returns in float64; None if it does not run there, or is there already."""
    if all(p.dtype == torch.float64 for p in model.parameters() if p.is_floating_point()):
        return None
    try:
        return examples.run(copied(model).double(), torch.float64)
    except Exception:  # a type that its forward demands, or a device without float64
        return None


def _apply(
    result: nn.Module, plan: Plan, dtype: torch.dtype | None
) -> tuple[list[Folding], list[tuple[Group, str]]]:
    """Fold what is planned; also returns what does not fit, and why."""
    foldings = [Folding.of(group, result) for group in plan.groups]
    if dtype is not None:
        result.to(dtype)
    problems = []
    for folding in foldings:
        group, layer = folding.group, folding.layer
        try:
            absorb(layer, folding.folded(), dtype or folding.given)
        except ArgumentError as error:
            problems.append((group, of_layer(group.layer, str(error))))
            continue
        for name in group.norms:
            release(result.get_submodule(name))
    for group in plan.groups:
        if group.beside and not problems:
            parts = [group.call, *group.chain]
            become_sequential(result, group.block, parts, group.functions)
    return foldings, problems


def _refuse(plan: Plan, group: Group, why: str) -> None:
    """Take a group out of the plan; branches that do not fit together are folded one by one."""
    plan.groups.remove(group)
    apart = [Group(b.layer, b.before, b.after) for b in group.branches if b.before or b.after]
    apart = [each for each in apart if each.layer] if group.beside else []
    plan.groups += apart
    left = set(group.norms) - {norm for each in apart for norm in each.norms}
    plan.refused.update((norm, why) for norm in group.norms if norm in left)
