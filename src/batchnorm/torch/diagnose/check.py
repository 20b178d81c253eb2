"""Look for what is wrong with the batch norms of a model, and mend what is safe to mend."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...diagnose import Finding, Findings, Network, Recording, examine
from ...errors import ArgumentError, BatchNormError
from ...progress import bar
from ..convert import convert, explain
from ..freeze import freeze
from ..modules import Layer as OurLayer
from ..parameters import parameter_groups
from ..population import recalibrate
from ..population.layers import unwrapped
from . import wiring
from .records import Forward, observe, record_layers

__all__ = ["check"]


def check(
    model: nn.Module,
    data: Any = None,
    optimizer: torch.optim.Optimizer | None = None,
    recording: Any = None,
    *,
    forward: Forward | None = None,
    fix: bool = False,
    select: Iterable[str] | None = None,
    ignore: Iterable[str] | None = None,
    progress: bool = True,
) -> Findings:
    """Look for what is wrong with the batch norms of a model.

    The model and the optimizer are as before afterwards, unless `fix` is set.

    Parameters
    ----------
    model : Module
        With batch norms of this package, of torch, or subclasses of these.
    data : iterable of batches, optional
        As the model is trained on, such as its DataLoader; the first 32 batches are run, in
        evaluation and with batch statistics. Without it, only what parameters, buffers and the
        wiring show is found.
    optimizer : Optimizer, optional
        To look at weight decay.
    recording : Recording or its file, optional
        Of `watch`; what it shows about training is looked at, too.
    forward : function of model and batch, optional
        Calls the model; by default with the first item of the batch.
    fix : bool
        Mend what is safe: parameter groups without weight decay; `freeze`; `convert` where layers
        lose digits, store half precision or count twice; with data, `recalibrate` on all of them
        where statistics are wrong. ``.fixed`` says what was done, ``.skipped`` what could not be.
    select, ignore : codes, or beginnings of codes, as in "BN1"
    progress : bool
        Show a bar if there is a terminal.

    Returns
    -------
    Findings
        A sequence of `Finding`, empty for a healthy network; prints as text.

    Raises
    ------
    ArgumentError
        `model` is not a Module or has no batch norms, `data` gives no batches, or a code does not
        exist.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from batchnorm.torch import check
    >>> net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU())
    >>> for finding in check(net, [torch.randn(32, 4)]):
    ...     print(finding)
    BN401 1: the bias of '0' has no effect: batch norm subtracts it
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"check takes a torch.nn.Module, got {type(model).__name__}.")
    if optimizer is not None and not hasattr(optimizer, "param_groups"):
        raise ArgumentError(
            f"optimizer must be one of torch.optim, got {type(optimizer).__name__}."
        )
    if fix and data is not None and iter(data) is data:
        raise ArgumentError(
            "fix runs data several times, got an iterator. Pass the loader itself, or a list."
        )
    if isinstance(recording, (str, Path)):
        recording = Recording.load(recording)
    if recording is not None and not isinstance(recording, Recording):
        raise ArgumentError(
            f"recording must be one of watch, or its file, got {type(recording).__name__}."
        )
    found, network = _look(model, data, optimizer, recording, forward, select, ignore, progress)
    if not network.layers:
        raise ArgumentError(
            "check takes a model with batch norms, got one without any. convert and check know "
            "torch's BatchNorm1d, 2d, 3d, SyncBatchNorm and subclasses of them."
        )
    if not fix:
        return found
    fixed, failed = _mend(model, found, data, optimizer, forward, progress)
    if fixed:
        found, _ = _look(model, data, optimizer, None, forward, select, ignore, progress)
    elif found:
        failed.append("nothing was mended: the findings need data, or a change of the program")
    return Findings(found, fixed=fixed, skipped=[*failed, *found.skipped])


def _look(
    model: nn.Module,
    data: Any,
    optimizer: torch.optim.Optimizer | None,
    recording: Any,
    forward: Forward | None,
    select: Iterable[str] | None,
    ignore: Iterable[str] | None,
    progress: bool,
) -> tuple[Findings, Any]:
    examine(Network(), select, ignore)  # raises for unknown codes before the work
    network = record_layers(model, optimizer)
    skipped: list[str] = []
    if data is None:
        network.operations = wiring.by_tracing(unwrapped(model))
        skipped.append("problems that show only on data (pass data=)")
    elif network.layers:
        with bar(shown=progress) as show:
            skipped += observe(model, network, data, forward, show)
    found = examine(network, select, ignore)
    if recording is not None:
        of_training = examine(recording.network(), select, ignore)
        known = {(finding.code, finding.layer) for finding in found}
        found += [f for f in of_training if (f.code, f.layer) not in known]
        found.sort(key=lambda finding: finding.code)
    return Findings(found, skipped=skipped), network


#: Findings that these functions mend; the last needs data.
_FREEZE, _GROUPS = {"BN407"}, {"BN410"}
_CONVERT = {"BN107", "BN206", "BN406"}
_RECALIBRATE = {"BN101", "BN102", "BN103", "BN104", "BN105", "BN109"}


def _mend(
    model: nn.Module,
    found: Iterable[Finding],
    data: Any,
    optimizer: torch.optim.Optimizer | None,
    forward: Forward | None,
    progress: bool,
) -> tuple[list[str], list[str]]:
    """What was done, and what could not be."""
    codes = {finding.code for finding in found}
    fixed: list[str] = []
    failed: list[str] = []

    def done(wanted: set[str], text: str) -> None:
        fixed.append(f"{text} ({', '.join(sorted(wanted & codes))})")

    if codes & _CONVERT and explain(model).pending:
        convert(model)
        done(_CONVERT, "convert(model)")
    if data is not None and codes & _RECALIBRATE:
        try:
            recalibrate(model, data, method="exact", forward=forward, progress=progress)
        except BatchNormError as error:
            failed.append(f"recalibrate: {error}")
        else:
            done(_RECALIBRATE, "recalibrate(model, data)")
    if codes & _FREEZE:
        _freeze(model, [f.layer for f in found if f.code in _FREEZE], fixed, failed)
    if optimizer is not None and codes & _GROUPS:
        _without_decay(unwrapped(model), optimizer)
        done(_GROUPS, "γ and β without weight decay, in groups of their own")
    return fixed, failed


def _freeze(model: nn.Module, names: list[str], fixed: list[str], failed: list[str]) -> None:
    """Freeze layers whose statistics are not the initial ones."""
    if explain(model).pending:
        convert(model)
        fixed.append("convert(model), which freeze needs")
    layers: dict[str, Any] = dict(unwrapped(model).named_modules())
    frozen = 0
    for name in names:
        layer = layers[name]
        if not isinstance(layer, OurLayer):
            failed.append(f"freeze of {name}: {type(layer).__name__} cannot be converted")
        elif layer.num_batches_tracked is not None and not int(layer.num_batches_tracked):
            failed.append(f"freeze of {name}: its statistics have never been measured")
        else:
            freeze(layer)
            frozen += 1
    if frozen:
        fixed.append(f"freeze of {frozen} layers whose parameters are frozen (BN407)")


def _without_decay(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Divide each group of the optimizer; its state, by parameter, stays."""
    exempt = {id(p) for p in parameter_groups(model, 0.0)[1]["params"]}
    for group in list(optimizer.param_groups):
        if not group.get("weight_decay"):
            continue
        moved = [p for p in group["params"] if id(p) in exempt]
        if moved:
            group["params"] = [p for p in group["params"] if id(p) not in exempt]
            settings = {k: v for k, v in group.items() if k not in ("params", "weight_decay")}
            optimizer.add_param_group({"params": moved, **settings, "weight_decay": 0.0})
