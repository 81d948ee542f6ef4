"""Lists of latents over HTTP: against the plain way to filter and sort rows, and against hostile requests."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from sae.index_db import FeatureIndex
from sae.labels.store import LabelStore, NewLabel
from steer.browser.lists import DENSE, ListQuery, density_histogram, number, octaves

from .conftest import HOSTILE, N_LATENTS, TOKEN, scores_of

SOURCE = "resid_post.1"


@pytest.fixture
def client(address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address, headers={"authorization": f"Bearer {TOKEN}"}, timeout=30) as client:
        yield client


def ask(client: httpx.Client, path: str = "/api/latents", **values: Any) -> Any:
    answer = client.get(path, params={"source": SOURCE, **values})
    assert answer.status_code == 200, answer.text
    return answer.json()


def numbers(client: httpx.Client, **values: Any) -> list[int]:
    """All latents of a list, in order."""
    found: list[int] = []
    while len(found) < (page := ask(client, offset=len(found), **values))["total"]:
        found += [row["latent"] for row in page["rows"]]
    return found


@pytest.fixture
def figures(own_index: Path) -> dict[str, np.ndarray]:
    index = FeatureIndex.open(own_index)
    columns = dict(index.columns())
    index.close()
    score = [np.mean([each.value for each in scores_of(i) if each.control == "explanation"]) for i in range(N_LATENTS)]
    columns["score"] = np.where(np.arange(N_LATENTS) % 5 == 0, score, np.nan).astype(np.float32)
    return columns


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize(
    "sort", ["latent", "density", "max_activation", "output_score", "logit_entropy", "score", "stability"]
)
def test_lists_are_sorted_with_what_is_unknown_last(
    client: httpx.Client, figures: dict[str, np.ndarray], sort: str, descending: bool
) -> None:
    values = figures.get(sort, np.arange(N_LATENTS, dtype=np.float32))
    sign = -1 if descending else 1
    expected = sorted(range(N_LATENTS), key=lambda i: (math.isnan(values[i]), sign * np.nan_to_num(values[i]), i))
    assert numbers(client, sort=sort, descending=descending) == expected


@pytest.mark.parametrize(
    ("asked", "holds"),
    [
        ({"show": "dead"}, lambda f, i: f["density"][i] == 0),
        ({"show": "live"}, lambda f, i: f["density"][i] > 0),
        ({"show": "dense"}, lambda f, i: f["density"][i] >= DENSE),
        ({"explained": True}, lambda f, i: i % 5 == 0),
        ({"explained": False, "show": "live"}, lambda f, i: i % 5 and f["density"][i] > 0),
        ({"where": "density:0.001:0.01"}, lambda f, i: 0.001 <= f["density"][i] <= 0.01),
        ({"where": "score:0.8:,output_score::0.5"}, lambda f, i: f["score"][i] >= 0.8 and f["output_score"][i] <= 0.5),
        ({"where": "stability:0.5:"}, lambda f, i: f["stability"][i] >= 0.5),
        ({"where": "confidence_change:0:1e9"}, lambda f, i: f["confidence_change"][i] >= 0),
    ],
)  # fmt: skip
def test_lists_are_filtered(client: httpx.Client, figures: dict[str, np.ndarray], asked: Any, holds: Any) -> None:
    assert numbers(client, **asked) == [i for i in range(N_LATENTS) if holds(figures, i)]


def test_search_finds_labels_and_words_best_first(client: httpx.Client) -> None:
    assert set(numbers(client, q="mills numb")) == {i for i in range(0, N_LATENTS, 5) if i != 10}
    assert set(numbers(client, q="riv mil")) >= set(numbers(client, q="mills numb"))
    assert numbers(client, q="ri") == []
    assert numbers(client, q="number 25")[0] == 25
    assert numbers(client, q="number 25", sort="latent") == sorted(numbers(client, q="number 25"))
    assert numbers(client, q="  ") == list(range(N_LATENTS))
    assert numbers(client, q="zebra") == []


def test_a_row_says_what_a_list_shows(client: httpx.Client) -> None:
    rows = ask(client, limit=11)["rows"]
    assert rows[10]["label"] == HOSTILE.replace("\u202e", "⟨U+202E⟩")
    assert (rows[10]["explained"], rows[1]["explained"], rows[1]["label"]) == (True, False, None)
    assert (rows[9]["density"], rows[9]["spark"], rows[9]["output_score"]) == (0, [], None)
    assert all(" " not in word.strip() or word.isprintable() for row in rows for word in row["words"])


def test_around_says_where_a_latent_is(client: httpx.Client) -> None:
    order = numbers(client, sort="density", descending=True)
    for latent in (order[0], order[137], order[-1]):
        around = ask(client, "/api/latents/around", sort="density", descending=True, latent=latent, reach=3)
        place = order.index(latent)
        first = max(place - 3, 0)
        expected = {"total": 300, "place": place, "offset": first, "latents": order[first : place + 4]}
        assert around == expected
    assert ask(client, "/api/latents/around", show="dead", latent=3)["place"] is None
    assert ask(client, "/api/latents/around", q="zebra", latent=3)["latents"] == []


def test_a_new_label_is_listed_without_a_restart(client: httpx.Client, own_index: Path) -> None:
    assert 3 not in numbers(client, explained=True)
    with LabelStore.open(own_index, "0" * 64, write=True) as store:
        store.add_scores(store.add_label(NewLabel(3, "explanation", "weirs", "bob")), 3, scores_of(299))
    assert 3 in numbers(client, explained=True)
    assert numbers(client, q="weirs") == [3]
    assert numbers(client, sort="score", descending=True)[0] == 3


def test_a_source_as_a_whole(client: httpx.Client, figures: dict[str, np.ndarray]) -> None:
    about = ask(client, "/api/source")
    assert (about["d_sae"], about["n_dead"], about["n_explained"]) == (300, 30, 60)
    assert sum(about["density"]["counts"]) == 270
    assert about["columns"]["max_activation"] == pytest.approx([0, figures["max_activation"].max()])
    assert about["columns"]["nearest_jaccard"] is not None


HOSTILE_VALUES = ["-1", "99999999999999999999", "1e3", "NaN", "x", "", "1;DROP TABLE latents", "\u0000", "' OR 1=1 --",
                  "a:b:c:d", "density:nan:", "density:1:2:3", "nothing:0:1"]  # fmt: skip
FIELDS = ["offset", "limit", "sort", "where", "show", "explained", "q", "descending", "source", "latent", "reach"]


@pytest.mark.parametrize("path", ["/api/latents", "/api/latents/around", "/api/source", "/api/feature"])
def test_hostile_values_are_refused_with_a_reason(client: httpx.Client, path: str) -> None:
    refused = 0
    for name in FIELDS:
        for value in HOSTILE_VALUES:
            answer = client.get(path, params={"source": SOURCE, "latent": "3", name: value})
            if answer.status_code != 200:
                refused += 1
                assert 400 <= answer.status_code < 500, (name, value, answer.text)
                assert set(answer.json()["detail"]) == {"where", "expected", "got", "fix"}, (name, value)
    assert refused >= len(HOSTILE_VALUES) - 1


def test_no_such_latent_or_source(client: httpx.Client) -> None:
    for asked in ({"latent": -1}, {"latent": 300}, {"latent": 2**31}, {"latent": "x"}, {},
                  {"latent": 1, "source": "../etc"}, {"latent": 1, "source": "x" * 300}):  # fmt: skip
        answer = client.get("/api/feature", params={"source": SOURCE, **asked})
        assert 400 <= answer.status_code < 500
        assert set(answer.json()["detail"]) == {"where", "expected", "got", "fix"}


def test_a_search_is_words_whatever_fts5_makes_of_them(client: httpx.Client) -> None:
    for text in ('"', '" OR x', "NEAR(a b)", "a AND", "*", "^a", "{kind}: x", "a" * 200, "-a", "()"):
        ask(client, q=text)


def test_bounds() -> None:
    query = ListQuery(source="a", where="density:0.1:,score::1").latent_query()
    assert [tuple(each) for each in query.ranges] == [("density", 0.1, math.inf), ("score", -math.inf, 1)]


def test_octaves_add_up_to_the_histogram() -> None:
    assert octaves([], 0) == []
    assert octaves([1] * 9, 6) == [2, 4, 3]


def test_density_histogram_covers_every_live_latent() -> None:
    assert density_histogram(np.zeros(3, np.float32)) is None
    for values in ([1.0], [1e-5], [1e-5, 0.1, 1.0, 0.0], [0.1, 0.1]):
        found = density_histogram(np.array(values, np.float32))
        assert found is not None
        assert sum(found.counts) == sum(value > 0 for value in values)


def test_numbers_are_json() -> None:
    assert [number(value) for value in (math.nan, math.inf, None, np.float32(0.1), 0)] == [None, None, None, 0.1, 0]
