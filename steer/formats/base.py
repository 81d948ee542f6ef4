"""What every format of VECTOR_FORMATS has, and the few steps that all of them share.

Reading gives `Direction`s: rows as the file has them, each at the hook point that it acts on. Writing takes steering
vectors and says how to use what was written. What a format cannot express is refused with the reason, never dropped:
an operation, a site, a gate, a scope. Files are anybody's: sizes are compared before memory is taken, and whatever is
wrong is one SaekitError. Left out: the model a file is for, which none of them proves (`steer.exchange`).
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from activations.errors import MismatchError
from activations.hook_points import HookPoint
from activations.store_schema import ModelRef
from sae.checked_files import corrupt, missing
from sae.formats.state_dict import load_torch
from steer.vectors import SteeringVector

MAX_BYTES = 1 << 30
"""the largest file that is read: more than a float32 row for each block of any model"""
LARGEST = 1e30
"""more than any coefficient"""


@dataclass(frozen=True, eq=False)
class Direction:
    """A row of a file of another project."""

    hook_point: HookPoint
    """what it acts on, here"""
    values: Float[np.ndarray, " d_model"]
    """float32, of any length"""
    operation: str = "add"
    """a key of `steer.operations.VECTOR_OPERATIONS`"""
    coefficient: float = 1.0
    """of `values` as they are (add), or the share that is taken away (ablate)"""
    name: str | None = None
    scope: str = "all"
    """on which tokens, in the words of `steer.scopes`"""
    made_on: str | None = None
    """what the file says of the model that it was made on, which nothing proves"""


@dataclass(frozen=True)
class Candidate:
    """A file whose format is looked for: what several formats have to look at is read once."""

    path: Path

    @cached_property
    def torch(self) -> Any:
        """What a file of torch.save holds, None for any other file. Raises: CorruptArtefactError."""
        if self.path.suffix not in (".pt", ".pth"):
            return None
        with self.path.open("rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"
        return load_torch(self.path) if is_zip else None


@runtime_checkable
class VectorFormat(Protocol):
    """How another project keeps steering vectors; a module with these names is one."""

    @property
    def TITLE(self) -> str:
        """What it is, for people."""
        ...

    def matches(self, file: Candidate) -> bool:
        """Whether a file, which is there, looks like one; no file should match two formats."""
        ...

    def read(self, path: Path, model: ModelRef) -> list[Direction]:
        """Its rows. Raises a SaekitError that names what is wrong, or what cannot be read and why."""
        ...

    def write(self, vectors: Sequence[SteeringVector], path: Path, folded: bool) -> list[str]:
        """Write them; gives lines on how to use the file there.

        Args:
          folded: coefficients are multiplied into the rows, so that the file works at strength 1.
        Raises: MismatchError for what the format cannot express.
        """
        ...


def refused(where: str | Path, expected: str, got: object) -> MismatchError:
    """The error for something that is well-formed and cannot be read or written."""
    return MismatchError(where, expected=expected, got=got, fix="docs/formats.md says what each format can hold.")


def check_expressible(
    vectors: Sequence[SteeringVector],
    title: str,
    *,
    operations: Collection[str] = ("add",),
    sites: Collection[str] = ("resid_post",),
    scopes: Collection[str] = ("all",),
    first_layer: int = 0,
    one_each: bool = True,
) -> None:
    """Refuse what a format cannot express.

    Args:
      first_layer: the lowest 0-based block that it can steer.
      one_each: whether it has one row a hook point at most.
    Raises: MismatchError.
    """
    if not vectors:
        raise refused(title, "a vector", "none")
    seen: set[str] = set()
    for vector in vectors:
        where, point = f"vector '{vector.name}' as {title}", HookPoint.parse(vector.hook_point)
        if vector.operation not in operations:
            raise refused(where, f"the operation {' or '.join(operations)}", vector.operation)
        if point.site not in sites:
            raise refused(where, f"a hook point at {' or '.join(sites)}", vector.hook_point)
        if point.layer < first_layer:
            raise refused(where, f"a block from {first_layer} on, counted from 0", vector.hook_point)
        if vector.gate is not None:
            raise refused(where, "no gate", "one")
        if vector.scope not in scopes:
            raise refused(where, f"the scope {' or '.join(scopes)}", vector.scope)
        if vector.model.fingerprint != vectors[0].model.fingerprint:
            raise refused(where, f"vectors of one model, {vectors[0].model.id}", vector.model.id)
        if one_each and vector.hook_point in seen:
            raise refused(where, "one vector a hook point", f"two at {vector.hook_point}: combine them first")
        seen.add(vector.hook_point)


def strength_of(vectors: Sequence[SteeringVector], folded: bool) -> float:
    """The strength at which rows do what the vectors do at their coefficients: the largest of these; 1 if folded in.

    Without any coefficient it is 0.
    """
    largest = max((vector.coefficient for vector in vectors), key=abs)
    return 1.0 if folded and largest else float(largest)


def row_at(vector: SteeringVector, strength: float) -> Float[np.ndarray, " d_model"]:
    """The row that does at a strength what the vector does at its coefficient: a unit if both are the same, or 0."""
    return (vector.direction * (vector.coefficient / strength if strength else 1)).astype(np.float32)


def scaled_rows(
    vectors: Sequence[SteeringVector], folded: bool
) -> tuple[dict[HookPoint, Float[np.ndarray, " d_model"]], float]:
    """Rows by hook point for one strength of all, and that strength."""
    strength = strength_of(vectors, folded)
    return {HookPoint.parse(vector.hook_point): row_at(vector, strength) for vector in vectors}, strength


def checked_size(path: Path, expected: str) -> int:
    """Bytes of a file. Raises: MissingArtefactError, CorruptArtefactError for one that is too large."""
    if not path.is_file():
        raise missing(path, expected)
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise corrupt(path, f"{expected} of at most {MAX_BYTES >> 20} MiB", f"{size >> 20} MiB")
    return size


def dense(where: str | Path, tensor: Any) -> np.ndarray:
    """A tensor of torch as float32. Raises: CorruptArtefactError for one that is not of plain floats in memory."""
    kind = f"{tensor.dtype}, {tensor.layout}, {tensor.device}"
    if not tensor.is_floating_point() or str(tensor.layout) != "torch.strided" or tensor.device.type != "cpu":
        raise corrupt(where, "a dense tensor of floats", kind)
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise corrupt(where, "as many numbers as its shape says", "fewer, read again and again")
    return np.asarray(tensor.detach().float())


def checked_row(where: str, values: np.ndarray, model: ModelRef) -> Float[np.ndarray, " d_model"]:
    """A row as float32.

    Raises: MismatchError for another width, CorruptArtefactError for one that is not finite, or zero.
    """
    if values.shape != (model.d_model,):
        raise refused(where, f"a row of {model.d_model}, the width of {model.id}", "x".join(map(str, values.shape)))
    row = np.array(values, np.float32)
    if not np.isfinite(row).all() or not row.any():
        raise corrupt(where, "finite values that are not all 0", "others")
    return row


def checked_list(where: str, values: object, model: ModelRef) -> Float[np.ndarray, " d_model"]:
    """A row that JSON has as a list. Raises: CorruptArtefactError for another thing, and as `checked_row`."""
    if not isinstance(values, list) or not all(
        type(each) in (int, float) and not abs(each) > LARGEST for each in values
    ):
        raise corrupt(where, "a list of numbers", type(values).__name__)
    return checked_row(where, np.array(values, np.float64), model)


def checked_layer(where: str, layer: int, model: ModelRef) -> int:
    """A 0-based block that the model has. Raises: MismatchError."""
    if not 0 <= layer < model.n_layers:
        raise refused(where, f"a block from 0 to {model.n_layers - 1} of {model.id}", layer)
    return layer


def table_rows(
    path: Path, table: Float[np.ndarray, "layer d_model"], model: ModelRef, site: str, operation: str
) -> list[Direction]:
    """The rows of a table of one row a block, whose zeros do nothing.

    Raises: CorruptArtefactError for a table of zeros alone, and as `checked_row`.
    """
    found = [
        Direction(HookPoint(site, layer), checked_row(f"{path}: row {layer}", row, model), operation)
        for layer, row in enumerate(table)
        if row.any()
    ]
    if not found:
        raise corrupt(path, "a row that is not zero", "none")
    return found


def checked_number(where: str, value: object) -> float:
    """A finite number. Raises: CorruptArtefactError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not -LARGEST < value < LARGEST:
        raise corrupt(where, "a number", repr(value)[:80])
    return float(value)


def checked_word(where: str, value: object, known: Collection[str]) -> str:
    """One of the words that are known. Raises: MismatchError."""
    if not isinstance(value, str) or value not in known:
        raise refused(where, f"one of {', '.join(known)}", repr(value)[:80])
    return value
