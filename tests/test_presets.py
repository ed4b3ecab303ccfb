"""Presets for several processes: accelerate reads them as it would at launch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.mark.parametrize(
    "name, kind, processes, cpu",
    [
        ("single", DistributedType.NO, 1, True),
        ("ddp", DistributedType.MULTI_GPU, 8, False),
        ("fsdp2", DistributedType.FSDP, 8, False),
    ],
)
def test_accelerate_reads_every_preset(name: str, kind: DistributedType, processes: int, cpu: bool):
    config = load_config_from_file(str(CONFIGS / f"accelerate/{name}.yaml"))
    assert isinstance(config, ClusterConfig)
    assert (config.distributed_type, config.num_processes, config.use_cpu) == (kind, processes, cpu)


def test_every_preset_is_tested():
    assert {p.stem for p in (CONFIGS / "accelerate").iterdir()} == {"single", "ddp", "fsdp2"}


def test_the_fsdp_preset_is_version_2_and_its_keys_are_accelerates(monkeypatch):
    settings = yaml.safe_load((CONFIGS / "accelerate/fsdp2.yaml").read_text())["fsdp_config"]
    known = vars(launch_command_parser().parse_args(["script.py"]))
    assert set(settings) <= set(known)
    for key, value in settings.items():  # as `accelerate launch` hands them on
        monkeypatch.setenv(key.upper(), str(value))
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True


def test_deepspeed_config_is_stage_2_and_its_batch_size_stands():
    path = CONFIGS / "deepspeed/zero2.json"
    plugin = DeepSpeedPlugin(hf_ds_config=json.loads(path.read_text()))
    assert plugin.zero_stage == 2
    assert plugin.deepspeed_config["train_micro_batch_size_per_gpu"] == 1
