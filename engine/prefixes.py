"""Keys and values of what was read and written before, so that the next turn of a conversation need not read it again.

A radix tree of token ids (RadixAttention, Zheng et al. 2023), one for each scope: keys and values depend on the adapter
version that made them, and the engine also keeps people apart. Owns copies, not rows of the running batch: what is kept
never takes a slot from a request. The least recently used leaf goes first when the budget is full.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from engine.cache import KVCache

SHORTEST = 32  # tokens that are worth restoring: below, reading them costs no more than the mask they would need
Scope = tuple[str, str]  # (version, owner)


@dataclass(eq=False)
class Node:
    """A stretch of tokens that follows its parent's: ids (n,), keys and values (layers, kv_heads, n, head_dim)."""

    ids: list[int]
    keys: Tensor
    values: Tensor
    parent: Node | None
    used: int = 0
    children: dict[int, Node] = field(default_factory=dict)  # by first token

    @property
    def bytes(self) -> int:
        """Memory of the keys and values."""
        return 2 * self.keys.numel() * self.keys.element_size()


class Prefixes:
    """What may be read again, up to `budget` bytes."""

    def __init__(self, budget: int) -> None:
        self.budget, self.bytes = budget, 0
        self._roots: dict[Scope, dict[int, Node]] = {}
        self._clock = itertools.count(1)

    def restore(self, scope: Scope, ids: Sequence[int], cache: KVCache, row: int) -> int:
        """Copy the longest known prefix of `ids` into `row`; how many tokens it had.

        The last of `ids` is never restored: the model must still say what comes after it.
        """
        path = list(self._walk(scope, ids))
        count = min(sum(n for _, n in path), len(ids) - 1)
        if count < SHORTEST:
            return 0
        cache.reserve(row + 1, count)
        at, now = 0, next(self._clock)
        for node, n in path:
            end = min(at + n, count)
            cache.keys[:, row, :, at:end] = node.keys[:, :, : end - at]
            cache.values[:, row, :, at:end] = node.values[:, :, : end - at]
            at, node.used = end, now
        return count

    def keep(self, scope: Scope, ids: Sequence[int], cache: KVCache, row: int) -> None:
        """Remember the first len(ids) tokens of `row`, which are `ids`; only what is not known yet is copied."""
        at, parent, now = 0, None, next(self._clock)
        for node, n in list(self._walk(scope, ids)):
            if n < len(node.ids) and at + n < len(ids):
                node = self._split(scope, node, n)
            at, parent, node.used = at + n, node, now
        if at == len(ids):
            return
        keys, values = (kv[:, row, :, at : len(ids)].clone() for kv in (cache.keys, cache.values))
        leaf = Node(list(ids[at:]), keys, values, parent, now)
        if leaf.bytes > self.budget:
            return
        self._below(scope, parent)[ids[at]] = leaf
        self.bytes += leaf.bytes
        while self.bytes > self.budget:
            self._evict()

    def forget(self, version: str | None = None) -> None:
        """Drop everything, or all that one version made."""
        for scope in [scope for scope in self._roots if version in (None, scope[0])]:
            self.bytes -= sum(node.bytes for node in self._nodes(self._roots.pop(scope)))

    def _walk(self, scope: Scope, ids: Sequence[int]) -> Iterator[tuple[Node, int]]:
        """The nodes that spell the beginning of `ids`, and how many tokens of each do."""
        at, children = 0, self._roots.get(scope, {})
        while at < len(ids) and (node := children.get(ids[at])):
            n = common(node.ids, ids[at : at + len(node.ids)])
            yield node, n
            if n < len(node.ids):
                return
            at, children = at + n, node.children

    def _below(self, scope: Scope, parent: Node | None) -> dict[int, Node]:
        return self._roots.setdefault(scope, {}) if parent is None else parent.children

    def _split(self, scope: Scope, node: Node, n: int) -> Node:
        """Make the first `n` tokens of `node` a node of their own, its parent; returns that one."""
        upper = Node(node.ids[:n], node.keys[:, :, :n].clone(), node.values[:, :, :n].clone(), node.parent, node.used)
        self._below(scope, node.parent)[upper.ids[0]] = upper
        node.ids, node.keys, node.values = node.ids[n:], node.keys[:, :, n:].clone(), node.values[:, :, n:].clone()
        node.parent = upper
        upper.children[node.ids[0]] = node
        return upper

    def _evict(self) -> None:
        """Drop the leaf that was used longest ago."""
        leaves = ((node.used, scope, node) for scope, root in self._roots.items() for node in self._nodes(root) if not node.children)
        _, scope, node = min(leaves, key=lambda leaf: leaf[0])
        del self._below(scope, node.parent)[node.ids[0]]
        self.bytes -= node.bytes
        if not self._roots[scope]:
            del self._roots[scope]

    def _nodes(self, root: dict[int, Node]) -> Iterator[Node]:
        """All nodes below."""
        left = list(root.values())
        while left:
            node = left.pop()
            yield node
            left += node.children.values()


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences have in common at their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
