"""The engine on vLLM as far as no vLLM is needed: what stands in for the model, and what is said where vLLM is not.

tests/peers/test_serving_vllm.py has the engine itself.
"""

import asyncio
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


def test_what_is_asked_for_while_an_answer_is_waited_for_is_asked_at_once() -> None:
    async def main() -> None:
        asked, may_answer, fails = list[list[str]](), asyncio.Event(), False

        async def ask(names: list[str]) -> list[dict[str, list[int]] | None]:
            asked.append(names)
            await may_answer.wait()
            if fails:
                raise RuntimeError("gone")
            return [None if name == "d" else {name: [len(asked)]} for name in names]

        together = on_vllm.Together(ask)
        tasks = {name: asyncio.create_task(together.each(name)) for name in "a"}
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert asked == [["a"]]
        tasks |= {name: asyncio.create_task(together.each(name)) for name in "bcd"}
        await asyncio.sleep(0)
        tasks["c"].cancel()
        may_answer.set()
        found = await asyncio.gather(*tasks.values(), return_exceptions=True)
        assert asked == [["a"], ["b", "c", "d"]]
        assert [found[0], found[1], found[3]] == [{"a": [1]}, {"b": [2]}, None]
        assert isinstance(found[2], asyncio.CancelledError)
        fails = True
        failed = await asyncio.gather(together.each("e"), together.each("f"), return_exceptions=True)
        assert [str(each) for each in failed] == ["gone", "gone"]
        fails = False
        assert await together.each("g") == {"g": [len(asked)]}, "who asks later is answered"

    asyncio.run(main())
