"""Chameleon's visual tokenizer: parity with the reference, pixels in and out, files, and the shapes world's weights."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from transformers import ChameleonConfig, ChameleonForConditionalGeneration

from policy.chameleon.vq import (
    ChameleonVQ,
    TokenizerError,
    checkpoint_entries,
    fit,
    load_checkpoint_entries,
    load_vq,
    save_vq,
    to_images,
    to_pixels,
    vq_config,
)

SMALL = {
    "embed_dim": 8,
    "num_embeddings": 32,
    "latent_channels": 8,
    "resolution": 16,
    "base_channels": 32,
    "channel_multiplier": [1, 1, 2],
    "num_res_blocks": 1,
}


def small(seed: int = 0) -> ChameleonVQ:
    torch.manual_seed(seed)
    return ChameleonVQ(vq_config(SMALL))


@pytest.mark.parity
def test_parity_with_the_reference_tokenizer(reference_tensors):
    reference = reference_tensors("chameleon_tiny.pt")
    vq = ChameleonVQ(vq_config(reference["vq_config"]))
    load_checkpoint_entries(vq, reference["state_dict"])
    with torch.no_grad():
        codes = vq.codes(reference["pixels"])
        assert torch.equal(codes, reference["indices"])
        close = partial(torch.testing.assert_close, atol=1e-4, rtol=0)
        close(vq.decode(codes), reference["reconstruction"])
        close(vq.decode(reference["random_indices"]), reference["random_pixels"])
        close(vq(reference["pixels"]).pixels_BCHW, reference["reconstruction"])


def test_decoder_has_the_released_names_and_shapes():
    config = vq_config({"base_channels": 32, "latent_channels": 16, "embed_dim": 16, "num_embeddings": 8})
    names = ChameleonVQ(config).state_dict()
    # The released tokenizer has five levels, (1, 1, 2, 2, 4), of 2 + 1 blocks; the coarsest first block takes 4 x 32.
    assert names["decoder.conv_in.weight"].shape == (128, 16, 3, 3)
    assert names["decoder.up.4.block.2.conv2.weight"].shape == (128, 128, 3, 3)
    assert names["decoder.up.3.block.0.nin_shortcut.weight"].shape == (64, 128, 1, 1)
    assert names["decoder.up.1.upsample.conv.weight"].shape == (32, 32, 3, 3)
    assert "decoder.up.0.upsample.conv.weight" not in names and "decoder.up.4.block.3.conv1.weight" not in names
    assert {"decoder.mid.attn_1.proj_out.weight", "decoder.norm_out.bias", "decoder.conv_out.weight"} <= names.keys()


def test_stands_as_vqmodel_and_travels_in_a_checkpoint():
    vq = small()
    config = ChameleonConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vq_config=SMALL,
        vocabulary_map={"<image>": 40}
        | {f"IMGIMG{'ABCDEFGHIJ'[i // 10]}{'ABCDEFGHIJ'[i % 10]}Z": 4 + i for i in range(32)},
    )
    model = ChameleonForConditionalGeneration(config)
    model.model.vqmodel = vq
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        ids = model.model.get_image_tokens(pixels)
    assert torch.equal(ids, vq.codes(pixels) + 4)
    assert checkpoint_entries(vq).keys() <= model.state_dict().keys()
    other = small(seed=1)
    load_checkpoint_entries(other, model.state_dict())
    assert torch.equal(other.decode(ids - 4), vq.decode(ids - 4))


def test_white_stays_white_and_black_black():
    image = np.zeros((2, 2, 3), np.uint8)
    image[0] = 255
    image[1, 1] = 127
    pixels = to_pixels([image])
    assert pixels[0, :, 0, 0].tolist() == [1, 1, 1] and pixels[0, :, 1, 0].tolist() == [-1, -1, -1]
    assert np.array_equal(to_images(pixels)[0], image)
    every = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    assert np.array_equal(to_images(to_pixels([every]))[0], every)


def test_pixels_are_clamped_and_rounded_once():
    # (0.5 / 2 + 0.5) x 255 = 191.25; 0.506 -> 192.0; outside [-1, 1] is clamped, never wrapped.
    pixels = torch.tensor([0.5, 0.506, 3.0, -3.0]).view(1, 1, 2, 2).expand(1, 3, 2, 2)
    assert to_images(pixels)[0][..., 0].tolist() == [[191, 192], [255, 0]]


def test_fit_takes_the_centre_of_the_shortest_side():
    wide = np.zeros((16, 48, 3), np.uint8)
    wide[:, 16:32] = 200
    assert np.array_equal(fit(wide, 16), wide[:, 16:32])
    tall = np.full((90, 40, 3), 7, np.uint8)
    assert fit(tall, 16).shape == (16, 16, 3) and (fit(tall, 16) == 7).all()
    with pytest.raises(ValueError, match="uint8"):
        fit(wide.astype(np.float32), 16)


def test_gradient_flows_straight_through_the_codebook():
    vq = small().train()
    pixels = (torch.rand(2, 3, 16, 16) * 2 - 1).requires_grad_()
    trip = vq(pixels)
    trip.latent_BDHW.retain_grad()
    trip.pixels_BCHW.square().mean().backward()
    assert pixels.grad.abs().sum() > 0 and vq.encoder.conv_in.weight.grad.abs().sum() > 0
    # The latent's gradient is the one that the decoder gives at the quantized point: the codebook is passed by.
    quantized = trip.quantized_BDHW.detach().requires_grad_()
    vq.decoder(vq.post_quant_conv(quantized)).square().mean().backward()
    torch.testing.assert_close(trip.latent_BDHW.grad, quantized.grad)
    assert vq.quantize.embedding.weight.grad is None
    codebook_loss = (trip.quantized_BDHW - trip.latent_BDHW.detach()).square().mean()
    codebook_loss.backward()
    assert vq.quantize.embedding.weight.grad.abs().sum() > 0


def test_codes_are_the_nearest_and_rows_are_independent():
    vq = small()
    pixels = torch.rand(3, 3, 16, 16) * 2 - 1
    codes = vq.codes(pixels)
    assert codes.shape == (3, 16) and codes.dtype == torch.int64
    with torch.no_grad():
        latent = vq.quant_conv(vq.encoder(pixels)).flatten(2).transpose(1, 2)
    distance = torch.cdist(latent, vq.quantize.embedding.weight.expand(3, -1, -1))
    assert torch.equal(codes, distance.argmin(-1))
    assert torch.equal(vq.codes(pixels[1:2]), codes[1:2])


@pytest.mark.parametrize(("count", "code"), [(15, 0), (16, 32), (16, -1)])
def test_impossible_codes_are_refused(count, code):
    with pytest.raises(ValueError, match="codes"):
        small().decode(torch.full((1, count), code))


def test_saved_and_loaded_is_the_same_tokenizer(tmp_path):
    vq = small()
    save_vq(vq, tmp_path / "vq.safetensors", dtype=torch.float32)
    again = load_vq(tmp_path / "vq.safetensors")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in vq.state_dict().items())
    assert not any(parameter.requires_grad for parameter in again.parameters())
    save_vq(vq, tmp_path / "half.safetensors")
    assert {tensor.dtype for tensor in load_vq(tmp_path / "half.safetensors").state_dict().values()} == {torch.float32}


def test_bad_files_are_named(tmp_path):
    path = tmp_path / "vq.safetensors"
    save_vq(small(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TokenizerError, match="vq.safetensors"):
        load_vq(path)
    path.unlink()
    with pytest.raises(TokenizerError, match="vq.safetensors"):
        load_vq(path)
    path.write_bytes(whole)
    config = path.with_suffix(".json")
    config.write_text(config.read_text().replace('"num_embeddings": 32', '"num_embeddings": 64'))
    with pytest.raises(TokenizerError, match="quantize.embedding.weight"):
        load_vq(path)
    config.write_text("{")
    with pytest.raises(TokenizerError, match="vq.json"):
        load_vq(path)


def test_bad_configurations_are_named():
    with pytest.raises(TokenizerError, match="did you mean 'base_channels'"):
        vq_config({"base_chanels": 32})
    with pytest.raises(TokenizerError, match="multiple of 32"):
        vq_config(SMALL | {"base_channels": 24})
    with pytest.raises(TokenizerError, match="multiple of 4"):
        vq_config(SMALL | {"resolution": 18})
    with pytest.raises(TokenizerError, match="resolution"):
        vq_config(SMALL | {"resolution": "large"})


def test_a_checkpoint_without_a_decoder_is_told_apart():
    entries = {name: tensor for name, tensor in checkpoint_entries(small()).items() if ".decoder." not in name}
    with pytest.raises(TokenizerError, match="Anole"):
        load_checkpoint_entries(small(), entries, "folder/model.safetensors")
    with pytest.raises(TokenizerError, match="lacks 1 tokenizer entries, first 'quant_conv.bias'"):
        load_checkpoint_entries(small(), {k: v for k, v in small().state_dict().items() if k != "quant_conv.bias"})
