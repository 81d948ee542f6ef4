"""The engine on vLLM as far as no vLLM is needed: what stands in for the model, and what is said where vLLM is not.

tests/peers/test_serving_vllm.py has the engine itself.
"""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from activations.models import LoadedModel
from steer.serving import on_vllm
from steer.serving.engine import context_of, ends_of


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is here")
def test_without_vllm_a_server_says_in_one_line_how_to_get_it(tiny_llama: Path) -> None:
    code = "from steer.cli import main; main()"
    words = ["serve", "--set", "backend=vllm", "--set", f"model={tiny_llama}", "--set", "port=0"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "backend=vllm: expected vLLM" in line
    assert "pip install vllm" in line


def test_what_stands_in_for_a_model_tells_all_but_its_weights(
    tiny: LoadedModel, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_vllm, "find_spec", lambda name: True)
    found = on_vllm.model_of(str(tiny_llama))
    assert found.ref == tiny.ref
    assert (found.spec, found.tokenizer_fingerprint) == (tiny.spec, tiny.tokenizer_fingerprint)
    assert (ends_of(found), context_of(found)) == (ends_of(tiny), context_of(tiny))
    assert not hasattr(found.model, "parameters")
