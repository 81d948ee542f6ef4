"""A stand-in for the Hugging Face hub: what huggingface_hub asks for when a model repository is pushed and pulled.

Files above LFS_BYTES go by Git LFS, as the hub has it for large ones, and are served behind a redirect. Writing needs
TOKEN. A test may change `repos` and `sizes` to have a hub that serves something else, or says so.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote

from tests.steer.packs.servers import Answer, Server, serving

TOKEN = "hf_standin"
LFS_BYTES = 1000
Files = dict[str, bytes]


class Hub:
    """Repositories, each a list of commits, oldest first."""

    def __init__(self) -> None:
        self.repos: dict[str, list[tuple[str, Files]]] = {}
        self.large: dict[str, bytes] = {}
        self.sizes: dict[str, int] = {}
        """what is said of a file's size, where it is not the truth"""
        self.server: Server

    def files(self, repo: str) -> Files:
        """What is in a repository now."""
        return self.repos[repo][-1][1]

    def commit(self, repo: str, files: Files) -> str:
        """Put a state behind those that there are."""
        commits = self.repos.setdefault(repo, [])
        sha = hashlib.sha1(f"{repo} {len(commits)}".encode()).hexdigest()
        commits.append((sha, files))
        return sha

    def __call__(self, answer: Answer, path: str) -> None:
        """Answer a request."""
        route = f"{answer.command} {unquote(path.partition('?')[0])}"
        body = _body(answer)
        is_open = answer.command in ("GET", "HEAD") or path.startswith("/large/")
        if not is_open and answer.headers.get("Authorization") != f"Bearer {TOKEN}":
            return answer.send(401, b'{"error": "Invalid username or password."}')
        for pattern, handler in ROUTES.items():
            if found := re.fullmatch(pattern, route):
                return handler(self, answer, body, **found.groupdict())
        return answer.send(404, b"{}", X_Error_Code="EntryNotFound")

    def create(self, answer: Answer, body: bytes) -> None:
        asked = json.loads(body)
        repo = f"{asked['organization']}/{asked['name']}"
        status = 409 if repo in self.repos else 200
        self.repos.setdefault(repo, []) or self.commit(repo, {".gitattributes": b"*.safetensors filter=lfs\n"})
        _json(answer, {"url": f"{self.server.url}/{repo}", "error": "You already created this model repo"}, status)

    def validate(self, answer: Answer, body: bytes) -> None:
        _json(answer, {"errors": [], "warnings": []})

    def preupload(self, answer: Answer, body: bytes, repo: str, revision: str) -> None:
        modes = [
            {
                "path": each["path"],
                "uploadMode": "lfs" if each["size"] > LFS_BYTES else "regular",
                "shouldIgnore": False,
            }
            for each in json.loads(body)["files"]
        ]
        _json(answer, {"files": modes})

    def batch(self, answer: Answer, body: bytes, repo: str) -> None:
        objects = json.loads(body)["objects"]
        for each in objects:
            each["actions"] = {
                "upload": {"href": f"{self.server.url}/large/{each['oid']}"},
                "verify": {"href": f"{self.server.url}/verify"},
            }
        _json(answer, {"transfer": "basic", "objects": objects})

    def upload(self, answer: Answer, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.large[oid] = body
        answer.send(200)

    def verify(self, answer: Answer, body: bytes) -> None:
        asked = json.loads(body)
        answer.send(200 if len(self.large[asked["oid"]]) == asked["size"] else 404, b"{}")

    def add(self, answer: Answer, body: bytes, repo: str, revision: str) -> None:
        head, *changes = [json.loads(line) for line in body.splitlines()]
        assert head["key"] == "header"
        files = dict(self.files(repo))
        for change in changes:
            value = change["value"]
            if change["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif change["key"] == "lfsFile":
                files[value["path"]] = self.large[value["oid"]]
            else:
                assert change["key"] == "deletedFile"
                del files[value["path"]]
        sha = self.commit(repo, files)
        _json(answer, {"commitUrl": f"{self.server.url}/{repo}/commit/{sha}", "commitOid": sha})

    def info(self, answer: Answer, body: bytes, repo: str, revision: str = "main") -> None:
        found = self._found(answer, repo, revision)
        if found is not None:
            sha, files = found
            siblings = [{"rfilename": name, "size": self._size(name, content)} for name, content in files.items()]
            _json(answer, {"id": repo, "sha": sha, "private": False, "tags": [], "siblings": siblings})

    def tree(self, answer: Answer, body: bytes, repo: str, revision: str) -> None:
        found = self._found(answer, repo, revision)
        if found is not None:
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in found[1].items()
            ]
            _json(answer, entries)

    def resolve(self, answer: Answer, body: bytes, repo: str, revision: str, path: str) -> None:
        found = self._found(answer, repo, revision)
        if found is None:
            return
        sha, files = found
        if path not in files:
            return answer.send(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        oid = hashlib.sha256(files[path]).hexdigest()
        about = {"X_Repo_Commit": sha, "ETag": f'"{oid}"'}
        if len(files[path]) <= LFS_BYTES:
            return answer.send(200, files[path], **about)
        self.large[oid] = files[path]
        linked = {"X_Linked_Etag": f'"{oid}"', "X_Linked_Size": str(len(files[path]))}
        elsewhere = self.server.url.replace("127.0.0.1", "localhost")  # as the hub's are on another host
        return answer.send(302, b"", Location=f"{elsewhere}/large/{oid}", **about, **linked)

    def download(self, answer: Answer, body: bytes, oid: str) -> None:
        answer.send(200, self.large[oid])

    def _found(self, answer: Answer, repo: str, revision: str) -> tuple[str, Files] | None:
        if repo not in self.repos:
            return answer.send(404, b"{}", X_Error_Code="RepoNotFound")
        commits = self.repos[repo]
        chosen = commits[-1:] if revision == "main" else [each for each in commits if each[0] == revision]
        if not chosen:
            return answer.send(404, b"{}", X_Error_Code="RevisionNotFound")
        return chosen[0]

    def _size(self, name: str, content: bytes) -> int:
        return self.sizes.get(name, len(content))


REPO = r"(?P<repo>[^/]+/[^/]+?)"
ROUTES: dict[str, Any] = {
    r"POST /api/repos/create": Hub.create,
    r"POST /api/validate-yaml": Hub.validate,
    rf"POST /api/models/{REPO}/preupload/(?P<revision>.+)": Hub.preupload,
    rf"POST /{REPO}\.git/info/lfs/objects/batch": Hub.batch,
    r"PUT /large/(?P<oid>[0-9a-f]+)": Hub.upload,
    r"POST /verify": Hub.verify,
    rf"POST /api/models/{REPO}/commit/(?P<revision>.+)": Hub.add,
    rf"GET /api/models/{REPO}": Hub.info,
    rf"GET /api/models/{REPO}/revision/(?P<revision>.+)": Hub.info,
    rf"GET /api/models/{REPO}/tree/(?P<revision>[^/]+)": Hub.tree,
    rf"(?:GET|HEAD) /{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)": Hub.resolve,
    r"(?:GET|HEAD) /large/(?P<oid>[0-9a-f]+)": Hub.download,
}


@contextmanager
def hub() -> Iterator[Hub]:
    """A hub that runs inside the block."""
    made = Hub()
    with serving(lambda answer, path: made(answer, path)) as server:
        made.server = server
        yield made


def _body(answer: Answer) -> bytes:
    if answer.headers.get("Transfer-Encoding") == "chunked":
        parts = []
        while size := int(answer.rfile.readline(), 16):
            parts.append(answer.rfile.read(size))
            answer.rfile.readline()
        answer.rfile.readline()
        return b"".join(parts)
    return answer.rfile.read(int(answer.headers.get("Content-Length") or 0))


def _json(answer: Answer, content: Any, status: int = 200) -> None:
    answer.send(status, json.dumps(content).encode(), Content_Type="application/json")
