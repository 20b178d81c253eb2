"""What is folded into what, by names."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

__all__ = ["Branch", "Group", "Plan"]


@dataclass
class Branch:
    """One of the parallel branches that a block adds up.

    Attributes
    ----------
    call
        The module that the block calls for it; "" if it is the input itself.
    layer
        The linear layer in it, or "".
    before, after
        The batch norms before and after that layer, in the order in which they run.
    """

    call: str
    layer: str
    before: list[str]
    after: list[str]


@dataclass
class Group:
    """A linear layer, and what is folded into it.

    Attributes
    ----------
    layer
        The linear layer.
    before, after
        The batch norms before and after it, in the order in which they run.
    beside
        Other branches whose outputs are added to its own.
    last
        Batch norms after that sum.
    block
        The module that adds.
    call
        The module that it calls for the branch of `layer`.
    chain
        The modules that it calls after that.
    functions
        Those of them that are functions in the original, with the modules that they become.
    """

    layer: str
    before: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    beside: list[Branch] = field(default_factory=list)
    last: list[str] = field(default_factory=list)
    block: str = ""
    call: str = ""
    chain: list[str] = field(default_factory=list)
    functions: dict[str, nn.Module] = field(default_factory=dict)

    @property
    def branches(self) -> list[Branch]:
        """Its own branch, and those beside it."""
        return [Branch(self.call, self.layer, self.before, self.after), *self.beside]

    @property
    def stages(self) -> list[str]:
        """All layers of its own branch, in the order in which they run."""
        return [*self.before, self.layer, *self.after]

    @property
    def norms(self) -> list[str]:
        """All batch norms that are folded."""
        others = [norm for b in self.beside for norm in (*b.before, *b.after)]
        return [*self.before, *self.after, *others, *self.last]


@dataclass
class Plan:
    """What is to be done with each batch norm of a model, by name.

    Attributes
    ----------
    groups : list of Group
        What is folded.
    refused : dict of str to str
        Batch norms next to a linear layer that are not folded, and why.
    alone : dict of str to str
        Batch norms that no linear layer is next to, and what is.
    """

    groups: list[Group] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    alone: dict[str, str] = field(default_factory=dict)
