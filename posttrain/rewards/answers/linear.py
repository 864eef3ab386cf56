"""Sums and products that know vectors and matrices."""

from posttrain.rewards.answers.lexer import ParseError
from posttrain.rewards.answers.tree import MINUS_ONE, Apply, Matrix, Node, Tuple, negative


def product(*factors: Node) -> Node:
    """A product in order, flattened; a scalar times a matrix goes to the entries, two matrices are multiplied out."""
    result = factors[0]
    for factor in factors[1:]:
        result = _times(result, factor)
    return result


def _times(a: Node, b: Node) -> Node:
    if isinstance(a, Matrix) and isinstance(b, Matrix):
        if len(a.rows[0]) != len(b.rows) or len(a.rows) * len(b.rows) * len(b.rows[0]) > 1000:
            raise ParseError("matrices that do not multiply")
        columns = list(zip(*b.rows, strict=True))
        return Matrix(
            tuple(
                tuple(total(tuple(_times(x, y) for x, y in zip(row, col, strict=True))) for col in columns)
                for row in a.rows
            )
        )
    if isinstance(b, Matrix | Tuple):
        a, b = b, a
    if isinstance(a, Matrix):
        return Matrix(tuple(tuple(_times(b, cell) for cell in row) for row in a.rows))
    if isinstance(a, Tuple):
        if isinstance(b, Matrix | Tuple):
            raise ParseError("product of tuples")
        return Tuple(tuple(_times(b, item) for item in a.items))
    return Apply("mul", (*_factors(a), *_factors(b)))


def _factors(node: Node) -> tuple[Node, ...]:
    return node.args if isinstance(node, Apply) and node.op == "mul" else (node,)


def total(terms: tuple[Node, ...]) -> Node:
    """A sum; of matrices or tuples, entry by entry."""
    if len(terms) == 1:
        return terms[0]
    if all(isinstance(t, Matrix) for t in terms):
        grids = [t.rows for t in terms if isinstance(t, Matrix)]
        if len({(len(g), len(g[0])) for g in grids}) != 1:
            raise ParseError("matrices that do not add")
        return Matrix(
            tuple(tuple(total(cells) for cells in zip(*rows, strict=True)) for rows in zip(*grids, strict=True))
        )
    if all(isinstance(t, Tuple) for t in terms):
        tuples = [t.items for t in terms if isinstance(t, Tuple)]
        if len({len(t) for t in tuples}) != 1:
            raise ParseError("tuples that do not add")
        return Tuple(tuple(total(cells) for cells in zip(*tuples, strict=True)))
    if any(isinstance(t, Matrix | Tuple) for t in terms):
        raise ParseError("sum of unlike things")
    return Apply("add", terms)


def opposite(node: Node) -> Node:
    return product(MINUS_ONE, node) if isinstance(node, Matrix | Tuple) else negative(node)


def transpose(matrix: Matrix) -> Matrix:
    return Matrix(tuple(zip(*matrix.rows, strict=True)))
