"""From a text to latents: which tokens count, and what is ranked first."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from activations.config import HarvestConfig
from activations.errors import ConfigError, MismatchError, TextError
from activations.harvest import harvest
from activations.hook_points import HookPoint
from activations.hooks import capture
from activations.models import LoadedModel
from activations.store import ActivationStore
from sae.artefact import SaeArtefact
from steer.making.config import FindConfig
from steer.making.find import Found, Usual, as_result, find_latents, read_text, usual_in

POINT = HookPoint("resid_post", 1)
TEXT = "the cat sat on the mat by 12"


@pytest.fixture
def sae(tiny: LoadedModel) -> SaeArtefact:
    W_dec = np.random.default_rng(0).standard_normal((24, tiny.d_model)).astype(np.float32)
    zeros = {"b_enc": np.full(24, -0.5, np.float32), "b_dec": np.zeros(tiny.d_model, np.float32)}
    return SaeArtefact("standard", W_dec.T.copy(), W_dec=W_dec, metadata={"hook_point": "resid_post.1"}, **zeros)


@pytest.fixture
def config(sae: SaeArtefact, tmp_path: Path) -> Callable[..., FindConfig]:
    sae.save(tmp_path / "sae")
    return lambda **changes: FindConfig.parse({"text": TEXT, "sae": tmp_path / "sae", "n": 5} | changes, "test")


def latents(loaded: LoadedModel, sae: SaeArtefact, text: str) -> torch.Tensor:
    ids = torch.tensor([loaded.tokenizer(text)["input_ids"]])
    with torch.no_grad(), capture(loaded.model, loaded.family, [POINT]) as captured:
        loaded.model(ids)
    x = captured[POINT][0]
    return torch.relu(x @ torch.from_numpy(sae.W_enc) + torch.from_numpy(sae.b_enc))


def test_a_text_is_read_but_for_its_first_token(tiny: LoadedModel, sae: SaeArtefact) -> None:
    read = read_text(tiny, sae, TEXT)
    torch.testing.assert_close(read.latents, latents(tiny, sae, TEXT)[1:], atol=1e-4, rtol=1e-4)
    assert len(read.tokens) == len(read.latents)
    assert TEXT.endswith("".join(read.tokens).strip())


def test_of_a_chat_the_users_words_alone_count(tiny: LoadedModel, sae: SaeArtefact) -> None:
    read = read_text(tiny, sae, TEXT, chat=True)
    assert "".join(read.tokens).strip() in TEXT
    assert len(read.tokens) >= len(tiny.tokenizer(TEXT)["input_ids"]) - 2
    assert not torch.equal(read.latents[-1:], read_text(tiny, sae, TEXT).latents[-1:]), "it stands in a template"

    class Shouting:
        """Its template changes what the user says."""

        chat_template = "x"

        def apply_chat_template(self, turns: list[dict[str, str]], **_: object) -> str:
            return turns[0]["content"].upper()

    with pytest.raises(TextError, match="keeps the text"):
        read_text(replace(tiny, tokenizer=Shouting()), sae, TEXT, chat=True)


def test_without_what_is_usual_peaks_rank(
    tiny: LoadedModel, sae: SaeArtefact, config: Callable[..., FindConfig]
) -> None:
    found = find_latents(config(), tiny)
    peaks = latents(tiny, sae, TEXT)[1:].max(0).values
    best = peaks.argsort(descending=True)[:5].tolist()
    assert [each.latent for each in found] == best
    assert all(each.usual is None and each.score == each.peak for each in found)
    assert found[0].peak == pytest.approx(float(peaks.max()), rel=1e-4)
    assert found[0].on[0][1] == found[0].peak
    result = as_result(config(), found)
    assert result["make"] == {"kind": "latents", "latents": {str(each.latent): round(each.peak, 4) for each in found}}
    often = find_latents(config(min_tokens=3, n=24), tiny)
    assert 0 < len(often) < 24
    assert all(each.n_tokens >= 3 for each in often)


@pytest.fixture
def store(tiny: LoadedModel, tmp_path: Path) -> ActivationStore:
    (tmp_path / "text.txt").write_text("\n\n".join(f"A text that says {i} la la and ends." for i in range(40)))
    limits = {"ctx": 16, "commit_sequences": 8, "max_tokens": 400, "hook_points": ("resid_post.1",)}
    harvest(
        HarvestConfig(
            model=tiny.spec,
            text=str(tmp_path / "text.txt"),
            out=str(tmp_path / "store"),
            store_dtype="float32",
            **limits,
        ),
        tiny,
    )
    return ActivationStore.open(tmp_path / "store")


def test_what_is_usual_is_counted_on_a_store(
    tiny: LoadedModel, sae: SaeArtefact, store: ActivationStore, config: Callable[..., FindConfig]
) -> None:
    x = torch.from_numpy(store.activations("resid_post.1"))[torch.from_numpy(store.mask())]
    z = torch.relu(x @ torch.from_numpy(sae.W_enc) + torch.from_numpy(sae.b_enc))
    usual = usual_in(store, sae, range(24), 10**6)
    density = (z > 0).float().mean(0)
    for latent in range(24):
        assert usual[latent].density == pytest.approx(max(float(density[latent]), 1 / len(z)), rel=1e-4)
        if density[latent]:
            assert usual[latent].activation == pytest.approx(float(z[:, latent][z[:, latent] > 0].mean()), rel=1e-3)
    found = find_latents(config(store=store.path, store_tokens=10**6, max_density=0.9), tiny)
    for each in found:
        assert each.usual is not None
        assert each.usual.density <= 0.9
        assert each.score == pytest.approx(-each.peak / each.usual.activation * np.log(each.usual.density), rel=1e-4)
    assert [each.score for each in found] == sorted((each.score for each in found), reverse=True)
    assert usual_in(store, sae, [1], 1)[1].density != usual[1].density, "a part of it will do"


def test_a_latent_that_was_never_seen_counts_as_the_others(store: ActivationStore, sae: SaeArtefact) -> None:
    bias = sae.b_enc.copy()
    bias[3] = -1e9
    usual = usual_in(store, replace(sae, b_enc=bias), [3, 4, 5], 10**6)
    assert usual[3].activation == pytest.approx((usual[4].activation + usual[5].activation) / 2)


def test_mistakes(tiny: LoadedModel, sae: SaeArtefact, config: Callable[..., FindConfig], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vector find"):
        find_latents(config(text=" "), tiny)
    with pytest.raises(TextError, match="beyond the first"):
        read_text(tiny, sae, "a")
    about = {"hook_point": "resid_post.1", "model": {"id": "another", "fingerprint": "f"}}
    replace(sae, metadata=about).save(tmp_path / "other")
    with pytest.raises(MismatchError, match="another"):
        find_latents(config(sae=tmp_path / "other"), tiny)


def test_what_is_not_known_is_shown_as_none() -> None:
    row = as_result(FindConfig(text="x"), [Found(3, 1.0, 2.0, 1, Usual(0.5, 4.0), [("a", 2.0)], "cats")])["latents"][
        "3"
    ]
    assert (row["density"], row["usual"], row["label"], row["strongest on"]) == (0.5, 4.0, "cats", "'a' 2")
