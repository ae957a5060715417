"""The converter's memory and speed on a synthetic Gemma 2 checkpoint, beside cp of the same number of bytes.

    python benchmarks/convert.py --gigabytes 5 --repeats 3 --folder /where/there/is/room

Memory is anonymous memory (RssAnon) above that of the imported libraries: pages of mapped files are not counted,
because the system drops them when it needs room. cp copies the source twice, as the converter does, which makes two
stacks of it; they take turns, and medians are given. The converter has its bytes on the disk when it ends, so cp is
timed until then as well.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from modeling_t5gemma.conversion.convert import carry_out, prepare
from modeling_t5gemma.conversion.options import ConversionOptions
from modeling_t5gemma.efficiency.memory import in_own_process, peak_bytes

WIDTH, FFN, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 2304, 9216, 8, 4, 256, 256000


def write_checkpoint(folder: Path, gigabytes: float) -> int:
    """A Gemma 2 2B in bfloat16 with as many layers as are needed; the bytes of its tensors."""
    from transformers import Gemma2Config

    layer = {
        "self_attn.q_proj": (HEADS * HEAD_DIM, WIDTH),
        "self_attn.k_proj": (KV_HEADS * HEAD_DIM, WIDTH),
        "self_attn.v_proj": (KV_HEADS * HEAD_DIM, WIDTH),
        "self_attn.o_proj": (WIDTH, HEADS * HEAD_DIM),
        "mlp.gate_proj": (FFN, WIDTH),
        "mlp.up_proj": (FFN, WIDTH),
        "mlp.down_proj": (WIDTH, FFN),
        "input_layernorm": (WIDTH,),
        "post_attention_layernorm": (WIDTH,),
        "pre_feedforward_layernorm": (WIDTH,),
        "post_feedforward_layernorm": (WIDTH,),
    }
    sizes = {name: 2 * shape[0] * (shape[1] if len(shape) > 1 else 1) for name, shape in layer.items()}
    layers = max(1, round((gigabytes * 1e9 - 2 * VOCABULARY * WIDTH) / sum(sizes.values())))
    config = Gemma2Config(num_hidden_layers=layers, architectures=["Gemma2ForCausalLM"])
    config.save_pretrained(folder)
    shapes = {"model.embed_tokens.weight": (VOCABULARY, WIDTH), "model.norm.weight": (WIDTH,)}
    shapes |= {f"model.layers.{i}.{name}.weight": shape for i in range(layers) for name, shape in layer.items()}
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    block = os.urandom(64 << 20)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for start in range(0, end, len(block)):
            file.write(block[: end - start])
        os.fsync(file.fileno())
    return end


def timed_convert(source: Path, output: Path, options: dict[str, str]) -> tuple[float, int, int]:
    """Seconds, the peak of anonymous bytes above the imports, and bytes written, in a process of its own."""
    result = in_own_process(convert, source, output, options)
    shutil.rmtree(output)
    return result


def convert(source: Path, output: Path, options: dict[str, str]) -> tuple[float, int, int]:
    took, written = [], []

    def work() -> None:
        begin = time.perf_counter()
        prepared = prepare(ConversionOptions(str(source), str(source), output, **options))
        carry_out(prepared)
        took.append(time.perf_counter() - begin)
        written.append(prepared.plan.nbytes)

    peak = peak_bytes(work)
    return took[0], peak, written[0]


def timed_cp(source: Path, output: Path) -> tuple[float, float]:
    """Seconds of copying the source twice with cp, and until both copies are on the disk."""
    output.mkdir()
    copies = [output / "first", output / "second"]
    start = time.perf_counter()
    for copy in copies:
        subprocess.run(["cp", str(source / "model.safetensors"), str(copy)], check=True)
    copied = time.perf_counter() - start
    for copy in copies:
        with copy.open("rb") as file:
            os.fsync(file.fileno())
    synced = time.perf_counter() - start
    shutil.rmtree(output)
    return copied, synced


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=5.0, help="size of the source")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where to work; about 4 times the size is needed")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="benchmark-convert-") as name:
        folder = Path(name)
        (folder / "source").mkdir()
        size = write_checkpoint(folder / "source", arguments.gigabytes)
        print(f"source: {size / 1e9:.2f} GB of bfloat16, one file", flush=True)
        cases = {"layerwise (all copied)": {"cross_attention": "layerwise"}, "copy": {"cross_attention": "copy"}}
        cases["to float16, cross-attention drawn"] = {"dtype": "float16", "cross_attention": "random"}
        rates: dict[str, list[float]] = {"cp": [], "cp until on disk": [], **{case: [] for case in cases}}
        peaks: dict[str, list[int]] = {case: [] for case in cases}
        for _ in range(arguments.repeats):
            for case, options in cases.items():
                copied, synced = timed_cp(folder / "source", folder / "copy")
                rates["cp"].append(2 * size / copied)
                rates["cp until on disk"].append(2 * size / synced)
                seconds, peak, written = timed_convert(folder / "source", folder / "output", options)
                rates[case].append(written / seconds)
                peaks[case].append(peak)
        durable = statistics.median(rates["cp until on disk"])
        print(f"{'':36}{'MB/s':>8}{'of cp until on disk':>22}{'peak MiB':>10}")
        for case, values in rates.items():
            rate = statistics.median(values)
            peak_text = f"{max(peaks[case]) / 2**20:.0f}" if case in peaks else ""
            print(f"{case:36}{rate / 1e6:8.0f}{rate / durable:22.2f}{peak_text:>10}")


if __name__ == "__main__":
    main()
