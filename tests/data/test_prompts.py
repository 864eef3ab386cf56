import pytest

from posttrain.data.prompts import BOXED, messages_for, plain_text, render, render_text, shortened, template_for
from posttrain.errors import UserError


class Tokenizer:
    chat_template = "yes"
    bos_token_id = 1

    def __init__(self, ids):
        self.ids = ids

    def apply_chat_template(self, messages, add_generation_prompt, return_dict):
        assert add_generation_prompt and return_dict
        return {"input_ids": self.ids}


def test_the_default_user_turn():
    assert template_for("arithmetic") == "{problem}"
    assert template_for("gsm8k") == BOXED
    assert messages_for({"problem": "1+1?"}, BOXED) == [
        {"role": "user", "content": "1+1?\nPlease reason step by step, and put your final answer within \\boxed{}."}
    ]


@pytest.mark.parametrize("template", ["no placeholder", "{other}", "{problem", "{}", "{{problem}}"])
def test_a_template_without_the_problem_is_refused(template):
    with pytest.raises(UserError, match="prompt: "):
        template_for("gsm8k", template)


def test_braces_in_a_problem_are_left_alone():
    assert messages_for({"problem": "\\frac{1}{2}"}, "{problem}!")[0]["content"] == "\\frac{1}{2}!"


def test_a_second_bos_is_an_error():
    assert render(Tokenizer([1, 5, 6]), []) == [1, 5, 6]
    with pytest.raises(UserError, match="both add the BOS"):
        render(Tokenizer([1, 1, 6]), [])


def test_a_missing_chat_template_is_an_error():
    tokenizer = Tokenizer([1])
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        render(tokenizer, [])


EXAMPLES = [{"problem": "1+1", "solution": "is 2"}, {"problem": "{2}+2", "solution": "is 4"}]


def test_worked_examples_and_a_system_line_come_before_the_problem():
    messages = messages_for({"problem": "3+3"}, "Q: {problem}", exemplars=EXAMPLES, system="Be brief.")
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert [message["content"] for message in messages] == ["Be brief.", "Q: 1+1", "is 2", "Q: {2}+2", "is 4", "Q: 3+3"]


def test_the_same_turns_as_a_text_to_be_continued():
    messages = messages_for({"problem": "3+3"}, "Q: {problem}\nA:", exemplars=EXAMPLES)
    text = "Q: 1+1\nA: is 2\n\nQ: {2}+2\nA: is 4\n\nQ: 3+3\nA:"
    assert plain_text(messages) == text
    assert render_text(lambda given: {"input_ids": [given]}, messages) == [text]


def test_a_long_text_is_shown_without_its_middle():
    text = "".join(map(str, range(3000)))
    shown = shortened(text, 100)
    assert shown.startswith(text[:50] + "\n[") and shown.endswith("]\n" + text[-50:])
    assert f"{len(text) - 100} characters" in shown
    assert shortened(text[:100], 100) == text[:100]
