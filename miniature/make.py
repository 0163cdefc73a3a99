"""The miniature: a drawn world in the formats of the real one, and its CLIP and diffusion model, made from nothing.

    python miniature/make.py all --out world         # everything below, in this order, then the gates
    python miniature/make.py images --out world      # images.tar, in CC3M's shard layout
    python miniature/make.py mmvp --pairs 400 --seed 7 DIR  # any number of pairs of each type, in MMVP-VLM's layout
    python miniature/make.py clip --out world        # clip/, a folder of open_clip
    python miniature/make.py vae --out world         # diffusion/vae
    python miniature/make.py diffusion --out world   # diffusion/, a Stable Diffusion folder of diffusers
    python miniature/make.py check --out world       # the gates; --samples FILE.png draws pictures from captions

The world is a scene of 64 × 64 pixels: one thing of ten classes and six colours, with nine details, which are the nine
types of MMVP-VLM. A person sees every one of them at a glance, and each is independent of all others.

    Orientation           upright, inverted          Color                 the ground is white, grey, pink, mint
    Presence              with or without hat        Structural Character  plain, striped, checked
    State                 whole, broken              Text                  a sign with A, E, O, X
    Quantity              one, two, three stars      Camera Perspective    near, far
    Spatial               at left, at right

CLIP overlooks details for the same reason as the real one: a caption always names the class, mostly the colour (80%),
and each detail rarely (one in eight), so that class and colour tell a batch's captions apart and details are learnt
last. Its text tower does not: it learns first, on text alone, to tell every word apart, class and colour weighing most,
and is then frozen. Post-training changes the vision tower alone; where the text says nothing (two towers that learn
together make "upright" and "inverted" the same) no training of it could be measured. The diffusion model reads fuller
captions (each detail in one of two) with CLIP's text tower, as Stable Diffusion 1.x does, and sees more of the noisy
states: what is not in the caption it has to guess, so it learns to read. Like Stable Diffusion it can read the end
token alone, which it learns from captions (55 of 100) whose end token stands at every position but the first. It is the
teacher; that it can read is what makes the world small enough to be trained on a CPU, and gate 3 measures it.

A pair is the same scene twice, with one detail changed; a statement names class, colour and that detail. `check`
prints the gates that make the world worth an experiment:

    1  CLIP is not ignorant (class, zero-shot, ≥ 85%), but blind (pair score from 25 to 60); and not beyond help: right
       captions, in 100 steps of the vision tower alone, raise the pair score
    2  the VAE keeps the details: a linear probe reads them from latents and reconstructions nearly as from the images
    3  the teacher reads its captions: its loss is higher where a caption's detail is wrong (z > 5 for seven of nine);
       and one token that stands for the sentence: the end token alone lowers it by 90% of what the whole caption does
    4  pictures drawn from captions look like their captions (--samples; to be looked at)

Everything is seeded. Weights are saved in fp16, and the gates measure what is saved.
"""

from __future__ import annotations

import argparse
import csv
import functools
import io
import json
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import open_clip
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import random_crop_box
from evaluate_mmvp import EMBEDDINGS, pairs_right, similarities
from harness.errors import UserError, exit_on_user_error, usage_error
from harness.mmvp import read_mmvp
from harness.scores import average, interval
from harness.weights import to_transformers
from model import load_clip, load_diffusion

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PREFIX = "a photo of "  # in front of half of CLIP's captions, and of the benchmark's statements

POOL = 30_000  # scenes to learn from
CLIP_NAMES = [0.8] + 9 * [1 / 8]  # how often a caption names the colour and each of the nine details
DIFFUSION_NAMES = [0.8] + 9 * [1 / 2]
WEIGHTS = [1, 0.7] + 9 * [0.2]  # of class, colour and details in CLIP's text embedding

# ---------------------------------------------------------------------------------------------------------------------
# The world

SIZE = 64  # an image's side in pixels
COLOURS = dict(
    red=(214, 40, 40), green=(40, 160, 60), blue=(45, 80, 220),
    yellow=(235, 200, 30), purple=(175, 45, 190), orange=(245, 130, 30),
)  # fmt: skip
GROUNDS = {
    "on white": (250, 250, 250), "on grey": (150, 150, 150), "on pink": (250, 180, 205), "on mint": (165, 225, 190),
}  # fmt: skip
DETAILS = {  # the benchmark's nine types, and what each can be
    "Orientation": ("upright", "inverted"),
    "Presence": ("with hat", "without hat"),
    "State": ("whole", "broken"),
    "Quantity": ("under one star", "under two stars", "under three stars"),
    "Spatial": ("at left", "at right"),
    "Color": tuple(GROUNDS),
    "Structural Character": ("plain", "striped", "checked"),
    "Text": ("beside A", "beside E", "beside O", "beside X"),
    "Camera Perspective": ("near", "far"),
}
SHAPES = {  # in hundredths of a square, y downwards: polygons as x y x y …; + and - an ellipse's box, drawn or cut out
    "house": ["10 45 50 5 90 45 90 100 62 100 62 65 38 65 38 100 10 100"],
    "tree": ["50 0 90 70 10 70", "40 70 60 70 60 100 40 100"],
    "cup": ["10 15 75 15 62 100 23 100", "+ 55 25 100 70", "- 64 36 89 59", "10 15 75 15 70 50 20 60"],
    "boat": ["0 65 100 65 80 100 20 100", "45 0 55 0 55 65 45 65", "55 2 95 50 55 50"],
    "mushroom": ["+ 0 5 100 95", "- -10 50 110 130", "35 45 65 45 72 100 28 100"],
    "heart": ["+ 2 5 54 60", "+ 46 5 98 60", "6 42 94 42 50 100"],
    "crown": ["5 10 27 50 50 2 73 50 95 10 95 100 5 100"],
    "bottle": ["40 0 60 0 60 30 78 45 78 100 22 100 22 45 40 30"],
    "shirt": ["30 5 70 5 100 30 88 50 75 42 75 100 25 100 25 42 12 50 0 30"],
    "key": ["+ 20 0 80 54", "- 40 16 60 36", "40 45 60 45 60 100 40 100"]
    + ["60 64 85 64 85 76 60 76", "60 86 85 86 85 100 60 100"],
}
CLASSES = tuple(SHAPES)
VALUES = [len(CLASSES), len(COLOURS), *(len(v) for v in DETAILS.values())]  # of a scene: class, colour, nine details


def caption(scene, named) -> str:
    """A scene in words: its class, and its colour and those details that `named` (ten bools) says."""
    word = [f"{v[i]} " if n else "" for v, i, n in zip([tuple(COLOURS), *DETAILS.values()], scene[1:], named)]
    colour, orientation, presence, state, quantity, place, ground, structure, letter, camera = word
    words = camera + orientation + state + structure + colour + CLASSES[scene[0]] + " "
    return ("the " + words + presence + place + ground + letter + quantity).strip()


def draw(scene, rng: np.random.Generator) -> Image.Image:
    """A scene as a picture, SIZE × SIZE. The rng draws what no caption names: jitter, shade, phase."""
    return draw_with_mask(scene, rng)[0]


def draw_with_mask(scene, rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """`draw`, and where its thing is without the hat: how much of each pixel it covers, SIZE × SIZE, 0 to 255."""
    kind, colour, turned, hatless, broken, stars, right, ground, structure, letter, far = scene
    k = 4  # drawn at four times the size, then reduced
    jitter, shade, phase = rng.uniform(-1.5, 1.5, 2), rng.uniform(0.88, 1, 3), rng.integers(0, 4)
    background = tuple(list(GROUNDS.values())[ground])
    canvas = Image.new("RGB", (SIZE * k, SIZE * k), background)
    ink = ImageDraw.Draw(canvas)
    for i in range(stars + 1):  # upper left, in a row
        x, y, r = (8 + 13 * i) * k, 9 * k, np.array([5.5, 2.3]) * k
        points = [(x + r[j % 2] * np.sin(np.pi * j / 5), y - r[j % 2] * np.cos(np.pi * j / 5)) for j in range(10)]
        ink.polygon(points, fill=(255, 225, 80), outline=(90, 60, 0), width=2)
    ink.rectangle((47 * k, 1 * k, 63 * k, 17 * k), fill="white", outline=(60, 60, 60), width=4)  # the sign, upper right
    font = ImageFont.load_default(15 * k)
    ink.text((55 * k, 9 * k), DETAILS["Text"][letter][-1], fill="black", font=font, anchor="mm", stroke_width=2)

    side = (23 if far else 37) * k  # the object, below
    mask, hat = Image.new("L", (side, side)), Image.new("L", (side, side))
    pen, top = ImageDraw.Draw(mask), 0 if hatless else 0.24
    for part in SHAPES[CLASSES[kind]]:
        numbers = np.array([int(n) for n in part.strip("+- ").split()]).reshape(-1, 2) / 100
        points = [(x * side, (top + (1 - top) * y) * side) for x, y in numbers]
        if len(points) == 2:
            pen.ellipse((*points[0], *points[1]), fill=255 * (part[0] == "+"))
        else:
            pen.polygon(points, fill=255)
    if not hatless:
        brim = ImageDraw.Draw(hat)
        brim.rectangle((0.2 * side, 0.17 * side, 0.8 * side, 0.25 * side), fill=255)
        brim.rectangle((0.32 * side, 0, 0.68 * side, 0.2 * side), fill=255)
    if broken:
        gap = ((0, 0.75), (0.4, 0.52), (0.6, 0.7), (1, 0.42), (1, 0.58), (0.6, 0.86), (0.4, 0.68), (0, 0.91))
        pen.polygon([(x * side, (top + (1 - top) * y) * side) for x, y in gap], fill=0)
    light = tuple((np.array(list(COLOURS.values())[colour]) * shade).astype(int))
    dark = tuple((np.array(light) * 0.35).astype(int))
    body, cell = Image.new("RGB", (side, side), light), 6 * k
    brush = ImageDraw.Draw(body)
    for y in range(-2, side // cell + 1):
        for x in range(-2, side // cell + 1):
            if structure == 1 and y % 2 or structure == 2 and (x + y) % 2:
                left, upper = x * cell + phase * cell // 2, y * cell + phase * cell // 2
                brush.rectangle((left, upper, left + cell - 1, upper + cell - 1), fill=dark)
    if turned:
        mask, hat = mask.transpose(Image.Transpose.FLIP_TOP_BOTTOM), hat.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    centre = np.array([(51 if far else 44) if right else (13 if far else 20), 41]) + jitter
    corner = tuple((centre * k - side / 2).astype(int))
    canvas.paste(body, corner, mask)
    canvas.paste((0, 190, 215), corner, hat)
    covered = Image.new("L", canvas.size)
    covered.paste(mask, corner)
    return canvas.reduce(k), covered.reduce(k)


def random_scenes(count: int, seed: int | tuple[int, int]) -> np.ndarray:
    """(count, 11) int: class, colour and the nine details of each scene, all uniform and independent."""
    return np.random.default_rng(seed).integers(0, VALUES, (count, len(VALUES)))


def write_images(out: Path, count: int = 2000, seed: int = 3) -> None:
    """images.tar: KEY.jpg and KEY.txt for each scene, as img2dataset writes them."""
    rng = np.random.default_rng((seed, 0))
    with tarfile.open(out / "images.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for i, scene in enumerate(random_scenes(count, seed)):
            named = rng.random(10) < CLIP_NAMES
            for suffix, content in (("jpg", jpeg(draw(scene, rng))), ("txt", caption(scene, named).encode())):
                member = tarfile.TarInfo(f"{i:09}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_mmvp(out: Path, pairs: int = 100, seed: int = 2) -> None:
    """A benchmark in MMVP-VLM's layout, `pairs` of each type: the same scene, drawn alike, with one detail changed."""
    rows, rng = [["Question ID", "Type", "Statement"]], np.random.default_rng((seed, 0))
    for detail, (name, values) in enumerate(DETAILS.items()):
        (out / "MLLM_VLM Images" / name).mkdir(parents=True, exist_ok=True)
        for scene in random_scenes(pairs, (seed, detail)):
            drawn = int(rng.integers(2**31))
            for value in rng.choice(len(values), 2, replace=False):
                scene[2 + detail] = value
                image = draw(scene, np.random.default_rng(drawn))
                (out / "MLLM_VLM Images" / name / f"{len(rows)}.jpg").write_bytes(jpeg(image))
                rows.append([len(rows), name, caption(scene, np.isin(np.arange(10), (0, 1 + detail)))])
    with open(out / "Questions.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


# ---------------------------------------------------------------------------------------------------------------------
# Its models


@functools.cache
def tokenizer(length: int, pad: str = "<pad>") -> PreTrainedTokenizerFast:
    """Word by word, and A is not a; the end token has the highest id, which is where CLIP's pooling looks for it."""
    phrases = [PREFIX, "the", *CLASSES, *COLOURS, *(phrase for values in DETAILS.values() for phrase in values)]
    words = ["<pad>", "<unk>", "<start>", *sorted({word for phrase in phrases for word in phrase.split()}), "<end>"]
    ids = {word: i for i, word in enumerate(words)}
    by_word = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    by_word.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [(word, ids[word]) for word in ("<start>", "<end>")]
    by_word.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=ends)
    names = dict(bos_token="<start>", eos_token="<end>", pad_token=pad, unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=by_word, model_max_length=length, **names)


def tokens(texts: list[str], tok: PreTrainedTokenizerFast) -> torch.Tensor:
    return tok(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(DEVICE)


def pool(count: int, seed: int) -> tuple[np.ndarray, torch.Tensor]:
    """Scenes and their pictures, (count, 3, SIZE, SIZE) uint8, cropped at random as train.py does it."""
    scenes, rng = random_scenes(count, seed), np.random.default_rng((seed, 1))
    pixels = np.empty((count, SIZE, SIZE, 3), np.uint8)
    for i in tqdm(range(count), desc="draw", unit="image", leave=False):
        box = [SIZE * x for x in random_crop_box(SIZE, SIZE, rng)]
        pixels[i] = draw(scenes[i], rng).resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box)
    return scenes, torch.from_numpy(pixels).permute(0, 3, 1, 2)


def fit(name: str, module: torch.nn.Module, loss_of, steps: int, lr: float) -> torch.nn.Module:
    """Minimises loss_of(module) with AdamW, in bf16, and returns the module in eval mode."""
    parameters = list(module.parameters())
    optimizer = torch.optim.AdamW(parameters, lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.05)
    bar, smooth = tqdm(range(steps), desc=name, unit="step"), None
    for _ in bar:
        with torch.autocast(DEVICE.type, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):  # on a CPU the fastest backward
            loss = loss_of(module)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        bar.set_postfix_str(f"smoothed loss {smooth:.4f}", refresh=False)
    return module.eval()


def make_clip(
    out: Path, seed: int, steps: int = 450, text_width: int = 128, text_layers: int = 2, contrastive: bool = False,
    batch: int = 256,
) -> None:  # fmt: skip
    """clip/: a text tower that tells every word apart, then a ViT of 64 patches that learns from captions that name
    little, by the contrastive loss.

    With `contrastive`, both towers learn together instead, by that loss, from captions that name as much as the
    diffusion model's; so did the OpenCLIP whose text tower Stable Diffusion 2 reads with.
    """
    (out / "clip").mkdir(parents=True, exist_ok=True)
    tok = tokenizer(24)
    tok.save_pretrained(out / "clip")
    text = dict(context_length=24, vocab_size=len(tok), hf_tokenizer_name="own")
    text |= dict(width=text_width, heads=text_width // 32, layers=text_layers)
    vision = dict(image_size=SIZE, patch_size=8, width=128, layers=4, head_width=32)
    own = dict(mean=[0.7, 0.65, 0.66], std=[0.24, 0.25, 0.25], interpolation="bicubic", resize_mode="squash")
    config = dict(model_cfg=dict(embed_dim=128, vision_cfg=vision, text_cfg=text), preprocess_cfg=own)
    (out / "clip" / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    torch.manual_seed(seed)
    clip = open_clip.create_model(f"local-dir:{out}/clip", load_weights=False).to(DEVICE)
    directions = torch.linalg.qr(torch.randn(128, sum(VALUES)))[0].T.to(DEVICE)  # one for each value, orthogonal
    rng = np.random.default_rng(seed)
    scenes, pixels = pool(POOL, seed + 1)
    names = DIFFUSION_NAMES if contrastive else CLIP_NAMES

    def text_loss(clip: torch.nn.Module) -> torch.Tensor:
        """A caption's embedding has the direction of the sum of what it names."""
        chosen = scenes[rng.integers(0, len(scenes), batch)]
        named, texts = read(clip, chosen, DIFFUSION_NAMES, rng)
        weights = torch.from_numpy(np.insert(named, 0, True, axis=1) * WEIGHTS).float().to(DEVICE)  # (batch, 11)
        said = directions[np.cumsum([0, *VALUES[:-1]]) + chosen]  # (batch, 11, 128)
        return 1 - F.cosine_similarity(texts, torch.einsum("bk,bkd->bd", weights, said)).mean()

    if not contrastive:
        fit("clip, text", clip, text_loss, 400, 1e-3)
    weights = fit_clip("clip", clip, scenes, pixels, names, rng, steps, 1e-3, batch, text=contrastive).state_dict()
    save_file({k: v.half().contiguous() for k, v in weights.items()}, out / "clip" / "open_clip_model.safetensors")


def read(clip: torch.nn.Module, scenes: np.ndarray, names: list[float], rng) -> tuple[np.ndarray, torch.Tensor]:
    """CLIP's embeddings of captions that name colour and details as often as `names`, and which (B, 10) they name."""
    named = rng.random((len(scenes), 10)) < names
    texts = [PREFIX * (rng.random() < 0.5) + caption(scene, n) for scene, n in zip(scenes, named)]
    return named, clip.encode_text(tokens(texts, tokenizer(24)), normalize=True)


def fit_clip(name: str, clip, scenes, pixels, names: list[float], rng, steps, lr, batch=256, text=False):
    """Trains the vision tower by CLIP's loss, and with `text` the text tower, which else stays; returns the CLIP."""
    mean, std = (torch.tensor(clip.visual.preprocess_cfg[k], device=DEVICE)[:, None, None] for k in ("mean", "std"))
    criterion = open_clip.ClipLoss()
    for key, parameter in clip.named_parameters():
        parameter.requires_grad_(text or key.startswith("visual") or key == "logit_scale")

    def loss(clip: torch.nn.Module) -> torch.Tensor:
        chosen = rng.integers(0, len(scenes), batch)
        _, texts = read(clip, scenes[chosen], names, rng)
        images = clip.encode_image((pixels[chosen].to(DEVICE) / 255 - mean) / std, normalize=True)
        return criterion(images, texts, clip.logit_scale.exp())

    return fit(f"{name}, {'both towers' if text else 'vision'}", clip.train(), loss, steps, lr)


def learn_captions(clip: torch.nn.Module, scenes, pixels, seed: int) -> None:
    """What there is to gain: 100 steps of the vision tower on captions that name everything."""
    fit_clip("captions", clip, scenes, pixels, 10 * [1.0], np.random.default_rng(seed), 100, 1e-4)


def make_vae(out: Path, seed: int, steps: int = 4500, batch: int = 16) -> None:
    """diffusion/vae: 64 × 64 pixels to 4 × 8 × 8 latents of unit variance, as Stable Diffusion's, 8 pixels a latent."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, sample_size=SIZE,
        block_out_channels=(16, 32, 64, 64), layers_per_block=1, norm_num_groups=4,
    ).to(DEVICE)  # fmt: skip
    _, pixels = pool(POOL, seed + 1)

    def loss(vae: torch.nn.Module) -> torch.Tensor:
        images = pixels[torch.randint(len(pixels), (batch,))].to(DEVICE) / 127.5 - 1
        posterior = vae.encode(images).latent_dist
        return F.l1_loss(vae.decode(posterior.sample()).sample, images) + 1e-6 * posterior.kl().mean()

    vae = fit("vae", vae, loss, steps, 1e-3)
    vae.register_to_config(scaling_factor=round(1 / encode(vae, pixels[:2000], 1).std().item(), 4))
    vae.half().save_pretrained(out / "diffusion" / "vae")


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: torch.Tensor, scale: float) -> torch.Tensor:
    """uint8 pictures (B, 3, SIZE, SIZE) → the mean of their latents times `scale`, (B, 4, 8, 8)."""
    batches = tqdm(pixels.split(250), desc="encode", leave=False)
    return torch.cat([vae.encode(p.to(DEVICE) / 127.5 - 1).latent_dist.mean for p in batches]) * scale


def text_encoder(clip: torch.nn.Module) -> CLIPTextModel:
    """CLIP's own text tower in transformers' form, frozen; Stable Diffusion 1.x reads OpenAI's in this way."""
    (length, width), layers = clip.positional_embedding.shape, clip.transformer.resblocks
    config = CLIPTextConfig(
        vocab_size=clip.vocab_size, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=len(layers),
        num_attention_heads=layers[0].attn.num_heads, max_position_embeddings=length, hidden_act="gelu",
        bos_token_id=2, eos_token_id=clip.vocab_size - 1, pad_token_id=clip.vocab_size - 1,
    )  # fmt: skip
    weights = to_transformers(clip.state_dict()).items()
    text = CLIPTextModel(config)
    text.load_state_dict({k.removeprefix("text_model."): v for k, v in weights if k.startswith("text_model.")})
    return text.eval().requires_grad_(False)


@torch.no_grad()
def text_states(text: CLIPTextModel, captions: list[str], tok, alone) -> torch.Tensor:
    """The text encoder's states (B, L, W); where `alone` (a bool, or B of them), the end token's at every position but
    the first: one token that stands for the sentence.
    """
    ids = tokens(captions, tok)
    states = text(ids).last_hidden_state
    end = states[torch.arange(len(ids)), ids.argmax(1)][:, None]  # (B, 1, W): the first of the highest ids
    alone = torch.as_tensor(alone, device=ids.device).expand(len(ids))[:, None, None]
    return torch.cat([states[:, :1], torch.where(alone, end, states[:, 1:])], 1)


def make_diffusion(
    out: Path, seed: int, steps: int = 4500, vae: Path | None = None, start: Path | None = None, batch: int = 128
) -> None:
    """diffusion/: a U-Net that reads CLIP's text tower, by ε-prediction on the VAE's latents.

    `vae` is the folder of a VAE, diffusion/vae if not given. `start` is the folder of a U-Net whose weights are the
    start where their shapes fit; with a text tower of another width, those of the keys and values do not.

    In 55 of 100 captions the end token alone is left, so that it learns to read one token, as Stable Diffusion can
    ("Padding Tone", NAACL 2025).
    """
    clip = load_clip(str(out / "clip"), device=str(DEVICE)).model
    text, tok = text_encoder(clip).to(DEVICE), tokenizer(clip.context_length, pad="<end>")
    vae = AutoencoderKL.from_pretrained(vae or out / "diffusion" / "vae", torch_dtype=torch.float32).to(DEVICE)
    vae.register_to_config(_name_or_path="")  # where it lay is nobody's business
    scenes, pixels = pool(POOL, seed + 1)
    latents = encode(vae, pixels, vae.config.scaling_factor)
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(64, 128), layers_per_block=1, norm_num_groups=8, attention_head_dim=(2, 4),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=text.config.hidden_size, use_linear_projection=True,
    ).to(DEVICE)  # fmt: skip
    if start:
        fresh = unet.state_dict()
        weights = UNet2DConditionModel.from_pretrained(start, torch_dtype=torch.float32).state_dict()
        weights = {k: v for k, v in weights.items() if k in fresh and v.shape == fresh[k].shape}
        unet.load_state_dict(weights, strict=False)
        print(f"diffusion: {len(weights)} of {len(fresh)} weights start as in {start}")
    unet.set_attn_processor(AttnProcessor())
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    rng = np.random.default_rng(seed)

    def loss(unet: torch.nn.Module) -> torch.Tensor:
        chosen = rng.integers(0, len(scenes), batch)
        named = rng.random((batch, 10)) < DIFFUSION_NAMES
        captions = [caption(s, n) * (rng.random() < 0.9) for s, n in zip(scenes[chosen], named)]  # one in ten: empty
        states = text_states(text, captions, tok, rng.random(batch) < 0.55)
        t = torch.from_numpy(rng.integers(0, 1000, (2, batch)).max(0)).to(DEVICE)  # the later of two: more noise
        z, noise = latents[chosen], torch.randn(batch, *latents.shape[1:], device=DEVICE)
        return F.mse_loss(unet(scheduler.add_noise(z, noise, t), t, states).sample.float(), noise)

    unet = fit("diffusion", unet, loss, steps, 1e-3)
    StableDiffusionPipeline(
        vae=vae.half(), unet=unet.half(), text_encoder=text.half(), tokenizer=tok,
        scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(out / "diffusion")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The gates


def ridge(x: torch.Tensor, labels: np.ndarray, penalty: float = 0.1) -> np.ndarray:
    """A linear reader of x: ridge on one-hot labels, fitted on its first rows, those with labels.

    x (n, ...), labels (fitted, columns) int → what it reads of the other rows, (n − fitted, columns) int.
    """
    fitted, x = len(labels), x.flatten(1).float()
    x = (x - x[:fitted].mean(0)) / (x[:fitted].std(0) + 1e-6) / x.shape[1] ** 0.5
    x, others = x[:fitted], x[fitted:]
    one_hot = [F.one_hot(torch.from_numpy(column)).double() for column in labels.T]
    targets = torch.cat(one_hot, 1)  # (fitted, all labels)
    mean = targets.mean(0)

    def solve(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.linalg.solve((a @ a.T).double() + penalty * torch.eye(len(a)), b)

    if fitted > x.shape[1]:  # twice the same weight, by the smaller system of equations
        weight = solve(x.T, x.T.double() @ (targets - mean))
    else:
        weight = x.T.double() @ solve(x, targets - mean)
    found = (others.double() @ weight + mean).split([column.shape[1] for column in one_hot], 1)
    return torch.stack([scores.argmax(1) for scores in found], 1).numpy()


def probe(x: torch.Tensor, scenes: np.ndarray, fitted: int) -> np.ndarray:
    """How often, in percent, a linear reader of x, fitted on the first rows, reads each of the others' nine details."""
    return 100 * (ridge(x, scenes[:fitted]) == scenes[fitted:]).mean(0)[2:]


@torch.no_grad()
def unseen(clip, count: int = 3000, seed: int = 10) -> tuple[np.ndarray, torch.Tensor, float]:
    """Scenes that no training has drawn, CLIP's unit embeddings (count, D) of their pictures, and how often, in
    percent, the nearest of the ten classes' texts is the right one."""
    scenes, rng, preprocess = random_scenes(count, seed), np.random.default_rng(seed), clip.preprocess
    images = torch.stack([preprocess(draw(scene, rng)) for scene in scenes])
    embeddings = torch.cat([clip.model.encode_image(i.to(DEVICE), normalize=True) for i in images.split(250)])
    texts = clip.model.encode_text(clip.tokenizer()([f"{PREFIX}the {c}" for c in CLASSES]).to(DEVICE), normalize=True)
    nearest = (embeddings @ texts.T).argmax(1).cpu().numpy()
    return scenes, embeddings.cpu(), 100 * float((nearest == scenes[:, 0]).mean())


def check(out: Path, samples: str | None) -> None:
    """Prints the gates; `samples`: where the pictures of gate 4 go."""

    def gate(text: str, passed: bool) -> None:
        print(f"    {text}  {'passed' if passed else 'NOT PASSED'}", flush=True)

    print("1  CLIP is not ignorant, but blind")
    clip = load_clip(str(out / "clip"), device=str(DEVICE))
    _, _, accuracy = unseen(clip)
    gate(f"class, zero-shot, 3,000 unseen pictures: {accuracy:.1f}% (≥ 85)", accuracy >= 85)
    with tempfile.TemporaryDirectory() as folder:
        write_mmvp(Path(folder), pairs=100, seed=11)
        pairs = read_mmvp(folder)
        types = [pair.type for pair in pairs]
        before = pairs_right(similarities(clip, pairs, DEVICE))
        for embedding, r in zip(EMBEDDINGS, before):
            score, (low, high) = average(r, types), interval(r, types)
            fits = 25 < score < 60
            gate(f"pair score, 900 unseen pairs, {embedding}: {score:.1f} ({low:.1f}–{high:.1f}) (25–60)", fits)
        scenes, pixels = pool(4000, 12)
        learn_captions(clip.model, scenes, pixels, 12)
        after = pairs_right(similarities(clip, pairs, DEVICE))[0]
        low, high = interval(after.astype(int) - before[0], types)
        text = f"after 100 steps of its vision tower on full captions: {average(after, types):.1f}"
        gate(f"{text}, {low:+.1f} to {high:+.1f} points: there is something to gain (> 0)", low > 0)

    print("2  the VAE keeps the details: a linear probe's accuracy from images, reconstructions, latents, in percent")
    diffusion = load_diffusion(str(out / "diffusion"), "", torch.float32, DEVICE)
    latents = encode(diffusion.vae, pixels, diffusion.vae.config.scaling_factor)
    with torch.no_grad():
        again = [diffusion.vae.decode(z / diffusion.vae.config.scaling_factor).sample for z in latents.split(250)]
    read = [probe(x.cpu(), scenes, 3000) for x in (pixels, torch.cat(again), latents)]
    for name, values, images, decoded, coded in zip(DETAILS, VALUES[2:], *read):
        text = f"{name:21} {images:5.1f} {decoded:5.1f} {coded:5.1f}"
        gate(f"{text} (chance {100 / values:.0f})", min(decoded, coded) > images - 5)

    print(
        "3  the teacher reads its captions: its loss rises where one detail is wrong (2,000 unseen pictures, t ≥ 300)"
    )
    pipe = StableDiffusionPipeline.from_pretrained(out / "diffusion", torch_dtype=torch.float32).to(DEVICE)
    clear = [rise(pipe, scenes[:2000], latents[:2000], k) for k in range(2, 11)]
    for name, (mean, z) in zip(DETAILS, clear):
        print(f"    {name:21} {mean:+.5f}  z = {z:.1f}")
    gate(f"z > 5 for {sum(z > 5 for _, z in clear)} of nine (≥ 7)", sum(z > 5 for _, z in clear) >= 7)
    none, whole, alone = end_token(pipe, scenes[:2000], latents[:2000])
    share = 100 * (none - alone) / (none - whole)
    text = f"loss with no caption {none:.4f}, a whole one {whole:.4f}, its end token alone {alone:.4f}"
    gate(f"{text}: {share:.0f}% of what the whole one brings (≥ 90)", share >= 90)

    if samples:
        rng = np.random.default_rng(13)
        captions = [caption(scene, rng.random(10) < DIFFUSION_NAMES) for scene in random_scenes(24, 13)]
        torch.manual_seed(0)
        drawn = pipe(captions, num_inference_steps=50, guidance_scale=2.0).images
        sheet = Image.new("RGB", (8 * SIZE, 3 * SIZE))
        for i, image in enumerate(drawn):
            sheet.paste(image, (i % 8 * SIZE, i // 8 * SIZE))
        sheet.resize((16 * SIZE, 6 * SIZE), Image.Resampling.NEAREST).save(samples)
        print("4  row by row:\n    " + "\n    ".join(captions))


@torch.no_grad()
def rise(pipe: StableDiffusionPipeline, scenes: np.ndarray, latents: torch.Tensor, k: int) -> tuple[float, float]:
    """How much the denoising loss rises when column `k` alone of a scene is wrong in its caption: mean, z-value.

    Same latents, noise and timestep (300 to 999) for both captions, which name class, colour and that detail.
    """
    rng, differences = np.random.default_rng(k), []
    for start in range(0, len(scenes), 250):
        right, z = scenes[start : start + 250], latents[start : start + 250]
        wrong = right.copy()
        wrong[:, k] = (wrong[:, k] + rng.integers(1, VALUES[k], len(wrong))) % VALUES[k]
        t = torch.from_numpy(rng.integers(300, 1000, len(z))).to(DEVICE)
        noise = torch.from_numpy(rng.standard_normal(z.shape, dtype=np.float32)).to(DEVICE)
        noisy, losses = pipe.scheduler.add_noise(z, noise, t), []
        for side in (right, wrong):
            captions = [caption(scene, np.isin(np.arange(10), (0, k - 1))) for scene in side]
            states = pipe.text_encoder(tokens(captions, pipe.tokenizer)).last_hidden_state
            losses.append((pipe.unet(noisy, t, states).sample - noise).square().mean((1, 2, 3)))
        differences.append(losses[1] - losses[0])
    d = torch.cat(differences).double()
    return d.mean().item(), (d.mean() / (d.std() / len(d) ** 0.5)).item()


@torch.no_grad()
def end_token(pipe: StableDiffusionPipeline, scenes: np.ndarray, latents: torch.Tensor) -> list[float]:
    """The denoising loss with no caption, with captions that name half of the details, with their end token alone.

    Same latents, noise and timestep (0 to 999) for all three.
    """
    rng, losses = np.random.default_rng(14), []
    for start in range(0, len(scenes), 250):
        z = latents[start : start + 250]
        named = rng.random((len(z), 10)) < DIFFUSION_NAMES
        captions = [caption(scene, n) for scene, n in zip(scenes[start : start + 250], named)]
        t = torch.from_numpy(rng.integers(0, 1000, len(z))).to(DEVICE)
        noise = torch.from_numpy(rng.standard_normal(z.shape, dtype=np.float32)).to(DEVICE)
        noisy = pipe.scheduler.add_noise(z, noise, t)
        for texts, alone in (([""] * len(z), False), (captions, False), (captions, True)):
            states = text_states(pipe.text_encoder, texts, pipe.tokenizer, alone)
            losses.append(F.mse_loss(pipe.unet(noisy, t, states).sample, noise).item())
    return np.reshape(losses, (-1, 3)).mean(0).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the miniature world and its models from nothing.")
    parser.error = usage_error  # a sentence, without the usage in front of it
    parts = parser.add_subparsers(dest="part", required=True, metavar="PART")
    helps = dict(
        all="every part below, in this order, then the gates", images="images.tar", mmvp="a benchmark",
        clip="clip/", vae="diffusion/vae", diffusion="diffusion/", check="print the gates",
    )  # fmt: skip
    for name, text in helps.items():
        part = parts.add_parser(name, help=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        part.error = usage_error
        if name == "mmvp":
            part.add_argument("out", type=Path, metavar="DIR", help="where it is written")
            part.add_argument("--pairs", type=int, default=100, help="of each type")
            part.add_argument("--seed", type=int, default=2, help="of the scenes")
        else:
            part.add_argument("--out", type=Path, default=Path("world"), metavar="DIR", help="the world's folder")
        if name in ("all", "clip", "vae", "diffusion"):
            part.add_argument("--seed", type=int, default=0, help="of the scenes, the weights and the draws")
        if name == "clip":
            part.add_argument("--steps", type=int, default=450, metavar="N", help="of the contrastive loss")
            part.add_argument("--text-width", type=int, default=128, metavar="N", help="of the text tower, 32 a head")
            part.add_argument("--text-layers", type=int, default=2, metavar="N", help="of the text tower")
            part.add_argument("--contrastive", action="store_true", help="train both towers together")
        if name == "diffusion":
            part.add_argument("--steps", type=int, default=4500, metavar="N", help="of the U-Net")
            part.add_argument("--vae", type=Path, metavar="FOLDER", help="another VAE; DIR/diffusion/vae if not given")
            part.add_argument("--start", type=Path, metavar="FOLDER", help="start from this U-Net, where shapes fit")
        if name in ("all", "check"):
            part.add_argument("--samples", metavar="FILE.png", help="draw 24 pictures from captions")
    args = parser.parse_args()
    mmvp = (args.out, args.pairs, args.seed) if args.part == "mmvp" else (args.out / "mmvp",)
    settings = {key: value for key, value in vars(args).items() if key not in ("part", "samples")}
    if settings.get("text_width", 32) % 32 or settings.get("text_width", 32) < 32:
        raise UserError(f"--text-width {args.text_width}: must be a multiple of 32")
    for folder in (settings.get("vae"), settings.get("start")):
        if folder and not (folder / "config.json").is_file():
            raise UserError(f"{folder}: no config.json in it; name a part's folder, such as miniature/diffusion/unet")
    make = dict(
        images=lambda: write_images(args.out),
        mmvp=lambda: write_mmvp(*mmvp),
        clip=lambda: make_clip(**settings),
        vae=lambda: make_vae(**settings),
        diffusion=lambda: make_diffusion(**settings),
        check=lambda: check(args.out, args.samples),
    )  # fmt: skip
    if args.part == "mmvp" and args.out.exists() and any(args.out.iterdir()):
        raise UserError(f"{args.out}: is not empty; a benchmark takes a folder of its own")
    args.out.mkdir(parents=True, exist_ok=True)
    for name in make if args.part == "all" else [args.part]:
        start = time.perf_counter()
        make[name]()
        print(f"{name}: {time.perf_counter() - start:.0f} s on {DEVICE.type}, in {args.out}", flush=True)


if __name__ == "__main__":
    with exit_on_user_error("make.py"):
        main()
