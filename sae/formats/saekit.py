"""The directory that `saekit train` writes: SAELens's layout with a saekit.json beside it (`sae.artefact`)."""

from pathlib import Path

from sae.artefact import CONFIG, PROVENANCE, SaeArtefact
from sae.formats.base import check_target

TITLE = "saekit directory"


def matches(path: Path) -> bool:
    """By its saekit.json."""
    return (path / CONFIG).is_file() and (path / PROVENANCE).is_file()


def read(path: Path) -> SaeArtefact:
    """As `SaeArtefact.load`."""
    return SaeArtefact.load(path)


def write(artefact: SaeArtefact, path: Path) -> None:
    """As `SaeArtefact.save`, but never in place of another SAE."""
    check_target(path)
    artefact.save(path)
