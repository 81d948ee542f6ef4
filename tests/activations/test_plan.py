"""What a dry run promises is what a harvest then takes."""

import json
from pathlib import Path

import pytest

from activations.config import HarvestConfig
from activations.errors import ConfigError, DiskSpaceError, TextError
from activations.harvest import harvest, store_meta
from activations.models import LoadedModel, load_model
from activations.plan import CPU_BATCH_TOKENS, choose_batch_tokens, plan
from activations.storage import FolderStorage
from activations.store import ActivationStore


@pytest.fixture(scope="module")
def tiny(tiny_llama: Path) -> LoadedModel:
    return load_model(str(tiny_llama), dtype="float32")


def config(folder: Path, n_documents: int, **changes: object) -> HarvestConfig:
    text = folder / f"{n_documents}.jsonl"
    rows = [{"text": f"Document {i} says {'la ' * (7 * i % 41)}and ends."} for i in range(n_documents)]
    text.write_text("\n".join(map(json.dumps, rows)))
    values = {"text": str(text), "out": str(folder / "s"), "hook_points": ("resid_post.1", "mlp_out.2"), "ctx": 32}
    return HarvestConfig.model_validate({**values, "commit_sequences": 8, "batch_tokens": 256, **changes})


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int8"])
@pytest.mark.parametrize("max_tokens", [3000, 10**7])
def test_a_plan_comes_true(tiny: LoadedModel, tmp_path: Path, dtype: str, max_tokens: int) -> None:
    settings = config(tmp_path, 60 if max_tokens > 3000 else 600, max_tokens=max_tokens, store_dtype=dtype)
    planned = plan(settings, tiny, store_meta(settings, tiny))
    result = harvest(settings, tiny)
    written = sum(ActivationStore.open(result.path).storage.sizes().values())
    assert result.n_sequences == pytest.approx(planned.sequences, rel=0.1)
    assert result.n_tokens == pytest.approx(planned.tokens, rel=0.1)
    assert planned.bytes_needed == pytest.approx(written, rel=0.3)
    assert planned.bytes_free
    assert (planned.seconds, planned.tok_s) == (None, None)


def test_a_probe_gives_the_time(tiny: LoadedModel, tmp_path: Path) -> None:
    settings = config(tmp_path, 600, max_tokens=6000)
    planned = plan(settings, tiny, store_meta(settings, tiny), probe_s=0.3)
    assert planned.seconds == pytest.approx(planned.tokens / planned.tok_s)
    assert planned.seconds > 0


def test_a_disk_that_is_too_small_is_named(tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(tmp_path, 600, max_tokens=5000)
    needed = plan(settings, tiny, store_meta(settings, tiny)).bytes_needed
    monkeypatch.setattr(FolderStorage, "free_bytes", lambda self: needed - 1)
    with pytest.raises(DiskSpaceError, match="keep_tokens"):
        harvest(settings, tiny)
    assert not (tmp_path / "s").exists()
    ring = settings.model_copy(update={"keep_tokens": 32 * 32})
    assert plan(ring, tiny, store_meta(ring, tiny)).bytes_needed < needed / 2


def test_what_is_written_already_needs_no_room(
    tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(tmp_path, 600, max_tokens=5000)
    harvest(settings, tiny)
    monkeypatch.setattr(FolderStorage, "free_bytes", lambda self: 20_000)
    assert harvest(settings, tiny).new_tokens == 0


def test_a_text_without_tokens(tiny: LoadedModel, tmp_path: Path) -> None:
    settings = config(tmp_path, 3).model_copy(update={"text": str(tmp_path / "empty.txt")})
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(TextError):
        plan(settings, tiny, store_meta(settings, tiny))


def test_batch_tokens_is_settled_once(tiny: LoadedModel, tmp_path: Path) -> None:
    settings = config(tmp_path, 100, batch_tokens="auto")
    meta = store_meta(settings, tiny)
    assert meta.batch_tokens == choose_batch_tokens(settings, tiny, meta) == CPU_BATCH_TOKENS
    harvest(settings.model_copy(update={"batch_tokens": 64}), tiny)
    assert store_meta(settings, tiny).batch_tokens == 64, "a resumed harvest goes on with what the store was made with"


def test_a_ring_needs_room_for_a_few_commits(tiny: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="1024 or more"):
        store_meta(config(tmp_path, 100, keep_tokens=1023), tiny)
    assert store_meta(config(tmp_path, 100, keep_tokens=1024), tiny).pinned_sequences == 8
