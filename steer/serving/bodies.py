"""What requests say, in the words of OpenAI's API, and `steering` beside them.

What is in that API and changes nothing here (who asks, what to keep) is read and left; what would change the answer and
cannot be done is refused, never ignored: tools, formats, images, sound, prediction.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from activations.errors import ConfigError
from steer.serving.items import Asked
from steer.serving.sampling import Sampling

MOST_STOPS = 4
MOST_BIASES = 300
MOST_SEED = 2**63 - 1
Text = Annotated[str, Field(max_length=1 << 20)]
Seed = Annotated[int, Field(ge=-MOST_SEED, le=MOST_SEED)]


class Wire(BaseModel):
    """Base of requests: their own types, and no key that nobody reads."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Part(Wire):
    """A part of a message: only text is read."""

    type: Literal["text"]
    text: Text


class Message(Wire):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[Part] | None = None
    name: Text | None = None
    refusal: None = None

    @property
    def text(self) -> str:
        """What it says."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""

    def turn(self) -> dict[str, str]:
        """As a chat template reads it; the developer's word is the system's."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.text}


class StreamOptions(Wire):
    """What a stream has beside text."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class Format(Wire):
    """The format of an answer: text."""

    type: Literal["text"]


class Request(Wire):
    """What both kinds of requests have."""

    model: Text
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: int | None = Field(default=1, ge=1)
    stop: Text | Annotated[list[Text], Field(max_length=MOST_STOPS)] | None = None
    seed: Seed | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    top_k: Annotated[int, Field(ge=1)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = 0.0
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MOST_BIASES)] | None = (
        None
    )
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    user: Text | None = None
    steering: Asked | None = None
    """what it is steered with, beside what the model's name asks for"""

    @field_validator("stop")
    @classmethod
    def _no_empty(cls, stop: Any) -> Any:
        if stop == "" or (isinstance(stop, list) and "" in stop):
            raise ValueError("a stop string of a character or more")
        return stop

    @property
    def stops(self) -> list[str]:
        """Stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def n_choices(self) -> int:
        """Answers to each prompt."""
        return self.n or 1

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with what it used."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, seed: int, max_tokens: int, n_top: int | None, vocabulary: int) -> Sampling:
        """How one of its answers is drawn. Raises: ConfigError for a bias of a token that is not there."""
        bias = {}
        for token, value in (self.logit_bias or {}).items():
            if not (token.isascii() and token.isdigit() and int(token[:9]) < vocabulary):
                expected = f"ids of tokens below {vocabulary}"
                raise ConfigError("logit_bias", expected=expected, got=repr(token[:40]), fix="Correct it.")
            bias[int(token)] = value
        return Sampling(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k,
            seed=seed,
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            bias=bias,
            n_top=n_top,
        )


class ChatRequest(Request):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=1000)
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: Format | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    modalities: list[Literal["text"]] | None = None
    service_tier: Text | None = None
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None

    @model_validator(mode="after")
    def _check(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("logprobs true beside top_logprobs")
        return self

    @property
    def n_top(self) -> int | None:
        """Likeliest tokens that are told."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def most_tokens(self) -> int | None:
        """Tokens that it asks for at most."""
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(Request):
    """POST /v1/completions."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=64)]
        | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=1 << 20)]
        | Annotated[list[Annotated[list[int], Field(min_length=1)]], Field(min_length=1, max_length=64)]
    )
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: Literal[False] | None = False
    suffix: None = None
    best_of: Literal[1] | None = None

    @property
    def n_top(self) -> int | None:
        """Likeliest tokens that are told."""
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """One text or row of tokens a prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [each for each in self.prompt if not isinstance(each, int)]

    @property
    def most_tokens(self) -> int | None:
        """Tokens that it asks for at most."""
        return self.max_tokens
