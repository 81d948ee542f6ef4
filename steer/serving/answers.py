"""Answers in the shapes of OpenAI's API, and under `saekit` what steered them.

    saekit: model, fingerprint, steering (the account of `steer.serving.catalogue`), steering_sha256, budget,
            and of each choice: fired (gate -> tokens on which it was open, counted from the prompt's first), scaled

Left out: sending them (`steer.serving.app`).
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from typing import Any, Literal

from activations.models import LoadedModel
from steer.serving.catalogue import Prepared
from steer.serving.sampling import Step
from steer.serving.writes import Answers, Choice, Delta
from steer.serving.writing import bytes_of, text_of

Kind = Literal["chat", "text"]
DONE = "data: [DONE]\n\n"


@dataclass
class Shape:
    """How the answers to one request are told."""

    kind: Kind
    id: str
    model: str
    """as the request calls it"""
    loaded: LoadedModel
    prepared: Prepared
    n_prompt: int
    """tokens of all prompts"""
    tells_logprobs: bool
    tells_usage: bool = False
    """a stream ends with what it used; its other chunks have the key, too, as OpenAI's do"""
    created: int = field(default_factory=lambda: int(time.time()))
    _offsets: dict[int, int] = field(default_factory=dict)

    # --- whole -------------------------------------------------------------------------------------------------------

    def whole(self, answers: Answers) -> dict[str, Any]:
        """All answers at once."""
        choices = [self._choice(index, choice) for index, choice in enumerate(answers.choices)]
        name = "chat.completion" if self.kind == "chat" else "text_completion"
        told = {"choices": choices, "usage": self.usage(answers), "saekit": self.account(answers.choices)}
        return {**self._head(name), **told}

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        found: dict[str, Any] = {"index": index, "finish_reason": choice.finish}
        if self.kind == "chat":
            found["message"] = {"role": "assistant", "content": choice.text, "refusal": None}
        else:
            found["text"] = choice.text
        return found | {"logprobs": self._logprobs(index, choice.steps)}

    def usage(self, answers: Answers) -> dict[str, int]:
        """Tokens read and written."""
        n = answers.n_read
        return {"prompt_tokens": self.n_prompt, "completion_tokens": n, "total_tokens": self.n_prompt + n}

    def account(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """What steered them."""
        return {
            "model": self.loaded.id,
            "fingerprint": self.loaded.fingerprint,
            "steering": self.prepared.account,
            "steering_sha256": self.prepared.sha256,
            "budget": self.prepared.budget,
            "choices": [choice.record() for choice in choices],
        }

    # --- a stream ----------------------------------------------------------------------------------------------------

    def first(self, n_choices: int) -> str:
        """What a stream begins with."""
        if self.kind == "text":
            return ""
        delta = {"role": "assistant", "content": ""}
        return "".join(self._chunk([self._piece(index, delta, None, None)]) for index in range(n_choices))

    def next(self, delta: Delta, answers: Answers) -> str:
        """What it goes on with."""
        steps = [] if delta.step is None else [delta.step]
        logprobs = self._logprobs(delta.index, steps)
        said: dict[str, Any] = {"content": delta.text} if self.kind == "chat" else {"text": delta.text}
        extra = {} if delta.finish is None else {"saekit": self.account([answers.choices[delta.index]])}
        if self.kind == "chat" and delta.finish is not None:
            before = self._chunk([self._piece(delta.index, said, logprobs, None)]) if delta.text or steps else ""
            return before + self._chunk([self._piece(delta.index, {}, None, delta.finish)], **extra)
        if not delta.text and not steps and delta.finish is None:
            return ""
        return self._chunk([self._piece(delta.index, said, logprobs, delta.finish)], **extra)

    def last(self, answers: Answers) -> str:
        """What it ends with."""
        return (self._chunk([], usage=self.usage(answers)) if self.tells_usage else "") + DONE

    def _piece(self, index: int, said: dict[str, Any], logprobs: Any, finish: str | None) -> dict[str, Any]:
        told = {"delta": said} if self.kind == "chat" else said
        return {"index": index, **told, "logprobs": logprobs, "finish_reason": finish}

    def _chunk(self, choices: list[dict[str, Any]], **extra: Any) -> str:
        name = "chat.completion.chunk" if self.kind == "chat" else "text_completion"
        usage = {"usage": None} if self.tells_usage else {}
        return f"data: {json.dumps({**self._head(name), 'choices': choices, **usage, **extra})}\n\n"

    # --- parts -------------------------------------------------------------------------------------------------------

    def _head(self, name: str) -> dict[str, Any]:
        fingerprint = f"saekit-{_version()}-{self.loaded.fingerprint[:12]}"
        return {
            "id": self.id, "object": name, "created": self.created, "model": self.model,
            "system_fingerprint": fingerprint,
        }  # fmt: skip

    def _logprobs(self, index: int, steps: Sequence[Step]) -> dict[str, Any] | None:
        if not self.tells_logprobs:
            return None
        if self.kind == "chat":
            return {"content": [self._told(step.token, step.logprob) | self._top(step) for step in steps]}
        tokenizer = self.loaded.tokenizer
        texts = [_spelled(tokenizer, step.token) for step in steps]
        offsets = []
        for text in texts:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(text)
        # The token itself is told, too, where it is none of the likeliest; of one spelling the likelier comes last.
        told = [[(step.token, step.logprob), *reversed(step.top)] for step in steps]
        top = [{_spelled(tokenizer, token): logprob for token, logprob in each} for each in told]
        return {
            "tokens": texts, "token_logprobs": [step.logprob for step in steps], "top_logprobs": top,
            "text_offset": offsets,
        }  # fmt: skip

    def _told(self, token: int, logprob: float | None) -> dict[str, Any]:
        tokenizer = self.loaded.tokenizer
        return {"token": text_of(tokenizer, token), "logprob": logprob, "bytes": bytes_of(tokenizer, token)}

    def _top(self, step: Step) -> dict[str, Any]:
        return {"top_logprobs": [self._told(token, logprob) for token, logprob in step.top]}


@cache
def _version() -> str:
    """saekit's own; it is looked for in files, which takes longer than a token does."""
    return version("saekit")


def _spelled(tokenizer: Any, token: int) -> str:
    """A token as the older format has it: bytes by their numbers, where they are only a part of a character."""
    text, found = text_of(tokenizer, token), bytes_of(tokenizer, token)
    if "\N{REPLACEMENT CHARACTER}" not in text or found is None:
        return text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)
