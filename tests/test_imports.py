"""Which module may import what: rooms one way, torch and jax apart, and nothing that runs code out of files."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("activations", "sae", "steer")
MODULES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
JAX = {"jax", "jaxlib", "flax", "optax", "orbax"}
TORCH = {"torch", "transformers"}
UNLESS_WEIGHTS_ONLY = {"torch.load"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "torch.jit.load", "np.load", "yaml.load"}
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def imported(tree: ast.AST) -> set[str]:
    """Top-level names of all imports, those inside functions and TYPE_CHECKING included."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." if node.level else str(node.module))
    return {name.split(".")[0] for name in names}


def problems(room: str, source: str) -> Iterator[str]:
    """What is wrong with a module of a room."""
    tree = ast.parse(source)
    names = imported(tree)
    if names & TORCH and names & JAX:
        yield "imports torch and jax"
    if above := names & set(ROOMS[ROOMS.index(room) + 1 :]):
        yield f"imports {', '.join(sorted(above))}"
    if unsafe := names & FORBIDDEN_MODULES:
        yield f"imports {', '.join(sorted(unsafe))}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in FORBIDDEN_CALLS and not (called in UNLESS_WEIGHTS_ONLY and reads_weights_only(node)):
                yield f"calls {called}"
            if called.endswith((".load_pickle", ".read_pickle")):
                yield f"calls {called}"
            for keyword in node.keywords:
                if keyword.arg in ("trust_remote_code", "allow_pickle") and ast.unparse(keyword.value) != "False":
                    yield f"passes {keyword.arg}"
                if keyword.arg == "shell" and ast.unparse(keyword.value) != "False":
                    yield "runs a shell"


def reads_weights_only(call: ast.Call) -> bool:
    """Whether a call says weights_only=True in so many words, which makes torch.load build tensors and nothing else."""
    return any(keyword.arg == "weights_only" and ast.unparse(keyword.value) == "True" for keyword in call.keywords)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_and_calls_only_what_it_may(path: Path) -> None:
    assert list(problems(path.relative_to(ROOT).parts[0], path.read_text())) == []


@pytest.mark.parametrize(
    ("room", "source", "problem"),
    [
        ("sae", "import torch\nfrom jax import numpy", "imports torch and jax"),
        ("sae", "def f():\n    import flax.nnx, transformers", "imports torch and jax"),
        ("activations", "from sae.config import TrainConfig", "imports sae"),
        ("sae", "def f():\n    import steer.cli", "imports steer"),
        ("sae", "import pickle", "imports pickle"),
        ("steer", "import torch\ntorch.load(path)", "calls torch.load"),
        ("steer", "import torch\ntorch.load(path, weights_only=False)", "calls torch.load"),
        ("steer", "import torch\ntorch.load(path, weights_only=safe)", "calls torch.load"),
        ("steer", "import torch\ntorch.load(path, **{'weights_only': True})", "calls torch.load"),
        ("steer", "torch.jit.load(path, weights_only=True)", "calls torch.jit.load"),
        ("steer", "eval(text)", "calls eval"),
        ("steer", "exec(text)", "calls exec"),
        ("steer", "load(name, trust_remote_code=True)", "passes trust_remote_code"),
        ("steer", "load(name, trust_remote_code=flag)", "passes trust_remote_code"),
        ("steer", "np.load(path, allow_pickle=True)", "passes allow_pickle"),
    ],
)
def test_the_scan_finds_what_it_looks_for(room: str, source: str, problem: str) -> None:
    assert problem in list(problems(room, source))


def test_weights_alone_may_be_loaded() -> None:
    assert list(problems("sae", "import torch\ntorch.load(path, mmap=True, weights_only=True)")) == []


def test_rooms_were_scanned() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in MODULES} == set(ROOMS)
    assert len(MODULES) > 30


@pytest.mark.parametrize(
    "path", [path for path in MODULES if path.name == "__init__.py"], ids=lambda path: str(path.relative_to(ROOT))
)
def test_package_files_are_empty_or_tables(path: Path) -> None:
    """A table may come with its Protocol and the function that looks a row up."""
    for node in ast.parse(path.read_text()).body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_protocol = isinstance(node, ast.ClassDef) and "Protocol" in map(ast.unparse, node.bases)
        is_table = isinstance(node, ast.Import | ast.ImportFrom | ast.Assign | ast.AnnAssign | ast.FunctionDef)
        assert is_docstring or is_protocol or is_table, f"line {node.lineno}: {ast.unparse(node)}"


def loaded(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after a statement."""
    code = f"import sys\n{statement}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("modules", "without"),
    [
        ("sae.train, sae.architectures, sae.step, sae.data, sae.checkpoints", TORCH),
        (
            "steer.runtime, steer.generate, steer.demo, sae.evaluate, sae.index, sae.torch_view, activations.harvest",
            JAX,
        ),
        ("activations.store, activations.text, sae.artefact, sae.formats.convert, sae.metrics", TORCH | JAX),
        ("sae.index_db, sae.config, steer.cli", TORCH | JAX),
    ],
)
def test_a_stage_leaves_the_other_framework_out(modules: str, without: set[str]) -> None:
    assert not loaded(f"import {modules}") & without


def test_the_check_sees_a_framework_that_is_there() -> None:
    assert loaded("import sae.config, jax.numpy") & JAX
    assert loaded("import steer.cli\ndef f():\n    import torch\nf()") & TORCH
