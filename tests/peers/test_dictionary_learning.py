"""dictionary_learning and saekit read what the other saves, and compute the same numbers from it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

PACKAGES = ("dictionary-learning==0.1.0",)
IMPORT = "import importlib.metadata; importlib.metadata.version('dictionary-learning')"


def test_either_reads_what_the_other_writes(
    make_peer: Any, random_sae: Callable, write_ours: Any, read_theirs: Any, by_name: Any, tmp_path: Path
) -> None:
    mine = {kind: random_sae(kind) for kind in ("standard", "topk", "jumprelu")}
    mine |= {f"uncentred_{kind}": random_sae(kind, apply_b_dec_to_input=False) for kind in mine}
    write_ours(tmp_path / "ours", "dictionary_learning", mine)
    peer = make_peer(
        "dictionary-learning", PACKAGES, "import importlib.util as u; assert u.find_spec('dictionary_learning')"
    )
    results = by_name(peer.run(tmp_path / "ours", tmp_path / "theirs"))
    assert {name: result["dict_class"] for name, result in results.items()} == {
        "standard": "AutoEncoder",
        "uncentred_standard": "AutoEncoderNew",
        "topk": "AutoEncoderTopK",
        "uncentred_topk": "AutoEncoderTopK",
        "jumprelu": "JumpReluAutoEncoder",
        "uncentred_jumprelu": "JumpReluAutoEncoder",
    }

    read = read_theirs(tmp_path / "theirs")
    assert {name: (sae.architecture, sae.k, sae.apply_b_dec_to_input) for name, sae in read.items()} == {
        "AutoEncoder": ("standard", None, True),
        "AutoEncoderNew": ("standard", None, False),
        "GatedAutoEncoder": ("jumprelu", None, True),
        "JumpReluAutoEncoder": ("jumprelu", None, False),
        "AutoEncoderTopK": ("topk", 6, True),
        "BatchTopKSAE": ("jumprelu", None, True),
        "MatryoshkaBatchTopKSAE": ("jumprelu", None, True),
    }
    assert {sae.hook_point for sae in read.values()} == {"resid_post.12"}
