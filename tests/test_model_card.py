"""The card of a trained model, as the hub's own reader reads it."""

import pytest
from huggingface_hub import ModelCard

from posttrain.model_card import write_card

FIGURES = {
    "one sample": {"accuracy": 0.49, "interval": [0.46, 0.52], "tokens": 61.0},
    "a | method": {"accuracy": 0.75, "interval": [0.72, 0.78], "tokens": 64.4},
}


def test_the_hub_reads_figures_and_base(tmp_path):
    folder = tmp_path / "run" / "policy"
    path = write_card(
        *(folder, "a method", "owner/name"),
        tags=["extra"],
        paper="2410.09302",
        data="arithmetic/train",
        measured_on="arithmetic/test",
        figures=FIGURES,
        own="a | method",
        settings={"beta": 0.03, "steps": [1, 2]},
        notes=["A note."],
    )
    card = ModelCard.load(path)
    assert (card.data.base_model, card.data.tags) == ("owner/name", ["posttrain", "extra"])
    (result,) = card.data.eval_results
    assert (result.dataset_type, result.dataset_split) == ("arithmetic", "test")
    assert (result.metric_name, result.metric_value) == ("pass@1", 0.75)
    assert "| **a \\| method** | 75.0 % | 72.0 - 78.0 | 64 |" in card.text
    assert " by a method ([arXiv 2410.09302](https://arxiv.org/abs/2410.09302)) on arithmetic/train, with" in card.text
    assert "Measured on arithmetic/test:" in card.text
    assert "beta: 0.03" in card.text and "A note." in card.text and "- torch 2" in card.text
    assert "arxiv.org/abs/2410.09302" in card.text and str(folder) in card.text


@pytest.mark.parametrize("base", ["tiny", "/a/b", "./a/b", "model.gguf"])
def test_a_base_that_the_hub_does_not_have_is_no_link(tmp_path, base):
    card = ModelCard.load(write_card(tmp_path, "a method", base))
    assert card.data.base_model is None and card.data.eval_results is None
    assert f"Trained from `{base}` by a method" in card.text


def test_a_file_is_no_data_set_of_the_hub(tmp_path):
    path = write_card(tmp_path, "m", "tiny", measured_on="/data/sums.jsonl/test", figures=FIGURES, own="one sample")
    card = ModelCard.load(path)
    assert card.data.eval_results is None and "Measured on /data/sums.jsonl/test:" in card.text
