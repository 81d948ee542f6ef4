"""Instructions as vectors: at which tokens they are read, and what is reported of them."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from activations.errors import TextError
from activations.hook_points import HookPoint
from activations.models import LoadedModel
from steer.making import modifier
from steer.making.modifier import (
    READS,
    Answered,
    Request,
    answer,
    from_modifier,
    from_places,
    load_requests,
    recovered,
    request_prompt,
)
from steer.measures.effect import reread
from steer.vectors import SteeringVector

REQUESTS = [Request(text, split) for text, split in [
    ("Why do cats purr?", "fit"), ("How do I boil an egg?", "heldout"), ("What is a pond?", "fit"),
    ("Where is the sea?", "heldout"), ("Who made the road?", "fit"),
]]  # fmt: skip
POINT = HookPoint.parse("resid_post.2")


def answered(loaded: LoadedModel, request: str, ours: str = " It is so.", theirs: str = " No, never.") -> Answered:
    prompts = request_prompt(loaded, request, "Be kind."), request_prompt(loaded, request)
    return Answered(*prompts, ours, theirs, "fit")


def hidden(loaded: LoadedModel, prompt: str, text: str = "") -> torch.Tensor:
    ids = torch.tensor([loaded.tokenizer(prompt + text)["input_ids"]])
    with torch.no_grad():
        x = loaded.model(ids, output_hidden_states=True).hidden_states[3][0]
    return x[len(loaded.tokenizer(prompt)["input_ids"]) :] if text else x[-1]


def test_each_reading_is_the_difference_that_it_says(tiny: LoadedModel) -> None:
    some = [answered(tiny, "Why do cats purr?"), answered(tiny, "What?", " It may be.", " No one knows it at all.")]
    found = {read: function(tiny, POINT, some) for read, function in READS.items()}
    for i, each in enumerate(some):
        with_it = hidden(tiny, each.modified, each.modified_answer).mean(0)
        without = hidden(tiny, each.plain, each.modified_answer).mean(0)
        other = hidden(tiny, each.plain, each.plain_answer).mean(0)
        ends = hidden(tiny, each.modified) - hidden(tiny, each.plain)
        expected = {"answer": with_it - without, "prompt": ends, "text": without - other}
        for read, d in found.items():
            np.testing.assert_allclose(d[i], expected[read].numpy(), atol=1e-4, err_msg=read)


def test_a_vector_says_how_far_it_can_be_believed(tiny: LoadedModel) -> None:
    vector = from_modifier(tiny, "resid_post.2", "kind", REQUESTS, "Be kind.", max_new_tokens=6)
    source = vector.source
    assert np.linalg.norm(vector.direction) == pytest.approx(1, abs=1e-5)
    assert (source["kind"], source["modifier"], source["place"], source["read"]) == (
        "modifier", "Be kind.", "user", "answer",
    )  # fmt: skip
    assert source["pairs"] + source["n_heldout"] + source["dropped"] == len(REQUESTS)
    assert {"stability", "reader_auroc", "anti_steerable", "gained_by_prompt", "gained_by_vector"} <= source.keys()
    json.dumps(source)
    fit = [each for each in answer(tiny, REQUESTS, "Be kind.", "user", max_new_tokens=6, seed=0) if each.split == "fit"]
    d = READS["answer"](tiny, POINT, fit).mean(0)
    np.testing.assert_allclose(vector.direction, d / np.linalg.norm(d), atol=1e-4)
    sides = [
        np.stack([hidden(tiny, each.plain, text).mean(0).numpy() for each, text in some])
        for some in ([(e, e.modified_answer) for e in fit], [(e, e.plain_answer) for e in fit])
    ]
    along = (sides[0] - sides[1]).mean(0)
    reader = vector.reader
    assert reader is not None
    assert reader.hook_point == vector.hook_point
    np.testing.assert_allclose(reader.direction, along / np.linalg.norm(along), atol=1e-4)
    assert reader.midpoint == pytest.approx(float((sum(sides) @ reader.direction).mean() / 2), abs=1e-3)


def test_the_place_is_chosen_on_requests_to_fit_and_reported_on_others(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fake(loaded: Any, vector: SteeringVector, some: list[Answered], doses: Sequence[float], seed: int) -> Any:
        is_fit, is_user = some[0].split == "fit", vector.source["place"] == "user"
        best, share = 0.06 if is_fit else 0.25, 0.2 if is_fit == is_user else 0.4
        gained = {dose: 0.5 if dose == best else 0.1 for dose in doses}
        return {x: {"gained_by_prompt": 1.0, "gained_by_vector": gained[x], "recovered": share} for x in doses}

    monkeypatch.setattr(modifier, "recovered", fake)
    vector = from_places(tiny, "resid_post.2", "kind", REQUESTS, "Be kind.", max_new_tokens=4)
    alone = from_modifier(tiny, "resid_post.2", "kind", REQUESTS, "Be kind.", place="system", max_new_tokens=4)
    assert vector.source["place"] == "system", "the better of 0.2 and 0.4 on the requests to fit"
    assert vector.source["recovered_dose"] == 0.06, "the best for the requests to fit"
    assert vector.source["gained_by_vector"] == 0.1
    np.testing.assert_array_equal(vector.direction, alone.direction)
    assert {place: (row["recovered_fit"], row["recovered"]) for place, row in vector.source["places"].items()} == {
        "user": (0.2, 0.4), "system": (0.4, 0.2)
    }  # fmt: skip
    json.dumps(vector.source)


def test_what_is_recovered_is_a_share_of_what_the_instruction_gains(tiny: LoadedModel, vector: SteeringVector) -> None:
    some = [answered(tiny, text) for text, _ in REQUESTS]
    found = recovered(tiny, vector, some, (0.1, 0.3), 0)[0.3]
    costs = {}
    for name, prompts in (("prompt", [each.modified for each in some]), ("plain", [each.plain for each in some])):
        readings = reread(tiny, POINT, prompts, [each.modified_answer for each in some])
        costs[name] = np.array([reading.nll for reading in readings])
    gained = float((costs["plain"] - costs["prompt"]).mean())
    assert found["gained_by_prompt"] == pytest.approx(gained, abs=1e-5)
    expected = found["gained_by_vector"] / gained if gained > 0 else None
    assert found["recovered"] == (expected if expected is None else pytest.approx(expected))
    turned = [each._replace(modified=each.plain, plain=each.modified) for each in some]
    again = recovered(tiny, vector, turned, (0.3,), 0)[0.3]
    assert again["gained_by_prompt"] == pytest.approx(-gained, abs=1e-5)
    assert {found["recovered"] is None, again["recovered"] is None} == {True, False}


def test_where_the_instruction_stands(tiny: LoadedModel) -> None:
    plain, user, system = (
        request_prompt(tiny, "Why?", *args) for args in ((), ("Be kind.", "user"), ("Be kind.", "system"))
    )
    assert "Be kind." not in plain
    assert user.index("Why?") < user.index("Be kind.")
    assert system.index("Be kind.") < system.index("Why?")


def test_the_token_in_front_of_every_text_is_there_once(tiny: LoadedModel) -> None:
    class Template:
        bos_token, bos_token_id, chat_template = "<b>", 0, "x"

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [0] * add_special_tokens + [*range(1, len(text) + 1)]}

        def decode(self, ids: list[int]) -> str:
            return "".join({0: "<b>"}[token] for token in ids)

        def apply_chat_template(self, turns: list[dict[str, str]], **_: object) -> str:
            return "<b>" + "".join(turn["content"] for turn in turns) + "<a>"

    assert request_prompt(replace(tiny, tokenizer=Template()), "Why?") == "Why?<a>"


def test_a_model_that_answers_nothing_is_refused(tiny: LoadedModel) -> None:
    class Mute:
        """What is generated is no text."""

        def __init__(self, inner: object) -> None:
            self._inner = inner

        def __getattr__(self, name: str) -> object:
            return getattr(self._inner, name)

        def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
            return {"input_ids": [1, 2, 3] if text else []}

        def batch_decode(self, rows: list[list[int]], **_: object) -> list[str]:
            return ["" for _ in rows]

    mute = replace(tiny, tokenizer=Mute(tiny.tokenizer))
    with pytest.raises(TextError, match="answers of its own"):
        from_modifier(mute, "resid_post.2", "x", REQUESTS, "Be.", max_new_tokens=3)


def test_shipped_requests() -> None:
    requests = load_requests("requests")
    assert [each.split for each in requests].count("fit") == len(requests) / 2 == 24
    assert len({each.text for each in requests}) == 48


def test_requests_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "b"}\n{"text": "c", "split": "heldout"}\n')
    assert load_requests(str(path)) == [Request("a", "fit"), Request("b", "heldout"), Request("c", "heldout")]


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"texts": "a"}', '{"text": ""}', '{"text": "a"}', '{"text": 3}\n{"text": 3}']
)
def test_other_files_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "mine.jsonl").write_text(content)
    with pytest.raises(TextError, match=r"mine\.jsonl"):
        load_requests(str(tmp_path / "mine.jsonl"))
    with pytest.raises(TextError, match="requests"):
        load_requests("nothing")
