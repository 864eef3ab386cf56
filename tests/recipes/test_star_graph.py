"""The star graphs themselves, and the recipe in its smallest size."""

import itertools
import random

import pytest

from posttrain.errors import UserError
from recipes.star_graph.graphs import draw, stream
from recipes.star_graph.run import parse, run

SIZES = [(2, 5), (5, 5), (3, 8), (2, 20), (1, 2)]


@pytest.mark.parametrize(("degree", "length"), SIZES)
def test_counts(degree, length):
    graph = draw(random.Random(0), degree, length, 50)
    assert len(graph.edges) == len(set(graph.edges)) == degree * (length - 1)
    assert len({node for edge in graph.edges for node in edge}) == 1 + degree * (length - 1)
    assert len(graph.prompt_ids) == 3 * len(graph.edges) + 3


@pytest.mark.parametrize(("degree", "length"), SIZES)
def test_the_path_follows_edges_from_the_centre_to_the_goal(degree, length):
    graph = draw(random.Random(1), degree, length, 50)
    assert len(graph.path) == length
    assert set(itertools.pairwise(graph.path)) <= set(graph.edges)
    assert sum(start == graph.path[0] for start, _ in graph.edges) == degree
    assert graph.prompt_ids[-3:-1] == (graph.path[0], graph.path[-1])


def test_only_the_whole_path_is_rewarded():
    graph = draw(random.Random(2), 3, 4, 50)
    assert graph.reward(graph.path) == 1
    assert graph.reward(graph.path[:-1]) == 0
    assert graph.reward((*graph.path, graph.path[-1])) == 0
    assert graph.reward((graph.path[0], graph.path[-1], *graph.path[2:])) == 0


def test_a_stream_is_decided_by_seed_and_split():
    def first(seed, split):
        return list(itertools.islice(stream(seed, split, 2, 5, 50), 5))

    assert first(0, "test") == first(0, "test")
    assert len({first(0, "test")[0], first(1, "test")[0], first(0, "pre-training")[0]}) == 3


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 5, 50), "degree: must be at least 1"),
        ((2, 1, 50), "length: must be at least 2"),
        ((3, 8, 21), "nodes: G\\(3, 8\\) has 22 nodes"),
    ],
)
def test_sizes_are_checked(sizes, message):
    with pytest.raises(UserError, match=message):
        next(stream(0, "test", *sizes))


@pytest.mark.slow
def test_the_smoke_size_runs_end_to_end(tmp_path):
    result = run(parse(["--smoke", "--device", "cpu", "--out", str(tmp_path)]))
    assert set(result) == {"reference", "qsharp", "cd"}
    assert result["reference"]["kl"] == 0 < result["qsharp"]["kl"]
    assert 0.1 < result["reference"]["accuracy"] < 0.9, "the reference should guess among the neighbours"
    assert (tmp_path / "result.json").is_file()
    assert (tmp_path / "value" / "model.safetensors").is_file()
