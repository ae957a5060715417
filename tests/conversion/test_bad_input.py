"""What a user can get wrong: one line that names the file and the remedy, exit code 2, nothing left behind."""

from __future__ import annotations

import json
import re
import runpy
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling_t5gemma import cli
from modeling_t5gemma.io.safetensors_files import INDEX_FILE
from tests.conversion.tiny import VOCABULARY, save_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """``refused(pattern, enc, dec=None, *options)``: the command's one line on standard error, after all checks."""

    def run(
        pattern: str, enc: Path | str, dec: Path | str | None = None, *options: str, output: str = "output"
    ) -> str:
        before = sorted(path.name for path in tmp_path.iterdir())
        arguments = ["--enc", str(enc), "--dec", str(dec or enc), "--output", str(tmp_path / output), *options]
        monkeypatch.setattr(sys, "argv", ["t5gemma", "convert", "--quiet", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        printed = capsys.readouterr()
        assert exit_.value.code == 2
        assert not printed.out
        assert re.fullmatch(r"error: [^\n]+\n", printed.err), printed.err
        assert re.search(pattern, printed.err), printed.err
        assert sorted(path.name for path in tmp_path.iterdir()) == before
        return printed.err

    return run


@pytest.fixture
def shards(sources, tmp_path) -> Path:
    """A source of several shards, to be spoilt."""
    from transformers import Gemma2ForCausalLM

    Gemma2ForCausalLM.from_pretrained(sources("gemma2")).save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    return tmp_path / "shards"


class TestFiles:
    def test_missing_shard(self, shards, refused):
        missing = sorted(shards.glob("*.safetensors"))[1]
        missing.unlink()
        assert str(missing) in refused("is missing. Download", shards)

    @pytest.mark.parametrize("length", [3, 100, 20_000])
    def test_truncated_shard(self, length, shards, refused):
        shard = sorted(shards.glob("*.safetensors"))[0]
        shard.write_bytes(shard.read_bytes()[:length])
        assert str(shard) in refused("cut short.*Download it again", shards)

    @pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/hostname", "sub/inside.safetensors", "..\\x", 7])
    def test_index_naming_a_file_outside_its_folder(self, name, shards, refused):
        index = json.loads((shards / INDEX_FILE).read_text())
        index["weight_map"]["model.norm.weight"] = name
        (shards / INDEX_FILE).write_text(json.dumps(index))
        assert INDEX_FILE in refused("no file of its own folder", shards)

    @pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {}}'])
    def test_index_that_is_none(self, text, shards, refused):
        (shards / INDEX_FILE).write_text(text)
        refused(f"{INDEX_FILE}.*(JSON|weight_map)", shards)

    def test_index_and_shard_disagree(self, shards, refused):
        index = json.loads((shards / INDEX_FILE).read_text())
        del index["weight_map"]["model.norm.weight"]
        (shards / INDEX_FILE).write_text(json.dumps(index))
        refused("disagree about model.norm.weight", shards)

    @pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.float8_e4m3fn, torch.bool])
    def test_dtypes_that_are_no_weights(self, dtype, sources, copy_of, refused):
        source = copy_of(sources("gemma2"))
        tensors = load_file(source / "model.safetensors")
        tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].to(dtype)
        save_file(tensors, source / "model.safetensors")
        refused(r"up_proj\.weight as (I8|F64|F8_E4M3|BOOL); only F32, BF16, F16.*unquantised", source)

    def test_header_of_a_petabyte(self, sources, copy_of, refused):
        source = copy_of(sources("gemma2"))
        (source / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 50) + b"{}")
        refused("damaged or cut short", source)

    def test_pickle(self, sources, copy_of, refused):
        source = copy_of(sources("gemma2"))
        (source / "model.safetensors").rename(source / "pytorch_model.bin")
        refused(r"pytorch_model\.bin is a pickle.*safetensors", source)

    def test_no_weights(self, sources, copy_of, refused):
        source = copy_of(sources("gemma2"))
        (source / "model.safetensors").unlink()
        refused("neither model.safetensors nor", source)

    def test_no_config(self, sources, copy_of, refused):
        source = copy_of(sources("gemma2"))
        (source / "config.json").unlink()
        refused(r"config\.json is missing", source)

    def test_a_file_that_is_no_gguf(self, tmp_path, refused):
        (tmp_path / "model.gguf").write_bytes(b"GGML" + bytes(100))
        refused(r"model\.gguf is not a GGUF file", tmp_path / "model.gguf")

    def test_a_file_of_another_kind(self, tmp_path, refused):
        (tmp_path / "model.safetensors").write_bytes(b"")
        refused("neither a folder nor a .gguf file", tmp_path / "model.safetensors")


class TestConfigs:
    def change(self, source: Path, **fields) -> Path:
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps({**config, **fields}))
        return source

    def test_unknown_architecture_lists_what_is_supported(self, sources, copy_of, refused):
        source = self.change(copy_of(sources("gemma2")), architectures=["MambaForCausalLM"])
        line = refused("config.json describes MambaForCausalLM", source)
        for architecture in ("GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM"):
            assert architecture in line

    def test_a_converted_checkpoint_is_no_source(self, sources, convert, refused):
        refused("describes T5GemmaForConditionalGeneration", convert(sources("gemma2")))

    @pytest.mark.parametrize("fields", [{"hidden_size": "wide"}, {"rms_norm_eps": [1]}, {"layer_types": ["odd"] * 4}])
    def test_fields_that_make_no_sense(self, fields, sources, copy_of, refused):
        line = refused(r"config\.json (says|cannot be loaded)", self.change(copy_of(sources("gemma2")), **fields))
        assert next(iter(fields)) in line

    @pytest.mark.parametrize(
        ("field", "value"),
        [("partial_rotary_factor", 0.5), ("residual_multiplier", 0.2), ("hidden_activation", "odd")],
    )
    def test_fields_that_would_be_ignored(self, field, value, sources, copy_of, refused):
        refused(f"{field} |{value}", self.change(copy_of(sources("gemma2")), **{field: value}))

    def test_quantised(self, sources, copy_of, refused):
        source = self.change(copy_of(sources("gemma2")), quantization_config={"quant_method": "bitsandbytes"})
        refused("quantised weights", source)

    def test_code_in_the_source_is_never_run(self, sources, copy_of, refused):
        """Whoever wrote it may compute something else than the built-in class of that name."""
        source = self.change(
            copy_of(sources("gemma2")), auto_map={"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
        )
        refused("config.json asks for code of its own.*evil.Config.*never run", source)

    def test_tokenizer_with_code_of_its_own(self, sources, copy_of, refused):
        source = copy_of(sources("gemma2"))
        (source / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil.T", None]}}))
        refused("code of its own.*never run", source)


class TestPairs:
    def test_tokenizers_that_differ(self, sources, copy_of, refused):
        other = copy_of(sources("gemma2", seed=1))
        save_tokenizer(other, VOCABULARY[:7] + VOCABULARY[7:][::-1])
        refused("tokenizers of .* differ", sources("gemma2"), other)

    def test_the_same_tokenizer_in_another_spelling_is_no_difference(self, sources, copy_of, convert):
        other = copy_of(sources("gemma2", seed=1))
        tokenizer = json.loads((other / "tokenizer.json").read_text())
        (other / "tokenizer.json").write_text(json.dumps(tokenizer, indent=7))
        convert(sources("gemma2"), other)


class TestNames:
    def test_no_such_thing(self, refused):
        refused("no file or folder here, and neither an alias .2b, 2b-it, 9b", "./nowhere")

    def test_missing_gguf(self, refused):
        refused("no file or folder here", "owner/model.gguf")

    def test_revision_of_a_folder(self, sources, refused):
        refused("--revision is for Hub repositories", sources("gemma2"), None, "--revision", "main")


class TestOutput:
    @pytest.mark.parametrize("kind", ["folder", "file"])
    def test_exists(self, kind, sources, tmp_path, refused):
        (tmp_path / "output").mkdir() if kind == "folder" else (tmp_path / "output").touch()
        refused("output exists.*--overwrite", sources("gemma2"))

    def test_overwrite_leaves_what_is_no_checkpoint(self, sources, tmp_path, refused):
        (tmp_path / "output").mkdir()
        (tmp_path / "output" / "thesis.tex").touch()
        refused("not a checkpoint.*Remove it yourself", sources("gemma2"), None, "--overwrite")
        assert (tmp_path / "output" / "thesis.tex").exists()

    def test_the_sources_own_folder(self, sources, copy_of, refused):
        source = copy_of(sources("gemma2"), "output")
        refused("is or holds .*output, which would be lost", source, None, "--overwrite")
        assert (source / "model.safetensors").exists()

    def test_a_place_that_cannot_be(self, sources, tmp_path, refused):
        (tmp_path / "file").touch()
        refused("cannot be written", sources("gemma2"), output="file/output")

    def test_too_small_a_disk(self, sources, monkeypatch, refused):
        import shutil

        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 1000))
        refused("No room for .*0.0 GB are free", sources("gemma2"))


@pytest.mark.parametrize(
    ("name", "family"), [("from_gemma1", "gemma"), ("from_gemma2", "gemma2"), ("from_gemma3", "gemma3")]
)
def test_the_script_of_each_family(name, family, sources, tmp_path, monkeypatch, capsys):
    arguments = ["--enc", sources(family), "--dec", sources(family), "--output", tmp_path / "output", "--dry-run"]
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(ROOT / "convert" / f"{name}.py"), run_name="__main__")
    assert not exit_.value.code
    printed = capsys.readouterr().out
    assert "encoder" in printed and "cross-attention" in printed and "copied" in printed
    assert not list(tmp_path.iterdir())


def test_a_script_runs_from_a_clone(tmp_path):
    """From another folder, with nothing but the script's path."""
    command = [sys.executable, "-I", ROOT / "convert" / "from_gemma2.py", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0 and "--cross-attention" in done.stdout, done.stderr
