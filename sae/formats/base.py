"""What every format of SAE_FORMATS has, and the few steps that all of them share.

Reading: 1. the config, whose every value is checked; 2. names, shapes and dtypes of the tensors, before any data;
3. the data, widened to float32; 4. folded, where the other project computes something more than `SaeArtefact` says.
Writing: into a new directory that appears at the target in one step. What a format cannot express is refused.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from activations.errors import MismatchError
from sae.artefact import SaeArtefact, written_in_one_step
from sae.checked_files import corrupt

LARGEST = 2**40
"""more than any width"""


@runtime_checkable
class SaeFormat(Protocol):
    """How another project keeps an SAE in a directory; a module with these names is one."""

    @property
    def TITLE(self) -> str:
        """What it is, for people."""
        ...

    def matches(self, path: Path) -> bool:
        """Whether a directory looks like one; no directory should match two formats."""
        ...

    def read(self, path: Path) -> SaeArtefact:
        """The SAE. Raises a SaekitError that names what is wrong, or what cannot be read and why."""
        ...

    def write(self, artefact: SaeArtefact, path: Path) -> None:
        """Write it to a new or empty directory; raises MismatchError for what the format cannot express."""
        ...


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory to fill, which then appears at `path`; raises MismatchError if there is anything already."""
    check_target(path)
    with written_in_one_step(path) as new:
        yield new


def check_target(path: Path) -> None:
    """Raise MismatchError unless `path` is free, or an empty directory."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        fix = "Choose another target, or remove what is there."
        raise MismatchError(path, expected="nothing, or an empty directory", got="other files", fix=fix)


def refused(where: str | Path, what: object, reason: str) -> MismatchError:
    """The error for something that is well-formed and cannot be read or written."""
    fix = "docs/formats.md says what each format can hold."
    return MismatchError(where, expected=reason, got=what, fix=fix)


def whole(config: Mapping[str, Any], key: str, where: str | Path, least: int = 1) -> int:
    """A whole number of a config. Raises: CorruptArtefactError."""
    value = config.get(key)
    if type(value) is not int or not least <= value <= LARGEST:
        raise corrupt(f"{where}: {key}", f"a whole number from {least} to {LARGEST}", repr(value)[:80])
    return value


def flag(config: Mapping[str, Any], key: str, where: str | Path, default: bool = False) -> bool:
    """True or false of a config. Raises: CorruptArtefactError."""
    value = config.get(key, default)
    if type(value) is not bool:
        raise corrupt(f"{where}: {key}", "true or false", repr(value))
    return value


def group(config: Mapping[str, Any], key: str, where: str | Path) -> dict[str, Any]:
    """An object inside a config; empty where it is absent or null. Raises: CorruptArtefactError."""
    value = config.get(key)
    if value is not None and not isinstance(value, dict):
        raise corrupt(f"{where}: {key}", "an object", repr(value)[:80])
    return value or {}


def provenance(name: str, hook_point: str | None, **source: object) -> dict[str, Any]:
    """The metadata of an SAE of another project: its hook point, where that is clear, and what its files say."""
    known = {key: value for key, value in source.items() if value is not None}
    metadata: dict[str, Any] = {"format_version": 1, "source": {"format": name, **known}}
    return metadata if hook_point is None else metadata | {"hook_point": hook_point}
