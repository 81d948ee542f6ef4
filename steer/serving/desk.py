"""From what a request says to the jobs of an engine: model name, prompt, steering and sampling.

Left out: HTTP (`steer.serving.app`).
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from activations.errors import ConfigError, UnknownNameError
from steer.serving.answers import Kind, Shape
from steer.serving.bodies import ChatRequest, CompletionRequest
from steer.serving.catalogue import Catalogue, Prepared
from steer.serving.config import ServeConfig
from steer.serving.engine import Engine, Job
from steer.serving.items import Asked
from steer.serving.sampling import Sampling
from steer.serving.turns import prompt_of


class UnknownModelError(UnknownNameError):
    """A model name that the server does not have."""


@dataclass(frozen=True)
class Order:
    """What is to be done for one request."""

    jobs: list[Job]
    shape: Shape
    stops: list[str]


class Desk:
    """Takes requests for one model under several names."""

    def __init__(self, config: ServeConfig, engine: Engine, catalogue: Catalogue):
        """Raises: ConfigError for a preset of the model's own name; as `Engine.check` does for one that the model
        cannot be steered with.
        """
        self._config, self._engine, self._catalogue = config, engine, catalogue
        loaded = engine.loaded
        self.name = config.name or loaded.id
        if self.name in config.presets:
            raise ConfigError("presets", expected="other names than the model's", got=self.name, fix="Rename it.")
        # A tokenizer may have tokens that the model has no row for.
        self._vocabulary = min(len(loaded.tokenizer), loaded.model.config.get_text_config().vocab_size)
        for name, preset in config.presets.items():
            engine.check(_job(name, [0], Sampling(1), [preset], catalogue.prepare([preset], config.budget)))

    @property
    def models(self) -> dict[str, Asked]:
        """Names, each with what it is steered with."""
        return {self.name: Asked(), **self._config.presets}

    def n_answers(self, body: ChatRequest | CompletionRequest) -> int:
        """Answers that a request asks for. Raises: ConfigError for too many."""
        n = body.n * (len(body.prompts) if isinstance(body, CompletionRequest) else 1)
        if n > self._config.max_choices:
            expected = f"at most {self._config.max_choices} answers of a request"
            raise ConfigError("n", expected=expected, got=n, fix="Ask for fewer at once.")
        return n

    def order(self, id_: str, body: ChatRequest | CompletionRequest) -> Order:
        """The jobs of a request; takes time, so not for the event loop.

        Raises: UnknownModelError, ConfigError, and as `Catalogue.prepare` does.
        """
        if body.model not in self.models:
            expected = f"one of {', '.join(self.models)}"
            raise UnknownModelError("model", expected=expected, got=f"'{body.model[:100]}'", fix="See GET /v1/models.")
        asked = [self.models[body.model], *([body.steering] if body.steering is not None else [])]
        prepared = self._catalogue.prepare(asked, self._config.budget)
        rows = self._rows(body)
        seed = secrets.randbits(62) if body.seed is None else body.seed
        jobs = []
        for row in rows:
            for _ in range(body.n):
                index = len(jobs)
                sampling = body.sampling(seed + index, self._max_tokens(body, row), body.n_top, self._vocabulary)
                is_whole = not body.stream and not body.stops
                jobs.append(_job(f"{id_}-{index}", row, sampling, asked, prepared, is_whole=is_whole))
        kind: Kind = "chat" if isinstance(body, ChatRequest) else "text"
        n_prompt = sum(map(len, rows))
        return Order(jobs, self._shape(kind, id_, body, prepared, n_prompt), body.stops)

    def _shape(
        self, kind: Kind, id_: str, body: ChatRequest | CompletionRequest, prepared: Prepared, n_prompt: int
    ) -> Shape:
        name = f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-{id_}"
        return Shape(
            kind, name, body.model, self._engine.loaded, prepared, n_prompt, body.n_top is not None,
            tells_usage=body.stream_options.include_usage,
        )  # fmt: skip

    def _rows(self, body: ChatRequest | CompletionRequest) -> list[list[int]]:
        tokenizer = self._engine.loaded.tokenizer
        if isinstance(body, ChatRequest):
            rows = [tokenizer(prompt_of(self._engine.loaded, body.messages), add_special_tokens=False)["input_ids"]]
        else:
            rows = [each if isinstance(each, list) else tokenizer(each)["input_ids"] for each in body.prompts]
        _check_rows(rows, self._vocabulary)
        return rows

    def _max_tokens(self, body: ChatRequest | CompletionRequest, row: Sequence[int]) -> int:
        """Tokens of an answer: those asked for, or what there is room for."""
        asked, most = body.most_tokens, self._config.max_tokens
        if asked is not None and asked > most:
            raise ConfigError("max_tokens", expected=f"at most {most}", got=asked, fix="Ask for fewer.")
        return asked or max(1, min(most, self._engine.most_tokens - len(row)))


def _job(
    id_: str, row: list[int], sampling: Sampling, asked: Sequence[Asked], prepared: Prepared, *, is_whole: bool = False
) -> Job:
    whole = Asked.model_construct(steer=[item for each in asked for item in each.steer], budget=prepared.budget)
    return Job(id_, row, sampling, prepared.interventions, prepared.budget, whole, is_whole)


def _check_rows(rows: Sequence[Sequence[int]], vocabulary: int) -> None:
    for row in rows:
        if not row:
            raise ConfigError("prompt", expected="at least one token", got="none", fix="Write something.")
        for wrong in (token for token in row if not 0 <= token < vocabulary):
            expected = f"ids of tokens from 0, below {vocabulary}"
            raise ConfigError("prompt", expected=expected, got=wrong, fix="Correct it.")
