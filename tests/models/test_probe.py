"""The probe: its arithmetic, and the folder that it comes back from."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from posttrain.errors import UserError
from posttrain.models.features import FeatureSpec
from posttrain.models.probe import Probe, ProbeCard


def trained(hidden=None, policy="policy-a"):
    """A probe with weights and a scale that are not trivial."""
    torch.manual_seed(0)
    feature = FeatureSpec(2, "mean")
    probe = Probe(ProbeCard(dim=6, hidden=hidden, feature=feature, policy=policy, loss="policy", beta=1.0))
    for parameter in probe.parameters():
        torch.nn.init.normal_(parameter)
    probe.standardise(3 + 2 * torch.randn(50, 6))
    return probe


@pytest.mark.parametrize("hidden", [None, 4])
def test_an_untrained_probe_leaves_the_policy_alone(hidden):
    scores = Probe(ProbeCard(dim=6, hidden=hidden))(torch.randn(2, 3, 6))
    assert scores.shape == (2, 3)
    assert (scores == 0).all()


def test_linear_score_is_theta_times_the_standardised_feature():
    probe, features = trained(), 3 + 2 * torch.randn(5, 6)
    expected = ((features - probe.mean) / probe.std) @ probe.first.weight[0] + probe.first.bias
    torch.testing.assert_close(probe(features), expected)


def test_hidden_layer():
    probe, features = trained(hidden=4), 3 + 2 * torch.randn(5, 6)
    expected = probe.second(torch.relu(probe.first((features - probe.mean) / probe.std)))[:, 0]
    torch.testing.assert_close(probe(features), expected)


def test_half_precision_features_give_float32_scores():
    probe, features = trained(), torch.randn(5, 6).half()
    assert torch.equal(probe(features), probe(features.float()))


def test_scores_by_blocks_are_the_same():
    probe, features = trained(), torch.randn(11, 6)
    torch.testing.assert_close(probe.score(features, block=4), probe(features).detach())


def test_standardised_features_have_mean_0_and_std_1():
    features = torch.tensor([1000.0, 0.01]) + torch.tensor([0.5, 3.0]) * torch.randn(2000, 2)
    probe = Probe(ProbeCard(dim=2))
    probe.standardise(features.half())
    scaled = (features.half().float() - probe.mean) / probe.std
    torch.testing.assert_close(scaled.mean(0), torch.zeros(2), atol=1e-3, rtol=0)
    torch.testing.assert_close(scaled.std(0, correction=0), torch.ones(2), atol=1e-3, rtol=0)


def test_a_constant_feature_is_only_centred():
    probe = Probe(ProbeCard(dim=2))
    probe.standardise(torch.tensor([[700.1, 0.0], [700.1, 0.0], [700.1, 0.0]]))
    assert probe.std.tolist() == [1, 1]


@pytest.mark.parametrize("hidden", [None, 4])
def test_round_trip(tmp_path, hidden):
    probe, features = trained(hidden), torch.randn(7, 6)
    probe.save_pretrained(tmp_path / "new" / "probe")
    again = Probe.from_pretrained(tmp_path / "new" / "probe", fingerprint="policy-a")
    assert again.card == probe.card
    assert torch.equal(again(features), probe(features))
    assert {path.name for path in (tmp_path / "new" / "probe").iterdir()} == {"config.json", "model.safetensors"}


def test_saving_again_replaces(tmp_path):
    trained().save_pretrained(tmp_path)
    probe = trained(policy="policy-b")
    probe.save_pretrained(tmp_path)
    assert Probe.from_pretrained(tmp_path, "policy-b").card == probe.card


def test_config_says_what_it_reads(tmp_path):
    trained().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["feature"] == {"layer": 2, "pooling": "mean"}
    assert (config["policy"], config["loss"], config["beta"]) == ("policy-a", "policy", 1.0)
    assert {"posttrain", "torch"} <= set(config["versions"])


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def poison(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["first.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda folder: (folder / "config.json").write_text("{"), "damaged"),
        (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe"), "damaged"),
        (lambda folder: (folder / "config.json").write_text("[]"), "mapping"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"1234"), "damaged"),
        (lambda folder: edit(folder, dim=7), "shapes"),
        (lambda folder: edit(folder, hidden=3), "shapes"),
        (lambda folder: edit(folder, dim=0), "dim"),
        (lambda folder: edit(folder, dim="6"), "dim"),
        (lambda folder: edit(folder, feature={"layer": 1, "pooling": "max"}), "pooling"),
        (lambda folder: edit(folder, policy="policy-b"), "policy-b.*policy-a"),
        (lambda folder: edit(folder, policy=None, feature=None), "elsewhere"),
        (poison, "not finite"),
    ],
)
def test_a_damaged_folder_is_one_line(tmp_path, damage, message):
    trained().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=f"^probe: .*{message}") as caught:
        Probe.from_pretrained(tmp_path, fingerprint="policy-a")
    assert "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="^probe: cannot write"):
        trained().save_pretrained(tmp_path / "file" / "probe")
