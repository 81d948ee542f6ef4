"""What the peers' training scripts share: whose batches they train on, and how they are told what to do.

Needs numpy and torch alone, so that it runs in every peer's environment. A script is started once, with the folder that
`quality.py make` wrote, and then reads one run a line from its standard input, as JSON:

    arch, lr (null: the peer's default), width, k, seed, order (an .npy file), out (a folder), set (other settings)

and answers each with one JSON line: where the SAE is, how long training took, what the learning rate was.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

LARGEST_SHARE = 0.6
"""of the GPU's free memory that tokens may take"""


class Tokens:
    """The training tokens, on the GPU if there is one and they fit."""

    def __init__(self, folder: Path):
        """Read them; they are stored as the bits of bfloat16."""
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        bits = np.load(folder / "tokens.npy")
        self._rows = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
        if self.device.type == "cuda" and bits.nbytes < LARGEST_SHARE * torch.cuda.mem_get_info()[0]:
            self._rows = self._rows.to(self.device)

    @property
    def d_model(self) -> int:
        """Width of a token."""
        return self._rows.shape[1]

    def batch(self, numbers: torch.Tensor) -> torch.Tensor:
        """Tokens of these numbers, in float32 on the device."""
        return self._rows[numbers.to(self._rows.device)].to(self.device).float()

    def batches(self, order: np.ndarray) -> Iterator[torch.Tensor]:
        """A batch for each row of `order` [step, batch]."""
        return (self.batch(row) for row in torch.from_numpy(order).long().to(self._rows.device))


def serve(train: Callable[[Tokens, dict[str, Any], np.ndarray], dict[str, Any]], versions: dict[str, str]) -> None:
    """Answer the runs that arrive on standard input until it ends.

    Args:
      train: takes the tokens, a run and its order, saves the SAE into `run["out"]`, and returns `sae`, where it is, and
        `lr`.
    """
    answers, sys.stdout = sys.stdout, sys.stderr  # the peers print
    tokens = Tokens(Path(sys.argv[1]))
    for line in sys.stdin:
        run = json.loads(line)
        order = np.load(run["order"])
        start = time.perf_counter()
        result = train(tokens, run, order)
        if tokens.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        answer = {**result, "train_s": seconds, "tok_s": order.size / seconds, "versions": versions}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
