"""A judge: what it is asked, how its answers are read, and that they are kept."""

import json
from collections.abc import AsyncIterator, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from activations.errors import EndpointError
from activations.models import LoadedModel
from sae.labels.chat import Chat, Message, Reply, Request
from sae.labels.config import ChatModelConfig
from sae.labels.endpoint import Endpoint
from sae.labels.local import LocalChat
from steer.measures.judge import harmonic_mean, judge_texts, open_judge, read_rating


class Scripted:
    """A judge that rates the concept by a word, how a text goes on 1, and fluency 2."""

    name = "scripted"
    settings: Mapping[str, Any] = {}
    price_in = price_out = 0.0
    max_answer_tokens = 9

    def __init__(self, says: str | None = "") -> None:
        self.asked: list[Request] = []
        self._says = says
        self.wordy = "\0"
        """what is in questions that are answered without a rating"""

    def count(self, messages: tuple[Message, ...]) -> int:
        return 1

    async def answers(self, requests: Iterable[Request]) -> AsyncIterator[tuple[Request, Reply]]:
        for request in requests:
            self.asked.append(request)
            content = request.messages[-1].content
            rating = 1 if "go on from" in content else 2 if "does the CONTINUATION read" in content else None
            if rating is None:
                rating = 2 if "gold" in content.partition("CONTINUATION: ")[2].partition("\n")[0] else 0
            rated = "It is fine." if self.wordy in content else f"Because. Rating: [[{rating}]]"
            yield request, Reply(self._says if self._says != "" else rated)


def test_the_score_is_the_harmonic_mean_of_three_ratings(tmp_path: Path) -> None:
    judge = Scripted()
    assert isinstance(judge, Chat)
    found = judge_texts(judge, "riches", ["One", "Two"], ["all gold", "all lead"], tmp_path / "kept.jsonl")
    assert {name: list(each) for name, each in found.ratings.items()} == {
        "concept": [2, 0], "instruct": [1, 1], "fluency": [2, 2]
    }  # fmt: skip
    assert found.score.tolist() == pytest.approx([1.5, 0])
    assert found.unread == 0
    assert len(judge.asked) == 6
    assert all("riches" in request.messages[-1].content for request in judge.asked[:2])


def test_answers_are_kept_by_what_was_asked(tmp_path: Path) -> None:
    kept, texts = tmp_path / "kept.jsonl", ["all gold", "all lead"]
    first = judge_texts(Scripted(), "riches", ["One", "Two"], texts, kept)
    with kept.open("a") as file:
        file.write('{"key": "cut o')  # by a crash
    again = Scripted()
    second = judge_texts(again, "riches", ["One", "Two"], texts, kept)
    assert not again.asked
    np.testing.assert_array_equal(first.score, second.score)
    judge_texts(again, "riches", ["One"], ["all tin"], tmp_path / "kept.jsonl")
    assert len(again.asked) == 3
    assert json.loads(kept.read_text().splitlines()[0]).keys() == {"key", "text"}


def test_an_answer_without_a_rating_is_worth_nothing_and_counted(tmp_path: Path) -> None:
    chatty = Scripted()
    chatty.wordy = "the CONTINUATION read"
    found = judge_texts(chatty, "riches", ["One"], ["gold"], tmp_path / "kept.jsonl")
    assert (found.unread, found.score.tolist(), found.ratings["concept"].tolist()) == (1, [0], [2])


@pytest.mark.parametrize(("says", "got"), [(None, "got none"), ("It is fine.", "'It is fine.'")])
def test_a_judge_that_rates_nothing_is_none(tmp_path: Path, says: str | None, got: str) -> None:
    with pytest.raises(EndpointError, match=f"scripted.*{got}"):
        judge_texts(Scripted(says), "riches", ["One"], ["gold"], tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("answer", "rating"),
    [("Rating: [[2]]", 2), ("[[ 0 ]]", 0), ("[[0]] at first. Rating: [[1]]", 1), ("Rating: 1", 1), ("rating: **2**", 2),
     ("Rating: [[3]]", None), ("2", None), ("", None), ("Rating: 12", None)],
)  # fmt: skip
def test_the_last_rating_counts(answer: str, rating: int | None) -> None:
    assert read_rating(answer) == rating


def test_a_zero_makes_the_score_zero() -> None:
    assert harmonic_mean(np.array([[1.0, 2, 0], [1, 2, 2], [1, 2, 2]])).tolist() == pytest.approx([1, 2, 0])


def test_which_judge_is_meant(tiny: LoadedModel, tiny_llama: Path) -> None:
    here = open_judge(ChatModelConfig(model=f"local:{tiny_llama}"), tiny, str(tiny_llama), "cpu")
    assert isinstance(here, LocalChat)
    away = open_judge(ChatModelConfig(model="gpt", base_url="http://127.0.0.1:9/v1"), tiny, str(tiny_llama), "cpu")
    assert isinstance(away, Endpoint)
