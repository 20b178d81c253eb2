"""Fold the batch norms of ONNX models, with proof that nothing else changes.

`graphs` knows where each value comes from and goes to, `pairs` what may be folded, `layers` what
nodes compute, `verify` runs both models by onnxruntime, `examples` reads inputs for that, and
`folding` is the transaction. onnx is imported when a function is called.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...extras import require
from ...folding import FoldedLayer as FoldedLayer
from ...folding import FoldError as FoldError
from ...folding import FoldReport as FoldReport

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["FoldError", "FoldReport", "FoldedLayer", "fold", "fold_file"]

#: Arrays by the names of a model's inputs, or several such examples.
Inputs = Mapping[str, Any] | list[Mapping[str, Any]]


def fold(
    model: ModelProto,
    inputs: Inputs | None = None,
    *,
    strict: bool = False,
    tol: float | None = None,
    progress: bool = True,
) -> tuple[ModelProto, FoldReport]:
    """Fold the batch norms of an ONNX model into the layers next to them.

    A batch norm is folded if the output of the layer goes to it alone, also where the graphs inside
    of other nodes are looked at, and if all weights are constants or computed from constants, as
    those of weight norm are. What is not folded is named with the reason. With `inputs`,
    onnxruntime runs both models, without and with its optimizations, and each folded layer beside
    those that it replaces.

    Parameters
    ----------
    model : ModelProto
        Of opset 9 or later that the installed onnx knows, with its tensors in it. It is not
        changed.
    inputs : dict of str to array, or list of such dicts
        Examples by the names of the model's inputs. None runs nothing, and nothing is verified.
        Batch norms that no example reaches are not folded.
    strict : bool
        Whether to raise if a batch norm next to a layer was refused, or an error is too large.
    tol : float
        With `strict` and `inputs`, the largest error allowed of a pair and of the outputs. None
        allows the outputs any error that is finite; no pair is folded whose error exceeds its
        bound.
    progress : bool
        Show a progress bar on the terminal.

    Returns
    -------
    folded : ModelProto
        Layers keep their names, and nodes that have nothing to do with it are as they were. A
        MatMul becomes a Gemm.
    report : FoldReport
        Prints as text. Without `inputs`, errors are None.

    Raises
    ------
    ArgumentError, ShapeError, DTypeError
        `model` is not a valid model of such an opset with its tensors in it, onnxruntime does not
        run it, or `inputs` and `tol` are not as above.
    FoldError
        With `strict`; it has the report.
    BatchNormError
        onnx is not installed, or onnxruntime to run `inputs`.

    Examples
    --------
    >>> import onnx.parser
    >>> from batchnorm.onnx import fold
    >>> model = onnx.parser.parse_model('''
    ...     <ir_version: 8, opset_import: ["": 17]>
    ...     net (float[N, 1, 4] x) => (float[N, 1, 2] y)
    ...     <float[1, 1, 3] w = {1, 2, 1}, float[1] one = {1}, float[1] zero = {0}>
    ...     {
    ...         z = Conv (x, w)
    ...         y = BatchNormalization <epsilon = 3.0> (z, one, zero, zero, one)
    ...     }''')
    >>> folded, report = fold(model)
    >>> print(onnx.printer.to_text(folded.graph.node[0]))
    y = Conv (x, w, w_bias)
    >>> onnx.numpy_helper.to_array(folded.graph.initializer[0])
    array([[[0.5, 1. , 0.5]]], dtype=float32)
    """
    require("Folding an ONNX model", "onnx", "onnx")
    from . import folding

    return folding.fold(model, inputs, None, strict=strict, tol=tol, progress=progress)


def fold_file(
    path: str | Path,
    out: str | Path,
    inputs: Inputs | None = None,
    *,
    strict: bool = False,
    tol: float | None = None,
    progress: bool = True,
) -> FoldReport:
    """Fold the batch norms of an ONNX file, as `fold` does, into another file.

    Parameters
    ----------
    path, out
        The ONNX file, and the one to write; an existing one is replaced. Data outside of `path` are
        mapped, not loaded, and those of the folded model are written beside `out`, with ".data" at
        the end of the name. Both are written completely or not at all.
    inputs, strict, tol, progress
        As those of `fold`.

    Returns
    -------
    FoldReport

    Raises
    ------
    ArgumentError
        A file cannot be read or written, is damaged, or `out` would replace the model or its data;
        and what else `fold` raises. Nothing is written then.
    """
    require("Folding an ONNX model", "onnx", "onnx")
    from . import folding

    return folding.fold_file(
        Path(path), Path(out), inputs, strict=strict, tol=tol, progress=progress
    )
