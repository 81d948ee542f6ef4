"""Saved SAEs of other projects: one file and one row of SAE_FORMATS each.

To add one, write a module with the names of `SaeFormat` and add its row; the conformance suite then runs over it. Only
numpy and safetensors are imported here; a format that needs more imports it inside a function.
"""

from dataclasses import replace
from pathlib import Path

from activations.errors import ConfigError, MismatchError, MissingArtefactError, UnknownNameError
from sae.artefact import SaeArtefact
from sae.formats import dictionary_learning, gemma_scope, gemma_scope_2, saekit, saelens, sparsify
from sae.formats.base import SaeFormat
from sae.wiring import Wiring

SAE_FORMATS: dict[str, SaeFormat] = {
    "saekit": saekit,
    "saelens": saelens,
    "sparsify": sparsify,
    "dictionary_learning": dictionary_learning,
    "gemma_scope": gemma_scope,
    "gemma_scope_2": gemma_scope_2,
}


def find(name: str) -> SaeFormat:
    """The format called `name`; raises UnknownNameError."""
    if name not in SAE_FORMATS:
        known = ", ".join(SAE_FORMATS)
        raise UnknownNameError("format of an SAE", expected=f"one of {known}", got=f"'{name}'", fix="Choose one.")
    return SAE_FORMATS[name]


def detect(path: str | Path) -> str:
    """Name of the format that a directory is in. Raises: MissingArtefactError, MismatchError if it could be several."""
    path = Path(path)
    names = [name for name, known in SAE_FORMATS.items() if known.matches(path)]
    if not names:
        got = "none of their files" if path.is_dir() else "a file" if path.exists() else "nothing"
        titles = ", ".join(known.TITLE for known in SAE_FORMATS.values())
        fix = "Name the directory that holds the weights."
        raise MissingArtefactError(path, expected=f"one of: {titles}", got=got, fix=fix)
    if len(names) > 1:
        fix = "Say which with --from."
        raise MismatchError(path, expected="files of one format", got=f"those of {', '.join(names)}", fix=fix)
    return names[0]


def read_any(path: str | Path, name: str | None = None, hook_point: str | None = None) -> SaeArtefact:
    """The SAE in a directory of any format.

    Args:
      name: the format; none: by the names of the files.
      hook_point: what it reads and writes, in place of what its files say.
    Raises: a SaekitError that says what is wrong, or what cannot be read and why.
    """
    artefact = find(name or detect(path)).read(Path(path))
    return artefact if hook_point is None else at_hook_point(artefact, hook_point)


def at_hook_point(artefact: SaeArtefact, text: str) -> SaeArtefact:
    """The SAE said to be of this hook point; with an arrow, it becomes a transcoder.

    Raises: HookPointError or ConfigError for text that is none, ConfigError if the SAE cannot be of such a kind.
    """
    wiring = Wiring.parse(text)
    is_autoencoder = artefact.apply_b_dec_to_input and not artefact.transcodes
    if wiring.transcodes and is_autoencoder:
        fix = "Name one hook point, without an arrow."
        got = "one that subtracts b_dec from its input"
        raise ConfigError(f"hook point '{text}'", expected="an SAE that can be a transcoder", got=got, fix=fix)
    if artefact.d_out != artefact.d_model and not wiring.transcodes:
        fix = "Write A->B."
        got = f"widths {artefact.d_model} and {artefact.d_out}"
        raise ConfigError(f"hook point '{text}'", expected="an SAE that writes what it reads", got=got, fix=fix)
    metadata = artefact.metadata | {"hook_point": str(wiring)}
    return replace(artefact, transcodes=artefact.transcodes or wiring.transcodes, metadata=metadata)
