"""The way to the Hub. Tokens are left to huggingface_hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is the HTTP library's, passed on
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from ..errors import UserError

_PAPERS = ["NOTICE*", "LICEN?E*", "*TERMS*", "README.md"]
_WEIGHTS = ["*.safetensors"]
# What of an earlier version goes if this one has it not: weights under any number of parts, the index of such parts,
# which would be looked into first, and what those weights reached. In the repository's own folder, that is: an
# owner's other files stay.
_WEIGHTS_BEFORE = ["model.safetensors", "model-?????-of-?????.safetensors"]
_REST_BEFORE = ["model.safetensors.index.json", ".eval_results/*.yaml", "conversion.json", "sentinels.json"]
_AGAIN = "The same command goes on where this one stopped."
# How the Hub names a limit that is reached: no status of its own stands for it.
_LIMIT_WORDS = ("storage", "quota", "limit reached", "exceeded")
_LIMIT_STATUS = (402, 413, 507)
_METADATA = "Invalid metadata in README.md"  # a ValueError too, with the Hub's words
_BATCH = "lfs batch api"  # whose refusals come as a ValueError with the Hub's words


def upload(folder: Path, repository: str, *, public: bool) -> str:
    """Upload a folder, or go on with an upload that was interrupted: what is there already is not sent again.

    The terms go first, so that the weights are never there without them, and the config last, so that what can be
    loaded is whole. Weights of an earlier version that this one has not are deleted, and so is what was said of them.

    Args:
        public: whether a new repository is; one that exists has to be so already, or not.

    Returns:
        Its address.

    Raises:
        UserError: the token is refused, the repository is visible to others than was said, a limit is reached, or the
            connection is lost.
    """
    api = HfApi()
    with _told(repository):
        url = _repository(api, repository, public)
        for message, wanted, others, gone in (
            ("Add terms and model card", _PAPERS, None, None),
            ("Add weights", _WEIGHTS, None, _WEIGHTS_BEFORE),
            ("Add config, tokenizer and code", None, [*_PAPERS, *_WEIGHTS], _REST_BEFORE),
        ):
            api.upload_folder(
                repo_id=repository,
                folder_path=folder,
                commit_message=message,
                allow_patterns=wanted,
                ignore_patterns=others,
                delete_patterns=gone,
            )
    return url


def _repository(api: HfApi, name: str, public: bool) -> str:
    try:
        info = api.repo_info(name)
    except RepositoryNotFoundError:  # the answer to a refused token too, and then creating is refused
        return str(api.create_repo(name, private=not public, exist_ok=True))
    if bool(info.private) == public:
        seen, option = ("private", "leave --public out") if public else ("public", "give --public")
        raise UserError(f"{name} exists and is {seen}. Change that in its settings on the Hub, or {option}.")
    return f"{api.endpoint}/{name}"


@contextmanager
def _told(repository: str) -> Iterator[None]:
    """Tell in one line what a refusal means. The Hub's own messages may quote request headers, so they are dropped."""
    try:
        yield
    except HFValidationError as error:
        raise UserError(f"{repository!r} is not the name of a repository. Give OWNER/NAME.") from error
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        if (meaning := _meaning(repository, error)) is None:
            raise
        raise UserError(meaning) from error


def _meaning(repository: str, error: Exception) -> str | None:
    """What the Hub or the network did; None if the error is of another kind."""
    owner = repository.partition("/")[0]
    found = _cause(error, HfHubHTTPError)
    status = found.response.status_code if found is not None and found.response is not None else None
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so nothing is sent. Unset it."
    if _METADATA in str(error):
        why = " ".join(str(error).partition(_METADATA)[2].split()).lstrip(".- ")
        return f"The Hub refuses the card's metadata ({why}). Give --license, --language and --dataset as it has."
    said = str(getattr(found, "server_message", None) or error).lower()
    if status == 401:
        return (
            "The Hub refused the token, or there is none (HTTP status 401). Log in with one that may write to "
            f"{owner} (hf auth login, or the environment variable HF_TOKEN)."
        )
    if status in _LIMIT_STATUS or ((status == 403 or _BATCH in said) and any(word in said for word in _LIMIT_WORDS)):
        return f"The storage of {owner} on the Hub is full. Make room or choose another owner. {_AGAIN}"
    if status == 403:
        return f"This login may not write to {repository} (HTTP status 403). Give a repository or a token that fits."
    if status is not None:
        return f"The Hub refused {repository} (HTTP status {status}). {_AGAIN}"
    # hf_xet, which has connections of its own, raises a RuntimeError.
    cause = _cause(error, HTTPError, ConnectionError, TimeoutError)
    if cause is None and not isinstance(error, RuntimeError):
        return None
    return f"The connection to the Hub was lost ({type(cause or error).__name__}). Check the network. {_AGAIN}"


def _cause(error: BaseException, *kinds: type[BaseException]) -> Any:
    """The error of one of these kinds behind an error: huggingface_hub wraps what happens while files are sent."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, kinds):
        seen = seen.__cause__
    return seen
