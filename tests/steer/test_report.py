"""The report: texts stay texts, nothing is fetched, the figures are there, and gaps are survived."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from activations.store_schema import ModelRef
from sae.contexts import Context
from sae.index_db import FeatureIndex, LatentRow, write_index
from steer.report import show_context, write_report
from steer.vectors import SteeringVector

EVIL = "<script>alert('x')</script><img src=https://evil.example/x onerror=alert(1)>\"'&"
SUMMARY = {
    "model": "tiny-" + EVIL, "hook_point": "resid_post.1", "architecture": "batchtopk", "n_latents": 4321,
    "tokens_harvested": 7654321, "text": EVIL, "device": EVIL, "wall_s": 123.4, "peak_rss_mb": 2345.6, "fvu": 0.2718,
    "l0": 31.4, "ce_loss_recovered": 0.9137, "dead_fraction": 0.0625, "heldout_tokens": 8765, "harvest_tok_s": 9876.0,
    "train_tok_s": 54321.0, "ce": {"clean": 3.111, "sae": 3.222, "mean": 6.333, "zero": 9.444},
}  # fmt: skip
RECEIPT = {
    "coefficient": 12.34, "dose": 0.567, "rate_unsteered": 0.012, "rate_steered": 0.456, "effect": 0.444,
    "effect_ci95": [0.333, 0.555], "random_control_effect": -0.021, "prompt_baseline_effect": 0.087, "kl": 0.765,
    "nll_unsteered": 2.46, "nll_steered": 3.57, "instruction": EVIL, "n_prompts": 16, "max_new_tokens": 28,
    "sweep": [{"dose": d, "rate": d / 2, "nll": 2 + d} for d in (0.0, 0.5, 0.9)],
    "examples": [dict.fromkeys(("prompt", "unsteered", "steered", "random", "prompt_baseline"), EVIL)],
}  # fmt: skip
ACTIVE_TAGS = {"script", "img", "iframe", "object", "embed", "form", "a", "link", "base"}
ROWS = [
    {"step": i, "tokens": 1000 * i, "loss": 1 / i, "fvu": 1 / i, "l0": 9.0, "holdout_fvu": 0.5, "holdout_l0": 9.0}
    for i in (1, 2, 3)
]


class Words:
    """A tokenizer whose tokens are hostile."""

    def decode(self, ids: list[int]) -> str:
        return f"{EVIL}\n{ids[0]}"


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def row(latent: int, peak: float = 2.0) -> LatentRow:
    context = Context(7, 1, np.array([1, 2, 3], np.int32), np.array([0, peak, peak / 4], np.float32))
    return LatentRow(
        latent, 0.0123 if peak else 0.0, peak, peak / 2, [3, 2, 1] if peak else [0, 0, 0], [(EVIL, 1.5)],
        [(EVIL, -1.5)], [(0, 0.5)], [context] if peak else [],
    )  # fmt: skip


def write(folder: Path, *, rows: Any = (), log: Any = ROWS, features: Any = (), vectors: Any = ()) -> str:
    write_index(folder / "index", {"d_sae": len(rows)}, rows)
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    path = write_report(
        folder / "report.html", summary=SUMMARY, log=folder / "train.jsonl", index=FeatureIndex.open(folder / "index"),
        tokenizer=Words(), features=features, vectors=vectors,
    )  # fmt: skip
    return path.read_text()


def vector(receipt: dict[str, Any]) -> SteeringVector:
    model = ModelRef(id="m", fingerprint="f", n_layers=2, d_model=4)
    return SteeringVector(EVIL, np.eye(4, dtype=np.float32)[0], "resid_post.1", model, 9.0, {}, 12.34, [receipt])


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    rows = [row(0), row(1, 4.0), row(2, 0.0)]
    return write(tmp_path_factory.mktemp("report"), rows=rows, features=[1, 0], vectors=[vector(RECEIPT)])


def test_texts_stay_texts(page: str) -> None:
    parsed = Page(page)
    assert not {tag for tag, _ in parsed.tags} & ACTIVE_TAGS
    assert not [name for _, attributes in parsed.tags for name in attributes if name.startswith("on")]
    assert "<script" not in page.lower()
    assert parsed.text.count("<script>alert('x')</script>") > 15, "title, summary, name, instruction, examples, tokens"


def test_nothing_is_fetched(page: str) -> None:
    for tag, attributes in Page(page).tags:
        for name, value in attributes.items():
            if name in ("src", "srcset", "href", "xlink:href", "action", "data", "poster"):
                assert value is not None, (tag, name)
                assert value.startswith("#"), (tag, name, value)
            assert not re.search(r"url\((?!#)", value or "")
    styles = "".join(re.findall(r"<style.*?</style>", page, re.DOTALL))
    assert not re.search(r"url\(\s*['\"]?(?!#)|@import", styles)


def test_the_security_policy_forbids_everything_but_inline_style(page: str) -> None:
    (policy,) = [
        attributes["content"] for tag, attributes in Page(page).tags
        if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
    ]  # fmt: skip
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "script-src" not in policy
    assert "http" not in policy


def test_the_figures_of_the_summary_and_the_receipt_are_there(page: str) -> None:
    text = Page(page).text
    summary = ["4,321", "7,654,321", "123 s", "2,346 MB", "0.272", "31.4", "0.914", "6.2 %", "8,765", "9,876", "54,321"]
    losses, receipt = ["3.111", "3.222", "6.333", "9.444"], ["12.3", "0.57", "0.012", "0.456", "+0.444"]
    more = ["+0.333 to +0.555", "-0.021", "+0.087", "0.765", "2.46 → 3.57", "16 prompts, 28 new tokens"]
    for figure in summary + losses + receipt + more:
        assert figure in text, figure
    assert text.index("latent 1") < text.index("latent 0"), "best first"
    assert page.count("<svg") == 1 + 1 + 1 + 2, "curves, densities, sweep and a histogram a feature"


def test_a_context_shades_by_activation_and_marks_its_peak() -> None:
    tokens = show_context(row(0).contexts[0], 4.0, Words())
    assert [token.shade for token in tokens] == [0, 0.5, 0.125]
    assert [token.is_peak for token in tokens] == [False, True, False]
    assert all("\n" not in token.text and "↵" in token.text for token in tokens)


def test_the_held_out_curves_show_held_out_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    drawn: dict[str, list[float]] = {}
    values: list[list[float]] = []
    plot, set_ = Axes.plot, Axes.set

    def spy_plot(self: Axes, *data: Any, **style: Any) -> Any:
        values.append(list(data[1]) if len(data) > 1 else [])
        return plot(self, *data, **style)

    def spy_set(self: Axes, **texts: Any) -> Any:
        drawn[texts["title"]] = values[-1]
        return set_(self, **texts)

    monkeypatch.setattr(Axes, "plot", spy_plot)
    monkeypatch.setattr(Axes, "set", spy_set)
    log = [{"step": i, "tokens": i, "loss": 0.9, "fvu": 0.8, "l0": 5.0} for i in (1, 2, 3)]
    log[2] |= {"holdout_fvu": 0.25, "holdout_l0": 7.0}
    write(tmp_path, rows=[row(0)], log=log)
    assert (drawn["FVU, held out"], drawn["L0, held out"]) == ([0.25], [7.0])
    assert drawn["training loss"] == [0.9] * 3


@pytest.mark.parametrize(
    "log", [[], [{"step": 1, "tokens": 10, "loss": 0.5}], [{"step": 1, "tokens": 10, "loss": 0.0}]]
)
def test_missing_values_leave_their_curve_empty(tmp_path: Path, log: list[dict[str, Any]]) -> None:
    assert "0.914" in write(tmp_path, rows=[row(0)], log=log)


def test_no_live_latents_no_features_no_vectors_no_sweep(tmp_path: Path) -> None:
    assert "2 of 2 never active" in write(tmp_path / "a", rows=[row(0, 0.0), row(1, 0.0)])
    assert "latent 1" in write(tmp_path / "b", rows=[row(0), row(1, 0.0)], features=[1]), (
        "a dead one that was asked for"
    )
    assert "+0.444" in write(tmp_path / "c", rows=[row(0)], vectors=[vector(RECEIPT | {"sweep": [], "examples": []})])


def test_the_same_run_gives_the_same_page(tmp_path: Path, page: str) -> None:
    rows = [row(0), row(1, 4.0), row(2, 0.0)]
    strip = re.compile(r'(id="|#)[\w-]+')  # matplotlib names its clip paths at random
    again = write(tmp_path, rows=rows, features=[1, 0], vectors=[vector(RECEIPT)])
    assert strip.sub("", again) == strip.sub("", page)
