"""What is wrong with the batch norms of a network, from plain records of it.

records   what is known of a network: layers, batches, operations, the optimizer
findings  what a rule has found, and how it prints
rules     one function for each finding
recording what was seen during training, in a file
shift     how far a distribution has moved

No framework is imported here: each face fills in the records (`batchnorm.torch` from a model, and
`source` from the text of a program, which it does not run).
"""

from .findings import Finding as Finding
from .findings import Findings as Findings
from .findings import Rule as Rule
from .recording import Recording as Recording
from .recording import Snapshot as Snapshot
from .records import Batch as Batch
from .records import Layer as Layer
from .records import Network as Network
from .records import Operation as Operation
from .rules import RULES as RULES
from .rules import examine as examine

__all__ = [
    "RULES",
    "Batch",
    "Finding",
    "Findings",
    "Layer",
    "Network",
    "Operation",
    "Rule",
    "examine",
]
