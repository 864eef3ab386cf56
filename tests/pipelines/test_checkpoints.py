"""Which checkpoint an interrupted training goes on from, and which are passed over."""

import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from posttrain.pipelines.checkpoints import last_checkpoint

FILES = (
    "model.safetensors",
    "critic/model.safetensors",
    "config.json",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
)


def write(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            save_file({"weight": torch.ones(8)}, path)
        elif path.suffix == ".json":
            path.write_text('{"global_step": 1}')
        else:
            torch.save({"exp_avg": torch.ones(8)}, path)


@pytest.fixture
def two(tmp_path):
    """A folder with two whole checkpoints."""
    for step in (9, 10):
        write(tmp_path / f"checkpoint-{step}", *FILES, "trainer_state.json")
    return tmp_path


def quietly(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return last_checkpoint(folder)


def test_an_interrupted_checkpoint_is_not_gone_on_from(two):
    """transformers writes the trainer's state last."""
    assert quietly(two / "nothing") is None
    write(two / "checkpoint-11", *FILES)
    assert quietly(two) == str(two / "checkpoint-10")
    for step in (9, 10):
        (two / f"checkpoint-{step}" / "trainer_state.json").unlink()
    assert quietly(two) is None


@pytest.mark.parametrize("name", [*FILES, "trainer_state.json"])
def test_a_checkpoint_with_a_damaged_file_is_passed_over_with_a_warning(two, name):
    damaged = two / "checkpoint-10" / name
    damaged.write_bytes(damaged.read_bytes()[:-9])
    with pytest.warns(UserWarning, match=f"checkpoint-10/{name} is damaged; going on from the checkpoint before it"):
        assert last_checkpoint(two) == str(two / "checkpoint-9")


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_that_lacks_a_file_is_passed_over_with_a_warning(two, name):
    (two / "checkpoint-10" / name).unlink()
    with pytest.warns(UserWarning, match=rf"checkpoint-10 has no \S+{Path(name).suffix}; going on from the checkpoint"):
        assert last_checkpoint(two) == str(two / "checkpoint-9")


def test_where_every_checkpoint_is_damaged_there_is_none(two):
    for step in (9, 10):
        (two / f"checkpoint-{step}" / "trainer_state.json").write_text('{"global')
    with pytest.warns(UserWarning) as said:
        assert last_checkpoint(two) is None
    assert [str(warning.message).split("/")[-2] for warning in said] == ["checkpoint-10", "checkpoint-9"]


def test_a_checkpoint_of_deepspeed_has_its_own_files(tmp_path):
    """Of several processes, whose optimizer is in a folder of DeepSpeed's."""
    folder = tmp_path / "checkpoint-10"
    write(folder, "trainer_state.json", "rng_state_0.pth", "rng_state_1.pth", "global_step10/zero_optim_states.pt")
    (folder / "latest").write_text("global_step10")
    assert quietly(tmp_path) == str(folder)
    (folder / "global_step10" / "zero_optim_states.pt").unlink()
    (folder / "global_step10").rmdir()
    with pytest.warns(UserWarning, match=r"checkpoint-10 has no global_step\*"):
        assert last_checkpoint(tmp_path) is None
