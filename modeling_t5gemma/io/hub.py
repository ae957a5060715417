"""The Hub: how long it is waited for, what is fetched from it, and what its refusals mean. Tokens are left to
huggingface_hub."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import (
    HfApi,
    constants,
    get_session,
    is_offline_mode,
    set_client_factory,
    snapshot_download,
)
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is the HTTP library's, passed on
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    NotASafetensorsRepoError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..errors import UserError

# Seconds to wait for a connection and for the next byte of an answer; huggingface_hub waits for ever unless told.
WAIT = float(constants.HF_HUB_DOWNLOAD_TIMEOUT)
# What is sent may be worked on before there is an answer.
_WAIT_AFTER_SENDING = 12 * WAIT
# A body that comes in more slowly than so many bytes a second, over so many seconds of waiting, is given up.
_SLOWEST, _OVER = 256, 3 * WAIT
# httpx or its successor: the one that huggingface_hub uses.
_http: Any = import_module(HTTPError.__module__.partition(".")[0])
# How the Hub names a limit that is reached: no status of its own stands for it.
_LIMIT_WORDS = ("storage", "quota", "limit reached", "exceeded")
_LIMIT_STATUS = (402, 413, 507)
_METADATA = "Invalid metadata in README.md"  # a ValueError too, with the Hub's words
_BATCH = "lfs batch api"  # whose refusals come as a ValueError with the Hub's words
_AGAIN = "The same command goes on where this one stopped."
# Everything of a source that the converter reads. Pickles and code are not among it.
_WANTED = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "LICENSE*",
    "NOTICE*",
    "*TERMS*",
)


def download(repo: str, revision: str | None, *, weights: bool = True) -> tuple[Path, str]:
    """Fetch a repository into huggingface_hub's cache.

    Args:
        weights: whether the safetensors files are fetched too.

    Returns:
        The folder, and the commit it is of.

    Raises:
        UserError: no such repository or revision, no access, no network.
    """
    ignored = None if weights else ["*.safetensors"]
    with told(repo, revision):
        folder = Path(
            snapshot_download(
                repo,
                revision=revision,
                allow_patterns=list(_WANTED),
                ignore_patterns=ignored,
                # Told to be offline, huggingface_hub 1 still asks for the files of a commit.
                local_files_only=is_offline_mode(),
            )
        )
    return folder, folder.name


def describe(repo: str, revision: str | None) -> tuple[Path, dict[str, tuple[tuple[int, ...], str]]]:
    """Fetch a repository's small JSON files, and of its weights only what their headers say.

    Returns:
        The folder, and by name each tensor's shape and dtype as safetensors calls it ("BF16"); none without weights.

    Raises:
        UserError: as ``download``.
    """
    names = ["config.json", "generation_config.json", "conversion.json"]
    with told(repo, revision):
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=names))
        try:
            metadata = HfApi().get_safetensors_metadata(repo, revision=folder.name)
        except NotASafetensorsRepoError:
            return folder, {}
    tensors = (item for file in metadata.files_metadata.values() for item in file.tensors.items())
    return folder, {name: (tuple(info.shape), info.dtype) for name, info in tensors}


def tensor_table(repo: str, commit: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The dtype code and the shape of every tensor of a repository, from its headers alone.

    Raises:
        UserError: it has no safetensors files, no access, no network.
    """
    with told(repo, commit):
        found = HfApi().get_safetensors_metadata(repo, revision=commit)
    return {
        name: (info.dtype, tuple(info.shape))
        for file in found.files_metadata.values()
        for name, info in file.tensors.items()
    }


def tags(repo: str) -> list[str]:
    """What the Hub has a repository listed under, such as "license:mit".

    Raises:
        UserError: as ``download``.
    """
    with told(repo):
        return list(HfApi().model_info(repo).tags or [])


@cache
def limit_waits() -> None:
    """Have every request of huggingface_hub in this process, transformers' own too, give up on a Hub that does not
    answer, or answers a byte at a time."""
    plain: Any = get_session()
    hooks = {"request": [*plain.event_hooks["request"], _limit], "response": [_watch]}
    set_client_factory(lambda: type(plain)(event_hooks=hooks, follow_redirects=plain.follow_redirects))


@contextmanager
def told(repository: str, revision: str | None = None, *, sends: bool = False) -> Iterator[None]:
    """Around calls of huggingface_hub: tell in one line what a refusal means.

    The Hub's own messages may quote request headers, so they are dropped.

    Args:
        sends: whether the calls upload.

    Raises:
        UserError: for whatever is raised inside.
    """
    limit_waits()
    try:
        yield
    except UserError:
        raise
    # Of every kind: where the answer is not a Hub's, huggingface_hub fails in whatever reads it.
    except Exception as error:
        raise UserError(_meaning(repository, revision, error, sends)) from error


def _limit(request: Any) -> None:
    """Fill in the limits that a request was given as None; pool, which waits for requests beside it, stays so."""
    most = WAIT if request.method in ("GET", "HEAD") else _WAIT_AFTER_SENDING
    given = {name: limit for name, limit in request.extensions.get("timeout", {}).items() if limit is not None}
    request.extensions["timeout"] = {"connect": WAIT, "read": most, "write": most, **given}


def _watch(response: Any) -> None:
    response.stream = _Steady(response.stream)


class _Steady(_http.SyncByteStream):
    """A body that is given up when it only drips: each byte alone comes within the limits.

    Raises:
        TimeoutError: it does.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        chunks = iter(self._stream)
        waited = received = 0.0
        while True:
            before = time.monotonic()
            chunk = next(chunks, None)
            if chunk is None:
                return
            waited, received = waited + time.monotonic() - before, received + len(chunk)
            if waited > _OVER:
                if received < _SLOWEST * waited:
                    raise TimeoutError(f"{received:.0f} bytes in {waited:.0f} s")
                waited = received = 0.0
            yield chunk

    def close(self) -> None:
        self._stream.close()


def _meaning(repository: str, revision: str | None, error: Exception, sends: bool) -> str:
    """What the Hub, the network or the disk did."""
    again = f" {_AGAIN}" if sends else ""
    refusal = _cause(error, HfHubHTTPError)
    status = refusal.response.status_code if refusal is not None and refusal.response is not None else None
    place = urlsplit(constants.ENDPOINT).netloc.rpartition("@")[2]
    if isinstance(error, HFValidationError):
        return f"{repository!r} is not the name of a repository. Give OWNER/NAME."
    if isinstance(error, NotASafetensorsRepoError):
        return f"{repository} has no safetensors files. Give a repository that has."
    if _METADATA in str(error):
        why = " ".join(str(error).partition(_METADATA)[2].split()).lstrip(".- ")
        return f"The Hub refuses the card's metadata ({why}). Give --license, --language and --dataset as it has."
    said = str(getattr(refusal, "server_message", None) or error).lower()
    if status in _LIMIT_STATUS or ((status == 403 or _BATCH in said) and any(word in said for word in _LIMIT_WORDS)):
        owner = repository.partition("/")[0]
        return f"The storage of {owner} on the Hub is full. Make room or choose another owner.{again}"
    if status is not None:
        return _refusal(repository, revision, refusal, status, sends) + again
    if _cause(error, OfflineModeIsEnabled) or is_offline_mode():
        if sends:
            return "HF_HUB_OFFLINE is set, so nothing is sent. Unset it."
        return f"{repository} is not in the cache, and HF_HUB_OFFLINE is set. Unset it, or give a local folder."
    if _cause(error, TimeoutError, _http.TimeoutException):
        return (
            f"The Hub ({place}) did not answer within {WAIT:g} s, or only byte by byte. Check the network, or try "
            f"later.{again}"
        )
    # hf_xet, which has connections of its own, raises a RuntimeError.
    if lost := _cause(error, HTTPError, ConnectionError) or (sends and type(error) is RuntimeError and error):
        if sends:
            return f"The connection to the Hub was lost ({type(lost).__name__}). Check the network.{again}"
        return (
            f"{repository} is not in the cache and the Hub cannot be reached. Check the network, or give a local "
            "folder."
        )
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, LocalEntryNotFoundError):
        where = error.filename or constants.HF_HUB_CACHE
        return f"{where} cannot be read or written ({error.strerror}). Make room, or set HF_HOME to another folder."
    return (
        f"What answers at {place} is not the Hub ({type(error).__name__} in what it said of {repository}). Check the "
        f"network (a login page may stand before it) and HF_ENDPOINT.{again}"
    )


def _refusal(repository: str, revision: str | None, error: HfHubHTTPError, status: int, sends: bool) -> str:
    if isinstance(error, GatedRepoError):
        return (
            f"No access to the gated repository {repository}. Accept its terms at https://huggingface.co/{repository} "
            "and log in (hf auth login)."
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{repository} has no revision {revision!r}. Give a branch, tag or commit of it."
    if isinstance(error, RepositoryNotFoundError) and not sends:
        return (
            f"There is no repository {repository} on the Hub, or it is private and this login cannot see it. Check "
            "the name, or log in (hf auth login)."
        )
    if status == 401:
        may = f" with one that may write to {repository.partition('/')[0]}" if sends else ""
        return (
            f"The Hub refused the token, or there is none (HTTP status 401). Log in{may} (hf auth login, or the "
            "environment variable HF_TOKEN)."
        )
    if status == 403:
        may = "write to" if sends else "read"
        return f"This login may not {may} {repository} (HTTP status 403). Give a repository or a token that fits."
    if status == 429:
        return "The Hub has had too many requests from here (HTTP status 429). Wait some minutes."
    if status >= 500:
        return f"The Hub failed at {repository} (HTTP status {status}). Try later."
    return f"The Hub refused {repository} (HTTP status {status}). Check its name, and the login (hf auth login)."


def _cause(error: BaseException, *kinds: type[BaseException]) -> Any:
    """The error of one of these kinds behind an error: huggingface_hub wraps what happens while files are sent."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, kinds):
        seen = seen.__cause__
    return seen
