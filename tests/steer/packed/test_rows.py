"""Tokens of many requests behind each other are steered as each request is by itself.

Every test runs with operations of PyTorch and with the kernel, in Triton's interpreter.
"""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from activations.hook_points import HookPoint
from activations.hooks import capture, run_until
from activations.models import LoadedModel
from steer.packed import kernel, tables
from steer.packed.rows import Room, Rows
from steer.packed.tables import Sizes
from steer.runtime import steering
from steer.serving.items import Asked
from steer.vllm.catalogue import Catalogue
from steer.vllm.request import read_request

READ, POINT = HookPoint("resid_post", 0), HookPoint("resid_post", 1)
TEXTS = [
    "The river ran past the mill and on to the sea.", "A cat sat on the mat", "Numbers such as 12 and 345",
    "def add(a, b): return a", "The mill", "The sea ran past the cat and the dog on the mat",
    "<|im_start|>user\nThe mill<|im_end|>\n<|im_start|>assistant\nThe sea<|im_end|>\n<|im_start|>assistant\n12",
    "A cat<|im_end|><|im_start|>user\nand the dog on the mat<|im_end|>\n",
]  # fmt: skip
Items = list[dict[str, Any]]
ITEMS: list[Items] = [
    [], [{"vector": "plus", "dose": 0.7}, {"vector": "some"}], [{"vector": "gated", "dose": 1.5}, {"vector": "out"}],
    [{"vector": "late"}, {"vector": "turn", "dose": 0.5}], [{"vector": "early"}],
    [{"latent": 3, "clamp": 5.0, "gate": {"on": 0.2, "off": 0.1, "tokens": 3}}],
    [{"vector": "chat", "dose": 0.8}, {"vector": "plus", "scope": "user"}],
    [{"vector": "gated", "dose": 1.5, "scope": "user"}, {"vector": "plus", "dose": 0.7}],
]  # fmt: skip


@pytest.fixture(params=["operations", "kernel"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "kernel":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr(tables, "has_kernel", lambda value: True)
    return request.param


def request(items: Items) -> Asked:
    return read_request({"steer": items})


@pytest.fixture(scope="module")
def expected(tiny: LoadedModel, catalogue: Catalogue) -> list[dict[str, Any]]:
    return alone(tiny, catalogue, ITEMS)


def alone(tiny: LoadedModel, catalogue: Catalogue, several: Sequence[Items]) -> list[dict[str, Any]]:
    """By text: the prompt's length, what the two hook points hold without steering, and one of them with it."""
    found = []
    for text, items in zip(TEXTS, several, strict=True):
        ids = tiny.tokenizer(text, return_tensors="pt")["input_ids"]
        n_prompt = ids.shape[1] // 2
        with capture(tiny.model, tiny.family, [READ, POINT]) as plain:
            run_until(tiny.model, {"input_ids": ids})
            before = {point: plain[point][0].clone() for point in (READ, POINT)}
        with steering(tiny, catalogue.interventions(request(items)), prompt_lengths=[n_prompt]) as steered:
            with capture(tiny.model, tiny.family, [POINT]) as moved:
                run_until(tiny.model, {"input_ids": ids})
            fired = steered.fired()
        told = {"items": items, "ids": ids[0], "n_prompt": n_prompt, "fired": fired}
        found.append({**told, **before, "moved": moved[POINT][0].clone()})
    return found


def rows_for(tiny: LoadedModel, catalogue: Catalogue, n_captured: int | None) -> Rows:
    """With all room from the start, for graphs of so many tokens; none: with next to nothing, so that it grows."""
    if n_captured is None:
        return Rows([], Sizes(tiny.d_model, 256, 1, 0, 0))
    return Rows(catalogue.points, Sizes(tiny.d_model, 256, len(TEXTS), 4, n_captured), catalogue.lanes)


def keep(rows: Rows, catalogue: Catalogue, expected: Sequence[dict[str, Any]], which: Sequence[int]) -> None:
    for i in which:
        asked = request(expected[i]["items"])
        rows.keep(f"r{i}-12345678", lambda: catalogue.prepare(asked, expected[i]["n_prompt"]))  # noqa: B023


def run(
    rows: Rows, expected: Sequence[dict[str, Any]], spans: dict[int, tuple[int, int]], share: float
) -> list[Tensor]:
    """One pass over some tokens of each sequence, whose stream is `share` in the one and the rest in the other part."""
    counts = [high - low for low, high in spans.values()]
    positions = torch.tensor([*chain(*(range(low, high) for low, high in spans.values()))])
    ids = torch.cat([expected[i]["ids"][low:high] for i, (low, high) in spans.items()])
    rows.prepare([f"r{i}-12345678" for i in spans], counts, lambda n: positions[:n], lambda n: ids[:n])
    for point in (READ, POINT):
        whole = torch.cat([expected[i][point][low:high] for i, (low, high) in spans.items()])
        hidden, residual = share * whole, whole - share * whole
        if point in rows.sites:
            rows.sites[point].act(hidden, residual)
    return [*(hidden + residual).split(counts)]


def chunks(lengths: Sequence[int], sizes: Sequence[int]) -> list[dict[int, tuple[int, int]]]:
    """Passes over the sequences, in chunks whose sizes go round."""
    done, passes, step = [0] * len(lengths), [], 0
    while any(a < b for a, b in zip(done, lengths, strict=True)):
        spans = {}
        for i, length in enumerate(lengths):
            take = min(sizes[(i + step) % len(sizes)], length - done[i])
            if take:
                spans[i], done[i] = (done[i], done[i] + take), done[i] + take
        passes.append(dict(reversed(spans.items())) if step % 2 else spans)
        step += 1
    return passes


def run_all(rows: Rows, expected: Sequence[dict[str, Any]], sizes: Sequence[int]) -> list[Tensor]:
    """Every sequence, in chunks of these sizes."""
    got: list[list[Tensor]] = [[] for _ in expected]
    for spans in chunks([len(each["moved"]) for each in expected], sizes):
        for i, part in zip(spans, run(rows, expected, spans, 0.3), strict=True):
            got[i].append(part)
    return [torch.cat(parts) for parts in got]


@pytest.mark.parametrize("n_captured", [0, 256, None])
@pytest.mark.parametrize("sizes", [[256], [1], [3, 0, 7, 2]])
def test_a_mixed_batch_equals_each_request_by_itself(
    tiny: LoadedModel, catalogue: Catalogue, expected: list[dict[str, Any]], sizes: list[int], n_captured: int | None
) -> None:
    rows = rows_for(tiny, catalogue, n_captured)
    keep(rows, catalogue, expected, range(len(TEXTS)))
    got = run_all(rows, expected, sizes)
    for i, each in enumerate(expected):
        torch.testing.assert_close(got[i], each["moved"], atol=2e-5, rtol=0)
        if each["fired"] and any(each["fired"][0].values()):
            assert rows.fired(f"r{i}") == each["fired"][0]
    assert {name: len(found) > 0 for i in (2, 5, 7) for name, found in (rows.fired(f"r{i}") or {}).items()} == {
        "1 probing": True, "1 latent-3": True
    }  # fmt: skip


@pytest.mark.parametrize("names", [["encoded"], ["across"], ["encoded", "across"]])
@pytest.mark.parametrize(("sizes", "n_captured"), [([256], 256), ([3, 0, 7, 2], 256), ([3, 0, 7, 2], None)])
def test_so_does_one_of_latents_that_are_encoded_or_read_elsewhere(
    tiny: LoadedModel, library: Path, apart: dict[str, Path], way: str, monkeypatch: pytest.MonkeyPatch,
    names: list[str], sizes: list[int], n_captured: int | None,
) -> None:  # fmt: skip
    ran = []
    if way == "kernel":
        steer = kernel.run
        monkeypatch.setattr(kernel, "run", lambda *given: (ran.append(given[2]), steer(*given)))
    catalogue = Catalogue(tiny, [str(library), *(str(apart[name]) for name in names)], 4)
    latent = f"{names[-1]}/5"
    gate = {"on": 0.2, "off": 0.1, "tokens": 2}
    items: list[Items] = [
        [], [{"latent": f"{names[0]}/2", "clamp": 4.0}], [{"latent": latent, "scale": 0.0}, {"vector": "plus"}],
        [{"latent": latent, "clamp": 3.0, "scope": "generated"}], [{"vector": "turn"}],
        [{"latent": f"{names[0]}/7", "clamp": 5.0, "gate": gate}, {"latent": latent, "clamp": 2.0}],
        [{"latent": f"{name}/{i}", "scale": 2.0} for name in names for i in (1, 6)],
        [{"latent": latent, "clamp": 3.0, "scope": "user"}, {"vector": "out"}, {"latent": "small/3", "clamp": 1.0}],
    ]  # fmt: skip
    expected = alone(tiny, catalogue, items)
    rows = rows_for(tiny, catalogue, n_captured)
    keep(rows, catalogue, expected, range(len(TEXTS)))
    got = run_all(rows, expected, sizes)
    for i, each in enumerate(expected):
        torch.testing.assert_close(got[i], each["moved"], atol=2e-5, rtol=0)
        assert torch.equal(each["moved"], each[POINT]) == (i == 0)
    taken = {lane.key.reads_apart for lanes in ran for lane in lanes}
    assert True in taken or way == "operations" or len(names) > 1, "the kernel acts on what it is given"


def test_what_is_not_steered_keeps_its_bits(
    tiny: LoadedModel, catalogue: Catalogue, expected: list[dict[str, Any]]
) -> None:
    for n_captured in (0, 256, None):
        rows = rows_for(tiny, catalogue, n_captured)
        keep(rows, catalogue, expected, [1])
        spans = {0: (0, len(expected[0]["moved"])), 1: (0, 5)}
        plain, steered = run(rows, expected, spans, 1.0)
        assert torch.equal(plain, expected[0][POINT])
        assert torch.equal(steered[0], expected[1][POINT][0]), "the first token is never steered"
        assert not torch.equal(steered[1:], expected[1][POINT][1:5])


def test_room_that_is_given_back_steers_nobody_and_is_taken_again(
    tiny: LoadedModel, catalogue: Catalogue, expected: list[dict[str, Any]]
) -> None:
    rows = rows_for(tiny, catalogue, None)
    keep(rows, catalogue, expected, [1, 2])
    whole = {i: (0, len(expected[i]["moved"])) for i in (1, 2)}
    first = run(rows, expected, whole, 1.0)
    rows.release([f"r{i}-12345678" for i in whole], finished=True)
    assert not any(site.acting or site.gated_rows for site in rows.sites.values())
    assert rows.batch.n_flags == 0
    for got, i in zip(run(rows, expected, whole, 1.0), whole, strict=True):
        assert torch.equal(got, expected[i][POINT])
    assert rows.fired("r2") == expected[2]["fired"][0]
    keep(rows, catalogue, expected, [5])
    assert rows.fired("r5") == {"1 latent-3": []}, "of those who had its room before, nothing is told"
    rows.release(["r5-12345678"], finished=True)
    keep(rows, catalogue, expected, [2, 1])
    for got, again in zip(first, run(rows, expected, whole, 1.0), strict=True):
        torch.testing.assert_close(got, again, atol=1e-6, rtol=0)


def test_room_grows_while_gates_are_open(
    tiny: LoadedModel, catalogue: Catalogue, expected: list[dict[str, Any]]
) -> None:
    rows = rows_for(tiny, catalogue, None)
    keep(rows, catalogue, expected, [2])
    (first,) = run(rows, expected, {2: (0, 5)}, 1.0)
    keep(rows, catalogue, expected, range(len(TEXTS)))
    rest = run(rows, expected, {i: (5 if i == 2 else 0, len(each["moved"])) for i, each in enumerate(expected)}, 1.0)
    rest[2] = torch.cat([first, rest[2]])
    for got, each in zip(rest, expected, strict=True):
        torch.testing.assert_close(got, each["moved"], atol=2e-5, rtol=0)
    assert rows.fired("r2") == expected[2]["fired"][0]


def test_a_preempted_request_starts_anew(
    tiny: LoadedModel, catalogue: Catalogue, expected: list[dict[str, Any]]
) -> None:
    rows = rows_for(tiny, catalogue, 0)
    keep(rows, catalogue, expected, [2])
    run(rows, expected, {2: (0, 9)}, 1.0)
    rows.release(["r2-12345678"], finished=False)
    fired = {name: [i for i in at if i < 9] for name, at in expected[2]["fired"][0].items()}
    assert any(fired.values())
    assert rows.fired("r2") == fired
    keep(rows, catalogue, expected, [2])
    run(rows, expected, {2: (0, 3)}, 1.0)
    assert rows.fired("r2") == fired, "what is computed again is told once"
    rows.release(["r2-12345678"], finished=False)
    keep(rows, catalogue, expected, [2])
    (got,) = run(rows, expected, {2: (0, len(expected[2]["moved"]))}, 1.0)
    torch.testing.assert_close(got, expected[2]["moved"], atol=2e-5, rtol=0)
    rows.release(["r2-12345678"], finished=True)
    assert rows.fired("r2") == expected[2]["fired"][0]


def test_numbers_in_use_lie_together() -> None:
    room = Room()
    first, second = room.take(3), room.take(2)
    assert (first, second, room.end) == ([0, 1, 2], [3, 4], 5)
    room.give(first)
    assert (room.take(1), room.end) == ([0], 5)
    room.give(second)
    assert room.end == 1
