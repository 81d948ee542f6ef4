"""A conversation of OpenAI's API in the words of chat templates, tools that were called in it included.

The developer's word is the system's; a tool's answer has its name, and those of a message's calls stand in the order of
the calls, since most templates leave out the ids that tell which is whose. Left out: what a template makes of it, and
what it leaves out (`activations.chat`); tools that are offered, which no answer could call (`steer.serving.bodies`).
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from activations.chat import chat_prompt
from activations.errors import ConfigError
from activations.models import LoadedModel
from steer.serving.bodies import Call, Message


def prompt_of(loaded: LoadedModel, messages: Sequence[Message]) -> str:
    """The prompt. Raises: ConfigError for calls that nothing answers, and as `activations.chat.chat_prompt` does."""
    if messages[-1].tool_calls:
        fix = "Send what the tools answered, or leave the calls out."
        raise ConfigError("messages", expected="an answer of each tool", got="a call that comes last", fix=fix)
    return chat_prompt(loaded, turns_of(messages))


def turns_of(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages in the words of chat templates."""
    turns: list[dict[str, Any]] = []
    names: dict[str, str] = {}
    for message in _in_order(messages):
        role = "system" if message.role == "developer" else message.role
        turn: dict[str, Any] = {"role": role, "content": message.text}
        if message.tool_calls:
            names |= {call.id: call.function.name for call in message.tool_calls}
            turn["tool_calls"] = [_called(call) for call in message.tool_calls]
        if message.role == "tool":
            turn["tool_call_id"] = message.tool_call_id
            if name := message.name or names.get(message.tool_call_id):
                turn["name"] = name
        turns.append(turn)
    return turns


def _in_order(messages: Sequence[Message]) -> Iterator[Message]:
    """Messages, with the answers of tools in the order of their calls."""
    place: dict[str, int] = {}
    for are_answers, group in groupby(messages, lambda message: message.role == "tool"):
        found = list(group)
        yield from sorted(found, key=lambda each: place.get(each.tool_call_id, len(place))) if are_answers else found
        place = {call.id: i for i, call in enumerate(found[-1].tool_calls)}


def _called(call: Call) -> dict[str, Any]:
    function = {"name": call.function.name, "arguments": call.function.arguments or "{}"}
    return {"id": call.id, "type": "function", "function": function}
