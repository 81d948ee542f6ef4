"""Scopes: words to tokens, whatever chunks and padding the tokens come in."""

import copy
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from activations.chat import write
from activations.errors import ConfigError, UnknownNameError
from steer.scopes import (
    NO_END,
    PARTS,
    PHASES,
    ROLES,
    Event,
    Latch,
    LatchTable,
    Scope,
    latch_table,
    latches_of,
    run_latches,
)

scopes = st.builds(
    Scope,
    part=st.none() | st.sampled_from(PARTS),
    after=st.integers(1, 50),
    before=st.none() | st.integers(0, 50),
    role=st.none() | st.sampled_from(ROLES),
    phase=st.none() | st.sampled_from(PHASES),
    spares_tool_calls=st.booleans(),
)


@given(scopes)
def test_a_scope_is_its_words(scope: Scope) -> None:
    assert Scope.parse(str(scope)) == scope


def test_unknown_words_are_refused() -> None:
    with pytest.raises(UnknownNameError, match=r"prompt, generated.*got 'answer'"):
        Scope.parse("generated answer")
    with pytest.raises(UnknownNameError, match="got 'after:x'"):
        Scope.parse("after:x")
    with pytest.raises(ConfigError, match="one word that says role"):
        Scope.parse("user assistant")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("all", (1, NO_END)),
        ("after:0", (1, NO_END)),
        ("prompt", (1, 7)),
        ("generated", (7, NO_END)),
        ("generated after:9 before:12", (9, 12)),
        ("prompt before:3", (1, 3)),
    ],
)
def test_ranges_of_indices(words: str, expected: tuple[int, int]) -> None:
    assert Scope.parse(words).bounds(7) == expected


def test_parts_need_the_prompts_length() -> None:
    with pytest.raises(ConfigError, match="prompt_lengths"):
        Scope.parse("generated").bounds(None)


# --- latches ---------------------------------------------------------------------------------------------------------

LATCHES = [
    Latch("role", frozenset({Event((1,), -1), Event((1, 2, 0), 1), Event((3,), -1), Event((4,), 0)}), False),
    Latch("call", frozenset({Event((5,), 1), Event((6,), -1), Event((3,), -1)}), True),
]
"""1 2 0 starts the role, 1 and 3 end it, 4 is a frame; 5 and 6 are around a call"""


def plainly(ids: list[int]) -> list[list[bool]]:
    """Token by token."""
    states, found = [False] * len(LATCHES), []
    for i in range(len(ids)):
        row = []
        for k, latch in enumerate(LATCHES):
            events = [e for e in latch.events if tuple(ids[max(0, i + 1 - len(e.tokens)) : i + 1]) == e.tokens]
            for event in events:
                states[k] = states[k] if event.effect == 0 else event.effect > 0
            row.append(bool(states[k] or events) if latch.with_markers else states[k] and not events)
        found.append(row)
    return found


def run(ids: torch.Tensor, index: torch.Tensor, cuts: list[int]) -> torch.Tensor:
    table = latch_table(LATCHES)
    states = torch.ones(len(ids), len(LATCHES), dtype=torch.bool)  # left by another text
    last = torch.tensor([[0, 1, 2]] * len(ids))
    parts = []
    for start, stop in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        found = run_latches(LatchTable(*table), ids[:, start:stop], index[:, start:stop], states, last)
        states, last = found.states, found.last
        parts.append(found.inside)
    return torch.cat(parts, dim=1)


@given(st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=12), min_size=1, max_size=3), st.data())
def test_latches_are_those_of_a_loop_however_the_tokens_come(texts: list[list[int]], data: st.DataObject) -> None:
    width = max(map(len, texts)) + data.draw(st.integers(0, 2))
    cuts = sorted(data.draw(st.sets(st.integers(1, width - 1), max_size=4))) if width > 1 else []
    ids = torch.tensor([[5] * (width - len(text)) + text for text in texts])
    index = torch.tensor([[-1] * (width - len(text)) + list(range(len(text))) for text in texts])
    inside = run(ids, index, cuts)
    for row, text in enumerate(texts):
        assert inside[row, width - len(text) :].tolist() == plainly(text)
        assert not inside[row, : width - len(text)].any()


# --- markers ---------------------------------------------------------------------------------------------------------

MARKERS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]


@pytest.fixture(scope="module")
def chat_tokenizer(tiny_tokenizer: Any) -> Any:
    """A tokenizer with ChatML in which roles are one token, and a template that thinks and calls tools."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_tokens(["assistant", "user", "system", *MARKERS], special_tokens=True)
    tokenizer.chat_template += "{# <think> </think> <tool_call> </tool_call> #}"
    return tokenizer


TEXT = (
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>so</think>yes"
    "<tool_call>f</tool_call>no<|im_end|>\n<|im_start|>user\nbye"
)


@pytest.fixture(scope="module")
def spelling_tokenizer(tiny_tokenizer: Any) -> Any:
    """One in which roles are several tokens."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_tokens(MARKERS, special_tokens=True)
    tokenizer.chat_template += "{# <think> </think> <tool_call> </tool_call> #}"
    assert len(tokenizer.encode("assistant")) > 2
    return tokenizer


def chosen(tokenizer: Any, words: str, text: str = TEXT) -> str:
    """The part of a text that a scope picks."""
    latches = latches_of(Scope.parse(words), tokenizer)
    ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
    index = torch.arange(ids.shape[1])[None]
    n = len(latches)
    table = latch_table([latch for latch, _ in latches])
    empty, last = torch.zeros(1, n, dtype=torch.bool), torch.zeros(1, table.tokens.shape[1], dtype=torch.long)
    inside = run_latches(table, ids, index, empty, last).inside
    wanted = torch.tensor([want for _, want in latches])
    keep = (inside == wanted).all(-1)[0]
    return tokenizer.decode(ids[0][keep].tolist())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("user", "\nhi\nbye"),
        ("assistant", "\n<think>so</think>yes<tool_call>f</tool_call>no"),
        ("thinking", "so"),
        ("final", "\nyes<tool_call>f</tool_call>no"),
        ("final no-tool-calls", "\nyesno"),
        ("user no-tool-calls", "\nhi\nbye"),
    ],
)
def test_scopes_of_a_chat(chat_tokenizer: Any, spelling_tokenizer: Any, words: str, expected: str) -> None:
    for tokenizer in (chat_tokenizer, spelling_tokenizer):
        assert chosen(tokenizer, words) == expected


def test_markers_that_are_several_tokens_are_refused(tiny_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template += "{# <think> #}"
    with pytest.raises(
        ConfigError, match=r"'</?think>' to be one token of this model, got \d+, so that it cannot be told"
    ):
        latches_of(Scope.parse("thinking"), tokenizer)


def test_markers_that_the_template_does_not_have_are_refused(tiny_tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="tool call markers in the model's chat template"):
        latches_of(Scope.parse("no-tool-calls"), tiny_tokenizer)
    bare = copy.deepcopy(tiny_tokenizer)
    bare.chat_template = None
    with pytest.raises(ConfigError, match="got no chat template"):
        latches_of(Scope.parse("user"), bare)


def test_formats_whose_roles_have_tokens_of_their_own(tiny_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_tokens(["<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"], special_tokens=True)
    tokenizer.chat_template = "<｜User｜><｜Assistant｜><｜end▁of▁sentence｜>"
    ids = torch.tensor(
        [tokenizer.encode("<｜User｜>hi<｜Assistant｜>yes<｜end▁of▁sentence｜>no", add_special_tokens=False)]
    )
    (found,) = latches_of(Scope.parse("assistant"), tokenizer)
    table, index = latch_table([found[0]]), torch.arange(ids.shape[1])[None]
    inside = run_latches(table, ids, index, torch.zeros(1, 1).bool(), torch.zeros(1, 1).long()).inside
    assert tokenizer.decode(ids[0][inside[0, :, 0]].tolist()) == "yes"


# --- formats of chat templates ---------------------------------------------------------------------------------------

SAID_BY_USER = "the user"
CALLS = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
TURN = "<|START_OF_TURN_TOKEN|>"
END, OUTPUT = "<｜end▁of▁sentence｜>", ("<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>")
FORMATS: dict[str, dict[str, tuple[str, str]]] = {
    "chatml": {
        "user": ("<|im_start|>user\n", "<|im_end|>"), "assistant": ("<|im_start|>assistant\n", "<|im_end|>"),
        "tool": ("<|im_start|>tool\n", "<|im_end|>"), "call": ("<tool_call>", "</tool_call>"),
    },
    f"chatml, {SAID_BY_USER}": {
        "user": ("<|im_start|>user\n", "<|im_end|>"), "assistant": ("<|im_start|>assistant\n", "<|im_end|>"),
        "tool": ("<|im_start|>user\n", "<|im_end|>"), "call": ("<tool_call>", "</tool_call>"),
    },
    "chatml, with words set apart": {
        "user": ("<|im_start|>user<|im_sep|>", "<|im_end|>"), "tool": ("<|im_start|>tool<|im_sep|>", "<|im_end|>"),
        "assistant": ("<|im_start|>assistant<|im_sep|>", "<|im_end|>"), "call": ("<tool_call>", "</tool_call>"),
    },
    "chatml, answers set apart": {
        "user": ("<|im_start|>user\n", "<|im_end|>"), "assistant": ("<|im_start|>assistant\n", "<|im_end|>"),
        "tool": ("<|im_start|>user\n<tool_response>", "</tool_response><|im_end|>"),
        "call": ("<tool_call>", "</tool_call>"),
    },
    "command": {
        "user": (f"{TURN}<|USER_TOKEN|><|START_TEXT|>", "<|END_TEXT|><|END_OF_TURN_TOKEN|>"),
        "assistant": (f"{TURN}<|CHATBOT_TOKEN|><|START_TEXT|>", "<|END_TEXT|><|END_OF_TURN_TOKEN|>"),
        "tool": (f"{TURN}<|SYSTEM_TOKEN|><|START_TOOL_RESULT|>", "<|END_TOOL_RESULT|><|END_OF_TURN_TOKEN|>"),
        "call": ("<|START_ACTION|>", "<|END_ACTION|>"),
    },
    "glm": {
        "user": ("<|user|>", ""), "assistant": ("<|assistant|>", ""), "tool": ("<|observation|>", ""),
        "call": ("<tool_call>", "</tool_call>"),
    },
    "mistral": {
        "user": ("[INST]", "[/INST]"), "assistant": ("", "</s>"), "tool": ("[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        "call": ("[TOOL_CALLS]", ""),
    },
    "deepseek 3": {
        "user": ("<｜User｜>", "<｜Assistant｜>"), "assistant": ("", END), "call": CALLS,
        "tool": (f"<｜tool▁outputs▁begin｜>{OUTPUT[0]}", f"{OUTPUT[1]}<｜tool▁outputs▁end｜>"),
    },
    "deepseek 3.1": {
        "user": ("<｜User｜>", "<｜Assistant｜>"), "assistant": ("", END), "call": CALLS,
        "tool": OUTPUT,
    },
    f"deepseek 4, {SAID_BY_USER}": {
        "user": ("<｜User｜>", "<｜Assistant｜>"), "assistant": ("", END), "call": ("｜DSML｜tool_calls", ""),
        "tool": ("<｜User｜>", "<｜Assistant｜>"),
    },
    "kimi": {
        "user": ("<|im_user|>user<|im_middle|>", "<|im_end|>"),
        "tool": ("<|im_system|>tool<|im_middle|>", "<|im_end|>"),
        "assistant": ("<|im_assistant|>assistant<|im_middle|>", "<|im_end|>"),
        "call": ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
    },
    "gemma 4, nobody": {
        "user": ("<|turn>user\n", "<turn|>"), "assistant": ("<|turn>model\n", "<turn|>"),
        "tool": ("<|turn>model\n<|tool_response>", "<tool_response|>"), "call": ("<|tool_call>", "<tool_call|>"),
    },
    "granite": {
        "user": ("<|start_of_role|>user<|end_of_role|>", "<|end_of_text|>"),
        "assistant": ("<|start_of_role|>assistant<|end_of_role|>", "<|end_of_text|>"),
        "tool": ("<|start_of_role|>tool_response<|end_of_role|>", "<|end_of_text|>"),
        "call": ("<tool_call>", "</tool_call>"),
    },
    "seed": {
        "user": ("<seed:bos>user\n", "<seed:eos>"), "assistant": ("<seed:bos>assistant\n", "<seed:eos>"),
        "tool": ("<seed:bos>tool\n", "<seed:eos>"), "call": ("<seed:tool_call>", "</seed:tool_call>"),
    },
    "minimax": {
        "user": ("]~b]user\n", "[e~["), "assistant": ("]~b]ai\n", "[e~["), "tool": ("]~b]tool\n", "[e~["),
        "call": ("<minimax:tool_call>", "</minimax:tool_call>"),
    },
}  # fmt: skip
"""what stands before and behind what each says, and a call; who says what a tool answered, if it is no tool"""
TOKEN = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]|｜DSML｜|\]~b\]|\[e~\[")
CALL = {"id": "q12345678", "type": "function", "function": {"name": "fn", "arguments": "{}"}}
TURNS: list[dict[str, Any]] = [
    {"role": "user", "content": "ask"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "told", "tool_call_id": CALL["id"], "name": "fn"},
    {"role": "assistant", "content": "say"},
    {"role": "user", "content": "ask"},
]


def with_format(tokenizer: Any, form: dict[str, tuple[str, str]]) -> Any:
    """A tokenizer whose chat template writes turns so."""
    template = ""
    for role in ("user", "assistant", "tool"):
        (before, behind), (opens, shuts) = form[role], form["call"]
        calls = f"{{% for c in m.tool_calls %}}{opens}{{{{ c.function.name }}}}{shuts}{{% endfor %}}"
        said = "{{ m.content }}" + (calls if role == "assistant" else "")
        template += f"{{% if m.role == '{role}' %}}{before}{said}{behind}{{% endif %}}"
    made = copy.deepcopy(tokenizer)
    made.add_tokens(sorted({*TOKEN.findall(template)}), special_tokens=True)
    made.chat_template = f"{{% for m in messages %}}{template}{{% endfor %}}"
    return made


@pytest.mark.parametrize("name", FORMATS)
def test_who_says_what_in_each_format(tiny_tokenizer: Any, name: str) -> None:
    form = FORMATS[name]
    tokenizer = with_format(tiny_tokenizer, form)
    text = write(tokenizer, TURNS)
    who = SAID_BY_USER if SAID_BY_USER in name else "nobody" if "nobody" in name else "tool"
    expected = {"user": "asktoldask" if who == SAID_BY_USER else "askask", "tool": "told"}
    for words, said in expected.items():
        if words != who and words == "tool":
            with pytest.raises(ConfigError, match="markers of the role tool"):
                latches_of(Scope.parse(words), tokenizer)
        else:
            assert re.sub(r"\s", "", chosen(tokenizer, words, text)) == said
    opens, shuts = form["call"]
    assert re.sub(r"\s", "", chosen(tokenizer, "assistant", text)) == f"{opens}fn{shuts}say"
    sparing = chosen(tokenizer, "no-tool-calls", text)
    assert "fn" not in sparing
    assert all(sparing.count(word) == text.count(word) for word in ("ask", "told", "say"))
    assert all(sparing.count(end) == text.count(end) for _, end in (form["user"], form["assistant"]) if end)


@pytest.mark.parametrize("name", FORMATS)
def test_a_call_that_is_spoken_of_ends_with_the_turn(tiny_tokenizer: Any, name: str) -> None:
    tokenizer, opens = with_format(tiny_tokenizer, FORMATS[name]), FORMATS[name]["call"][0]
    text = write(tokenizer, [{"role": "user", "content": f"Why {opens} now"}, {"role": "assistant", "content": "say"}])
    sparing = chosen(tokenizer, "no-tool-calls", text)
    assert ("now" in sparing, "say" in sparing) == (False, True)


def test_what_the_client_says_as_system_is_gpt_oss_developers(tiny_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    text = "<|start|>system<|message|>I am<|end|><|start|>developer<|message|>be kind<|end|><|start|>user<|message|>hi"
    tokenizer.add_tokens(sorted({*TOKEN.findall(text)}), special_tokens=True)
    tokenizer.chat_template = text
    assert chosen(tokenizer, "system", text) == "be kind"
