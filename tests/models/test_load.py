import json
import shutil

import pytest
import torch

from posttrain.errors import UserError
from posttrain.models.architecture import architecture
from posttrain.models.load import TINY, load_model, load_tokenizer, model_fingerprint
from tests.small_models import smollm2


def test_tiny_by_name():
    policy = load_model("tiny", device="cpu")
    assert policy.name == "tiny" and policy.context == 512 and policy.model.dtype == torch.float32
    assert not policy.model.training


def test_weights_that_no_fingerprint_would_cover_are_refused(tmp_path):
    shutil.copytree(TINY, tmp_path / "bin", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "bin" / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(UserError, match=r"^model: .*bin has no weights as \.safetensors"):
        load_tokenizer(str(tmp_path / "bin"))


def test_a_copy_elsewhere_has_the_same_fingerprint_and_other_weights_another(tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(TINY, copy)
    assert load_model(str(copy)).fingerprint == model_fingerprint(TINY)
    policy = load_model(str(copy))
    with torch.no_grad():
        policy.model.model.norm.weight[0] += 1
    policy.model.save_pretrained(tmp_path / "other")
    policy.tokenizer.save_pretrained(tmp_path / "other")
    assert load_model(str(tmp_path / "other")).fingerprint != model_fingerprint(TINY)


@pytest.mark.parametrize("name", ["./nothing", "/nothing/here", "a/b/c", "nothing.gguf"])
def test_unknown_paths_are_refused_without_asking_a_hub(name, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(UserError, match="model: "):
        load_model(name)


def test_a_name_that_the_hub_does_not_give_is_one_line(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def refuse(*_, **__):
        raise LocalEntryNotFoundError("cannot reach\nthe hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(
        UserError, match=r"model: tini is neither .* \(cannot reach\) \(did you mean tiny\?\)$"
    ) as caught:
        load_model("tini")
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(UserError, match=r"model: Qwen/Qwen3-8b is neither .* \(did you mean Qwen/Qwen3-8B\?\)$"):
        architecture("Qwen/Qwen3-8b")


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="no config.json"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UserError, match="model: .* is not a causal language model"):
        load_model(str(tmp_path))


def test_weights_that_are_not_finite_are_refused(tmp_path):
    policy = load_model("tiny")
    with torch.no_grad():
        policy.model.model.norm.weight[0] = float("nan")
    policy.model.save_pretrained(tmp_path)
    policy.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="not finite"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("device", "dtype", "field"), [("cpux", None, "device"), ("cpu", "float8", "dtype"), ("cuda", None, "device")]
)
def test_devices_and_dtypes(device, dtype, field, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=f"^{field}: "):
        load_model("tiny", device=device, dtype=dtype)


@pytest.mark.slow
def test_a_gguf_file_is_dequantised_once(tmp_path, monkeypatch):
    gguf = smollm2()
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path))
    policy = load_model(str(gguf), dtype="bfloat16")
    assert policy.tokenizer.chat_template
    assert [folder.name.rpartition("-")[0] for folder in (tmp_path / "gguf").iterdir()] == [gguf.stem]
    ids = policy.tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert "Paris" in policy.tokenizer.decode(policy.model.generate(ids, max_new_tokens=8, do_sample=False)[0])
    again = load_model(str(gguf), dtype="bfloat16")
    assert again.fingerprint == policy.fingerprint


def test_a_broken_gguf_file_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path))
    (tmp_path / "broken.gguf").write_bytes(b"GGUF and no more")
    with pytest.raises(UserError, match="not a readable GGUF file") as caught:
        load_model(str(tmp_path / "broken.gguf"))
    assert "\n" not in str(caught.value)
