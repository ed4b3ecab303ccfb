"""Every key of a recipe, given what nobody would write on purpose: a dry run takes it or says a sentence, and no
library's error reaches the user bare."""

from __future__ import annotations

import inspect
import json
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from formats.declared import DeclaredFormat
from formats.registry import get_format
from formats.registry import names as formats
from policy.chameleon.config import ChameleonPolicyConfig
from policy.registry import check_policy, section_of
from rewards.contract import GIVEN
from rewards.detectors.registry import BACKENDS, DetectorConfig, build_detector
from rewards.judge.config import JudgeConfig
from rewards.registry import REWARDS
from rewards.runtime.serving import ComponentSpec, RewardContextSpec
from runtime.errors import UserError
from tasks.registry import get_task
from tests.test_preflight import RECIPE
from underdrawing.cli import main
from underdrawing.recipe import Recipe, _models_in

HOSTILE: list[Any] = [
    *(-1, 0, 1e-300, 1e308, 10**9, float("inf"), "", "no such", "\0", True, None),
    *(["x"], [[None]], {}, {1: None}),
]
# What makes the sections that a recipe can do without, by the beginnings of their keys.
AROUND = {
    "task.dataset.": "task={dataset: {path: prompts.jsonl}}",
    "rewards.parts.x.": "rewards.parts.x={function: format}",
    "rewards.schedules.x.": "rewards.schedules.x={0: 1.0, 100: 0.2}",
    "rewards.detector.": "rewards.detector={backend: shapes}",
    "rewards.judge.": "rewards.judge={base_url: 'http://127.0.0.1:9/v1', model: m, check_at_start: false}",
}
NAMES = {"clip_by_kind": "word"}  # of maps whose keys are not for the recipe to choose


def keys(model: type[BaseModel], before: str = "") -> Iterator[str]:
    """Every key of a section and of those inside, an x for the names that a recipe chooses."""
    for name, field in model.model_fields.items():
        yield before + name
        inside = [section_of("chameleon")] if before + name == "policy" else _models_in(field.annotation)
        for inner in inside:  # the policy's section is its family's own
            named = f"{NAMES.get(name, 'x')}." if _is_map(field.annotation) else ""
            yield from keys(inner, f"{before}{name}.{named}")


def _is_map(annotation: Any) -> bool:
    arguments = typing.get_args(annotation)
    return typing.get_origin(annotation) is dict or any(_is_map(argument) for argument in arguments)


KEYS = list(dict.fromkeys(keys(Recipe)))


def test_all_keys_are_tried():
    for key in ("seed", "policy.tiny.rope_theta", "task.dataset.where", "grpo.clip_by_kind.word.delta"):
        assert key in KEYS
    for key in ("rewards.parts.x.workers.num_gpus", "rewards.judge.timeout_s", "rewards.alarms.fatal", "track.wandb"):
        assert key in KEYS
    assert len(KEYS) > 180 and set(AROUND) <= {f"{key.rpartition('.')[0]}." for key in KEYS}


@pytest.mark.parametrize("key", KEYS)
def test_a_dry_run_takes_any_value_or_says_a_sentence(capsys, tmp_path, monkeypatch, key: str):
    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_text('{"prompt": "a red circle"}\n{"prompt": "a blue square"}\n')
    Path("tiny.yaml").write_text(yaml.safe_dump(RECIPE))
    around = [override for prefix, override in AROUND.items() if key.startswith(prefix)]
    faults = []
    for value in HOSTILE:
        override = f"{key}={written(value)}"
        try:
            code = main(["sft" if key.startswith("sft.") else "grpo", "tiny.yaml", "--dry-run", *around, override])
        except BaseException as error:
            faults.append(f"{override}: {error!r}")
            continue
        said = capsys.readouterr().err
        if code not in (0, 2) or "Traceback" in said or (code == 2 and not said.startswith("underdrawing: ")):
            faults.append(f"{override}: code {code}, {said}")
    assert not faults, "\n".join(faults)
    if key != "rewards.judge.cache_dir":  # which is made to see that it can be written
        assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.jsonl", "tiny.yaml"]


# As long as one likes: 10**9 of these is a run that nobody waits for.
LONG = {
    *("sft.demonstrations", "sft.max_steps", "sft.gradient_accumulation_steps", "grpo.steps", "grpo.prompts_per_step"),
    *("grpo.max_rollout_rounds", "grpo.num_generations", "grpo.num_iterations", "rollout.workers"),
}
ONE_STEP = (
    *("sft.demonstrations=4", "sft.batch_size=2", "sft.max_steps=1", "sft.warmup_steps=0", "rollout.max_tokens=60"),
    *("grpo.steps=1", "grpo.prompts_per_step=2", "grpo.num_generations=2"),
)


@pytest.fixture(scope="module")
def warm(tmp_path_factory) -> Path:
    """Weights of the recipe after one step of warm start."""
    folder = tmp_path_factory.mktemp("warm")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(RECIPE))
    assert main(["sft", str(folder / "tiny.yaml"), *ONE_STEP, f"run_dir={folder}/run"]) == 0
    return folder / "run/sft/model"


@pytest.mark.slow
@pytest.mark.parametrize("key", [key for key in KEYS if key not in ("run_dir", "policy.tiny.vq")])
def test_what_a_dry_run_takes_also_starts(capsys, tmp_path, monkeypatch, warm, key: str):
    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_text('{"prompt": "a red circle"}\n{"prompt": "a blue square"}\n')
    Path("tiny.yaml").write_text(yaml.safe_dump(RECIPE))
    around = [override for prefix, override in AROUND.items() if key.startswith(prefix)]
    commands = ["sft"] if key.startswith("sft.") else ["grpo"]
    if key.split(".")[0] in ("seed", "policy", "format", "track"):
        commands = ["sft", "grpo"]
    small = [override for override in ONE_STEP if not override.startswith(f"{key}=")]
    for number, value in enumerate(HOSTILE):
        if value == 10**9 and key in LONG:
            continue
        given = [*around, f"{key}={written(value)}"]
        for command in commands:
            if main([command, "tiny.yaml", "--dry-run", *given]):
                continue
            capsys.readouterr()
            weights = ["--weights", str(warm)] if command == "grpo" else []
            code = main([command, "tiny.yaml", *weights, *given, *small, f"run_dir=run-{command}-{number}"])
            said = capsys.readouterr().err
            assert code in (0, 2) and "Traceback" not in said, f"{given}: code {code}, {said}"


def written(value: Any) -> str:
    """A value as YAML on one line."""
    if isinstance(value, str):
        return json.dumps(value)
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n").removesuffix("\n...")


def refused_or_taken(make: Any, *arguments: Any, **options: Any) -> None:
    """A call that a recipe provokes: whatever else than a UserError it raises is told with what it was given."""
    try:
        make(*arguments, **options)
    except UserError:
        pass
    except Exception as error:
        pytest.fail(f"{arguments} {options}: {error!r}")


@pytest.mark.parametrize("name", REWARDS)
def test_options_of_a_reward(name: str):
    judge = JudgeConfig(base_url="http://127.0.0.1:9/v1", model="m", check_at_start=False)
    setting = RewardContextSpec(get_task("shapes"), get_format("strokes"), None, judge)
    context = setting.build()
    for option, parameter in inspect.signature(REWARDS[name].load()).parameters.items():
        if option not in (*GIVEN, "download") and parameter.kind is not parameter.VAR_KEYWORD:
            for value in HOSTILE:
                refused_or_taken(ComponentSpec("x", name, {option: value}, context=setting).load, context)
    context.judge.close()


@pytest.mark.parametrize("name", formats())
def test_options_of_a_format(name: str):
    for option, parameter in inspect.signature(DeclaredFormat).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            for value in (*HOSTILE, {"plan": 1e300}, {"plan": "x"}):
                refused_or_taken(get_format, name, **{option: value})


def test_options_of_the_shapes():
    for value in HOSTILE:
        refused_or_taken(get_task, "shapes", mistake_rate=value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_of_a_detector(backend: str):
    def build(values: Mapping[str, Any]) -> None:
        try:
            config = DetectorConfig.model_validate(values)
        except ValidationError:
            return  # a sentence of the recipe's
        build_detector(config)

    for key in DetectorConfig.model_fields:
        if key not in ("backend", "download"):
            for value in HOSTILE:
                refused_or_taken(build, {"backend": backend, "path": "no such", key: value})


VQ = {
    **{"embed_dim": 8, "num_embeddings": 16, "double_latent": False, "latent_channels": 8, "resolution": 16},
    **{"in_channels": 3, "base_channels": 32, "channel_multiplier": [1, 2], "num_res_blocks": 1, "dropout": 0.0},
    **{"attn_resolutions": [], "attn_type": "vanilla"},
}


def test_keys_of_a_visual_tokenizer():
    def check(values: dict[str, Any]) -> None:
        try:
            config = ChameleonPolicyConfig.model_validate({"tiny": {"vq": values}})
        except ValidationError:
            return
        check_policy(config, (), True)

    check(VQ)
    for key in VQ:
        for value in (*HOSTILE, [1] * 64, [10**6], ["1"], 10**6):
            refused_or_taken(check, VQ | {key: value})
