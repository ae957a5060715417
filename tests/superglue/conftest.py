from __future__ import annotations

import pytest

from tests.superglue import parts


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    return parts.save_checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="session")
def learnable(tmp_path_factory):
    return parts.learnable(tmp_path_factory.mktemp("learnable"))
