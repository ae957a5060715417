"""The Hub, as far as the converter needs it: fetch a source, publish a result. Tokens are left to huggingface_hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, is_offline_mode, snapshot_download
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is the HTTP library's, passed on
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    NotASafetensorsRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from modeling_t5gemma.errors import UserError

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
    with _explained(repo, revision):
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
    with _explained(repo, revision):
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
    with _explained(repo, commit):
        found = HfApi().get_safetensors_metadata(repo, revision=commit)
    return {
        name: (info.dtype, tuple(info.shape))
        for file in found.files_metadata.values()
        for name, info in file.tensors.items()
    }


def push(folder: Path, repo: str) -> str:
    """Upload a converted checkpoint to a private repository, made if need be.

    Returns:
        Its address.

    Raises:
        UserError: no access, no network.
    """
    api = HfApi()
    with _explained(repo, None):
        created = api.create_repo(repo, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=created.repo_id, folder_path=folder, commit_message="Add a converted encoder-decoder"
        )
    return str(created)


@contextmanager
def _explained(repo: str, revision: str | None) -> Iterator[None]:
    """Tell in one line what a refusal means. The Hub's own messages may quote request headers, so they are dropped."""
    try:
        yield
    except GatedRepoError as error:
        raise UserError(
            f"No access to the gated repository {repo}. Accept its terms at https://huggingface.co/{repo} and log in "
            "(hf auth login)."
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"{repo} has no revision {revision!r}. Give a branch, tag or commit of it.") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"There is no repository {repo} on the Hub, or it is private and this login cannot see it. Check the "
            "name, or log in (hf auth login)."
        ) from error
    except NotASafetensorsRepoError as error:
        raise UserError(f"{repo} has no safetensors files. Give a repository that has.") from error
    except HFValidationError as error:
        raise UserError(f"{repo!r} is not the name of a repository. Give OWNER/NAME.") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no answer"
        raise UserError(f"The Hub refused {repo} (HTTP status {status}). Check the login, or try later.") from error
    except (LocalEntryNotFoundError, ConnectionError, HTTPError) as error:
        raise UserError(
            f"{repo} is not in the cache and the Hub cannot be reached. Check the network, or give a local folder."
        ) from error
