"""Compare SAEs that saekit saved with what SAELens makes of them.

Run inside an environment that has sae-lens, with a folder as the argument. Each of its subfolders holds `sae/`, the
saved SAE, and `reference.npz`: inputs `x`, and saekit's `latents` and `reconstruction` of them. Prints one JSON line an
SAE; exits with 1 if any output differs by more than TOLERANCE times the largest reference value.
"""

import json
import sys
from pathlib import Path

import numpy as np
import sae_lens
import torch

TOLERANCE = 1e-5


def difference(got: torch.Tensor, expected: np.ndarray) -> float:
    """Largest absolute difference over the largest expected value."""
    return float(np.abs(got.numpy() - expected).max() / np.abs(expected).max())


@torch.no_grad()
def check(folder: Path) -> dict[str, str | float]:
    """Encode and decode the reference inputs with SAELens."""
    reference = np.load(folder / "reference.npz")
    sae = sae_lens.SAE.load_from_disk(folder / "sae", device="cpu")
    return {
        "name": folder.name,
        "architecture": sae.cfg.architecture(),
        "hook_name": str(sae.cfg.metadata.hook_name),
        "sae_lens": sae_lens.__version__,
        "encode": difference(sae.encode(torch.tensor(reference["x"])), reference["latents"]),
        "decode": difference(sae.decode(torch.tensor(reference["latents"])), reference["reconstruction"]),
    }


def main() -> int:
    """Check every subfolder."""
    results = [check(folder) for folder in sorted(Path(sys.argv[1]).iterdir())]
    for result in results:
        sys.stdout.write(json.dumps(result) + "\n")
    return int(not results or any(max(result["encode"], result["decode"]) > TOLERANCE for result in results))


if __name__ == "__main__":
    sys.exit(main())
