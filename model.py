"""CLIP θ, which is trained, and the diffusion model φ, which judges it: how they are loaded, used and saved."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import diffusers
import numpy as np
import open_clip
import torch
import transformers
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from open_clip.pretrained import get_pretrained_cfg
from open_clip.push_to_hf_hub import save_config_for_hf
from open_clip.transform import PreprocessCfg, image_transform_v2
from safetensors.torch import save_file
from transformers import AutoTokenizer, CLIPTextModel

from condition import count_patches
from harness.errors import UserError, brief
from harness.recipes import SD21, SD21_MIRROR, check_diffusion, locate_clip, split_weights
from harness.weights import replace_weights

# ---------------------------------------------------------------------------------------------------------------------
# CLIP, θ


@dataclass
class Clip:
    """A CLIP of open_clip with what belongs to it.

    `source` is what open_clip calls it (an architecture, `hf-hub:…` or `local-dir:…`), `config` its `model_cfg`.
    """

    model: torch.nn.Module
    source: str
    config: dict
    no_tokenizer: str = ""  # why its tokenizer could not be loaded, once that is known: asking a hub in vain takes long
    untouched: torch.nn.Module | None = None  # its vision tower before training, where `drift` is asked for

    @property
    def image_size(self) -> int:
        """The side of its images in pixels (224 for ViT-L-14)."""
        return self.model.visual.preprocess_cfg["size"][0]

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        """Pixels in [0, 1] (B, 3, S, S) → CLIP's input (B, 3, s, s): bicubic, antialiased, its own normalisation."""
        size, cfg = self.image_size, self.model.visual.preprocess_cfg
        if images.shape[-1] != size:
            images = torch.nn.functional.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
        channels = zip(images.unbind(1), cfg["mean"], cfg["std"])  # as numbers: a tensor of them would sync the GPU
        return torch.stack([(channel - mean) / std for channel, mean, std in channels], 1)

    def drift(self, cls: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """How far class tokens (B, D) of prepared images have moved from the untouched CLIP's: the mean square."""
        kind = "cuda" if cls.is_cuda else "cpu"
        with torch.no_grad(), torch.autocast(kind, torch.bfloat16, enabled=cls.dtype == torch.bfloat16):
            before = self.untouched(images)
        return (cls.float() - before.float()).square().mean()

    def preprocess(self):
        """CLIP's own evaluation transform, a PIL image → (3, s, s)."""
        return image_transform_v2(PreprocessCfg(**self.model.visual.preprocess_cfg), is_train=False)

    def tokenizer(self):
        """Its tokenizer; SigLIP's comes from the hub, so it is asked for only where there is text to read.

        Raises:
            UserError: it cannot be loaded.
        """
        folder = self.source.removeprefix("local-dir:")
        own = self.config["text_cfg"].get("hf_tokenizer_name")  # not one that is built into open_clip
        if own and folder != self.source and not os.path.isfile(os.path.join(folder, "tokenizer_config.json")):
            self.no_tokenizer = f"{folder}: this CLIP was saved without its tokenizer"
        if not self.no_tokenizer:
            try:
                with quiet():
                    return open_clip.get_tokenizer(self.source, **dict(trust_remote_code=False) if own else {})
            except Exception as error:  # whatever the hub or transformers raises
                self.no_tokenizer = f"the tokenizer of {self.source} could not be loaded: {brief(error)}"
        raise UserError(self.no_tokenizer)

    def save(self, folder: Path) -> None:
        """Writes the whole CLIP into `folder`, which open_clip loads with `local-dir:`: config, weights, tokenizer.

        A tokenizer that cannot be had is left out; `no_tokenizer` then says why.
        """
        weights = {key: value.contiguous() for key, value in self.model.state_dict().items()}
        save_file(weights, folder / "open_clip_model.safetensors")
        save_config_for_hf(self.model, folder / "open_clip_config.json", model_config=self.config)
        if self.config["text_cfg"].get("hf_tokenizer_name"):
            with contextlib.suppress(UserError):
                self.tokenizer().save_pretrained(folder)


def load_clip(name: str, random_weights: bool = False, device: str = "cpu") -> Clip:
    """Loads a CLIP in fp32, in eval mode, on `device`: a recipe's, ARCH:TAG, hf-hub:OWNER/NAME, or a saved folder.

    CLIP@WEIGHTS is that CLIP, loaded first, with the weights of a file in place of its own (harness/weights.py). ARCH
    alone has none of its own: ARCH@WEIGHTS needs a whole CLIP in the file, and has open_clip's default preprocessing.

    With `random_weights` the same architecture and preprocessing with seeded random weights, nothing downloaded for a
    built-in one; `device="meta"` then keeps only its shapes.

    Raises:
        UserError: it cannot be loaded, or its vision tower has no class token and local tokens to give.
    """
    source, tag = locate_clip(name, random_weights)
    weights = None if random_weights else split_weights(name)[1]
    own = not random_weights and (tag is not None or ":" in source)  # whether it has weights of its own
    options = dict(pretrained=tag, require_pretrained=True) if own else dict(load_weights=False)
    if tag is not None:
        if not (published := get_pretrained_cfg(source, tag)):
            known = ", ".join(open_clip.list_pretrained_tags_by_model(source)) or "none: no such architecture"
            raise UserError(f"{name}: open_clip has no weights of that name (for {source}: {known})")
        options["force_quick_gelu"] = published.get("quick_gelu", False)  # the activation that the weights know
        if random_weights:  # no weights are loaded, so their preprocessing is given
            options["force_preprocess_cfg"] = {k: published[k] for k in ("mean", "std", "interpolation", "resize_mode")}
    torch.manual_seed(0)
    try:
        with quiet():
            model = open_clip.create_model(source, device=device, **options)
        config = open_clip.get_model_config(source)
    except Exception as error:  # open_clip, the hub and safetensors each raise their own
        raise UserError(f"CLIP {name} could not be loaded: {brief(error)}") from error
    if options.get("force_quick_gelu"):
        config["quick_gelu"] = True
    try:
        count_patches(model.visual)
    except UserError as other:
        raise UserError(f"{name}: {other}") from None
    if weights:
        replace_weights(model, weights, whole=not own)
    clip = Clip(model.eval(), source, config)
    if random_weights and ":" not in source and config["text_cfg"].get("hf_tokenizer_name"):
        clip.no_tokenizer = "random weights have none, and a hub is not asked"
    return clip


# ---------------------------------------------------------------------------------------------------------------------
# The diffusion model, φ


@dataclass
class Diffusion:
    """A frozen Stable Diffusion; its text encoder is dropped once it has embedded the one text.

    `alphas_cumprod` (T,) fp32 is ᾱ; `prediction_type` "epsilon" or "v_prediction"; `text` (1, L, W) the embedding of
    the text; W is the width of the U-Net's cross-attention.
    """

    vae: torch.nn.Module
    unet: torch.nn.Module
    alphas_cumprod: torch.Tensor
    prediction_type: str
    text: torch.Tensor

    @property
    def image_size(self) -> int:
        """The side of its own images in pixels (512 for 2.1-base)."""
        return self.unet.config.sample_size * self.downsampling

    @property
    def downsampling(self) -> int:
        """Pixels per latent, along a side (8)."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """Of the latents of an image, (4, S/8, S/8). UserError: a side that the VAE cannot divide."""
        if image_size % self.downsampling:
            raise UserError(f"--image-size {image_size}: must be a multiple of {self.downsampling}")
        return self.vae.config.latent_channels, image_size // self.downsampling, image_size // self.downsampling

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Pixels in [0, 1], (B, 3, S, S) → latents z, (B, 4, S/8, S/8) fp32: the distribution's mean, scaled."""
        posterior = self.vae.encode((2 * images - 1).to(self.vae.dtype)).latent_dist
        return posterior.mean.float() * self.vae.config.scaling_factor


def load_diffusion(name: str, text: str, dtype: torch.dtype, device, random_weights: bool = False) -> Diffusion:
    """Loads a Stable Diffusion 1.x or 2.x in diffusers' layout (hub name or folder), frozen, in eval mode, in `dtype`.

    With `random_weights` nothing is downloaded: the architecture of a folder, else that of 2.1-base, with seeded
    weights, and a drawn embedding in place of the text's.

    Raises:
        UserError: it cannot be loaded, or is of another kind.
    """
    check_diffusion(name)
    try:
        with quiet():
            if random_weights:
                vae, unet, scheduler = build_diffusion(name, dtype, device)
                embedding = torch.randn(1, 77, unet.config.cross_attention_dim)
            else:  # in this order, so that what is wrong shows before the large parts are read
                scheduler = DDPMScheduler.from_pretrained(name, subfolder="scheduler")
                embedding = embed_texts(name, [text])
                kind = dict(torch_dtype=dtype, use_safetensors=True)
                vae = AutoencoderKL.from_pretrained(name, subfolder="vae", **kind)
                unet = UNet2DConditionModel.from_pretrained(name, subfolder="unet", **kind)
    except Exception as error:  # diffusers, transformers and the hub each raise their own
        mirror = f"; the same weights: --diffusion {SD21_MIRROR}" if name == SD21 else ""
        raise UserError(f"diffusion model {name} could not be loaded: {brief(error)}{mirror}") from error

    predicts, reads, gives = scheduler.config.prediction_type, unet.config.in_channels, vae.config.latent_channels
    more = unet.config.addition_embed_type or unet.config.class_embed_type  # SDXL's and others' further conditions
    if predicts not in ("epsilon", "v_prediction") or reads != gives or more:
        raise UserError(
            f"{name}: no Stable Diffusion 1.x or 2.x (it predicts {predicts}; its VAE gives {gives} channels, its "
            f"U-Net reads {reads}{f' and a condition of kind {more}' if more else ''})"
        )
    for module in (vae, unet):  # Alg. 1, line 6: φ never changes; none of its weights takes a gradient
        module.requires_grad_(False).eval().to(device)
    return Diffusion(vae, unet, scheduler.alphas_cumprod.float().to(device), predicts, embedding.float().to(device))


def embed_texts(name: str, texts: list[str], end_only: bool = False) -> torch.Tensor:
    """Texts' states after the final LayerNorm, (n, L, W), or that of the end token alone, (n, W).

    The text encoder leaves memory when this returns.
    """
    tokenizer = AutoTokenizer.from_pretrained(name, subfolder="tokenizer", trust_remote_code=False)
    kind = dict(dtype=torch.float32, use_safetensors=True)
    encoder = CLIPTextModel.from_pretrained(name, subfolder="text_encoder", **kind).eval()
    length, found = encoder.config.max_position_embeddings, []
    tokens = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        for ids in tokens.split(64):
            states = encoder(ids).last_hidden_state  # (b, L, W)
            end = (ids == tokenizer.eos_token_id).int().argmax(1)  # its first place
            found.append(states[torch.arange(len(ids)), end] if end_only else states)
    return torch.cat(found)


def embed_phrases(clip: Clip, name: str, text: str, count: int = 2000) -> tuple[torch.Tensor, torch.Tensor]:
    """What CLIP and φ make of the same phrases, random words of φ's vocabulary; so no captions are needed.

    Returns CLIP's embeddings (count, D), and φ's states of the end token less that of `text` (count, W).
    """
    with quiet():
        vocabulary = AutoTokenizer.from_pretrained(name, subfolder="tokenizer", trust_remote_code=False).get_vocab()
        whole = [word for word in vocabulary if word.endswith("</w>")] or vocabulary  # BPE marks where a word ends
        words = sorted(word for word in (w.removesuffix("</w>") for w in whole) if word.isalpha())
        rng = np.random.default_rng(0)
        phrases = [" ".join(rng.choice(words, rng.integers(1, 9))) for _ in range(count)]
        states = embed_texts(name, [text, *phrases], end_only=True)  # (1 + count, W)
    device = clip.model.logit_scale.device
    with torch.no_grad():
        tokens = clip.tokenizer()(phrases).to(device)
        embeddings = torch.cat([clip.model.encode_text(part) for part in tokens.split(64)])  # (count, D)
    return embeddings, (states[1:] - states[0]).to(device)


def build_diffusion(name: str, dtype: torch.dtype, device) -> tuple:
    """VAE, U-Net and scheduler with seeded random weights: a folder's architectures, else those of 2.1-base."""
    if os.path.isdir(name):
        vae = AutoencoderKL.load_config(name, subfolder="vae")
        unet = UNet2DConditionModel.load_config(name, subfolder="unet")
        scheduler = DDPMScheduler.load_config(name, subfolder="scheduler")
    else:  # where 2.1-base differs from diffusers' defaults
        vae = dict(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        )  # fmt: skip
        unet = dict(
            sample_size=64, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
        )
        scheduler = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    torch.manual_seed(0)  # every process draws the same φ
    with torch.device(device):
        vae = AutoencoderKL.from_config(vae).to(dtype)
        unet = UNet2DConditionModel.from_config(unet).to(dtype)
    return vae, unet, DDPMScheduler.from_config(scheduler)


@contextlib.contextmanager
def quiet():
    """Keeps the libraries' chatter (progress bars, warnings, unused weights) off the terminal while they load."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.ERROR)  # an error is raised as well, and said once
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
