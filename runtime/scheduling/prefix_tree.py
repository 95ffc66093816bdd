"""Finds which of the sequences in memory shares the longest beginning with a prompt: a radix tree over token ids."""

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np

from llmopt.runtime.backends.base import IntArray

__all__ = ["PrefixTree"]

Owner = TypeVar("Owner", bound=Hashable)

_NOTHING: IntArray = np.empty(0, np.int64)


@dataclass(slots=True, eq=False)
class _Node(Generic[Owner]):
    """A stretch of tokens, and who has it.

    Attributes:
        edge: int64 ``[tokens]``, from the parent's end to this node's.
        parent: None for the root.
        owners: Of all sequences that pass through the node or end in it, in the order in which they came.
        children: By the first token of their edge.
    """

    edge: IntArray
    parent: "_Node[Owner] | None"
    owners: dict[Owner, None] = field(default_factory=dict)
    children: "dict[int, _Node[Owner]]" = field(default_factory=dict)


class PrefixTree(Generic[Owner]):
    """Sequences of tokens by their beginnings; every owner has one sequence.

    A node has the owners of everything below it, so a search ends where the prompt leaves the tree. There are at most
    two nodes for each sequence.
    """

    def __init__(self) -> None:
        self._root: _Node[Owner] = _Node(_NOTHING, None)
        self._ends: dict[Owner, _Node[Owner]] = {}

    def __len__(self) -> int:
        return len(self._ends)

    def insert(self, owner: Owner, ids: IntArray) -> None:
        """Add a sequence, int64 ``[tokens]``, of an owner that has none."""
        if owner in self._ends:
            raise ValueError(f"{owner} has a sequence already")
        node, place = self._root, 0
        node.owners[owner] = None
        while place < len(ids):
            child = node.children.get(int(ids[place]))
            if child is None:
                child = _Node(ids[place:].copy(), node)
                node.children[int(ids[place])] = child
            else:
                common = _common(child.edge, ids[place:])
                if common < len(child.edge):
                    child = _split(child, common)
            child.owners[owner] = None
            node, place = child, place + len(child.edge)
        self._ends[owner] = node

    def remove(self, owner: Owner) -> None:
        """Forget an owner's sequence; nothing happens if it has none."""
        node = self._ends.pop(owner, None)
        while node is not None:
            del node.owners[owner]
            parent = node.parent
            if parent is not None and not node.owners:
                del parent.children[int(node.edge[0])]
            elif parent is not None:
                self._join(node)
            node = parent

    def longest(self, ids: IntArray) -> tuple[int, tuple[Owner, ...]]:
        """The longest beginning of ``ids`` in the tree.

        Args:
            ids: int64 ``[tokens]``.

        Returns:
            Its length in tokens, and the owners of sequences that begin with it, oldest first; 0 and nobody where not
            even the first token is known.
        """
        node, place = self._root, 0
        while place < len(ids) and (child := node.children.get(int(ids[place]))) is not None:
            common = _common(child.edge, ids[place:])
            node, place = child, place + common
            if common < len(child.edge):
                break
        return place, tuple(node.owners) if place else ()

    def _join(self, node: _Node[Owner]) -> None:
        """Make one node of ``node`` and its only child, unless a sequence ends between them."""
        if len(node.children) != 1:
            return
        (child,) = node.children.values()
        if len(child.owners) != len(node.owners):
            return
        node.edge = np.concatenate([node.edge, child.edge])
        node.children = child.children
        for each in node.children.values():
            each.parent = node
        for owner in child.owners:
            if self._ends[owner] is child:
                self._ends[owner] = node


def _split(node: _Node[Owner], length: int) -> _Node[Owner]:
    """Cut a node's edge in two.

    Returns:
        The new node with the first ``length`` tokens, ``node``'s parent from now on.
    """
    parent = node.parent
    assert parent is not None, "the root has no edge to cut"
    upper = _Node(node.edge[:length], parent, dict(node.owners), {int(node.edge[length]): node})
    parent.children[int(upper.edge[0])] = upper
    node.edge, node.parent = node.edge[length:], upper
    return upper


def _common(first: IntArray, second: IntArray) -> int:
    """How many tokens two sequences have in common at their beginning."""
    length = min(len(first), len(second))
    differs = first[:length] != second[:length]
    return int(differs.argmax()) if differs.any() else length
