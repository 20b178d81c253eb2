"""What ``batchnorm check`` is given."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from batchnorm.diagnose import RULES, Findings, examine
from batchnorm.diagnose.findings import page_of
from batchnorm.errors import ArgumentError, BatchNormError
from batchnorm.extras import require

from .kinds import INSTEAD, WEIGHTS

__all__ = ["check", "explain"]


def check(
    targets: Sequence[str],
    *,
    weights: Path | None = None,
    data: str | None = None,
    select: Iterable[str] | None = None,
    ignore: Iterable[str] | None = None,
    fix: bool = False,
    out: Path | None = None,
    allow_none: bool = False,
) -> Findings:
    """Findings of whatever `targets` name; the options from `weights` to `out` are for one model.

    Raises
    ------
    BatchNormError
        One is of no known kind, cannot be read, or needs a package that is not installed.
    """
    if len(targets) == 1 and ":" in targets[0] and not os.path.exists(targets[0]):
        require("A model", "torch", "torch")
        return _check_model(targets[0], weights, data, select, ignore, fix, out)
    allow_none = allow_none or len(targets) > 1
    found = [_check_file(target, select, ignore, allow_none) for target in targets]
    skipped = dict.fromkeys(text for findings in found for text in findings.skipped)
    return Findings(itertools.chain(*found), skipped=list(skipped))


def _check_file(
    target: str, select: Iterable[str] | None, ignore: Iterable[str] | None, allow_none: bool
) -> Findings:
    path = Path(target)
    suffix = path.suffix.lower()
    if suffix == ".py":
        from batchnorm.diagnose.source import check_source

        found = check_source(path, select, ignore, allow_none=allow_none)
        return Findings(found, skipped=["problems that show only when the model runs"])
    if suffix == ".parquet":
        from batchnorm.diagnose.recording import Recording

        return Findings(examine(Recording.load(path).network(), select, ignore))
    if suffix == ".onnx":
        from batchnorm.onnx import network_of_onnx

        network = network_of_onnx(path)
        seen = {operation.name for operation in network.operations}
        inside = any(layer.name not in seen for layer in network.layers)
        skipped = ["wiring of batch norms in functions and inside of nodes"] * inside
        return Findings(examine(network, select, ignore), skipped=skipped)
    if suffix in WEIGHTS:
        require("A file of weights", "torch", "torch")
        from batchnorm.torch.diagnose.weights import network_of_weights

        found = examine(network_of_weights(path), select, ignore)
        return Findings(found, skipped=["wiring, ε, momentum, and problems that show only on data"])
    raise ArgumentError(
        f"{target}: must be package.module:factory, alone, or a file that ends in .py, .onnx, "
        f".parquet, {', '.join(WEIGHTS)}."
        f"{INSTEAD.get(suffix) or ' Give the name of one of these.'}"
    )


def _check_model(
    target: str,
    weights: Path | None,
    data: str | None,
    select: Iterable[str] | None,
    ignore: Iterable[str] | None,
    fix: bool,
    out: Path | None,
) -> Findings:
    import torch

    from batchnorm import torch as face
    from batchnorm.atomic import explain_write_errors, replacing
    from batchnorm.torch.targets import load_batches, load_model

    model = load_model(target, weights)
    batches: Any = None if data is None else load_batches(data)
    if weights is not None:
        model.eval()  # it is finished
    try:
        found = face.check(model, batches, select=select, ignore=ignore, fix=fix)
    except BatchNormError:
        raise
    except Exception as error:  # whatever the model does on the data
        raise BatchNormError(
            f"{target}: the model cannot be run on {data or 'nothing'}: {type(error).__name__}: "
            f"{error}."
        ) from error
    if out is not None:
        with explain_write_errors(out), replacing(out) as beside:
            torch.save(model.state_dict(), beside)
    return found


def explain(code: str) -> str:
    """What a code means.

    Raises
    ------
    ArgumentError
        There is no such code.
    """
    for rule in RULES:
        if rule.code == code.upper():
            text = (rule.look.__doc__ or "").strip()
            return (
                f"{rule.code} {rule.title}\n\n{text}\n\nWhat to do: {rule.fix}.\n"
                f"Page: {page_of(rule.code)}"
            )
    raise ArgumentError(
        f"--explain takes the code of a finding, got {code!r}. The codes are "
        f"{', '.join(rule.code for rule in RULES)}."
    )
