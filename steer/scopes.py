"""Token scopes: which tokens of a sequence are steered, whatever they say to the model's inside.

A scope is written in words, all of which have to hold: `generated`, `assistant no-tool-calls`, `after:20 before:60`.

| word | tokens |
|---|---|
| `all` | every token but the first of the sequence, which is an attention sink and never steered |
| `prompt`, `generated` | those of the prompt, those behind it. The last prompt token chooses the first generated one |
| `after:N`, `before:N` | those whose index is at least N, below N; the first attended token has index 0 |
| `system`, `user`, `assistant`, `tool` | what is written in that role, without the markers around it |
| `thinking` | what is written between the model's thinking markers, without them |
| `final` | what the assistant writes outside of them |
| `no-tool-calls` | all but tool calls, with the markers around them |

Flow: 1. a scope names ranges of indices and latches; 2. a `Latch` is the tokens that open and close it, found in the
chat template of the model's tokenizer; 3. `run_latches` goes over the tokens of one forward pass, from the state that
the pass before left, so that a sequence may arrive in chunks of any length.

Indices count attended tokens, so padding changes nothing. Left out: markers that are neither a token of their own nor
one with a word behind it, such as a role; tool calls and answers that are plain text.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from activations.chat import THOUGHTS, write
from activations.errors import ConfigError, UnknownNameError

ROLES = ("system", "user", "assistant", "tool")
PARTS = ("prompt", "generated")
PHASES = ("thinking", "final")
SPARING = "no-tool-calls"
NO_END = 2**62
"""an index behind every token"""
NONE = -2
"""no token's id: in front of the first one"""


@dataclass(frozen=True)
class Scope:
    """Which tokens are steered; `Scope.parse` reads the words of the module docstring."""

    part: str | None = None
    """`prompt`, `generated`, or both"""
    after: int = 1
    """lowest index; the first token is never steered"""
    before: int | None = None
    """index behind the highest; none: no end"""
    role: str | None = None
    """one of ROLES, or any"""
    phase: str | None = None
    """`thinking`, `final`, or any"""
    spares_tool_calls: bool = False

    @classmethod
    def parse(cls, text: str) -> "Scope":
        """Read it from words.

        Raises: UnknownNameError for a word that is none of them, ConfigError for two of a kind.

        >>> Scope.parse("assistant after:5 no-tool-calls")
        Scope(part=None, after=5, before=None, role='assistant', phase=None, spares_tool_calls=True)
        """
        fields: dict[str, Any] = {}
        for word in text.split() or [""]:
            name, value = _read_word(word, text)
            if name in fields:
                fix = "Leave one out."
                raise ConfigError(f"scope '{text}'", expected=f"one word that says {name}", got="two", fix=fix)
            fields |= {name: value} if name != "all" else {}
        return cls(**fields)

    def __str__(self) -> str:
        """The words."""
        words = [self.part, self.role, self.phase, SPARING if self.spares_tool_calls else None]
        words += [f"after:{self.after}" if self.after != 1 else None]
        words += [f"before:{self.before}" if self.before is not None else None]
        return " ".join(word for word in words if word) or "all"

    @property
    def follows_tokens(self) -> bool:
        """Whether it depends on what is written, and not on indices alone."""
        return self.role is not None or self.phase is not None or self.spares_tool_calls

    def bounds(self, n_prompt: int | None) -> tuple[int, int]:
        """Lowest index, and the index behind the highest one, of a sequence with so many prompt tokens.

        Raises: ConfigError if the scope needs to know the prompt's length and it is not given.
        """
        low, high = max(1, self.after), NO_END if self.before is None else self.before
        if self.part is None:
            return low, high
        if n_prompt is None:
            raise ConfigError(
                f"scope '{self}'",
                expected="prompt_lengths, the number of prompt tokens of each sequence",
                got="none",
                fix="Give them to `steering`, or generate with steer.generate.",
            )
        return (low, min(high, n_prompt)) if self.part == "prompt" else (max(low, n_prompt), high)


EVERYWHERE = Scope()


def _read_word(word: str, text: str) -> tuple[str, Any]:
    if match := re.fullmatch(r"(after|before):(\d+)", word):
        return match[1], int(match[2])
    for name, words in (("part", PARTS), ("role", ROLES), ("phase", PHASES), ("all", ("all",))):
        if word in words:
            return name, word
    if word == SPARING:
        return "spares_tool_calls", True
    known = ["all", *PARTS, "after:N", "before:N", *ROLES, *PHASES, SPARING]
    raise UnknownNameError(
        f"scope '{text}'", expected=f"words among {', '.join(known)}", got=f"'{word}'", fix="Correct it."
    )


class Event(NamedTuple):
    """Tokens in a row, and what the last of them does to a latch."""

    tokens: tuple[int, ...]
    effect: int
    """1 opens the latch, -1 closes it, 0 leaves it"""
    is_marker: bool = True
    """whether it is a marker of what the latch follows; such as the end of a turn closes more than that"""


@dataclass(frozen=True)
class Latch:
    """Something that tokens open and close."""

    name: str
    events: frozenset[Event]
    with_markers: bool
    """whether the tokens that open and close it belong to it, or no marker at all does"""


# --- markers of chat templates ---------------------------------------------------------------------------------------


class ChatFormat(NamedTuple):
    """How a chat template marks turns."""

    start: str | None
    """token in front of the word of a role; none: each role has a token of its own"""
    roles: dict[str, str]
    """role -> its word, or its token, with words behind it or not"""
    ends: tuple[str, ...]
    """tokens that end a turn"""
    frames: tuple[str, ...] = ()
    """other tokens that are no content"""
    returns: tuple[str, ...] = ()
    """tokens at which the assistant goes on, behind what a tool answered; the first that is in the template"""


_WORDS = {"system": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
CHAT_FORMATS: dict[str, ChatFormat] = {
    "chatml": ChatFormat("<|im_start|>", _WORDS, ("<|im_end|>",), ("<|im_sep|>",)),
    "llama3": ChatFormat(
        "<|start_header_id|>", _WORDS | {"tool": "ipython"}, ("<|eot_id|>", "<|eom_id|>"), ("<|end_header_id|>",)
    ),
    "llama4": ChatFormat("<|header_start|>", _WORDS | {"tool": "ipython"}, ("<|eot|>", "<|eom|>"), ("<|header_end|>",)),
    "gemma": ChatFormat("<start_of_turn>", {"user": "user", "assistant": "model"}, ("<end_of_turn>",)),
    "gemma4": ChatFormat(
        "<|turn>",
        {"system": "system", "user": "user", "assistant": "model"},
        ("<turn|>", "<|tool_response>"),
        returns=("<tool_response|>",),
    ),
    "granite": ChatFormat(
        "<|start_of_role|>", _WORDS | {"tool": "tool_response"}, ("<|end_of_text|>",), ("<|end_of_role|>",)
    ),
    "seed": ChatFormat("<seed:bos>", _WORDS, ("<seed:eos>",)),
    "minimax": ChatFormat("]~b]", _WORDS | {"assistant": "ai"}, ("[e~[",)),
    "harmony": ChatFormat(
        "<|start|>",
        {"system": "developer", "user": "user", "assistant": "assistant"},
        ("<|end|>", "<|return|>", "<|call|>"),
        ("<|channel|>", "<|message|>", "<|constrain|>"),
    ),
    "command": ChatFormat(
        "<|START_OF_TURN_TOKEN|>",
        {"system": "<|SYSTEM_TOKEN|>", "user": "<|USER_TOKEN|>", "assistant": "<|CHATBOT_TOKEN|>"},
        ("<|END_OF_TURN_TOKEN|>",),
        ("<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_TEXT|>", "<|END_TEXT|>"),
    ),
    "deepseek": ChatFormat(
        None,
        {"user": "<｜User｜>", "assistant": "<｜Assistant｜>", "tool": "<｜tool▁output▁begin｜>"},
        ("<｜end▁of▁sentence｜>", "<｜tool▁output▁end｜>"),
        ("<｜tool▁outputs▁begin｜>",),
        ("<｜tool▁outputs▁end｜>", "<｜tool▁output▁end｜>"),
    ),
    "kimi": ChatFormat(
        None,
        {
            "system": "<|im_system|>system<|im_middle|>",
            "user": "<|im_user|>user<|im_middle|>",
            "assistant": "<|im_assistant|>assistant<|im_middle|>",
            "tool": "<|im_system|>tool<|im_middle|>",
        },
        ("<|im_end|>",),
    ),
    "phi": ChatFormat(
        None,
        {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>", "tool": "<|observation|>"},
        ("<|end|>", "<|endoftext|>"),
    ),
    "mistral": ChatFormat(
        None,
        {"system": "[SYSTEM_PROMPT]", "user": "[INST]", "assistant": "[/INST]", "tool": "[TOOL_RESULTS]"},
        ("[/SYSTEM_PROMPT]", "</s>", "[/TOOL_RESULTS]"),
        returns=("[/TOOL_RESULTS]",),
    ),
}
"""The first whose markers are in a chat template is its format."""

THINKING: tuple[tuple[str, str], ...] = (
    *THOUGHTS,
    ("<|channel|>analysis", "<|end|>"),
    ("<|channel>thought", "<channel|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
)
TOOL_CALLS: tuple[tuple[str, str], ...] = (
    ("<tool_call>", "</tool_call>"),
    ("<tool_calls>", "</tool_calls>"),
    ("<|tool_call_start|>", "<|tool_call_end|>"),
    ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
    ("<|python_tag|>", "<|eom_id|>"),
    ("[TOOL_CALLS]", "</s>"),
    ("<|channel|>commentary", "<|call|>"),
    ("<|tool_call>", "<tool_call|>"),
    ("<seed:tool_call>", "</seed:tool_call>"),
    ("<minimax:tool_call>", "</minimax:tool_call>"),
    ("<|START_ACTION|>", "<|END_ACTION|>"),
    ("｜DSML｜tool_calls", "<｜end▁of▁sentence｜>"),
    ("｜DSML｜function_calls", "<｜end▁of▁sentence｜>"),
)
"""What opens and closes them; the end of a turn, and the start of another, close them too."""
TOOL_ANSWERS: tuple[tuple[str, str], ...] = (
    ("<tool_response>", "</tool_response>"),
    ("<|START_TOOL_RESULT|>", "<|END_TOOL_RESULT|>"),
)
"""What opens and closes answers of tools that stand in a turn of the user, or of another role."""


def latches_of(scope: Scope, tokenizer: Any) -> list[tuple[Latch, bool]]:
    """The latches of a scope, and whether each has to be open or shut.

    Args:
      tokenizer: a Hugging Face tokenizer; not asked for anything unless the scope follows tokens.
    Raises: ConfigError if its chat template has no such markers, or has some that are no single tokens.
    """
    if not scope.follows_tokens:
        return []
    markers = _Markers(tokenizer, f"scope '{scope}'")
    found = []
    if scope.role is not None:
        found.append((markers.role(scope.role), True))
    if scope.phase == "thinking":
        found.append((markers.span("thinking", THINKING, with_markers=False), True))
    if scope.phase == "final":
        found.append((markers.role("assistant"), True))
        if markers.has(THINKING):
            found.append((markers.span("thinking", THINKING, with_markers=True), False))
    if scope.spares_tool_calls:
        found.append((markers.span("tool call", TOOL_CALLS, with_markers=True), False))
    return list(dict.fromkeys(found))


class _Markers:
    """The markers of one tokenizer's chat template."""

    def __init__(self, tokenizer: Any, where: str):
        self._tokenizer, self._where = tokenizer, where
        template = tokenizer.chat_template
        self._template = "\n".join(template.values()) if isinstance(template, dict) else template or ""
        formats = (form for form in CHAT_FORMATS.values() if self._has_token(form.start or form.roles["assistant"]))
        self._format = next(formats, None)

    def role(self, role: str) -> Latch:
        form = self._format or ChatFormat(None, {}, ())
        answers = [pair for pair in TOOL_ANSWERS if self._holds(pair[0])][:1]
        opens = {self._opens(form, role)} if self._has_role(form, role) else set[tuple[int, ...]]()
        if role == "tool":
            opens = {tokens for tokens in opens if self._is_written(tokens)}
            opens |= {*self._known(start for start, _ in answers)}
        if not opens:
            raise self._missing(f"markers of the role {role}")
        if role == "assistant":
            opens |= {*self._known([marker for marker in form.returns if marker in self._template][:1])}
        shut = {*self._known((*form.ends, *(pair[role == "tool"] for pair in answers)))} | self._starts(form)
        events = {Event(tokens, -1) for tokens in shut - opens} | {Event(tokens, 1) for tokens in opens}
        frames = {Event(tokens, 0) for tokens in self._known(form.frames)}
        return Latch(role, frozenset(events | frames), with_markers=False)

    def _has_role(self, form: ChatFormat, role: str) -> bool:
        return role in form.roles and (form.start is not None or self._has_token(form.roles[role]))

    def _opens(self, form: ChatFormat, role: str) -> tuple[int, ...]:
        return self._behind(*((form.start, form.roles[role]) if form.start else _split(form.roles[role])))

    def _starts(self, form: ChatFormat) -> set[tuple[int, ...]]:
        """The tokens with which a turn starts, whoever's."""
        if form.start is not None:
            return {self._ids(form.start)}
        return {self._opens(form, role) for role, marker in form.roles.items() if self._has_token(marker)}

    def _has_token(self, marker: str) -> bool:
        return _split(marker)[0] in self._template

    def _is_written(self, opens: tuple[int, ...]) -> bool:
        """Whether a tool's answer stands behind these tokens: many templates have it said by the user."""
        call = {"id": "q12345678", "type": "function", "function": {"name": "q", "arguments": "{}"}}
        answer = {"role": "tool", "content": "q", "tool_call_id": call["id"], "name": "q"}
        for calls in ([{"role": "assistant", "content": "", "tool_calls": [call]}], []):
            try:
                written = write(self._tokenizer, [{"role": "user", "content": "q"}, *calls, answer])
            except ConfigError:
                continue
            ids = self._tokenizer.encode(written, add_special_tokens=False)
            return any(tuple(ids[i : i + len(opens)]) == opens for i in range(len(ids)))
        return False

    def has(self, pairs: Sequence[tuple[str, str]]) -> bool:
        return any(self._holds(start) for start, _ in pairs)

    def span(self, name: str, pairs: Sequence[tuple[str, str]], *, with_markers: bool) -> Latch:
        present = [pair for pair in pairs if self._holds(pair[0])]
        if not present:
            raise self._missing(f"{name} markers")
        start, end = present[0]
        opens, shuts = self._behind(*_split(start)), self._ids(end)
        form = self._format
        others = {*self._known(form.ends), *self._starts(form)} if form else set[tuple[int, ...]]()
        events = {Event(tokens, -1, is_marker=False) for tokens in others} | {Event(opens, 1)}
        if shuts not in others:
            events.add(Event(shuts, -1))
        return Latch(name, frozenset(events), with_markers)

    def _holds(self, marker: str) -> bool:
        """Whether the template speaks of it; a word behind a token may be put in by the template's logic."""
        return all(part in self._template for part in _split(marker))

    def _known(self, markers: Iterable[str]) -> list[tuple[int, ...]]:
        """Those that are tokens: the end of a turn has other names in other versions of a format."""
        ids = [tuple(self._tokenizer.encode(marker, add_special_tokens=False)) for marker in markers]
        return [found for found in ids if len(found) == 1]

    def _behind(self, token: str, word: str) -> tuple[int, ...]:
        """A token together with the word behind it, if there is one."""
        return self._ids(word or token, behind=token if word else "")

    def _ids(self, marker: str, behind: str = "") -> tuple[int, ...]:
        """The token of a marker, or those of a word together with the one token that it stands behind."""
        ids = self._tokenizer.encode(behind + marker, add_special_tokens=False)
        alone = self._tokenizer.encode(behind or marker, add_special_tokens=False)
        if len(alone) != 1 or ids[:1] != alone:
            raise ConfigError(
                self._where,
                expected=f"'{behind or marker}' to be one token of this model",
                got=f"{len(alone)}, so that it cannot be told from text",
                fix="Use another scope.",
            )
        return tuple(ids)

    def _missing(self, what: str) -> ConfigError:
        got = "others" if self._template else "no chat template"
        return ConfigError(
            self._where, expected=f"{what} in the model's chat template", got=got, fix="Use another scope."
        )


def _split(marker: str) -> tuple[str, str]:
    """A marker's token and what stands behind it, if anything does."""
    found = re.fullmatch(r"(<[^<>]*>|｜[^｜]*｜)(.*)", marker)
    return (found[1], found[2]) if found else (marker, "")


# --- latches over tokens ---------------------------------------------------------------------------------------------


class LatchTable(NamedTuple):
    """Latches as tensors; one row an event."""

    tokens: Int[Tensor, "event back"]
    """the last token of each event, the one before it, and so on; -1 where it does not matter"""
    effect: Int[Tensor, "event latch"]
    """1, -1 or 0"""
    marks: Bool[Tensor, "event latch"]
    """whether the event is a marker of the latch"""
    with_markers: Bool[Tensor, " latch"]


def latch_table(latches: Sequence[Latch]) -> LatchTable:
    """The table of some latches, in this order."""
    keys = sorted({event.tokens for latch in latches for event in latch.events})
    effect = torch.zeros(len(keys), len(latches), dtype=torch.long)
    marks = torch.zeros(len(keys), len(latches), dtype=torch.bool)
    for i, latch in enumerate(latches):
        for event in latch.events:
            row = keys.index(event.tokens)
            effect[row, i], marks[row, i] = event.effect, event.is_marker
    longest = max(map(len, keys))
    tokens = torch.tensor([[*reversed(key), *[-1] * (longest - len(key))] for key in keys])
    with_markers = torch.tensor([latch.with_markers for latch in latches], dtype=torch.bool)
    return LatchTable(tokens, effect, marks, with_markers)


class LatchRun(NamedTuple):
    """Latches over the tokens of one forward pass."""

    inside: Bool[Tensor, "batch pos latch"]
    """whether a token belongs to it"""
    states: Bool[Tensor, "batch latch"]
    """which are open behind the last token"""
    last: Int[Tensor, "batch back"]
    """the last tokens, in their order: as many as the longest event has"""


def run_latches(
    table: LatchTable,
    ids: Int[Tensor, "batch pos"],
    index: Int[Tensor, "batch pos"],
    states: Bool[Tensor, "batch latch"],
    last: Int[Tensor, "batch back"],
) -> LatchRun:
    """Go on from `states` and `last`; a sequence that starts in this pass starts with all of them shut.

    Args:
      index: of each token in its sequence, -1 for padding.
    """
    real = index >= 0
    n, length = last.shape[1], ids.shape[1]
    row = torch.cat([last, ids], dim=1)
    back = [torch.where(index >= k, row[:, n - k : n - k + length], NONE) for k in range(n)]
    matches = (torch.stack(back, dim=-1)[:, :, None] == table.tokens) | (table.tokens < 0)
    hits = matches.all(-1) & real[..., None]
    is_marker = (hits[..., None] & table.marks).any(2)
    effect = (hits[..., None] * table.effect).sum(2)
    effect = torch.where((index == 0)[..., None] & (effect == 0), -1, effect)
    opened = _latest(effect, states)
    inside = torch.where(table.with_markers, opened | is_marker, opened & ~is_marker)
    end = torch.where(real, torch.arange(1, length + 1, device=ids.device), 0).amax(dim=1, keepdim=True)
    latest = row.gather(1, end + torch.arange(n, device=ids.device))
    return LatchRun(inside & real[..., None], opened[:, -1], latest)


def _latest(effect: Int[Tensor, "batch pos latch"], states: Bool[Tensor, "batch latch"]) -> Tensor:
    """Whether each latch is open after each token: what the latest effect on it was, or else its state before."""
    if effect.shape[1] == 1:
        return torch.where(effect == 0, states[:, None], effect > 0)
    columns = torch.arange(effect.shape[1], device=effect.device)[None, :, None]
    at = torch.where(effect == 0, -1, columns).cummax(dim=1).values
    return torch.where(at < 0, states[:, None], effect.gather(1, at.clamp(min=0)) > 0)
