"""benchmarks/sweep.py prints a line for each number of SAEs."""

import json
import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


def test_it_prints_a_line_a_number_of_saes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    main = runpy.run_path(str(FOLDER / "sweep.py"))["main"]
    main(["--n", "1,3", "--d-sae", "32", "--d-model", "8", "--k", "2", "--batch", "16", "--steps", "2"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["n"], line["d_sae"]) for line in lines] == [(1, 32), (3, 32)]
    for line in lines:
        assert line["device"]
        assert line["ratio_to_one"] == pytest.approx(line["ms_step"] / line["ms_one"], rel=0.1)
        assert line["tok_s"] == pytest.approx(1000 * 16 / line["ms_step"], rel=0.1)
