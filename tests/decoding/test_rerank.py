"""Re-ranking, and what it is worth against k."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from posttrain.decoding.rerank import CriticReranker, Reranker, best_of_k, chunked_value
from posttrain.errors import UserError
from posttrain.models.actor_critic import new_critic
from posttrain.models.features import FeatureSpec, hidden_features
from posttrain.models.probe import Probe, ProbeCard

NAN = float("nan")
SCORES = torch.tensor([[0.2, 0.9, 0.1, 0.4, 0.8, -0.3, 0.0, 0.5, 0.7, 0.6]], dtype=torch.float64)
REWARDS = torch.tensor([[0, 0, 1, 1, 1, 0, 0, 1, 0, 1]], dtype=torch.float64)


def groups(prompts=6, samples=7, seed=0, ties=False):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(prompts, samples, generator=generator, dtype=torch.float64)
    rewards = torch.rand(prompts, samples, generator=generator, dtype=torch.float64)
    return (scores.mul(1.5).round() if ties else scores), rewards


@pytest.mark.parametrize(("beta", "expected"), [(0, 0.5), (0.1, 0.503341), (1, 0.551820)])
def test_vector_chunks_of_four(beta, expected):
    assert chunked_value(SCORES, REWARDS, 4, beta).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("beta", [0, 0.3])
def test_chunks_shuffled_are_unbiased(beta):
    """The mean over many shuffles is the mean over all subsets, here by counting them."""
    scores, rewards = groups(prompts=2, samples=5)
    generator = torch.Generator().manual_seed(0)
    estimate = sum(chunked_value(scores, rewards, 3, beta, generator) for _ in range(1000)) / 1000
    subsets = torch.tensor(list(itertools.combinations(range(5), 3)))
    exact = chunked_value(scores[:, subsets].view(-1, 3), rewards[:, subsets].view(-1, 3), 3, beta)
    assert estimate.item() == pytest.approx(exact.item(), abs=0.02)


def test_same_generator_same_value():
    scores, rewards = groups()
    first, second = (chunked_value(scores, rewards, 3, 0.1, torch.Generator().manual_seed(5)) for _ in range(2))
    assert first.item() == second.item() != chunked_value(scores, rewards, 3, 0.1).item()


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("k", range(1, 8))
def test_best_of_k_is_the_mean_over_all_subsets(k, ties):
    scores, rewards = groups(ties=ties)
    total = 0.0
    for q, r in zip(scores, rewards, strict=True):
        subsets = torch.tensor(list(itertools.combinations(range(7), k)))
        best = q[subsets] == q[subsets].amax(1, keepdim=True)
        total += ((best * r[subsets]).sum(1) / best.sum(1)).mean().item()
    assert best_of_k(scores, rewards, k).item() == pytest.approx(total / len(scores), abs=1e-12)


def test_the_rewards_as_scores_are_pass_at_k():
    correct = torch.tensor([[1.0, 0, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 0, 1]])
    expected = (1 - 1 / 10 + 0 + 1) / 3  # C(3, 3) / C(5, 3), never, always
    assert best_of_k(correct, correct, 3).item() == pytest.approx(expected)


def test_equal_scores_are_the_base_policy():
    _, rewards = groups()
    for k in range(1, 8):
        assert best_of_k(torch.zeros_like(rewards), rewards, k).item() == pytest.approx(rewards.mean().item())


@pytest.mark.parametrize(
    "value", [lambda *a: chunked_value(a[0], a[1], 2, 0.2, mask=a[2]), lambda *a: best_of_k(a[0], a[1], 2, a[2])]
)
def test_ragged_groups_are_as_if_cut(value):
    scores, rewards = groups(prompts=3, samples=4)
    mask = torch.tensor([[True] * 4, [False, True, True, True], [False] * 4])
    dirty = scores.masked_fill(~mask, NAN), rewards.masked_fill(~mask, NAN)
    expected = (value(scores[:1], rewards[:1], None) + value(scores[1:2, 1:], rewards[1:2, 1:], None)) / 2
    assert value(*dirty, mask).item() == pytest.approx(expected.item(), abs=1e-12)


def test_k_may_differ_by_prompt():
    scores, rewards = groups(prompts=2)
    expected = (best_of_k(scores[:1], rewards[:1], 2) + best_of_k(scores[1:], rewards[1:], 6)) / 2
    assert best_of_k(scores, rewards, torch.tensor([2, 6])).item() == pytest.approx(expected.item())


def test_order_does_not_matter():
    scores, rewards = groups(ties=True)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    assert best_of_k(scores[:, order], rewards[:, order], 3).item() == pytest.approx(
        best_of_k(scores, rewards, 3).item()
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: chunked_value(SCORES, REWARDS, 11, 0), "k: 11 is more than the 10"),
        (lambda: best_of_k(SCORES, REWARDS, 11), "k: 11 is more than the 10"),
        (lambda: best_of_k(SCORES, REWARDS, 0), "k: must be at least 1"),
        (lambda: best_of_k(SCORES * NAN, REWARDS, 2), "NaN"),
        (lambda: chunked_value(SCORES, REWARDS * NAN, 2, 0.1), "NaN"),
        (lambda: best_of_k(SCORES, REWARDS, 2, torch.zeros(1, 10, dtype=torch.bool)), "no prompt has a sample"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(UserError, match=message):
        call()


@pytest.fixture(scope="module")
def reranker():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=20, eos_token_id=1, bos_token_id=None, **sizes)).eval()
    probe = Probe(ProbeCard(dim=16, feature=FeatureSpec(1, "mean"), policy="fp"))
    torch.nn.init.normal_(probe.first.weight)
    return Reranker(SimpleNamespace(model=model, tokenizer=None, fingerprint="fp"), probe)


PROMPT, COMPLETIONS = [3, 4, 5], [[6, 7], [8], [9, 10, 11, 1], []]


def test_reranker_scores_token_ids(reranker):
    rows = [(PROMPT, completion) for completion in COMPLETIONS]
    features = hidden_features(reranker.policy.model, rows, [FeatureSpec(1, "mean")])[:, 0].float()
    expected = features @ reranker.probe.first.weight[0]
    torch.testing.assert_close(reranker.score(PROMPT, COMPLETIONS), expected.detach())


def test_reranker_chooses_the_best(reranker):
    chosen, scores = reranker.choose(PROMPT, COMPLETIONS, beta=0)
    assert chosen == int(scores.argmax())


def test_reranker_at_a_high_beta_is_the_base_policy(reranker):
    generator = torch.Generator().manual_seed(0)
    assert {reranker.choose(PROMPT, COMPLETIONS, 1e6, generator)[0] for _ in range(60)} == {0, 1, 2, 3}


def test_reranker_refuses_the_probe_of_another_policy(reranker):
    with pytest.raises(UserError, match="probe: .*other"):
        Reranker(SimpleNamespace(model=None, fingerprint="other"), reranker.probe)


def test_reranker_refuses_a_probe_of_embeddings_from_elsewhere():
    with pytest.raises(UserError, match="elsewhere"):
        Reranker(SimpleNamespace(model=None, fingerprint="fp"), Probe(ProbeCard(dim=3)))


def test_a_critic_s_score_is_the_value_before_the_end_token(reranker):
    critic = new_critic(reranker.policy.model, "fp").eval()
    torch.nn.init.normal_(critic.head.weight)
    ranker = CriticReranker(reranker.policy, critic)
    chosen, scores = ranker.choose(PROMPT, COMPLETIONS, beta=0)
    expected = [critic(torch.tensor([[*PROMPT, *kept]]))[0, -1] for kept in ([6, 7], [8], [9, 10, 11], [])]
    torch.testing.assert_close(scores, torch.stack(expected).detach(), atol=1e-6, rtol=1e-5)
    assert chosen == int(scores.argmax())
