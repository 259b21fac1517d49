#!/usr/bin/env bash
# Finding: in Energon's blend_epochized, `repetitions` are rounded down to whole samples on every reader.
# Versions: megatron-energon 7.4.1, torch 2.14.1.
# Behaviour: of 20 samples with repetitions 0.5 one reader gives 10, but four give 2 each: what is trained on depends on the number of
#   workers. With 0.04 (0.8 of a sample) the dataset is never read, by any number of workers, without a word.
# Output: repetitions 0.5, 0 workers: 10 samples
#   repetitions 0.5, 4 workers: 8 samples
#   repetitions 0.04, 0 workers: 0 samples
# What to do: check samples / readers x repetitions yourself before training.
set -euo pipefail
work=$(mktemp -d)
# shellcheck source=findings/venv.bash
. "$(dirname "${BASH_SOURCE[0]}")/venv.bash" torch==2.14.1 megatron-energon==7.4.1
cat > finding.py <<'EOF'
import io, json, subprocess, tarfile
from collections import Counter
from pathlib import Path

from megatron.energon import (
    Cooker, DefaultTaskEncoder, Sample, WorkerConfig, basic_sample_keys, edataclass, get_loader, get_train_dataset, stateless,
)


@edataclass
class Named(Sample):
    name: str


@stateless
def cook(sample):
    return Named(**basic_sample_keys(sample), name=sample["json"]["name"])


class Encoder(DefaultTaskEncoder[Named, Named, Named, Named]):
    cookers = [Cooker(cook)]


def write(folder):
    folder.mkdir()
    with tarfile.open(folder / "shard-000.tar", "w") as tar:
        for number in range(20):
            content = json.dumps({"name": folder.name}).encode()
            info = tarfile.TarInfo(f"{number:03d}.json")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    words = ["--non-interactive", "--split-parts", "train:shard-000.tar", "--sample-type", "CrudeWebdataset"]
    subprocess.run(["energon", "prepare", str(folder), *words], check=True, capture_output=True)


def read(repetitions, num_workers):
    Path("blend.yaml").write_text(
        "__module__: megatron.energon\n__class__: MetadatasetV2\nsplits:\n  train:\n    blend_epochized:\n"
        f"      - {{path: first, repetitions: 1}}\n      - {{path: second, repetitions: {repetitions}}}\n"
    )
    workers = WorkerConfig(rank=0, world_size=1, num_workers=num_workers)
    dataset = get_train_dataset(
        "blend.yaml", worker_config=workers, batch_size=1, shuffle_buffer_size=None, max_samples_per_sequence=None,
        repeat=False, task_encoder=Encoder(),
    )
    count = Counter(batch.name[0] for batch in get_loader(dataset))
    print(f"repetitions {repetitions}, {num_workers} workers: {count['second']} samples")
    return count["first"], count["second"]


if __name__ == "__main__":
    write(Path("first"))
    write(Path("second"))
    found = [read(0.5, 0), read(0.5, 4), read(0.04, 0)]
    assert found == [(20, 10), (20, 8), (20, 0)], f"behaves otherwise now: {found}"
EOF
python finding.py
