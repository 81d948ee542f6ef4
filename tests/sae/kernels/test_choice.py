"""Which kernels a step takes, and what is said where the wanted ones can't run."""

import jax
import pytest

from activations.errors import ConfigError
from sae.kernels import using, why_not_triton
from sae.kernels.choice import operand, triton_is_chosen


def test_triton_needs_a_gpu() -> None:
    assert why_not_triton() == "no GPU, but cpu"
    message = "kernels: expected triton where it can run, got no GPU, but cpu"
    with pytest.raises(ConfigError, match=message) as caught, using("triton"):
        pass
    assert "\n" not in str(caught.value)


def test_the_choice_ends_with_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae.kernels.choice.why_not_triton", lambda: None)
    with using("auto"):
        assert triton_is_chosen()
        with using("xla"):
            assert not triton_is_chosen()
        assert triton_is_chosen()
    assert not triton_is_chosen()


def test_operands_are_low_where_products_are() -> None:
    matrix = jax.numpy.ones((2, 2))
    with jax.default_matmul_precision("float32"):
        assert operand(matrix).dtype == "float32"
    with jax.default_matmul_precision("BF16_BF16_F32"):
        assert operand(matrix).dtype == "bfloat16"
