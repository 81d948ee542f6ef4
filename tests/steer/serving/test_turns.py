"""The prompt of a conversation in which tools were called is what the chat template writes of it, or there is none."""

from typing import Any

import pytest

from activations.errors import ConfigError
from activations.generate import generate
from activations.models import LoadedModel
from steer.serving.bodies import ChatRequest
from steer.serving.config import ServeConfig
from steer.serving.keys import Keys
from steer.serving.turns import prompt_of
from tests.activations.templates import with_template
from tests.steer.serving.conftest import answering

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls %}<call {{ c.function.name }}>{{ c.function.arguments | tojson }}</call>{% endfor %}"
    "{% if m.role == 'tool' %} of {{ m.name }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OF_TEXTS = TEMPLATE.replace("{{ c.function.arguments | tojson }}", "{{ '' + c.function.arguments }}")
WITHOUT_CALLS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "tide", "arguments": '{"at": "the \\"mill\\"", "n":1}'},
}
MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": "How high?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "2 m"}]},
]
WRITTEN = (
    "<|im_start|>user\nHow high?<|im_end|>\n"
    '<|im_start|>assistant\n<call tide>{"at": "the \\"mill\\"", "n": 1}</call><|im_end|>\n'
    "<|im_start|>tool\n2 m of tide<|im_end|>\n<|im_start|>assistant\n"
)


def prompt(loaded: LoadedModel, messages: list[dict[str, Any]]) -> str:
    return prompt_of(loaded, ChatRequest.model_validate({"model": "tiny", "messages": messages}).messages)


def test_a_template_that_knows_tools_writes_what_was_called_and_answered(served: LoadedModel) -> None:
    assert prompt(with_template(served, TEMPLATE), MESSAGES) == WRITTEN
    as_sent = WRITTEN.replace('"n": 1', '"n":1')
    assert prompt(with_template(served, OF_TEXTS), MESSAGES) == as_sent
    assert prompt(with_template(served, TEMPLATE), [MESSAGES[0], MESSAGES[2]]).endswith(
        "tool\n2 m of <|im_end|>\n<|im_start|>assistant\n"
    )


def calling(arguments: str) -> list[dict[str, Any]]:
    call = {**CALL, "function": {"name": "tide", "arguments": arguments}}
    return [MESSAGES[0], {**MESSAGES[1], "tool_calls": [call]}, MESSAGES[2]]


NO_TOOLS = TEMPLATE.replace("m.role == 'tool'", "m.role == 'tool' and raise_exception('no tools here')")
OF_THE_USER = TEMPLATE.replace("{{ m.content }}", "{{ m.content if m.role == 'user' }}")


@pytest.mark.parametrize(("template", "messages", "says"), [
    (WITHOUT_CALLS, MESSAGES, "got one that leaves out calls of tools"), (NO_TOOLS, MESSAGES, "got no tools here"),
    (TEMPLATE.replace("| tojson", "['at']"), MESSAGES, "leaves out calls"),
    (OF_THE_USER, MESSAGES, "messages.2.: .*leaves out what the tool says"),
    (None, MESSAGES, "without a chat template"),
    (TEMPLATE, MESSAGES[:2], "an answer of each tool, got a call that comes last"),
    *((TEMPLATE, calling(text), "of tide: expected an object of JSON") for text in ("{", "[]", "[" * 100_000, "null")),
])  # fmt: skip
def test_a_conversation_that_the_model_would_read_otherwise_is_refused(
    served: LoadedModel, template: str | None, messages: list[dict[str, Any]], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        prompt(with_template(served, template), messages)


def test_answers_stand_in_the_order_of_their_calls(served: LoadedModel) -> None:
    calls = [{**CALL, "id": f"call_{i}"} for i in (1, 2)]
    answers = [{"role": "tool", "tool_call_id": f"call_{i}", "content": f"{i} m"} for i in (2, 1)]
    said = [MESSAGES[0], {**MESSAGES[1], "tool_calls": calls}, *answers]
    assert prompt(with_template(served, TEMPLATE), said).endswith(
        "<|im_start|>tool\n1 m of tide<|im_end|>\n<|im_start|>tool\n2 m of tide<|im_end|>\n<|im_start|>assistant\n"
    )


def test_what_has_no_calls_needs_nothing_of_the_template(served: LoadedModel) -> None:
    assert prompt(with_template(served, WITHOUT_CALLS), MESSAGES[:1]) == "user: How high?\n"
    assert prompt(with_template(served, WITHOUT_CALLS), [MESSAGES[0], MESSAGES[2]]).endswith("tool: 2 m\n")
    untaught = prompt(with_template(served, None), [MESSAGES[0], MESSAGES[2]])
    assert untaught == "User: How high?\n\nTool: 2 m\n\nAssistant:"


@pytest.mark.parametrize("message", [
    {"role": "user", "content": "x", "tool_calls": [CALL]}, {"role": "user", "content": "x", "tool_call_id": "call_1"},
    {"role": "assistant", "content": "x", "tool_calls": [{**CALL, "type": "custom"}]},
])  # fmt: skip
def test_calls_are_the_assistants_and_answers_a_tools(message: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="tool_call"):
        ChatRequest.model_validate({"model": "tiny", "messages": [message]})


def test_the_server_answers_what_the_template_wrote(served: LoadedModel, config: ServeConfig) -> None:
    loaded = with_template(served, TEMPLATE)
    plain = generate(loaded, [WRITTEN], max_new_tokens=8, temperature=0.0, add_special_tokens=False)[0]
    with answering(loaded, config, Keys(None)) as server:
        client: Any = server.client()
        found = client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=8, temperature=0, tool_choice="none"
        )
    assert found.choices[0].message.content == plain
    assert found.usage.prompt_tokens == len(loaded.tokenizer(WRITTEN)["input_ids"])
