"""Whose terms hold, and that nothing derived from Gemma goes out without them."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import pytest

from modeling_t5gemma.conversion.families.gemma import GEMMA_TERMS
from modeling_t5gemma.errors import UserError
from modeling_t5gemma.publishing.lineage import trace
from modeling_t5gemma.publishing.papers import write_papers
from modeling_t5gemma.publishing.settings import Publication
from tests.publishing.conftest import TERMS, write_run
from tests.publishing.hub import Hub, Stored


def converted(folder: Path, source: str, family: str = "gemma2") -> Path:
    folder.mkdir()
    sides = {side: {"source": source, "family": family} for side in ("encoder", "decoder")}
    (folder / "conversion.json").write_text(json.dumps(sides))
    return folder


def publication(folder: Path, **settings: object) -> Publication:
    return Publication(folder, "owner/name", **settings)


def decoder_only(folder: Path, model_type: str) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def test_the_records_lead_from_a_runs_checkpoint_to_the_models_on_the_hub(tmp_path):
    base = converted(tmp_path / "base", "google/gemma-2-2b")
    first = write_run(tmp_path / "first", str(base))
    second = write_run(tmp_path / "second", str(first), teacher="google/gemma-2-9b")
    checkpoint = second / "checkpoint-10"
    checkpoint.mkdir()
    found = trace(publication(checkpoint))
    assert (found.bases, found.teachers, found.legal) == (["google/gemma-2-2b"], ["google/gemma-2-9b"], GEMMA_TERMS)
    assert found.runs == [second, first] and found.folders[0] == checkpoint and base in found.folders


@pytest.mark.parametrize("how", ["hub", "local", "cache", "option"])
def test_a_student_of_a_gemma_teacher_is_a_derivative(tmp_path, how):
    """The base is none of Gemma's; the teacher alone brings the terms."""
    model: dict[str, str] = {}
    if how == "cache":
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache" / "teacher.json").write_text(json.dumps({"teacher": "google/gemma-3-1b-pt"}))
        model = {"teacher_cache": str(tmp_path / "cache")}
    # A local teacher whose name says nothing is known by its config.
    teacher = {"hub": "google/gemma-2-2b", "local": str(decoder_only(tmp_path / "big", "gemma3_text"))}.get(how)
    run = write_run(tmp_path / "run", "owner/from-scratch-encoder-decoder", teacher, **model)
    settings = {"teachers": ("google/gemma-2-9b",)} if how == "option" else {}
    assert trace(publication(run, **settings)).legal == GEMMA_TERMS


def test_paths_of_a_run_are_found_from_any_folder(tmp_path, monkeypatch):
    """They are as they were typed: elsewhere "models/big" would be a repository, and a teacher's terms be lost."""
    converted(tmp_path / "base", "owner/other", family="other")
    decoder_only(tmp_path / "big", "gemma3_text")
    (tmp_path / "runs").mkdir()
    run = write_run(tmp_path / "runs" / "first", "models/base", "models/big")
    (tmp_path / "models").mkdir()
    for name in ("base", "big"):
        (tmp_path / name).rename(tmp_path / "models" / name)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = trace(publication(run))
    assert (found.bases, found.teachers, found.legal) == (["owner/other"], ["big"], GEMMA_TERMS)


def test_what_has_nothing_of_gemma_needs_no_terms(tmp_path):
    other = str(decoder_only(tmp_path / "smol", "llama"))
    found = trace(publication(write_run(tmp_path / "run", "owner/other", other)))
    assert found.legal is None and found.teachers == ["smol"]
    folder = tmp_path / "out"
    folder.mkdir()
    assert write_papers(folder, found, None) is None and list(folder.iterdir()) == []


@pytest.mark.loopback
def test_the_hub_tells_whose_terms_hold_where_a_name_does_not(tmp_path, monkeypatch):
    hub = Hub()
    hub.repositories |= {"me/summarizer": Stored(False, tags=["license:gemma"]), "me/free": Stored(False)}
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
    run = write_run(tmp_path / "run", "me/summarizer")
    student = write_run(tmp_path / "student", "me/free", "me/summarizer")
    free = write_run(tmp_path / "free", "me/free", "me/unknown")
    found = [trace(publication(folder)).legal for folder in (run, student, free)]
    hub.shutdown()
    assert found == [GEMMA_TERMS, GEMMA_TERMS, None]


def test_records_and_notices_that_cannot_be_read(tmp_path):
    folder = converted(tmp_path / "base", "google/gemma-2-2b")
    (folder / "LICENSES").mkdir()
    (folder / "NOTICE.d").mkdir()
    (folder / "TERMS.md").write_text(TERMS)
    found = trace(publication(folder))
    (tmp_path / "out").mkdir()
    write_papers(tmp_path / "out", found, None)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"NOTICE", GEMMA_TERMS.terms_file}
    (folder / "NOTICE").write_bytes(b"\xff\xfeN\x00")
    with pytest.raises(UserError, match=r"NOTICE has to be passed on and cannot be read"):
        trace(publication(folder))
    (folder / "conversion.json").write_text("{}")
    (folder / "NOTICE").unlink()
    with pytest.raises(UserError, match=r"conversion\.json does not say what the encoder"):
        trace(publication(folder))


@pytest.mark.parametrize(
    ("base", "teacher", "settings", "pattern"),
    [
        ("/gone/model", None, {}, r"end at model.*--base OWNER/NAME"),
        ("owner/other", "/gone/teacher", {}, r"teacher /gone/teacher is no longer there.*--teacher"),
        ("owner/other", None, {"from_scratch": True}, r"not from scratch: its records name owner/other"),
    ],
)
def test_an_unknown_origin_is_refused(tmp_path, base, teacher, settings, pattern):
    with pytest.raises(UserError, match=pattern):
        trace(publication(write_run(tmp_path / "run", base, teacher), **settings))


def test_a_folder_without_records_needs_a_base_or_a_word(tmp_path):
    folder = decoder_only(tmp_path / "model", "t5gemma")
    with pytest.raises(UserError, match=r"end at model.*--from-scratch"):
        trace(publication(folder))
    assert trace(publication(folder, from_scratch=True)).bases == []
    # A notice that lies beside it counts, whatever the user says of its base.
    (folder / "NOTICE").write_text(GEMMA_TERMS.notice)
    assert trace(publication(folder, bases=("owner/other",))).legal == GEMMA_TERMS


def test_terms_are_found_or_given_or_it_is_refused(tmp_path, terms):
    base = converted(tmp_path / "base", "google/gemma-2-2b")
    placeholder = f"The terms are at {GEMMA_TERMS.terms_url} and were not among the source's files."
    (base / GEMMA_TERMS.terms_file).write_text(placeholder)
    (base / "NOTICE").write_text(f"{GEMMA_TERMS.notice}\n\nAnother notice.\n")
    found = trace(publication(write_run(tmp_path / "run", str(base), "google/gemma-2-9b")))
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(UserError, match=r"derivative of Gemma .*google/gemma-2-2b.*ai\.google\.dev.*--terms FILE"):
        write_papers(out, found, None)
    with pytest.raises(UserError, match="is no copy of the Gemma terms"):
        write_papers(out, found, base / GEMMA_TERMS.terms_file)
    (tmp_path / "run" / "TERMS.md").write_text(TERMS)
    for given in (None, terms):
        assert write_papers(out, found, given) == GEMMA_TERMS.terms_file
        assert (out / GEMMA_TERMS.terms_file).read_text() == TERMS
    notice = (out / "NOTICE").read_text().strip().split("\n\n")
    assert notice[0] == GEMMA_TERMS.notice and notice.count(GEMMA_TERMS.notice) == 1
    assert "were modified" in notice[1] and "the output of google/gemma-2-9b" in notice[2]
    assert notice[-1] == "Another notice."


@pytest.mark.parametrize(
    "settings",
    [
        {"repository": "name"},
        {"repository": "owner/two--dashes"},
        {"repository": f"owner/{'x' * 97}"},
        {"checkpoint": Path("nowhere")},
        {"datasets": ("a b",)},
        {"teachers": ("",)},
        {"bases": ("../x/y",)},
        {"languages": ("English",)},
        {"from_scratch": True, "bases": ("a/b",)},
    ],
)
def test_settings_that_cannot_be(tmp_path, settings):
    with pytest.raises(UserError):
        Publication(**{"checkpoint": tmp_path, "repository": "owner/name", **settings})
