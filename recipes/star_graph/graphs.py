"""Star graphs G(d, l): d disjoint paths of l nodes from one centre; which of them ends in the goal?

Section 6 of Q# (arXiv 2502.20548), after Bachmann and Nagarajan (2024). As tokens, one per node or sign:

    a b | c d | ... / start goal =        the prompt: shuffled edges, directed outward, then the question
    start n2 n3 ... goal                  the answer, of which only n2 is hard
"""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from posttrain.errors import UserError

SIGNS = "|/="


@dataclass(frozen=True)
class StarGraph:
    """path: the nodes from the centre to the goal; nodes: names are integers below it."""

    edges: tuple[tuple[int, int], ...]
    path: tuple[int, ...]
    nodes: int

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """3 E + 3 tokens for E edges; a node's token is its name, those of the signs follow."""
        bar, slash, equals = range(self.nodes, vocabulary(self.nodes))
        listed = [token for edge in self.edges for token in (bar, *edge)][1:]
        return (*listed, slash, self.path[0], self.path[-1], equals)

    def reward(self, completion_ids: Sequence[int]) -> float:
        """1 where the completion is the whole path, exactly; else 0."""
        return float(tuple(completion_ids) == self.path)


def vocabulary(nodes: int) -> int:
    return nodes + len(SIGNS)


def check_sizes(degree: int, length: int, nodes: int) -> None:
    """Errors: UserError naming the size that is out of range."""
    if degree < 1:
        raise UserError(f"degree: must be at least 1, got {degree}")
    if length < 2:
        raise UserError(f"length: must be at least 2, the centre and the goal; got {length}")
    needed = 1 + degree * (length - 1)
    if nodes < needed:
        raise UserError(f"nodes: G({degree}, {length}) has {needed} nodes, of {nodes} names; give at least {needed}")


def draw(rng: random.Random, degree: int, length: int, nodes: int) -> StarGraph:
    names = rng.sample(range(nodes), 1 + degree * (length - 1))
    arms = [[names[0], *names[1 + arm * (length - 1) :][: length - 1]] for arm in range(degree)]
    edges = [edge for arm in arms for edge in itertools.pairwise(arm)]
    rng.shuffle(edges)
    return StarGraph(tuple(edges), tuple(arms[0]), nodes)


def stream(seed: int, split: str, degree: int, length: int, nodes: int) -> Iterator[StarGraph]:
    """Endless graphs, decided by seed and split alone. Splits are not kept apart: two equal graphs are very unlikely.

    Errors: UserError as `check_sizes`.
    """
    check_sizes(degree, length, nodes)
    rng = random.Random(f"{seed} {split}")
    while True:
        yield draw(rng, degree, length, nodes)
