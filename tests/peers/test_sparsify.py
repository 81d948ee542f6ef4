"""sparsify and saekit read what the other saves, and compute the same numbers from it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

PACKAGES = (
    "eai-sparsify==1.3.3",
    "datasets==5.2.0",
    "dill==0.4.1",
    "docstring-parser==0.18.0",
    "multiprocess==0.70.19",
    "natsort==8.4.0",
    "pandas==3.1.1",
    "schedulefree==1.4.1",
    "simple-parsing==0.1.9",
)


def test_either_reads_what_the_other_writes(
    make_peer: Any, random_sae: Callable, write_ours: Any, read_theirs: Any, by_name: Any, tmp_path: Path
) -> None:
    mine = {kind: random_sae(kind) for kind in ("topk", "topk_transcoder", "topk_skip_transcoder")}
    mine["uncentred"] = random_sae("topk", apply_b_dec_to_input=False)
    write_ours(tmp_path / "ours", "sparsify", mine)
    results = by_name(make_peer("sparsify", PACKAGES, "import sparsify").run(tmp_path / "ours", tmp_path / "theirs"))
    assert results.keys() == mine.keys()

    read = read_theirs(tmp_path / "theirs")
    assert {name: (sae.saved_name, sae.d_sae) for name, sae in read.items()} == {
        "plain": ("topk", 80),
        "expanded": ("topk", 72),
        "loose_rows": ("topk", 72),
        "half": ("topk", 80),
        "transcoder": ("topk_transcoder", 80),
        "skip_transcoder": ("topk_skip_transcoder", 80),
        "skip_autoencoder": ("topk_skip_transcoder", 80),
    }
    norms = np.linalg.norm(read["loose_rows"].W_dec, axis=1)
    assert norms.std() > 0.1, "rows of any norm are kept"
    assert read["plain"].hook_point == "resid_post.12"
    assert "hook_point" not in read["transcoder"].metadata, "the input of a module is not its output"


def test_a_step_of_its_coder_is_timed_beside_ours(make_peer: Any, step_lines: Any) -> None:
    python = make_peer("sparsify", PACKAGES, "import sparsify").python()
    theirs, ours = step_lines("SPARSIFY_PYTHON", python, "--peer", "sparsify", "--dead", "0.25")
    assert (theirs["who"], theirs["optimizer"], theirs["dead_latents"]) == ("sparsify", "adam8bit", 16)
    assert theirs["kernels"] in ("eager", "triton")
    assert theirs["versions"]["sparsify"] == "1.3.3"
    assert ours["ratio_to_fastest_peer"] == pytest.approx(ours["tok_s"] / theirs["tok_s"], abs=1e-3)
