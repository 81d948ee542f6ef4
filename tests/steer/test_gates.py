"""Gates: automata that a prefill and a decoded token move alike, joined, calibrated and logged."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from activations.errors import ConfigError, TextError
from activations.hook_points import HookPoint
from activations.hooks import capture, run_until
from activations.models import LoadedModel
from sae.artefact import SaeArtefact
from sae.torch_view import TorchSae
from steer.gates import (
    Condition,
    Gate,
    calibrate,
    clauses,
    cosine,
    energy,
    gate_table,
    gates_of,
    latent,
    probe,
    read,
    run_gates,
)
from steer.operations import Ablate, Add, Intervention
from steer.runtime import steering

POINT = HookPoint("resid_post", 1)
READ = probe(torch.zeros(1), 0.0, "resid_post.1")


def plainly(values: list[float], gate: Gate) -> list[int]:
    """Token by token: for how many tokens it has been open; the first token only resets it."""
    age, ages = 0, []
    for i, r in enumerate(values):
        if i == 0:
            age = 0
        elif age == 0:
            age = int(r > gate.on)
        else:
            age = 0 if r <= gate.shuts_at and age >= gate.min_tokens else age + 1
        ages.append(age)
    return ages


levels = st.integers(-3, 3).map(float)
gates = st.builds(
    lambda on, gap, n: Gate(READ, on, on - gap, n), levels, st.integers(0, 3).map(float), st.integers(1, 4)
)


@given(
    st.lists(st.lists(levels, min_size=1, max_size=14), min_size=1, max_size=3),
    st.lists(gates, min_size=1, max_size=2),
    st.data(),
)
def test_gates_are_those_of_a_loop_however_the_tokens_come(
    texts: list[list[float]], several: list[Gate], data: st.DataObject
) -> None:
    width = max(map(len, texts)) + data.draw(st.integers(0, 2))
    cuts = sorted(data.draw(st.sets(st.integers(1, width - 1), max_size=4))) if width > 1 else []
    values = torch.tensor([[9.0] * (width - len(text)) + text for text in texts])[..., None].expand(
        -1, -1, len(several)
    )
    index = torch.tensor([[-1] * (width - len(text)) + list(range(len(text))) for text in texts])
    table, max_age = gate_table(several), max(gate.min_tokens for gate in several)
    ages, parts = torch.full((len(texts), len(several)), max_age), []  # left by another text
    for start, stop in zip([0, *cuts], [*cuts, width], strict=True):
        found = run_gates(table, values[:, start:stop], index[:, start:stop], ages, max_age)
        ages = found[:, -1]
        parts.append(found)
    together = torch.cat(parts, dim=1)
    for row, text in enumerate(texts):
        for g, gate in enumerate(several):
            expected = [min(age, max_age) for age in plainly(text, gate)]
            assert together[row, width - len(text) :, g].tolist() == expected


def holds(condition: Condition, is_open: dict[Gate, bool]) -> bool:
    if isinstance(condition, Gate):
        return is_open[condition]
    parts = [holds(part, is_open) for part in condition.parts]  # type: ignore[attr-defined]
    return {"and": all(parts), "or": any(parts), "not": not parts[0]}[condition.how]  # type: ignore[attr-defined]


LEAVES = [Gate(READ, 0.0, name=name) for name in "abc"]
trees = st.recursive(
    st.integers(0, 2),
    lambda inner: st.one_of(st.tuples(st.sampled_from(["and", "or"]), inner, inner), st.tuples(st.just("not"), inner)),
    max_leaves=6,
)


def grown(tree: Any) -> Condition:
    if isinstance(tree, int):
        return LEAVES[tree]
    how, first, *rest = tree
    if how == "not":
        return ~grown(first)
    return grown(first) & grown(rest[0]) if how == "and" else grown(first) | grown(rest[0])


@given(trees)
def test_clauses_say_what_the_condition_says(tree: Any) -> None:
    condition = grown(tree)
    for values in itertools.product([False, True], repeat=len(LEAVES)):
        is_open = dict(zip(LEAVES, values, strict=True))
        by_clauses = any(all(is_open[gate] == wanted for gate, wanted in c.items()) for c in clauses(condition))
        assert by_clauses == holds(condition, is_open)
    assert set(gates_of(condition)) <= set(LEAVES)


def test_readouts() -> None:
    rng = np.random.default_rng(0)
    v, x = torch.tensor(rng.standard_normal(8)).float(), torch.tensor(rng.standard_normal((2, 3, 8))).float()
    W = rng.standard_normal((8, 5)).astype(np.float32)
    sae = SaeArtefact(
        "jumprelu", W, np.ones(5, np.float32), W.T.copy(), np.ones(8, np.float32),
        threshold=np.full(5, 2, np.float32), metadata={"hook_point": "resid_post.1"},
    )  # fmt: skip
    readouts = [energy(v, "resid_post.1"), cosine(v, "resid_post.1"), probe(v, 2.0, "resid_post.1"), latent(sae, 3)]
    found = read(gate_table([Gate(readout, 0.0) for readout in readouts]), x)
    cos = torch.nn.functional.cosine_similarity(x, v, dim=-1)
    expected = [cos.abs(), cos, x @ v + 2, TorchSae(sae).encode(x)[..., 3]]
    torch.testing.assert_close(found, torch.stack(expected, dim=-1), atol=1e-5, rtol=1e-5)
    assert 0 < (found[..., 3] > 0).float().mean() < 1


def test_thresholds_that_contradict_each_other_are_refused() -> None:
    for options in ({"off": 1.0}, {"min_tokens": 0}, {"off": math.nan}):
        with pytest.raises(ConfigError, match="off <= on"):
            Gate(READ, 0.0, **options)


# --- in a model ------------------------------------------------------------------------------------------------------


def inputs(loaded: LoadedModel, texts: list[str], pad: int = 0) -> dict[str, torch.Tensor]:
    rows = [loaded.tokenizer(text)["input_ids"] for text in texts]
    width = max(map(len, rows)) + pad
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


TEXTS = ["The river ran past the mill and on to the sea.", "A cat sat on the mat."]


def test_only_tokens_behind_an_open_gate_change_and_the_log_says_which(tiny: LoadedModel) -> None:
    v = torch.linspace(-1, 1, tiny.d_model)
    gate = Gate(cosine(v, "resid_pre.1"), 0.05, -0.05, 2, name="mine")
    with capture(tiny.model, tiny.family, [HookPoint("resid_pre", 1), POINT]) as plain:
        run_until(tiny.model, inputs(tiny, TEXTS[:1]))
    values = torch.nn.functional.cosine_similarity(plain[HookPoint("resid_pre", 1)][0], v, dim=-1).tolist()
    expected = [i for i, age in enumerate(plainly(values, gate)) if age]
    assert 0 < len(expected) < len(values) - 1
    for steered_where, condition in (
        (expected, gate),
        ([i for i in range(1, len(values)) if i not in expected], ~gate),
    ):
        with (
            steering(tiny, [Intervention(Add(v, 3.0), POINT, gate=condition)]) as steered,
            capture(tiny.model, tiny.family, [POINT]) as captured,
        ):
            run_until(tiny.model, inputs(tiny, TEXTS[:1]))
        changed = (captured[POINT] != plain[POINT]).any(-1)[0]
        assert changed.nonzero()[:, 0].tolist() == steered_where
        assert torch.equal(captured[POINT][0][~changed], plain[POINT][0][~changed])
        assert steered.fired() == [{"mine": expected}]
        assert steered.latest() == [{"mine": (pytest.approx(values[-1], abs=1e-5), len(values) - 1 in expected)}]


def test_gate_states_survive_batches_padding_and_chunks(tiny: LoadedModel) -> None:
    v = torch.linspace(-1, 1, tiny.d_model)
    steer = Intervention(Ablate(v), POINT, gate=Gate(cosine(v, "resid_pre.1"), 0.05, -0.05, 3))
    alone = []
    for text in TEXTS:
        with torch.no_grad(), steering(tiny, [steer]) as steered:
            logits = tiny.model(**inputs(tiny, [text])).logits[0]
            alone.append((logits, *steered.fired()))
    assert alone[0][1] != alone[1][1]
    for cuts in ([], [4, 5, 6], [1]):
        together, x = [], inputs(tiny, TEXTS, pad=2)
        width = x["input_ids"].shape[1]
        with torch.no_grad(), steering(tiny, [steer]) as steered:
            cache = None
            for start, stop in zip([0, *cuts], [*cuts, width], strict=True):
                part = {
                    "input_ids": x["input_ids"][:, start:stop],
                    "attention_mask": x["attention_mask"][:, :stop],
                    "position_ids": x["position_ids"][:, start:stop],
                }
                out = tiny.model(**part, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                together.append(out.logits)
            fired = steered.fired()
        for row, (logits, log) in enumerate(alone):
            assert fired[row] == log
            torch.testing.assert_close(torch.cat(together, 1)[row, -len(logits) :], logits, atol=3e-5, rtol=1e-4)


def test_gates_of_one_name_are_refused(tiny: LoadedModel) -> None:
    both = [Gate(probe(torch.ones(tiny.d_model), 0.0, "resid_post.0"), on) for on in (0.0, 1.0)]
    steer = Intervention(Add(torch.ones(tiny.d_model)), POINT, gate=both[0] & ~both[1])
    with pytest.raises(ConfigError, match=r"gate 'gate'.*names"), steering(tiny, [steer]):
        pass


def test_the_log_is_that_of_the_latest_batch(tiny: LoadedModel) -> None:
    steer = Intervention(Ablate(torch.ones(tiny.d_model)), POINT, gate=Gate(cosine(torch.ones(32), "resid_pre.1"), 0.0))
    with torch.no_grad(), steering(tiny, [steer]) as steered:
        tiny.model(**inputs(tiny, TEXTS))
        both = steered.fired()
        tiny.model(**inputs(tiny, TEXTS[1:]))
        assert steered.fired() == both[1:]


# --- calibration -----------------------------------------------------------------------------------------------------


def test_a_calibrated_gate_opens_on_the_share_it_was_asked_for(tiny: LoadedModel) -> None:
    v = torch.linspace(-1, 1, tiny.d_model)
    words = ["river", "mill", "sea", "cat", "mat", "dog", "digits", "numbers", "ran", "sat", "looked", "past"]
    texts = [f"The {a} and the {b}." for a, b in itertools.permutations(words, 2)][:60]
    gate = calibrate(tiny, probe(v, 0.0, "resid_post.1"), texts, 0.1, off_rate=0.3, min_tokens=2)
    peaks = []
    for text in texts:
        with capture(tiny.model, tiny.family, [POINT]) as captured:
            run_until(tiny.model, inputs(tiny, [text]))
        peaks.append(float((captured[POINT][0, 1:] @ v).max()))
    peaks.sort()
    # ceil(61 * 0.9) = 55, ceil(61 * 0.7) = 43
    assert (gate.on, gate.off) == (pytest.approx(peaks[54]), pytest.approx(peaks[42]))
    assert sum(peak > gate.on for peak in peaks) == 5
    assert (gate.model, gate.min_tokens) == (tiny.fingerprint, 2)
    n, j = 60, 55
    tail = sum(
        math.comb(n, i) * (1 - gate.calibration["bound95"]) ** i * gate.calibration["bound95"] ** (n - i)
        for i in range(j, n + 1)
    )
    assert tail == pytest.approx(0.05, abs=1e-6), "at the bound, 55 or more of 60 stay below with a chance of 5%"


def test_too_few_texts_are_refused(tiny: LoadedModel) -> None:
    readout = probe(torch.ones(tiny.d_model), 0.0, "resid_post.1")
    calibrate(tiny, readout, TEXTS * 2 + ["A dog looked."] * 15, 0.05)
    with pytest.raises(ConfigError, match=r"19 texts or more.*got 2"):
        calibrate(tiny, readout, TEXTS, 0.05)
    with pytest.raises(ConfigError, match="0 < rate"):
        calibrate(tiny, readout, TEXTS, 0.0)
    with pytest.raises(TextError, match="two tokens"):
        calibrate(tiny, readout, [*TEXTS, "A"], 0.4)
