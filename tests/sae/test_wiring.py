"""Which hook points an SAE reads and writes, as text."""

import numpy as np
import pytest

from activations.errors import ConfigError, HookPointError
from sae.wiring import Wiring, side_by_side


@pytest.mark.parametrize(
    ("text", "reads", "writes"),
    [
        ("resid_post.12", ("resid_post.12",), ("resid_post.12",)),
        ("resid_mid.12->mlp_out.12", ("resid_mid.12",), ("mlp_out.12",)),
        ("resid_post.1+resid_post.2", ("resid_post.1", "resid_post.2"), ("resid_post.1", "resid_post.2")),
        ("resid_mid.1+resid_mid.2->mlp_out.1", ("resid_mid.1", "resid_mid.2"), ("mlp_out.1",)),
    ],
)
def test_text_and_back(text: str, reads: tuple[str, ...], writes: tuple[str, ...]) -> None:
    wiring = Wiring.parse(text)
    assert (wiring.reads, wiring.writes) == (reads, writes)
    assert wiring.transcodes == (reads != writes)
    assert str(wiring) == text
    assert Wiring.parse(f" {text.replace('+', ' + ').replace('->', ' -> ')} ") == wiring
    assert set(wiring.hook_points) == {*reads, *writes}
    assert len(wiring.hook_points) == len(set(wiring.hook_points))


def test_its_file_name_needs_no_quotes() -> None:
    assert Wiring.parse("resid_mid.1->mlp_out.1").file_name == "resid_mid.1-to-mlp_out.1"


@pytest.mark.parametrize(
    ("text", "error", "match"),
    [
        ("resid_post", HookPointError, "SITE.LAYER"),
        ("", HookPointError, "SITE.LAYER"),
        ("resid_post.1->", HookPointError, "SITE.LAYER"),
        ("resid_post.1++resid_post.2", HookPointError, "SITE.LAYER"),
        ("resid_post.1->mlp_out.1->mlp_out.2", ConfigError, "at most one arrow, got 2"),
        ("resid_post.1+resid_post.1", ConfigError, "different hook points"),
    ],
)
def test_mistakes(text: str, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        Wiring.parse(text)


def test_side_by_side_keeps_the_order_and_copies_nothing_of_one() -> None:
    x = {"a": np.ones((3, 2), np.float32), "b": np.zeros((3, 2), np.float32)}
    np.testing.assert_array_equal(side_by_side(x, ("b", "a")), [[0, 0, 1, 1]] * 3)
    assert side_by_side(x, ("a",)) is x["a"]
