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


def filled(net, seed=0):
    """The network with scales, shifts and statistics that are not the initial ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, t in net.state_dict().items():
            if not t.is_floating_point() or t.dim() > 1:
                continue
            noise = torch.rand(t.shape, generator=generator, dtype=torch.float64)
            # Around 1 and 0, so that values neither grow nor shrink from layer to layer.
            t.copy_(noise / 2 + 0.75 if name.endswith(("var", "weight")) else noise / 2 - 0.25)
    return net
