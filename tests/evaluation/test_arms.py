"""Arms, on samples small enough to count by hand."""

import pytest

from posttrain.evaluation.arms import reranked_arm, sampled_arms, weighted_vote_arm

CORRECT = [[True, False, False, True], [False, False, False, True]]
ANSWERS = [["7", "8", "8", "7.0"], ["5", "5", None, "6"]]
LENGTHS = [[10, 20, 30, 40], [10, 10, 10, 30]]  # 20 on average


@pytest.fixture
def arms():
    return sampled_arms(CORRECT, ANSWERS, LENGTHS, seconds=8.0)


def test_one_sample_costs_one_sample(arms):
    base = arms["base"]
    assert base.per_problem.tolist() == [0.5, 0.25]
    assert (base.accuracy, base.tokens, base.seconds) == (0.375, 20, 2.0)
    assert base.curve == (0.375,) * 4


def test_a_majority_counts_answers_of_one_value_together(arms):
    assert arms["majority"].per_problem.tolist() == [0.5, 0.0]  # 7 and 7.0 tie with 8; 5 outvotes 6
    assert (arms["majority"].tokens, arms["majority"].seconds) == (80, 8.0)


def test_the_oracle_is_pass_at_k(arms):
    assert arms["oracle"].curve == pytest.approx((0.375, (5 / 6 + 1 / 2) / 2, (1 + 3 / 4) / 2, 1.0))
    assert arms["oracle"].curve[-1] == arms["oracle"].accuracy


def test_every_curve_begins_with_one_sample_and_ends_at_the_accuracy(arms):
    arms["scored"] = reranked_arm("scored", "scored", [[4, 3, 2, 1], [1, 2, 3, 4]], CORRECT, LENGTHS, 9.0)
    for arm in arms.values():
        assert arm.curve[0] == pytest.approx(0.375) and arm.curve[-1] == pytest.approx(arm.accuracy)
        assert 0 <= arm.interval[0] <= arm.accuracy <= arm.interval[1] <= 1


def test_reranking_keeps_the_best_scored_and_shares_ties():
    scores = [[0.1, 0.9, 0.5, 0.2], [1.0, 0.0, 0.0, 1.0]]
    arm = reranked_arm("qprobe", "Q-Probe", scores, CORRECT, LENGTHS, 9.0)
    assert arm.per_problem.tolist() == [0.0, 0.5]
    assert arm.summary() == {"accuracy": 0.25, "interval": list(arm.interval), "tokens": 80, "seconds": 9.0}


def test_a_vote_counts_for_its_score_above_the_least():
    """Returns of -1 and 0 are those of 0 and 1 to another zero; what rounding leaves below counts for nothing."""
    scores = [[0.1, 0.3, 0.2, 0.3], [0.5, 0.6, 0.0, 0.9]]
    arm = weighted_vote_arm("vote", "vote", scores, ANSWERS, CORRECT, LENGTHS, 9.0)
    below = [[score - 1 for score in row] for row in scores]
    below[1][2] -= 1e-9
    shifted = weighted_vote_arm("vote", "vote", below, ANSWERS, CORRECT, LENGTHS, 9.0, least=-1.0)
    assert arm.per_problem.tolist() == shifted.per_problem.tolist() == [0.0, 0.0]  # 0.5 for 8, 1.1 for 5


def test_ragged_samples_go_as_far_as_the_fewest():
    arms = sampled_arms([[True, False], [True]], [["1", "2"], ["1"]], [[10, 20], [30]], 1.0)
    assert arms["base"].accuracy == 0.75 and len(arms["oracle"].curve) == 1
