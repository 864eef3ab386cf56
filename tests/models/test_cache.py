import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from posttrain.models.cache import FIRST_LENGTH, DecodeMasks, SlotCache, decode_attention, read_length

LAYERS, HEADS, DIM, SLOTS = 2, 2, 3, 5


def states(rows, time):
    return [(torch.randn(rows, HEADS, time, DIM), torch.randn(rows, HEADS, time, DIM)) for _ in range(LAYERS)]


def history(pairs, row, length):
    """One request's own keys and values, per layer: what a slot must hold."""
    return [(keys[row, :, :length], values[row, :, :length]) for keys, values in pairs]


@settings(max_examples=40)
@given(st.data())
def test_every_row_reads_its_own_history_whatever_enters_moves_and_leaves(data):
    cache = SlotCache(SLOTS, limit=1000)
    rows: list[list[tuple[torch.Tensor, torch.Tensor]]] = []  # per active slot, per layer: its keys and values
    for _ in range(data.draw(st.integers(1, 8))):
        free = SLOTS - len(rows)
        lengths = data.draw(st.lists(st.integers(1, 150), min_size=1, max_size=free)) if free else []
        if lengths:
            copies = [i for i in range(len(lengths)) for _ in range(data.draw(st.integers(1, 2)))][:free]
            pairs = states(len(lengths), max(lengths))
            cache.fill(len(rows), max(lengths), torch.tensor(copies))
            for layer, (keys, values) in enumerate(pairs):
                assert cache.update(keys, values, layer)[0] is keys
            rows += [history(pairs, i, lengths[i]) for i in copies]
        for _ in range(data.draw(st.integers(0, 3)) if rows else 0):
            pairs = states(len(rows), 1)
            positions = [row[0][0].shape[1] for row in rows]
            cache.step(torch.tensor(positions), read_length(1 + max(positions)))
            rows = [
                [
                    tuple(torch.cat((old, new[i]), dim=1) for old, new in zip(row[layer], pairs[layer], strict=True))
                    for layer in range(LAYERS)
                ]
                for i, row in enumerate(rows)
            ]
            for layer, (keys, values) in enumerate(pairs):
                seen = cache.update(keys, values, layer)
                for i, row in enumerate(rows):
                    for kept, expected in zip(seen, row[layer], strict=True):
                        assert torch.equal(kept[i, :, : expected.shape[1]], expected)
        gone = data.draw(st.sets(st.integers(0, len(rows) - 1))) if rows else set()
        left = len(rows) - len(gone)
        targets = sorted(i for i in gone if i < left)
        sources = [i for i in range(left, len(rows)) if i not in gone]
        cache.move(sources, targets, max((rows[i][0][0].shape[1] for i in sources), default=0))
        for source, target in zip(sources, targets, strict=True):
            rows[target] = rows[source]
        rows = rows[:left]
        for layer in range(LAYERS if rows else 0):
            for i, row in enumerate(rows):
                assert torch.equal(cache.keys[layer][i, :, : row[layer][0].shape[1]], row[layer][0])
                assert torch.equal(cache.values[layer][i, :, : row[layer][1].shape[1]], row[layer][1])


def test_a_step_reads_the_cache_in_place():
    cache = SlotCache(SLOTS, limit=1000)
    cache.step(torch.tensor([0, 0]), 8)
    keys, values = cache.update(*states(2, 1)[0], 0)
    assert keys.data_ptr() == cache.keys[0].data_ptr() and values.data_ptr() == cache.values[0].data_ptr()


def test_the_cache_doubles_and_stays_below_its_limit():
    cache = SlotCache(1, limit=FIRST_LENGTH * 3)
    lengths = []
    for position in (0, FIRST_LENGTH, FIRST_LENGTH * 2, FIRST_LENGTH * 3 - 1):
        cache.step(torch.tensor([position]), position + 1)
        cache.update(*states(1, 1)[0], 0)
        lengths.append(cache.keys[0].shape[2])
    assert lengths == [FIRST_LENGTH, FIRST_LENGTH * 2, FIRST_LENGTH * 3, FIRST_LENGTH * 3]


def test_what_was_never_written_is_zero_so_that_weight_zero_hides_it():
    cache = SlotCache(2, limit=1000)
    cache.step(torch.tensor([3, 5]), 8)
    keys, values = cache.update(*states(2, 1)[0], 0)
    assert float(keys[0, :, 4:].abs().sum()) == 0 and float(values[0, :, 4:].abs().sum()) == 0


def llama(**settings):
    torch.manual_seed(0)
    shape = {
        "vocab_size": 11,
        "hidden_size": 16,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    return LlamaForCausalLM(LlamaConfig(**shape, **settings)).eval()


def test_a_full_mask_shows_a_row_itself_and_before():
    mask = DecodeMasks(llama())(torch.tensor([0, 2]), 4)
    assert (mask == 0).tolist() == [[[[True, False, False, False]]], [[[True, True, True, False]]]]


def test_a_sliding_mask_shows_no_further_than_the_window():
    model = llama()
    model.config.sliding_window = 2
    model.config.layer_types = ["full_attention", "sliding_attention"]
    masks = DecodeMasks(model)(torch.tensor([3]), 5)
    assert (masks["full_attention"] == 0).flatten().tolist() == [True, True, True, True, False]
    assert (masks["sliding_attention"] == 0).flatten().tolist() == [False, False, True, True, False]


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_decode_attention_equals_the_models_own(heads):
    model = llama(num_key_value_heads=heads)
    mask = DecodeMasks(model)(torch.tensor([2, 7]), 8)
    outputs = []
    with torch.inference_mode():
        for ours in (False, True):
            cache = SlotCache(2, limit=1000)
            cache.fill(0, 7)
            prompt = torch.arange(14).view(2, 7) % 11
            model(prompt, position_ids=torch.arange(7)[None], past_key_values=cache)
            cache.step(torch.tensor([2, 7]), 8)
            step = {"position_ids": torch.tensor([[2], [7]]), "attention_mask": mask, "past_key_values": cache}
            if ours:
                with decode_attention(model):
                    outputs.append(model(torch.tensor([[3], [4]]), **step).logits)
            else:
                outputs.append(model(torch.tensor([[3], [4]]), **step).logits)
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=0)


def test_decode_attention_is_switched_back_after_an_exception():
    model = llama()
    with pytest.raises(ZeroDivisionError), decode_attention(model):
        _ = 1 / 0
    assert model.config._attn_implementation == "sdpa"
