"""Models with chat templates of one's own."""

from dataclasses import replace

from transformers import PreTrainedTokenizerFast

from activations.models import LoadedModel


def with_template(loaded: LoadedModel, template: str | None) -> LoadedModel:
    """The same model with another chat template, or none."""
    backend = loaded.tokenizer.backend_tokenizer
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", chat_template=template)
    return replace(loaded, tokenizer=made)
