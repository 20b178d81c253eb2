"""Files for inference, and models that are to become one."""

from __future__ import annotations

from ..records import Network
from .rule import Found, rule


@rule(
    "BN501",
    "could be folded into the layer before",
    fix="batchnorm fold, or batchnorm.torch.fold, which prove it and show how near the result is",
    level="note",
)
def foldable(network: Network) -> Found:
    """A batch norm in evaluation that a linear layer or convolution could do at no cost.

    It is looked for in ONNX files, and elsewhere only if it is selected. It makes no command fail.
    """
    readers = network.readers()
    names = [operation.name for operation in network.operations]
    for number, operation in network.normalizations():
        layer = network.layer(operation.name)
        if layer is None or layer.training is not False or not layer.tracks:
            continue
        if layer.var is None or layer.eps < 0 or not (layer.var + layer.eps > 0).all():
            continue  # no factor of each channel
        if len(operation.inputs) != 1:
            continue
        (source,) = operation.inputs
        before = network.operations[source]
        if (
            before.kind in ("convolution", "linear")
            and not before.on_last_axis
            and len(before.inputs) <= 1  # not a product of two results
            and readers[source] == [number]
            and names.count(before.name) == names.count(operation.name) == 1
        ):
            yield operation.name, f"only it reads the output of {before.name!r}", {}


@rule(
    "BN502",
    "training mode in an exported file",
    fix="call model.eval() before the export",
)
def training_mode(network: Network) -> Found:
    """A file for inference that normalizes by the batch."""
    for layer in network.layers:
        if network.exported and layer.training:
            yield (
                layer.name,
                "the file normalizes by the batch: an answer depends on the others",
                {},
            )
