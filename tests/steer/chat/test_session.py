"""A chat: commands change what steers, answers are those of `generate`, and a mistake changes nothing."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from activations.chat import chat_prompt
from activations.errors import ConfigError, MismatchError, SaekitError
from activations.models import LoadedModel
from steer.chat.commands import parse
from steer.chat.session import Chat, summary
from steer.chat.state import doses_together, open_pieces
from steer.config import ChatConfig
from steer.gates import Gate, energy, gates_of
from steer.generate import generate
from steer.library import save_library
from steer.operations import Intervention
from steer.vectors import SteeringVector

N = 8
Made = Callable[..., Chat]


@pytest.fixture
def library(vector: SteeringVector, tmp_path: Path) -> Path:
    """`up`, `down`, which is its opposite, and `both`, which has a part at each of two layers."""
    up = replace(vector, coefficient=1.6)
    parts = [
        replace(up, name=f"both@resid_post.{i}", hook_point=f"resid_post.{i}", coefficient=c)
        for i, c in ((2, 0.8), (0, 1.6))
    ]
    save_library(tmp_path / "library", [up, replace(up, name="down", direction=-up.direction), *parts])
    return tmp_path / "library"


@pytest.fixture
def chat(tiny: LoadedModel, library: Path) -> Made:
    def make(*lines: str, **fields: Any) -> Chat:
        defaults = {"library": library, "vectors": (), "max_new_tokens": N, "temperature": 0.0}
        made = Chat(ChatConfig(**defaults | fields), tiny)
        for line in lines:
            made.apply(parse(line))
        return made

    return make


def greedy(loaded: LoadedModel, text: str, steers: list[Intervention], messages: Any = ()) -> str:
    prompt = chat_prompt(loaded, [*messages, {"role": "user", "content": text}])
    how = {"max_new_tokens": N, "temperature": 0.0, "add_special_tokens": False}
    return generate(loaded, [prompt], interventions=steers, **how)[0].strip()


def test_an_answer_is_what_generate_gives_under_what_steers(
    tiny: LoadedModel, vector: SteeringVector, chat: Made
) -> None:
    made = chat()
    plain = made.answer("Hello")
    assert plain == greedy(tiny, "Hello", [])
    made.apply(parse("/add up 1.5"))
    steers = [Intervention.of(vector, 1.5 * vector.mean_norm)]
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": plain}]
    assert made.answer("And then?") == greedy(tiny, "And then?", steers, messages)
    assert greedy(tiny, "And then?", steers, messages) != greedy(tiny, "And then?", [], messages)
    made.apply(parse("/dose up 0"))
    assert [turn.answer for turn in made.state.turns][-1] != ""
    made.apply(parse("/undo"))
    assert made.answer("And then?") == greedy(tiny, "And then?", [], messages)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["/add up"], [("up", "resid_post.1", "add", 1.6, "all")]),
        (["/add up -0.5"], [("up", "resid_post.1", "add", -2.0, "all")]),
        (["/add up", "/dose up 0.5", "/scope up user after:4"], [("up", "resid_post.1", "add", 2.0, "user after:4")]),
        (["/add up 0.5", "/op up rotate"], [("up", "resid_post.1", "rotate", 2.0, "all")]),
        (["/add up 0.5", "/op up ablate"], [("up", "resid_post.1", "ablate", 1.0, "all")]),
        (["/add up", "/op up ablate", "/dose up 0.25"], [("up", "resid_post.1", "ablate", 0.25, "all")]),
        (["/add up", "/add down", "/remove up"], [("down", "resid_post.1", "add", 1.6, "all")]),
        (["/add up", "/clear"], []),
        (
            ["/add both 1"],
            [
                ("both@resid_post.0", "resid_post.0", "add", 4.0, "all"),
                ("both@resid_post.2", "resid_post.2", "add", 2.0, "all"),
            ],
        ),
    ],
)  # fmt: skip
def test_commands_and_what_they_lead_to(chat: Made, lines: list[str], expected: list[Any]) -> None:
    rows = summary(chat(*lines).state)
    found = [tuple(row[key] for key in ("name", "hook_point", "operation", "coefficient", "scope")) for row in rows]
    assert found == [(*row[:3], pytest.approx(row[3]), row[4]) for row in expected]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/add sideways", "one of up, down"),
        ("/add up", "one that does not steer yet"),
        ("/dose down 1", "one of up, which steer now"),
        ("/dose up 3", "at most 2"),
        ("/op up twist", "one of add, rotate, ablate"),
        ("/scope up everywhere", "words among"),
        ("/scope up thinking", "chat template"),
        ("/gate up 0.1 0.3", "off <= on"),
        ("/temperature -1", "at least 0"),
        ("/tokens 0", "a token or more"),
        ("/load nowhere", "a library"),
        ("/undo", "none so far"),
    ],
)
def test_a_mistake_changes_nothing(chat: Made, line: str, message: str) -> None:
    made = chat("/add up")
    state, libraries = made.state, list(made.libraries)
    with pytest.raises(SaekitError, match=message):
        made.apply(parse(line))
    assert (made.state is state, made.libraries) == (True, libraries)


def test_a_vector_of_another_model_is_refused_when_it_is_added(
    chat: Made, vector: SteeringVector, tmp_path: Path
) -> None:
    model = vector.model.model_copy(update={"fingerprint": "0" * 64})
    save_library(tmp_path / "other", [replace(vector, name="foreign", model=model)])
    made = chat(f"/load {tmp_path / 'other'}", "/add up")
    with pytest.raises(MismatchError, match="other weights"):
        made.apply(parse("/add foreign"))
    assert [row["name"] for row in summary(made.state)] == ["up"]


def test_a_joint_dose_is_that_of_the_sum(chat: Made) -> None:
    assert doses_together(chat("/add up 0.5", "/add down 0.2").state.steers) == {"resid_post.1": pytest.approx(0.3)}
    both = doses_together(chat("/add both 1").state.steers)
    assert both == {"resid_post.0": pytest.approx(1.0), "resid_post.2": pytest.approx(0.5)}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_side_by_side_each_column_is_what_it_is_alone(chat: Made, temperature: float) -> None:
    limits = {"temperature": temperature, "seed": 3}
    steered, unsteered = chat("/add up 1.5", **limits), chat(**limits)
    steps = list(steered.say("Hello", compares=True))
    turn = steered.state.turns[-1]
    assert turn.unsteered == unsteered.answer("Hello")
    assert turn.answer == chat("/add up 1.5", **limits).answer("Hello") != turn.unsteered
    assert ["".join(column).strip() for column in zip(*steps, strict=True)] == [turn.answer, turn.unsteered]
    idle = chat("/add up 0", "/compare on", **limits)
    idle.answer("Hello")
    assert idle.state.turns[0].answer == idle.state.turns[0].unsteered


def test_retry_has_the_same_seed_unless_nothing_changed(chat: Made) -> None:
    made = chat(temperature=1.0)
    first = made.answer("Hello")
    list(made.retry())
    assert (len(made.state.turns), made.state.turns[0].sampling.seed) == (1, 1)
    assert made.state.turns[0].answer != first
    made.apply(parse("/seed 0"))
    list(made.retry())
    assert made.state.turns[0].answer == first
    made.apply(parse("/add up"))
    list(made.retry())
    assert (made.state.turns[0].sampling.seed, len(made.state.turns[0].steering)) == (0, 1)
    list(made.retry(compares=True))
    assert made.state.turns[0].unsteered == first


def test_what_was_stopped_is_kept_as_far_as_it_came(tiny: LoadedModel, chat: Made) -> None:
    whole, made = chat().answer("Hello"), chat()
    passes: list[int] = []

    def stop(*_: Any) -> None:
        passes.append(1)
        if len(passes) == 5:
            raise KeyboardInterrupt

    hooks = len(tiny.model.model.layers[1]._forward_hooks)  # other tests may have left those of transformers
    handle = tiny.model.model.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        made.answer("Hello")
    handle.remove()
    turn = made.state.turns[-1]
    assert (turn.is_whole, len(turn.pieces)) == (False, 4)
    assert whole.startswith(turn.answer)
    assert len(tiny.model.model.layers[1]._forward_hooks) == hooks
    assert made.answer("Go on")
    pieces = made.say("More")
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert [turn.is_whole for turn in made.state.turns] == [False, True, False]


def test_too_long_a_question_changes_nothing(chat: Made) -> None:
    made = chat()
    made.answer("Hello")
    state = made.state
    with pytest.raises(ConfigError, match="Shorten the prompt"):
        made.answer("la " * 600)
    assert made.state is state


def test_gates_are_logged_by_the_pieces_of_the_answer(chat: Made) -> None:
    made = chat("/add up 0.2", "/gate up 0 0")
    answer = made.answer("Hello")
    turn = made.state.turns[-1]
    n_read = len([piece for piece in turn.pieces if piece]) - 1  # nothing reads the last token
    assert set(range(1, turn.n_prompt + n_read)) <= set(turn.fired["up"])
    (part,) = open_pieces(turn, "up")
    assert answer.startswith(part.strip())
    made.apply(parse("/gate up 0.99"))
    made.answer("Hello")
    assert (made.state.turns[-1].fired, open_pieces(made.state.turns[-1], "up")) == ({"up": []}, [])
    made.apply(parse("/gate up off"))
    made.answer("Hello")
    assert made.state.turns[-1].fired == {}


def test_a_transcript_says_what_steered_each_answer(tiny: LoadedModel, chat: Made, tmp_path: Path) -> None:
    made = chat("/system Be brief.")
    made.answer("Hello")
    made.apply(parse("/add up 0.5"))
    list(made.say("And then?", compares=True))
    path = tmp_path / "my transcript.jsonl"
    for _ in range(2):
        made.apply(parse(f"/save '{path}'"))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["user"] for line in lines] == ["Hello", "And then?"]
    assert [line["steering"] for line in lines] == [[], made.state.steering()]
    assert lines[1]["steering"][0]["vectors"][0]["coefficient"] == pytest.approx(2.0)
    assert (lines[0]["unsteered"], lines[1]["unsteered"]) == (None, made.state.turns[1].unsteered)
    assert {(line["fingerprint"], line["system"], line["seed"]) for line in lines} == {
        (tiny.fingerprint, "Be brief.", 0)
    }
    with pytest.raises(ConfigError, match="not there yet"):
        chat().apply(parse(f"/save '{path}'"))
    with pytest.raises(ConfigError, match="a file to write"):
        made.apply(parse(f"/save {tmp_path / 'no' / 'such'}"))


def test_a_config_names_vectors_as_they_are_added(tiny: LoadedModel, library: Path) -> None:
    names = lambda **fields: [  # noqa: E731
        (row["name"], round(row["coefficient"], 6))
        for row in summary(Chat(ChatConfig(library=library, **fields), tiny).state)
    ]
    assert names() == [("up", 1.6)]
    assert names(vectors="down") == [("down", 1.6)]
    assert names(vectors=("up -0.5", "down")) == [("up", -2.0), ("down", 1.6)]
    assert names(vectors=()) == []
    with pytest.raises(ConfigError, match="a number"):
        names(vectors=("up much",))
    with pytest.raises(ConfigError, match="a library"):
        Chat(ChatConfig(vectors=("up",)), tiny)


def test_what_steers_is_exact_for_the_whole_state(chat: Made, vector: SteeringVector) -> None:
    found = chat("/add up 0.5", "/add both 0.5", "/gate both 0.1").state.interventions()
    assert [str(each.acts_at) for each in found] == ["resid_post.1", "resid_post.0", "resid_post.2"]
    assert [each.gate is None for each in found] == [True, False, False]
    np.testing.assert_allclose(found[0].operation.direction, vector.direction)  # type: ignore[attr-defined]


def test_a_vector_keeps_its_own_gate_until_another_or_none_is_asked_for(
    tiny: LoadedModel, vector: SteeringVector, tmp_path: Path
) -> None:
    own = Gate(energy(torch.from_numpy(vector.direction), vector.hook_point), 0.3, 0.1, 2, "mine")
    save_library(tmp_path, [replace(vector, coefficient=1.0, gate=own)])
    made = Chat(ChatConfig(library=tmp_path), tiny)

    def gates() -> list[str]:
        (intervention,) = made.state.interventions()
        return [gate.name for gate in gates_of(intervention.gate)]

    assert (gates(), summary(made.state)[0]["own_gate"]) == (["mine"], ["mine"])
    made.apply(parse("/gate up 0.5"))
    assert (gates(), summary(made.state)[0]["own_gate"]) == (["up"], [])
    made.apply(parse("/gate up off"))
    assert (gates(), summary(made.state)[0]["own_gate"]) == ([], [])


def test_a_budget_scales_what_a_chat_steers_with(tiny: LoadedModel, library: Path) -> None:
    limits = {"library": library, "max_new_tokens": 6, "temperature": 0.0, "plain": True}
    text = "The river ran"
    strong = Chat(ChatConfig(vectors=("up 1.5",), budget=0.5, **limits), tiny).answer(text)
    assert strong == Chat(ChatConfig(vectors=("up 0.5",), **limits), tiny).answer(text)
    assert strong != Chat(ChatConfig(vectors=("up 1.5",), **limits), tiny).answer(text)
