"""Shared starts: keys and values of tokens that requests begin with (system prompts, examples, earlier turns), kept in a
radix tree for each composition of adapters.

    digest of "style"      front (virtual tokens, prefix)
                             └─ you are a helpful assistant
                                  ├─ . what is …
                                  └─ , brief and exact

A tree belongs to a content digest, never to a name: an adapter that is replaced under its name finds nothing of its
predecessor. Its root holds the composition's front, which is computed once. Beyond the budget those go that were used
least recently.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..passes.plain_cache import FrontMemory
    from ..passes.state import Memory


class Node:
    """Tokens behind those of the parent, with their keys and values (per layer [kv_heads, n, head_dim])."""

    def __init__(self, tokens: tuple[int, ...], memory: Memory, parent: Node | None) -> None:
        self.tokens = tokens
        self.memory = memory
        self.parent = parent
        self.children: dict[int, Node] = {}
        self.used = 0


class Starts:
    """Trees by digest.

    Args:
        budget: tokens that all trees may hold together, fronts aside; 0 keeps none.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.tokens = 0
        self.roots: dict[Hashable, Node] = {}
        self.fronts: dict[Hashable, FrontMemory] = {}
        self._clock = 0

    def plant(self, digest: Hashable, front: FrontMemory) -> None:
        """Keep a composition's front; a tree may grow behind it."""
        if digest not in self.fronts:
            self.fronts[digest] = front
            self.roots[digest] = Node((), [], None)

    def fell(self, digest: Hashable) -> None:
        """Forget a composition's front and its tree."""
        if digest in self.roots:
            self.tokens -= sum(len(node.tokens) for node in walk(self.roots.pop(digest)))
            del self.fronts[digest]

    def find(self, digest: Hashable, tokens: Sequence[int]) -> list[tuple[Memory, int]]:
        """What is kept of the start of these tokens: memories with how many of their entries are of it, in order."""
        found = []
        for node, count in self._path(digest, tokens):
            found.append((node.memory, count))
        return found

    def known(self, digest: Hashable, tokens: Sequence[int]) -> int:
        """How many of these tokens are kept."""
        return sum(count for _, count in self._path(digest, tokens))

    def missing(self, digest: Hashable, tokens: Sequence[int]) -> int:
        """How many of these tokens `add` would keep: none that are kept already, none beyond the budget."""
        return 0 if len(tokens) > self.budget else len(tokens) - self.known(digest, tokens)

    def add(self, digest: Hashable, tokens: Sequence[int], memory: Memory) -> None:
        """Keep tokens, of which `missing` are new: memory holds the keys and values of these alone."""
        path = list(self._path(digest, tokens))
        node, at = self.roots[digest], 0
        for node, count in path:
            at += count
            if count < len(node.tokens):
                node = self._split(node, count)
        if at < len(tokens):
            child = Node(tuple(tokens[at:]), memory, node)
            child.used = self._tick()
            node.children[tokens[at]] = child
            self.tokens += len(child.tokens)
            self._shrink()

    def _path(self, digest: Hashable, tokens: Sequence[int]) -> Iterator[tuple[Node, int]]:
        """The nodes that these tokens lead through, with how many of each one's tokens are the same."""
        node, at, now = self.roots[digest], 0, self._tick()
        while at < len(tokens) and (child := node.children.get(tokens[at])) is not None:
            same = 0
            for own, other in zip(child.tokens, tokens[at : at + len(child.tokens)], strict=False):
                if own != other:
                    break
                same += 1
            child.used = now
            yield child, same
            if same < len(child.tokens):
                return
            node, at = child, at + same

    def _split(self, node: Node, count: int) -> Node:
        """Part a node in two; the first of them."""
        assert node.parent is not None
        first = Node(
            node.tokens[:count], [(k[:, :count].clone(), v[:, :count].clone()) for k, v in node.memory], node.parent
        )
        first.used = node.used
        node.parent.children[first.tokens[0]] = first
        node.tokens, node.parent = node.tokens[count:], first
        node.memory = [(k[:, count:].clone(), v[:, count:].clone()) for k, v in node.memory]
        first.children[node.tokens[0]] = node
        return first

    def _shrink(self) -> None:
        """Let the ends go that were used least recently, until the rest is within the budget."""
        while self.tokens > self.budget:
            ends = (node for root in self.roots.values() for node in walk(root) if not node.children and node.parent)
            last = min(ends, key=lambda node: node.used)
            assert last.parent is not None
            del last.parent.children[last.tokens[0]]
            self.tokens -= len(last.tokens)

    def _tick(self) -> int:
        self._clock += 1
        return self._clock


def walk(node: Node) -> Iterator[Node]:
    """A node and all behind it."""
    pending = [node]
    while pending:
        node = pending.pop()
        yield node
        pending += node.children.values()
