"""Make saekit's embedded English text corpus by sampling a small instruction-tuned language model.

    compose ──jobs──▶ sample ──raw samples──▶ clean ──▶ filter ──▶ deduplicate ──▶ balance ──▶ corpus.jsonl.xz
    (subject x genre     (GPU)      (JSONL)
     x register x form)

1. Compose the jobs: `corpus_prompts.py`.
2. Sample: large batches at one temperature inside a nucleus, each batch under one of a few length limits. Raw samples
   go to a file, so that cleaning can be repeated without a GPU.
3. Clean, filter, deduplicate and balance: `corpus_filters.py`.

Everything but the sampling itself is a pure function of the seed; sampling repeats on one device and software version.
It leaves out any check of facts: the texts read like English of many kinds, and that is all they are for.

    python -m activations.data.make_corpus --model DIR --raw raw.jsonl --out corpus.jsonl.xz --seed 0 --device cuda
"""

import argparse
import json
import lzma
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from activations.data.corpus_filters import Document, Sample, assemble
from activations.data.corpus_prompts import SYSTEM, Job, compose

if TYPE_CHECKING:
    import torch

LIMITS = (512, 384, 288, 192)
"""Most new tokens of a sample, batch by batch, so that documents differ in length."""


def log(message: str) -> None:
    """Write one line to stderr."""
    sys.stderr.write(message + "\n")


# ----------------------------------------------------------------------------------------------------------- sample


def sample(jobs: list[Job], args: argparse.Namespace, done: int = 0) -> Iterator[Sample]:
    """Yield a sample per job but the first `done`, batch by batch; a batch depends on the seed and its place only."""
    import torch

    model, tokenizer = load_model(args.model, args.device), load_tokenizer(args.model)
    begin = time.monotonic()
    total = 0
    for start in range(done, len(jobs), args.batch_size):
        index = start // args.batch_size
        batch = jobs[start : start + args.batch_size]
        torch.manual_seed(args.seed * 1000 + index)
        texts, n_tokens = _generate(model, tokenizer, batch, min(LIMITS[index % len(LIMITS)], args.max_new), args)
        total += n_tokens
        seconds = time.monotonic() - begin
        log(f"batch {index}: {start + len(batch)}/{len(jobs)} samples, {total} tokens, {total / seconds:.0f} tok/s")
        yield from (Sample(job, text, finished) for job, (text, finished) in zip(batch, texts, strict=True))


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer from a folder with a GGUF file or a Hugging Face checkpoint; it pads on the left."""
    from transformers import AutoTokenizer

    gguf = next((path.name for path in folder.glob("*.gguf")), None)
    return AutoTokenizer.from_pretrained(folder, gguf_file=gguf, padding_side="left", pad_token="<|im_end|>")


def load_model(folder: Path, device: str) -> Any:
    """Load the model, in bfloat16 on a GPU and float32 elsewhere."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    gguf = next((path.name for path in folder.glob("*.gguf")), None)
    options: dict[str, Any] = {"dtype": torch.bfloat16 if device.startswith("cuda") else torch.float32}
    if gguf:
        options |= {"gguf_file": gguf, "quantization_config": GgufConfig(dequantize=True)}
    model: Any = AutoModelForCausalLM.from_pretrained(folder, **options)
    return model.to(device).eval()


def _generate(
    model: Any, tokenizer: Any, jobs: list[Job], limit: int, args: argparse.Namespace
) -> tuple[list[tuple[str, bool]], int]:
    """Return (text, whether the model ended it) per job, and the number of tokens sampled."""
    import torch

    prompts = [_render(job, tokenizer) for job in jobs]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
    ends = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    with torch.inference_mode():
        ids = model.generate(
            inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=limit,
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            eos_token_id=ends, pad_token_id=ends[-1], logits_processor=[_nucleus(args.temperature, args.top_p)],
        )  # fmt: skip
    rows = ids[:, inputs["input_ids"].shape[1] :].tolist()
    results: list[tuple[str, bool]] = []
    total = 0
    for row in rows:
        length = next((i for i, token in enumerate(row) if token in ends), len(row))
        total += length
        results.append((tokenizer.decode(row[:length]), length < len(row)))
    return results, total


def _render(job: Job, tokenizer: Any) -> str:
    if job.form == "plain":
        return job.prompt
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": job.prompt}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _nucleus(temperature: float, top_p: float, top_k: int = 200) -> Callable[..., "torch.Tensor"]:
    """Return a logits processor: the smallest set of likely tokens whose mass reaches top_p, of at most top_k tokens.

    Sorting only the top_k makes it several times faster than a full sort of the vocabulary; what it cuts is below 1%.
    """
    import torch

    def process(input_ids: "torch.Tensor", scores: "torch.Tensor") -> "torch.Tensor":
        top, indices = (scores / temperature).topk(top_k, dim=-1)
        mass = top.softmax(-1).cumsum(-1) - top.softmax(-1)
        return torch.full_like(scores, -torch.inf).scatter(-1, indices, top.masked_fill(mass > top_p, -torch.inf))

    return process


# ------------------------------------------------------------------------------------------------------------ files


def append_raw(samples: Iterable[Sample], path: Path) -> None:
    """Append samples as JSON lines, flushed one by one so that an interrupted run can be continued."""
    with path.open("a", encoding="utf-8") as file:
        for item in samples:
            file.write(json.dumps({**item.job._asdict(), "text": item.text, "finished": item.finished}) + "\n")
            file.flush()


def read_raw(path: Path) -> list[Sample]:
    """Read what append_raw wrote."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [Sample(Job(*(row[key] for key in Job._fields)), row["text"], row["finished"]) for row in rows]


def write_corpus(documents: Iterable[Document], path: Path) -> None:
    """Write documents as xz-compressed JSON lines."""
    lines = (json.dumps(document._asdict(), ensure_ascii=False) + "\n" for document in documents)
    path.write_bytes(lzma.compress("".join(lines).encode(), preset=9 | lzma.PRESET_EXTREME))


def read_corpus(path: Path) -> list[Document]:
    """Read what write_corpus wrote."""
    return [Document(**json.loads(line)) for line in lzma.decompress(path.read_bytes()).splitlines()]


# ----------------------------------------------------------------------------------------------------- command line


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Sample, clean and pack the embedded corpus.")
    parser.add_argument(
        "--model", type=Path, required=True, help="folder with a GGUF file or a Hugging Face checkpoint"
    )
    parser.add_argument("--out", type=Path, help="the .jsonl.xz to write; without it, only sample")
    parser.add_argument("--raw", type=Path, required=True, help="raw samples: kept here, and continued from here")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--samples", type=int, default=12288, help="texts to sample before filtering")
    parser.add_argument("--first", type=int, help="sample only the first so many of them")
    parser.add_argument("--batch-size", type=int, default=1024, help="texts sampled at once")
    parser.add_argument("--max-new", type=int, default=LIMITS[0], help="lower it for a quick try [tokens]")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--max-tokens", type=int, default=2_100_000, help="size of the corpus at most [tokens]")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run all steps."""
    args = parse_args(argv)
    jobs = compose(args.samples, args.seed)[: args.first]
    args.raw.touch()
    done = len(read_raw(args.raw))
    if done < len(jobs):
        append_raw(sample(jobs, args, done), args.raw)
    samples = read_raw(args.raw)
    if args.out:
        tokenizer = load_tokenizer(args.model)
        documents, dropped = assemble(samples, lambda text: len(tokenizer.encode(text)), args.seed, args.max_tokens)
        write_corpus(documents, args.out)
        log("\n".join(f"{name}: {count}" for name, count in dropped.items()))


if __name__ == "__main__":
    main()
