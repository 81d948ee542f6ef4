"""What requests say, in the words of OpenAI's API, and `steering` beside them.

What is in that API and changes nothing here (who asks, what to keep) is read and left, and so is a key that is null,
as clients spell what they leave out; what would change the answer and cannot be done is refused, never ignored: tools,
formats, images, sound, prediction, effort. Tools that were called earlier are read as a part of the conversation
(`steer.serving.turns`).

The first thing that is wrong is what is told, so lists are read up to it (`fail_fast`), and no further: of a body with
half a million of wrong things a list of all of them takes seconds, in which nobody else is answered.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from activations.errors import ConfigError
from steer.items import few
from steer.serving.items import Asked
from steer.serving.sampling import Sampling

MOST_STOPS = 4
MOST_CALLS = 128
MOST_BIASES = 300
MOST_ANSWERS = 1 << 16
"""of a request that is read; the server's own limit is lower"""
MOST_SEED = 2**63 - 1
MOST_TOP_K = 2**31 - 1
LEAST_TOP_P = 1e-9
"""stands for 0, with which the likeliest token alone is left"""
Text = Annotated[str, Field(max_length=1 << 20)]
Seed = Annotated[int, Field(ge=-MOST_SEED, le=MOST_SEED)]


class Wire(BaseModel):
    """Base of requests: their own types, and no key that nobody reads."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, said: Any) -> Any:
        if not isinstance(said, dict):
            return said
        return {key: value for key, value in few(said).items() if value is not None}


class Part(Wire):
    """A part of a message: only text is read."""

    type: Literal["text"]
    text: Text
    cache_control: dict[str, Any] = {}
    """what to keep, in the words of Anthropic's API, which proxies hand on"""


class Function(Wire):
    """The function that was called, and with what."""

    name: Annotated[Text, Field(min_length=1)]
    arguments: Text = ""
    """an object of JSON"""


class Call(Wire):
    """A call of a tool in an earlier answer."""

    id: Text = ""
    type: Literal["function"] = "function"
    function: Function
    index: int = 0
    """of a call that came as a stream; their order says it"""


class Message(Wire):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[Part], Field(fail_fast=True)] = ""
    name: Text = ""
    cache_control: dict[str, Any] = {}
    annotations: list[Any] = []
    """of an answer that is sent back; no template reads them"""
    tool_calls: Annotated[list[Call], Field(max_length=MOST_CALLS, fail_fast=True)] = []
    """of the assistant"""
    tool_call_id: Text = ""
    """of a tool: the call that it answers"""

    @model_validator(mode="after")
    def _check(self) -> Message:
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls of the assistant alone")
        if self.tool_call_id and self.role != "tool":
            raise ValueError("tool_call_id of a tool alone")
        return self

    @property
    def text(self) -> str:
        """What it says."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content


class StreamOptions(Wire):
    """What a stream has beside text."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Format(Wire):
    """The format of an answer: text."""

    type: Literal["text"]


class Request(Wire):
    """What both kinds of requests have."""

    model: Text
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    n: int = Field(default=1, ge=1, le=MOST_ANSWERS)
    stop: Text | Annotated[list[Text], Field(max_length=MOST_STOPS)] = []
    seed: Seed | None = None
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, ge=0, le=1)
    top_k: int = Field(default=0, ge=-1, le=MOST_TOP_K)
    """0 and -1: all of them, as vLLM's and llama.cpp's clients say it"""
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = {}
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    steering: Asked | None = None
    """what it is steered with, beside what the model's name asks for"""
    user: Text = ""
    metadata: dict[str, Any] = {}
    store: bool = False
    service_tier: Text = ""
    safety_identifier: Text = ""
    prompt_cache_key: Text = ""
    prompt_cache_retention: Text = ""

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _few_biases(cls, bias: Any) -> Any:
        return few(bias, MOST_BIASES) if isinstance(bias, dict) else bias

    @field_validator("stop")
    @classmethod
    def _no_empty(cls, stop: Any) -> Any:
        if stop == "" or (isinstance(stop, list) and "" in stop):
            raise ValueError("a stop string of a character or more")
        return stop

    @property
    def stops(self) -> list[str]:
        """Stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop

    def sampling(self, seed: int, max_tokens: int, n_top: int | None, vocabulary: int) -> Sampling:
        """How one of its answers is drawn. Raises: ConfigError for a bias of a token that is not there."""
        bias = {}
        for token, value in self.logit_bias.items():
            if not (token.isascii() and token.isdigit() and len(token) < 10 and int(token) < vocabulary):
                expected = f"ids of tokens below {vocabulary}"
                raise ConfigError("logit_bias", expected=expected, got=repr(token[:40]), fix="Correct it.")
            bias[int(token)] = value
        return Sampling(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p or LEAST_TOP_P,
            top_k=self.top_k if self.top_k > 0 else None,
            seed=seed,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            bias=bias,
            n_top=n_top,
        )


class ChatRequest(Request):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=1000, fail_fast=True)
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: Format | None = None
    tools: Annotated[list[Any], Field(max_length=0)] = []
    tool_choice: Literal["none", "auto"] = "none"
    parallel_tool_calls: bool = False
    modalities: list[Literal["text"]] = Field(default=[], fail_fast=True)

    @model_validator(mode="after")
    def _check(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
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
        | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=1 << 20, fail_fast=True)]
        | Annotated[list[Annotated[list[int], Field(min_length=1, fail_fast=True)]], Field(min_length=1, max_length=64)]
    )
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: Literal[False] = False
    best_of: Literal[1] = 1

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
