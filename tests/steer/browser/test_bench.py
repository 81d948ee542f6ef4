"""The steering bench's API on a tiny model."""

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from activations.models import LoadedModel
from steer.browser import bench_runs
from steer.browser.app import create_app
from steer.browser.guard import Account
from steer.browser.model import SharedModel
from steer.browser.people import single
from steer.browser.sources import Opened
from steer.composition import cosines
from steer.gates import Gate
from steer.generate import generate, streaming
from steer.library import load_library, save_library
from steer.listening import LOOPBACK
from steer.operations import Intervention
from steer.vectors import SteeringVector
from tests.steer.browser.conftest import TOKEN, serving


@pytest.fixture
def library(tmp_path: Path, pushing: SteeringVector, vector: SteeringVector) -> Path:
    bounded = replace(pushing, name="bounded", coefficient=2.0, window=(1.0, 3.0), receipts=[{"effect": 0.1}])
    save_library(tmp_path / "library", [pushing, vector, bounded])
    save_library(tmp_path / "broken", [])
    return tmp_path / "library"


@pytest.fixture
def shared(tiny: LoadedModel) -> SharedModel:
    return SharedModel(tiny.id, "cpu", tiny)


@pytest.fixture
def client(library: Path, shared: SharedModel) -> Iterator[httpx.Client]:
    app = create_app(
        Opened({}, (library, library.parent / "broken")), single(Account("ada", "admin"), TOKEN), LOOPBACK, shared
    )
    with serving(app) as where, _client(where) as found:
        yield found


def _client(where: Any) -> httpx.Client:
    return httpx.Client(base_url=where, headers={"authorization": f"Bearer {TOKEN}"}, timeout=60)


def asked(**changes: Any) -> dict[str, Any]:
    item = {"vector": "0/push", "dose": 0.5}
    return {"basket": [item], "prompt": "the river", "chat": False, "max_new_tokens": 12, "temperature": 0} | changes


def events(response: httpx.Response) -> Iterator[tuple[str, Any]]:
    name = ""
    for line in response.iter_lines():
        if line.startswith("event:"):
            name = line[6:].strip()
        elif line.startswith("data:"):
            yield name, json.loads(line[5:])


def run(client: httpx.Client, body: dict[str, Any]) -> dict[str, Any]:
    with client.stream("POST", "/api/bench/stream", json=body) as response:
        assert response.status_code == 200
        return dict(events(response))


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_stream_is_what_generate_writes(
    client: httpx.Client, tiny: LoadedModel, pushing: SteeringVector, temperature: float
) -> None:
    got = run(client, asked(temperature=temperature, seed=3, control=True))["end"]["texts"]
    rows = [[Intervention.of(pushing, 4.0)], []]
    wanted = generate(tiny, ["the river"] * 2, max_new_tokens=12, temperature=temperature, seed=[3, 3], rows=rows)
    assert got[:2] == wanted
    assert len(got) == 3
    assert got[0] != got[1]


def test_two_at_once_get_what_each_gets_alone(client: httpx.Client) -> None:
    bodies = [asked(), asked(basket=[{"vector": "0/up", "dose": 1.0}], temperature=1, seed=5)]
    alone, both = [run(client, body)["end"] for body in bodies], {}
    threads = [threading.Thread(target=lambda i=i: both.update({i: run(client, bodies[i])["end"]})) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [both[0], both[1]] == alone


@pytest.mark.parametrize("start", [0.0, 0.1])
def test_a_dose_changes_from_the_next_token(
    client: httpx.Client, tiny: LoadedModel, pushing: SteeringVector, start: float
) -> None:
    body = asked(basket=[{"vector": "0/push", "dose": start}], max_new_tokens=300)
    at, end = 0, {}
    with client.stream("POST", "/api/bench/stream", json=body) as response:
        for name, data in events(response):
            if name == "begin":
                assert client.post(f"/api/bench/{data['id']}/doses", json={"doses": [1.0]}).status_code == 204
            at = data["at"] if name == "doses" else at
            end = data if name == "end" else end
    assert at > 0
    rows, later, texts = [[Intervention.of(pushing, start * 8)], []], [[Intervention.of(pushing, 8.0)], []], ["", ""]
    with streaming(tiny, ["the river"] * 2, max_new_tokens=300, temperature=0.0, rows=rows, reserve=later[0]) as stream:
        for n, pieces in enumerate(stream.pieces, 1):
            texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
            if n == at:
                stream.steered.set(rows=later, prompt_lengths=stream.prompt_lengths)
    assert end["texts"] == texts


def test_who_goes_away_frees_the_model_and_who_waits_is_told(client: httpx.Client, shared: SharedModel) -> None:
    with client.stream("POST", "/api/bench/stream", json=asked(max_new_tokens=400)) as response:
        next(events(response))
    freed = threading.Event()
    threading.Thread(target=lambda: _use(shared, freed), daemon=True).start()
    assert freed.wait(1)
    with contextlib.ExitStack() as stack:
        stack.enter_context(shared.using())
        response = stack.enter_context(client.stream("POST", "/api/bench/stream", json=asked()))
        assert next(events(response))[0] == "waiting"


def test_a_browser_that_stops_leaves_the_model_as_it_was(
    library: Path, shared: SharedModel, tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_runs, "_gates", lambda steered: time.sleep(0.5) or [])  # it would end by itself
    app = create_app(Opened({}, (library,)), single(Account("ada", "admin"), TOKEN), LOOPBACK, shared)
    with contextlib.ExitStack() as stack:
        with serving(app) as where:
            client = stack.enter_context(_client(where))
            for _ in range(2):  # the second waits for the first
                answer = client.stream("POST", "/api/bench/stream", json=asked(max_new_tokens=400))
                next(events(stack.enter_context(answer)))
            assert "generate" in vars(tiny.model), "it is being steered"
        assert "generate" not in vars(tiny.model)


def _use(shared: SharedModel, freed: threading.Event) -> None:
    with shared.using():
        freed.set()


HOSTILE = [
    asked(prompt=""), asked(prompt="x" * 9000), asked(max_new_tokens=10**9), asked(temperature=-1), asked(seed=-1),
    asked(basket=[{"vector": "0/push"}] * 9), asked(basket=[{}]), asked(basket=[{"vector": "7/push"}]),
    asked(basket=[{"vector": "../push"}]), asked(basket=[{"vector": "0/../push"}]), asked(basket=[{"latent": "x:1"}]),
    asked(basket=[{"vector": "0/push", "dose": 1e9}]), asked(basket=[{"vector": "0/push", "operation": "eval"}]),
    {"basket": "all"}, asked(basket=[{"vector": "0/push", "latent": "a:1"}]), asked(basket=[{"latent": "a:-1"}]),
    asked(basket=[{"vector": "0/push", "scope": "nowhere("}]), asked(prompt="\ud800"),
]  # fmt: skip


@pytest.mark.parametrize("body", HOSTILE)
def test_what_is_hostile_is_refused(client: httpx.Client, body: dict[str, Any]) -> None:
    content = json.dumps(body)
    response = client.post("/api/bench/stream", content=content, headers={"content-type": "application/json"})
    assert 400 <= response.status_code < 500, response.text


def test_interference_tells_the_joint_dose(
    client: httpx.Client, pushing: SteeringVector, vector: SteeringVector
) -> None:
    basket = [{"vector": "0/push", "dose": 0.5}, {"vector": "0/up", "dose": 1.0}]
    found = client.post("/api/bench/interference", json={"basket": basket}).json()
    assert found["items"] == [None, None]
    assert found["together"]["points"]["resid_post.3"]["joint_dose"] == pytest.approx(0.5)
    assert np.array(found["together"]["cosines"]) == pytest.approx(cosines([pushing, vector]), abs=1e-4)
    assert found["together"]["names"] == ["1 push", "2 up"]


def test_what_is_refused_is_told_at_its_item(client: httpx.Client) -> None:
    basket = [{"vector": "0/push", "dose": 0.5}, {"vector": "0/gone"}, {"vector": "0/push", "scope": "nowhere"},
              {"vector": "0/push", "gate": {"on": 0.1, "off": 0.2}}, {"vector": "0/push", "scope": "thinking"},
              {"vector": "0/push", "dose": 3}, {"vector": "0/bounded", "dose": 0.5}]  # fmt: skip

    wrong = [False, True, True, True, True, True, True]
    for body, wanted in (({}, wrong), ({"force": True}, [*wrong[:5], False, False])):
        found = client.post("/api/bench/interference", json={"basket": basket, **body}).json()
        assert [item is not None for item in found["items"]] == wanted
        assert found["together"]["names"][0] == "1 push"


def test_a_vector_may_be_there_twice(client: httpx.Client) -> None:
    item = {"vector": "0/push", "dose": 0.5}
    found = client.post("/api/bench/interference", json={"basket": [item, item]}).json()["together"]
    assert found["cosines"] == [[1, 1], [1, 1]]
    assert found["points"]["resid_post.3"]["joint_dose"] == pytest.approx(1.0)
    assert found["points"]["resid_post.3"]["condition"] is None


def test_changes_of_doses_are_written_again(client: httpx.Client) -> None:
    """Those that were made while a text was written, and what is asked for meanwhile comes before the rest of them."""
    body = asked(basket=[{"vector": "0/push", "dose": 0.0}], max_new_tokens=20)
    changes = [{"at": 4, "doses": [1.0]}, {"at": 9, "doses": [0.0]}]
    with client.stream("POST", "/api/bench/stream", json=body | {"changes": changes}) as response:
        got = list(events(response))
    assert [data for name, data in got if name == "doses"] == [{**each, "planned": True} for each in changes]
    replayed, unsteered = got[-1][1]["texts"]
    once = run(client, body | {"changes": changes[:1]})["end"]["texts"][0]
    assert len({replayed, unsteered, once}) == 3
    pieces = [data["pieces"][0] for name, data in got if name == "token"]
    plain = [data["pieces"][1] for name, data in got if name == "token"]
    assert pieces[:4] == plain[:4]
    for wrong in ([{"at": 4, "doses": []}], [{"at": 0, "doses": [1.0]}], [{"at": 4, "doses": [99]}]):
        assert client.post("/api/bench/stream", json=body | {"changes": wrong}).status_code in (400, 422)


def test_a_dose_that_is_refused_leaves_the_run(client: httpx.Client) -> None:
    body = asked(changes=[{"at": 2, "doses": [3.0]}])
    found = run(client, body)
    assert "dose" in found["refused"]["expected"]
    assert found["end"]["texts"] == run(client, asked())["end"]["texts"]


def test_gates_tell_what_they_read(client: httpx.Client, tiny: LoadedModel, pushing: SteeringVector) -> None:
    gate = {"on": 0.05, "off": 0.01, "tokens": 2}
    body = asked(basket=[{"vector": "0/push", "dose": 0.0, "gate": gate}])
    with client.stream("POST", "/api/bench/stream", json=body) as response:
        got = list(events(response))
    told = [data["gates"][0]["1 push"] for name, data in got if name == "token"]
    rows = [[Intervention.of(pushing, 0.0, gate=pushing.energy_gate(0.05, 0.01, 2))]]
    with streaming(tiny, ["the river"], max_new_tokens=12, temperature=0.0, rows=rows) as stream:
        wanted = [stream.steered.latest()[0]["push"] for _ in stream.pieces]
        n, fired = stream.prompt_lengths[0], stream.steered.fired()[0]["push"]
    assert told == [[round(value, 4), is_open] for value, is_open in wanted]
    assert {is_open for _, is_open in told} == {True, False}
    assert [i for i, (_, is_open) in enumerate(told, n - 1) if is_open] == [i for i in fired if i >= n - 1]


def test_one_damaged_library_does_not_hide_the_others(client: httpx.Client, library: Path) -> None:
    manifest = library.parent / "broken" / "manifest.json"
    found = client.get("/api/bench/catalogue").json()
    assert ([entry["name"] for entry in found["vectors"]], found["problems"]) == (["push", "up", "bounded"], [])
    manifest.write_text("{")
    found = client.get("/api/bench/catalogue").json()
    assert [entry["name"] for entry in found["vectors"]] == ["push", "up", "bounded"]
    assert [(each["library"], each["name"]) for each in found["problems"]] == [(1, "broken")]
    assert "JSON" in found["problems"][0]["detail"]["got"]


def test_saving_adds_and_never_overwrites(client: httpx.Client, library: Path) -> None:
    body = {"library": 0, "basket": [{"vector": "0/push", "dose": 0.25}], "names": ["mild"]}
    assert client.post("/api/bench/save", json=body).status_code == 200
    saved = load_library(library)["mild"]
    assert (saved.coefficient, saved.source["bench"]["by"]) == (2.0, "ada")
    before = (library / "manifest.json").read_bytes()
    for names in (
        ["mild"],
        ["mild@resid_post.3"],
        ["x@resid_post.1"],
        ["x@y"],
        ["../x"],
        ["a/b"],
        [".."],
        [],
        ["a\\b"],
    ):
        assert 400 <= client.post("/api/bench/save", json=body | {"names": names}).status_code < 500
    assert client.post("/api/bench/save", json=body | {"library": 9, "names": ["z"]}).status_code == 404
    assert (library / "manifest.json").read_bytes() == before


def test_what_was_measured_stays_only_with_what_was_measured(client: httpx.Client, library: Path) -> None:
    items = [{"dose": 0.3}, {"scope": "generated"}, {"operation": "rotate"}, {"gate": {"on": 0.4, "off": 0.3}}]
    for number, item in enumerate(items):
        body = {"library": 0, "basket": [{"vector": "0/bounded", **item}], "names": [f"n{number}@resid_post.3"]}
        assert client.post("/api/bench/save", json=body).status_code == 200
    saved = [load_library(library)[f"n{number}@resid_post.3"] for number in range(4)]
    assert [len(vector.receipts) for vector in saved] == [1, 0, 0, 0]
    assert [vector.window for vector in saved] == [(1.0, 3.0), (1.0, 3.0), None, (1.0, 3.0)]
    assert [vector.scope for vector in saved] == ["all", "generated", "all", "all"]
    gate = saved[3].gate
    assert isinstance(gate, Gate)
    assert (gate.on, gate.off, gate.name) == (0.4, 0.3, "bounded")
    assert saved[0].gate is None


def test_gates_open_and_shut_each_for_itself(client: httpx.Client) -> None:
    """An open one changes nothing, a shut one leaves the unsteered text, and two of one vector are two."""
    free = run(client, asked())["end"]["texts"]
    item = {"vector": "0/push", "dose": 0.5}
    opened, shut = ({**item, "gate": {"on": on}} for on in (-1.0, 1e6))
    with_open = run(client, asked(basket=[opened], control=True))["end"]
    assert with_open["texts"][:2] == free
    assert with_open["fired"][0]["1 push"]
    assert run(client, asked(basket=[shut]))["end"]["texts"] == [free[1], free[1]]
    both = run(client, asked(basket=[opened, shut]))["end"]
    assert both["texts"] == free
    assert (bool(both["fired"][0]["1 push"]), both["fired"][0]["2 push"]) == (True, [])


@pytest.fixture
def parts(library: Path, vector: SteeringVector, pushing: SteeringVector) -> list[SteeringVector]:
    """A group of two in the library, the lead at the earlier hook point."""
    found = [replace(vector, name="calm@resid_post.1", coefficient=4.0, window=(2.0, 6.0)),
             replace(pushing, name="calm@resid_post.3", coefficient=2.0)]  # fmt: skip
    save_library(library, [*load_library(library).values(), *found[::-1]])
    return found


def test_a_group_is_one_entry_with_the_dose_of_its_lead(client: httpx.Client, parts: list[SteeringVector]) -> None:
    entries = {entry["name"]: entry for entry in client.get("/api/bench/catalogue").json()["vectors"]}
    assert list(entries) == ["push", "up", "bounded", "calm"]
    calm, lead = entries["calm"], parts[0]
    assert (calm["ref"], calm["hook_points"]) == ("0/calm", ["resid_post.1", "resid_post.3"])
    assert calm["dose"] == pytest.approx(lead.dose(4.0))
    assert calm["window"] == pytest.approx([lead.dose(2.0), lead.dose(6.0)])


def test_a_group_steers_at_one_common_factor(
    client: httpx.Client, tiny: LoadedModel, parts: list[SteeringVector]
) -> None:
    dose = 1.5 * parts[0].dose(4.0)
    got = run(client, asked(basket=[{"vector": "0/calm", "dose": dose}], control=True))["end"]["texts"]
    rows = [[Intervention.of(parts[0], 6.0), Intervention.of(parts[1], 3.0)], []]
    assert got[:2] == generate(tiny, ["the river"] * 2, max_new_tokens=12, temperature=0.0, rows=rows)
    weighed = client.post("/api/bench/interference", json={"basket": [{"vector": "0/calm", "dose": dose}]}).json()
    assert weighed["items"] == [None]
    assert weighed["together"]["names"] == ["1 calm@resid_post.1", "1 calm@resid_post.3"]


def test_a_group_is_saved_as_one(client: httpx.Client, library: Path, parts: list[SteeringVector]) -> None:
    dose = 0.5 * parts[0].dose(4.0)
    body = {"library": 0, "basket": [{"vector": "0/calm", "dose": dose}], "names": ["calmer"]}
    (entry,) = client.post("/api/bench/save", json=body).json()
    assert (entry["ref"], entry["hook_points"]) == ("0/calmer", ["resid_post.1", "resid_post.3"])
    saved = load_library(library)
    assert [saved[f"calmer@resid_post.{i}"].coefficient for i in (1, 3)] == pytest.approx([2.0, 1.0])
    answer = client.post("/api/bench/save", json={**body, "names": ["other@resid_post.1"]})
    assert answer.json()["detail"]["expected"] == "a name, of a group"
