"""Labelling an index by a stand-in for an endpoint, which fails and is gone on with, and by a local model."""

import asyncio
import json
import shutil
import sqlite3
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from activations.errors import ConfigError, EndpointError, InterruptedRunError, MismatchError, UnknownNameError
from sae import label as label_module
from sae.artefact import SaeArtefact
from sae.index_db import FILE_NAME, FeatureIndex
from sae.label import estimate, label
from sae.labels.config import LabelConfig
from sae.labels.store import LabelStore
from tests.sae.labels.conftest import D_SAE, DEAD, Indexed
from tests.sae.labels.stand_in import Fault, StandIn, stand_in

N_LATENTS = 4
METHODS = ("detection", "fuzzing", "intervention", "embedding", "intruder")


def answer(body: dict[str, Any]) -> str:
    """An explanation that no other latent has; yes to whatever else."""
    system, user = (message["content"] for message in body["messages"])
    if "begins with 'Explanation:'" in system:
        return f"Explanation: quaint thing {zlib.crc32(user.encode())}"
    if "A or B" in system:
        return "A"
    return "\n".join(f"{i}: yes" for i in range(1, len(user.split("Texts:\n")[1].split("\n\n")[0].splitlines()) + 1))


@pytest.fixture
def server() -> Iterator[StandIn]:
    with stand_in(answer) as server:
        yield server


@pytest.fixture
def settings(indexed: Indexed, tmp_path: Path, server: StandIn) -> dict[str, Any]:
    shutil.copytree(indexed.index, tmp_path / "index")
    return {
        "index": tmp_path / "index",
        "sae": indexed.sae,
        "model": indexed.loaded.spec,
        "explainer": {"model": "gpt", "base_url": server.url, "concurrency": 3, "price_in": 1, "price_out": 2},
        "n_latents": N_LATENTS,
        "max_density": 1,
        "scoring": {"n_positives": 5, "per_prompt": 4, "pool": 30, "n_prompts": 2, "max_new_tokens": 4},
    }


Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(indexed: Indexed, settings: dict[str, Any]) -> Run:
    return lambda **more: label(LabelConfig.model_validate({**settings, **more}), indexed.loaded)


def rows(settings: dict[str, Any], query: str) -> list[Any]:
    with sqlite3.connect(settings["index"] / FILE_NAME) as database:
        return database.execute(query).fetchall()


def test_a_run_labels_scores_and_tells(run: Run, settings: dict[str, Any], server: StandIn) -> None:
    result = run()
    assert (result["latents"], result["explained"], result["too_rare"], result["not_reached"]) == (4, 4, 0, 0)
    assert result["requests_answered"] == len(server.bodies) == sum(server.answered.values())
    assert result["tokens_in"] == 100 * len(server.bodies)
    assert result["cost"] == pytest.approx(1e-6 * (100 + 2 * 7) * len(server.bodies))
    scores = result["scores"]
    for method in ("detection", "fuzzing", "intervention"):
        chance = "always B" if method == "intervention" else "always no"
        for name in (method, f"{method}, shuffled", f"{method}, tokens", f"{method}, {chance}"):
            assert scores[name]["value"] == 0.5, name
        assert scores[method]["measure"] == "balanced_accuracy"
        assert (scores[method]["latents"], scores[method]["failed_parses"]) == (4, 0)
        assert scores[f"{method}, gain over shuffled"]["value"] == 0
    assert scores["intruder, guessing"]["value"] == 0.2
    assert 0 <= scores["embedding"]["value"] <= 1
    assert "explanation" not in json.dumps(rows(settings, "SELECT messages FROM requests WHERE purpose = 'amplified'"))
    index = FeatureIndex.open(settings["index"])
    for each in result["labels"]:
        labels = index.labels(each["latent"])
        assert [one.kind for one in labels] == ["tokens", "logits", "explanation"]
        assert (labels[2].text, labels[2].author) == (each["explanation"], "gpt")
        assert {score.method for score in labels[2].scores} == set(METHODS)
        assert each["latent"] in index.search(each["explanation"])
    assert index.labels(DEAD)[0].kind == "logits"
    index.close()
    assert len(rows(settings, "SELECT DISTINCT latent FROM labels WHERE kind = 'logits'")) == D_SAE
    assert "base_url" in (settings["index"] / "label.yaml").read_text()


def test_the_same_run_again_asks_and_writes_nothing(run: Run, settings: dict[str, Any], server: StandIn) -> None:
    first, n = run(), len(server.bodies)
    counts = [rows(settings, f"SELECT count(*) FROM {table}") for table in ("labels", "scores", "requests")]
    again = run()
    assert len(server.bodies) == n
    assert counts == [rows(settings, f"SELECT count(*) FROM {table}") for table in ("labels", "scores", "requests")]
    assert (again["scores"], again["labels"]) == (first["scores"], first["labels"])
    assert again["requests_answered"] == 0
    more = run(n_latents=N_LATENTS + 2)
    assert [each["latent"] for each in more["labels"][:N_LATENTS]] == [each["latent"] for each in first["labels"]]
    assert more["explained"] == N_LATENTS + 2


def test_an_estimate_comes_first_writes_nothing_and_holds(
    run: Run,
    indexed: Indexed,
    settings: dict[str, Any],
    server: StandIn,
) -> None:
    before = (settings["index"] / FILE_NAME).read_bytes()
    found = estimate(LabelConfig.model_validate(settings), indexed.loaded)
    assert (settings["index"] / FILE_NAME).read_bytes() == before
    assert not (settings["index"] / "label.yaml").exists()
    assert server.bodies == []
    run()
    # Labels of several latents may be the same, and are then asked about once.
    assert found["requests"] == pytest.approx(len(server.bodies), rel=0.1)
    letters = sum(len(message["content"]) for body in server.bodies for message in body["messages"])
    assert found["tokens_in"] == pytest.approx(letters / 3, rel=0.3)
    assert found["tokens_out"] == 100 * found["requests"]
    assert found["cost"] == pytest.approx((found["tokens_in"] + 2 * found["tokens_out"]) / 1e6)
    again = estimate(LabelConfig.model_validate(settings), indexed.loaded)
    assert (again["requests"], again["kept"] > 0) == (0, True)


def test_what_the_budget_stopped_is_gone_on_with(run: Run, settings: dict[str, Any], server: StandIn) -> None:
    stopped = run(budget={"max_tokens": 6000})
    assert stopped["stopped"] == "budget.max_tokens 6,000 has no room for another request"
    assert stopped["tokens_in"] + stopped["tokens_out"] <= 6000
    assert len(server.bodies) >= 10
    scored = rows(settings, "SELECT DISTINCT latent FROM scores WHERE method = 'detection'")
    assert len(scored) < N_LATENTS
    whole = run()
    assert whole["stopped"] is None
    assert set(server.answered.values()) == {1}
    assert whole["scores"]["detection"]["latents"] == N_LATENTS


@pytest.mark.parametrize("tokens", [100, 600])
def test_a_budget_for_less_than_the_explanations_stops_too(run: Run, server: StandIn, tokens: int) -> None:
    stopped = run(budget={"max_tokens": tokens})
    assert stopped["stopped"] is not None
    assert stopped["explained"] + stopped["not_reached"] == N_LATENTS
    assert stopped["not_reached"] > 0
    assert run()["explained"] == N_LATENTS
    assert set(server.answered.values()) == {1}


def test_a_killed_run_goes_on_and_pays_for_no_answer_twice(
    run: Run,
    settings: dict[str, Any],
    server: StandIn,
    start_process: Callable[..., Any],
) -> None:
    passed, hold, lock, n_before = [], threading.Event(), threading.Lock(), 12

    def gate() -> None:
        with lock:
            passed.append(1)
            is_held = len(passed) > n_before
        if is_held and not hold.is_set():
            hold.wait(60)
            raise ConnectionAbortedError  # this one was never answered

    server.gate = gate
    process = start_process(label, LabelConfig.model_validate(settings))
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and kept(settings) < n_before:
        time.sleep(0.01)
    process.kill()
    process.join()
    hold.set()
    assert kept(settings) == sum(server.answered.values()) == n_before
    result = run()
    assert set(server.answered.values()) == {1}
    assert result["requests_answered"] == sum(server.answered.values()) - n_before
    assert result["scores"]["detection"]["latents"] == N_LATENTS


def kept(settings: dict[str, Any]) -> int:
    try:
        return rows(settings, "SELECT count(*) FROM requests WHERE answer IS NOT NULL AND model = 'gpt'")[0][0]
    except sqlite3.OperationalError:
        return 0


def test_ctrl_c_is_one_line_and_what_was_answered_is_kept(
    run: Run, server: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep, n = LabelStore.keep, []

    def stopping(*arguments: Any) -> None:
        keep(*arguments)
        n.append(1)
        if len(n) == 14:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LabelStore, "keep", stopping)
        with pytest.raises(InterruptedRunError, match=r"a stop after 4 explanations.*run the same command again"):
            run()
    answered = sum(server.answered.values())
    result = run()
    assert result["requests_answered_before"] >= answered - 3
    assert sum(server.answered.values()) - len(server.answered) <= 3  # those in flight


def test_failures_on_the_way_leave_a_latent_for_the_next_run(run: Run, server: StandIn) -> None:
    explainer = {"model": "gpt", "base_url": server.url, "concurrency": 1, "retries": 0}
    server.faults.extend([Fault(500), Fault(200, b"<html>")])
    first = run(explainer=explainer)
    assert (first["explained"], first["not_reached"], first["requests_failed"]) == (2, 2, 2)
    second = run(explainer=explainer)
    assert (second["explained"], second["not_reached"], second["requests_failed"]) == (4, 0, 0)


def test_an_endpoint_that_is_gone_is_one_line_and_nothing_is_lost(run: Run, server: StandIn) -> None:
    server.always = Fault(429, headers={"Retry-After": "3600"})
    with pytest.raises(EndpointError, match=r"gpt at http.*asked to wait 3600 s more.*run the same command again"):
        run()
    server.always = None
    assert run()["explained"] == N_LATENTS


def test_a_judge_that_talks_of_something_else_is_counted_and_nothing_is_dropped(run: Run, server: StandIn) -> None:
    server.answer = lambda body: answer(body) if "Explanation:'" in body["messages"][0]["content"] else "Lovely day!"
    scores = run()["scores"]
    for method, n in (("detection", 40), ("fuzzing", 40), ("intervention", 8)):
        row = scores[method]
        assert row["value"] == 0.5
        assert row["failed_parses"] == row["texts"]
        assert 0 < row["texts"] <= n


def test_explanations_that_are_none_are_counted(run: Run, server: StandIn) -> None:
    server.answer = lambda body: "first line\nsecond line"
    result = run()
    assert (result["explained"], result["unreadable_explanations"], result["not_reached"]) == (0, 4, 0)
    assert result["scores"] == {}
    assert [each["explanation"] for each in result["labels"]] == [None] * 4


def test_rare_latents_are_counted_and_keep_their_labels(run: Run, settings: dict[str, Any], server: StandIn) -> None:
    result = run(latents=[DEAD, 0], min_contexts=4)
    assert (result["latents"], result["too_rare"], result["explained"]) == (2, 1, 1)
    assert "detection, shuffled" not in result["scores"]  # there is no other explanation
    assert rows(settings, f"SELECT kind FROM labels WHERE latent = {DEAD}") == [("logits",)]
    assert run(min_contexts=1000)["too_rare"] == N_LATENTS


def test_logits_are_shown_if_they_are_asked_for(run: Run, server: StandIn) -> None:
    run(show_logits=True, n_latents=1)
    run(n_latents=1)
    told = [body["messages"][1]["content"] for body in server.bodies if "strength" in body["messages"][1]["content"]]
    assert ["these tokens become more likely" in each for each in told] == [True, False]


def test_labels_without_a_model_alone(run: Run, server: StandIn, settings: dict[str, Any]) -> None:
    result = run(n_latents=0)
    assert (result["latents"], result["scores"], server.bodies) == (0, {}, [])
    assert rows(settings, "SELECT count(*) FROM labels WHERE kind = 'logits'") == [(D_SAE,)]


def test_another_judge_scores_the_same_labels(run: Run, settings: dict[str, Any], server: StandIn) -> None:
    run()
    result = run(judge={"model": "judge", "base_url": server.url})
    assert (result["explainer"], result["judge"]) == ("gpt", "judge")
    assert rows(settings, "SELECT DISTINCT judge FROM scores WHERE method = 'detection'") == [("gpt",), ("judge",)]
    assert {body["model"] for body in server.bodies} == {"gpt", "judge"}
    assert result["scores"]["detection"]["latents"] == N_LATENTS


def test_where_a_loop_is_running_as_in_a_notebook(run: Run) -> None:
    async def cell() -> dict[str, Any]:
        return run()

    assert asyncio.run(cell())["explained"] == N_LATENTS


def test_a_local_model_explains_and_judges(
    run: Run,
    indexed: Indexed,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(label_module, "GROUP", 1)
    local = {"model": f"local:{indexed.loaded.spec}", "max_answer_tokens": 6}
    scoring = {"n_positives": 4, "pool": 20, "n_prompts": 2, "max_new_tokens": 4, "embedding": "model"}
    result = run(explainer=local, n_latents=2, scoring=scoring)
    assert result["explainer"] == f"local:{indexed.loaded.id}"
    assert result["explained"] + result["unreadable_explanations"] == 2
    assert (result["cost"], result["requests_failed"]) == (0, 0)
    assert result["tokens_in"] > 1000
    assert result["scores"]["detection"]["failed_parses"] > 0


def test_an_index_that_is_older_than_its_sae_is_refused(run: Run, settings: dict[str, Any], tmp_path: Path) -> None:
    changed = SaeArtefact.load(settings["sae"])
    changed.b_dec[:] += 1
    changed.save(tmp_path / "sae")
    with pytest.raises(MismatchError, match="feature index: expected an index of this SAE, got one of other weights"):
        run(sae=tmp_path / "sae")


def test_an_sae_of_another_hook_point_or_model_is_refused(run: Run, settings: dict[str, Any], tmp_path: Path) -> None:
    artefact = SaeArtefact.load(settings["sae"])
    artefact.metadata["hook_point"] = "resid_post.2"
    artefact.save(tmp_path / "hook")
    with pytest.raises(MismatchError, match=r"expected one of resid_post.2, got resid_post.1"):
        run(sae=tmp_path / "hook")
    artefact.metadata["model"] = {"id": "another", "fingerprint": "f00d"}
    artefact.save(tmp_path / "model")
    with pytest.raises(MismatchError, match="got one trained on another"):
        run(sae=tmp_path / "model")


def test_an_index_of_another_model_is_refused(run: Run, settings: dict[str, Any]) -> None:
    with sqlite3.connect(settings["index"] / FILE_NAME) as database:
        model = json.dumps({"id": "another", "fingerprint": "f00d"})
        database.execute("UPDATE info SET value = ? WHERE key = 'model'", (model,))
    with pytest.raises(MismatchError, match="got one of another"):
        run()


def test_other_mistakes_are_found_before_anything_is_asked(run: Run, server: StandIn) -> None:
    with pytest.raises(UnknownNameError, match=f"numbers from 0 to {D_SAE - 1}, got 99"):
        run(latents=[0, 99])
    with pytest.raises(ConfigError, match="base_url"):
        run(explainer={"model": "gpt"})
    with pytest.raises(ConfigError, match="base_url"):
        run(explainer={"model": "local:x", "base_url": server.url})
    with pytest.raises(ConfigError, match=r"budget\.max_cost"):
        run(judge={"model": "gpt", "base_url": server.url}, budget={"max_cost": 1})
    assert server.bodies == []
