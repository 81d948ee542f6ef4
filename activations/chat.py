"""Messages as the one prompt that a model was taught to read, or a refusal.

1. The chat template writes them. Templates differ in what they take, so there are several ways to give it the same
(`_WAYS`): the system message by itself or at the head of the first turn, the ids of calls as they are or short, their
arguments as an object or as text. 2. What a template does not know it leaves out without a word, and the model would
read another conversation than the one meant. So each way is tried with marks in place of all that is said (`_marked`):
the first in which the template writes every mark is taken, and if there is none the conversation is refused. 3. An
answer that thinks and is to go on stands behind the prompt for an answer (`_continued`). 4. A model without a template
gets plain lines.

What a template does to a text is its own affair: many strip it, or leave thoughts of earlier answers out. Left out:
tools that are offered, and turns of another kind than text.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import copy
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

from activations.errors import ConfigError
from activations.models import LoadedModel
from activations.tokens import bos_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast
else:  # Importing it takes 3 seconds.
    PreTrainedTokenizerFast = Any

LONGEST_KEPT = 10_000
"""letters of marked turns for which is kept what became of them, since clients may send any number of forms"""
THOUGHTS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"))
"""what stands around a thought, in the text of an answer"""
Turn = Mapping[str, Any]
"""{"role", "content"}; {"tool_calls"} of the assistant, as OpenAI's API has them; {"tool_call_id", "name"} of a tool"""


class _Way(NamedTuple):
    """How turns are given to a template."""

    folds_system: bool
    """whether leading system messages stand at the head of the first turn"""
    shortens_ids: bool
    """whether ids of calls are nine letters and digits, and not those of the client"""
    reads_arguments: bool
    """whether the arguments of a call are an object, and not text"""

    def turns(self, turns: Sequence[Turn]) -> list[dict[str, Any]]:
        given, ids = [dict(turn) for turn in turns], dict[str, str]()
        while self.folds_system and len(given) > 1 and given[0]["role"] == "system":
            system, *given = given
            given[0]["content"] = f"{system['content']}\n\n{given[0]['content']}".strip()
        for turn in given:
            if calls := _calls(turn):
                turn["tool_calls"] = [self._call(call, ids) for call in calls]
            if self.shortens_ids and "tool_call_id" in turn:
                turn["tool_call_id"] = _mark("i", ids, turn["tool_call_id"])
        return given

    def _call(self, call: Any, ids: dict[str, str]) -> dict[str, Any]:
        function = call["function"]
        return {
            **call,
            "id": _mark("i", ids, call["id"]) if self.shortens_ids else call["id"],
            "function": {**function, "arguments": _object(call)} if self.reads_arguments else function,
        }


_WAYS = tuple(_Way(*way) for way in product((False, True), (False, True), (True, False)))
"""that first which most templates take; DeepSeek's want texts, Mistral's their own ids"""
_TOLD = _Way(folds_system=True, shortens_ids=True, reads_arguments=True)
"""that of which is told what is wrong where all are"""


def chat_prompt(loaded: LoadedModel, messages: str | Sequence[Turn], system: str | None = None) -> str:
    """Messages as one prompt that ends where the model is to write.

    Tokenise it with `add_special_tokens=False`: it holds every special token it needs.

    Args:
      messages: what the user says, or turns. A last one of the assistant is left open, for the model to go on with.
      system: the system message. None leaves it to the chat template, and some write their own (SmolLM2: "You are a
        helpful AI assistant named SmolLM"); "" asks for an empty one, which keeps such a default out.
    Raises: ConfigError where the chat template refuses the messages, or leaves some of them out.
    """
    turns: list[Turn] = [{"role": "user", "content": messages}] if isinstance(messages, str) else [*messages]
    if system is not None and not (turns and turns[0]["role"] == "system"):
        turns = [{"role": "system", "content": system}, *turns]
    if loaded.tokenizer.chat_template is None:
        return _plain_prompt(loaded.tokenizer, turns)
    return write(loaded.tokenizer, turns)


def write(tokenizer: PreTrainedTokenizerFast, turns: Sequence[Turn]) -> str:
    """What the chat template makes of turns. Raises: as `chat_prompt` does."""
    marked = json.dumps(_marked(turns))
    found = (_way if len(marked) <= LONGEST_KEPT else _way.__wrapped__)(tokenizer, marked)
    if isinstance(found, ConfigError):
        raise copy(found)  # which was raised nowhere, and so holds on to nothing
    return _written(tokenizer, found.turns(turns))


@lru_cache(256)
def _way(tokenizer: PreTrainedTokenizerFast, marked: str) -> _Way | ConfigError:
    """The first way in which a template writes all marks of turns (JSON), or what is wrong with it."""
    turns, errors = json.loads(marked), dict[_Way, ConfigError]()
    for way in _WAYS:
        try:
            _check(turns, _written(tokenizer, way.turns(turns)))
        except ConfigError as error:
            errors[way] = copy(error)
        else:
            return way
    return errors[_TOLD]


def _marked(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """The same turns, with marks for what is said, called and answered."""
    ids, names, marked = dict[str, str](), dict[str, str](), []
    for i, turn in enumerate(turns):
        own: dict[str, Any] = {"role": turn["role"], "content": f"q{i}textq" if turn["content"] else ""}
        if "tool_call_id" in turn:
            own["tool_call_id"] = _mark_id(ids, turn["tool_call_id"])
        if "name" in turn:
            own["name"] = _mark("n", names, turn["name"])
        if calls := _calls(turn):
            own["tool_calls"] = [
                {
                    "id": _mark_id(ids, call["id"]),
                    "type": "function",
                    "function": {
                        "name": _mark("n", names, call["function"]["name"]),
                        "arguments": json.dumps({f"q{i}key{j}q": f"q{i}value{j}q"} if _object(call) else {}),
                    },
                }
                for j, call in enumerate(calls)
            ]
        marked.append(own)
    return marked


def _mark(kind: str, marks: dict[str, str], meant: str) -> str:
    """Always the same for the same; nine letters and digits, which is what templates of Mistral take for an id."""
    return marks.setdefault(meant, f"{kind}{len(marks):07}q")


def _mark_id(marks: dict[str, str], meant: str) -> str:
    """As long as what is meant, since some templates look at that."""
    return marks.setdefault(meant, str(len(marks)).rjust(len(meant), "i"))


def _check(turns: Sequence[Turn], written: str) -> None:
    """Raises: ConfigError unless all marks of the turns are in what was written."""
    expected, fix, written = "a chat template that writes it", "Leave it out.", written.lower()
    for i, turn in enumerate(turns):
        if turn["content"] not in written:
            beside = " beside its calls" if _calls(turn) else ""
            got = f"one that leaves out what the {turn['role']} says{beside}"
            raise ConfigError(f"messages[{i}]", expected=expected, got=got, fix=fix)
    names = Counter(call["function"]["name"] for turn in turns for call in _calls(turn))
    for i, turn in enumerate(turns):
        for call in _calls(turn):
            name, arguments = call["function"]["name"], _object(call)
            marks = [mark for pair in arguments.items() for mark in pair]
            is_python = any(f"'{key}'" in written for key in arguments)  # a dict as Python shows it, and no JSON
            if written.count(name) < names[name] or any(mark not in written for mark in marks) or is_python:
                got = "one that leaves out calls of tools, or all but one, or their arguments"
                raise ConfigError(f"messages[{i}].tool_calls", expected=expected, got=got, fix=fix)


def _calls(turn: Turn) -> Sequence[Any]:
    return turn.get("tool_calls", ())


def _is_open(turns: Sequence[Turn]) -> bool:
    """Whether the last turn is an answer that is to go on."""
    return bool(turns) and turns[-1]["role"] == "assistant"


def _object(call: Any) -> dict[str, Any]:
    """The arguments of a call. Raises: ConfigError if they are no object of JSON."""
    name, arguments = call["function"]["name"], call["function"]["arguments"]
    try:
        found = json.loads(arguments)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        where, got = f"arguments of {name[:100]}", repr(arguments[:100])
        raise ConfigError(where, expected="an object of JSON", got=got, fix="Correct them.")
    return found


def _written(tokenizer: PreTrainedTokenizerFast, turns: list[dict[str, Any]]) -> str:
    from jinja2 import TemplateError

    is_open = _is_open(turns)
    try:
        if is_open and _MARKER.search(str(tokenizer.chat_template)) and _THOUGHT.search(turns[-1]["content"]):
            return _continued(tokenizer, turns)
        return str(
            tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=not is_open, continue_final_message=is_open
            )
        )
    except (TemplateError, ValueError, TypeError, RecursionError) as error:
        got, fix = " ".join(str(error).split())[:300].rstrip("."), "Change the conversation as the chat template says."
        raise ConfigError("messages", expected="what the chat template takes", got=got, fix=fix) from error


_START, _END = ("|".join(map(re.escape, markers)) for markers in zip(*THOUGHTS, strict=True))
_MARKER = re.compile(f"{_START}|{_END}")
_THOUGHT = re.compile(rf"^\s*({_START})|{_END}")
"""in an answer that thinks: what it begins with, or else, where the prompt began the thought, what ends it"""
_BEGUN = re.compile(rf"(({_START})\s*)?(({_END})\s*)?$")
"""a thought that a prompt ends with"""


def _continued(tokenizer: PreTrainedTokenizerFast, turns: list[dict[str, Any]]) -> str:
    """The prompt for the last turn, and that as the model wrote it: templates leave its thought out, or add another."""
    *before, answer = turns
    asked = str(tokenizer.apply_chat_template(before, tokenize=False, add_generation_prompt=True))
    starts = re.match(rf"\s*({_START})", answer["content"])
    return (_BEGUN.sub("", asked) if starts else asked) + answer["content"]


def _plain_prompt(tokenizer: PreTrainedTokenizerFast, turns: Sequence[Turn]) -> str:
    for i, turn in enumerate(turns):
        if _calls(turn):
            expected, got = "a model whose chat template writes calls of tools", "one without a chat template"
            raise ConfigError(f"messages[{i}].tool_calls", expected=expected, got=got, fix="Leave them out.")
    bos = str(tokenizer.decode(bos_ids(tokenizer)))
    lines = [f"{turn['role'].capitalize()}: {turn['content']}" for turn in turns if turn["content"]]
    return bos + "\n\n".join(lines if _is_open(turns) else [*lines, "Assistant:"])
