"""SAELens reads what saekit saves, and computes the same numbers from it.

SAELens needs an older transformer-lens and other packages that saekit does not want, so it lives in an environment of
its own: `.venv-saelens`, made once, beside the repository's files. That environment borrows torch, transformers and
numpy from the one that runs the tests; what is listed below is all it adds.
"""

import json
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import jax
import numpy as np
import pytest

from sae.architectures import ARCHITECTURES, find
from sae.config import SaeConfig

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = ROOT / ".venv-saelens"
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
D_MODEL, D_SAE, K, SCALE = 24, 80, 6, 0.37


@pytest.fixture(scope="session")
def saelens_python() -> Path:
    """Python of an environment in which `import sae_lens` works."""
    python, ready = ENVIRONMENT / "bin" / "python", ENVIRONMENT / "ready.txt"
    wanted = "\n".join((sys.prefix, *PACKAGES))
    if not ready.exists() or ready.read_text() != wanted:
        venv.create(ENVIRONMENT, with_pip=True, clear=True)
        library = next((ENVIRONMENT / "lib").glob("python3*/site-packages"))
        (library / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        _run("installing sae-lens", python, "-m", "pip", "install", "--quiet", "--no-deps", *PACKAGES)
        _run("importing sae-lens", python, "-c", "import sae_lens")
        ready.write_text(wanted)
    return python


def _run(what: str, *command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=900)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()[-15:]
        pytest.fail(f"{what} failed ({ENVIRONMENT} can be deleted to start afresh):\n{done.stdout}" + "\n".join(lines))
    return done.stdout


def _write(name: str, folder: Path) -> None:
    """Save a random SAE of this architecture, and its outputs on random inputs."""
    keys = jax.random.split(jax.random.key(7), 4)
    sae = find(name)(SaeConfig(architecture=name, d_sae=D_SAE, k=K), jax.random.normal(keys[0], (D_MODEL,)), keys[1])
    sae.b_enc[...] = 0.1 * jax.random.normal(keys[2], (D_SAE,))
    x = jax.random.normal(keys[3], (64, D_MODEL))
    for batch in (x, x[:32]):  # after two different ones, a running threshold equals no pre-activation
        sae.observe(sae.select(sae.preactivations(batch)))
    artefact = sae.to_artefact(SCALE, {"model": {"id": "tiny", "fingerprint": "f00d"}, "hook_point": "resid_post.12"})
    artefact.save(folder / "sae")
    raw, saved = x / SCALE, type(sae).from_artefact(artefact)
    latents = saved.encode(raw)
    np.savez(folder / "reference.npz", x=raw, latents=latents, reconstruction=saved.decode(latents))


def test_saelens_encodes_and_decodes_as_saekit_does(saelens_python: Path, tmp_path: Path) -> None:
    for name in ARCHITECTURES:
        (tmp_path / name).mkdir()
        _write(name, tmp_path / name)
    output = _run("comparing with sae-lens", saelens_python, Path(__file__).with_name("check_saelens.py"), tmp_path)
    results = {result["name"]: result for result in map(json.loads, output.splitlines())}
    assert results.keys() == ARCHITECTURES.keys()
    assert {name: result["architecture"] for name, result in results.items()} == {
        "topk": "topk",
        "batchtopk": "jumprelu",
    }
    for result in results.values():
        assert max(result["encode"], result["decode"]) <= 1e-5, result
        assert result["hook_name"] == "blocks.12.hook_resid_post"
