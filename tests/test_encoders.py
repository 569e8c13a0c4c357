"""Each family of open_clip models gives open_clip's own embeddings, and weights come from the hub; without a network.

The models are random, and shrunk through their own configs. The hub is a stand-in on this machine.
"""

import functools
import json
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import numpy as np
import open_clip
import pytest
import timm
import torch
from conftest import TINY_CLIP, one_line, run
from PIL import Image
from safetensors.torch import load_file, save, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from sac_vlmrm import CLIP, check_prompts, drop_text_tower, find_clip

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

HUB_MODEL, HUB_REPO = "MobileCLIP2-S0", "timm/MobileCLIP2-S0-OpenCLIP"  # where open_clip's default tag has its weights


def randomize(model):
    """Gives an initialised model weights that keep the scale of what they see: with its own, all images look alike."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=parameter[0].numel() ** -0.5)


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
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{path}", load_weights=False)
    randomize(model)
    save_file(model.state_dict(), path / "open_clip_model.safetensors")
    return config


def coloured_tiles(height, width):
    """Frames [3, height, width, 3] that even a random model tells apart, other at the sides than in the middle."""
    tiles = np.random.default_rng(0).integers(0, 256, (3, 5, 7, 3), np.uint8)
    return np.stack(
        [np.asarray(Image.fromarray(tile).resize((width, height), Image.Resampling.NEAREST)) for tile in tiles]
    )


def assert_same_and_distinct(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    assert torch.pdist(expected).min() > 0.05  # 5,000 times as much, or the comparison would show little


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

    prompts, images = clip.encode_text(PROMPTS), clip.encode_images(frames)
    for precision, error in (("fp16", 1e-3), ("bf16", 1e-2)):
        half = CLIP(source, "cpu", precision=precision)
        torch.testing.assert_close(half.encode_text(PROMPTS), prompts, rtol=0, atol=error)
        torch.testing.assert_close(half.encode_images(frames), images, rtol=0, atol=error)
    drop_text_tower(clip.model)
    torch.testing.assert_close(clip.encode_images(frames), images, rtol=0, atol=0)


def test_auto_is_half_precision_on_a_gpu_or_bf16_where_that_overflows(tmp_path, monkeypatch):
    monkeypatch.setitem(CLIP.auto, "cpu", CLIP.auto["cuda"])
    assert CLIP(find_clip(TINY_CLIP), "cpu").precision == "fp16"
    shutil.copytree(TINY_CLIP, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "open_clip_model.safetensors")
    weights["visual.bn1.weight"] = weights["visual.bn1.weight"].float() * 1e6
    save_file(weights, tmp_path / "open_clip_model.safetensors")
    clip = CLIP(find_clip(str(tmp_path)), "cpu")
    assert clip.precision == "bf16" and torch.bfloat16 in {p.dtype for p in clip.model.parameters()}
    assert CLIP(find_clip(str(tmp_path)), "cpu", precision="fp16").precision == "fp16"  # as it was asked for


def test_only_prompts_that_the_context_cuts_are_too_long():
    tokenizer = open_clip.SimpleTokenizer(context_length=16, clean="canonicalize")  # as SigLIP's it deletes punctuation
    check_prompts(tokenizer, ["a robot that is kneeling .", "a robot " * 7])  # 14 words, beside the start and the end
    with pytest.raises(ValueError, match="not see its end"):
        check_prompts(tokenizer, ["a robot " * 7 + "that is kneeling"])
    check_prompts(tokenizer, ["a robot " * 6 + "humanoid"])  # two tokens
    with pytest.raises(ValueError, match="not see its end"):
        check_prompts(tokenizer, ["a robot " * 6 + "a humanoid"])  # the second one is cut
    with pytest.raises(FileNotFoundError):  # before any weights are downloaded
        check_prompts(tokenizer, ["no-such-file.png"])


def test_a_folder_may_hold_a_model_of_images_that_are_not_square(tmp_path):
    config = json.loads(Path(TINY_CLIP, "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"] = {
        "image_size": [64, 96],
        "layers": 1,
        "width": 32,
        "head_width": 16,
        "patch_size": 16,
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    save_file(open_clip.model.CLIP(**config["model_cfg"]).state_dict(), tmp_path / "open_clip_model.safetensors")
    clip = CLIP(find_clip(str(tmp_path)), "cpu")
    frames = torch.randint(256, (2, 64, 96, 3), dtype=torch.uint8)
    assert clip.size == (64, 96) and clip.encode_images(frames).shape == (2, config["model_cfg"]["embed_dim"])


def test_a_file_may_hold_the_weights_of_an_architecture_that_open_clip_has_none_of(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "weights.pt").touch()
    assert find_clip("ViT-S-16", str(tmp_path / "weights.pt")).model["model_name"] == "ViT-S-16"
    assert "a file does not tell" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no weights of ViT-S-16"):
        find_clip("ViT-S-16", "openai")


class HubHandler(BaseHTTPRequestHandler):
    """Answers as the Hugging Face hub does: a file has an ETag and a commit, and may be asked for from an offset on."""

    def do_GET(self):
        hub, start = self.server, 0
        hub.asked += 1
        if hub.silent:
            time.sleep(60)  # longer than anyone waits
            return
        body = b"hello" if self.path == "/" else hub.files.get(self.path)
        if "Range" in self.headers:
            start = int(self.headers["Range"].removeprefix("bytes=").split("-")[0])
        self.send_response(404 if body is None else 206 if "Range" in self.headers else 200)
        self.send_header("X-Repo-Commit", "0" * 40)
        if body is None:
            self.send_header("X-Error-Code", "EntryNotFound")
            body = b""
        self.send_header("ETag", f'"{len(body)}"')
        self.send_header("Content-Length", str(len(body) - start))
        if "Range" in self.headers:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[start : len(body) // 2 if hub.cutting else len(body)])

    do_HEAD = do_GET

    def log_message(self, *arguments):
        """Nothing: the tests read what the scripts print."""


@pytest.fixture
def hub():
    with ThreadingHTTPServer(("127.0.0.1", 0), HubHandler) as server:
        server.files, server.cutting, server.silent, server.asked = {}, False, False, 0
        threading.Thread(target=server.serve_forever).start()
        yield server
        server.shutdown()


def train(hub, home, **flags):
    """A training of two phases with --clip NAME alone; of the models on the hub this one is small and quick."""
    flags |= dict(env_id="InvertedPendulum-v5", clip=HUB_MODEL, num_envs=2, episode_length=4, total_timesteps=16)
    flags |= dict(learning_starts=8, batch_size=8, eval_episodes=1, video=False, device="cpu")
    hub_alone = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    return run("sac_vlmrm", env=hub_alone, **flags)


def test_a_file_that_the_hub_lacks_is_one_line(tmp_path, hub):
    assert HUB_REPO in one_line(train(hub, tmp_path / "home", run_dir=tmp_path / "run"))


def test_weights_are_downloaded_whole_and_only_once(tmp_path, hub):
    model = open_clip.create_model(HUB_MODEL, load_weights=False).half()
    hub.files[f"/{HUB_REPO}/resolve/main/open_clip_model.safetensors"] = save(model.state_dict())

    hub.cutting = True  # at the half, however often it is asked to go on from there
    assert HUB_REPO in one_line(train(hub, tmp_path / "home", run_dir=tmp_path / "cut"))

    hub.cutting = False
    start = time.monotonic()
    result = train(hub, tmp_path / "home", run_dir=tmp_path / "first")  # what the cut left behind is no model
    took = time.monotonic() - start
    assert result.returncode == 0, result.stderr

    hub.silent, hub.asked = True, 0  # as behind a firewall: where nothing listens at all, less can go wrong
    start = time.monotonic()
    result = train(hub, tmp_path / "home", run_dir=tmp_path / "second")
    assert result.returncode == 0, result.stderr
    assert hub.asked <= 1 and time.monotonic() - start < took + 10, "it went on asking a hub that does not answer"
