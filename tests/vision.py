"""torchvision and timm for tests, also where torchvision's compiled operators do not load.

A torchvision built for another torch still has its models and layers, but its import registers fake
implementations for compiled operators and raises if those are unknown. Defining their schemas is
enough: no test here runs one of these operators.

Tests call `pytest.importorskip` after they have imported this module::

    import vision  # noqa: F401

    torchvision = pytest.importorskip("torchvision")
"""

import importlib.util
from pathlib import Path

import torch

_OPERATORS = (
    "_deform_conv2d_backward", "_ps_roi_align_backward", "_ps_roi_pool_backward",
    "_roi_align_backward", "_roi_pool_backward", "deform_conv2d", "nms", "ps_roi_align",
    "ps_roi_pool", "qnms", "roi_align", "roi_pool",
)  # fmt: skip


def _compiled_operators_load() -> bool:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return True  # nothing to mend: importorskip skips
    for path in Path(spec.origin).parent.glob("_C.*"):
        try:
            torch.ops.load_library(str(path))
        except OSError:
            return False
        return True
    return False


if not _compiled_operators_load():
    _library = torch.library.Library("torchvision", "DEF")  # definitions go with the object
    for _name in _OPERATORS:
        _library.define(f"{_name}(Tensor x) -> Tensor")
