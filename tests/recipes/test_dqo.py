"""DQO's recipe: what it must reach, with the baselines beside it (`pytest -s` prints the tables); the soak: in three seeds."""

from dataclasses import replace

import pytest

from posttrain.cli.tables import print_arms
from posttrain.config import build, read_yaml
from posttrain.evaluation.intervals import paired_comparison
from posttrain.pipelines.dqo import DQORunConfig, run
from tests.soak.sizes import size

# Of the mean length, at most. Careful writers, who are right, write a sixth more than hurried ones: whoever is right as often as
# they are writes 5 or 6 % more than the base.
LONGER = 1.08


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", size((0,), (0, 1, 2)))
def test_dqo_raises_accuracy_by_25_points_and_not_its_length(tmp_path, seed):
    recipe = build(DQORunConfig, read_yaml("recipes/dqo/baselines.yaml"))
    assert (recipe.train_samples, recipe.temperature) == (8, 1.0)
    sizes = {"test_prompts": 250, "test_samples": 2}
    config = replace(recipe, out=str(tmp_path / "run"), seed=seed, **sizes)
    arms = run(config, say=lambda _: None).arms
    print_arms(arms.values())
    base, trained = arms["base"], arms["dqo"]
    assert paired_comparison(trained.per_problem, base.per_problem).low >= 0.25
    assert trained.tokens <= LONGER * base.tokens
    for name in recipe.baselines:
        assert arms[name].accuracy > base.accuracy, f"{name} learned nothing: it is no baseline"
