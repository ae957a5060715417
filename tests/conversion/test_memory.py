"""Anonymous memory stays within a few buffers, whatever the checkpoint's size (hazard 34)."""

from __future__ import annotations

import json
import multiprocessing
import struct
import threading
import time
from pathlib import Path

import pytest
from transformers import Gemma2Config

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["modeling_t5gemma.conversion.convert"])
LIMIT = 256 << 20


def sparse_checkpoint(folder: Path) -> int:
    """A Gemma 2 of 600 MB that takes no room on the disk: a header, and a hole for the data."""
    config = Gemma2Config(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=4
    )
    config.architectures = ["Gemma2ForCausalLM"]
    config.save_pretrained(folder)
    shapes = {"model.embed_tokens.weight": (256000, 1024), "model.norm.weight": (1024,)}
    for i in range(3):
        layer = f"model.layers.{i}."
        heads, kv_heads, ffn = (2048, 1024), (1024, 1024), (4096, 1024)
        for name, shape in (("q", heads), ("k", kv_heads), ("v", kv_heads), ("o", heads[::-1])):
            shapes[f"{layer}self_attn.{name}_proj.weight"] = shape
        for name, shape in (("gate", ffn), ("up", ffn), ("down", ffn[::-1])):
            shapes[f"{layer}mlp.{name}_proj.weight"] = shape
        for name in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            shapes[f"{layer}{name}_layernorm.weight"] = (1024,)
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    encoded = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + end)
    return end


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def measure(source: str, output: str, options: dict, peak) -> None:
    """Convert, with the peak of anonymous memory above that of the imported libraries."""
    from modeling_t5gemma.conversion.convert import carry_out, prepare
    from modeling_t5gemma.conversion.options import ConversionOptions

    before, done = anonymous_bytes(), threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak.value = max(peak.value, anonymous_bytes() - before)
            time.sleep(0.002)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    carry_out(prepare(ConversionOptions(source, source, Path(output), share_embeddings=True, **options)))
    done.set()
    watcher.join()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("options", [{}, {"dtype": "float16", "encoder_kv": "mha", "cross_attention": "random"}])
def test_anonymous_memory(options, tmp_path):
    (tmp_path / "source").mkdir()
    assert sparse_checkpoint(tmp_path / "source") > 600e6
    peak = SERVER.Value("q", 0)
    arguments = (str(tmp_path / "source"), str(tmp_path / "output"), options, peak)
    process = SERVER.Process(target=measure, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 0
    assert 0 < peak.value < LIMIT
    print(f"{peak.value / 2**20:.0f} MiB")
    (tmp_path / "output" / "model.safetensors").unlink()
