"""The released layout, written and read; what is wrong with a file is named."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from policy.base import score_trajectories
from policy.chameleon.config import ChameleonPolicyConfig
from policy.chameleon.family import ChameleonPolicy, load
from policy.chameleon.model import ModelFileError
from policy.chameleon.vocabulary import VocabularyError
from policy.registry import FamilyError, load_policy
from runtime.errors import UserError
from tests.chameleon_helpers import WORDS, sampled, small_config, small_policy


@pytest.fixture
def saved(tmp_path):
    """A policy and its folder."""
    policy = small_policy()
    policy.save(tmp_path / "model")
    return policy, tmp_path / "model"


def reload(folder) -> ChameleonPolicy:
    return load(ChameleonPolicyConfig(path=str(folder)))


def test_saved_policy_is_the_policy(saved):
    policy, folder = saved
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in folder.iterdir()}
    assert "model.vqmodel.decoder.up.0.block.0.conv1.weight" in load_file(folder / "model.safetensors")
    again = reload(folder)
    trajectories = sampled(policy, [["text", "image", "text"]])
    with torch.no_grad():
        assert torch.equal(
            score_trajectories(again, trajectories).logprob_N, score_trajectories(policy, trajectories).logprob_N
        )
    content = trajectories[0].segments[2].ids[1:-1]
    assert (again.decode_images([content])[0] == policy.decode_images([content])[0]).all()
    assert again.vocabulary.map == policy.vocabulary.map and again.max_length == policy.max_length
    policy.save(folder)  # over what is there
    assert sorted(folder.parent.iterdir()) == [folder]


def test_shards_are_read(saved):
    policy, folder = saved
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: weights[name] for name in part}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    again = reload(folder)
    for name, tensor in policy.core.state_dict().items():
        assert torch.equal(again.core.state_dict()[name], tensor)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelFileError, match="model-00002-of-00002.safetensors: cannot be read"):
        reload(folder)


def rewrite(folder, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_checkpoint_without_a_decoder_is_named(saved):
    _, folder = saved

    def drop(weights):
        for name in [name for name in weights if ".decoder." in name]:
            del weights[name]

    rewrite(folder, drop)
    with pytest.raises(
        ModelFileError,
        match=r"model.safetensors: \d+ weights are missing, first "
        r"'model.vqmodel.decoder.*Anole's layout",
    ):
        reload(folder)


def test_one_missing_decoder_weight_is_named(saved):
    _, folder = saved
    rewrite(folder, lambda weights: weights.pop("model.vqmodel.decoder.conv_out.bias"))
    with pytest.raises(ModelFileError, match="1 weights are missing, first 'model.vqmodel.decoder.conv_out.bias'"):
        reload(folder)


def test_wrong_shape_is_named(saved):
    _, folder = saved
    rewrite(folder, lambda weights: weights.update({"model.norm.weight": torch.ones(7)}))
    with pytest.raises(
        ModelFileError,
        match=r"model.safetensors: 'model.norm.weight' has shape \[7\]; config.json "
        r"asks for \[32\]",
    ):
        reload(folder)


def test_half_written_file_is_named(saved):
    _, folder = saved
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ModelFileError, match="model.safetensors: cannot be read as safetensors"):
        reload(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file.unlink(), "config.json: cannot be read"),
        (lambda file: file.write_text("{"), "config.json: not valid JSON"),
        (lambda file: file.write_text('{"model_type": "llama"}'), "model_type is 'llama'"),
        (lambda file: file.write_text('{"model_type": "chameleon"}'), "no vocabulary_map"),
    ],
)
def test_wrong_config_is_named(saved, change, message):
    _, folder = saved
    change(folder / "config.json")
    with pytest.raises(ModelFileError, match=message):
        reload(folder)


def test_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        reload(tmp_path / "nowhere")


def test_missing_tokenizer_is_named(saved):
    _, folder = saved
    (folder / "tokenizer.json").unlink()
    with pytest.raises(VocabularyError, match="tokenizer.json: there is no such file"):
        reload(folder)


def test_a_failed_save_leaves_the_old_folder(saved, monkeypatch):
    policy, folder = saved
    before = sorted(file.name for file in folder.iterdir())

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(policy.vocabulary.tokenizer, "save_pretrained", full_disk)
    with pytest.raises(OSError, match="No space left"):
        policy.save(folder)
    assert sorted(file.name for file in folder.iterdir()) == before
    assert sorted(folder.parent.iterdir()) == [folder]
    reload(folder)


def test_stock_transformers_masks_what_we_do_not(saved):
    """The reason for the subclass: the same weights, the same row."""
    from transformers import ChameleonForConditionalGeneration

    policy, folder = saved
    stock = ChameleonForConditionalGeneration.from_pretrained(str(folder), local_files_only=True).eval()
    ids = torch.tensor([[0, 40, 41, 37]])
    with torch.no_grad():
        theirs, ours = stock(input_ids=ids).logits[0], policy.core(input_ids=ids).logits[0]
    codes = torch.from_numpy(policy.vocabulary.code_ids).long()
    words = torch.ones(policy.vocabulary.size, dtype=torch.bool)
    words[codes] = False
    torch.testing.assert_close(ours[:, words], theirs[:, words])
    assert (theirs[:, codes] == torch.finfo(torch.float32).min).all()
    assert ours[:, codes].abs().max() < 100


def test_registry():
    assert isinstance(load_policy(small_config(), WORDS), ChameleonPolicy)
    by_path = small_config().model_copy(update={"family": "policy.chameleon.family.load"})
    assert isinstance(load_policy(by_path, WORDS), ChameleonPolicy)
    with pytest.raises(FamilyError, match="no 'camelion'; did you mean 'chameleon'"):
        load_policy(ChameleonPolicyConfig(family="camelion"))
    with pytest.raises(FamilyError, match="no module 'nowhere'"):
        load_policy(ChameleonPolicyConfig(family="nowhere.load"))
    with pytest.raises(FamilyError, match="has no function 'missing'"):
        load_policy(ChameleonPolicyConfig(family="policy.chameleon.family.missing"))


def test_fresh_weights_are_a_function_of_the_seed():
    first, again, other = (load(small_config(seed=seed), WORDS) for seed in (0, 0, 1))
    assert torch.equal(first.core.lm_head.weight, again.core.lm_head.weight)
    assert not torch.equal(first.core.lm_head.weight, other.core.lm_head.weight)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("hiden_size", 8, "hiden_size"),
        ("num_key_value_heads", 3, "no multiple of num_key_value_heads 3"),
        ("hidden_size", 36, "no multiple of 2 x num_attention_heads"),
    ],
)
def test_wrong_tiny_section_is_refused(key, value, message):
    with pytest.raises(ValueError, match=message):
        small_config(**{key: value})


def test_the_head_gets_no_adapters():
    with pytest.raises(ValueError, match="'lm_head' cannot have adapters"):
        ChameleonPolicyConfig(lora={"target_modules": ["lm_head"]})
