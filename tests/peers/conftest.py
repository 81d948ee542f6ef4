"""An environment for each peer, and what all comparisons share. Scripts for those environments are not tests.

A folder of SAEs has a subfolder each, with `layers.12`, the saved SAE, and `reference.npz`: inputs `x`, and the
`latents` and `reconstruction` that whoever wrote the SAE makes of them.
"""

import fcntl
import json
import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from activations.models import LoadedModel, load_model
from activations.quiet import quiet_transformers
from sae.artefact import KINDS, SaeArtefact
from sae.formats import find, read_any
from sae.torch_view import TorchSae

collect_ignore_glob = ["check_*.py", "_*.py"]

ROOT, HERE = Path(__file__).resolve().parents[2], Path(__file__).parent
D_MODEL, D_SAE, K, N_TOKENS = 24, 80, 6, 64
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Peer:
    """An environment with a released peer, which borrows torch, transformers and numpy from the one of the tests."""

    name: str
    packages: tuple[str, ...]
    imports: str

    @property
    def environment(self) -> Path:
        return ROOT / f".venv-{self.name}"

    def run(self, *arguments: str | Path, check: str = "") -> list[dict[str, Any]]:
        """Run the peer's script, or that of another check; returns the JSON lines that it prints."""
        script = HERE / f"check_{self.name.replace('-', '_')}{check and '_'}{check}.py"
        output = self._call("comparing", self.python(), script, *arguments)
        return [json.loads(line) for line in output.splitlines() if line.startswith("{")]

    def python(self) -> Path:
        """Its interpreter, once all packages are there."""
        folder = os.open(HERE, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)  # tests of one peer may run in several processes
            self._prepare()
        finally:
            os.close(folder)
        return self._python

    @property
    def _python(self) -> Path:
        return self.environment / "bin" / "python"

    def _prepare(self) -> None:
        ready, wanted = self.environment / "ready.txt", "\n".join((sys.prefix, *self.packages))
        if ready.exists() and ready.read_text() == wanted:
            return
        venv.create(self.environment, with_pip=True, clear=True)
        library = next((self.environment / "lib").glob("python3*/site-packages"))
        (library / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        self._call("installing", self._python, "-m", "pip", "install", "--quiet", "--no-deps", *self.packages)
        self._call("importing", self._python, "-c", self.imports)
        ready.write_text(wanted)

    def _call(self, what: str, *command: str | Path) -> str:
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=900)
        if done.returncode:
            lines = "\n".join((done.stderr or done.stdout).strip().splitlines()[-15:])
            hint = f"{self.environment} can be deleted to start afresh"
            pytest.fail(f"{what} {self.name} failed ({hint}):\n{done.stdout}{lines}")
        return done.stdout


def _artefact(kind: str, seed: int = 7, **changes: Any) -> SaeArtefact:
    about, rng = KINDS[kind], np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    rows = normal(D_SAE, D_MODEL)
    threshold = np.abs(normal(D_SAE))
    threshold[3] = np.inf
    fields = {
        "W_enc": normal(D_MODEL, D_SAE),
        "b_enc": normal(D_SAE),
        "W_dec": rows / np.linalg.norm(rows, axis=1, keepdims=True),
        "b_dec": normal(D_MODEL),
        "threshold": threshold if about.architecture == "jumprelu" else None,
        "k": K if about.architecture == "topk" else None,
        "W_skip": normal(D_MODEL, D_MODEL) if about.skips else None,
        "apply_b_dec_to_input": not about.transcodes,
        "metadata": {
            "model": {"id": "tiny", "fingerprint": "f00d"},
            "hook_point": "resid_mid.12->mlp_out.12" if about.transcodes else "resid_post.12",
        },
    }
    return SaeArtefact(architecture=about.architecture, transcodes=about.transcodes, **fields | changes)


def _outputs(sae: SaeArtefact, x: np.ndarray) -> dict[str, np.ndarray]:
    view = TorchSae(sae)
    latents = view.encode(torch.tensor(x))
    return {"latents": latents.numpy(), "reconstruction": view.reconstruct(torch.tensor(x), latents).numpy()}


@pytest.fixture(scope="session")
def make_peer() -> type[Peer]:
    """The environment of a peer: its name, the packages to add without their dependencies, and an import to try."""
    return Peer


@pytest.fixture(scope="session")
def small(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A random Llama whose heads can be halved and are wide enough for vLLM's attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=300, max_position_embeddings=2048, initializer_range=0.2, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("small") / "model"
    with quiet_transformers():
        LlamaForCausalLM(config).save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
    return load_model(str(folder), device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def step_lines() -> Callable[..., list[dict[str, Any]]]:
    """What benchmarks/train_step.py prints with tiny sizes, by a Python that has a peer."""

    def lines(variable: str, python: Path, *words: str) -> list[dict[str, Any]]:
        tiny = ["--d-model", "16", "--d-sae", "64", "--k", "4", "--batch", "32", "--steps", "2", "--repeats", "3"]
        command = [sys.executable, str(ROOT / "benchmarks" / "train_step.py"), *tiny, *words]
        environment = {**os.environ, variable: str(python), "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    return lines


@pytest.fixture(scope="session")
def random_sae() -> Callable[..., SaeArtefact]:
    """A random SAE with unit rows of a kind by its name in cfg.json; keywords replace tensors or flags."""
    return _artefact


@pytest.fixture(scope="session")
def write_ours() -> Callable[[Path, str, dict[str, SaeArtefact]], None]:
    """Write SAEs in a format into a folder, each beside what saekit makes of random inputs."""

    def write(folder: Path, format_: str, saes: dict[str, SaeArtefact]) -> None:
        for number, (name, sae) in enumerate(saes.items()):
            find(format_).write(sae, folder / name / "layers.12")
            x = np.random.default_rng(number).normal(size=(N_TOKENS, sae.d_model)).astype(np.float32)
            np.savez(folder / name / "reference.npz", x=x, **_outputs(sae, x))

    return write


@pytest.fixture(scope="session")
def read_theirs() -> Callable[[Path], dict[str, SaeArtefact]]:
    """Read every SAE that a peer wrote, and compare with what the peer itself made of random inputs."""

    def read(folder: Path) -> dict[str, SaeArtefact]:
        saes = {path.name: read_any(path / "layers.12") for path in sorted(folder.iterdir())}
        for name, sae in saes.items():
            reference = np.load(folder / name / "reference.npz")
            for key, got in _outputs(sae, reference["x"]).items():
                error = np.abs(got - reference[key]).max() / np.abs(reference[key]).max()
                assert error <= TOLERANCE, f"{name}: {key} differs by {error}"
            assert (reference["latents"] > 0).any(axis=1).mean() > 0.9, f"{name}: latents of random inputs are active"
        return saes

    return read


@pytest.fixture(scope="session")
def by_name() -> Callable[[list[dict[str, Any]]], dict[str, dict[str, Any]]]:
    """The peer's results by the name of the SAE, once all of them are known to be equal."""

    def check(results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for result in results:
            assert max(result["encode"], result["reconstruct"]) <= TOLERANCE, result
        return {result["name"]: result for result in results}

    return check
