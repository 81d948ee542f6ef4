"""SAEs behind prompts and the bench: loaded when they are first asked for, and the newest few kept."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

from activations.errors import MissingArtefactError
from steer.browser.sources import Source

if TYPE_CHECKING:
    from sae.artefact import SaeArtefact
    from sae.torch_view import TorchSae

KEPT = 2


class Saes:
    """SAEs of sources, in PyTorch."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, tuple[SaeArtefact, TorchSae]] = OrderedDict()

    def get(self, source: Source) -> tuple[SaeArtefact, TorchSae]:
        """The SAE of a source. Raises: MissingArtefactError if it is gone; as `SaeArtefact.load` does."""
        from sae.artefact import SaeArtefact
        from sae.torch_view import TorchSae

        if source.sae is None:
            fix = "Build the index again from an SAE that stays where it is."
            raise MissingArtefactError(
                source.name, expected="the SAE that its index was built from", got="none", fix=fix
            )
        with self._lock:
            if source.name not in self._kept:
                artefact = SaeArtefact.load(source.sae)
                self._kept[source.name] = artefact, TorchSae(artefact)
                if len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(source.name)
            return self._kept[source.name]
