"""The tests: every number is compared with something independent. `pytest` runs them on a CPU, without a network.

The models are small random ones in the real formats, loaded by the same code as the real ones: a ViT and a SigLIP as
open_clip folders, a Stable Diffusion as a diffusers folder.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before the libraries read it: nothing here waits for a hub
os.environ["OMP_NUM_THREADS"] = "1"  # the models are too small to share out

# ruff: noqa: E402
import base64
import contextlib
import csv
import html.parser
import io
import json
import math
import multiprocessing
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import xml.etree.ElementTree
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
import transformers
from PIL import Image

sys.path[:0] = [str(Path(__file__).parent / folder) for folder in ("miniature", "extras")]

import bench
import condition
import data
import evaluate_mmvp
import export
import extras.log
import make
import model
import train
from extras import report

ROOT = Path(__file__).parent
WORDS = ["a", "photo", "of", "red", "blue", "cat", "dog", "left", "right", "one", "two"]


# ---------------------------------------------------------------------------------------------------------------------
# Small models in the real formats


def write_tokenizer(folder: Path, length: int) -> None:
    """A word-level tokenizer that transformers reads; the end token has the highest id, as CLIP's pooling needs."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", "<start>", *WORDS, "<end>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [("<start>", vocabulary["<start>"]), ("<end>", vocabulary["<end>"])]
    tokenizer.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=ends)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<start>",
        eos_token="<end>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=length,
    ).save_pretrained(folder)


def write_clip(folder: Path, embed_dim: int, vision: dict, text: dict | None = None, **more) -> Path:
    """A CLIP as an open_clip folder, with random weights and preprocessing numbers of its own."""
    base = dict(context_length=12, vocab_size=len(WORDS) + 4, width=24, heads=2, layers=1, hf_tokenizer_name="own")
    config = dict(embed_dim=embed_dim, vision_cfg=vision, text_cfg=base | (text or {}), **more)
    folder.mkdir()
    own = dict(mean=[0.4, 0.5, 0.6], std=[0.2, 0.25, 0.3], interpolation="bicubic", resize_mode="squash")
    (folder / "open_clip_config.json").write_text(json.dumps(dict(model_cfg=config, preprocess_cfg=own)))
    write_tokenizer(folder, 12)
    torch.manual_seed(1)
    with model.quiet():
        clip = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    from safetensors.torch import save_file

    save_file(clip.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def write_diffusion(folder: Path, prediction_type: str = "epsilon") -> Path:
    """A Stable Diffusion as a diffusers folder: latents of 1/4 of the side, a text of 9 positions."""
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(2)
    sides = dict(block_out_channels=(8, 8, 8), layers_per_block=1, norm_num_groups=2)
    AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3, sample_size=32, **sides
    ).save_pretrained(folder / "vae")
    UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=2,
        cross_attention_dim=20,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).save_pretrained(folder / "unet")
    schedule = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type)
    DDPMScheduler(**schedule).save_pretrained(folder / "scheduler")
    write_tokenizer(folder / "tokenizer", 9)
    text = CLIPTextConfig(
        vocab_size=len(WORDS) + 4,
        hidden_size=20,
        intermediate_size=20,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=9,
        bos_token_id=2,
        eos_token_id=len(WORDS) + 3,
    )
    CLIPTextModel(text).save_pretrained(folder / "text_encoder")
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """A folder with `vit`, `siglip`, `epsilon` and `v_prediction`."""
    folder = tmp_path_factory.mktemp("models")
    vit = dict(image_size=16, patch_size=4, width=24, layers=2, head_width=12)
    write_clip(folder / "vit", 24, vit)
    siglip = dict(
        image_size=160, timm_model_name="test_vit", timm_model_pretrained=False, timm_pool="map", timm_proj="none"
    )
    write_clip(folder / "siglip", 64, siglip, custom_text=True, init_logit_bias=-10)
    for prediction_type in ("epsilon", "v_prediction"):
        write_diffusion(folder / prediction_type, prediction_type)
    return folder


def arguments(models: Path, out: Path, *more: str) -> list[str]:
    """The command line of a small run on noise."""
    return [
        "--recipe",
        "openai-vit-l-14-224",
        "--clip",
        f"{models}/vit",
        "--diffusion",
        f"{models}/epsilon",
        "--data",
        "synthetic",
        "--recap",
        "random:50%",
        "--join",
        "mean",
        "--steps",
        "3",
        "--batch-size",
        "4",
        "--micro-batch",
        "4",
        "--lr",
        "0.1",
        "--workers",
        "0",
        "--out",
        f"{out}",
        *more,
    ]


def run(models: Path, out: Path, *more: str) -> Path:
    """A small run in this process."""
    train.train(train.parse_args(arguments(models, out, *more)))
    return out


@pytest.fixture(autouse=True)
def nothing_is_left():
    """A run that was refused or stopped ends its process, with its group and its handlers; here the process goes on."""
    handlers = [signal.getsignal(number) for number in extras.log.SIGNALS]
    yield
    for number, handler in zip(extras.log.SIGNALS, handlers):
        signal.signal(number, handler)
    if train.dist.is_initialized():
        train.dist.destroy_process_group()


def weights(out: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(out / "checkpoint" / "weights.safetensors")


# ---------------------------------------------------------------------------------------------------------------------
# condition.py: Algorithm 1, lines 2 and 3


@pytest.mark.parametrize("name", ["vit", "siglip"])
def test_tokens_are_clips_own(models, name):
    clip = model.load_clip(f"{models}/{name}")
    images = torch.randn(3, 3, clip.image_size, clip.image_size)
    with torch.no_grad():
        cls, local = condition.visual_tokens(clip.model.visual, images)
        assert torch.equal(cls, clip.model.encode_image(images))  # to the last bit
        if name == "vit":
            clip.model.visual.output_tokens = True  # open_clip's other way to the tokens, before the projection
            expected = clip.model.visual(images)[1] @ clip.model.visual.proj
        else:
            trunk = clip.model.visual.trunk
            expected = trunk.forward_features(images)[:, trunk.num_prefix_tokens :]
    assert torch.equal(local, expected)
    assert local.shape[1] == condition.count_patches(clip.model.visual)


def test_other_towers_are_refused(tmp_path):
    vit = dict(image_size=16, patch_size=4, width=24, layers=2, head_width=12, pool_type="avg")
    with pytest.raises(SystemExit, match="neither a ViT with a class token"):
        model.load_clip(str(write_clip(tmp_path / "avg", 24, vit)))
    timm = dict(image_size=160, timm_model_name="test_vit", timm_pool="map", timm_proj="")  # projects inside the trunk
    with pytest.raises(SystemExit, match="neither a ViT with a class token"):
        model.load_clip(str(write_clip(tmp_path / "head", 24, timm, custom_text=True)))


class NoInit(torch.overrides.TorchFunctionMode):
    """Leaves new weights unwritten, so that a tower on its way to the meta device costs neither time nor memory."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function.__name__ in (
            "normal_",
            "uniform_",
            "trunc_normal_",
            "kaiming_uniform_",
            "xavier_uniform_",
            "erfinv_",
            "fill_",
        ):
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def test_every_recipe_has_the_papers_tokens():
    tokens = {
        "openai-vit-l-14-224": (256, 77),
        "openai-vit-l-14-336": (576, 77),
        "metaclip-vit-l-14-224": (256, 257),
        "metaclip-vit-h-14-224": (256, 257),
        "siglip-so400m-14-224": (256, 43),
        "siglip-so400m-14-384": (729, 73),
        "dfn-vit-h-14-224": (256, 257),
        "dfn-vit-h-14-378": (729, 365),
    }
    assert set(tokens) == set(model.RECIPES) - {"miniature"}
    towers = {}
    for name, (patches, count) in tokens.items():
        recipe = model.RECIPES[name]
        source, tag = model.locate_clip(name)
        assert tag in open_clip.list_pretrained_tags_by_model(source)
        if source not in towers:
            with NoInit():
                clip = model.load_clip(name, random_weights=True, device="meta")
            images = torch.empty(1, 3, clip.image_size, clip.image_size, device="meta")
            towers[source] = condition.visual_tokens(clip.model.visual, images)[1].shape[1]
            assert towers[source] == condition.count_patches(clip.model.visual)
        assert towers[source] == recipe.patches == patches
        assert model.parse_recap(recipe.recap, patches).count + 1 == count
        assert (recipe.join == "positions") == (count == 77)
        assert np.isclose(
            np.mean(evaluate_mmvp.BASELINES[name]), recipe.published[0], atol=0.06
        )  # the paper's average of its types


def test_recap_is_uniform_and_without_replacement():
    rng = np.random.default_rng(0)
    patches = np.stack([condition.draw_patches(20, 5, 2, rng) for _ in range(4000)])  # (images, states, K)
    assert patches.shape == (4000, 2, 5)
    assert all(len(set(state)) == 5 for image in patches for state in image)
    counts = np.bincount(patches.ravel(), minlength=20)  # each of 20 patches: 8,000 draws of 5 of 20
    assert abs(counts - 2000).max() < 5 * math.sqrt(8000 * 0.25 * 0.75)
    together = (patches == 3).any(-1) & (patches == 7).any(-1)  # and each pair of them: 5 · 4 / (20 · 19)
    assert abs(together.mean() - 1 / 19) < 5 * math.sqrt(1 / 19 / 8000)
    assert (patches[:, 0] == patches[:, 1]).all(-1).mean() < 0.01  # drawn afresh for each state


def test_recap_takes_the_tokens_it_names():
    cls, local = torch.randn(2, 4), torch.randn(2, 7, 4)
    drawn = torch.tensor([[[6, 1], [0, 2]], [[3, 4], [5, 6]]])
    random = condition.dense_recap(cls, local, drawn, 1)
    assert torch.equal(random[1, 0], torch.stack([cls[1], local[1, 3], local[1, 4]]))
    pooled = condition.dense_recap(cls, local, None, 3)  # 7 patches: two windows, the seventh is dropped
    assert pooled.shape == (2, 1, 3, 4)
    torch.testing.assert_close(pooled[:, 0, 1:], torch.nn.functional.avg_pool1d(local.mT, 3, 3).mT)
    assert torch.equal(condition.dense_recap(cls, local, None, 1)[:, 0], torch.cat([cls[:, None], local], 1))
    assert torch.equal(condition.dense_recap(cls, local, drawn[..., :0], 1), cls[:, None, None].expand(2, 2, 1, 4))


def test_a_fitted_projection_carries_words_to_their_states():
    """Beside NumPy's least squares, and exactly where the states are linear in the embeddings and tokens are words."""
    rng = np.random.default_rng(0)
    phrases = rng.standard_normal((500, 6)) * 3 + rng.standard_normal(6)
    states = phrases @ rng.standard_normal((6, 5)) + rng.standard_normal(5)
    noisy = states + rng.standard_normal(states.shape)
    spread = phrases.var(0, ddof=1).mean() ** 0.5
    for targets in (states, noisy):
        projection = torch.nn.Linear(6, 5).double()
        condition.fit_projection(projection, *(torch.from_numpy(a) for a in (phrases, targets, phrases * 7 + 1)))
        x = (phrases - phrases.mean(0)) / spread
        rows = np.concatenate([x, np.sqrt(0.01 * 500) * np.eye(6)])  # ridge as further rows that should give zero
        weight = np.linalg.lstsq(rows, np.concatenate([targets - targets.mean(0), np.zeros((6, 5))]), rcond=None)[0]
        found = projection(torch.from_numpy(phrases * 7 + 1)).detach().numpy()  # tokens of another mean and spread
        np.testing.assert_allclose(found, x @ weight + targets.mean(0), atol=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# The loss and its gradient: Algorithm 1, lines 2 to 5


def algorithm_1(
    clip, diffusion, module, recap: str, join: str, images, latents, drawn, prediction: str
) -> torch.Tensor:
    """The paper's algorithm, written out image by image and state by state, in the precision of its arguments."""
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2  # SD's schedule, from its formula
    visual, losses = clip.visual, []
    for b, image in enumerate(images):
        pooled = clip.encode_image(image[None])[0]
        if hasattr(visual, "trunk"):
            local = visual.trunk.forward_features(image[None])[0, visual.trunk.num_prefix_tokens :]
        else:
            visual.output_tokens = True
            local = visual(image[None])[1][0] @ visual.proj
            visual.output_tokens = False
        for n, t in enumerate(drawn["timesteps"][b].tolist()):
            if recap == "pool:5":
                tokens = [local[i : i + 5].mean(0) for i in range(0, len(local) - 4, 5)]
            elif recap == "all":
                tokens = list(local)
            else:
                tokens = [local[i] for i in drawn["patches"][b, n].tolist()]
            tokens = torch.stack([pooled, *tokens]) @ module.projection.weight.T + module.projection.bias
            text = diffusion.text[0] if join == "positions" else diffusion.text[0].mean(0)
            alpha_bar = torch.prod(1 - beta[: t + 1])
            z, noise = latents[b], drawn["noise"][b, n]
            z_t = alpha_bar.sqrt() * z + (1 - alpha_bar).sqrt() * noise
            target = noise if prediction == "epsilon" else alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * z
            output = diffusion.unet(z_t[None].to(text), torch.tensor([t]), (tokens + text)[None]).sample[0]
            losses.append(((output - target) ** 2).mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize(
    "name, recap, join, prediction",
    [
        ("vit", "random:50%", "mean", "epsilon"),
        ("vit", "random:8", "positions", "v_prediction"),  # 1 + 8 tokens, as many as the text has positions
        ("vit", "all", "mean", "v_prediction"),
        ("siglip", "pool:5", "mean", "epsilon"),
        ("vit", "none", "mean", "epsilon"),
    ],
)
def test_loss_and_gradients_are_algorithm_1(models, name, recap, join, prediction):
    clip = model.load_clip(f"{models}/{name}")
    diffusion = model.load_diffusion(f"{models}/{prediction}", "a red cat", torch.float32, "cpu")
    patches = condition.count_patches(clip.model.visual)
    parsed = model.parse_recap(recap, patches)
    module = condition.VisualCondition(clip, diffusion, parsed, join, seed=3)
    rng = np.random.default_rng(4)
    drawn = [train.draw(rng, (3, *diffusion.latent_shape(32)), 1000, patches, parsed) for _ in range(2)]
    drawn = {key: torch.from_numpy(np.stack([d[key] for d in drawn])) for key in drawn[0]}
    pixels = torch.rand(2, 3, 32, 32)
    images, latents = clip.view(pixels), diffusion.encode(pixels)

    c = module(images, diffusion.text, drawn.get("patches"))
    loss = train.denoising_loss(diffusion, latents, c, drawn["timesteps"], drawn["noise"])
    loss.backward()
    gradients = {k: p.grad.double() for k, p in module.named_parameters()}

    module.double().zero_grad()
    diffusion.unet.double()
    diffusion.text = diffusion.text.double()
    exact = {k: v.double() if v.is_floating_point() else v for k, v in drawn.items()}
    expected = algorithm_1(
        clip.model, diffusion, module, recap, join, images.double(), latents.double(), exact, prediction
    )
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    largest = max(p.grad.norm() for p in module.parameters())
    for k, p in module.named_parameters():
        assert (gradients[k] - p.grad).norm() <= 1e-4 * p.grad.norm() + 1e-6 * largest, k
    assert all(p.grad is None for p in [*diffusion.unet.parameters(), *diffusion.vae.parameters()])


def test_condition_in_bf16_is_near_fp32(models):
    clip = model.load_clip(f"{models}/vit")
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        diffusion = model.load_diffusion(f"{models}/epsilon", "", dtype, "cpu")
        module = condition.VisualCondition(clip, diffusion, model.parse_recap("all", 16), "mean", seed=0)
        torch.manual_seed(5)
        pixels, noise, t = torch.rand(4, 3, 32, 32), torch.randn(4, 2, 4, 8, 8), torch.randint(0, 1000, (4, 2))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            c = module(clip.view(pixels), diffusion.text)
        losses.append(train.denoising_loss(diffusion, diffusion.encode(pixels), c, t, noise))
        assert losses[-1].dtype == torch.float32 and diffusion.unet.dtype == dtype
        losses[-1].backward()
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in module.parameters())
        module.zero_grad()
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=0.01)


def test_text_embedding_and_latents_are_diffusers(models):
    """Beside diffusers' own pipeline: the prompt's embedding, and the VAE's mean times the scaling factor."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import AutoTokenizer, CLIPTextModel

    folder = models / "epsilon"
    diffusion = model.load_diffusion(str(folder), "a red cat", torch.float32, "cpu")
    parts = dict(vae=AutoencoderKL, unet=UNet2DConditionModel, tokenizer=AutoTokenizer, text_encoder=CLIPTextModel)
    parts = {name: part.from_pretrained(folder, subfolder=name) for name, part in parts.items()}
    pipe = StableDiffusionPipeline(
        **parts, scheduler=None, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    prompt, _ = pipe.encode_prompt("a red cat", "cpu", 1, False)
    torch.testing.assert_close(diffusion.text, prompt)
    pixels = torch.rand(2, 3, 32, 32)
    moments = parts["vae"].quant_conv(parts["vae"].encoder(pixels * 2 - 1))
    torch.testing.assert_close(diffusion.encode(pixels), moments[:, :4] * 0.18215)


def test_clips_view_is_its_own_preprocessing(models):
    """Pillow's bicubic resize and the folder's own numbers, within the rounding of Pillow's 8 bits."""
    clip = model.load_clip(f"{models}/vit")
    image = Image.effect_mandelbrot((48, 48), (-2, -1.5, 1, 1.5), 30).convert("RGB")
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    rounding = 2.5 / 255 / torch.tensor([0.2, 0.25, 0.3])[:, None, None]  # it rounds twice, after rows and columns
    assert ((clip.view(pixels)[0] - clip.preprocess()(image)).abs() < rounding).all()


# ---------------------------------------------------------------------------------------------------------------------
# data.py


def jpeg(image: Image.Image, **more) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **more)
    return buffer.getvalue()


def write_shard(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def test_shards_read_what_tarfile_reads(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    shards, expected = [], []
    for s in range(3):
        files = {}
        for i in range(4):
            key = f"{s:05}{i:04}" + "long" * 40 * (i == 2)  # a name beyond 100 bytes takes another header
            files |= {
                f"{key}.jpg": rng.bytes(int(rng.integers(1, 2000))),
                f"{key}.txt": b"caption",
                f"{key}.json": b"{}",
            }
        shards.append(str(write_shard(tmp_path / f"{s:05}.tar", files)))
        with tarfile.open(shards[-1]) as tar:
            expected += [tar.extractfile(m).read() for m in tar.getmembers() if m.name.endswith(".jpg")]
    images = data.open_images([f"{tmp_path}/*.tar"])
    assert [images.read(i) for i in range(len(images))] == expected

    monkeypatch.setattr(tarfile, "open", None)  # from here on the cache must do
    assert np.array_equal(data.open_images(shards).members, images.members)
    cache = Path(shards[0] + ".index.npy")
    cache.write_bytes(cache.read_bytes()[:100])  # cut short: made again, with tarfile
    monkeypatch.undo()
    assert np.array_equal(data.open_images(shards).members, images.members)
    write_shard(Path(shards[0]), {"a.png": b"12345"})  # changed: made again
    assert data.open_images(shards).read(0) == b"12345" and len(data.open_images(shards)) == 9

    cache.unlink()
    cache.mkdir()  # no cache can be written beside the shard: it goes to the user's cache folder
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert data.open_images(shards).read(0) == b"12345"
    assert len(list((tmp_path / "home" / "diva").glob("*.npy"))) == 1


def test_a_folder_is_read_recursively(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("z.jpg", "a/x.PNG", "a/b/y.webp", "a/notes.txt", "a/._x.png"):
        (tmp_path / name).write_bytes(name.encode())
    files = data.open_images([str(tmp_path)])
    assert [files.read(i) for i in range(len(files))] == [b"a/b/y.webp", b"a/x.PNG", b"z.jpg"]


def test_images_come_out_as_a_person_sees_them():
    ramp = np.linspace(0, 255, 64, dtype=np.uint8)[None].repeat(64, 0)  # dark on the left, light on the right
    grey = Image.fromarray(ramp)
    see = {
        "L": grey, "RGB": grey.convert("RGB"), "CMYK": grey.convert("RGB").convert("CMYK"), "P": grey.convert("P"),
        "1": grey.point(lambda v: 255 * (v > 127)).convert("1"), "LA": grey.convert("LA"),
        "I;16": Image.fromarray(ramp.astype(np.uint16) * 257),
    }  # fmt: skip
    for mode, image in see.items():
        rgb = data.to_rgb(image)
        expected = ramp if mode != "1" else 255 * (ramp > 127)
        assert rgb.mode == "RGB" and np.abs(np.asarray(rgb).mean(-1) - expected).max() <= 1, mode

    with pytest.raises(ValueError, match="does not say what is white"):
        data.to_rgb(Image.fromarray(ramp.astype(np.float32)))

    mask = Image.fromarray(255 * np.eye(64, dtype=np.uint8))  # opaque on the diagonal alone: the rest is white
    transparent = grey.convert("RGBA")
    transparent.putalpha(mask)
    assert np.array_equal(np.asarray(data.to_rgb(transparent))[..., 0], np.where(np.eye(64), ramp, 255))
    palette = Image.fromarray((ramp > 127).astype(np.uint8), "P")
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.info["transparency"] = 0  # the left half
    assert np.asarray(data.to_rgb(palette))[0, [0, 63]].tolist() == [[255, 255, 255], [0, 0, 255]]

    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: a viewer shows it rotated by 90° clockwise
    turned = data.to_rgb(Image.open(io.BytesIO(jpeg(grey, exif=exif, quality=95))))
    assert np.abs(np.asarray(turned)[..., 0].astype(int) - np.rot90(ramp, -1)).max() < 8


def test_crops_have_the_papers_area_and_ratio(monkeypatch):
    rng = np.random.default_rng(0)
    for width, height in ((500, 375), (375, 500), (1000, 200), (64, 64)):
        boxes = np.array([data.random_crop_box(width, height, rng) for _ in range(500)])
        w, h = (boxes[:, 2:] - boxes[:, :2]).T
        assert boxes.min() >= 0 and boxes.max() <= 1 + 1e-9
        ratio = w * width / (h * height)
        assert ratio.min() > 3 / 4 - 1e-9 and ratio.max() < 4 / 3 + 1e-9
        if width != 1000:  # that one is too wide for the area: its largest centred crop
            assert (w * h).min() > 0.9 - 1e-9 or width == 64
    # One resize from a JPEG decoded at a fraction of its size, beside a crop and a resize of the whole.
    image = Image.effect_mandelbrot((1600, 1200), (-2, -1.5, 1, 1.5), 100).convert("RGB")
    box = (0.05, 0.02, 0.97, 0.99)
    monkeypatch.setattr(data, "random_crop_box", lambda width, height, rng: box)
    crop = data.decode_crop(jpeg(image, quality=95), 128, rng).permute(1, 2, 0).numpy()
    whole = image.crop((80, 24, 1552, 1188)).resize((128, 128), Image.Resampling.BICUBIC)
    assert np.abs(crop.astype(int) - np.asarray(whole)).mean() < 3


def test_draws_depend_on_seed_step_and_position_alone(tmp_path):
    image = Image.effect_noise((40, 40), 90).convert("RGB")
    files = {f"{i}.jpg": jpeg(image.rotate(30 * i)) for i in range(5)}
    source = data.open_images([str(write_shard(tmp_path / "0.tar", files))])

    def draw(rng):
        return train.draw(rng, (2, 4, 8, 8), 1000, 16, model.parse_recap("random:8", 16))

    def read(micro_batch: int, processes: int, workers: int, seed: int = 0) -> dict:
        """Every item of steps 1 and 2 of a batch of 4, by step and position."""
        found = {}
        for rank in range(processes):
            images = data.TrainingImages(source, 32, 4, seed, draw)
            keys = list(data.micro_batches(1, 3, 4, micro_batch, rank, processes))
            for batch_keys, batch in zip(
                keys,
                data.DataLoader(images, batch_sampler=keys, collate_fn=data.collate, num_workers=workers),
                strict=True,
            ):
                for i, key in enumerate(batch_keys):
                    found[key] = [batch[k][i] for k in ("images", "timesteps", "noise", "patches")]
        return found

    one = read(4, 1, 0)
    assert sorted(one) == [(step, position) for step in (1, 2) for position in range(4)]
    for other in (read(1, 2, 0), read(2, 1, 2)):
        assert all(torch.equal(a, b) for key in one for a, b in zip(one[key], other[key], strict=True))
    changed = read(4, 1, 0, seed=1)
    assert not any(torch.equal(one[key][2], changed[key][2]) for key in one)
    noises = torch.stack([item[2] for item in one.values()])
    assert len(noises.flatten(1).unique(dim=0)) == 8  # no two images share their noise

    t = np.concatenate([draw(np.random.default_rng(i))["timesteps"] for i in range(10_000)])
    assert t.min() == 0 and t.max() == 999 and abs(t.mean() - 499.5) < 5 * 1000 / math.sqrt(12 * 20_000)
    assert noises.mean().abs() < 5 / math.sqrt(noises.numel()) and abs(noises.std() - 1) < 0.05

    order = data.TrainingImages(source, 32, 4)
    seen = [order.index(*divmod(i, 4)) for i in range(10)]  # 2.5 steps are two epochs of 5 images
    assert sorted(seen[:5]) == sorted(seen[5:]) == [0, 1, 2, 3, 4] and seen[:5] != seen[5:]


def test_unreadable_images_are_replaced_and_too_many_stop_the_run(models, tmp_path):
    good = jpeg(Image.effect_noise((40, 40), 90).convert("RGB"))
    broken = {"empty": b"", "text": b"not an image", "cut": good[: len(good) // 2]}
    files = {f"{i:03}.jpg": good for i in range(60)} | {f"1{name}.jpg": content for name, content in broken.items()}
    folder = tmp_path / "few"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    run(models, tmp_path / "run", "--data", str(folder), "--steps", "21", "--batch-size", "6", "--micro-batch", "6")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    images = data.TrainingImages(data.open_images([str(folder)]), 32, 6)
    order = [images.index(*divmod(i, 6)) for i in range(126)]
    following = {60: 2, 61: 2, 62: 1}  # the broken ones are the last three: one, then three further is tried
    assert lines[-1]["unreadable"] == sum(following.get(i, 0) for i in order) == 10

    for name in list(files)[:9]:
        (folder / name).write_bytes(b"")
    with pytest.raises(SystemExit, match=r"step \d+: \d+ of \d+ images could not be read: .*\(Unidentified"):
        run(
            models, tmp_path / "run2", "--data", str(folder), "--steps", "21", "--batch-size", "6", "--micro-batch", "6"
        )
    train.dist.destroy_process_group()


def test_shards_that_change_while_they_are_read_are_passed_over(models, tmp_path, monkeypatch):
    """Of sixty shards one is removed, one cut short, one replaced in the middle of a run: counted, replaced, named."""
    good = [jpeg(Image.effect_noise((40, 40), 90).convert("RGB").rotate(90 * i)) for i in range(4)]
    for s in range(60):
        write_shard(tmp_path / f"{s:02}.tar", {f"{i}.jpg": content for i, content in enumerate(good)})
    loss, calls = train.denoising_loss, []

    def harm(*args):
        calls.append(1)
        if len(calls) == 11:
            (tmp_path / "03.tar").unlink()
            with open(tmp_path / "07.tar", "r+b") as shard:
                shard.truncate(2000)
            write_shard(tmp_path / "11.tar", {"0.txt": b"caption" * 100, "1.jpg": good[0]})
        return loss(*args)

    monkeypatch.setattr(train, "denoising_loss", harm)
    run(models, tmp_path / "run", "--data", f"{tmp_path}/*.tar", "--steps", "60", "--save-every", "60")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    names = [name for line in lines for name in line.get("passed_over", [])]
    assert lines[10]["unreadable"] == 0 and lines[-1]["unreadable"] == len(names) > 8
    assert {Path(name.split(" at byte")[0]).name for name in names} == {"03.tar", "07.tar", "11.tar"}
    with pytest.raises(SystemExit, match="its run has 240 images, --data now 233"):
        write_shard(tmp_path / "07.tar", {f"{i}.jpg": content for i, content in enumerate(good)})
        run(models, tmp_path / "run", "--data", f"{tmp_path}/*.tar", "--steps", "60", "--save-every", "60")
    train.dist.destroy_process_group()


def test_no_picture_is_too_odd_to_be_counted(tmp_path):
    """One pixel, a thread of pixels, and a header that promises 900 million of them."""
    for size in ((1, 1), (3000, 1), (1, 3000)):
        buffer = io.BytesIO()
        Image.new("L", size, 77).save(buffer, "PNG")
        assert (data.decode_crop(buffer.getvalue(), 32, np.random.default_rng(0)) == 77).all()
    buffer = io.BytesIO()
    Image.new("L", (1, 1)).save(buffer, "PNG")
    header = b"IHDR" + (30_000).to_bytes(4) * 2 + buffer.getvalue()[24:29]
    bomb = buffer.getvalue()[:12] + header + zlib.crc32(header).to_bytes(4) + buffer.getvalue()[33:]
    (tmp_path / "0.png").write_bytes(bomb)
    (tmp_path / "1.png").write_bytes(buffer.getvalue())
    images = data.TrainingImages(data.open_images([str(tmp_path)]), 32, 2)
    found = [images[0, position] for position in (0, 1)]
    assert sum(len(item["unreadable"]) for item in found) == 1
    assert [name for item in found for name in item["unreadable"]][0].startswith(f"{tmp_path}/0.png (Decompression")


def test_members_that_point_elsewhere_are_ignored(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in ("../up.jpg", "/abs.jpg", "a/../../b.jpg", "a/in.jpg"):
            member = tarfile.TarInfo(name)
            member.size = 3
            tar.addfile(member, io.BytesIO(name[:3].encode()))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
            member = tarfile.TarInfo("link.jpg")
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
    images = data.open_images([str(tmp_path / "0.tar")])
    assert len(images) == 1 and images.read(0) == b"a/i"


def test_a_tar_that_leads_back_to_itself_is_refused(tmp_path):
    """A second member whose size is −512, in the base-256 form, would be met again and again."""
    first, second = tarfile.TarInfo("0.jpg"), tarfile.TarInfo("1.jpg")
    header = bytearray(second.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" + (-512).to_bytes(11, "big", signed=True)
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + sum(header[156:512]) + 8 * 32)
    (tmp_path / "0.tar").write_bytes(first.tobuf(tarfile.GNU_FORMAT) + header + bytes(1024))
    with pytest.raises(SystemExit, match="0.tar: not a whole tar file .a negative size"):
        data.open_images([str(tmp_path / "0.tar")])


# ---------------------------------------------------------------------------------------------------------------------
# train.py


def test_learning_rate_is_the_papers():
    rates = [train.learning_rate(step, 4600, 1e-4, 0.005) for step in range(4600)]
    assert rates[0] == pytest.approx(1e-4 / 23) and rates[22] == rates[23] == max(rates) == 1e-4  # 23 steps of warm-up
    assert rates[23 + 4577 // 2] == pytest.approx(0.5e-4, rel=1e-3) and 0 < rates[-1] < 1e-10
    assert train.learning_rate(0, 1, 1e-4, 0) == 1e-4


def test_only_the_tower_and_the_linear_layer_move(models, tmp_path, monkeypatch):
    kept = {}

    def keep(name):
        original = getattr(train, name)

        def wrapped(*args, **more):
            kept[name] = original(*args, **more)
            kept[name + " before"] = {k: v.clone() for k, v in state(kept[name]).items()}
            return kept[name]

        monkeypatch.setattr(train, name, wrapped)

    def state(loaded) -> dict:
        if isinstance(loaded, model.Clip):
            return loaded.model.state_dict()
        return {**loaded.vae.state_dict(), **{f"unet.{k}": v for k, v in loaded.unet.state_dict().items()}}

    keep("load_clip")
    keep("load_diffusion")
    optimizers = []
    sgd = torch.optim.SGD
    monkeypatch.setattr(
        torch.optim, "SGD", lambda *args, **more: optimizers.append(sgd(*args, **more)) or optimizers[-1]
    )
    for freeze in ([], ["--freeze-projection"]):
        run(models, tmp_path / f"run{len(freeze)}", *freeze)
        clip, before, after = kept["load_clip"], kept["load_clip before"], state(kept["load_clip"])
        held = {id(p) for group in optimizers[-1].param_groups for p in group["params"]}
        visual = {id(p) for p in clip.model.visual.parameters()}
        assert visual < held if not freeze else visual == held
        assert len(held) == len(visual) + (0 if freeze else 2)  # the layer's weight and bias
        moved = {k for k in before if not torch.equal(before[k], after[k])}
        assert moved == {k for k, p in clip.model.visual.named_parameters(prefix="visual")}
        assert all(torch.equal(v, state(kept["load_diffusion"])[k]) for k, v in kept["load_diffusion before"].items())
    assert torch.equal(weights(tmp_path / "run1")["projection.weight"], fresh_projection(clip, kept["load_diffusion"]))


def fresh_projection(clip, diffusion) -> torch.Tensor:
    return condition.VisualCondition(clip, diffusion, model.parse_recap("none", 16), "mean", 0).projection.weight


def test_steps_are_clipped_sgd_with_momentum(models, tmp_path):
    """Three steps of `train`, beside the gradient of each whole batch, clipped and taken by hand."""
    settings = ["--micro-batch", "1", "--max-grad-norm", "0.05", "--lr", "2", "--warmup", "0.67", "--momentum", "0.8"]
    run(models, tmp_path / "run", "--steps", "3", *settings)
    clip = model.load_clip(f"{models}/vit")
    diffusion = model.load_diffusion(f"{models}/epsilon", "", torch.float32, "cpu")
    recap = model.parse_recap("random:50%", 16)
    module = condition.VisualCondition(clip, diffusion, recap, "mean", 0)
    images = data.TrainingImages(None, 32, 4, 0, lambda rng: train.draw(rng, (2, 4, 8, 8), 1000, 16, recap))
    velocity = {k: 0 for k, _ in module.named_parameters()}
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for step, (line, lr) in enumerate(zip(lines, (1, 2, 2), strict=True)):  # two of the three steps warm up
        batch = data.to_device(data.collate([images[step, position] for position in range(4)]), torch.device("cpu"))
        c = module(clip.view(batch["images"]), diffusion.text, batch["patches"])
        loss = train.denoising_loss(diffusion, diffusion.encode(batch["images"]), c, batch["timesteps"], batch["noise"])
        module.zero_grad()
        loss.backward()
        norm = torch.cat([p.grad.flatten() for p in module.parameters()]).norm()
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-4) and norm > 0.05
        assert line["lr"] == lr
        with torch.no_grad():
            for k, p in module.named_parameters():
                velocity[k] = 0.8 * velocity[k] + p.grad * 0.05 / norm
                p -= lr * velocity[k]
    for k, p in module.named_parameters():
        torch.testing.assert_close(weights(tmp_path / "run")[k], p.detach(), rtol=1e-4, atol=1e-5)


def test_bf16_runs_theta_under_autocast_and_phi_in_bf16(models, tmp_path, monkeypatch):
    seen = {}
    load_clip, load_diffusion = train.load_clip, train.load_diffusion

    def watched_clip(*args, **options):
        clip = seen["clip"] = load_clip(*args, **options)
        clip.model.visual.transformer.register_forward_hook(lambda *a: seen.update(tower=a[-1]))
        clip.model.visual.transformer.resblocks[0].mlp.c_fc.register_forward_hook(
            lambda *a: seen.update(mlp=a[-1].dtype)
        )
        return clip

    def watched_diffusion(*args):
        diffusion = seen["diffusion"] = load_diffusion(*args)
        diffusion.unet.register_forward_pre_hook(lambda unet, args: seen.update(z_t=args[0].dtype))
        return diffusion

    monkeypatch.setattr(train, "load_clip", watched_clip)
    monkeypatch.setattr(train, "load_diffusion", watched_diffusion)
    run(models, tmp_path / "run", "--precision", "bf16")
    assert seen["mlp"] == seen["z_t"] == seen["diffusion"].unet.dtype == seen["diffusion"].vae.dtype == torch.bfloat16
    assert {p.dtype for p in seen["clip"].model.parameters()} == {torch.float32}
    parts = seen["diffusion"].unet, seen["diffusion"].vae, seen["clip"].model
    assert not any(module.training for part in parts for module in part.modules())


def test_processes_and_accumulation_change_nothing(models, tmp_path):
    """2 processes × 2 images, 1 × 4, and 1 × 2 accumulated twice: the same weights after three steps."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "train.py"]
    outs = {}
    for processes, micro_batch in ((2, 2), (2, 1), (1, 4), (1, 2)):
        out = outs[processes, micro_batch] = tmp_path / f"{processes}x{micro_batch}"
        command = (
            torchrun[:-1] + [f"--nproc_per_node={processes}", "train.py"]
            if processes > 1
            else [sys.executable, "train.py"]
        )
        command += arguments(models, out, "--micro-batch", str(micro_batch))
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    start = model.load_clip(f"{models}/vit").model.visual.state_dict()
    one = weights(outs[1, 4])
    moved = max((one[f"visual.{k}"] - v).norm() / v.norm() for k, v in start.items())
    assert moved > 1e-4
    for other in (weights(outs[2, 2]), weights(outs[2, 1]), weights(outs[1, 2])):
        for k in one:
            assert (other[k] - one[k]).norm() <= 1e-5 * one[k].norm(), k


KEPT = ("step", "loss", "grad_norm", "lr", "unreadable")


def same_run(one: Path, other: Path) -> None:
    """The same weights and momentum to the last bit, and the same lines in metrics.jsonl."""
    from safetensors.torch import load_file

    for name in ("weights", "momentum"):
        a, b = (load_file(out / "checkpoint" / f"{name}.safetensors") for out in (one, other))
        assert a.keys() == b.keys() and len(a) > 1 and all(torch.equal(a[k], b[k]) for k in a)
    a, b = ([json.loads(x) for x in (out / "metrics.jsonl").open()] for out in (one, other))
    assert [[x[k] for k in KEPT] for x in a] == [[x[k] for k in KEPT] for x in b]


STEPS = ["--steps", "5", "--save-every", "2"]


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory) -> Path:
    """A run that nothing has stopped."""
    return run(models, tmp_path_factory.mktemp("whole"), *STEPS)


def test_a_run_says_what_it_is_about_to_do(models, tmp_path, capfd):
    out = run(models, tmp_path / "run", "--steps", "5", "--micro-batch", "2")
    said = capfd.readouterr()
    counts = Counter()
    for name, tensor in weights(out).items():
        counts[name.split(".")[0]] += tensor.numel()
    assert [line[:12].rstrip() for line in said.out.splitlines()[:7]] == [
        *("recipe", "CLIP θ", "diffusion φ", "condition", "images", "steps", "writes")
    ]
    tower, linear = (float(n) * 1e6 for n in re.findall(r"([\d.e-]+) M ", said.out))
    assert tower == pytest.approx(counts["visual"], rel=1e-3) and linear == pytest.approx(
        counts["projection"], rel=0.01
    )
    assert "condition    9 tokens, recap random:50%, text '' by mean\nimages       1,000,000 at 32²" in said.out
    assert "0 to 5, lr 0.1, batch 4 = 1 process × micro-batch 2 × 2 accumulated" in said.out
    assert len(re.findall(r"at [\d.]+ images/s the steps to come take 00:0\d\n", said.err)) == 1
    assert said.out.splitlines()[-4:] == [
        f"written: {out}/report.html, {out}/clip/README.md",
        f'the CLIP     open_clip.create_model_and_transforms("local-dir:{out}/clip")',
        f"to score it  python evaluate_mmvp.py {models}/vit {out}/clip --mmvp MMVP/MMVP_VLM",
        f"to export it python extras/export.py {out}/clip DIR",
    ]


def test_gradients_are_averaged_once_a_step(models, tmp_path, monkeypatch):
    """DDP communicates in three backward passes of twelve."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    calls = []

    class Watched(train.DistributedDataParallel):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.register_comm_hook(
                None, lambda _, bucket: calls.append(bucket.index()) or allreduce_hook(None, bucket)
            )

    monkeypatch.setattr(train, "DistributedDataParallel", Watched)
    run(models, tmp_path / "run", "--micro-batch", "1")
    assert calls.count(0) == 3


@pytest.mark.parametrize("name", ["vit", "siglip"])
def test_grad_checkpointing_keeps_less_and_changes_nothing(models, name):
    """The same weights after two steps, to the last bit; what a step keeps for its backward pass is less."""
    kept, ends = [], []
    for more in ([], ["--grad-checkpointing"]):
        args = train.parse_args(
            [*arguments(models, "unused", "--recap", "pool:5"), "--clip", f"{models}/{name}", *more]
        )
        step = bench.Step(args, torch.device("cpu"))
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: sizes.update({x.data_ptr(): x.nbytes}) or x, lambda x: x
        ):
            step()
        step()
        kept.append(sum(sizes.values()))
        ends.append(step.encoder.state_dict())
    assert kept[1] < 0.7 * kept[0]
    assert all(torch.equal(v, ends[1][k]) for k, v in ends[0].items())


@pytest.mark.slow
def test_a_compiled_run_has_the_same_losses(models, tmp_path, whole):
    """Within 1e-5 in fp32: another order of the same sums."""
    compiled = run(models, tmp_path / "compiled", *STEPS, "--compile")
    for a, b in zip(*([json.loads(x) for x in (out / "metrics.jsonl").open()] for out in (whole, compiled))):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5) and b["grad_norm"] == pytest.approx(
            a["grad_norm"], rel=1e-4
        )


@pytest.mark.parametrize("saves", [1, 3])
def test_a_resumed_run_ends_in_the_same_bits(models, tmp_path, monkeypatch, whole, saves):
    """A run that dies in its first or its last save, after the CLIP is written and before the checkpoint is."""
    save, calls = train.save_checkpoint, []

    def die(*args):
        calls.append(1)
        if len(calls) == saves:
            raise KeyboardInterrupt
        save(*args)

    monkeypatch.setattr(train, "save_checkpoint", die)
    with pytest.raises(KeyboardInterrupt):
        run(models, tmp_path / "died", *STEPS)
    train.dist.destroy_process_group()
    if saves > 1:  # there is something to lose
        with pytest.raises(SystemExit, match="holds another run .steps 5 there, 6 here; seed 0 there, 1 here"):
            run(models, tmp_path / "died", "--steps", "6", "--seed", "1")
        train.dist.destroy_process_group()
    run(models, tmp_path / "died", *STEPS)
    same_run(whole, tmp_path / "died")
    clip = open_clip.create_model(f"local-dir:{tmp_path}/died/clip")
    trained = weights(whole)
    assert all(torch.equal(v, trained[f"visual.{k}"]) for k, v in clip.visual.state_dict().items())


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_stops_after_the_micro_batch_and_loses_no_step(models, tmp_path, monkeypatch, whole, name):
    number, loss, calls = signal.Signals[name], train.denoising_loss, []
    usual = signal.getsignal(number)

    def signalled(*args):
        calls.append(1)
        if len(calls) == 5:  # the first of the two micro-batches of step 2, which is then dropped
            os.kill(os.getpid(), number)
        return loss(*args)

    more = [*STEPS, "--micro-batch", "2"]
    run(models, tmp_path / "whole", *more)
    monkeypatch.setattr(train, "denoising_loss", signalled)
    with pytest.raises(model.Stopped, match=f"{name}: stopped after 2 steps, .* the same command goes on") as stop:
        run(models, tmp_path / "run", *more)
    train.dist.destroy_process_group()
    assert stop.value.exit_code == 128 + number and len(calls) == 5
    assert signal.getsignal(number) == usual
    assert json.loads((tmp_path / "run" / "checkpoint" / "state.json").read_text())["step"] == 2
    run(models, tmp_path / "run", *more)
    same_run(tmp_path / "whole", tmp_path / "run")


def test_a_finished_run_evaluates_once(models, tmp_path, capsys, monkeypatch):
    mmvp = write_mmvp(tmp_path / "mmvp")
    out = run(models, tmp_path / "run")
    run(models, out, "--mmvp", str(mmvp))  # finished, but not yet evaluated
    assert "change from 1 to 2" in capsys.readouterr().out and (out / "mmvp" / "scores.json").exists()
    monkeypatch.setattr(train, "load_clip", None)  # from here on nothing is loaded
    run(models, out, "--mmvp", str(mmvp))
    said = f"{out}: this run is finished, scores in mmvp/ (evaluate_mmvp.py scores it on other pairs); --overwrite"
    assert capsys.readouterr().out.startswith(f"{said} starts anew\nwritten: {out}/report.html, ")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    with pytest.raises(SystemExit, match="--overwrite: every restart .* would delete the run"):
        run(models, out, "--mmvp", str(mmvp), "--overwrite")


def test_a_full_disk_costs_nothing_but_time(models, tmp_path, whole):
    """A tmpfs with room for one checkpoint: a sentence, the earlier one whole; with more room the run goes on."""
    size = sum(f.stat().st_size for f in whole.rglob("*") if f.is_file())
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size + (96 << 10)}", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        with pytest.raises(SystemExit, match="could not be written: .*(No space|space left).*; what it held before is"):
            run(models, disk / "run", *STEPS)
        train.dist.destroy_process_group()
        assert json.loads((disk / "run" / "checkpoint" / "state.json").read_text())["step"] == 2
        assert not list((disk / "run").glob("*.new"))
        subprocess.run(["mount", "-o", f"remount,size={3 * size}", str(disk)], check=True)
        run(models, disk / "run", *STEPS)
        same_run(whole, disk / "run")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_killed_data_worker_is_replaced(models, tmp_path, monkeypatch, whole, capfd):
    loss, calls = train.denoising_loss, []

    def kill(*args):
        calls.append(1)
        if len(calls) == 2:
            for worker in multiprocessing.active_children():
                worker.kill()
        return loss(*args)

    monkeypatch.setattr(train, "denoising_loss", kill)
    run(models, tmp_path / "run", *STEPS, "--steps", "12", "--workers", "1")
    assert "its batches are read again" in capfd.readouterr().err and len(calls) == 12
    monkeypatch.setattr(train, "denoising_loss", loss)
    run(models, tmp_path / "whole", *STEPS, "--steps", "12")
    same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("error", [ConnectionResetError("reset"), EOFError(), RuntimeError("DataLoader worker died")])
def test_a_data_worker_that_dies_with_a_batch_under_way_is_replaced(monkeypatch, error):
    """Its batch is asked for again, and those that came are not; a death before any batch came ends the run."""
    asked, hopeless = [], False

    def loader(dataset, batch_sampler, **options):
        for keys in batch_sampler:
            asked.append(keys)
            if keys == 2 and (asked.count(keys) == 1 or hopeless):
                raise error
            yield keys

    monkeypatch.setattr(data, "DataLoader", loader)
    assert list(data.read_batches(None, lambda: iter(range(4)), 1)) == [0, 1, 2, 3] and asked == [0, 1, 2, 2, 3]
    hopeless = True
    with pytest.raises(SystemExit, match="killed again and again: (reset|EOFError|DataLoader worker died)"):
        list(data.read_batches(None, lambda: iter(range(4)), 1))
    assert asked[5:] == [0, 1, 2, 2]


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


@pytest.fixture(scope="module")
def whole_of_two(models, tmp_path_factory) -> Path:
    """A run of two processes that nothing has stopped, long enough to be disturbed."""
    out = tmp_path_factory.mktemp("two") / "run"
    command = [*TORCHRUN, "train.py", *arguments(models, out, *LONG)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    return out


LONG = ["--steps", "150", "--micro-batch", "1", "--save-every", "20", "--lr", "0.01"]


def start(command: list[str], out: Path, lines: int) -> subprocess.Popen:
    """Starts a run in the background and returns once its metrics.jsonl has so many lines."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline, log = time.monotonic() + 120, out / "metrics.jsonl"
    while process.poll() is None and time.monotonic() < deadline:
        if log.exists() and log.read_bytes().count(b"\n") >= lines:
            break
        time.sleep(0.002)
    return process


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_torchrun_stops_and_goes_on(models, tmp_path, whole_of_two, name):
    """A signal to torchrun of two processes: both stop within seconds, one sentence says so, and the bits are kept."""
    out, handle = tmp_path / "run", "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1"
    command = [*TORCHRUN, handle, "train.py", *arguments(models, out, *LONG)]
    process = start(command, out, 30)
    process.send_signal(signal.Signals[name])
    began = time.monotonic()
    said, _ = process.communicate(timeout=30)
    assert process.returncode != 0 and time.monotonic() - began < 20
    assert said.count(f"train.py: {name}: stopped after") == 1
    step = json.loads((out / "checkpoint" / "state.json").read_text())["step"]
    assert 30 <= step < 150 and step == len((out / "metrics.jsonl").read_text().splitlines())
    if name != "SIGUSR1":
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
        return same_run(whole_of_two, out)
    command = [sys.executable, "train.py", *arguments(models, out, *LONG)]  # it goes on in one process
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    one, other = weights(whole_of_two), weights(out)
    assert all((other[k] - v).norm() <= 1e-5 * v.norm() for k, v in one.items())


@pytest.mark.slow
def test_a_second_interrupt_leaves_at_once(tmp_path):
    """In the middle of a micro-batch of many seconds, after which the first would have stopped the run."""
    more = ["--batch-size", "640", "--micro-batch", "640", "--states", "4", "--out", str(tmp_path)]
    process = start([sys.executable, "train.py", *more], tmp_path, 1)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT and time.monotonic() - began < 2


@pytest.mark.slow
def test_torchrun_restarts_a_run_that_lost_a_process(models, tmp_path, whole_of_two):
    out = tmp_path / "run"
    command = [*TORCHRUN, "--max-restarts=3", "train.py", *arguments(models, out, *LONG)]
    process = start(command, out, 50)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode == 0
    same_run(whole_of_two, out)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["raise ValueError('a fault of its own')", "return loss(*args) * math.nan"])
def test_one_process_that_fails_ends_all_and_its_error_is_shown(models, tmp_path, fault):
    """Process 1 raises, or has a loss that is not finite, at its sixth loss, while process 0 waits for it."""
    script = tmp_path / "fails.py"
    script.write_text(
        "import math, os, sys; sys.path.insert(0, os.getcwd())\n"
        "import model, train\n"
        "loss, calls = train.denoising_loss, []\n"
        "def fail(*args):\n"
        "    calls.append(1)\n"
        f"    if os.environ['RANK'] == '1' and len(calls) == 6: {fault}\n"
        "    return loss(*args)\n"
        "train.denoising_loss = fail\n"
        "with model.one_sentence('train.py'): train.train(train.parse_args())\n"
    )
    began = time.monotonic()
    command = [*TORCHRUN, str(script), *arguments(models, tmp_path / "run", *LONG)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=90)
    assert done.returncode != 0 and time.monotonic() - began < 60
    said = "train.py: step 2: the loss is nan" if "nan" in fault else "[rank1]: ValueError: a fault of its own"
    assert said in done.stderr and "[rank0]: Traceback" not in done.stderr
    assert "nan" not in fault or "(process 1); this step was not taken" in done.stderr


@pytest.mark.slow
def test_sigkill_at_twenty_moments(tmp_path):
    """The miniature, killed at random and inside of saves: every run ends in the bits of the undisturbed one."""
    flags = ["--steps", "16", "--save-every", "1", "--batch-size", "4", "--micro-batch", "4", "--workers", "0"]
    command = [sys.executable, "train.py", *flags, "--out"]
    subprocess.run([*command, str(tmp_path / "whole")], cwd=ROOT, check=True, capture_output=True, timeout=120)
    rng, kills, inside, runs = np.random.default_rng(0), 0, 0, 0
    while kills < 20 or inside < 5:
        out = tmp_path / f"run{runs}"
        runs += 1
        for _ in range(5):
            log = out / "metrics.jsonl"
            process = start([*command, str(out)], out, 1 + (log.read_bytes().count(b"\n") if log.exists() else 0))
            began = time.time()  # what lies there from an earlier kill is older

            def saving() -> bool:
                with contextlib.suppress(FileNotFoundError):  # it was renamed meanwhile
                    return any(f.stat().st_mtime > began for f in [*out.glob("*.new"), *out.glob("*.old")])
                return False

            if rng.random() < 0.5:
                time.sleep(rng.uniform(0, 0.3))
            else:
                while process.poll() is None and not saving():
                    pass
                time.sleep(rng.uniform(0, 0.02))
            process.kill()
            process.communicate()
            kills += process.returncode == -signal.SIGKILL
            inside += process.returncode == -signal.SIGKILL and saving()
        subprocess.run([*command, str(out)], cwd=ROOT, check=True, capture_output=True, timeout=120)
        same_run(tmp_path / "whole", out)


@pytest.mark.slow
def test_memory_does_not_grow(models, tmp_path, monkeypatch):
    """20,000 steps: resident memory after the first 1,000 stays within 2%."""
    rate, resident = train.learning_rate, []

    def watch(step: int, *args) -> float:
        if step % 100 == 0:
            resident.append(int(Path("/proc/self/statm").read_text().split()[1]))
        return rate(step, *args)

    monkeypatch.setattr(train, "learning_rate", watch)
    small = ["--batch-size", "1", "--micro-batch", "1", "--states", "1", "--image-size", "16", "--save-every", "5000"]
    run(models, tmp_path / "run", *small, "--steps", "20000", "--lr", "1e-4")
    assert len(resident) == 200 and max(resident[10:]) < 1.02 * resident[10]


def test_a_loss_that_is_not_finite_stops_before_its_step(models, tmp_path, monkeypatch):
    loss, calls = train.denoising_loss, []

    def third_is_nan(*args):
        calls.append(1)
        return loss(*args) * (math.nan if len(calls) == 3 else 1)

    monkeypatch.setattr(train, "denoising_loss", third_is_nan)
    with pytest.raises(SystemExit, match=r"step 2: the loss is nan, .* \(process 0\); this step was not taken"):
        run(models, tmp_path / "run", "--save-every", "1", "--steps", "5")
    train.dist.destroy_process_group()
    monkeypatch.setattr(train, "denoising_loss", loss)
    assert json.loads((tmp_path / "run" / "checkpoint" / "state.json").read_text())["step"] == 2
    reloaded = open_clip.create_model(f"local-dir:{tmp_path}/run/clip")
    kept = weights(tmp_path / "run")
    assert all(torch.equal(v, kept[f"visual.{k}"]) for k, v in reloaded.visual.state_dict().items())


# ---------------------------------------------------------------------------------------------------------------------
# The saved CLIP


@pytest.mark.parametrize("name", ["vit", "siglip", "ViT-B-32:openai"])
def test_the_saved_clip_is_open_clips(models, tmp_path, name):
    source = name if ":" in name else f"{models}/{name}"
    clip = model.load_clip(source, random_weights=":" in name)
    model.save_clip(clip, tmp_path / "clip")
    reloaded, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}/clip")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path}/clip")
    reloaded.eval()
    image = Image.effect_noise((50, 40), 90).convert("RGB")
    tokens = tokenizer(["a photo of red cat", "blue"])
    assert torch.equal(tokens, clip.tokenizer()(["a photo of red cat", "blue"]))
    assert torch.equal(preprocess(image), clip.preprocess()(image))
    with torch.no_grad():
        assert torch.equal(
            reloaded.encode_image(preprocess(image)[None]), clip.model.encode_image(preprocess(image)[None])
        )
        assert torch.equal(reloaded.encode_text(tokens), clip.model.encode_text(tokens))
    if ":" in name:  # OpenAI's weights need their own activation, which this architecture's name does not say
        assert json.loads((tmp_path / "clip" / "open_clip_config.json").read_text())["model_cfg"]["quick_gelu"]


def test_a_clip_without_its_tokenizer_is_saved_all_the_same(models, tmp_path):
    clip = model.load_clip(f"{models}/siglip")
    clip.source = "ViT-B-16-SigLIP"  # a tokenizer on the hub, which is out of reach
    model.save_clip(clip, tmp_path / "clip")
    assert clip.no_tokenizer.startswith("the tokenizer of ViT-B-16-SigLIP could not be loaded: ")
    reloaded = open_clip.create_model(f"local-dir:{tmp_path}/clip")
    assert all(torch.equal(v, clip.model.state_dict()[k]) for k, v in reloaded.state_dict().items())


# ---------------------------------------------------------------------------------------------------------------------
# The exported CLIP: extras/export.py


@timm.models.register_model
def tiny_siglip(pretrained=False, **options):
    """SigLIP's vision tower, made small: timm's own small ones have class tokens or registers."""
    sizes = dict(img_size=18, patch_size=4, embed_dim=24, depth=2, num_heads=2, mlp_ratio=3.7)  # two pixels are cut off
    return timm.models.VisionTransformer(num_classes=0, global_pool="map", class_token=False, **sizes)


VIT = dict(image_size=16, patch_size=4, width=24, layers=2, head_width=12)
SIGLIP = dict(image_size=18, timm_model_name="tiny_siglip", timm_pool="map", timm_proj="none")
SIGLIP_TEXT = dict(no_causal_mask=True, proj_bias=True, pool_type="last", tokenizer_kwargs=dict(clean="canonicalize"))
OPENAI_TEXT = dict(context_length=77, vocab_size=49408, hf_tokenizer_name=None)  # with open_clip's built-in tokenizer


def shaken(clip: model.Clip) -> model.Clip:
    """No two of its weights are alike any more: a fresh CLIP's biases are all 0, its norms 1."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in clip.model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return clip


def write_clip_to_export(folder: Path, name: str, resize_mode: str = "squash") -> Path:
    if name == "siglip":
        more = dict(mlp_ratio=3.7, norm_kwargs=dict(eps=1e-6), act_kwargs=dict(approximate="tanh"))
        write_clip(folder, 24, SIGLIP, SIGLIP_TEXT | more, custom_text=True, init_logit_bias=-10)
    elif name == "openai":
        write_clip(folder, 20, VIT, OPENAI_TEXT, quick_gelu=True)
    else:
        write_clip(folder, 20, VIT | dict(norm_kwargs=dict(eps=0.1)))
    clip = shaken(model.load_clip(str(folder)))
    clip.model.visual.preprocess_cfg["resize_mode"] = resize_mode
    model.save_clip(clip, folder)
    return folder


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("name, resize_mode", [("vit", "squash"), ("siglip", "squash"), ("openai", "shortest")])
def test_the_exported_clip_is_ours(tmp_path, capsys, name, resize_mode):
    folder, out = write_clip_to_export(tmp_path / "clip", name, resize_mode), tmp_path / "exported"
    export.main([f"{folder}", f"{out}"])
    said = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in said[:3]] == ["image features", "patch tokens", "text features"]
    assert said[3:] == [f"written: {out}"]

    clip, theirs = model.load_clip(str(folder)), transformers.AutoModel.from_pretrained(out)
    assert type(theirs).__name__ == ("SiglipModel" if name == "siglip" else "CLIPModel")
    image = Image.effect_noise((50, 37), 90).convert("RGB")
    ours = clip.preprocess()(image)[None]
    for backend, grey_levels in (("pil", 1e-3), ("torchvision", 2.01)):  # transformers' default rounds differently
        processor = transformers.AutoImageProcessor.from_pretrained(out, backend=backend)
        pixels = processor(images=image, return_tensors="pt").pixel_values
        std = torch.tensor(clip.model.visual.preprocess_cfg["std"])[:, None, None]
        assert ((pixels - ours) * std * 255).abs().max() < grey_levels

    texts = ["a photo of red cat", " Two\n dogs,  left_right! ", "", "blue " * 100]
    ids, tokenizer = clip.tokenizer()(texts), transformers.AutoTokenizer.from_pretrained(out)
    tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    assert ids.shape == tokens.input_ids.shape and torch.equal(ids[ids > 0], tokens.input_ids[ids > 0])  # 0 pads

    with torch.no_grad():
        cls, local = condition.visual_tokens(clip.model.visual, ours)
        found = theirs.vision_model(ours, output_hidden_states=True)
        patches = found.last_hidden_state
        if name != "siglip":
            patches = theirs.visual_projection(theirs.vision_model.post_layernorm(patches[:, 1:]))
        assert relative(theirs.get_image_features(ours).pooler_output, cls) < 1e-5
        assert relative(patches, local) < 1e-5
        assert relative(theirs.get_text_features(**tokens).pooler_output, clip.model.encode_text(ids)) < 1e-5
        if name != "siglip":  # what LLaVA reads
            vision = transformers.CLIPVisionModel.from_pretrained(out)(ours, output_hidden_states=True)
            before = clip.model.visual.forward_intermediates(ours, indices=2, output_fmt="NLC")["image_intermediates"]
            assert relative(vision.hidden_states[-2][:, 1:], before[0]) < 1e-5
    for scalar in ("logit_scale", "logit_bias"):
        if getattr(clip.model, scalar) is not None:
            assert getattr(theirs, scalar).item() == getattr(clip.model, scalar).item()


def test_the_miniature_is_exported(tmp_path):
    clip = model.load_clip(f"{model.MINIATURE}/clip")
    (tmp_path / "exported.old").mkdir()  # a person's, who has made room
    assert max(export.export(clip, tmp_path / "exported").values()) < 5e-6
    assert (tmp_path / "exported.old").exists()


@pytest.mark.parametrize(
    "vision, text, more, message",
    [
        (
            VIT | dict(ls_init_value=0.1),
            {},
            {},
            "it and a CLIPModel differ in vision_model.encoder.layers.0.ls_1.gamma",
        ),
        (VIT | dict(no_ln_pre=True), {}, {}, "it and a CLIPModel differ in vision_model.pre_layrnorm.bias"),
        (VIT, {}, dict(init_logit_bias=-10), "it and a CLIPModel differ in logit_bias"),
        (VIT, dict(pool_type="first"), {}, "its text features differ from a CLIPModel's by "),
        (
            SIGLIP,
            SIGLIP_TEXT | dict(no_causal_mask=False, layers=2),
            {},
            "its text features differ from a SiglipModel's by ",
        ),
        (SIGLIP, {}, {}, "it and a SiglipModel differ in text_model.head.bias"),
        (
            SIGLIP | dict(timm_model_name="test_vit", image_size=160),
            SIGLIP_TEXT,
            {},
            "differ in vision_model.cls_token",
        ),
    ],
)
def test_what_transformers_cannot_express_is_refused(tmp_path, vision, text, more, message):
    if "timm_model_name" in vision:
        more = dict(custom_text=True, init_logit_bias=-10)
    folder = write_clip(tmp_path / "clip", 64 if vision["image_size"] == 160 else 24, vision, text, **more)
    with pytest.raises(SystemExit, match=f"local-dir:{folder} cannot be exported: .*{message}") as stop:
        export.main([f"{folder}", f"{tmp_path}/exported"])
    assert "\n" not in stop.value.code and [path.name for path in tmp_path.iterdir()] == ["clip"]


def test_padding_and_other_activations_are_refused(tmp_path):
    folder = write_clip_to_export(tmp_path / "clip", "vit", "longest")
    with pytest.raises(SystemExit, match="no image processor that fits the longest side and pads"):
        export.main([f"{folder}", f"{tmp_path}/exported"])
    clip = model.load_clip(str(folder))
    clip.model.transformer.resblocks[0].mlp.gelu = torch.nn.SiLU()
    with pytest.raises(SystemExit, match="the activation SiLU.* is none of QuickGELU"):
        export.export(clip, tmp_path / "exported")
    assert [path.name for path in tmp_path.iterdir()] == ["clip"]


def test_an_export_takes_a_new_folder(models, tmp_path):
    (tmp_path / "exported").mkdir()
    with pytest.raises(SystemExit, match="exported: exists already; an export takes a new folder"):
        export.main([f"{models}/vit", f"{tmp_path}/exported"])


def test_a_clip_without_its_tokenizer_is_exported_all_the_same(tmp_path, capsys):
    folder = write_clip_to_export(tmp_path / "clip", "siglip")
    (folder / "tokenizer_config.json").unlink()
    export.main([f"{folder}", f"{tmp_path}/exported"])
    assert f"without a tokenizer: {folder}: this CLIP was saved without its tokenizer" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "exported").iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in model.RECIPES if name != "miniature"])
def test_every_architecture_is_exported(tmp_path, name):
    clip = shaken(model.load_clip(name, random_weights=True))
    differences = export.export(clip, tmp_path / "exported")
    print(name, differences)
    assert max(differences.values()) < 5e-6
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "exported", backend="pil")
    image = Image.effect_noise((500, 333), 90).convert("RGB")
    assert (processor(images=image, return_tensors="pt").pixel_values[0] - clip.preprocess()(image)).abs().max() < 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# evaluate_mmvp.py


def write_mmvp(folder: Path, pairs_per_type: int = 2, types: tuple[str, ...] = ("Color", "Camera Perspective")) -> Path:
    rng, rows = np.random.default_rng(0), [["Question ID", "Type", "Statement"]]
    for type_name in types:
        images = folder / "MLLM_VLM Images" / type_name
        images.mkdir(parents=True)
        for _ in range(2 * pairs_per_type):
            i = len(rows)
            Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(images / f"{i}.jpg")
            rows.append([i, type_name, " ".join(rng.choice(WORDS, 3))])
    with open(folder / "Questions.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder


def test_scores_are_the_benchmarks(models, tmp_path):
    """Beside the benchmark's rule written out pair by pair, with open_clip's own calls."""
    pairs = evaluate_mmvp.read_mmvp(str(write_mmvp(tmp_path / "mmvp", pairs_per_type=12)))
    for name in ("vit", "siglip"):
        cosines = evaluate_mmvp.similarities(model.load_clip(f"{models}/{name}"), pairs, "cpu", batch_size=6)
        right = evaluate_mmvp.pairs_right(cosines)
        clip, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{models}/{name}")
        tokenizer = open_clip.get_tokenizer(f"local-dir:{models}/{name}")
        clip.eval()
        scores = {"Color": [0, 0], "Camera Perspective": [0, 0]}
        for p, pair in enumerate(pairs):
            images = torch.stack([preprocess(Image.open(path)) for path in pair.images])
            texts = tokenizer(["a photo of " + s for s in pair.statements])
            with torch.no_grad():
                _, local = condition.visual_tokens(clip.visual, images)
                unit = clip.encode_image(images, normalize=True)
                local = torch.stack(
                    [torch.stack([t / t.norm() for t in tokens]).sum(0) / len(tokens) for tokens in local]
                )
                for r, features in enumerate((unit, (unit + local) / (unit + local).norm(dim=1, keepdim=True))):
                    logits = 100 * clip.encode_text(texts, normalize=True) @ features.T
                    torch.testing.assert_close(torch.from_numpy(cosines[r, p]), logits / 100, atol=1e-6, rtol=0)
                    chosen = [1 if softmax[0] > 0.5 else 2 for softmax in logits.softmax(1)]
                    scores[pair.type][r] += chosen == [1, 2]
        types = [pair.type for pair in pairs]
        for r in (0, 1):
            found = evaluate_mmvp.type_scores(right[r], types)
            assert found == pytest.approx({t: 100 * n[r] / 12 for t, n in scores.items()})
            assert evaluate_mmvp.average(right[r], types) == pytest.approx(
                sum(n[r] for n in scores.values()) / 24 * 100
            )


def test_a_tie_goes_to_the_second_image():
    cosines = np.array(
        [[[0.3, 0.2], [0.2, 0.3]], [[0.3, 0.3], [0.2, 0.3]], [[0.3, 0.2], [0.2, 0.2]], [[0.2, 0.3], [0.2, 0.3]]]
    )
    assert evaluate_mmvp.pairs_right(cosines).tolist() == [True, False, True, False]


def test_intervals_and_p_values():
    """Beside the binomial distribution in closed form: the bootstrap of nine types of 15 pairs, and McNemar's test."""
    rng = np.random.default_rng(1)
    types = [name for name in evaluate_mmvp.TYPES for _ in range(15)]
    right = rng.random(135) < 0.3
    shares = [right[np.array(types) == name].mean() for name in evaluate_mmvp.TYPES]
    spread = 100 * math.sqrt(sum(p * (1 - p) / 15 for p in shares)) / 9  # of the mean of nine binomial shares
    low, high = evaluate_mmvp.interval(right, types)
    assert (high - low) / (2 * 1.96 * spread) == pytest.approx(1, abs=0.05)
    assert (low + high) / 2 == pytest.approx(evaluate_mmvp.average(right, types), abs=0.8)
    assert evaluate_mmvp.mcnemar(14, 5) == pytest.approx(
        0.0636, abs=1e-4
    )  # 2 · P(X ≤ 5), X ~ B(19, 1/2): 33,328 / 2^19
    assert evaluate_mmvp.mcnemar(0, 6) == 2 / 2**6 and evaluate_mmvp.mcnemar(3, 3) == evaluate_mmvp.mcnemar(0, 0) == 1


def test_the_command_compares_two_clips(models, tmp_path):
    mmvp = write_mmvp(tmp_path / "mmvp", 3, tuple(evaluate_mmvp.TYPES))
    run(models, tmp_path / "run", "--mmvp", str(mmvp), "--lr", "30", "--max-grad-norm", "0")
    command = [sys.executable, "evaluate_mmvp.py", f"{models}/vit", f"{tmp_path}/run/clip", "--mmvp", str(mmvp)]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "scores")], cwd=ROOT, capture_output=True, text=True, check=True
    )
    scores = json.loads((tmp_path / "scores" / "scores.json").read_text())
    theirs = json.loads((tmp_path / "run" / "mmvp" / "scores.json").read_text())["clips"][1]
    assert scores["clips"][1]["change"] == theirs["change"]
    with open(tmp_path / "scores" / "pairs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 27
    for c, entry in enumerate(scores["clips"]):
        for reading in evaluate_mmvp.READINGS:
            mine = rows[27 * c : 27 * c + 27]
            assert entry[reading]["average"] == pytest.approx(100 * sum(int(r[f"{reading} right"]) for r in mine) / 27)
            assert f"{entry[reading]['average']:.1f}" in done.stdout
            for row in mine:
                s = [float(row[f"{reading} s{i} i{j}"]) for i in (1, 2) for j in (1, 2)]
                assert int(row[f"{reading} right"]) == (s[0] > s[1] and s[3] > s[2])
    for reading, change in zip(evaluate_mmvp.READINGS, scores["clips"][1]["change"], strict=True):
        before, after = ([int(r[f"{reading} right"]) for r in rows[27 * c : 27 * c + 27]] for c in (0, 1))
        assert change["won"] - change["lost"] == sum(after) - sum(before)
        assert change["points"] == pytest.approx(100 * (sum(after) - sum(before)) / 27)


@pytest.mark.parametrize(
    "row, content, message",
    [
        (1, "Id,Type,Statement", r"row 1: the header must be"),
        (3, "2,Colour,a cat", r"row 3: type 'Colour' differs from its partner's, 'Color'"),
        (2, "1,Color", r"row 2: needs an id, a type and a statement"),
        (2, "one,Color,a cat", r"row 2: the id 'one' is not a number"),
        (2, "9" * 5001 + ",Color,a cat", r"row 2: the id '9{20}' is not a number"),
        (2, "1," + "C" * 300 + ",a cat", r"row 2: the type is longer than"),
        (3, "9,Color,a cat", r"row 3: id 9 does not follow"),
        (2, "2,Color,a cat", r"row 2: a pair begins with an odd id"),
        ((4, 5), "{},Color,a cat".replace("{}", "1"), r"row 4: a pair begins with an odd id of its own, and this is 1"),
        (3, '2,Color,"a cat', r"Questions.csv: cannot be read"),
        (5, None, r"row 4: rows come in pairs"),
        ((2, 3), "{},../Color,a cat", r"row 2: type '../Color' has no folder"),
        ((2, 3), "{},Colour,a cat", r"row 2: type 'Colour' has no folder"),
        ((4, 5), "1{},Color,a cat", r"row 4: no such image: .*13.jpg"),
    ],
)
def test_a_bad_benchmark_is_refused_by_row(tmp_path, row, content, message):
    folder = write_mmvp(tmp_path / "mmvp", types=("Color",))
    lines = (folder / "Questions.csv").read_text().splitlines()
    for n in row if isinstance(row, tuple) else [row]:
        lines[n - 1] = content.format(n - 1) if content else ""
    (folder / "Questions.csv").write_text("\n".join(lines))
    with pytest.raises(SystemExit, match=message):
        evaluate_mmvp.read_mmvp(str(folder))


# ---------------------------------------------------------------------------------------------------------------------
# miniature/


def test_the_miniature_is_what_its_script_draws(tmp_path):
    """The images and the benchmark in the repository are make.py's, within the rounding of another JPEG codec."""
    make.write_images(tmp_path)
    make.write_mmvp(tmp_path / "mmvp")
    embedded, drawn = (data.open_images([str(f / "images.tar")], False) for f in (model.MINIATURE, tmp_path))
    assert len(embedded) == len(drawn) == 640
    pictures = [(embedded.read(i), drawn.read(i)) for i in range(0, 640, 40)]
    embedded, drawn = (evaluate_mmvp.read_mmvp(str(f / "mmvp")) for f in (model.MINIATURE, tmp_path))
    for pair, other in zip(embedded, drawn, strict=True):
        assert (pair.ids, pair.type, pair.statements) == (other.ids, other.type, other.statements)
        pictures += [(a.read_bytes(), b.read_bytes()) for a, b in zip(pair.images, other.images)]
    for one, other in pictures:
        one, other = (np.asarray(Image.open(io.BytesIO(content))).astype(int) for content in (one, other))
        assert one.shape == (64, 64, 3) and np.abs(one - other).mean() < 2


def test_a_pair_of_the_miniature_differs_in_one_detail():
    pairs = evaluate_mmvp.read_mmvp(str(model.MINIATURE / "mmvp"))
    assert [p.type for p in pairs] == [name for name in evaluate_mmvp.TYPES for _ in range(15)]
    regions = {"Quantity": (0, 0, 45, 18), "Text": (46, 0, 64, 18)}  # else the thing and its ground, below
    for pair in pairs:
        words = [statement.split() for statement in pair.statements]
        said = {" ".join(w for w in words[i] if w not in words[1 - i]) for i in (0, 1)} - {""}
        phrases = make.DETAILS[pair.type]
        assert all(any(set(s.split()) <= set(phrase.split()) for phrase in phrases) for s in said)
        one, other = (np.asarray(Image.open(path)).astype(int) for path in pair.images)
        changed = np.abs(one - other).max(-1) > 60
        assert changed.any()
        left, top, right, bottom = regions.get(pair.type, (0, 0, 64, 64))
        outside = changed.copy()
        outside[top:bottom, left:right] = False
        assert not outside.any()
        if pair.type not in ("Color", *regions):
            assert not changed[:16].any()  # the stars and the sign stay


@pytest.fixture(scope="module")
def teacher() -> tuple:
    """The miniature's diffusion model, a reader of its captions, 120 unseen scenes, their pixels and latents."""
    from transformers import AutoTokenizer, CLIPTextModel

    folder = str(model.MINIATURE / "diffusion")
    diffusion = model.load_diffusion(folder, "", torch.float32, "cpu")
    tokenizer = AutoTokenizer.from_pretrained(folder, subfolder="tokenizer")
    encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", dtype=torch.float32)
    scenes, rng = make.random_scenes(120, 41), np.random.default_rng(41)
    pixels = np.stack([np.asarray(make.draw(scene, rng)) for scene in scenes])
    pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255

    @torch.no_grad()
    def read(captions: list[str]) -> torch.Tensor:
        tokens = tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
        return encoder(tokens).last_hidden_state[:, None]  # (B, 1, L, W)

    return diffusion, read, scenes, pixels, diffusion.encode(pixels)


def unseen_losses(diffusion, latents: torch.Tensor, condition: torch.Tensor, lowest: int) -> np.ndarray:
    """train.py's loss of each four scenes under a condition, at t from `lowest`, with the same draws for every one."""
    losses = []
    for b in range(0, len(latents), 4):
        rng = np.random.default_rng(b)
        t = torch.from_numpy(rng.integers(lowest, 1000, (4, 4)))
        noise = torch.from_numpy(rng.standard_normal((4, 4, *latents.shape[1:]), dtype=np.float32))
        with torch.no_grad():
            losses.append(train.denoising_loss(diffusion, latents[b : b + 4], condition[b : b + 4], t, noise).item())
    return np.array(losses)


def clearly_lower(losses: np.ndarray, others: np.ndarray) -> bool:
    """By three standard errors of the difference."""
    rises = others - losses
    return rises.mean() > 3 * rises.std(ddof=1) / math.sqrt(len(rises))


def test_the_teacher_reads_its_captions(teacher):
    """train.py's loss with the right caption, with one wrong in a single detail, and with the empty text."""
    diffusion, read, scenes, _, latents = teacher
    clear = 0
    for k, values in enumerate(make.DETAILS.values(), start=2):
        named = np.isin(np.arange(10), (0, k - 1))  # the caption says class, colour and this detail
        wrong = scenes.copy()
        wrong[:, k] = (wrong[:, k] + 1) % len(values)
        sides = [read([make.caption(scene, named) for scene in side]) for side in (scenes, wrong)]
        clear += clearly_lower(*(unseen_losses(diffusion, latents, side, 300) for side in sides))
    assert clear >= 7


def test_a_few_steps_let_the_class_token_say_more_than_the_empty_text(teacher, tmp_path):
    """Sixteen steps on the miniature, the class token alone: on unseen scenes the loss falls, below the empty text's;
    another scene's class token says less than nothing."""
    diffusion, _, scenes, pixels, latents = teacher
    more = ["--recap", "none", "--projection", "fitted", "--lr", "0.3", "--workers", "0", "--out", str(tmp_path)]
    losses = {}
    for steps in ("1", "16"):
        args = train.parse_args([*more, "--steps", steps, "--overwrite"])
        args.mmvp, args.lr = None, args.lr * (steps != "1")  # one step at no rate: the start
        train.train(args)
        clip = model.load_clip(f"{tmp_path}/clip")
        encoder = condition.VisualCondition(clip, diffusion, model.parse_recap("none", 64), "mean", 0)
        encoder.load_state_dict(weights(tmp_path))
        with torch.no_grad():
            c = encoder(clip.view(pixels), diffusion.text, torch.empty(len(scenes), 1, 0, dtype=torch.int64))
        losses[steps] = unseen_losses(diffusion, latents, c, 0)
    empty = unseen_losses(diffusion, latents, diffusion.text[:, None].expand(len(scenes), -1, -1, -1), 0)
    assert clearly_lower(losses["16"], losses["1"]) and clearly_lower(losses["16"], empty)
    assert clearly_lower(empty, unseen_losses(diffusion, latents, c.roll(1, 0), 0))


# ---------------------------------------------------------------------------------------------------------------------
# extras/bench.py


@pytest.mark.parametrize(
    "name, tokens, clip",
    [
        ("openai-vit-l-14-224", 77, 0.486),
        ("siglip-so400m-14-224", 43, 0.661),
        *(
            pytest.param(*row, marks=pytest.mark.slow)
            for row in (
                ("openai-vit-l-14-336", 77, 1.145),
                ("metaclip-vit-l-14-224", 257, 0.486),
                ("metaclip-vit-h-14-224", 257, 1.003),
                ("siglip-so400m-14-384", 73, 2.010),
                ("dfn-vit-h-14-224", 257, 1.003),
                ("dfn-vit-h-14-378", 365, 3.020),
            )
        ),
    ],
)
def test_nothing_is_computed_twice(name, tokens, clip):
    """The work of a full-size step beside its floor, and that beside TFLOP counted before this code was written.

    On the meta device there is nothing to read back, so a step that runs there never waits for its device.
    """
    args = ["--recipe", name, "--random-weights", "--data", "synthetic", "--micro-batch", "2", "--batch-size", "2"]
    with NoInit():
        step = bench.Step(train.parse_args([*args, "--precision", "bf16"]), torch.device("meta"))
    work, floor = sum(bench.executed_work(step).values()), bench.floor_work(step)
    assert 0.999 < work / sum(floor.values()) < 1.02
    unet = 1.671 + (1.714 - 1.671) * (tokens - 77) / (257 - 77)  # a state's, forward and backward: linear in the tokens
    assert floor == pytest.approx({"VAE": 1.117, "CLIP": clip, "U-Net": 2 * unet}, rel=2e-3)
    if name == "openai-vit-l-14-224":
        assert work == pytest.approx(4.95, rel=0.01)  # the README's
        step.diffusion.unet.requires_grad_(True)  # what the floor is for: weight gradients that nothing needs
        assert sum(bench.executed_work(step).values()) / sum(bench.floor_work(step).values()) > 1.2


def test_the_benchmark_measures_a_step(models, tmp_path, capsys):
    figures = {}
    for states in (2, 4):
        more = ["--states", f"{states}", "--steps", "3", "--json", f"{tmp_path}/{states}.json"]
        bench.main([*arguments(models, tmp_path / "run"), *more])
        f = figures[states] = json.loads((tmp_path / f"{states}.json").read_text())
        ms, work, floor = f["ms_per_image"], f["tflop_per_image"], f["floor_tflop_per_image"]
        assert list(ms) == list(work) == ["copy", "CLIP", "VAE", "U-Net forward", "backward", "optimizer", "total"]
        assert sum(ms.values()) == pytest.approx(2 * ms["total"], rel=0.5)  # the parts, and the steps timed as a whole
        assert f["images_per_second"] == pytest.approx(1000 / ms["total"])
        assert f["tflop_per_second"] == pytest.approx(work["total"] * f["images_per_second"])
        assert f["share_of_ceiling"] == pytest.approx(f["tflop_per_second"] / f["ceiling_tflop_per_second"])
        assert 0 < f["share_of_ceiling"] < 1 and 0.1 < f["peak_memory_gib"] < 10
        assert 0.99 < f["executed_over_floor"] == pytest.approx(work["total"] / floor["total"])
        assert (f["states"], f["micro_batch"], f["image_size"], f["tokens"]) == (states, 4, 32, 9)
        assert f"images_per_second               {f['images_per_second']:.4g}\n" in capsys.readouterr().out
    more = figures[4]["tflop_per_image"]["total"] - figures[2]["tflop_per_image"]["total"]
    assert more == pytest.approx(figures[2]["floor_tflop_per_image"]["U-Net"], rel=0.05)  # two more states
    assert not (tmp_path / "run").exists()
    with pytest.raises(SystemExit, match="--json .*nowhere/x.json: there is no folder .*nowhere"):
        bench.main([*arguments(models, tmp_path / "run"), "--json", f"{tmp_path}/nowhere/x.json"])


# ---------------------------------------------------------------------------------------------------------------------
# extras/report.py


def write_run(models: Path, out: Path, mmvp: Path | None, steps: int = 3, **args) -> Path:
    """What a run leaves that a report reads, with scores drawn at random if there is a benchmark."""
    (out / "clip").mkdir(parents=True)
    settings = vars(train.parse_args(arguments(models, out, "--steps", str(steps)))) | dict(precision="fp32")
    settings |= dict(mmvp=mmvp and str(mmvp), versions=dict(torch="2.14.1"))
    (out / "args.json").write_text(json.dumps(settings | args))
    (out / "checkpoint").mkdir()
    state = dict(step=steps, unreadable=0, images=0, args={})
    (out / "checkpoint" / "state.json").write_text(json.dumps(state))
    rng = np.random.default_rng(0)
    with open(out / "metrics.jsonl", "w") as file:
        for step in range(steps):
            line = dict(step=step, loss=rng.random(), grad_norm=rng.random(), lr=0.1, images_per_second=5.0)
            file.write(json.dumps(line | dict(unreadable=step // 2)) + "\n")
    if mmvp:
        pairs = evaluate_mmvp.read_mmvp(str(mmvp))
        cosines = rng.random((2, 2, len(pairs), 2, 2), dtype=np.float32)
        cosines[:, :, 0] = 0.25  # ties
        evaluate_mmvp.save_scores(out / "mmvp", ["before", "after"], list(cosines), pairs)
    return out


class Tree(html.parser.HTMLParser):
    """The elements of a page as a browser finds them."""

    def __init__(self):
        super().__init__()
        self.builder, self.open = xml.etree.ElementTree.TreeBuilder(), []

    def handle_starttag(self, tag, attributes):
        self.builder.start(tag, dict(attributes))
        self.open.append(tag)
        if tag in ("meta", "img"):
            self.handle_endtag(tag)

    def handle_startendtag(self, tag, attributes):  # in SVG
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.builder.end(tag)

    def handle_data(self, data):
        self.builder.data(data)


def read_page(out: Path) -> xml.etree.ElementTree.Element:
    """The page, which is whole and asks for nothing from elsewhere."""
    tree = Tree()
    tree.feed((out / "report.html").read_text(encoding="utf-8").strip())
    tree.close()
    assert not tree.open
    page = tree.builder.close()
    for element in page.iter():
        assert element.tag not in ("script", "link", "iframe", "object", "base", "a")
        assert not any(name.startswith("on") or name in ("href", "style", "srcset") for name in element.attrib)
        assert element.get("src", "data:image/jpeg;base64,").startswith("data:image/jpeg;base64,")
    style = page.find("head/style").text
    assert "url(" not in style and "@import" not in style and "prefers-color-scheme: dark" in style
    return page


def words(element) -> str:
    return " ".join("".join(element.itertext()).split())


def cells(table) -> list[list[str]]:
    return [[words(cell) for cell in row] for row in table.iter("tr")]


def test_the_report_says_what_pairs_csv_says(models, tmp_path):
    """Every figure beside the one recomputed from pairs.csv, each pair where its change puts it."""
    mmvp = write_mmvp(tmp_path / "mmvp", 3, tuple(evaluate_mmvp.TYPES))
    out = write_run(models, tmp_path / "run", mmvp, clip="openai-vit-l-14-224")
    assert report.write_report(out) == f"written: {out}/report.html, {out}/clip/README.md"
    page = read_page(out)
    with open(out / "mmvp" / "pairs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    cards = {words(card.find("h3/small")): card for card in page.iter("article")}
    scores, *_, others = (cells(table) for table in page.iter("table"))
    others = {row[0]: row[1:] for row in others[1:]}
    right, won, lost = np.zeros((2, 2, 9)), [0, 0], [0, 0]  # (readings, CLIPs, types)
    for both in zip(rows[:27], rows[27:], strict=True):
        ids, tables, marks = f"{both[0]['id1']}, {both[0]['id2']}", [], []
        for r, reading in enumerate(evaluate_mmvp.READINGS):
            expected, outcome = [[reading, "image 1", "image 2"]], []
            for s in (1, 2):
                for when, row in zip(("before", "after"), both):
                    one, two = (row[f"{reading} s{s} i{i}"] for i in (1, 2))
                    choice = 1 if float(one) > float(two) else 2
                    outcome.append(choice == s)
                    mark = "✓ " if choice == s else "✗ "
                    shown = [mark * (choice == i) + f"{float(cosine):.5f}" for i, cosine in ((1, one), (2, two))]
                    expected.append([f"statement {s}, {when}", *shown])
            before, after = outcome[0] and outcome[2], outcome[1] and outcome[3]
            right[r, :, evaluate_mmvp.TYPES.index(both[0]["type"])] += before, after
            won[r], lost[r] = won[r] + (after and not before), lost[r] + (before and not after)
            marks += ["✗✓"[before], "✗✓"[after]]
            if before != after:
                tables.append(expected)
                assert f"{'won' if after else 'lost'} in {reading}" in [words(b) for b in cards[ids].iter("b")]
        statements = [both[0]["statement1"], both[0]["statement2"]]
        if not tables:
            assert others.pop(ids) == [both[0]["type"], *statements, *marks]
            continue
        card = cards.pop(ids)
        assert words(card.find("h3")).startswith(both[0]["type"]) and len(list(card.iter("b"))) == len(tables)
        assert [cells(table) for table in card.iter("table")] == tables
        assert [words(caption)[2:] for caption in card.iter("figcaption")] == statements
        images = zip(card.iter("img"), (both[0]["id1"], both[0]["id2"]), statements, strict=True)
        for image, i, statement in images:
            assert image.get("alt").endswith(statement)
            shown = Image.open(io.BytesIO(base64.b64decode(image.get("src").partition(",")[2])))
            with Image.open(mmvp / "MLLM_VLM Images" / both[0]["type"] / f"{i}.jpg") as original:
                assert np.abs(np.array(shown, dtype=int) - np.array(original)).mean() < 20  # JPEG of noise
    assert not cards and not others

    right *= 100 / 3
    for r, stat in enumerate(page.find("body/header/div")):
        change = json.loads((out / "mmvp" / "scores.json").read_text())["clips"][1]["change"][r]
        assert (change["won"], change["lost"]) == (won[r], lost[r])
        before, after = right[r].mean(1)
        told = f"{before:.1f} → {after:.1f} {after - before:+.1f} points, 95% interval {change['low']:+.1f} … "
        told += f"{change['high']:+.1f} {won[r]} pairs won, {lost[r]} lost, p = {change['p']:.2g} "
        assert told.replace("-", "−") in " ".join(map(words, stat)).replace("1 pairs", "1 pair")
    for t, name in enumerate(evaluate_mmvp.TYPES):
        (b0, a0), (b1, a1), paper = *right[:, :, t], evaluate_mmvp.BASELINES["openai-vit-l-14-224"][t]
        figures = [
            f"{b0:.1f}",
            f"{a0:.1f}",
            f"{a0 - b0:+z.1f}",
            f"{b1:.1f}",
            f"{a1:.1f}",
            f"{a1 - b1:+z.1f}",
            f"{paper}",
        ]
        assert scores[1 + t] == [name, *(figure.replace("-", "−") for figure in figures)]
    assert scores[10][-1] == "19.3 → 25.9"
    for r, chart in enumerate(list(page.iter("svg"))[:2]):
        widths = [float(bar.get("width")[:-1]) / 0.86 for bar in chart.iter("rect")]
        assert widths == pytest.approx([*right[r].T.flat, *right[r].mean(1)], abs=0.01)
        ticks = [float(line.get("x1")[:-1]) / 0.86 for line in chart.iter("line") if line.get("class") == "paper"]
        assert ticks == pytest.approx(
            [*evaluate_mmvp.BASELINES["openai-vit-l-14-224"], 19.3, 25.9] * (r == 0), abs=0.01
        )


@pytest.mark.parametrize(
    "types, args",
    [
        (tuple(evaluate_mmvp.TYPES), {}),
        (("Color",), dict(clip="openai-vit-l-14-224")),
        (tuple(evaluate_mmvp.TYPES), dict(clip="openai-vit-l-14-224", random_weights=True)),
    ],
)
def test_the_papers_figures_stand_beside_its_own_clip_alone(models, tmp_path, types, args):
    out = write_run(models, tmp_path / "run", write_mmvp(tmp_path / "mmvp", types=types), **args)
    report.write_report(out)
    page = read_page(out)
    assert not [element for element in page.iter() if element.get("class") == "paper"]
    assert len(cells(next(page.iter("table")))[0]) == 7 and "25.9 |" not in (out / "clip" / "README.md").read_text()
    assert ("both with random weights" in words(page.find("body"))) == ("random_weights" in args)


@pytest.mark.parametrize(
    "won, lost, low, high, words",
    [
        (0, 0, 0, 0, "No effect: not one of 135 pairs changed"),
        (7, 6, -4.4, 5.9, "No effect that 135 pairs can show"),
        (6, 0, 0.0, 8.9, "No effect that 135 pairs can show"),
        (14, 5, 1.5, 11.9, "A gain, though not by the exact test"),
        (15, 5, 1.5, 11.9, "A gain"),
        (5, 14, -11.9, -1.5, "A loss, though not by the exact test"),
        (5, 15, -11.9, -1.5, "A loss"),
    ],
)
def test_a_change_in_words(won, lost, low, high, words):
    change = dict(won=won, lost=lost, low=low, high=high, p=evaluate_mmvp.mcnemar(won, lost))
    assert report.verdict(report.Run(None, {}, {}, 0, [], pairs=[None] * 135, changes=[change]), 0) == words


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "a | b `c` [d](javascript:e) *f*\n# g",
    "\udc80&lt;",
]


def test_hostile_text_stays_text(models, tmp_path):
    mmvp = write_mmvp(tmp_path / "mmvp", 3, ("Color",))
    out = write_run(models, tmp_path / "run", mmvp, text=HOSTILE[0], recap=HOSTILE[1], join=HOSTILE[2], lr=HOSTILE[3])
    args = json.loads((out / "args.json").read_text())
    args |= dict(clip=HOSTILE[0], diffusion=HOSTILE[1], recipe=HOSTILE[2], data=HOSTILE, mmvp=HOSTILE[0])
    (out / "args.json").write_text(json.dumps(args | {HOSTILE[1]: HOSTILE, "versions": {h: h for h in HOSTILE}}))
    with open(out / "metrics.jsonl", "a") as file:
        line = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
        file.write(json.dumps(line | dict(passed_over=HOSTILE)) + "\n")
    with open(out / "mmvp" / "pairs.csv", newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    for i, row in enumerate(rows):
        p = i % 3
        row |= dict(type=HOSTILE[p // 2], id1=HOSTILE[0], id2=HOSTILE[1], statement1=HOSTILE[p], statement2=HOSTILE[1])
    with open(out / "mmvp" / "pairs.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, reader.fieldnames)
        writer.writeheader()
        writer.writerows(rows)
    report.write_report(out)
    page = read_page(out)
    found = "".join(page.itertext())
    assert not list(page.iter("img")) and all(found.count(text) > 3 for text in HOSTILE[:3])
    card = (out / "clip" / "README.md").read_text(encoding="utf-8")
    head, body = card.removeprefix("---\n").split("\n---\n", 1)
    assert "<" not in body and "`" not in body.replace("\\`", "") and "\n# g" not in body
    assert not re.search(r"(?<!\\)\[d", body) and not re.search(r"(?<!\\)\*f", body)
    for row in [line for line in body.splitlines() if line.startswith("|")]:
        assert len(re.findall(r"(?<!\\)\|", row)) == 8


def test_long_runs_are_drawn_compactly_and_short_ones_at_all(models, tmp_path):
    for steps, points in ((30_000, 300), (301, 300), (40, 40), (2, 2), (1, 2)):
        out = write_run(models, tmp_path / f"{steps}", None, steps)
        report.write_report(out)
        page = read_page(out)
        assert (out / "report.html").stat().st_size < 60_000
        for chart, key in zip(page.iter("svg"), ("loss", "grad_norm")):
            lines = [line.get("points").split() for line in chart.iter("polyline")]
            assert [len(line) for line in lines] == [points, 20][: 1 + (steps >= 40)]
        values = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
        chart = next(page.iter("svg"))
        top, _, bottom = (float(tick.text) for tick in list(chart.iter("text"))[:3])
        xs, ys = np.array([point.split(",") for point in chart.find(".//polyline").get("points").split()], float).T
        if steps == 30_000:
            expected = np.mean(np.reshape(values, (300, 100)), 1)
            assert xs[[0, -1]] == pytest.approx([49.5 / 29_999, 1 - 49.5 / 29_999], abs=1e-4)
        elif steps <= 40:
            expected = np.resize(values, points)
            assert xs == pytest.approx(np.arange(points) / (points - 1) if steps > 1 else [0, 0], abs=1e-4)
        assert steps == 301 or top + ys * (bottom - top) == pytest.approx(expected, abs=0.006)


def test_of_many_pairs_a_hundred_are_pictures(models, tmp_path):
    out = write_run(models, tmp_path / "run", write_mmvp(tmp_path / "mmvp", 150))
    report.write_report(out)
    page = read_page(out)
    kinds = [words(card.find("h3")).split()[0] for card in page.iter("article")]
    assert kinds == ["Color"] * 50 + ["Camera"] * 50 and len(list(page.iter("img"))) == 200
    assert re.search(r"100 of [12][0-9]{2} are shown", words(page))
    outcomes = Counter(words(card.find("h3/b")).split()[0] for card in page.iter("article"))
    assert outcomes == dict(won=50, lost=50)
    assert len(cells(list(page.iter("table"))[-1])) == 1 + 300 - 100


def test_a_benchmark_that_is_gone_or_another_is_said(models, tmp_path):
    mmvp = write_mmvp(tmp_path / "mmvp")
    out = write_run(models, tmp_path / "run", mmvp)
    mmvp.rename(tmp_path / "moved")
    report.write_report(out)
    before = read_page(out)
    assert f"Without pictures, which --mmvp PATH brings back: {mmvp}: no such folder" in words(before)
    assert not list(before.iter("img")) and list(before.iter("article"))
    report.write_report(out, str(tmp_path / "moved"))
    page = read_page(out)
    assert len(list(page.iter("img"))) == 2 * len(list(page.iter("article"))) and "Without" not in words(page)
    whole = (out / "report.html").read_bytes()
    other = write_mmvp(tmp_path / "other")
    (other / "Questions.csv").write_text((other / "Questions.csv").read_text().replace("Color,", "Color,no "))
    with pytest.raises(SystemExit, match="other: not the benchmark that was scored .pair 3, 4 differs"):
        report.write_report(out, str(other))
    for image in (tmp_path / "moved").rglob("*.jpg"):
        image.write_bytes(b"no image")
    with pytest.raises(SystemExit, match="jpg: not a readable image"):
        report.write_report(out, str(tmp_path / "moved"))
    assert (out / "report.html").read_bytes() == whole and not list(out.rglob("*.part"))


def test_a_run_ends_with_its_report_and_card(models, tmp_path, capsys, monkeypatch):
    """Not scored, scored, on its way, and where no report can be written; open_clip reads the folder with the card."""
    from huggingface_hub import ModelCard

    out, mmvp = tmp_path / "run", write_mmvp(tmp_path / "mmvp")
    written = f"written: {out}/report.html, {out}/clip/README.md\n"
    run(models, out)
    assert written in capsys.readouterr().out
    assert "Not scored" in words(read_page(out)) and "cls" not in (out / "clip" / "README.md").read_text()
    run(models, out, "--mmvp", str(mmvp))
    assert written in capsys.readouterr().out
    card = ModelCard.load(out / "clip" / "README.md")
    data = card.data.to_dict()
    assert data == dict(library_name="open_clip", pipeline_tag="zero-shot-image-classification", tags=["clip", "diva"])
    scores = json.loads((out / "mmvp" / "scores.json").read_text())["clips"]
    for reading in evaluate_mmvp.READINGS:
        assert f"{reading}: {scores[0][reading]['average']:.1f} → {scores[1][reading]['average']:.1f}" in card.text
    assert "keep the licence" in card.text and "3 steps, 4 images each" in card.text
    reloaded = open_clip.create_model_and_transforms(f"local-dir:{out}/clip")[0]
    assert open_clip.get_tokenizer(f"local-dir:{out}/clip")(["red cat"]).shape == (1, 12)
    kept = weights(out)
    assert all(torch.equal(v, kept[f"visual.{k}"]) for k, v in reloaded.visual.state_dict().items())

    lines = (out / "metrics.jsonl").read_text().splitlines(True)
    (out / "metrics.jsonl").write_text("".join(lines[:2]) + lines[2][:20])  # as a run on its way leaves it
    state = (out / "checkpoint" / "state.json").read_text()
    (out / "checkpoint" / "state.json").write_text(state.replace('"step": 3', '"step": 2'))
    shutil.rmtree(out / "mmvp")
    assert report.write_report(out) == f"written: {out}/report.html"
    assert "for 2 steps of 3 (it is not finished)" in words(read_page(out))

    def full(path: Path, content: str) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(report, "write_whole", full)
    run(models, out, "--overwrite")
    assert "no report: No space left on device\n" in capsys.readouterr().out
    assert not (out / "report.html").exists() and (out / "clip" / "open_clip_model.safetensors").exists()


@pytest.mark.parametrize(
    "name, old, new, message",
    [
        ("", "", None, "run: no such folder"),
        ("args.json", "", None, "run: no run in it .args.json is missing"),
        ("args.json", "{", "[", "args.json: not what a run writes"),
        ("args.json", '"clip"', '"klip"', "args.json: not what a run writes .KeyError: 'clip'"),
        ("metrics.jsonl", "", None, "run: this run has taken no step yet"),
        (
            "metrics.jsonl",
            '"step": 1, "loss"',
            '"step": 1, loss',
            "metrics.jsonl: not what a run writes .*: line 2 col",
        ),
        (
            "metrics.jsonl",
            '"lr": 0.1',
            '"lr": NaN',
            "metrics.jsonl: not what a run writes .ValueError: a number is not",
        ),
        ("metrics.jsonl", '"lr": 0.1', '"lr": [1]', "metrics.jsonl: not what a run writes .TypeError"),
        ("mmvp/scores.json", '"won": ', '"won": 1', "scores.json: .*its scores are not those of pairs.csv"),
        ("mmvp/scores.json", "{", "", "scores.json: not what a run writes .JSONDecodeError"),
        ("mmvp/pairs.csv", "", None, "pairs.csv: not what a run writes .FileNotFoundError"),
        ("mmvp/pairs.csv", "after,", '"after,', "pairs.csv: not what a run writes .Error"),
        ("mmvp/pairs.csv", "before,Color", "before,Colour", "pairs.csv: .*the pairs of the two CLIPs differ"),
        ("mmvp/pairs.csv", "cls s1 i1", "cls", "pairs.csv: not what a run writes .KeyError: 'cls s1 i1'"),
    ],
)
def test_no_report_of_what_no_run_wrote(models, tmp_path, monkeypatch, capsys, name, old, new, message):
    """One sentence, exit code 2, and the report that was there before is whole."""
    out = write_run(models, tmp_path / "run", write_mmvp(tmp_path / "mmvp"))
    path = out / name
    if new is None:
        path.rename(tmp_path / "gone")
    else:
        path.write_text(path.read_text().replace(old, new))
    if out.exists():
        (out / "report.html").write_text("the last one")
    monkeypatch.setattr(sys, "argv", ["report.py", str(out)])
    with pytest.raises(SystemExit) as stop, model.one_sentence("report.py"):
        report.main()
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and re.search(message, said)
    assert not out.exists() or (out / "report.html").read_text() == "the last one"
    assert not list(tmp_path.rglob("*.part")) and not (out / "clip" / "README.md").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: a sentence


@pytest.mark.parametrize(
    "more, message",
    [
        (["--recipe", "openai"], "--recipe openai: no such recipe; there are miniature, openai-vit"),
        (["--data", "nowhere/0.tar"], "--data nowhere/0.tar: no such file or folder"),
        (
            ["--recap", "random:300", "--clip", "openai-vit-l-14-224"],
            "asks for 300 patches, and this CLIP has 1 to 256",
        ),
        (["--recap", "pool:0", "--clip", "openai-vit-l-14-224"], "asks for 0 patches"),
        (["--recap", "dense", "--clip", "openai-vit-l-14-224"], "must be random:COUNT, random:SHARE%"),
        (
            ["--clip", "metaclip-vit-l-14-224", "--recap", "all", "--join", "positions", "--diffusion", "a/b"],
            "257 tokens",
        ),
        (["--batch-size", "6"], "--batch-size 6: must be a multiple of 4"),
        (["--batch-size", "0"], "'0' is not a whole number of at least 1"),
        (["--lr", "fast"], "'fast' is not a number of at least 0"),
        (["--warmup", "23"], "--warmup 23.0: is a share"),
        (["--precision", "fp16"], "argument --precision: invalid choice"),
        (["--clip", "ViT-L-14"], "ViT-L-14: no such CLIP; name a recipe"),
        (["--diffusion", "nowhere"], "nowhere: no such diffusion model"),
        (["--recap", "dense"], "must be random:COUNT, random:SHARE%"),
        (["--seed", "99999999999999999999"], "is not a whole number"),
        (["--out", __file__], "is a file; a run needs a folder"),
        (["--random-weights", "--diffusion", "a/b"], "--random-weights: builds sd2-community"),
        (["--random-weights", "--projection", "fitted"], "--projection fitted: needs a text encoder that has learnt"),
    ],
)
def test_bad_arguments_end_in_a_sentence(models, tmp_path, more, message):
    with pytest.raises(SystemExit, match=message) as stop:
        train.parse_args(arguments(models, tmp_path / "run", *more))
    assert isinstance(stop.value.code, str) and "\n" not in stop.value.code
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "more, message",
    [
        (["--recap", "random:17"], "asks for 17 patches, and this CLIP has 1 to 16"),
        (["--recap", "all", "--join", "positions"], "the text has 9 positions, the recap 17 tokens"),
        (["--image-size", "34"], "--image-size 34: must be a multiple of 4"),
        (["--clip", "ViT-B-32:nobody"], "open_clip has no weights of that name .for ViT-B-32: openai"),
        (["--clip", "hf-hub:nobody/nothing"], "CLIP hf-hub:nobody/nothing could not be loaded"),
        (["--diffusion", model.SD21], f"could not be loaded: .*--diffusion {model.SD21_MIRROR}"),
        (["--data", "{}/gz.tar"], "gz.tar: gzipped, .* unpack it: gzip -dc"),
        (["--data", "{}/text.tar"], "text.tar: not a whole tar file"),
        (["--data", "{}/none.tar"], "none.tar: no images"),
        (["--data", "{}/folder"], "folder: no images in this folder"),
        (["--data", "{}/*.zip"], "zip: no such file"),
        (["--mmvp", "{}/folder"], "folder: no image folder"),
        (["--clip", "{}/folder"], "folder: no CLIP in this folder"),
        (
            ["--diffusion", "{}/folder"],
            "folder: no Stable Diffusion in diffusers' layout .scheduler/scheduler_config.json is",
        ),
    ],
)
def test_bad_input_ends_in_a_sentence(models, tmp_path, more, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "gz.tar").write_bytes(b"\x1f\x8b" + bytes(600))
    (tmp_path / "text.tar").write_text("no tar " * 100)
    write_shard(tmp_path / "none.tar", {"0.txt": b"caption"})
    with pytest.raises(SystemExit, match=message) as stop:
        run(models, tmp_path / "run", *[part.format(tmp_path) for part in more])
    assert "\n" not in stop.value.code and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_hub_that_refuses_is_a_sentence(models, tmp_path):
    """A hub of this test's own: what is not found, what is gated, and a hub that is not there."""
    import http.server
    import threading

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            gated = "gated" in self.path
            self.send_response(403 if gated else 404)
            self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
            self.send_header("X-Error-Message", "Access is restricted" if gated else "Repository not found")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub, nowhere = f"http://127.0.0.1:{server.server_port}", "http://127.0.0.1:1"
    clip = ["evaluate_mmvp.py", "--mmvp", str(model.MINIATURE / "mmvp")]
    train_with = ["train.py", "--steps", "1", "--out", str(tmp_path / "run"), "--diffusion"]
    for endpoint, command, words in (
        (hub, [*clip, "hf-hub:some/missing"], "CLIP hf-hub:some/missing could not be loaded"),
        (hub, [*clip, "hf-hub:some/gated"], "CLIP hf-hub:some/gated could not be loaded"),
        (hub, [*train_with, "some/gated"], "diffusion model some/gated could not be loaded"),
        (hub, ["evaluate_mmvp.py", "x", "--mmvp", "some/gated"], "data set some/gated could not be fetched"),
        (nowhere, [*train_with, "some/missing"], "diffusion model some/missing could not be loaded"),
    ):
        command = [word if word != "x" else f"{models}/vit" for word in command]
        environment = os.environ | dict(HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path / "home"))
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
        )
        said = [line for line in done.stderr.splitlines() if line.strip() and "shard/s" not in line]  # but for the bar
        assert done.returncode == 2 and len(said) == 1 and words in said[0], done.stderr
    server.shutdown()


def load(folder: Path):
    """What a folder of the fixture `models` holds, by its name."""
    if folder.name == "vit":
        return model.load_clip(str(folder))
    return model.load_diffusion(str(folder), "", torch.float32, "cpu")


class Payload:
    """A pickle that leaves a file behind when it is executed."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    "part, name, message",
    [
        ("vit", "open_clip_pytorch_model.bin", "CLIP .*vit could not be loaded: "),
        ("epsilon", "unet/diffusion_pytorch_model.bin", "diffusion model .*epsilon could not be loaded: "),
        ("epsilon", "vae/diffusion_pytorch_model.bin", "diffusion model .*epsilon could not be loaded: "),
        ("epsilon", "text_encoder/pytorch_model.bin", "diffusion model .*epsilon could not be loaded: "),
    ],
)
def test_no_weights_execute_anything(models, tmp_path, part, name, message):
    """Pickled weights in place of safetensors are refused, and what they would do is not done."""
    folder = shutil.copytree(models / part, tmp_path / part)
    for file in (folder / name).parent.glob("*.safetensors"):
        file.unlink()
    (folder / name).write_bytes(pickle.dumps(Payload(tmp_path / "executed")))
    with pytest.raises(SystemExit, match=message) as stop:
        load(folder)
    assert "\n" not in stop.value.code and not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "part, remove, message",
    [
        ("vit", "open_clip_model.safetensors", "CLIP .*vit could not be loaded: "),
        ("vit", "open_clip_config.json", "no CLIP in this folder .open_clip_config.json is missing"),
        ("epsilon", "unet/config.json", "no Stable Diffusion in diffusers' layout .unet/config.json is missing"),
        ("epsilon", "unet/diffusion_pytorch_model.safetensors", "diffusion model .*epsilon could not be loaded: "),
        ("epsilon", "text_encoder/config.json", "text_encoder/config.json is missing"),
    ],
)
def test_half_a_folder_is_refused(models, tmp_path, part, remove, message):
    folder = shutil.copytree(models / part, tmp_path / part)
    (folder / remove).unlink()
    with pytest.raises(SystemExit, match=message) as stop:
        load(folder)
    assert "\n" not in stop.value.code


@pytest.mark.parametrize("part", ["clip", "unet"])
def test_weights_of_another_architecture_are_refused(models, tmp_path, part):
    name, key = ("vit", "open_clip_config.json") if part == "clip" else ("epsilon", "unet/config.json")
    folder = shutil.copytree(models / name, tmp_path / name)
    config = json.loads((folder / key).read_text())
    if part == "clip":
        config["model_cfg"]["vision_cfg"]["layers"] = 3
    else:
        config["block_out_channels"] = [16, 16]
    (folder / key).write_text(json.dumps(config))
    with pytest.raises(SystemExit, match=f"{name} could not be loaded: ") as stop:
        load(folder)
    assert "\n" not in stop.value.code


def test_help_and_mistyped_arguments_do_not_wait_for_torch():
    """A mistyped argument is one line and exit code 2, and torch is not imported to say so."""
    code = "import runpy, sys\ntry: runpy.run_path('train.py', run_name='__main__')\n"
    code += "finally: print('torch' in sys.modules)"
    impossible = ["--recipe", "openai-vit-l-14-336", "--data", ".", "--recap", "random:577"]
    for more, exit_code, lines in ((["--help"], 0, 0), (["--recipe", "x"], 2, 1), (impossible, 2, 1)):
        done = subprocess.run([sys.executable, "-c", code, *more], cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, len(done.stderr.splitlines())) == (exit_code, lines)
        assert done.stdout.splitlines()[-1] == "False"


ODD = np.array([b'"', b",", b"\n", b"\0", b"-", b"9" * 20, b"9" * 5000, b"{", b"[", "é".encode()], dtype=object)


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """Bytes changed, cut out, repeated or cut off, one to eight times."""
    content = bytearray(content)
    for _ in range(rng.integers(1, 9)):
        at, length = int(rng.integers(len(content) + 1)), int(rng.integers(1, 20))
        match rng.integers(5):
            case 0:
                content[at : at + length] = rng.bytes(length)
            case 1:
                del content[at : at + length]
            case 2:
                content[at:at] = content[at : at + length]
            case 3:
                content[at:at] = rng.choice(ODD)
            case 4 if rng.random() < 0.2:
                del content[at:]
    return bytes(content)


@pytest.fixture(scope="module")
def parsers(models, tmp_path_factory) -> dict:
    """For each parser a good input, and a function that takes bytes to what it makes of them."""
    folder = tmp_path_factory.mktemp("parsers")
    tar, mmvp = write_shard(folder / "0.tar", {f"{i}.jpg": b"12345" for i in range(3)}), write_mmvp(folder / "mmvp")
    good = tar.read_bytes()[:3072]  # three headers with their images, and the first of the two empty blocks at the end
    other = write_shard(folder / "1.tar", {f"{i}.jpg": b"12345" for i in range(3)})
    data.shard_index(str(other))
    cache, questions = Path(f"{other}.index.npy"), mmvp / "Questions.csv"
    checkpoint = run(models, folder / "run") / "checkpoint"
    linear = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(linear.parameters(), 1, momentum=0.9)
    linear(torch.ones(2)).sum().backward()
    optimizer.step()
    small = folder / "small"
    model.save_checkpoint(small, linear, optimizer, {})

    def read_tar(content: bytes):
        tar.write_bytes(content)
        Path(f"{tar}.index.npy").unlink(missing_ok=True)
        return data.shard_index(str(tar))

    def read_cache(content: bytes):
        cache.write_bytes(content)
        return data.shard_index(str(other))

    scored = write_run(models, folder / "scored", mmvp)

    def read_report():
        return report.page(found := report.read_run(scored)), report.card(found)

    def parser(path: Path, read):
        def parse(content: bytes):
            path.write_bytes(content)
            return read()

        return path.read_bytes(), parse

    return {
        "index": (good, read_tar),
        "cache": (cache.read_bytes(), read_cache),
        "mmvp": parser(questions, lambda: evaluate_mmvp.read_mmvp(str(mmvp))),
        "recap": (b"random:50%", lambda content: model.parse_recap(content.decode(errors="replace"), 16)),
        "state": parser(checkpoint / "state.json", lambda: model.read_state(checkpoint)),
        "weights": parser(small / "weights.safetensors", lambda: model.load_checkpoint(small, linear, optimizer)),
        "momentum": parser(small / "momentum.safetensors", lambda: model.load_checkpoint(small, linear, optimizer)),
        "args": parser(scored / "args.json", read_report),
        "metrics": parser(scored / "metrics.jsonl", read_report),
        "scores": parser(scored / "mmvp" / "scores.json", read_report),
        "pairs": parser(scored / "mmvp" / "pairs.csv", read_report),
    }


@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", ["index", "cache", "mmvp", "recap", "state", "weights", "momentum", "args", "metrics", "scores", "pairs"]
)
def test_no_parser_crashes(parsers, name, count):
    """Mutated inputs end in a result or in a sentence."""
    good, parse = parsers[name]
    rng, refused = np.random.default_rng(0), 0
    for _ in range(count):
        try:
            found = parse(mutated(good, rng))
            if name in ("index", "cache"):  # whatever it says, it says of places in the file
                assert found.shape[1] == 2 and found.min(initial=0) >= 0 and found.max(initial=0) < 20_000
        except SystemExit as stop:
            assert isinstance(stop.code, str) and "\n" not in stop.code.strip()
            refused += 1
    parse(good)
    assert refused > count / 20 or name == "cache"


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in model.RECIPES if name != "miniature"])
def test_a_step_at_full_size(tmp_path, name):
    """Each recipe as the paper has it but for its weights: one step, and a CLIP that open_clip loads."""
    more = ["--recipe", name, "--random-weights", "--data", "synthetic", "--steps", "1", "--precision", "bf16"]
    train.train(train.parse_args([*more, "--batch-size", "1", "--micro-batch", "1", "--out", str(tmp_path)]))
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert 0.5 < line["loss"] < 2 and line["grad_norm"] > 0  # an untrained U-Net says nothing of ε, whose variance is 1
    clip = open_clip.create_model(f"local-dir:{tmp_path}/clip")
    trained = weights(tmp_path)
    assert all(torch.equal(v, trained[f"visual.{k}"]) for k, v in clip.visual.state_dict().items())
