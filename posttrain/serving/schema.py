"""The bodies that clients may send: OpenAI's, and two fields of ours, `guidance` and `rerank`.

Nothing converts and nothing is ignored: a field that this server does not know is refused, and one of OpenAI's that it
knows but cannot fulfil is accepted with the value that asks for nothing.
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from posttrain.rollouts.engine import LEAST_BETA


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair, which is no character") from None
    return text


Text = Annotated[str, AfterValidator(_encodable)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Neutral = Annotated[float, Field(ge=0, le=0)]


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class GuidanceField(Body):
    """beta: KL coefficient, in units of the reward; top_k: how many tokens are valued; guide: its name, where there are several;
    explain: tell what it did at every token."""

    beta: Annotated[float, Field(ge=LEAST_BETA)] = 0.1
    top_k: Count | None = None
    guide: Text | None = None
    explain: bool = False


class RerankField(Body):
    """k: completions to sample; beta: 0 keeps the best, above 0 draws by softmax(score / beta); probe: as `guide` above;
    guide: score by this guide's value model, at the last token, instead of by a probe."""

    k: Count
    beta: Annotated[float, Field(ge=0)] = 0.0
    probe: Text | None = None
    guide: Text | None = None


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool | None = None


class TextFormat(Body):
    type: Literal["text"]


class Sampled(Body):
    """What both end points have in common."""

    model: Text | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Count | None = None
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    guidance: GuidanceField | None = None
    rerank: RerankField | None = None
    # OpenAI's, which ask for nothing
    user: Text | None = None
    frequency_penalty: Neutral | None = None
    presence_penalty: Neutral | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None


class TextPart(Body):
    type: Literal["text"]
    text: Text


class Message(Body):
    role: Literal["system", "user", "assistant"]
    content: Text | list[TextPart]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(Sampled):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: TextFormat | None = None
    store: Literal[False] | None = None


class CompletionRequest(Sampled):
    prompt: Text | list[Text] | list[Token] | list[list[Token]]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: None = None
