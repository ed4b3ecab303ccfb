"""The real classes of transformers and open_clip with tiny random weights, written to disk in the released layout."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from rewards.detectors.coco import GENEVAL_CLASSES

COCO_AS_RELEASED = [
    {"computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard"}.get(n, n)
    for n in GENEVAL_CLASSES
]


def mask2former(folder: Path, labels=COCO_AS_RELEASED, queries: int = 12, sure: float = 40.0, seed: int = 0) -> Path:
    """`sure` scales the class head: an untrained one is never sure of anything, and nothing would pass a threshold."""
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessor,
        SwinConfig,
    )

    torch.manual_seed(seed)
    backbone = SwinConfig(
        image_size=64,
        patch_size=4,
        embed_dim=12,
        depths=[1, 1, 1, 1],
        num_heads=[1, 2, 3, 6],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=queries,
        id2label=dict(enumerate(labels)),
        label2id={name: i for i, name in enumerate(labels)},
    )
    model = Mask2FormerForUniversalSegmentation(config).eval()
    with torch.no_grad():
        model.class_predictor.weight.mul_(sure)
        dict(model.named_parameters())["model.transformer_module.decoder.mask_predictor.mask_embedder.2.0.weight"].mul_(
            60
        )
    model.save_pretrained(folder)
    Mask2FormerImageProcessor(size={"shortest_edge": 800, "longest_edge": 1333}).save_pretrained(folder)
    return folder


def open_clip_model(folder: Path, quick_gelu: bool = True, seed: int = 0) -> Path:
    """A CLIP of open_clip: its own tokenizer, 2 layers a tower, 32 px."""
    import open_clip
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    config = {
        "embed_dim": 16,
        "quick_gelu": quick_gelu,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2},
    }
    folder.mkdir(parents=True, exist_ok=True)
    model = open_clip.CLIP(**{k: v for k, v in config.items() if k != "quick_gelu"}, quick_gelu=quick_gelu)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(
        json.dumps(
            {
                "model_cfg": config,
                "preprocess_cfg": {
                    "mean": [0.48145466, 0.4578275, 0.40821073],
                    "std": [0.26862954, 0.26130258, 0.27577711],
                    "interpolation": "bicubic",
                    "resize_mode": "shortest",
                },
            }
        )
    )
    return folder


def clip_tokenizer(folder: Path) -> Path:
    """CLIP's tokenizer files over letters and a few words."""
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz0123456789,.!-'"
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    return folder


def clip(folder: Path, seed: int = 0) -> Path:
    """CLIPModel of transformers with tokenizer and image processor; PickScore's layout too."""
    from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel

    torch.manual_seed(seed)
    clip_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 24,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def grounding_dino(folder: Path, words=(), seed: int = 0) -> Path:
    from transformers import (
        BertConfig,
        BertTokenizer,
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        GroundingDinoImageProcessor,
        SwinConfig,
    )

    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        ".",
        "?",
        *words,
        *letters,
        *("##" + letter for letter in letters),
    ]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    text = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
    )
    backbone = SwinConfig(
        image_size=32,
        patch_size=4,
        embed_dim=12,
        depths=[1, 1, 1],
        num_heads=[1, 2, 3],
        window_size=4,
        out_features=["stage2", "stage3"],
    )
    config = GroundingDinoConfig(
        backbone_config=backbone,
        text_config=text,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=9,
        num_feature_levels=3,
        max_text_len=32,
    )
    GroundingDinoForObjectDetection(config).eval().save_pretrained(folder)
    GroundingDinoImageProcessor(size={"shortest_edge": 48, "longest_edge": 80}).save_pretrained(folder)
    return folder


def owlv2(folder: Path, seed: int = 0) -> Path:
    from transformers import AutoTokenizer, Owlv2Config, Owlv2ForObjectDetection, Owlv2ImageProcessor

    torch.manual_seed(seed)
    clip_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 32,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 48,
        "patch_size": 16,
    }
    Owlv2ForObjectDetection(
        Owlv2Config(text_config=text, vision_config=vision, projection_dim=16)
    ).eval().save_pretrained(folder)
    Owlv2ImageProcessor(size={"height": 48, "width": 48}).save_pretrained(folder)
    return folder
