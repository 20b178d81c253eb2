"""Kinds of files that a command may be given."""

from __future__ import annotations

__all__ = ["INSTEAD", "WEIGHTS"]

WEIGHTS = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
#: What to do with files of other kinds.
INSTEAD = {
    ".pt2": " A program has no modules any more: give the model that was exported.",
    ".keras": " Export it to ONNX first, by model.export('model.onnx', format='onnx').",
}
