"""SAELens and saekit read what the other saves, and compute the same numbers from it.

SAELens needs an older transformer-lens and other packages that saekit does not want, so it lives in an environment of
its own. Its loaders for Gemma Scope check those two formats as well.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sae.artefact import KINDS, SaeArtefact

PACKAGES = (
    "sae-lens==6.54.12",
    "transformer-lens==3.5.1",
    "better-abc==0.0.3",
    "datasets==5.2.0",
    "dill==0.4.1",
    "docstring-parser==0.18.0",
    "multiprocess==0.70.19",
    "pandas==3.1.1",
    "simple-parsing==0.1.9",
    "typeguard==4.6.0",
)
UNKNOWN = {"topk_transcoder", "topk_skip_transcoder"}
RESIDUAL, MLP_INPUT, MLP_OUTPUT = ("blocks.12.hook_" + site for site in ("resid_post", "resid_mid", "mlp_out"))
MADE = {
    *("standard", "uncentred", "half", "topk", "topk_rescaled", "jumprelu", "gated"),
    *("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"),
    *("batchtopk_checkpoint", "matryoshka_checkpoint", "topk_training_checkpoint"),
    *("gated_training_checkpoint", "jumprelu_training_checkpoint"),
    *("batchtopk_final", "matryoshka_final", "topk_training_final", "gated_training_final", "jumprelu_training_final"),
}


def test_either_reads_what_the_other_writes(
    make_peer: Any, random_sae: Callable, write_ours: Any, read_theirs: Any, by_name: Any, tmp_path: Path
) -> None:
    ours, theirs, gemma = tmp_path / "ours", tmp_path / "theirs", tmp_path / "gemma"
    mine: dict[str, SaeArtefact] = {kind: random_sae(kind) for kind in KINDS if kind not in UNKNOWN}
    mine["uncentred"] = random_sae("jumprelu", apply_b_dec_to_input=False)
    mine["crosscoder"] = random_sae("jumprelu", metadata={"hook_point": "resid_post.10+resid_post.12"})
    write_ours(ours, "saelens", mine)
    write_ours(ours, "saekit", {kind: random_sae(kind) for kind in UNKNOWN})
    scope_1 = {"1-sae": "jumprelu", "1-transcoder": "jumprelu_transcoder"}
    scope_2 = {f"2-{kind}": kind for kind in ("jumprelu", "jumprelu_transcoder", "jumprelu_skip_transcoder")}
    write_ours(gemma, "gemma_scope", {name: random_sae(kind) for name, kind in scope_1.items()})
    write_ours(gemma, "gemma_scope_2", {name: random_sae(kind) for name, kind in scope_2.items()})

    lines = make_peer("saelens", PACKAGES, "import sae_lens").run(ours, theirs, gemma)
    refused = {line["name"] for line in lines if "refused" in line}
    assert refused == UNKNOWN, "SAELens must not take a TopK transcoder for one without k"
    results = by_name([line for line in lines if "refused" not in line])
    assert results.keys() == mine.keys() | scope_1.keys() | scope_2.keys()
    for name, sae in mine.items():
        result = results[name]
        assert (result["architecture"], result["hook_name_out"]) == (
            sae.saved_name,
            MLP_OUTPUT if sae.transcodes else None,
        )
        reads = "blocks.10.hook_resid_post+" + RESIDUAL if name == "crosscoder" else RESIDUAL
        assert result["hook_name"] == (MLP_INPUT if sae.transcodes else reads)
    assert {results[name]["architecture"] for name in scope_2} == {*scope_2.values()}

    read = read_theirs(theirs)
    assert read.keys() == MADE
    for name, sae in read.items():
        assert sae.hook_point == ("resid_mid.12->mlp_out.12" if "transcoder" in name else "resid_post.12")


@pytest.mark.parametrize("arch", ["topk", "batchtopk"])
def test_a_step_of_its_trainer_is_timed_beside_ours(make_peer: Any, step_lines: Any, arch: str) -> None:
    python = make_peer("saelens", PACKAGES, "import sae_lens").python()
    *theirs, ours = step_lines("SAELENS_PYTHON", python, "--arch", arch, "--peer", "saelens", "--dead", "0.25")
    assert [(line["dtype"], line["autocast"]) for line in theirs] == [("float32", False), ("bfloat16", True)]
    for line in theirs:
        assert (line["who"], line["arch"], line["dead_latents"], len(line["all_ms"])) == ("saelens", arch, 16, 3)
        assert line["versions"]["sae_lens"] == "6.54.12"
    assert ours["ratio_to_fastest_peer"] == pytest.approx(ours["tok_s"] / max(x["tok_s"] for x in theirs), abs=1e-3)
