"""steerability's `.svec`, and that of CAST, which it comes from: read only.

    {"model_type": "llama", "directions": {"12": [[…]]}, "explained_variances": {"12": 0.4}, …}

A file says the 0-based block and not the site: CAST steers what a block reads (`svec_cast`), the method CAA what it
writes (`svec_caa`), with the same keys. So nobody can find out which it is from the file, and `format` has to be given.
Rows of several tokens, each for its own place in the prompt, and those of attention heads are refused.

Left out: bundles of them (`steer.formats.spipe`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from activations.hook_points import HookPoint
from activations.store_schema import ModelRef
from sae.checked_files import corrupt, read_json
from steer.formats.base import Candidate, Direction, checked_layer, checked_list, checked_size, refused
from steer.vectors import SteeringVector


@dataclass(frozen=True)
class Svec:
    """A `.svec` whose rows act on one site."""

    TITLE: str
    site: str

    def matches(self, file: Candidate) -> bool:
        """Never: what such a file is for does not follow from it."""
        return False

    def read(self, path: Path, model: ModelRef) -> list[Direction]:
        """Its rows, added at the site of every block that it has."""
        checked_size(path, "a .svec")
        content = read_json(path)
        if content.get("num_heads") or content.get("head_dim"):
            raise refused(path, "directions of the residual stream", "those of attention heads")
        directions = content.get("directions")
        if not isinstance(directions, dict) or not directions:
            raise corrupt(f"{path}: directions", "rows by block", type(directions).__name__)
        return [self._direction(path, key, rows, model) for key, rows in directions.items()]

    def write(self, vectors: Sequence[SteeringVector], path: Path, folded: bool) -> list[str]:
        """Never."""
        raise refused(path, "a format that is written", f"{self.TITLE}, which is only read")

    def _direction(self, path: Path, key: str, rows: Any, model: ModelRef) -> Direction:
        where = f"{path}: directions {key[:20]}"
        if not (key.isascii() and key.isdigit() and len(key) <= 5):
            raise corrupt(where, "the number of a block", repr(key[:20]))
        layer = checked_layer(where, int(key), model)
        if isinstance(rows, list) and rows and isinstance(rows[0], list):
            if len(rows) > 1:
                raise refused(where, "one row for all tokens", f"{len(rows)}, each for its own place")
            rows = rows[0]
        return Direction(HookPoint(self.site, layer), checked_list(where, rows, model))


CAST = Svec("steerability or CAST .svec of block inputs", "resid_pre")
CAA = Svec("steerability .svec of block outputs", "resid_post")
