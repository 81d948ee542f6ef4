"""One model, loaded once, used by one at a time."""

import threading
from pathlib import Path

import pytest

from activations.errors import ModelError
from steer.browser.model import SharedModel


def test_it_is_loaded_once_however_many_ask(tiny_llama: Path) -> None:
    shared = SharedModel(str(tiny_llama), "cpu")
    assert shared.state == "not loaded"
    seen: list[int] = []
    inside = threading.Semaphore(1)

    def use() -> None:
        with shared.using() as loaded:
            assert inside.acquire(blocking=False), "two at once"
            seen.append(id(loaded))
            inside.release()

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(seen), len(set(seen)), shared.state) == (4, 1, "ready")


def test_without_a_model_it_says_so() -> None:
    assert SharedModel(None).state == "none"
    with pytest.raises(ModelError, match="--set model"), SharedModel(None).using():
        pass


def test_who_waits_too_long_is_told(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steer.browser.model.WAIT_S", 0.01)
    shared = SharedModel(str(tiny_llama), "cpu")
    told: list[str] = []

    def wait() -> None:
        try:
            with shared.using():
                told.append("used")
        except ModelError as error:
            told.append(str(error))

    with shared.using():
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join()
    assert len(told) == 1
    assert "nobody else" in told[0]
