"""The architecture that docs/extending.md shows, word for word, trains and is saved."""

import re
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

from activations.store import ActivationStore
from sae.architectures import ARCHITECTURES
from sae.artefact import SaeArtefact
from sae.config import SaeConfig, TrainConfig
from sae.log import read_log
from sae.train import train

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "extending.md"


def test_the_architecture_of_the_guide_trains(
    make_store: Callable[..., ActivationStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = GUIDE.read_text().partition("## An architecture")[2].partition("\n## ")[0]
    code, row = re.search(r"```python\n(.*?)```", section, re.DOTALL), re.search(r'`"(\w+)": (\w+)`', section)
    assert code
    assert row
    (tmp_path / "guide.py").write_text(code[1])
    monkeypatch.setitem(ARCHITECTURES, row[1], runpy.run_path(str(tmp_path / "guide.py"))[row[2]])
    config = TrainConfig(
        store=make_store().path, hook_points=("resid_post.1",), out=tmp_path / "run", batch_size=64,
        train_tokens=20 * 64, log_every=1, sae=SaeConfig(architecture=row[1], d_sae=48, k=4),
    )  # fmt: skip
    (trained,) = train(config).saes.values()
    rows = read_log(tmp_path / "run" / "train.jsonl")
    assert rows[-1]["fvu"] < rows[0]["fvu"]
    assert "sparsity" in rows[0]
    assert SaeArtefact.load(trained.path).architecture == "standard"
