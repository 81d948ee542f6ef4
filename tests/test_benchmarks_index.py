"""benchmarks/index.py times indexing beside encoding, index_build.py all of it; each prints one line."""

import itertools
import json
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.mark.parametrize("architecture", ["jumprelu", "topk"])
def test_it_prints_one_line(
    architecture: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    arguments = {"--architecture": architecture, "--d-model": 8, "--d-sae": 64, "--k": 3, "--tokens": 1280}
    monkeypatch.setattr(time, "perf_counter", map(float, itertools.accumulate(itertools.count())).__next__)
    monkeypatch.setattr(sys, "argv", ["index.py", *(str(part) for pair in arguments.items() for part in pair)])
    runpy.run_path(str(FOLDER / "index.py"), run_name="__main__")
    (text,) = capsys.readouterr().out.splitlines()
    line = json.loads(text)
    assert (line["d_sae"], line["architecture"]) == (64, architecture)
    assert line["tokens"] >= 1280
    assert line["l0"] == pytest.approx(3, rel=0.3)
    assert line["encode_s"] > 0
    assert line["ratio"] == pytest.approx(line["index_s"] / line["encode_s"], rel=0.01)


def test_a_whole_index_is_timed(
    tiny_llama: Path,
    load_benchmark: Callable[[str], ModuleType],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    benchmark = load_benchmark("index_build")
    monkeypatch.setattr(benchmark, "GROUP", 4)
    arguments = {"--model": tiny_llama, "--d-sae": 64, "--k": 3, "--tokens": 1000, "--repeats": 2}
    monkeypatch.setattr(sys, "argv", ["index_build.py", *(str(part) for pair in arguments.items() for part in pair)])
    benchmark.main()
    (text,) = capsys.readouterr().out.splitlines()
    line = json.loads(text)
    assert (line["d_model"], line["d_sae"], line["repeats"], line["is_random"]) == (32, 64, 2, True)
    assert line["tokens"] == 8 * 128, "whole groups of sequences"
    assert line["wall_s"] >= line["read_s"] > 0
    assert line["cpu_s"] > 0
    assert line["database_kb_a_latent"] > line["state_kb_a_latent"] > 0
