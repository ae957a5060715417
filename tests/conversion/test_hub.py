"""Sources from the Hub and uploads to it, against a server on this machine that speaks enough of its protocol."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from modeling_t5gemma.conversion.families import FAMILIES
from tests.publishing.conftest import TERMS
from tests.publishing.hub import COMMIT, Handler, Hub

TOKEN = "hf_thistokenmustneverbeprinted"
# Each case is a run of the command line in one process; a line of JSON for each.
RUN_CASES = """
import contextlib, io, json, sys
from modeling_t5gemma import cli
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["t5gemma", "convert", *arguments]
    out, err = io.StringIO(), io.StringIO()
    code = None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as exit_:
            code = exit_.code
    print(json.dumps([code or 0, out.getvalue(), err.getvalue()]), file=sys.__stdout__)
"""


class FakeHub(Handler):
    """google/gemma-2-2b and -9b serve ``folder``; owner/gated is gated; the rest is the Hub that takes uploads."""

    folder: Path
    fetched: list[str]

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        files = {file.name: file for file in self.folder.iterdir()}
        known = re.fullmatch(r"(?:/api/models)?/google/gemma-2-[29]b/(\w+)/(\w+)(?:/([\w.-]+))?", path)
        if "/gated" in path:
            self.answer(403, X_Error_Code="GatedRepo", X_Error_Message="Ask for access")
        elif known is None:
            super().do_GET()
        elif known[2] not in ("main", COMMIT):
            self.answer(404, X_Error_Code="RevisionNotFound")
        elif known[1] == "resolve" and known[3] not in files:
            self.answer(404, X_Error_Code="EntryNotFound")
        elif known[1] == "resolve":
            self.resolve(path, files[known[3]].read_bytes())
        elif known[1] == "tree":
            self.answer(
                200, [{"type": "file", "path": n, "size": f.stat().st_size, "oid": "0"} for n, f in files.items()]
            )
        else:
            siblings = [{"rfilename": name} for name in files]
            self.answer(200, {"id": path.split("/revision")[0][12:], "sha": COMMIT, "siblings": siblings})

    def resolve(self, path: str, data: bytes) -> None:
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X_Repo_Commit": COMMIT}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted:
            self.answer(206, data[int(wanted[1]) : int(wanted[2]) + 1], **headers)
        else:
            if self.command == "GET":
                self.fetched.append(path)
            self.answer(200, data, **headers)

    do_HEAD = do_GET


@pytest.mark.loopback
def test_download_refusals_and_upload(sources, tmp_path):
    FakeHub.folder, FakeHub.fetched = tmp_path / "repository", []
    shutil.copytree(sources("gemma2"), FakeHub.folder)
    (FakeHub.folder / "GEMMA_TERMS.md").write_text(TERMS)
    server = Hub(handler=FakeHub)
    output = str(tmp_path / "output")

    def both(name: str, *options: str, to: str = output) -> list[str]:
        return ["--quiet", "--enc", name, "--dec", name, "--output", to, *options]

    cases = [
        both("owner/gated"),
        both("owner/absent"),
        both("2b", "--revision", "nightly"),
        ["--enc", "9b", "--dec", "9b", "--output", output, "--dry-run"],
        both("2b", "--push-to-hub", "somebody"),
        both(str(sources("gemma2")), "--push-to-hub", "somebody/else", to=str(tmp_path / "local")),
        both("2b", "--push-to-hub", "somebody/converted"),
        ["--quiet", "--enc", str(sources("gemma2")), "--dec", "2b", "--output", output, "--overwrite"],
    ]
    environment = {**os.environ, "HF_ENDPOINT": server.endpoint, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "hf")}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RUN_CASES, json.dumps(cases)],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    server.shutdown()
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    gated, absent, revision, planned, misnamed, local, pushed, mixed = (
        json.loads(line) for line in done.stdout.splitlines()
    )
    for result, pattern in (
        (gated, r"error: No access to the gated repository owner/gated\. Accept its terms.*log in .*\n"),
        (absent, r"error: There is no repository owner/absent on the Hub.*\n"),
        (revision, r"error: google/gemma-2-2b has no revision 'nightly'.*\n"),
        (misnamed, r"error: --push-to-hub 'somebody' is not the name of a Hub repository\. Give OWNER/NAME\.\n"),
        (local, r"error: \S+/local is complete, and not on the Hub: .*--base.* Then: t5gemma publish .*\n"),
    ):
        assert result[:2] == [2, ""] and re.fullmatch(pattern, result[2]), result
    # A dry run looks at the headers and fetches no weights.
    assert planned[0] == 0 and "google/gemma-2" in planned[1] and "cross-attention" in planned[1], planned
    assert any("gemma-2-9b" in path and path.endswith("config.json") for path in FakeHub.fetched)
    assert not any("gemma-2-9b" in path and path.endswith(".safetensors") for path in FakeHub.fetched)
    assert pushed == [0, "", ""] and mixed == [0, "", ""]
    (created,) = server.repositories.values()
    committed = created.files
    assert created.private
    assert committed["config.json"] == (tmp_path / "output" / "config.json").read_bytes()
    assert {"model.safetensors", "README.md", "NOTICE", "tokenizer.json"} <= set(committed)
    record = json.loads((tmp_path / "output" / "conversion.json").read_text())
    assert (record["decoder"]["source"], record["decoder"]["commit"]) == ("google/gemma-2-2b", COMMIT)
    assert record["encoder"]["commit"] is None
    assert not any(name.endswith((".bin", ".pkl")) for name in committed)
    card = committed["README.md"].decode()
    assert "base_model:\n- google/gemma-2-2b\n" in card and 'from_pretrained("somebody/converted"' in card


def test_aliases_are_the_hubs_names():
    aliases = {alias: repo for family in ("gemma2",) for alias, repo in FAMILIES[family].aliases.items()}
    assert aliases == {
        "2b": "google/gemma-2-2b",
        "2b-it": "google/gemma-2-2b-it",
        "9b": "google/gemma-2-9b",
        "9b-it": "google/gemma-2-9b-it",
        "27b": "google/gemma-2-27b",
        "27b-it": "google/gemma-2-27b-it",
    }
