"""The Hugging Face hub, by a stand-in: what is pushed is pulled again, and what a hub serves is not believed."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from activations.errors import ConfigError, CorruptArtefactError, EndpointError, MissingArtefactError, SaekitError
from steer.packs.config import PublishConfig
from steer.packs.hub import HubPlace, parse_hub
from steer.packs.install import install
from steer.packs.installed import store
from steer.packs.keys import fingerprint, load_key, make_key
from steer.packs.publish import publish
from steer.packs.signature import sign
from tests.steer.packs.hub_stand_in import TOKEN, Hub, hub
from tests.steer.packs.packs import FILES, tree, write_pack

ROOT = Path(__file__).resolve().parents[3]
MAIN = "from steer.cli import main; main()"

# What huggingface_hub calls of httpx2 when it uploads a large file.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub, which huggingface_hub takes for its own in this test. It read the environment when it was imported."""
    from huggingface_hub import constants

    with hub() as made:
        monkeypatch.setattr(constants, "ENDPOINT", made.server.url)
        template = made.server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield made


def own(pack: Path) -> dict[str, bytes]:
    return {name: content for name, content in tree(pack).items() if name != "judge.jsonl"}


def push(pack: Path, to: str = "hub:team/demo", **more: Any) -> dict[str, Any]:
    return publish(PublishConfig(library=str(pack), to=to, **more))


def test_what_is_pushed_is_pulled_again(stand_in: Hub, make_pack: Callable[..., Path]) -> None:
    pack = make_pack()
    first = push(pack)
    assert stand_in.files("team/demo") == own(pack) | {".gitattributes": b"*.safetensors filter=lfs\n"}
    assert len(stand_in.repos["team/demo"]) == 2  # its first state, and one commit
    assert set(stand_in.large) != set()  # some went by LFS
    done = install("hub:team/demo")
    assert tree(done.path) == own(pack)
    assert not any(path.is_symlink() for path in done.path.rglob("*"))
    push(make_pack("next", version="1.1.0"))
    assert install("hub:team/demo").version == "1.1.0"
    assert install(f"hub:team/demo@{first['commit']}").version == "1.0.0"
    assert push(make_pack("next", version="1.1.0"))["commit"] == stand_in.repos["team/demo"][-1][0]


def test_a_signature_comes_and_goes(stand_in: Hub, make_pack: Callable[..., Path], tmp_path: Path) -> None:
    make_key(tmp_path / "my.key")
    print_of = fingerprint(load_key(tmp_path / "my.key").public_key())
    push(make_pack(), key=tmp_path / "my.key")
    assert str(install("hub:team/demo").signed) == f"signed by an unknown key {print_of}"
    push(make_pack("next", version="1.1.0"))
    assert "signature.json" not in stand_in.files("team/demo")
    assert str(install("hub:team/demo").signed) == "unsigned"
    stand_in.commit("team/demo", stand_in.files("team/demo") | {"signature.json": sign("0" * 64, _key())})
    with pytest.raises(CorruptArtefactError, match=r"hub:team/demo: .*tampered"):
        install("hub:team/demo")


def _key() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(bytes(32))


def test_what_a_hub_serves_is_not_believed(stand_in: Hub, tmp_path: Path) -> None:
    for number, (files, sizes, match) in enumerate(
        [
            (own(write_pack(tmp_path / "a")) | {"README.md": b"# A pacK\n"}, {}, "other content"),
            (own(write_pack(tmp_path / "a")) | {"README.md": b"# A longer pack\n"}, {}, "README.md: expected 9 bytes"),
            (own(write_pack(tmp_path / "a")) | {"README.md": b"# A longer pack\n"}, {"README.md": 9}, "README.md"),
            (own(write_pack(tmp_path / "a")), {"manifest.json": 2**40}, "manifest.json: expected at most"),
            (own(write_pack(tmp_path / "a")) | {"signature.json": bytes(5000)}, {}, "signature.json: expected at most"),
            (own(write_pack(tmp_path / "b", {**FILES, "../evil": b"x"})), {}, "names that files"),
            (own(write_pack(tmp_path / "a")) | {"manifest.json": b"{}"}, {}, "hub:team/r5|hub:team/r6"),
        ]
    ):
        stand_in.commit(f"team/r{number}", {name: content for name, content in files.items() if ".." not in name})
        stand_in.sizes = sizes
        with pytest.raises(CorruptArtefactError, match=match) as caught:
            install(f"hub:team/r{number}")
        assert "\n" not in str(caught.value)
    assert tree(store()) == {".lock": b""}
    missing = own(write_pack(tmp_path / "a"))
    stand_in.sizes = {}
    del missing["README.md"]
    stand_in.commit("team/short", missing)
    with pytest.raises(CorruptArtefactError, match=r"README\.md: expected 9 bytes, as the manifest lists, got None"):
        install("hub:team/short")


def test_only_what_the_manifest_lists_is_fetched(stand_in: Hub, make_pack: Callable[..., Path], tmp_path: Path) -> None:
    stand_in.commit("team/demo", own(make_pack()) | {"huge.bin": bytes(5000), "evil.py": b"x"})
    done = install("hub:team/demo")
    assert tree(done.path) == own(tmp_path / "pack")
    asked = {path.rpartition("/")[2] for command, path, _ in stand_in.server.answer.asked if "/resolve/" in path}
    assert asked == {name.rpartition("/")[2].replace("@", "%40") for name in own(tmp_path / "pack")}


def test_what_is_not_there_or_not_allowed(
    stand_in: Hub, make_pack: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in.commit("team/model", {"model.safetensors": b"x"})
    for spec, kind, match in [
        ("hub:team/none", MissingArtefactError, "a repository that you may read"),
        ("hub:team/model", MissingArtefactError, "without manifest.json"),
        ("hub:team/model@other", MissingArtefactError, "a repository that you may read"),
        ("hub:team/mod--el", EndpointError, "a hub that answers"),
        ("hub:team", ConfigError, "ORG/NAME"),
    ]:
        with pytest.raises(kind, match=match) as caught:
            install(spec)
        assert "\n" not in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    with pytest.raises(SaekitError, match="hub:team/demo") as caught:
        push(make_pack())
    assert "verysecret" not in str(caught.value)
    broken = make_pack("broken")
    (broken / "README.md").write_text("x")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(CorruptArtefactError):
        push(broken)
    assert "team/demo" not in stand_in.repos


def test_specs() -> None:
    assert parse_hub("hub:team/demo@v1.0.0") == HubPlace("team/demo", "v1.0.0")
    assert parse_hub("hub:team/demo@refs/pr/1") == HubPlace("team/demo", "refs/pr/1")
    for wrong in ("hub:", "hub:a/b/c", "hub:../x", "hub:a/b@", "hub:a/b@c d", "hub:a/b\n", "hub:-a/b"):
        with pytest.raises(ConfigError, match="ORG/NAME"):
            parse_hub(wrong)


def test_the_verbs_with_the_hub_that_the_environment_names(make_pack: Callable[..., Path], tmp_path: Path) -> None:
    with hub() as made:
        env = os.environ | {
            "HF_ENDPOINT": made.server.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN,
            "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT),
        }  # fmt: skip

        def saekit(*arguments: str) -> dict[str, Any]:
            command = [sys.executable, "-c", MAIN, "library", *arguments, "--json"]
            done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr
            assert TOKEN not in done.stdout + done.stderr
            return json.loads(done.stdout)

        pushed = saekit("publish", "--set", f"library={make_pack()}", "--set", "to=hub:team/demo")
        pulled = saekit("install", "hub:team/demo")
        assert pushed["content_sha256"] == pulled["content_sha256"]
        assert tree(Path(pulled["path"])) == own(tmp_path / "pack")
