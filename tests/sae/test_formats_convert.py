"""`saekit convert`, and the names that hook points have elsewhere."""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from sae.artefact import SaeArtefact
from sae.formats import SAE_FORMATS, find, read_any
from sae.hook_names import (
    GEMMA_MODULES,
    TRANSFORMER_LENS,
    from_block,
    from_gemma_module,
    from_transformer_lens,
    to_gemma_module,
    to_transformer_lens,
    wiring_text,
)
from steer import cli


class Ran(NamedTuple):
    """What one call of the command left."""

    code: int
    out: str
    err: str


@pytest.fixture
def convert(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    def run(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["saekit", "convert", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as stop:
            return Ran(int(stop.code or 0), *capsys.readouterr())
        return Ran(0, *capsys.readouterr())

    return run


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A sparsify SAE of block 4."""
    rng = np.random.default_rng(0)
    W, b = rng.normal(size=(9, 4)).astype(np.float32), np.zeros(9, np.float32)
    sae = SaeArtefact("topk", np.ascontiguousarray(W.T), b, W, np.ones(4, np.float32), k=2)
    find("sparsify").write(sae, tmp_path / "layers.4")
    return tmp_path / "layers.4"


def test_the_command_says_what_it_is_and_writes_it(convert: Any, source: Path, tmp_path: Path) -> None:
    ran = convert(source, tmp_path / "sae", "--json")
    assert ran.code == 0, ran.err
    said = json.loads(ran.out)
    assert (said["from"], said["to"], said["written"]) == ("sparsify", "saekit", True)
    assert (said["architecture"], said["d_model"], said["d_sae"], said["k"]) == ("topk", 4, 9, 2)
    assert said["hook_point"] == "resid_post.4"
    saved = SaeArtefact.load(tmp_path / "sae")
    assert saved.hook_point == "resid_post.4"
    assert saved.metadata["source"] == {"format": "sparsify", "hookpoint": "layers.4"}
    assert "model" not in saved.metadata, "nothing is known of it"
    plain = convert(source, tmp_path / "other")
    assert "resid_post.4" in plain.out


def test_a_dry_run_writes_nothing(convert: Any, source: Path, tmp_path: Path) -> None:
    ran = convert(source, tmp_path / "sae", "--dry-run", "--json")
    assert json.loads(ran.out)["written"] is False
    assert not (tmp_path / "sae").exists()


def test_every_format_is_in_the_help_and_can_be_named(convert: Any, source: Path, tmp_path: Path) -> None:
    text = " ".join(convert("--help").out.replace("│", " ").split())
    for name in SAE_FORMATS:
        assert name in text
    ran = convert(source, tmp_path / "sae", "--to", "dictionary_learning", "--from", "sparsify")
    assert ran.code == 0, ran.err
    assert read_any(tmp_path / "sae").hook_point == "resid_post.4"


def test_the_user_may_name_the_hook_point(convert: Any, source: Path, tmp_path: Path) -> None:
    assert convert(source, tmp_path / "sae", "--hook-point", "mlp_out.3").code == 0
    assert SaeArtefact.load(tmp_path / "sae").hook_point == "mlp_out.3"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--to", "gguf"), "expected one of saekit, saelens"),
        (("--from", "gguf"), "expected one of saekit, saelens"),
        (("--from", "saelens"), "d_sae"),
        (("--to", "gemma_scope"), "no fixed number of latents"),
        (("--hook-point", "layer 3"), "SITE.LAYER"),
        (("--hook-point", "resid_mid.3->mlp_out.3"), "subtracts b_dec"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    convert: Any, source: Path, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    ran = convert(source, tmp_path / "sae", *arguments)
    assert (ran.code, ran.err.count("\n")) == (1, 1)
    assert said in ran.err
    assert not (tmp_path / "sae").exists()


def test_what_is_there_stays(convert: Any, source: Path, tmp_path: Path) -> None:
    assert convert(source, tmp_path / "sae").code == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "sae").iterdir()}
    for target in (tmp_path / "sae", source, tmp_path / "sae" / "cfg.json"):
        ran = convert(source, target)
        assert ran.code == 1
        assert "nothing, or an empty directory" in ran.err
    assert {path.name: path.read_bytes() for path in (tmp_path / "sae").iterdir()} == before


def test_hook_points_and_their_names_elsewhere() -> None:
    for site in TRANSFORMER_LENS:
        assert from_transformer_lens(to_transformer_lens(f"{site}.12")) == f"{site}.12"
        module = to_gemma_module(f"{site}.12")
        assert from_gemma_module(module) == (f"{site}.12" if site in GEMMA_MODULES else None)
    for name in ("blocks.1.hook_resid_postx", "blocks.x.hook_resid_post", "hook_embed", None, 3):
        assert from_transformer_lens(name) is None
    assert from_block("layers.3") == "resid_post.3"
    assert from_block("layers.3.mlp") is None
    assert wiring_text(["resid_post.1"]) == "resid_post.1"
    assert wiring_text(["resid_post.1", None]) is None
    assert wiring_text([]) is None
