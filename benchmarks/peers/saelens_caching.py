"""Time SAELens' CacheActivationsRunner; runs in SAELens' own environment.

    python saelens_caching.py MODEL_FOLDER TEXT.jsonl LAYER CTX TOKENS

Hooks the output of block LAYER of a Llama-shaped model through HookedTransformer, which is what SAELens does by
default, in float32 (its bfloat16 caching raises ValueError). Prints one JSON line. Loading is not counted.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import sae_lens
import torch
from datasets import Dataset
from sae_lens.cache_activations_runner import CacheActivationsRunner
from sae_lens.config import CacheActivationsRunnerConfig
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_llama_weights
from transformers import AutoModelForCausalLM, AutoTokenizer


def hooked(folder: str) -> HookedTransformer:
    """The model in TransformerLens' form; its own loader only takes names of the hub."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = model.config
    rope = getattr(theirs, "rope_parameters", None) or {"rope_theta": 10000.0}
    config = HookedTransformerConfig(
        n_layers=theirs.num_hidden_layers,
        d_model=theirs.hidden_size,
        d_head=theirs.hidden_size // theirs.num_attention_heads,
        n_heads=theirs.num_attention_heads,
        n_key_value_heads=theirs.num_key_value_heads,
        d_mlp=theirs.intermediate_size,
        d_vocab=theirs.vocab_size,
        n_ctx=2048,
        eps=theirs.rms_norm_eps,
        act_fn="silu",
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_adjacent_pairs=False,
        rotary_dim=theirs.hidden_size // theirs.num_attention_heads,
        rotary_base=int(rope["rope_theta"]),
        final_rms=True,
        gated_mlp=True,
        original_architecture="LlamaForCausalLM",
        device="cpu",
        dtype=torch.float32,
    )
    lens = HookedTransformer(config, AutoTokenizer.from_pretrained(folder), default_padding_side="right")
    lens.load_and_process_state_dict(
        convert_llama_weights(model, config), fold_ln=False, center_writing_weights=False, center_unembed=False,
        fold_value_biases=False,
    )  # fmt: skip
    ids = torch.arange(3, 35)[None]
    with torch.no_grad():
        _, cache = lens.run_with_cache(ids, names_filter="blocks.0.hook_resid_post")
        states = model(ids, output_hidden_states=True).hidden_states
    difference = (cache["blocks.0.hook_resid_post"] - states[1]).abs().max() / states[1].abs().max()
    assert difference < 1e-4, f"TransformerLens computes something else: {difference}"
    return lens


def main() -> None:
    """Load, cache, report."""
    folder, text, layer, ctx, tokens = sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:6])
    lens = hooked(folder)
    rows = [json.loads(line) for _, line in zip(range(20_000), text.open(), strict=False)]
    with tempfile.TemporaryDirectory() as out:
        config = CacheActivationsRunnerConfig(
            dataset_path="local",
            model_name="local",
            model_batch_size=16,
            hook_name=f"blocks.{layer}.hook_resid_post",
            d_in=lens.cfg.d_model,
            training_tokens=tokens // ctx * ctx,
            context_size=ctx,
            new_cached_activations_path=f"{out}/cache",
            buffer_size_gb=4 * 16 * ctx * 4 * lens.cfg.d_model / 1e9,
            shuffle=False,
            prepend_bos=False,
            dtype="float32",
            device="cpu",
        )
        with mock.patch("sae_lens.cache_activations_runner.load_model", return_value=lens):
            runner = CacheActivationsRunner(config, override_dataset=Dataset.from_list(rows))
        start = time.perf_counter()
        cached = runner.run()
        seconds = time.perf_counter() - start
    line = {"tok_s": len(cached) * ctx / seconds, "dtype": "float32", "version": sae_lens.__version__}
    sys.stdout.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
