"""Stores written from arrays instead of a model's activations, what they all should come to, and a bucket for them."""

import http.client
import json
import logging
import re
import threading
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from activations import storage as storage_module
from activations.config import HarvestConfig
from activations.errors import MissingArtefactError
from activations.models import LoadedModel, load_model
from activations.storage import LOCK_KEY, open_storage
from activations.store import ActivationStore
from activations.store_schema import HookState, ModelRef, StoreMeta, StoreState, layout, scale_name
from activations.store_writer import Group, StoreWriter


class Stores:
    """Makes stores; group i of the same settings has the same content whenever it is made."""

    hooks = ("resid_pre.1", "resid_post.2")
    rows, ctx, width = 4, 8, 16

    def meta(self, **changes: object) -> StoreMeta:
        """Settings of a small int8 store, which has every kind of array."""
        values = {
            "model": ModelRef(id="m", fingerprint="f", n_layers=3, d_model=self.width),
            "tokenizer_fingerprint": "t",
            "text": "corpus",
            "text_fingerprint": "x",
            "hook_points": self.hooks,
            "ctx": self.ctx,
            "store_dtype": "int8",
            "compute_dtype": "float32",
            "batch_tokens": 2048,
            "commit_sequences": self.rows,
            "outlier_norm": 10.0,
        }
        return StoreMeta.model_validate(values | changes)

    @property
    def arrays(self) -> tuple[str, ...]:
        """Names of the arrays of the default settings."""
        return tuple(layout(self.meta()))

    def group(self, meta: StoreMeta, number: int, state: StoreState, rows: int = rows) -> tuple[Group, StoreState]:
        """A group and the state to commit it with."""
        rng = np.random.default_rng(number)
        arrays: dict[str, np.ndarray] = {}
        for name in meta.hook_points:
            shape = rows, meta.ctx, meta.model.d_model
            if meta.store_dtype == "int8":
                arrays[name] = rng.integers(-127, 128, shape, dtype=np.int8)
                arrays[scale_name(name)] = rng.random(shape[:2], dtype=np.float32)
            else:
                arrays[name] = rng.standard_normal(shape, dtype=np.float32).astype(meta.store_dtype)
        mask = np.ones((rows, meta.ctx), dtype=bool)
        tokens = rng.integers(1, 100, mask.shape, dtype=np.int32)
        counted = HookState(n_tokens=state.tokens + mask.size, sum=(float(number),))
        part = Group(tokens, mask, np.arange(rows, dtype=np.int32) + number * self.rows, arrays)
        hooks = dict.fromkeys(meta.hook_points, counted)
        return part, state.model_copy(update={"tokens": state.tokens + mask.size, "hooks": hooks})

    def make(self, where: str | Path, *, groups: int = 3, **changes: object) -> StoreMeta:
        """Write a store, or go on with it, up to a number of groups."""
        meta = self.meta(**changes)
        with StoreWriter.open(where, meta) as writer:
            for number in range(writer.state.committed // self.rows, groups):
                writer.append(*self.group(meta, number, writer.state))
            writer.finish(complete=True)
        return meta

    def read(self, store: ActivationStore, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """An array as a user reads it; a scale with the hook point that it belongs to."""
        if name in ("tokens", "mask", "documents"):
            return getattr(store, name)(start, stop)
        return store.activations(name.removeprefix("scale."), start, stop)

    def committed(self, where: str | Path) -> int:
        """Committed sequences, after reading and verifying all of them; -1 if there is no store yet."""
        try:
            store = ActivationStore.open(where)
        except MissingArtefactError:
            return -1
        assert [damage for _, damage in store.verify() if damage] == []
        assert {len(store.activations(name)) for name in store.hook_points} == {store.n_sequences}
        return store.n_sequences

    def contents(self, where: str | Path) -> dict[str, bytes]:
        """Every object of a store but the lock; in a folder every file, those that are half made, too."""
        if str(where).startswith("s3://"):
            storage = open_storage(where)
            found = {key: storage.read(key) for key in storage.sizes() if key != LOCK_KEY}
            return {key: data[0] for key, data in found.items() if data}
        files = (file for file in Path(where).rglob("*") if file.is_file() and file.name != LOCK_KEY)
        return {file.relative_to(where).as_posix(): file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def tiny(tiny_llama: Path) -> LoadedModel:
    return load_model(str(tiny_llama), dtype="float32")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    rows = [{"text": f"Document {i} says {'la ' * (5 * i % 37)}and ends here."} for i in range(60)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.fixture
def settings(text: Path, tiny_llama: Path, tmp_path: Path) -> HarvestConfig:
    """About ninety sequences in commits of two."""
    return HarvestConfig(
        model=str(tiny_llama),
        text=str(text),
        hook_points=Stores.hooks,
        out=str(tmp_path / "store"),
        ctx=32,
        batch_tokens=64,
        commit_sequences=2,
        max_tokens=10_000,
        store_dtype="float32",
        compute_dtype="float32",
    )


@pytest.fixture(scope="session")
def stores() -> Stores:
    return Stores()


KEY, SECRET = "AKIAOFATESTER", "very/secret+indeed"


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Address of a server that speaks S3."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """Makes new buckets and gives their s3:// addresses; the environment names the server and credentials."""
    for name, value in {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)

    def make() -> str:
        name = f"bucket-{next(_numbers)}"
        urllib.request.urlopen(urllib.request.Request(f"{s3_server}/{name}", method="PUT")).close()
        return f"s3://{name}"

    return make


_numbers = count()


@dataclass
class Fault:
    """Cut the connection of requests that match, some times."""

    method: str
    path: str
    """pattern of the path"""
    cut: str
    """in the "request", in the "response", or before the "answer" to what the server has done"""
    times: float = 1
    alternate: bool = False
    """strike every second time, so that each request, or the one that repeats it, gets through"""
    seen: list[str] = field(default_factory=list)
    matched: int = 0

    def strikes(self, method: str, path: str) -> bool:
        if not re.fullmatch(self.method, method) or not re.search(self.path, path):
            return False
        self.matched += 1
        strikes = self.matched % 2 == 1 if self.alternate else len(self.seen) < self.times
        if strikes:
            self.seen.append(path)
        return strikes


class Proxy:
    """Stands between obstore and the server, and does what networks do."""

    def __init__(self, upstream: str):
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        proxy, (host, port) = self, upstream.removeprefix("http://").split(":")

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                try:
                    super().handle_one_request()
                except (ConnectionError, TimeoutError):
                    self.close_connection = True

            def log_message(self, format: str, *args: Any) -> None:
                pass

            def pass_on(self) -> None:
                proxy.requests.append((self.command, self.path))
                fault = next((f for f in proxy.faults if f.strikes(self.command, self.path)), None)
                length = int(self.headers.get("content-length", 0))
                whole = http.client.HTTPConnection(host, int(port), timeout=20)
                try:
                    whole.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                    for name, value in self.headers.items():
                        whole.putheader(name, value)
                    whole.endheaders()
                    if fault and fault.cut == "request":
                        whole.send(self.rfile.read(length // 2))
                        self.close_connection = True
                        return
                    whole.send(self.rfile.read(length))
                    self.answer(whole.getresponse(), fault)
                finally:
                    whole.close()

            def answer(self, response: http.client.HTTPResponse, fault: Fault | None) -> None:
                data = response.read()
                if fault and fault.cut == "answer":
                    self.close_connection = True
                    return
                self.send_response_only(response.status, response.reason)
                for name, value in response.getheaders():
                    if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                        self.send_header(name, value)
                said = response.getheader("content-length") if self.command == "HEAD" else None
                self.send_header("Content-Length", said or str(len(data)))
                self.end_headers()
                self.wfile.write(data[: len(data) // 2] if fault else data)
                self.close_connection = self.close_connection or fault is not None

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = pass_on

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def cut(self, *args: Any, **kwargs: Any) -> Fault:
        """Cut connections from here on; see Fault."""
        self.faults.append(Fault(*args, **kwargs))
        return self.faults[-1]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def proxy(s3_server: str, bucket: Callable[[], str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """The network; requests are repeated soon and not often."""
    proxy = Proxy(s3_server)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
    monkeypatch.setattr(storage_module, "PATIENCE_S", 0.5)
    monkeypatch.setattr(storage_module, "PAUSE_S", 0.01)
    yield proxy
    proxy.close()
