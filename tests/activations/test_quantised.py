"""Quantised models: the fingerprint is that of the weights, the id tells, and rows do not touch each other."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from activations import quantised
from activations.errors import ModelError
from activations.models import LoadedModel, load_model
from activations.quantised import QUANTISATIONS, Quantisation, quantisation_config


@pytest.fixture(scope="module", params=QUANTISATIONS)
def small(request: pytest.FixtureRequest, wide_llama: Path) -> LoadedModel:
    return load_model(str(wide_llama), device="cpu", dtype="float32", quantization=request.param)


def test_a_quantised_model_is_told_by_its_id_and_fits_vectors_of_its_weights(
    small: LoadedModel, wide_llama: Path
) -> None:
    whole = load_model(str(wide_llama), device="cpu", dtype="float32")
    assert (small.fingerprint, small.dtype) == (whole.fingerprint, whole.dtype)
    assert small.id in {f"{whole.id}+{name}" for name in QUANTISATIONS}
    assert small.ref == replace(whole, id=small.id).ref
    x = torch.arange(20, 60)[None]
    with torch.inference_mode():
        rounded, exact = small.model(x).logits, whole.model(x).logits
    assert 0 < (rounded - exact).norm() < 0.8 * exact.norm()


def test_a_row_does_not_depend_on_the_row_beside_it(small: LoadedModel) -> None:
    x = torch.stack([torch.arange(20, 60), torch.arange(200, 240)])
    with torch.inference_mode():
        together, alone = small.model(x).logits, small.model(x[:1]).logits
    torch.testing.assert_close(together[:1], alone, atol=1e-4, rtol=1e-4)


def test_an_unknown_name_and_an_absent_package_are_errors(monkeypatch: pytest.MonkeyPatch, tiny_llama: Path) -> None:
    with pytest.raises(ModelError, match="none or one of bnb-4bit, torchao-int8"):
        load_model(str(tiny_llama), quantization="gptq")
    absent = Quantisation("no_such_package", lambda dtype: None)
    monkeypatch.setitem(quantised.QUANTISATIONS, "absent", absent)
    with pytest.raises(ModelError, match=r"the package no_such_package.*pip install 'saekit\[quantised\]'"):
        quantisation_config("absent", torch.float32)
    assert quantisation_config("none", torch.float32) is None
