"""Each family of open_clip models gives open_clip's own embeddings, and weights come from the hub; without a network.

The models are random, and shrunk through their own configs. The hub is a stand-in on this machine.
"""

import functools
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import numpy as np
import open_clip
import pytest
import timm
import torch
from conftest import one_line, run
from PIL import Image
from safetensors.torch import save, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from sac_vlmrm import CLIP, find_clip

PROMPTS = ["a humanoid robot kneeling", "a Humanoid robot, lying on its back", "pole and cart"]
VIT = dict(width=64, head_width=32, layers=2)
TEXT = dict(width=64, heads=2, layers=2)
TIMM_VIT = dict(embed_dim=96, num_heads=3, depth=2)

# Architecture, tag of its weights, and what is made smaller: in `vision_cfg`, and in timm's model, which open_clip
# names only. Text towers are cut to TEXT; image sizes and patches stay except where vision_cfg has an image_size.
FAMILIES = {
    "OpenAI RN50": ("RN50", "openai", dict(width=16, layers=[1, 1, 1, 1]), {}),
    "OpenAI ViT": ("ViT-B-32", "openai", VIT, {}),
    "LAION ViT-H": ("ViT-H-14", "laion2b_s32b_b79k", VIT | dict(image_size=56), {}),
    "DFN ViT-H": ("ViT-H-14-378-quickgelu", "dfn5b", VIT, {}),
    "SigLIP2": ("ViT-B-32-SigLIP2-256", "webli", {}, TIMM_VIT),
    "PE-Core": ("PE-Core-T-16-384", "meta", {}, TIMM_VIT),
    "CoCa": ("coca_ViT-B-32", "laion2b_s13b_b90k", VIT | dict(attn_pooler_heads=2), {}),
    "MobileCLIP2": ("MobileCLIP2-S0", "dfndr2b", {}, dict(layers=(1, 1, 1, 1))),
    "EVA": ("EVA02-B-16", "merged2b_s8b_b131k", {}, TIMM_VIT),
}


def randomize(model):
    """Random weights for an initialised model: as they are, it would embed all images almost alike."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=1.5 * parameter[0].numel() ** -0.5)


def save_tokenizer(path):
    """A tokenizer like SigLIP2's, which is Gemma's with <eos> behind the prompt, of single characters."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *"▁abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.add_special_tokens(tokens[:5])
    tokenizer.post_processor = processors.TemplateProcessing("$A <eos>", special_tokens=[("<eos>", 1)])
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "GemmaTokenizer", "add_bos_token": False, "add_eos_token": True}
    config |= {"padding_side": "right", "pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))


def save_family(path, architecture, tag, vision):
    """A random model of an architecture, smaller, in open_clip's layout of a directory; returns its model_cfg."""
    config, preprocess = open_clip.get_model_config(architecture), open_clip.get_pretrained_cfg(architecture, tag)
    config["vision_cfg"] |= vision
    config["text_cfg"] |= TEXT
    if "multimodal_cfg" in config:  # CoCa's decoder of captions
        config["multimodal_cfg"] |= TEXT | {"attn_pooler_heads": 2}
    if "hf_tokenizer_name" in config["text_cfg"]:
        config["text_cfg"] |= {"hf_tokenizer_name": str(path), "vocab_size": 32}
        save_tokenizer(path)
    saved = config | {"quick_gelu": preprocess.get("quick_gelu", False)}
    preprocess = {name: preprocess[name] for name in ("mean", "std", "interpolation", "resize_mode")}
    preprocess["size"] = config["vision_cfg"]["image_size"]
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": saved, "preprocess_cfg": preprocess}))
    model = open_clip.create_model(f"local-dir:{path}", load_weights=False)
    randomize(model)
    save_file(model.state_dict(), path / "open_clip_model.safetensors")
    return config


def coloured_tiles(height, width):
    """Frames [3, height, width, 3] that even a random model tells apart, other at the sides than in the middle."""
    tiles = np.random.default_rng(0).integers(0, 256, (3, 5, 7, 3), np.uint8)
    return np.stack([np.asarray(Image.fromarray(tile).resize((width, height), Image.Resampling.NEAREST)) for tile in tiles])


def assert_same_and_distinct(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    cosines = (expected @ expected.T)[~torch.eye(len(expected), dtype=bool)]
    assert cosines.max() < 0.98, cosines  # else the comparison would show nothing


@pytest.mark.parametrize("architecture,tag,vision,trunk", FAMILIES.values(), ids=FAMILIES.keys())
def test_embeddings_of_each_family_are_open_clips_own(tmp_path, monkeypatch, architecture, tag, vision, trunk):
    monkeypatch.setattr(timm, "create_model", functools.partial(timm.create_model, **trunk))
    config = save_family(tmp_path, architecture, tag, vision)
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    model.eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path}")(PROMPTS)

    # By its name, open_clip's tables of architectures and of weights decide instead of what is in the directory.
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, architecture, config)
    weights = open_clip.get_pretrained_cfg(architecture, tag)
    monkeypatch.setitem(weights, "file", str(tmp_path / "open_clip_model.safetensors"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # find_clip sets it: put it back afterwards
    for source in (find_clip(str(tmp_path)), find_clip(architecture, tag)):
        clip = CLIP(source, "cpu", precision="fp32")
        with torch.no_grad():
            assert_same_and_distinct(clip.encode_text(PROMPTS), model.encode_text(tokens, normalize=True))
            for size in (clip.size, (120, 200)):
                frames = coloured_tiles(*size)
                images = torch.stack([transform(Image.fromarray(frame)) for frame in frames])
                assert_same_and_distinct(clip.encode_images(frames), model.encode_image(images, normalize=True))
