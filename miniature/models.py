"""The world's CLIP and diffusion model, trained from scratch. Weights are saved in fp16.

**CLIP overlooks details for the same reason as the real one**: captions always name the class, mostly the colour (80%),
and rarely a given detail (one in eight). Class and colour suffice to tell a batch's captions apart, so details are
learned last. The text tower is trained first, on text alone, to tell all words apart, and then frozen. If both towers
learned together from such captions, "upright" and "inverted" would get the same embedding, and training only the vision
tower could not raise the score.

**The diffusion model reads its captions.** Its text encoder is CLIP's text tower, as in Stable Diffusion 1.x. Its
captions name each detail half of the time. Training samples high noise more often, where the caption matters most.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import open_clip
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from data import random_crop_box
from harness.weights import to_transformers
from miniature.world import (
    CLASSES, CLIP_NAMES, COLOURS, DETAILS, DIFFUSION_NAMES, PREFIX, SIZE, VALUES, caption, draw, random_scenes,
)  # fmt: skip
from model import load_clip

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
POOL = 30_000  # scenes to learn from
WEIGHTS = [1, 0.7] + 9 * [0.2]  # of class, colour and details in CLIP's text embedding


@functools.cache
def tokenizer(length: int, pad: str = "<pad>") -> PreTrainedTokenizerFast:
    """A case-sensitive tokenizer of whole words. The end token has the highest id, as CLIP's pooling requires."""
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
    """Texts → ids (B, L), padded."""
    return tok(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(DEVICE)


def pool(count: int, seed: int) -> tuple[np.ndarray, torch.Tensor]:
    """Scenes and their pictures (count, 3, SIZE, SIZE) uint8, with train.py's random crop."""
    scenes, rng = random_scenes(count, seed), np.random.default_rng((seed, 1))
    pixels = np.empty((count, SIZE, SIZE, 3), np.uint8)
    for i in tqdm(range(count), desc="draw", unit="image", leave=False):
        box = [SIZE * x for x in random_crop_box(SIZE, SIZE, rng)]
        pixels[i] = draw(scenes[i], rng).resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box)
    return scenes, torch.from_numpy(pixels).permute(0, 3, 1, 2)


def fit(name: str, module: torch.nn.Module, loss_of, steps: int, lr: float) -> None:
    """Minimizes loss_of(module) with AdamW, in bf16; then puts the module in eval mode."""
    parameters = list(module.parameters())
    optimizer = torch.optim.AdamW(parameters, lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.05)
    bar = tqdm(range(steps), desc=name, unit="step")
    for _ in bar:
        with torch.autocast(DEVICE.type, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):  # fastest on a CPU
            loss = loss_of(module)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix_str(f"loss {loss.item():.4f}", refresh=False)
    module.eval()


def make_clip(
    out: Path, seed: int, steps: int = 450, text_steps: int = 400, text_width: int = 128, text_layers: int = 2,
    contrastive: bool = False, batch: int = 256,
) -> None:  # fmt: skip
    """Writes clip/: trains the text tower on text alone, then a ViT of 64 patches with the contrastive loss.

    With `contrastive`, that loss trains both towers, as in the OpenCLIP of Stable Diffusion 2, on captions that name as
    many details as the diffusion model's. Such a CLIP sees details; use only its text tower.
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

    def text_loss(clip: torch.nn.Module) -> torch.Tensor:
        """Pulls a caption's embedding toward the weighted sum of the directions of the values that it names."""
        chosen = scenes[rng.integers(0, len(scenes), batch)]
        named, texts = read(clip, chosen, DIFFUSION_NAMES, rng)
        weights = torch.from_numpy(np.insert(named, 0, True, axis=1) * WEIGHTS).float().to(DEVICE)  # (batch, 11)
        of_values = directions[np.cumsum([0, *VALUES[:-1]]) + chosen]  # (batch, 11, 128)
        return 1 - F.cosine_similarity(texts, torch.einsum("bk,bkd->bd", weights, of_values)).mean()

    fit("clip, text", clip, text_loss, text_steps, 1e-3)
    names = DIFFUSION_NAMES if contrastive else CLIP_NAMES
    fit_clip(clip, scenes, pixels, names, rng, steps, 1e-3, batch, text=contrastive)
    weights = {name: weight.half().contiguous() for name, weight in clip.state_dict().items()}
    save_file(weights, out / "clip" / "open_clip_model.safetensors")


def read(clip: torch.nn.Module, scenes: np.ndarray, names: list[float], rng) -> tuple[np.ndarray, torch.Tensor]:
    """Embeds captions of `scenes` that name colour and details with the probabilities `names` (10,).

    Returns what they name, (B, 10) bool, and CLIP's unit embeddings (B, D).
    """
    named = rng.random((len(scenes), 10)) < names
    texts = [(PREFIX if rng.random() < 0.5 else "") + caption(scene, n) for scene, n in zip(scenes, named)]
    return named, clip.encode_text(tokens(texts, tokenizer(24)), normalize=True)


def fit_clip(clip, scenes, pixels, names: list[float], rng, steps, lr, batch=256, text=False) -> None:
    """Trains the vision tower, and the text tower if `text`, with the contrastive loss."""
    mean, std = (torch.tensor(clip.visual.preprocess_cfg[k], device=DEVICE)[:, None, None] for k in ("mean", "std"))
    criterion = open_clip.ClipLoss()
    for key, parameter in clip.named_parameters():
        parameter.requires_grad_(text or key.startswith("visual") or key == "logit_scale")

    def loss(clip: torch.nn.Module) -> torch.Tensor:
        chosen = rng.integers(0, len(scenes), batch)
        _, texts = read(clip, scenes[chosen], names, rng)
        images = clip.encode_image((pixels[chosen].to(DEVICE) / 255 - mean) / std, normalize=True)
        return criterion(images, texts, clip.logit_scale.exp())

    fit("clip, both towers" if text else "clip, vision", clip.train(), loss, steps, lr)


def learn_captions(clip: torch.nn.Module, scenes, pixels, seed: int, steps: int = 100) -> None:
    """Trains the vision tower on captions that name everything: post-training without φ."""
    fit_clip(clip, scenes, pixels, 10 * [1.0], np.random.default_rng(seed), steps, 1e-4)


def make_vae(out: Path, seed: int, steps: int = 4500, batch: int = 16) -> None:
    """Writes diffusion/vae: 64 × 64 pixels → 4 × 8 × 8 latents of unit variance, downsampled by 8 as in SD."""
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

    fit("vae", vae, loss, steps, 1e-3)
    vae.register_to_config(scaling_factor=round(1 / encode(vae, pixels[:2000], 1).std().item(), 4))
    vae.half().save_pretrained(out / "diffusion" / "vae")


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: torch.Tensor, scale: float) -> torch.Tensor:
    """Pictures (B, 3, SIZE, SIZE) uint8 → the posterior's mean times `scale`, (B, 4, 8, 8)."""
    batches = tqdm(pixels.split(250), desc="encode", leave=False)
    return torch.cat([vae.encode(p.to(DEVICE) / 127.5 - 1).latent_dist.mean for p in batches]) * scale


def text_encoder(clip: torch.nn.Module) -> CLIPTextModel:
    """CLIP's text tower, of any width and depth, as a frozen CLIPTextModel; SD 1.x uses OpenAI's like this."""
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
def embed_captions(text: CLIPTextModel, captions: list[str], tok, alone=False) -> torch.Tensor:
    """The text encoder's output (B, L, W). If `alone`, the end token's output fills all positions but the first."""
    ids = tokens(captions, tok)
    hidden = text(ids).last_hidden_state
    end = hidden[torch.arange(len(ids)), ids.argmax(1)][:, None]  # (B, 1, W): the first of the highest ids
    alone = torch.as_tensor(alone, device=ids.device).expand(len(ids))[:, None, None]
    return torch.cat([hidden[:, :1], torch.where(alone, end, hidden[:, 1:])], 1)


def make_diffusion(
    out: Path, seed: int, steps: int = 4500, vae: Path | None = None, start: Path | None = None, batch: int = 128
) -> None:
    """Writes diffusion/: a U-Net, trained by ε-prediction on the VAE's latents, with CLIP's text tower.

    In 55% of captions the end token's output fills all positions but the first, so that the U-Net learns to read it
    alone, as Stable Diffusion mostly does at high noise (arXiv 2405.15330, NeurIPS 2024).

    Args:
        vae: the folder of a VAE; `out`/diffusion/vae if None.
        start: the folder of a U-Net, which initializes all weights of the same shape. If the text tower has another
            width, the cross-attention's keys and values start at random.
    """
    clip = load_clip(str(out / "clip"), device=str(DEVICE)).model
    text, tok = text_encoder(clip).to(DEVICE), tokenizer(clip.context_length, pad="<end>")
    vae = AutoencoderKL.from_pretrained(vae or out / "diffusion" / "vae", torch_dtype=torch.float32).to(DEVICE)
    vae.register_to_config(_name_or_path="")  # keep this machine's path out of the saved config
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
        print(f"diffusion: {len(weights)} of {len(fresh)} weights initialized from {start}")
    unet.set_attn_processor(AttnProcessor())
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    rng = np.random.default_rng(seed)

    def loss(unet: torch.nn.Module) -> torch.Tensor:
        chosen = rng.integers(0, len(scenes), batch)
        named = rng.random((batch, 10)) < DIFFUSION_NAMES
        captions = [caption(s, n) if rng.random() < 0.9 else "" for s, n in zip(scenes[chosen], named)]
        hidden = embed_captions(text, captions, tok, rng.random(batch) < 0.55)
        t = torch.from_numpy(rng.integers(0, 1000, (2, batch)).max(0)).to(DEVICE)  # the noisier of two
        z, noise = latents[chosen], torch.randn(batch, *latents.shape[1:], device=DEVICE)
        return F.mse_loss(unet(scheduler.add_noise(z, noise, t), t, hidden).sample.float(), noise)

    fit("diffusion", unet, loss, steps, 1e-3)
    StableDiffusionPipeline(
        vae=vae.half(), unet=unet.half(), text_encoder=text.half(), tokenizer=tok,
        scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(out / "diffusion")  # fmt: skip
