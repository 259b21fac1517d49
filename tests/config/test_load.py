"""Config files, overrides and the one-line errors."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sts.config.errors import ConfigError
from megatron_sts.config.load import dump, load
from megatron_sts.config.resolve import resolve
from megatron_sts.config.schema import RunConfig

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_folder_stands_for_its_config(path: Path, written: dict[str, Any]) -> None:
    assert load(path.parent) == load(path) == RunConfig.model_validate(written)


def test_stage_by_name_index_or_all(path: Path) -> None:
    by_name = load(path, ["stages.finetune.lds.alpha=0.3"])
    assert by_name == load(path, ["stages.1.lds.alpha=0.3"])
    assert by_name.stages[1].lds is not None and by_name.stages[1].lds.alpha == 0.3
    dense = load(path, ["stages.*.vtc=null", "stages.*.lds=null"])
    assert all(stage.vtc is None and stage.lds is None for stage in dense.stages)


def test_values_are_yaml_and_later_overrides_win(path: Path) -> None:
    config = load(path, ["stages.0.freeze=[vision]", "seed=1", "seed=7", "precision.fp8=off", "data.path=a=b"])
    assert (config.stages[0].freeze, config.seed, config.precision.fp8) == (("vision",), 7, "off")
    assert config.data.path == "a=b"


def test_interpolation_sees_overrides(path: Path) -> None:
    config = load(path, ["seed=5", "stages.0.steps=${seed}"])
    assert config.stages[0].steps == 5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.1.lds.alpha=2", "stages.finetune.lds.alpha=2: it should be less than or equal to 1"),
        ("stages.1.lds.alfa=1", "stages.finetune.lds.alfa=1: unknown key; did you mean alpha?"),
        ("stages.1.lds.schedule_points=[[1]]", "stages.finetune.lds.schedule_points.0.1: missing; add it"),
        ("parallel.layout={a: 1}", "parallel.layout={'a': 1}: it should be 'even' or 'auto' or a list"),
        ("parallel.layout=[1, x]", "parallel.layout.1=x: it should be a whole number"),
        ("data.num_samples=0", "data.num_samples=0: it should be greater than 0"),
        ("model.vison.num_layers=2", "model.vison={'num_layers': 2}: unknown key; did you mean vision?"),
        (
            "stages.0.batch={micro_batch_sise: 1}",
            "stages.alignment.batch.micro_batch_sise=1: unknown key; did you mean",
        ),
        ("zzz=1", "zzz=1: unknown key; remove it, or choose from seed, model"),
        ("finetune.lds.alpha=0.3", "unknown key; did you mean stages.finetune.lds.alpha?"),
        ("finetune.steps=3", "unknown key; did you mean stages.finetune.steps?"),
        ("finetune=3", "finetune=3: unknown key; remove it, or choose from seed, model"),
        ("stages.tune.vtc=null", "override stages.tune.vtc=null: no entry 'tune'; choose from alignment, finetune"),
        ("stages.2.vtc=null", "no entry '2'"),
        ("seed", "override 'seed': not of the form key.path=value"),
        ("stages.0.steps.x=1", "override stages.0.steps.x=1: there is nothing below"),
        ("seed=9223372036854775808", "seed=9223372036854775808: it should be less than 9223372036854775808"),
        ("seed=[1", "seed=[1: not valid YAML"),
        ("seed=???", "seed: Missing mandatory value"),
        ("stages.0.steps=null", "stages.alignment: stage 'alignment': give exactly one of epochs and steps"),
        ("stages.0.name=finetune", "stages: names must differ"),
        ("stages.0.name=a/b", "stages.a/b.name=a/b: String should match pattern"),
        ("stages=3", "stages=3: it should be a list"),
        ("stages.0=3", "stages.0=3: it should be a group of keys; write stages.0.KEY=VALUE, or leave it out"),
        (
            "evaluation=null",
            "evaluation=null: it should be a group of keys; evaluation.num_questions=0 does without it",
        ),
    ],
)
def test_wrong_override_is_one_line(path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(path, [override])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_stage_s_name_where_there_are_no_stages(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"finetune=\{'lds': \{'alpha': 0.3\}\}: unknown key; remove it"):
        load(path, ["stages=3", "finetune.lds.alpha=0.3"])


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [1", "not valid YAML"), ("- 1", "holds a list"), ("a", "a=null: unknown key"), ("", "model: missing")],
)
def test_wrong_file_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        load(file)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.yaml: no such file; give a YAML file or a folder"):
        load(tmp_path / "nothing.yaml")


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("C",), exclude_characters="$"), min_size=1)


@settings(max_examples=25, deadline=None)
@given(
    alpha=st.floats(0, 0.6),
    lr=st.floats(0, 1, exclude_min=True),
    path=st.none() | TEXT,
    tokenizer=st.sampled_from(["off", "no", "1", "1e3", "null", "~", "a: b", "#x", " y "]),
    fp8=st.sampled_from(["off", "tensorwise", "delayed"]),
    families=st.lists(st.sampled_from(["existence", "ocr"]), unique=True, min_size=1),
    ratio=st.floats(0.1, 1),
)
def test_dump_and_load_is_the_identity(
    tmp_path_factory: pytest.TempPathFactory,
    written: dict[str, Any],
    alpha: float,
    lr: float,
    path: str | None,
    tokenizer: str,
    fp8: str,
    families: list[str],
    ratio: float,
) -> None:
    alignment, finetune = written["stages"]
    config = RunConfig.model_validate(
        {
            **written,
            "precision": {"fp8": fp8},
            "data": {"path": path, "tokenizer": tokenizer, "families": families},
            "stages": [
                {**alignment, "vtc": {"keep_ratio": ratio}},
                {**finetune, "optimizer": {"lr": lr}, "lds": {"alpha": alpha}},
            ],
        }
    )
    resolved = resolve(config)
    file = tmp_path_factory.mktemp("run") / "config.resolved.yaml"
    dump(resolved, file)
    unwritten = resolved.config.parallel.model_copy(update={"vision": None})
    assert load(file) == resolved.config.model_copy(update={"parallel": unwritten})
    assert resolve(load(file)) == resolved
    assert yaml.safe_load(file.read_text())["resolved"]["stages"][1]["num_steps"] == resolved.stages[1].num_steps


def test_a_resolved_config_says_where_the_tower_ran_and_binds_nobody_who_did_not_write_it(
    path: Path, tmp_path: Path
) -> None:
    """Overrides of the file may let the tower learn, which then has to run on the first stage."""
    two = ["parallel.pipeline_model_parallel_size=2"]
    for number, (overrides, written) in enumerate([(two, None), ([*two, "parallel.vision=spread"], "spread")]):
        resolved, file = resolve(load(path, overrides)), tmp_path / f"{number}.yaml"
        dump(resolved, file)
        stored = yaml.safe_load(file.read_text())
        assert stored["parallel"]["vision"] == written and stored["resolved"].get("vision", written) == "spread"
        assert resolve(load(file)) == resolved and resolved.spreads_vision
    assert not resolve(load(tmp_path / "0.yaml", ["stages.*.freeze=[]"])).spreads_vision
    with pytest.raises(ConfigError, match=r"parallel\.vision=spread: the tower learns"):
        resolve(load(tmp_path / "1.yaml", ["stages.*.freeze=[]"]))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**9), ratio=st.floats(0.01, 1))
def test_overrides_leave_file_and_other_loads_alone(
    tmp_path_factory: pytest.TempPathFactory, written: dict[str, Any], seed: int, ratio: float
) -> None:
    file = tmp_path_factory.mktemp("run") / "config.yaml"
    file.write_text(yaml.safe_dump(written))
    before, text = copy.deepcopy(load(file)), file.read_text()
    overrides = [f"seed={seed}", f"stages.*.vtc.keep_ratio={ratio}"]
    changed = load(file, overrides)
    assert changed == load(file, overrides) and load(file) == before and file.read_text() == text
    assert changed.seed == seed and all(stage.vtc and stage.vtc.keep_ratio == ratio for stage in changed.stages)


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*/config.yaml")), ids=lambda file: file.parent.name)
def test_every_example_resolves(example: Path, tmp_path: Path) -> None:
    (tmp_path / ".nv-meta").mkdir()
    (tmp_path / ".nv-meta" / "dataset.yaml").touch()
    prepared = [f"data.path={tmp_path}"] if load(example).data.source == "energon" else []
    resolved = resolve(load(example.parent, prepared))
    assert all(stage.num_steps > 0 for stage in resolved.stages) and load(example) == load(example.parent)


def test_70b_example_runs_on_512_ranks() -> None:
    resolved = resolve(load(EXAMPLES / "llava_llama3_70b"), world_size=512)
    assert (resolved.data_parallel_size, len(resolved.layers_per_chunk)) == (8, 11)
    assert [stage.tokens(0).of_image(0) for stage in resolved.stages] == [288, 576]
    assert resolved.stage("finetune").tokens(0).sequence_length == 4096
