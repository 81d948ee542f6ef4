"""Which latents are tried for steering, and which one wins."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from activations.errors import MismatchError
from activations.hook_points import HookPoint
from activations.models import LoadedModel
from sae.artefact import SaeArtefact
from sae.contexts import Context
from sae.index_db import FeatureIndex, LatentRow, write_index
from sae.torch_view import TorchSae
from steer.generate import generate_conditions
from steer.making.select import (
    MAX_DENSITY,
    MIN_DENSITY,
    MIN_DOCUMENTS,
    MIN_KINDS,
    Trial,
    candidates,
    token_kinds,
    try_latents,
    weakest_context,
)
from steer.measures.effect import latent_reader, rate, reread
from steer.operations import Add, Intervention

GOOD = {"density": 0.01, "documents": MIN_DOCUMENTS, "kinds": MIN_KINDS, "weakest": 1.0}


def row(
    latent: int, *, density: float, documents: int, kinds: int, weakest: float, strongest: float = 8.0
) -> LatentRow:
    peaks = np.linspace(max(strongest, weakest), weakest, documents)
    contexts = [
        Context(i, 1, np.array([99, i % max(kinds, 1), 98], np.int32), np.array([0, peak, peak / 2], np.float32))
        for i, peak in enumerate(peaks)
    ]
    return LatentRow(latent, density, float(max(strongest, weakest)), 1.0, [1], [], [], [], contexts)


def index(folder: Path, *rows: LatentRow) -> FeatureIndex:
    write_index(folder, {"d_sae": len(rows)}, rows)
    return FeatureIndex.open(folder)


def latents(rows: list[LatentRow]) -> list[int]:
    return [row.latent for row in rows]


@pytest.mark.parametrize(
    ("change", "is_candidate"),
    [
        ({}, True),
        ({"density": MIN_DENSITY}, True),
        ({"density": MAX_DENSITY}, True),
        ({"density": MIN_DENSITY * 0.99}, False),
        ({"density": MAX_DENSITY * 1.01}, False),
        ({"density": 0.0, "documents": 0}, False),
        ({"documents": MIN_DOCUMENTS - 1}, False),
        ({"kinds": MIN_KINDS - 1}, False),
        ({"kinds": 1, "documents": 12}, False),
    ],
)
def test_candidates_are_neither_rare_nor_dense_nor_about_one_token(
    tmp_path: Path, change: dict[str, Any], is_candidate: bool
) -> None:
    assert latents(candidates(index(tmp_path, row(0, **GOOD | change)), 5)) == ([0] if is_candidate else [])


def test_candidates_are_ordered_by_their_weakest_context(tmp_path: Path) -> None:
    rows = [
        row(0, **GOOD | {"weakest": 2.0}),
        row(1, **GOOD | {"weakest": 1.0, "strongest": 99.0}),  # a few odd tokens raise the strongest only
        row(2, **GOOD | {"weakest": 3.0, "strongest": 3.0}),
    ]
    made = index(tmp_path, *rows)
    assert latents(candidates(made, 3)) == [2, 0, 1]
    assert latents(candidates(made, 2)) == [2, 0]
    assert candidates(made, 0) == []


def test_kinds_are_counted_at_the_peaks() -> None:
    assert token_kinds(row(0, **GOOD | {"kinds": 4})) == 4
    assert weakest_context(row(0, **GOOD | {"weakest": 2.5})) == 2.5


def test_the_score_is_the_gain_less_what_is_lost_beyond_a_nat() -> None:
    assert Trial(0, 0.5, -3.0, -0.5).score == 0.5
    assert Trial(0, 0.5, 1.0, 0.1).score == 0.5
    assert Trial(0, 0.5, 1.75, 0.0).score == pytest.approx(-0.25)
    assert Trial(0, 0.5, 0.0, 0.4).score == pytest.approx(0.2)


@pytest.mark.parametrize("hook_point", ["resid_post.1", "resid_post.1->mlp_out.2"])
def test_trials_are_measured_on_the_texts_of_each_latent_and_sorted(tiny: LoadedModel, hook_point: str) -> None:
    """A transcoder steers where it writes and is read where it reads."""
    rng = np.random.default_rng(3)
    W_dec = 5 * rng.standard_normal((24, 32)).astype(np.float32)
    artefact = SaeArtefact(
        "jumprelu", W_dec.T.copy(), np.zeros(24, np.float32), W_dec, np.zeros(32, np.float32),
        threshold=np.full(24, 20, np.float32), metadata={"hook_point": hook_point},
        transcodes="->" in hook_point, apply_b_dec_to_input="->" not in hook_point,
    )  # fmt: skip
    tried, prompts, limits = [7, 2, 11, 5], ["The river ran", "A cat"], {"max_new_tokens": 6, "seed": 1}
    trials = try_latents(tiny, artefact, tried, prompts, 6.0, **limits)
    assert sorted(t.latent for t in trials) == sorted(tried)
    assert [t.score for t in trials] == sorted((t.score for t in trials), reverse=True)

    unit = torch.from_numpy(W_dec[tried] / np.linalg.norm(W_dec[tried], axis=1, keepdims=True))
    point, written = HookPoint("resid_post", 1), HookPoint.parse(hook_point.rpartition(">")[2])
    conditions = [[], *([Intervention(Add(row, 6.0), written)] for row in unit)]
    texts = generate_conditions(tiny, conditions, prompts, **limits)
    plain, sae = reread(tiny, point, prompts, texts[0]), TorchSae(artefact)
    by_latent = {t.latent: t for t in trials}
    for latent, row_ in zip(tried, texts[1:], strict=True):
        after, shows = reread(tiny, point, prompts, row_), latent_reader(sae, latent, point)
        gain = np.mean([rate(a, shows) for a in after]) - np.mean([rate(b, shows) for b in plain])
        rise = np.mean([a.nll for a in after]) - np.mean([b.nll for b in plain])
        assert by_latent[latent].gain == pytest.approx(gain, abs=0.05)
        again = np.mean([a.repetition for a in after]) - np.mean([b.repetition for b in plain])
        assert by_latent[latent].nll_rise == pytest.approx(rise, abs=1e-3)
        assert by_latent[latent].repetition_rise == pytest.approx(again)
    if written == point:
        assert max(t.gain for t in trials) > 0, "adding a latent's own direction makes it active"


def test_a_crosscoder_is_refused(tiny: LoadedModel) -> None:
    zeros = np.zeros((64, 24), np.float32)
    artefact = SaeArtefact(
        "standard", zeros, zeros[0], zeros.T.copy(), zeros[:, 0], metadata={"hook_point": "resid_post.1+resid_post.2"}
    )
    with pytest.raises(MismatchError, match="one hook point"):
        try_latents(tiny, artefact, [1], ["The river ran"], 6.0, max_new_tokens=2, seed=1)
