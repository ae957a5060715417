"""What every test gets: no network but loopback, a Hub cache of its own, one seed, one thread."""

from __future__ import annotations

import gc
import importlib.util
import ipaddress
import os
import random
import socket
import sys
import tempfile

import pytest

# Set before anything imports transformers, huggingface_hub or torch, which read these once; subprocesses inherit them.
# The user's own cache and token stay out of reach.
for _name in [name for name in os.environ if name.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))]:
    del os.environ[_name]
_HF_HOME = tempfile.TemporaryDirectory(prefix="hf-home-")  # removed when the process ends
os.environ["HF_HOME"] = _HF_HOME.name
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# The models here are tiny: on cores that others use as well, a second thread made the suite several times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import huggingface_hub.constants  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

import tests.warm  # noqa: E402, F401  # the server starts with the session

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")


def _reason_to_skip(item: pytest.Item) -> str | None:
    if item.get_closest_marker("slow") and not item.config.getoption("--slow"):
        return "slow: runs with --slow"
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        return "needs a CUDA GPU"
    modules = [module for marker in item.iter_markers("needs") for module in marker.args]
    if missing := [module for module in modules if importlib.util.find_spec(module) is None]:
        return f"needs {', '.join(missing)}, which is not installed"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if reason := _reason_to_skip(item):
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish() -> None:
    """What is imported by now stays: trainers collect garbage, which looked through all of it, a second each time."""
    gc.freeze()


def _is_loopback(host: str | bytes | None) -> bool:
    if host is None:
        return True
    host = host.decode() if isinstance(host, bytes) else host
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@pytest.fixture(autouse=True, scope="session")
def _loopback_only():
    """A connection or a look-up that leaves this machine is an error; not an OSError, which would be retried."""
    connect, connect_ex, getaddrinfo = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def check(host: str | bytes | None) -> None:
        if not _is_loopback(host):
            raise RuntimeError(f"tests reach this machine only, not {host!r}")

    def checked(method):
        def call(self: socket.socket, address):
            if self.family in (socket.AF_INET, socket.AF_INET6):
                check(address[0])
            return method(self, address)

        return call

    def checked_getaddrinfo(host, *args, **kwargs):
        check(host)
        return getaddrinfo(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", checked(connect))
        patch.setattr(socket.socket, "connect_ex", checked(connect_ex))
        patch.setattr(socket, "getaddrinfo", checked_getaddrinfo)
        yield


@pytest.fixture(autouse=True)
def _online_for_loopback(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("loopback"):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")


@pytest.fixture(autouse=True)
def _no_curves(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes a second a run, and is tested where ``curves`` says so."""
    curves = sys.modules.get("modeling_t5gemma.training.curves")
    if curves is not None and not request.node.get_closest_marker("curves"):
        monkeypatch.setattr(curves, "draw", lambda *_: None)


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
