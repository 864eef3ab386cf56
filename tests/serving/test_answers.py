from types import SimpleNamespace

from posttrain.serving.answers import ChatAnswers


def test_half_a_character_has_no_bytes_to_join():
    """Its name is that of no character, whose bytes are not the token's."""
    answers = ChatAnswers.__new__(ChatAnswers)
    answers.tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: ("é", "\ufffd")[ids[0]])
    assert [answers._entry(id, -1.0)["bytes"] for id in (0, 1)] == [[195, 169], None]
