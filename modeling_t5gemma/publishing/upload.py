"""The way to the Hub. Tokens are left to huggingface_hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError

from ..errors import UserError
from ..io.hub import told
from .repository import prepared
from .settings import Publication

_PAPERS = ["NOTICE*", "LICEN?E*", "*TERMS*", "README.md"]
_WEIGHTS = ["*.safetensors"]
# What of an earlier version goes if this one has it not: weights under any number of parts, the index of such parts,
# which would be looked into first, and what those weights reached. In the repository's own folder, that is: an
# owner's other files stay.
_WEIGHTS_BEFORE = ["model.safetensors", "model-?????-of-?????.safetensors"]
_REST_BEFORE = ["model.safetensors.index.json", ".eval_results/*.yaml", "conversion.json", "sentinels.json"]


def publish_checkpoint(given: Publication) -> str:
    """Check a checkpoint, put its repository together and upload it.

    Returns:
        Its address.

    Raises:
        UserError: as ``prepared`` and ``upload``.
    """
    with prepared(given) as ready:
        return upload(ready.folder, given.repository, public=given.public)


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
    with told(repository, sends=True):
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
