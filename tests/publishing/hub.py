"""As much of the Hub as an upload meets, on this machine: repositories in memory, large files apart, and its refusals.

What goes wrong is decided by the repository's owner: ``refused`` has a token that is none, ``full`` no storage left,
and ``dropping`` loses the connection at the second large file until the upload is begun anew. Of a card's metadata
it knows one thing: there is no language ``qqq``.

``python -m tests.publishing.hub`` serves until it is interrupted; it checks large files and forgets what is in them.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "c" * 40
UNKNOWN_LANGUAGE = "- qqq\n"


@dataclass
class Stored:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)
    commits: list[list[str]] = field(default_factory=list)


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Hub(ThreadingHTTPServer):
    """Serves from a thread of its own until ``shutdown``."""

    def __init__(self, port: int = 0, keeps: bool = True, handler: type[BaseHTTPRequestHandler] | None = None) -> None:
        super().__init__(("127.0.0.1", port), handler or Handler)
        self.keeps = keeps
        self.repositories: dict[str, Stored] = {}
        self.blobs: dict[str, bytes] = {}
        self.puts: list[str] = []
        self.dropped = 0
        self.requests: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, body: object = None, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps({} if body is None else body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refused(self, owner: str) -> bool:
        self.server.requests.append(f"{self.command} {self.path}")
        if owner == "refused":
            self.answer(401, {"error": "Invalid username or password."}, X_Error_Message="Invalid credentials")
        return owner == "refused"

    def do_GET(self) -> None:
        match = re.fullmatch(r"/api/models/([\w-]+/[\w-]+)(/tree/main|/revision/main)?(\?.*)?", self.path)
        if match is None:  # what the client asks beside
            self.answer(404)
            return
        name, kind = match[1], match[2]
        if self.refused(name.split("/")[0]):
            return
        stored = self.server.repositories.get(name)
        if stored is None:
            self.answer(404, X_Error_Code="RepoNotFound")
        elif kind == "/tree/main":
            items = [{"type": "file", "path": p, "size": len(d), "oid": git_oid(d)} for p, d in stored.files.items()]
            self.answer(200, items)
        else:
            self.answer(
                200, {"id": name, "sha": COMMIT, "private": stored.private, "tags": stored.tags, "siblings": []}
            )

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/validate-yaml":
            wrong = UNKNOWN_LANGUAGE in json.loads(body)["content"]
            errors = [{"message": '"language" must be one of the known'}] if wrong else []
            self.answer(400 if errors else 200, {"warnings": [], "errors": errors})
        elif self.path == "/api/repos/create":
            self.create(json.loads(body))
        elif match := re.fullmatch(r"/api/models/(.+)/preupload/main(\?.*)?", self.path):
            self.preupload(self.server.repositories[match[1]], json.loads(body)["files"])
        elif match := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", self.path):
            self.batch(match[1], json.loads(body)["objects"])
        elif match := re.fullmatch(r"/api/models/(.+)/commit/main(\?.*)?", self.path):
            self.commit(match[1], [json.loads(line) for line in body.splitlines()])
        else:
            self.answer(404)

    def create(self, asked: dict) -> None:
        if not self.refused(asked["organization"]):
            name = f"{asked['organization']}/{asked['name']}"
            private = asked.get("private", False) or asked.get("visibility") == "private"
            self.server.repositories[name] = Stored(private)
            self.answer(200, {"url": f"{self.server.endpoint}/{name}"})

    def preupload(self, stored: Stored, files: list[dict]) -> None:
        answers = []
        for file in files:
            large = file["path"].endswith(".safetensors")
            held = stored.files.get(file["path"])
            oid = None if held is None else hashlib.sha256(held).hexdigest() if large else git_oid(held)
            mode = "lfs" if large else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer(200, {"files": answers})

    def batch(self, name: str, objects: list[dict]) -> None:
        if name.startswith("full/"):
            words = "Private repository storage limit reached, please upgrade your plan"
            self.answer(403, {"error": words}, X_Error_Message=words)
            return
        for one in objects:
            if one["oid"] not in self.server.blobs:
                one["actions"] = {"upload": {"href": f"{self.server.endpoint}/{name}/blob/{one['oid']}"}}
        self.answer(200, {"transfer": "basic", "objects": objects})

    def do_PUT(self) -> None:
        name, _, oid = self.path[1:].partition("/blob/")
        data = self.rfile.read(int(self.headers["Content-Length"]))
        begun = [request for request in self.server.requests if request == f"GET /api/models/{name}"]
        if name.startswith("dropping/") and self.server.blobs and len(begun) == 1:
            self.server.dropped += 1
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        assert hashlib.sha256(data).hexdigest() == oid
        self.server.puts.append(oid)
        self.server.blobs[oid] = data if self.server.keeps else b""
        self.answer(200)

    def commit(self, name: str, entries: list[dict]) -> None:
        stored = self.server.repositories[name]
        for entry in entries:
            value = entry["value"]
            if entry["key"] == "file":
                stored.files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                stored.files[value["path"]] = self.server.blobs[value["oid"]]
            elif entry["key"] == "deletedFile":
                del stored.files[value["path"]]
        stored.commits.append([entry["value"]["path"] for entry in entries if entry["key"] != "header"])
        self.answer(200, {"commitUrl": f"{self.server.endpoint}/{name}/commit/{COMMIT}", "commitOid": COMMIT})


if __name__ == "__main__":
    hub = Hub(port=8765, keeps=False)
    print(f"HF_ENDPOINT={hub.endpoint}", flush=True)
    threading.Event().wait()
