"""A model behind an OpenAI-compatible endpoint, which may be slow, down, out of patience, or hostile.

Flow of a request: 1. wait for its turn (`sae.labels.pace`); 2. POST to BASE_URL/chat/completions; 3. read at most
MAX_BYTES of what comes; 4. an answer is given on; of everything else is said what kind of trouble it is:

    limited   429: everybody waits, as long as Retry-After says, or longer each time
    down      a timeout, a broken connection, 5xx: this request waits and tries again
    garbled   something that is no chat completion: the same
    absent    no connection: the same, but not for long if nothing was ever answered
    refused   another 4xx: this request is at fault, and is not repeated
    fatal     no key, a wrong key, no money, nothing at this address: the run stops

A request is repeated `retries` times; a run stops when nothing was answered for `give_up_s`. Redirects are not
followed, so that the key goes nowhere else, and the key is cut out of whatever is kept or said. Left out: beginnings of
answers, which few endpoints take, streamed answers, tools, and log-probabilities.
"""

import asyncio
import json
import os
import random
from collections.abc import AsyncIterator, Iterable, Mapping
from email.utils import parsedate_to_datetime
from itertools import islice
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

import httpx2

from activations.errors import ConfigError, EndpointError
from activations.quiet import first_line
from sae.labels.chat import Message, Reply, Request, about_tokens
from sae.labels.config import ChatModelConfig
from sae.labels.pace import FIRST_WAIT_S, Clock, Pace, WallClock, wait_s
from sae.labels.words import one_line

MAX_BYTES = 1 << 20
MAX_TOKENS = 10_000_000
"""tokens of one request that are believed"""
FIRST_TRIES = 3
"""failures to connect, before anything was ever answered, that make an address a wrong one"""
REFUSALS = 5
"""refusals in a row, before anything was ever answered, that make the settings wrong ones"""
FATAL = {401: "the key", 402: "the account", 403: "the key", 404: "the address or the model"}
GO_ON = "Every answer is kept: run the same command again to go on."


class Answered(NamedTuple):
    """A chat completion."""

    text: str
    tokens_in: int | None
    tokens_out: int | None


class Trouble(NamedTuple):
    """What came in place of one."""

    kind: Literal["limited", "down", "garbled", "absent", "refused", "fatal"]
    said: str
    wait_s: float | None = None
    """what the endpoint asks to wait"""


class Endpoint:
    """A `Chat` over HTTP."""

    def __init__(self, config: ChatModelConfig, clock: Clock | None = None, chance: random.Random | None = None):
        """Raises: ConfigError for an address that is none, or a key that is not there."""
        self._config, self._clock, self._chance = config, clock or WallClock(), chance or random.Random()
        self._url = f"{_checked(config.base_url)}/chat/completions"
        self._key = _key(config.key_env)
        self._pace = Pace(self._clock, config.requests_per_minute, config.tokens_per_minute)
        self._trouble_since: float | None = None
        self._n_answers = self._n_refusals = 0
        self.name = config.model
        self.price_in, self.price_out = config.price_in or 0.0, config.price_out or 0.0
        self.max_answer_tokens = config.max_answer_tokens
        sampling = {"temperature": config.temperature, "max_tokens": config.max_answer_tokens, **config.extra}
        self.settings: Mapping[str, Any] = {key: value for key, value in sampling.items() if value is not None}

    def count(self, messages: tuple[Message, ...]) -> int:
        """Tokens of a prompt, about."""
        return about_tokens(messages)

    async def answers(self, requests: Iterable[Request]) -> AsyncIterator[tuple[Request, Reply]]:
        """Answer requests, `concurrency` of them at a time, in the order in which answers come.

        Raises: EndpointError if the endpoint is not usable, or gave no answer for `give_up_s`.
        """
        waiting, running = iter(requests), set[asyncio.Task[tuple[Request, Reply]]]()
        async with self._client() as client:
            try:
                while True:
                    for request in islice(waiting, self._config.concurrency - len(running)):
                        running.add(asyncio.create_task(self._ask(client, request)))
                    if not running:
                        return
                    done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                    for task in sorted(done, key=lambda task: task.exception() is not None):  # answers first
                        yield task.result()
            finally:
                for task in running:
                    task.cancel()
                await asyncio.gather(*running, return_exceptions=True)

    def _client(self) -> httpx2.AsyncClient:
        headers = {"Accept-Encoding": "identity"}  # a compressed answer could be of any size
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        limits = httpx2.Limits(max_connections=self._config.concurrency)
        return httpx2.AsyncClient(headers=headers, timeout=self._config.timeout_s, limits=limits)

    async def _ask(self, client: httpx2.AsyncClient, request: Request) -> tuple[Request, Reply]:
        """Try until there is an answer, or no use in trying."""
        body = {
            "model": self.name,
            "messages": [message._asdict() for message in request.messages if message.role != "assistant"],
            **self.settings,
        }
        about, failures, tries, lost = self.count(request.messages), 0, 0, 0
        while True:
            await self._pace.turn(about + self.max_answer_tokens)
            outcome, tries = await self._post(client, body), tries + 1
            if isinstance(outcome, Answered):
                self._trouble_since, self._n_answers, self._n_refusals = None, self._n_answers + 1, 0
                tokens_in = outcome.tokens_in if outcome.tokens_in is not None else about
                tokens_out = outcome.tokens_out
                if tokens_out is None:
                    tokens_out = about_tokens((Message("assistant", outcome.text),))
                return request, Reply(outcome.text, lost + tokens_in, tokens_out, tries=tries)
            lost += about if outcome.kind == "garbled" else 0  # which may have been charged
            failures += outcome.kind != "limited"
            self._give_up_if_useless(outcome, failures)
            if outcome.kind == "refused" or failures > self._config.retries:
                is_refused = outcome.kind == "refused"
                return request, Reply(None, lost, 0, outcome.said, is_refused=is_refused, tries=tries)
            seconds = wait_s(tries, self._chance) if outcome.wait_s is None else max(outcome.wait_s, FIRST_WAIT_S)
            if outcome.kind == "limited":
                self._pace.pause(seconds)
            else:
                await self._clock.sleep(seconds)

    async def _post(self, client: httpx2.AsyncClient, body: Mapping[str, Any]) -> Answered | Trouble:
        try:
            async with (
                asyncio.timeout(self._config.timeout_s),  # that of the client is between two bytes
                client.stream("POST", self._url, json=body) as response,
            ):
                content = bytearray()
                async for chunk in response.aiter_raw():
                    content += chunk
                    if len(content) > MAX_BYTES:
                        return Trouble("garbled", f"an answer of more than {MAX_BYTES} bytes")
        except TimeoutError:
            return Trouble("down", f"no answer within {self._config.timeout_s:g} s")
        except (httpx2.HTTPError, httpx2.StreamError, OSError) as error:
            is_late = isinstance(error, httpx2.TimeoutException)
            said = f"no answer within {self._config.timeout_s:g} s" if is_late else first_line(error)
            return Trouble("absent" if isinstance(error, httpx2.ConnectError) else "down", self._clean(said))
        outcome = read_response(response.status_code, response.headers, bytes(content))
        if isinstance(outcome, Answered):
            return outcome._replace(text=self._without_key(outcome.text))
        return outcome._replace(said=self._clean(outcome.said))

    def _give_up_if_useless(self, trouble: Trouble, failures: int) -> None:
        """Raise if no request has a chance any more."""
        now = self._clock.now()
        if self._trouble_since is None:
            self._trouble_since = now
        wrong = "the address, the model and the key"
        self._n_refusals += trouble.kind == "refused"
        if trouble.kind == "fatal":
            raise self._error("an answer", trouble.said, f"Check {wrong}. {GO_ON}")
        if trouble.kind == "refused" and not self._n_answers and self._n_refusals >= REFUSALS:
            fix = f"Check the model and its settings (temperature, max_answer_tokens, extra). {GO_ON}"
            raise self._error("an answer", f"{self._n_refusals} refusals: {trouble.said}", fix)
        if trouble.kind == "absent" and not self._n_answers and failures >= FIRST_TRIES:
            raise self._error("an endpoint that answers", trouble.said, f"Check base_url and the network. {GO_ON}")
        waits = trouble.wait_s or 0.0
        if now + waits - self._trouble_since > self._config.give_up_s:
            got = f"none for {now - self._trouble_since:.0f} s"
            if waits:
                got += f", and is asked to wait {waits:.0f} s more"
            raise self._error("an answer", f"{got} ({trouble.said})", GO_ON)

    def _error(self, expected: str, got: str, fix: str) -> EndpointError:
        return EndpointError(f"{self.name} at {self._url}", expected=expected, got=got, fix=fix)

    def _clean(self, text: str) -> str:
        return one_line(self._without_key(text), 300)

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "[key]") if self._key else text


def read_response(status: int, headers: Mapping[str, str], content: bytes) -> Answered | Trouble:
    """What an endpoint's response is; believes nothing of it."""
    if status == 200:
        return _completion(content)
    said = f"HTTP {status}{_message(content)}"
    if status in FATAL:
        return Trouble("fatal", f"{said} (about {FATAL[status]})")
    if status == 429:
        return Trouble("limited", said, _retry_after(headers))
    if status >= 500 or status in (408, 409, 425):
        return Trouble("down", said, _retry_after(headers))
    return Trouble("refused" if status >= 400 else "fatal", said)


def _completion(content: bytes) -> Answered | Trouble:
    try:
        parsed = json.loads(content.decode())
        choice = parsed["choices"][0]
        message = choice["message"]
        role, text = message.get("role", "assistant"), message.get("content")
        if isinstance(text, list):
            text = "".join(part["text"] for part in text if part.get("type") == "text")
        if text is None:  # spent on thinking, or refused in a field of its own
            text = message.get("refusal") or ""
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        head = content[:80].decode(errors="replace")
        return Trouble("garbled", f"no chat completion ({type(error).__name__}) but {head!r}")
    if role != "assistant" or not isinstance(text, str):
        return Trouble("garbled", f"a message of {role!r} in place of the assistant's text")
    usage = parsed.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    return Answered(_valid(text), _tokens(usage.get("prompt_tokens")), _tokens(usage.get("completion_tokens")))


def _valid(text: str) -> str:
    """The same without lone surrogates, which JSON can escape and no database can hold."""
    return text.encode(errors="replace").decode()


def _tokens(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_TOKENS else None


def _message(content: bytes) -> str:
    """What an error says of itself, if it does."""
    try:
        error = json.loads(content.decode())["error"]
        said = error if isinstance(error, str) else str(error["message"])
    except (ValueError, KeyError, TypeError, RecursionError):
        said = content[:200].decode(errors="replace")
    return f": {said}" if said.strip() else ""


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that Retry-After asks to wait, given as such or as a date."""
    value = headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            at = parsedate_to_datetime(value)
            now = parsedate_to_datetime(headers.get("date", ""))
            seconds = (at - now).total_seconds()
        except (ValueError, TypeError):
            return None
    return seconds if 0 <= seconds < 1e9 else None


def _checked(base_url: str | None) -> str:
    """The address without a slash at its end."""
    try:
        parts = urlsplit(base_url or "")
        is_good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        is_bare = not (parts.username or parts.password or parts.query or parts.fragment)
    except ValueError:
        is_good = is_bare = False
    if base_url and is_good and is_bare:
        return base_url.rstrip("/")
    got = "none" if not base_url else "something else" if not is_good else "one with a name, a key or a query in it"
    raise ConfigError(
        "base_url",
        expected="the address of an endpoint, such as https://host/v1, and nothing secret in it",
        got=got,
        fix="Set base_url, and key_env to the name of the variable that holds the key; or use model=local:SPEC.",
    )


def _key(key_env: str | None) -> str | None:
    if key_env is None:
        return None
    key = os.environ.get(key_env, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        got = "nothing in it" if not key else "characters that no header can hold"
        fix = f"Run export {key_env}=..., or name another variable in key_env."
        raise ConfigError(f"environment variable {key_env}", expected="the endpoint's key", got=got, fix=fix)
    return key
