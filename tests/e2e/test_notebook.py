"""The notebooks run from top to bottom: the quickstart on a tiny random model, that of the library as a reader runs it.

Of the quickstart the cell tagged `parameters` is replaced; everything else is what a reader runs.
"""

from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "notebooks" / "01_quickstart.ipynb"
OF_LIBRARY = ROOT / "notebooks" / "02_library.ipynb"

SMALL = """
MODEL = {model!r}
TEXT = "corpus"
LAYER = 1
TOKENS = 4_000
EPOCHS = 2
D_SAE = 128
K = 8
CE_SEQUENCES = 4
DOSES = (0.3, 0.6)
PROMPTS = 2
NEW_TOKENS = 8
RUN = Path({run!r})
"""


def read(notebook: Path = NOTEBOOK) -> Any:
    import nbformat

    return nbformat.read(notebook, as_version=4)


def parameter_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]


def assigned(source: str) -> set[str]:
    return {line.split(" = ")[0] for line in source.splitlines() if " = " in line}


@pytest.mark.parametrize("path", [NOTEBOOK, OF_LIBRARY], ids=lambda path: path.stem)
def test_it_is_valid_and_stripped(path: Path) -> None:
    import nbformat

    notebook = read(path)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)


def test_every_parameter_of_the_quickstart_is_replaced() -> None:
    (cell,) = parameter_cells(read())
    assert assigned(cell.source) == assigned(SMALL)


@pytest.mark.filterwarnings("default")  # those of the Jupyter client are not ours
def test_it_runs(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nbclient import NotebookClient

    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    notebook = read()
    (cell,) = parameter_cells(notebook)
    cell.source = SMALL.format(model=str(tiny_llama), run=str(tmp_path / "run"))
    # The kernel called python3 runs on the interpreter that runs this test.
    NotebookClient(
        notebook, kernel_name="python3", timeout=300, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    for artefact in ("store/zarr.json", "sae/sae/cfg.json", "index/index.sqlite", "library/manifest.json"):
        assert (tmp_path / "run" / artefact).is_file()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs), "at least one plot"


@pytest.mark.filterwarnings("default")  # those of the Jupyter client are not ours
def test_the_shipped_library_opens_and_steers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nbclient import NotebookClient

    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = read(OF_LIBRARY)
    NotebookClient(
        notebook, kernel_name="python3", timeout=300, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    said = outputs[-1]["text"]
    unsteered, one, kit = (part.split("\n")[1] for part in said.strip().split("\n\n"))
    assert len({unsteered, one, kit}) == 3
