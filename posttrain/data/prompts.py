"""From a row to the token ids that the model sees."""

from collections.abc import Sequence
from typing import Any

from posttrain.errors import UserError

Message = dict[str, str]

BOXED = "{problem}\nPlease reason step by step, and put your final answer within \\boxed{{}}."


def template_for(data: str, override: str | None = None) -> str:
    """The user turn, with a `{problem}` placeholder: the bare problem for `arithmetic`, else the zero-shot boxed instruction."""
    template = override if override is not None else "{problem}" if data == "arithmetic" else BOXED
    try:
        filled = template.format(problem="?")
    except (KeyError, IndexError, ValueError, AttributeError, TypeError):
        raise UserError("prompt: the only placeholder is {problem}; write other braces twice") from None
    if filled == template.replace("{{", "{").replace("}}", "}"):
        raise UserError("prompt: the template must contain {problem}")
    return template


def messages_for(
    row: dict[str, Any], template: str, *, exemplars: Sequence[dict[str, Any]] = (), system: str | None = None
) -> list[Message]:
    """The user's turn, after the system line and the worked examples (rows with `problem` and `solution`), where there are any."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for exemplar in exemplars:
        messages.append({"role": "user", "content": template.format(problem=exemplar["problem"])})
        messages.append({"role": "assistant", "content": exemplar["solution"]})
    messages.append({"role": "user", "content": template.format(problem=row["problem"])})
    return messages


def render(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Token ids of the chat, up to and including the generation prompt.

    Errors: UserError where the tokenizer has no chat template, or the rendered prompt begins with two BOS tokens.
    """
    if not tokenizer.chat_template:
        raise UserError(
            "model: its tokenizer has no chat template; add chat_template.jinja to the model's folder, or use a few-shot text prompt"
        )
    ids = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=True)["input_ids"]
    bos = tokenizer.bos_token_id
    if bos is not None and list(ids[:2]) == [bos, bos]:
        raise UserError("model: its chat template and its tokenizer both add the BOS token")
    return list(ids)


def shortened(text: str, longest: int = 4000) -> str:
    """For people: a long text without its middle."""
    if len(text) <= longest:
        return text
    half = longest // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters ...]\n{text[-half:]}"


def plain_text(messages: Sequence[Message]) -> str:
    """The same turns as a text to be continued, for models without a chat: `question answer`, a blank line, and so on."""
    parts = []
    for message in messages:
        parts.append(f" {message['content']}" if message["role"] == "assistant" else f"\n\n{message['content']}")
    return "".join(parts).removeprefix("\n\n")


def render_text(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Token ids of `plain_text`, with whatever the tokenizer puts before every text (BOS)."""
    return list(tokenizer(plain_text(messages))["input_ids"])
