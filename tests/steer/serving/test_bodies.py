"""What a request's body may cost before it is refused."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from steer.serving.bodies import ChatRequest, CompletionRequest

ASK: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}
MANY = 10_000
KEYS = {f"k{i}": 0 for i in range(MANY)}
CALLS = {"role": "assistant", "tool_calls": [{"k": 1}] * 100}


@pytest.mark.parametrize(("kind", "change"), [
    (ChatRequest, {"messages": [{"role": "user", "content": [1] * MANY}]}), (ChatRequest, {"messages": [CALLS] * 999}),
    (ChatRequest, {"messages": [{"role": "user"} | dict.fromkeys("abcdefgh", 1)] * 999}),
    (ChatRequest, {"modalities": [1] * MANY}), (ChatRequest, KEYS), (ChatRequest, {"steering": KEYS}),
    (ChatRequest, {"logit_bias": dict.fromkeys(KEYS, "")}), (ChatRequest, {"messages": [KEYS]}),
    (CompletionRequest, {"prompt": [1.5] * MANY}), (CompletionRequest, {"prompt": [[1.5] * MANY]}),
    (CompletionRequest, {"prompt": [[]] * MANY}), (CompletionRequest, {"prompt": [-1] * MANY}),
])  # fmt: skip
def test_what_is_wrong_ten_thousand_times_is_found_only_a_few_times(
    kind: type[ChatRequest | CompletionRequest], change: dict[str, Any]
) -> None:
    """A list of half a million errors took seconds, in which the server answered nobody."""
    given = {"model": "tiny"} | (ASK if kind is ChatRequest else {"prompt": "x"})
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(json.loads(json.dumps(given | change)))
    assert caught.value.error_count() < 20
