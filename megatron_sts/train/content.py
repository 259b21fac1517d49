"""What the files that a config names hold, whatever their paths: by this a run that goes on knows its data again. Torch-free.

Cheap for any size of data: JSON files, tokenizers and what Energon keeps about shards are read; of shards the sizes, of a JSON's
pictures the sizes of ``NUM_PICTURES``, of weights ``NUM_BLOCKS`` pieces. So shards and pictures that were changed without
changing size, and other pictures than those, are not noticed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from megatron_sts.config.errors import ConfigError
from megatron_sts.config.files import EMBEDDED_PREFIX, EMBEDDED_TOKENIZER, data_sections
from megatron_sts.config.prepared import BLEND_SUFFIXES, ENERGON_FOLDER, SETTINGS_NAME
from megatron_sts.config.run_folder import checkpoint_of, is_of_run, manifest_of
from megatron_sts.config.samples_file import read_entries
from megatron_sts.config.schema import RunConfig

Content = dict[str, Any]
"""Plain values by what they measure; a ``digest`` last."""
DIGEST_LENGTH = 16
NUM_PICTURES, NUM_BLOCKS, BLOCK_BYTES = 16, 16, 4096
TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.tiktoken",
)  # fmt: skip


def contents(config: RunConfig) -> dict[str, Content]:
    """By dotted field. What the package embeds, and files that cannot be read, are left out: who needs them says so."""
    found = {}
    for field, measure in _measures(config):
        with contextlib.suppress(OSError):
            found[field] = measure()
    return {field: content for field, content in found.items() if content is not None}


def _measures(config: RunConfig) -> Iterator[tuple[str, Callable[[], Content | None]]]:
    for part in config.model.parts:
        init = getattr(config.model, part).init
        if init and not init.startswith(EMBEDDED_PREFIX):
            yield f"model.{part}.init", partial(_of_weights, Path(init))
    for field, data in data_sections(config).items():
        if data.tokenizer != EMBEDDED_TOKENIZER:
            yield f"{field}.tokenizer", partial(_of_tokenizer, Path(data.tokenizer))
        yield from _of_samples(field, data.source, data.path, data.image_dir)
    for stage in config.stages:
        if stage.validation is not None:
            held, data = stage.validation.data, stage.data or config.data
            path = held.path or data.path  # of a blend split val may list what train does not
            field = f"stages.{stage.name}.validation.data"
            yield from _of_samples(field, held.source or data.source, path, held.image_dir, "val")


def _of_samples(
    field: str, source: str, named: str | None, image_dir: str | None, split: str = "train"
) -> Iterator[tuple[str, Callable[[], Content | None]]]:
    path = Path(str(named))
    if source == "energon":
        yield f"{field}.path", partial(_of_dataset, path, split)
    if source == "llava_json":
        entries = read_entries(path, f"{field}.path")
        yield f"{field}.path", partial(_of_samples_file, path, len(entries))
        yield f"{field}.image_dir", partial(_of_pictures, entries, Path(image_dir) if image_dir else path.parent)


def changes(before: Content, now: Content) -> str:
    """What differs, in words; nothing if it is the same content. A picture that is missing on one side is no difference."""
    found = []
    for name in [*before, *(name for name in now if name not in before)]:
        old, new = before.get(name), now.get(name)
        if name == "pictures" and isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
            other = sum(a != b for a, b in zip(old, new, strict=True) if a is not None and b is not None)
            found += [f"{other} of {len(old)} pictures that were looked at have another size"] if other else []
        elif old != new:
            found.append(f"{name} {_show(old)} then, {_show(new)} now")
    return ", ".join(found)


def _show(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else "none" if value is None else str(value)


def _of_file(path: Path) -> Content:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "digest": hashlib.file_digest(file, "sha256").hexdigest()[:DIGEST_LENGTH]}


def _of_samples_file(path: Path, num_samples: int) -> Content:
    return {"samples": num_samples, **_of_file(path)}


def _of_tokenizer(path: Path) -> Content | None:
    if path.is_file():
        return _of_file(path)
    files = sorted({file for pattern in TOKENIZER_FILES for file in path.glob(pattern) if file.is_file()})
    return {file.name: _of_file(file)["digest"] for file in files} or None


def _of_pictures(entries: list[Any], folder: Path) -> Content:
    """Bytes of pictures that are spread over the JSON."""
    named = [name for entry in entries for name in _pictures(entry)]
    num_looked_at = min(NUM_PICTURES, len(named))
    return {"pictures": [_size(folder / named[i * len(named) // num_looked_at]) for i in range(num_looked_at)]}


def _pictures(entry: Any) -> list[str]:
    images = entry.get("image") or entry.get("images") or entry.get("video") or [] if isinstance(entry, dict) else []
    names = images if isinstance(images, list) else [images]
    return [name for name in names if isinstance(name, str)]


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except (OSError, ValueError):
        return None


def _of_dataset(path: Path, split: str, named_by: tuple[Path, ...] = ()) -> Content | None:
    """Of a prepared folder, a blend, or what a blend (the last of ``named_by``) names; None for anything else."""
    if path.suffix in BLEND_SUFFIXES and path.is_file():
        return None if path in named_by else _of_blend(path, split, (*named_by, path))
    folder = path / ENERGON_FOLDER
    if not folder.is_dir():
        return _of_large_files([path]) if path.is_file() else None
    sizes = {name: (count, _size(path / name)) for name, count in _shard_counts(folder).items()}
    # index.* are left out: drawn at random, or as large as there are samples.
    about = [path / SETTINGS_NAME, *(file for file in folder.glob("*") if not file.name.startswith(("index.", ".")))]
    small = {file.name: _of_file(file)["digest"] for file in sorted(about) if file.is_file()}
    return {
        "samples": sum(count for count, _ in sizes.values()),
        "shards": len(sizes),
        "bytes": sum(size or 0 for _, size in sizes.values()),
        "digest": _digest([sizes, small]),
    }


def _shard_counts(folder: Path) -> dict[str, int]:
    """Samples of each shard; none where Energon will say what is wrong."""
    try:
        if (folder / ".info.json").is_file():
            said = json.loads((folder / ".info.json").read_text(encoding="utf-8"))
        else:
            said = yaml.safe_load((folder / ".info.yaml").read_text(encoding="utf-8"))
        counts: dict[str, int] = said["shard_counts"]
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
        return {}
    return counts


def _of_blend(path: Path, split: str, named_by: tuple[Path, ...]) -> Content | None:
    """The YAML's split, with content in place of the paths in it; all of it where there is no such split."""
    try:
        said = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return None
    splits = said.get("splits") if isinstance(said, dict) else None
    used = splits[split] if isinstance(splits, dict) and split in splits else said
    found: list[Content] = []
    digest = _digest(_without_paths(used, split, named_by, found))
    sums = {name: sum(each.get(name, 0) for each in found) for name in ("samples", "shards", "bytes")}
    return {"datasets": len(found), **sums, "digest": digest}


def _without_paths(said: Any, split: str, named_by: tuple[Path, ...], found: list[Content]) -> Any:
    """``found`` gets the content that replaces each path."""
    if isinstance(said, list):
        return [_without_paths(value, split, named_by, found) for value in said]
    if not isinstance(said, dict):
        return said
    written = {str(key): _without_paths(value, split, named_by, found) for key, value in said.items()}
    aux = written["aux"] if isinstance(written.get("aux"), dict) else {}
    for section, key in [(written, "path"), *((aux, key) for key in aux)]:
        path = section.get(key)
        content = _of_dataset(named_by[-1].parent / path, split, named_by) if isinstance(path, str) else None
        if content is not None:
            found.append(content)
            section[key] = content
    return written


def _of_weights(path: Path) -> Content | None:
    """Of a safetensors file, a folder of them, or another run's checkpoint, whose manifest has digests of all its files."""
    if is_of_run(path):
        try:
            checkpoint = checkpoint_of(path)
        except ConfigError:  # forgotten since: whether it is needed is another's question
            return None
        return {"checkpoint": checkpoint.name, **_of_file(manifest_of(checkpoint))}
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return _of_large_files(files) if files else None


def _of_large_files(files: list[Path]) -> Content:
    """Their sizes, and blocks that are spread over each."""
    found, total = hashlib.sha256(), 0
    for path in files:
        size = path.stat().st_size
        total += size
        found.update(size.to_bytes(8))
        with path.open("rb") as file:
            for number in range(NUM_BLOCKS):
                file.seek(number * max(size - BLOCK_BYTES, 0) // (NUM_BLOCKS - 1))
                found.update(file.read(BLOCK_BYTES))
    return {"files": len(files), "bytes": total, "digest": found.hexdigest()[:DIGEST_LENGTH]}


def _digest(value: object) -> str:
    written = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(written.encode()).hexdigest()[:DIGEST_LENGTH]
