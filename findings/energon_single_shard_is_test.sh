#!/usr/bin/env bash
# Finding: `energon prepare --split-ratio 8,1,1` of a dataset with one shard leaves nothing to train on.
# Versions: megatron-energon 7.4.1, torch 2.14.1.
# Behaviour: the ratio deals out whole shards, rounding down for train and val, so that the only one goes to the test split; with four,
#   val has none. The command ends with status 0 and says nothing of it: the first training run finds a dataset without samples.
# Output: 1 shards: status 0, train: none, val: none, test: shard-000.tar
#   4 shards: status 0, train: shard-{000..002}.tar, val: none, test: shard-003.tar
#   10 shards: status 0, train: shard-{000..007}.tar, val: shard-008.tar, test: shard-009.tar
# What to do: --split-parts 'train:.*', or at least as many shards as the ratio's sum.
set -euo pipefail
work=$(mktemp -d)
# shellcheck source=findings/venv.bash
. "$(dirname "${BASH_SOURCE[0]}")/venv.bash" torch==2.14.1 megatron-energon==7.4.1
cat > finding.py <<'EOF'
import io, json, subprocess, tarfile
from pathlib import Path

import yaml


def split(num_shards):
    folder = Path(f"dataset{num_shards}")
    folder.mkdir()
    for shard in range(num_shards):
        with tarfile.open(folder / f"shard-{shard:03d}.tar", "w") as tar:
            for number in range(20):
                content = json.dumps({"text": f"sample {number}"}).encode()
                info = tarfile.TarInfo(f"{shard:03d}{number:03d}.json")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    words = ["--non-interactive", "--split-ratio", "8,1,1", "--sample-type", "CrudeWebdataset"]
    done = subprocess.run(["energon", "prepare", str(folder), *words], capture_output=True, text=True)
    parts = yaml.safe_load((folder / ".nv-meta" / "split.yaml").read_text())["split_parts"]
    found = {name: " ".join(shards) or "none" for name, shards in parts.items()}
    print(f"{num_shards} shards: status {done.returncode},", ", ".join(f"{name}: {shards}" for name, shards in found.items()))
    return done.returncode, found


found = [split(num_shards) for num_shards in (1, 4, 10)]
assert found == [
    (0, {"train": "none", "val": "none", "test": "shard-000.tar"}),
    (0, {"train": "shard-{000..002}.tar", "val": "none", "test": "shard-003.tar"}),
    (0, {"train": "shard-{000..007}.tar", "val": "shard-008.tar", "test": "shard-009.tar"}),
], "behaves otherwise now"
EOF
python finding.py
