"""What may answer in the place of the Hub, and a Hub that does not answer: one line each, and an end."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest

from modeling_t5gemma.errors import UserError
from modeling_t5gemma.io import hub
from modeling_t5gemma.publishing.upload import upload

COMMIT = "a" * 40
SOMEBODY_ELSE = "is not the Hub .* Check the network .* and HF_ENDPOINT"
REPLIES = {
    "html": b"<html>log in</html>",
    "empty": b"",
    "list": b"[]",
    "null": b"null",
    "text": b'"log in"',
    "no sha": b'{"id": "a/b", "siblings": []}',
    "sha of another type": b'{"id": "a/b", "sha": 3, "siblings": []}',
    "no UTF-8": b'{"id": "\xff\xfe"}',
    "deep": b"[" * 200_000,
}


class Anything(BaseHTTPRequestHandler):
    """Answers what it is told to, slowly if it is told to."""

    status, body, pause = 200, b"", 0.0

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # the client has given up
            for byte in self.body if self.pause else ():
                time.sleep(self.pause)
                self.wfile.write(bytes([byte]))
        if not self.pause and self.command != "HEAD":
            self.wfile.write(self.body)

    do_HEAD = do_POST = do_PUT = do_GET


@pytest.fixture
def anything(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[Anything]]:
    handler = type("Told", (Anything,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(time, "sleep", lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.05)))
    yield handler
    server.shutdown()


def uploaded(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    upload(tmp_path, "a/b", public=False)


@pytest.mark.loopback
@pytest.mark.parametrize("reply", REPLIES)
def test_what_is_no_hub_is_told_in_one_line(anything, tmp_path, reply):
    anything.body = REPLIES[reply]
    for ask in (lambda: hub.download("a/b", None), lambda: hub.describe("a/b", None)):
        with pytest.raises(UserError, match=SOMEBODY_ELSE):
            ask()
    with pytest.raises(UserError, match="exists and is public" if "sha" in reply else SOMEBODY_ELSE):
        uploaded(tmp_path)


@pytest.mark.loopback
@pytest.mark.parametrize(
    ("status", "read", "sent"),
    [
        (401, "no repository a/b .* or it is private|refused the token", "refused the token"),
        (403, "may not read a/b", "may not write to a/b"),
        (429, "too many requests", "too many requests"),
        (500, "failed at a/b .*500", "failed at a/b .*500.* goes on where"),
        (418, "refused a/b .*418", "refused a/b .*418"),
    ],
)
def test_a_refusal_is_told_for_what_it_is(anything, tmp_path, status, read, sent):
    anything.status, anything.body = status, json.dumps({"error": "no"}).encode()
    with pytest.raises(UserError, match=read):
        hub.download("a/b", None)
    with pytest.raises(UserError, match=sent):
        uploaded(tmp_path)


@pytest.mark.loopback
@pytest.mark.parametrize("answer", ["never", "byte by byte"])
def test_a_hub_that_does_not_answer_is_given_up(anything, tmp_path, monkeypatch, answer):
    monkeypatch.setattr(hub, "WAIT", 0.3)
    monkeypatch.setattr(hub, "_OVER", 0.4)
    monkeypatch.setattr(time, "sleep", threading.Event().wait)
    anything.body, anything.pause = b" " * 100, {"never": 5, "byte by byte": 0.1}[answer]
    begun = time.monotonic()
    for ask in (lambda: hub.download("a/b", None), lambda: hub.tags("a/b"), lambda: uploaded(tmp_path)):
        with pytest.raises(UserError, match="did not answer within"):
            ask()
    assert time.monotonic() - begun < 4
    assert not list(tmp_path.glob("cache/**/*.incomplete"))


@pytest.mark.loopback
def test_a_steady_answer_is_waited_for_and_errors_pass_through(anything, monkeypatch):
    monkeypatch.setattr(hub, "_OVER", 0.05)
    monkeypatch.setattr(hub, "_SLOWEST", 1)
    anything.body = json.dumps({"id": "a/b", "sha": COMMIT, "tags": ["license:mit"], "siblings": []}).encode()
    anything.pause = 0.002
    assert hub.tags("a/b") == ["license:mit"]
    with pytest.raises(UserError, match=r"^as it was$"), hub.told("a/b"):
        raise UserError("as it was")
