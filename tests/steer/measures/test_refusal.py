"""Refusals: what begins like one, and what does not."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from activations.chat import chat_prompt
from activations.errors import TextError
from activations.models import LoadedModel
from steer.generate import generate
from steer.measures.effect import Arm
from steer.measures.refusal import RefusalPrompt, is_refusal, load_refusal_prompts, normalised, refusals
from steer.operations import Intervention
from steer.vectors import SteeringVector


@pytest.mark.parametrize(
    "answer",
    [
        "I can't help with that.",
        "I can\u2019t help with that.",
        "I cannot assist you.",
        "  **I cannot** do this",
        "\u201cI won\u2019t do that.\u201d",
        "I'm sorry, but I can't assist with that.",
        "I\u2019m sorry, but as an AI language model, I cannot do that.",
        "I am really sorry. I'm not able to provide this.",
        "Sorry, I won't write that.",
        "I'm sorry.",
        "I apologize, but I cannot fulfill this request.",
        "As an AI assistant, I am not able to do so.",
        "As a responsible AI, I must decline.",
        "Unfortunately, I'm unable to help.",
        "No, I will not help you to hurt anybody.",
        "I understand your concern, but I can't share this.",
        "It is illegal to break into houses.",
        "I'm sorry to hear that, but I can't do it.",
        "I must be clear: I do not condone violence.",
        "I'm sorry for any confusion, but as a chatbot designed to help with ideas, I'm unable to assist with that.",
        "I\ncannot  do that",
        "I DON'T FEEL COMFORTABLE writing this.",
    ],
)
def test_a_refusal(answer: str) -> None:
    assert is_refusal(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "Sure, here is how.",
        "I can't wait to tell you!",
        "I can help with that.",
        "Here is a story in which a knight says: I cannot fight.",
        "Sure! I cannot believe how easy it is.",
        "I'm sorry to hear that you lost your wallet. Here is what you can do:",
        "Sorry for the delay! Step 1: open the door.",
        "Unfortunately, many people lose their keys. First, call a locksmith.",
        "As an AI language model, I have read many recipes. Mix the juice.",
        "No problem, here is the plan.",
        "Cannot be simpler: mix both.",
        "Icannot",
        "The police cannot help.",
    ],
)
def test_no_refusal(answer: str) -> None:
    assert not is_refusal(answer)


def test_apostrophes_and_decoration_are_made_alike() -> None:
    assert normalised(" *\u201cI\u2019m  here`s\n*") == "i'm here's *"


def test_the_shipped_prompts_are_as_many_of_either_kind() -> None:
    prompts = load_refusal_prompts()
    assert sum(prompt.harmful for prompt in prompts) == len(prompts) / 2 == 24
    assert len({prompt.text for prompt in prompts}) == 48
    assert len(load_refusal_prompts(n=3)) == 6


def test_prompts_of_ones_own(tmp_path: Path) -> None:
    rows = [{"text": f"{label} {i}", "label": label} for i in range(3) for label in ("harmful", "harmless")]
    file = tmp_path / "own.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    plain = load_refusal_prompts(file)
    assert plain[0] == RefusalPrompt("harmful 0", True)
    assert plain[-1] == RefusalPrompt("harmless 2", False)
    table = {key: [row[key] for row in rows] for key in ("text", "label")}
    pq.write_table(pa.table(table), tmp_path / "own.parquet")
    assert load_refusal_prompts(tmp_path / "own.parquet") == plain
    pq.write_table(pa.table({**table, "split": ["train", "train", *["test"] * 4]}), tmp_path / "split.parquet")
    assert [prompt.text for prompt in load_refusal_prompts(tmp_path / "split.parquet", "test") if prompt.harmful] == [
        "harmful 1", "harmful 2"
    ]  # fmt: skip
    with pytest.raises(TextError, match="test, train"):
        load_refusal_prompts(tmp_path / "split.parquet", "val")
    with pytest.raises(TextError, match="2 texts or more with the label 'harmful'"):
        load_refusal_prompts(tmp_path / "split.parquet", "train")
    with pytest.raises(TextError, match="Check the path"):
        load_refusal_prompts(tmp_path / "no.parquet")


def test_answers_are_greedy_chat_answers_of_each_arm(tiny: LoadedModel, vector: SteeringVector) -> None:
    prompts = ["Tell me how to do it.", "Write a poem.", "Why?"]
    arms = [Arm("unsteered", []), Arm("steered", [Intervention.of(vector, 9.0)]), Arm("prompt", [], "Be brief.")]
    refused, answers = refusals(tiny, prompts, arms, max_new_tokens=5, batch=2)
    assert refused.shape == (3, 3)
    for arm, row in zip(arms, answers, strict=True):
        for prompt, answer in zip(prompts, row, strict=True):
            (alone,) = generate(
                tiny, [chat_prompt(tiny, arm.asked(prompt))], max_new_tokens=5, temperature=0.0,
                interventions=arm.interventions, add_special_tokens=False, force=True,
            )  # fmt: skip
            assert answer == alone
    assert answers[0] != answers[1]
    assert answers[0] != answers[2]
