"""What a request to vLLM says about steering, read strictly.

    extra_args={"saekit": {"library": NAME, "steer": [ITEM, ...], "budget": number or null}}

An ITEM is {"vector": NAME} or {"latent": N} of that library, with dose, value, operation, scope and gate as below. Over
HTTP, where `vllm_xargs` takes no objects, the same is a string of JSON. A library is a name among those that the engine
was started with; no path of a request is ever opened. Left out: what it comes to (`steer.vllm.catalogue`).
"""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from activations.errors import ConfigError
from activations.fingerprints import digest_of

NAME = "saekit"
"""key in `SamplingParams.extra_args`"""
MOST_ITEMS = 8

Dose = Annotated[float, Field(ge=-16, le=16, allow_inf_nan=False)]
Level = Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)]
Name = Annotated[str, Field(min_length=1, max_length=300)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Levels(_Part):
    """Energies of a vector's own direction between which a gate opens and shuts."""

    on: Level
    off: Level | None = None
    tokens: int = Field(1, ge=1, le=1024)
    """that it stays open at least"""


class Item(_Part):
    """One thing that steers."""

    vector: Name | None = None
    """name of a vector, of a group NAME@HOOK_POINT, or of a kit"""
    latent: int | None = Field(None, ge=0)
    """of the library's SAE"""
    dose: Dose | None = None
    """in mean norms; none: the vector's own. Of an ablation its share; of a vector's clamp where the projection goes"""
    value: Level | None = None
    """of a latent: the activation that `clamp` sets it to, or the factor of `scale`"""
    operation: Literal["add", "rotate", "ablate", "clamp", "scale"] | None = None
    """none: what the vector was made for; of a latent, add"""
    scope: Annotated[str, Field(max_length=200)] | None = None
    """words of `steer.scopes`; none: the vector's own"""
    gate: Levels | None = None
    """none: the vector's own"""


class Request(_Part):
    """Everything that steers one request."""

    library: Name
    steer: Annotated[list[Item], Field(min_length=1, max_length=MOST_ITEMS)]
    budget: Annotated[float, Field(gt=0, le=16, allow_inf_nan=False)] | None = None
    """joint dose at a hook point; none: not bounded"""

    def key(self, library_sha256: str) -> str:
        """SHA-256 hex of what it does: of the library's content and of everything that is asked for."""
        return digest_of({"library": library_sha256, "request": self.model_dump(mode="json")})


def read_request(value: Any) -> Request:
    """Raises: ConfigError for what is not one, with the first thing that is wrong."""
    try:
        return Request.model_validate(json.loads(value) if isinstance(value, str) else value)
    except (ValidationError, ValueError, RecursionError) as error:
        if isinstance(error, ValidationError):
            first = error.errors(include_url=False)[0]
            got = f"{'.'.join(map(str, first['loc'])) or 'it'}: {first['msg']}"
        else:
            got = f"no JSON: {error}"
        expected = "library, steer and budget as docs/serving-vllm.md has them"
        raise ConfigError(f"extra_args['{NAME}']", expected=expected, got=got, fix="Correct it.") from error
