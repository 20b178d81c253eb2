"""Files for inference. BN501 is kept for layers that could be folded."""

from __future__ import annotations

from ..records import Network
from .rule import Found, rule


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
