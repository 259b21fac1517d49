"""A conversion that is killed goes on where it was, holds one shard in memory at a time, and refuses another's folder."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from megatron_sts.config.errors import ConfigError
from megatron_sts.convert import hf_to_sts, shards, sts_to_hf
from megatron_sts.convert.sources import open_source
from megatron_sts.runtime.stored import INDEX, StoredTensors
from tests import warm
from tests.convert import hf_models

SLOW_CONVERSION = """
import sys, time
from pathlib import Path
from megatron_sts.convert import hf_to_sts, shards, sts_to_hf
from megatron_sts.convert.sources import open_source
write = shards._write_shard
def slowly(*args):
    write(*args)
    time.sleep(0.3)
shards._write_shard = slowly
source, out = map(Path, sys.argv[2:])
if sys.argv[1] == "in":
    hf_to_sts.convert(hf_to_sts.whole(source), out, 100_000)
else:
    sts_to_hf.convert(open_source(source), out, 100_000)
"""


def kill_in_the_middle(direction: str, source: Path, out: Path) -> None:
    """Starts a conversion and kills it once it has written two shards."""
    command = [sys.executable, "-c", SLOW_CONVERSION, direction, str(source), str(out)]
    process = warm.Popen(command, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while len(finished(out)) < 2:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def finished(folder: Path) -> dict[str, int]:
    """Whole shards, with the times they were written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("model-*.safetensors")}


@pytest.mark.parametrize("direction", ["in", "out"])
def test_killed_conversions_go_on(direction: str, tmp_path: Path) -> None:
    hf = hf_models.write("llava", tmp_path / "hf")
    source, out = hf, tmp_path / "killed"
    if direction == "out":
        source = tmp_path / "sts"
        hf_to_sts.convert(hf_to_sts.whole(hf), source)
    kill_in_the_middle(direction, source, out)
    assert not (out / INDEX).exists()
    (out / shards.PARTIAL).write_bytes(b"half a shard")
    before = finished(out)

    def convert(to: Path) -> bool:
        if direction == "in":
            return hf_to_sts.convert(hf_to_sts.whole(source), to, 100_000)
        return sts_to_hf.convert(open_source(source), to, 100_000)

    assert convert(out) and not convert(out)
    assert finished(out).items() > before.items()  # the same files, untouched, and more
    convert(tmp_path / "whole")
    expected, found = (StoredTensors(folder) for folder in (tmp_path / "whole", out))
    assert expected.shapes == found.shapes
    assert all(torch.equal(expected.read(name), found.read(name)) for name in expected.shapes)
    assert not list(out.glob("*partial*"))


def test_another_source_does_not_go_on(tmp_path: Path) -> None:
    first, second = hf_models.write("llama", tmp_path / "1"), hf_models.write("qwen2", tmp_path / "2")
    hf_to_sts.convert(hf_to_sts.whole(first), tmp_path / "sts")
    with pytest.raises(ConfigError, match="begun with other weights"):
        hf_to_sts.convert(hf_to_sts.whole(second), tmp_path / "sts")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="neither empty nor begun"):
        hf_to_sts.convert(hf_to_sts.whole(first), tmp_path / "mine")


MEASURED = """
import re, sys, threading
from pathlib import Path
from megatron_sts.convert import architectures, hf_to_sts, sts_to_hf
from megatron_sts.convert.sources import open_source
architectures.import_transformers().AutoConfig
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
source, sts, back, shard_bytes = *map(Path, sys.argv[1:4]), int(sys.argv[4])
hf_to_sts.whole(source)
base, peak, done = anonymous(), 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.0005):
        peak = max(peak, anonymous())
threading.Thread(target=watch).start()
hf_to_sts.convert(hf_to_sts.whole(source), sts, shard_bytes)
sts_to_hf.convert(open_source(sts), back, shard_bytes)
done.set()
print("PEAK", peak - base)
"""


def test_one_shard_in_memory(tmp_path: Path) -> None:
    """120 MB in 4 MB shards, both ways, in at most the memory of a few shards.

    Counted is what the process itself allocates; files that it maps are the kernel's to drop. Sampled twice a millisecond.
    """
    config = hf_models.llama_config(
        hidden_size=512, intermediate_size=1024, num_hidden_layers=12, num_attention_heads=8, vocab_size=1024
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "hf", max_shard_size="4MB")
    size, shard_bytes = sum(path.stat().st_size for path in (tmp_path / "hf").glob("*.safetensors")), 4_000_000
    command = [sys.executable, "-W", "ignore", "-c", MEASURED, *map(str, (tmp_path / "hf", tmp_path / "sts", tmp_path / "back", shard_bytes))]  # fmt: skip
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    peak = int(re.search(r"PEAK (\d+)", output)[1])  # type: ignore[index]
    print(f"{size / 1e6:.0f} MB of weights, {peak / 1e6:.1f} MB peak")
    # A shard, the largest tensor with its parts (gate and up: 4 MB), and the heap's slack.
    assert size > 100e6 and peak < 4 * shard_bytes
