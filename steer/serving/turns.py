"""A conversation as the model's chat template writes it, tools that were called in it included.

1. Where a tool was called, or answers, `prompt_of` asks the template for a conversation of marks, and looks which of
them it writes: some templates leave out what they do not know, and the model would read another conversation than the
client sent. Such a conversation is refused, and so is one that the template itself refuses. 2. `turns_of` puts messages
into the words of templates: a tool's answer has its name; arguments are objects, or texts where templates want those.

Left out: tools that are offered, which no answer could call (`steer.serving.bodies`).
"""

from collections.abc import Callable, Sequence
from typing import Any

from activations.errors import ConfigError
from activations.models import LoadedModel, apply_template, chat_prompt
from steer.serving.bodies import Call, Function, Message

NAME, KEY, VALUE, RESULT = "qfunctionq", "qargumentq", "qvalueq", "qresultq"
ID = "q12345678"
"""nine letters and digits, which is what templates of Mistral take"""
Form = Callable[[Function], Any]
FORMS: tuple[Form, ...] = (Function.read, lambda function: function.arguments or "{}")
"""of the arguments of a call: most templates want objects, some (those of DeepSeek) a text"""


def prompt_of(loaded: LoadedModel, messages: Sequence[Message]) -> str:
    """The prompt. Raises: ConfigError where the chat template does not take the calls of tools."""
    calls, results = any(each.tool_calls for each in messages), any(each.role == "tool" for each in messages)
    has_template = loaded.tokenizer.chat_template is not None
    if not calls and not (results and has_template):
        return chat_prompt(loaded, turns_of(messages))  # which without a template writes whoever speaks
    if messages[-1].tool_calls:
        fix = "Send what the tools answered, or leave the calls out."
        raise ConfigError("messages", expected="an answer of each tool", got="a call that comes last", fix=fix)
    return _written(loaded, turns_of(messages, _form(loaded, calls, results)))


def turns_of(messages: Sequence[Message], form: Form = Function.read) -> list[dict[str, Any]]:
    """Messages in the words of chat templates; the developer's word is the system's.

    Raises: ConfigError for arguments that are no object of JSON.
    """
    turns: list[dict[str, Any]] = []
    names: dict[str, str] = {}
    for message in messages:
        role = "system" if message.role == "developer" else message.role
        turn: dict[str, Any] = {"role": role, "content": message.text}
        if message.tool_calls:
            names |= {call.id: call.function.name for call in message.tool_calls}
            turn["tool_calls"] = [_called(call, form) for call in message.tool_calls]
        if message.role == "tool":
            turn["tool_call_id"] = message.tool_call_id
            if name := message.name or names.get(message.tool_call_id):
                turn["name"] = name
        turns.append(turn)
    return turns


def _called(call: Call, form: Form) -> dict[str, Any]:
    function = {"name": call.function.name, "arguments": form(call.function)}
    return {"id": call.id, "type": "function", "function": function}


def _form(loaded: LoadedModel, calls: bool, results: bool) -> Form:
    """In which the template writes all of a call, and of a tool's answer. Raises: ConfigError if in none."""
    call = Call(id=ID, function=Function(name=NAME, arguments=f'{{"{KEY}": "{VALUE}"}}'))
    asks = [Message(role="user", content="a")]
    asks += [Message(role="assistant", tool_calls=[call])] if calls else []
    asks += [Message(role="tool", content=RESULT, tool_call_id=ID, name=NAME)] if results else asks[:1]
    marks = [*([NAME, KEY, VALUE] if calls else []), *([RESULT] if results else [])]
    has_template = loaded.tokenizer.chat_template is not None
    got = "one that leaves them out" if has_template else "one without a chat template"
    for form in FORMS if has_template else ():
        try:
            written = _written(loaded, turns_of(asks, form))
        except ConfigError as error:
            got = error.got
            continue
        if all(mark in written for mark in marks):
            return form
    expected, fix = "a model whose chat template writes calls of tools and their answers", "Leave them out."
    raise ConfigError("messages with tools", expected=expected, got=got, fix=fix)


def _written(loaded: LoadedModel, turns: list[dict[str, Any]]) -> str:
    from jinja2 import TemplateError

    try:
        return apply_template(loaded.tokenizer, turns)
    except (TemplateError, ValueError, TypeError, RecursionError) as error:
        got, fix = " ".join(str(error).split())[:300], "Change the conversation as the chat template says."
        raise ConfigError("messages", expected="what the chat template takes", got=got, fix=fix) from error
