"""What benchmarks of vLLM share: a random model in a folder, which vLLM and transformers both read."""

from pathlib import Path
from typing import Any

import torch
from _decoding import SHAPES

from steer.scopes import ROLES

MODELS: dict[str, dict[str, Any]] = {
    "checked": dict(
        vocab_size=2048, hidden_size=512, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=True, initializer_range=0.08,
    ),
    **SHAPES,
}  # fmt: skip
"""shapes of Llamas; the first has logits that are far enough apart to be told from rounding"""
MARKERS = ("<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>")
"""tokens 1 to 6 of the tokenizer; ROLES are behind them"""

ON_GPU = {"gpu_memory_utilization": 0.25, "kv_cache_memory_bytes": 2**33}
"""arguments of an engine that does not look how much memory is free, so that several can start at once"""


def save_random(name: str, folder: Path, dtype: torch.dtype) -> Path:
    """A Llama with random weights and a tokenizer of words and MARKERS, in the format of Hugging Face."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(**MODELS[name], bos_token_id=None, eos_token_id=0, pad_token_id=0)
    LlamaForCausalLM(config).to(dtype=dtype).save_pretrained(folder)  # type: ignore[call-arg]
    first = ["<end>", *MARKERS, *ROLES]
    words = [*first, *(f"w{i}" for i in range(len(first), config.vocab_size))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>",
        additional_special_tokens=[*MARKERS], chat_template=f"{{# {' '.join(MARKERS)} #}}",
    ).save_pretrained(folder)  # fmt: skip
    return folder
