"""What a request to vLLM says about steering: what one to `saekit serve` says, read strictly.

    extra_args={"saekit": {"steer": [ITEM, ...], "budget": number or null}}

An ITEM is that of `steer.serving.items`. Over HTTP, where `vllm_xargs` takes no objects, the same is a string of JSON.
No path of a request is ever opened. Left out: what it comes to (`steer.vllm.catalogue`).
"""

import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from activations.errors import ConfigError
from activations.fingerprints import digest_of
from steer.serving.items import Asked

NAME = "saekit"
"""key in `SamplingParams.extra_args`"""


def read_request(value: Any) -> Asked:
    """Raises: ConfigError for what is not one, with the first thing that is wrong."""
    try:
        return Asked.model_validate(json.loads(value) if isinstance(value, str) else value)
    except (ValidationError, ValueError, RecursionError) as error:
        if isinstance(error, ValidationError):
            first = error.errors(include_url=False)[0]
            got = f"{'.'.join(map(str, first['loc'])) or 'it'}: {first['msg']}"
        else:
            got = f"no JSON: {error}"
        expected = "steer and budget as docs/serving-vllm.md has them"
        raise ConfigError(f"extra_args['{NAME}']", expected=expected, got=got, fix="Correct it.") from error


def key_of(request: Asked, hashes: Mapping[str, str]) -> str:
    """SHA-256 hex of what a request does: of all that it asks for, and of the content of all libraries, by name.

    Of all libraries, and of words rather than of what they come to, so that nothing can be left out: two requests that
    steer alike may have two keys, but never two that differ the same one.
    """
    return digest_of({"libraries": dict(hashes), "request": request.model_dump(mode="json")})
