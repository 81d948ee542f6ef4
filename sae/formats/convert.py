"""From one format of SAEs to another.

1. Find out what the source is; 2. read it whole, which checks it; 3. write it where nothing is yet. The weights are
converted exactly, up to float32 rounding where something had to be folded. What cannot be expressed is refused.
"""

from pathlib import Path
from typing import Any

from activations.errors import MismatchError
from sae.artefact import DTYPES, Dtype
from sae.formats import detect, find, read_any, saekit
from sae.formats.base import check_target


def convert(
    source: str | Path,
    target: str | Path,
    to: str,
    from_: str | None = None,
    hook_point: str | None = None,
    dry_run: bool = False,
    dtype: Dtype = "float32",
) -> dict[str, Any]:
    """Read the SAE at `source` and write it to `target` in the format `to`.

    Args:
      from_: format of the source; none: by the names of its files.
      hook_point: what the SAE reads and writes, in place of what its files say.
      dry_run: read and check, and write nothing.
      dtype: that the weights are kept in; float16 is for `saekit` alone.
    Returns: what it is, JSON-ready.
    Raises: a SaekitError that says what is wrong with the source, the target or the request.
    """
    written, name = find(to), from_ or detect(source)
    if dtype not in DTYPES or (dtype != "float32" and written is not saekit):
        expected = " or ".join(DTYPES) if written is saekit else f"float32, which {to} files have"
        raise MismatchError("--dtype", expected=expected, got=dtype, fix="Choose another, or write --to saekit.")
    check_target(Path(target))
    artefact = read_any(source, name, hook_point)
    if not dry_run:
        artefact.save(target, dtype) if written is saekit else written.write(artefact, Path(target))
    return {
        "source": str(source),
        "from": name,
        "architecture": artefact.saved_name,
        "d_model": artefact.d_model,
        "d_sae": artefact.d_sae,
        "d_out": artefact.d_out,
        "k": artefact.k,
        "apply_b_dec_to_input": artefact.apply_b_dec_to_input,
        "hook_point": artefact.metadata.get("hook_point"),
        "model": artefact.metadata.get("model", {}).get("id", artefact.metadata.get("source", {}).get("model_name")),
        "dtype": dtype,
        "target": str(target),
        "to": to,
        "written": not dry_run,
    }
