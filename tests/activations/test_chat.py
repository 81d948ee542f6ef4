"""A prompt holds all that was said, as the chat template writes it, or there is none."""

import json
from pathlib import Path
from typing import Any

import pytest

from activations import chat
from activations.chat import chat_prompt
from activations.errors import ConfigError
from activations.models import LoadedModel, load_model
from tests.activations.templates import with_template

EACH = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
CALLING = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls %}"
    "<call {{ c.function.name }}>{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
)
OF_ONE = CALLING.replace("m.tool_calls", "(m.tool_calls or [])[:1]")
REFUSED = "{{ raise_exception('no system') if m.role == 'system' }}"
USER, SAID = {"role": "user", "content": "hey"}, {"role": "assistant", "content": "Well"}
SYSTEM = {"role": "system", "content": "Be kind."}


@pytest.fixture(scope="module")
def loaded(tiny_llama: Path) -> LoadedModel:
    return load_model(str(tiny_llama), device="cpu", dtype="float32")


def calling(*calls: tuple[str, str], content: str = "") -> list[dict[str, Any]]:
    """A conversation in which tools are called, each by its name and arguments, and answer."""
    made = [
        {"id": f"call_{i}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for i, (name, arguments) in enumerate(calls)
    ]
    answers = [{"role": "tool", "content": f"{each['id']}!", "tool_call_id": each["id"]} for each in made]
    return [USER, {"role": "assistant", "content": content, "tool_calls": made}, *answers]


def test_chat_template(loaded: LoadedModel) -> None:
    user = "<|im_start|>user\nhey<|im_end|>\n"
    end = "<|im_start|>assistant\n"
    assert chat_prompt(loaded, "hey") == user + end
    assert chat_prompt(loaded, "hey", system="Be kind.") == "<|im_start|>system\nBe kind.<|im_end|>\n" + user + end
    turns = [{"role": "system", "content": "Mine."}, USER]
    assert chat_prompt(loaded, turns, system="Not this.") == "<|im_start|>system\nMine.<|im_end|>\n" + user + end


def test_open_answer_is_continued(loaded: LoadedModel) -> None:
    assert chat_prompt(loaded, [USER, SAID]).endswith("<|im_start|>assistant\nWell")


@pytest.mark.parametrize("template", [
    EACH.replace("<{{", f"{REFUSED}<{{{{"), EACH.replace("in messages", "in messages if m.role != 'system'"),
], ids=["refuses", "leaves out"])  # fmt: skip
def test_a_system_message_that_a_template_does_not_write_is_said_by_the_user(
    loaded: LoadedModel, template: str
) -> None:
    without = with_template(loaded, template)
    assert chat_prompt(without, "hey", system="Be kind.") == "<user>Be kind.\n\nhey"
    assert chat_prompt(without, "hey", system="") == "<user>hey"
    assert chat_prompt(without, [SYSTEM, SYSTEM, USER]) == "<user>Be kind.\n\nBe kind.\n\nhey"
    assert chat_prompt(without, [SYSTEM, USER, SAID, USER]) == "<user>Be kind.\n\nhey<assistant>Well<user>hey"
    with pytest.raises(ConfigError, match=r"no system|messages.2.: .*leaves out what the system says"):
        chat_prompt(without, [USER, SAID, SYSTEM, USER])


def test_plain_prompt_without_a_template(loaded: LoadedModel) -> None:
    plain = with_template(loaded, None)
    assert chat_prompt(plain, "hey", system="Be kind.") == "System: Be kind.\n\nUser: hey\n\nAssistant:"
    assert chat_prompt(plain, [USER, SAID]) == "User: hey\n\nAssistant: Well"
    with pytest.raises(ConfigError, match=r"messages.1..tool_calls: .*without a chat template"):
        chat_prompt(plain, calling(("tide", "{}")))


@pytest.mark.parametrize(("template", "says"), [
    ("{{ raise_exception('never.') }}", "what the chat template takes, got never. Change"),
    ("{{ tools | length }}", "has no len"), ("{{ functions | tojson }}", "functions|Undefined"),
    ("{{ messages | length }}", r"messages.0.: .*leaves out what the user says. Leave it out"),
])  # fmt: skip
def test_a_template_that_takes_no_message_is_an_error_and_not_another_prompt(
    loaded: LoadedModel, template: str, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        chat_prompt(with_template(loaded, template), "hey")


def test_calls_are_written_as_the_template_wants_them(loaded: LoadedModel) -> None:
    expected = '<user>hey<assistant><call tide>{"at": 1}<call moon>{}<tool>call_0!<tool>call_1!'
    turns = calling(("tide", '{"at":1}'), ("moon", "{}"))
    assert chat_prompt(with_template(loaded, CALLING), turns) == expected
    of_texts = with_template(loaded, CALLING.replace("c.function.arguments | tojson", "'' + c.function.arguments"))
    assert chat_prompt(of_texts, turns) == expected.replace('"at": 1', '"at":1')
    shown = with_template(loaded, CALLING.replace("c.function.arguments | tojson", "c.function.arguments"))
    assert chat_prompt(shown, turns) == expected.replace('"at": 1', '"at":1'), "and not as Python shows an object"
    for got in ("{", "[]", "null", "[" * 100_000):
        with pytest.raises(ConfigError, match="arguments of tide: expected an object of JSON"):
            chat_prompt(of_texts, calling(("tide", got)))


def test_arguments_are_json_where_a_template_puts_an_object_into_text(loaded: LoadedModel) -> None:
    printing = with_template(loaded, CALLING.replace(" | tojson", ""))
    assert (
        chat_prompt(printing, calling(("tide", '{"at":1}'))) == '<user>hey<assistant><call tide>{"at":1}<tool>call_0!'
    )


def test_ids_have_nine_letters_where_a_template_takes_no_others(loaded: LoadedModel) -> None:
    refusal = "{{ raise_exception('nine letters') if c.id | length != 9 }}{{ c.id }}<call "
    nine = with_template(loaded, CALLING.replace("<call ", refusal).replace("<{{", "{{ m.tool_call_id }}<{{"))
    turns = calling(("tide", "{}"))
    before, answered = chat_prompt(nine, turns).split("<call tide>{}")
    assert before[-9:].isalnum()
    assert answered == f"{before[-9:]}<tool>call_0!"
    own = json.loads(json.dumps(turns).replace('id": "call_0"', 'id": "abcdefgh1"'))
    assert chat_prompt(nine, own).count("abcdefgh1") == 2
    assert "call_0<tool>" in chat_prompt(
        with_template(loaded, CALLING.replace("<{{", "{{ m.tool_call_id }}<{{")), turns
    )


WITHOUT_THOUGHTS = (
    "{% for m in messages %}<{{ m.role }}>{{ '<think></think>' if loop.last and m.role == 'assistant' }}"
    "{{ m.content.split('</think>')[-1] }}{% endfor %}{% if add_generation_prompt %}<assistant><think>\n{% endif %}"
)
"""leaves out what was thought, and writes an empty thought in the last answer, as those of Qwen 3 and R1 do"""


@pytest.mark.parametrize(("text", "expected"), [
    ("<think>so", "<think>so"), ("<think>so</think>Well", "<think>so</think>Well"),
    ("so</think>Well", "<think>\nso</think>Well"), ("Well", "<think></think>Well"),
])  # fmt: skip
def test_an_open_answer_that_thinks_goes_on_as_it_was_written(loaded: LoadedModel, text: str, expected: str) -> None:
    turns = [USER, {"role": "assistant", "content": text}]
    assert chat_prompt(with_template(loaded, WITHOUT_THOUGHTS), turns) == f"<user>hey<assistant>{expected}"
    closed = with_template(loaded, WITHOUT_THOUGHTS.replace("<think>\n", "</think>"))
    if text.startswith("<think>"):
        assert chat_prompt(closed, turns) == f"<user>hey<assistant>{text}"


def test_a_thought_is_text_to_a_template_that_knows_none(loaded: LoadedModel) -> None:
    turns = [USER, {"role": "assistant", "content": "<think>so"}]
    assert chat_prompt(with_template(loaded, EACH.replace(">{{", ">|{{")), turns) == "<user>|hey<assistant>|<think>so"


@pytest.mark.parametrize(("template", "turns", "says"), [
    (EACH, calling(("tide", '{"at": 1}')), r"messages.1..tool_calls: .*leaves out calls"),
    (OF_ONE, calling(("tide", "{}"), ("tide", "{}")), "all but one"),
    (OF_ONE, calling(("tide", "{}"), ("moon", "{}")), "all but one"),
    (CALLING.replace("c.function.name", "c.id"), calling(("tide", "{}")), "leaves out calls"),
    (CALLING.replace("| tojson", "| length"), calling(("tide", '{"at": 1}')), "leaves out calls"),
    (CALLING.replace("m.content", "'' if m.tool_calls else m.content"), calling(("tide", "{}"), content="So:"),
     r"messages.1.: .*what the assistant says beside its calls"),
    (CALLING.replace("m.content", "'' if m.role == 'tool' else m.content"), calling(("tide", "{}")),
     r"messages.2.: .*what the tool says"),
])  # fmt: skip
def test_what_a_template_leaves_out_is_told(
    loaded: LoadedModel, template: str, turns: list[dict[str, Any]], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        chat_prompt(with_template(loaded, template), turns)


def test_a_template_may_do_to_a_text_what_it_likes(loaded: LoadedModel) -> None:
    thoughtless = with_template(loaded, EACH.replace("m.content", "m.content.split('</think>')[-1] | upper"))
    turns = [USER, {"role": "assistant", "content": "<think>Oh</think>Well"}, USER]
    assert chat_prompt(with_template(loaded, EACH), turns) == "<user>hey<assistant><think>Oh</think>Well<user>hey"
    assert chat_prompt(thoughtless, turns) == "<user>HEY<assistant>WELL<user>HEY"


def test_a_conversation_of_one_form_is_tried_once(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    own, written, write = with_template(loaded, EACH), [], chat._written

    def count(tokenizer: Any, turns: Any) -> str:
        written.append(turns)
        return write(tokenizer, turns)

    monkeypatch.setattr(chat, "_written", count)
    for text in ("one", "two", "three"):
        assert chat_prompt(own, [{**USER, "content": text}]) == f"<user>{text}"
    assert len(written) == 1 + 3


@pytest.mark.parametrize("n", [12, 500])
def test_conversations_of_any_length(loaded: LoadedModel, n: int) -> None:
    own, turns, kept = with_template(loaded, EACH), [USER, SAID] * n, chat._way.cache_info().currsize
    assert chat_prompt(own, [*turns, USER]) == "<user>hey<assistant>Well" * n + "<user>hey"
    assert chat._way.cache_info().currsize - kept == (n == 12), "no more is kept than of short ones"


def test_errors_of_one_form_hold_on_to_no_earlier_one(loaded: LoadedModel) -> None:
    own, depths = with_template(loaded, "{{ messages | length }}"), []
    for _ in range(3):
        with pytest.raises(ConfigError) as caught:
            chat_prompt(own, "hey")
        depths.append(len(caught.traceback))
    assert depths[0] == depths[1] == depths[2]


def test_smollm2_system_message(smollm2: LoadedModel) -> None:
    assert "named SmolLM" in chat_prompt(smollm2, "hey")
    assert "named SmolLM" not in chat_prompt(smollm2, "hey", system="")
    assert chat_prompt(smollm2, "hey", system="").endswith("<|im_start|>user\nhey<|im_end|>\n<|im_start|>assistant\n")
