"""`.svec`: the site is the reader's to say, and what one vector for all tokens cannot be is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from activations.errors import CorruptArtefactError, MismatchError, SaekitError
from activations.store_schema import ModelRef
from steer.formats import detect, find

MODEL = ModelRef(id="tiny", fingerprint="ab" * 32, n_layers=5, d_model=4)
ROW = [0.5, -0.5, 0.25, 0.0]
CAST: dict[str, Any] = {
    "model_type": "llama", "directions": {"1": ROW, "3": ROW}, "explained_variances": {"1": 0.5, "3": 0.25},
}  # fmt: skip
STEERABILITY: dict[str, Any] = {
    "model_type": "llama", "directions": {"1": [ROW], "3": [ROW]}, "explained_variances": {}, "num_heads": None,
    "head_dim": None, "probe_accuracies": {}, "meta": {"model_fingerprint": "x"},
}  # fmt: skip


def write(folder: Path, content: Any) -> Path:
    path = folder / "v.svec"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("content", [CAST, STEERABILITY], ids=["cast", "steerability"])
@pytest.mark.parametrize(("name", "site"), [("svec_cast", "resid_pre"), ("svec_caa", "resid_post")])
def test_rows_act_where_the_reader_says(content: Any, name: str, site: str, tmp_path: Path) -> None:
    found = find(name).read(write(tmp_path, content), MODEL)
    assert [str(each.hook_point) for each in found] == [f"{site}.1", f"{site}.3"]
    for each in found:
        np.testing.assert_array_equal(each.values, np.array(ROW, np.float32))
        assert (each.operation, each.coefficient) == ("add", 1.0)


def test_nobody_guesses_the_site(tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match=r"block inputs.*block outputs.*format=NAME"):
        detect(write(tmp_path, CAST))


def test_it_is_not_written(tmp_path: Path) -> None:
    for name in ("svec_cast", "svec_caa"):
        with pytest.raises(MismatchError, match="only read"):
            find(name).write([], tmp_path / "v.svec", False)
    assert not (tmp_path / "v.svec").exists()


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda c: c["directions"].update({"1": [ROW, ROW]}), MismatchError, "each for its own place"),
        (lambda c: c.update(num_heads=2, head_dim=2), MismatchError, "attention heads"),
        (lambda c: c["directions"].update({"5": ROW}), MismatchError, "a block from 0 to 4"),
        (lambda c: c["directions"].update({"1": [*ROW, 1.0]}), MismatchError, "the width of tiny"),
        (lambda c: c["directions"].update({"-1": ROW}), CorruptArtefactError, "number of a block"),
        (lambda c: c["directions"].update({"1": [0.0] * 4}), CorruptArtefactError, "not all 0"),
        (lambda c: c["directions"].update({"1": [float("nan")] * 4}), CorruptArtefactError, "finite"),
        (lambda c: c["directions"].update({"1": [10**400] * 4}), CorruptArtefactError, "numbers"),
        (lambda c: c["directions"].update({"1": "row"}), CorruptArtefactError, "numbers"),
        (lambda c: c["directions"].update({"1": [True] * 4}), CorruptArtefactError, "numbers"),
        (lambda c: c.update(directions={}), CorruptArtefactError, "rows by block"),
        (lambda c: c.update(directions=[ROW]), CorruptArtefactError, "rows by block"),
    ],
)
def test_what_it_cannot_be_is_refused(
    change: Callable[[dict[str, Any]], Any], error: type[SaekitError], says: str, tmp_path: Path
) -> None:
    content = json.loads(json.dumps(CAST))
    change(content)
    with pytest.raises(error, match=says):
        find("svec_cast").read(write(tmp_path, content), MODEL)


WHOLE = json.dumps(STEERABILITY).encode()


@given(st.integers(0, len(WHOLE) - 1), st.integers(0, 255), st.integers(0, len(WHOLE)))
def test_whatever_is_done_to_a_file_is_one_error_or_rows(tmp_path_factory: Any, at: int, byte: int, cut: int) -> None:
    path = tmp_path_factory.mktemp("svec") / "v.svec"
    for content in (WHOLE[:at] + bytes([byte]) + WHOLE[at + 1 :], WHOLE[:cut]):
        path.write_bytes(content)
        try:
            found = find("svec_caa").read(path, MODEL)
        except SaekitError:
            continue
        assert all(np.isfinite(each.values).all() for each in found)
