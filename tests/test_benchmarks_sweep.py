"""benchmarks/sweep.py prints a line for each number of SAEs."""

import json
from collections.abc import Callable
from types import ModuleType

import pytest


def test_it_prints_a_line_a_number_of_saes(
    load_benchmark: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--n", "1,3", "--d-sae", "32", "--d-model", "8", "--k", "2", "--batch", "16", "--steps", "2"]
    load_benchmark("sweep").main(words)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["n"], line["d_sae"]) for line in lines] == [(1, 32), (3, 32)]
    for line in lines:
        assert line["device"]
        assert line["ratio_to_one"] == pytest.approx(line["ms_step"] / line["ms_one"], rel=0.1)
        assert line["tok_s"] == pytest.approx(1000 * 16 / line["ms_step"], rel=0.1)
