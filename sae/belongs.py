"""Whether a model, a store, an SAE and a feature index were made from one another."""

from activations.errors import MismatchError
from activations.models import LoadedModel
from activations.store import ActivationStore
from sae.artefact import SaeArtefact
from sae.index_db import FeatureIndex
from sae.wiring import Wiring


def check_store(store: ActivationStore, loaded: LoadedModel) -> None:
    """Raise MismatchError unless the store was harvested from this model with this tokenizer."""
    if store.meta.model.fingerprint != loaded.fingerprint:
        expected, got = f"a store of {loaded.id}", f"one of {store.meta.model.id}"
    elif store.meta.tokenizer_fingerprint != loaded.tokenizer_fingerprint:
        expected, got = f"a store made with the tokenizer of {loaded.id}", "one made with another tokenizer"
    else:
        return
    raise MismatchError(store.path, expected=expected, got=got, fix="Name the model that the store was harvested from.")


def check_sae(artefact: SaeArtefact, loaded: LoadedModel) -> None:
    """Raise MismatchError unless the SAE was made from this model, and is as wide."""
    model = artefact.metadata.get("model", {})
    fingerprint = model.get("fingerprint", loaded.fingerprint)
    if fingerprint != loaded.fingerprint:
        raise MismatchError(
            "SAE",
            expected=f"one trained on {loaded.id} ({loaded.fingerprint[:12]})",
            got=f"one trained on {model.get('id')} ({str(fingerprint)[:12]})",
            fix="Choose another.",
        )
    wiring = Wiring.parse(artefact.hook_point)
    expected = len(wiring.reads) * loaded.d_model, len(wiring.writes) * loaded.d_model
    if (artefact.d_model, artefact.d_out) != expected:
        raise MismatchError(
            "SAE",
            expected=f"one that reads and writes widths {expected}",
            got=(artefact.d_model, artefact.d_out),
            fix="Choose an SAE of this model.",
        )


def check_belongs(store: ActivationStore, loaded: LoadedModel, artefact: SaeArtefact) -> None:
    """Raise MismatchError unless store and SAE were made from this model, and the SAE fits the store."""
    check_store(store, loaded)
    check_sae(artefact, loaded)


def check_index(index: FeatureIndex, loaded: LoadedModel, artefact: SaeArtefact) -> None:
    """Raise MismatchError unless the index was made from this SAE as it is now, and both from this model."""
    check_sae(artefact, loaded)
    info, fix = index.info, "Build it again, into another out, with: saekit index"
    if info["model"]["fingerprint"] != loaded.fingerprint:
        got = f"one of {info['model']['id']}"
        raise MismatchError("feature index", expected=f"one of {loaded.id}", got=got, fix="Name its model.")
    if info["hook_point"] != artefact.hook_point:
        raise MismatchError("feature index", expected=f"one of {artefact.hook_point}", got=info["hook_point"], fix=fix)
    if info["sae_sha256"] != artefact.sha256:
        got = "one of other weights: the SAE has changed since, or is another"
        raise MismatchError("feature index", expected="an index of this SAE", got=got, fix=fix)
