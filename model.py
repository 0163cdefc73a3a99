"""CLIP θ, which is trained, and the diffusion model φ, which judges it: loading, using and saving them.

harness/weights.py (CLIP) and harness/pretrained.py (φ) read their files, and refuse missing or unexpected weights.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from open_clip.push_to_hf_hub import save_config_for_hf
from open_clip.transform import PreprocessCfg, image_transform_v2
from safetensors.torch import save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from transformers import AutoTokenizer, CLIPTextModel

from condition import visual_tokens
from harness.errors import UserError, one_line, warn
from harness.files import atomic_path
from harness.pictures import read_image
from harness.pretrained import (
    assumptions, check_kind, clip_options, find_diffusion, load_part, load_scheduler, load_tokenizer, loading,
    random_diffusion,
)  # fmt: skip
from harness.recipes import SD21, SD21_MIRROR, check_diffusion
from harness.weights import replace_weights

# ---------------------------------------------------------------------------------------------------------------------
# CLIP, θ


@dataclass
class Clip:
    """An open_clip CLIP with its name, configuration and tokenizer.

    `source` is its name in open_clip (an architecture, `hf-hub:…` or `local-dir:…`), `config` its `model_cfg`,
    `num_patches` the number P of its patch tokens.
    """

    model: torch.nn.Module
    source: str
    config: dict
    num_patches: int
    tokenizer_error: str = ""  # why the tokenizer could not be loaded; cached, as failed hub lookups are slow

    @property
    def image_size(self) -> int:
        """The side of its images in pixels (224 for ViT-L-14)."""
        return self.model.visual.preprocess_cfg["size"][0]

    @property
    def pools_by_attention(self) -> bool:
        """Whether it pools by attention (SigLIP, PE-Core), so that its patch tokens lie outside the joint space."""
        visual = self.model.visual
        return getattr(getattr(visual, "trunk", visual), "attn_pool", None) is not None

    @functools.cached_property
    def mean_std(self) -> torch.Tensor:
        """Its pixel mean and standard deviation, (2, 3, 1, 1); cached, because each copy would stall a GPU."""
        cfg = self.model.visual.preprocess_cfg
        return torch.tensor([cfg["mean"], cfg["std"]], device=self.model.logit_scale.device)[..., None, None]

    def preprocess_batch(self, images: torch.Tensor) -> torch.Tensor:
        """For training: pixels in [0, 1] (B, 3, S, S) → CLIP's input (B, 3, s, s), resized with antialiasing.

        Interpolation, mean and standard deviation are the CLIP's own, as in `preprocess_image`.
        """
        bilinear = self.model.visual.preprocess_cfg["interpolation"] == "bilinear"
        size, mode = self.image_size, "bilinear" if bilinear else "bicubic"
        if images.shape[-1] != size:
            images = F.interpolate(images, (size, size), mode=mode, antialias=True).clamp(0, 1)
        mean, std = self.mean_std
        return (images - mean) / std

    @functools.cached_property
    def preprocess_image(self):
        """For evaluation: open_clip's own transform of this CLIP, a PIL image → (3, s, s)."""
        return image_transform_v2(PreprocessCfg(**self.model.visual.preprocess_cfg), is_train=False)

    def preprocess_file(self, path: str | Path) -> torch.Tensor:
        """For evaluation: an image file → (3, s, s). UserError: it is not a readable image."""
        return self.preprocess_image(read_image(path))

    def tokenizer(self):
        """Its tokenizer. May contact the hub (SigLIP): call it only when you need it.

        Raises:
            UserError: it cannot be loaded; `tokenizer_error` then says why.
        """
        if not self.tokenizer_error:
            try:
                return load_tokenizer(self.source, self.config)
            except UserError as reason:
                self.tokenizer_error = str(reason)
        raise UserError(self.tokenizer_error)

    def save(self, folder: Path) -> None:
        """Writes the whole CLIP to `folder`, which open_clip loads as `local-dir:…`: config, tokenizer, weights.

        The weights are replaced atomically. The keys must be open_clip's own: if you added modules to the tower,
        merge them here. A tokenizer that cannot be loaded is omitted; `tokenizer_error` then says why. UserError: the
        folder cannot be written.
        """
        weights = {key: value.contiguous() for key, value in self.model.state_dict().items()}
        with atomic_path(folder / "open_clip_model.safetensors") as temporary:
            save_config_for_hf(self.model, folder / "open_clip_config.json", model_config=self.config)
            if self.config["text_cfg"].get("hf_tokenizer_name"):  # else it is built into open_clip
                with contextlib.suppress(UserError):
                    self.tokenizer().save_pretrained(folder)
            save_file(weights, temporary)


def load_clip(name: str, random_weights: bool = False, device: str = "cpu") -> Clip:
    """Loads a CLIP in fp32 and eval mode: a recipe's, ARCH:TAG of open_clip, hf-hub:OWNER/NAME, or a saved folder.

    CLIP@WEIGHTS is that CLIP with its weights loaded from WEIGHTS (harness/weights.py). ARCH@WEIGHTS needs a whole CLIP
    in the file, and uses open_clip's default preprocessing.

    `random_weights` keeps the architecture and preprocessing but initializes the weights from a seed; a built-in
    architecture needs no download. `device="meta"` allocates no weights.

    Raises:
        UserError: it cannot be loaded, or its vision tower has no sequence of patch tokens.
    """
    source, options, files = clip_options(name, random_weights)
    torch.manual_seed(0)  # every process draws the same random weights
    with loading(f"CLIP {name}"):
        model = open_clip.create_model(source, device=device, **options).eval()
        config = open_clip.get_model_config(source)
    clip = Clip(model, source, config, count_patches(model.visual, source))
    assumed = assumptions(source, "force_quick_gelu" in options, config, model.visual.preprocess_cfg)
    if files and assumed:
        warn(f"{name}: assuming {assumed}")
    for i, file in enumerate(files):
        replace_weights(model, file, whole=i == 0 and "pretrained" not in options)
    if options.get("force_quick_gelu"):
        config["quick_gelu"] = True
    if random_weights and ":" not in source and config["text_cfg"].get("hf_tokenizer_name"):
        clip.tokenizer_error = "no tokenizer with --random-weights, which does not ask the hub"
    return clip


def count_patches(visual: torch.nn.Module, name: str) -> int:
    """P, the number of patch tokens of an open_clip vision tower, from shapes alone, without computing anything.

    Raises:
        UserError: its tokens are not (B, D) and (B, P, D), as in convolutional towers and CoCa.
    """
    device, reason = next(visual.parameters()).device, ""
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            cls, local = visual_tokens(visual, torch.empty(1, 3, *visual.preprocess_cfg["size"], device=device))
        if cls.ndim == 2 and local.ndim == 3 and cls.shape[-1] == local.shape[-1]:
            return local.shape[1]
    except Exception as error:  # open_clip and timm raise many kinds
        reason = f" ({one_line(error)})"
    what = "has no class token with a sequence of patch tokens of the same width"
    raise UserError(f"{name}: its vision tower {what}{reason}")


# ---------------------------------------------------------------------------------------------------------------------
# The diffusion model, φ


@dataclass
class Diffusion:
    """A frozen Stable Diffusion. The text encoder is not kept: it embeds --text once, while loading.

    `alphas_cumprod` (T,) fp32 is ᾱ; `prediction_type` is "epsilon" or "v_prediction"; `text_embedding` is (1, L, W)
    for L text positions; W is the width of the U-Net's cross-attention.
    """

    vae: torch.nn.Module
    unet: torch.nn.Module
    alphas_cumprod: torch.Tensor
    prediction_type: str
    text_embedding: torch.Tensor

    @property
    def downsampling(self) -> int:
        """Pixels per latent along a side (8)."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def image_size(self) -> int:
        """The side S of its images in pixels (512 for 2.1-base). UserError: the U-Net's configuration lacks it."""
        size = self.unet.config.sample_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        if not height or height != width:
            raise UserError(f"the U-Net's sample_size is {size}, not a number; give --image-size")
        return height * self.downsampling

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Pixels in [0, 1] (B, 3, S, S) → latents z (B, 4, S/8, S/8) fp32: the posterior's mean, scaled."""
        posterior = self.vae.encode((2 * images - 1).to(self.vae.dtype)).latent_dist
        return posterior.mean.float() * self.vae.config.scaling_factor


def load_diffusion(name: str, text: str, dtype: torch.dtype, device, random_weights: bool = False) -> Diffusion:
    """Loads a Stable Diffusion 1.x or 2.x in diffusers' layout (hub name or folder), frozen, in eval mode, in `dtype`.

    `random_weights` downloads nothing: it uses the architecture of the folder `name`, or of 2.1-base if `name` is not a
    folder, with seeded weights and a random text embedding.

    Raises:
        UserError: it cannot be loaded, or is of another kind.
    """
    check_diffusion(name)
    with loading(f"diffusion model {name}", f"; the same weights: --diffusion {SD21_MIRROR}" if name == SD21 else ""):
        if random_weights:
            vae, unet, scheduler, embedding = random_diffusion(name, dtype, device)
        else:  # the small parts first, so that mistakes show before the large ones are read
            folder = find_diffusion(name)
            scheduler = load_scheduler(folder)
            embedding = embed_texts(name, [text], device)
            vae = load_part(AutoencoderKL, folder, "vae", torch_dtype=dtype)
            unet = load_part(UNet2DConditionModel, folder, "unet", torch_dtype=dtype)
    predicts = scheduler.config.prediction_type
    check_kind(name, vae, unet, predicts)
    for module in (vae, unet):  # Alg. 1, line 6: φ never changes
        module.requires_grad_(False).eval().to(device)
    return Diffusion(vae, unet, scheduler.alphas_cumprod.float().to(device), predicts, embedding.float().to(device))


def embed_texts(name: str, texts: list[str], device="cpu", end_only: bool = False) -> torch.Tensor:
    """Embeddings of texts after the text encoder's final LayerNorm, (n, L, W), or of their end tokens alone, (n, W).

    The text encoder is freed on return.
    """
    folder = find_diffusion(name)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", trust_remote_code=False)
    encoder = load_part(CLIPTextModel, folder, "text_encoder", dtype=torch.float32).eval().to(device)
    length = encoder.config.max_position_embeddings
    tokens = tokenizer(texts, padding="max_length", max_length=length).input_ids
    longest = max(len(ids) for ids in tokens)
    if longest > length:
        raise UserError(f"--text: must have at most {length} tokens with its start and end, not {longest}")
    tokens = torch.tensor(tokens, device=device)
    embeddings = []
    with torch.no_grad():
        for ids in tokens.split(64):
            hidden = encoder(ids).last_hidden_state  # (b, L, W)
            if end_only:
                end = (ids == tokenizer.eos_token_id).int().argmax(1)  # its first position
                hidden = hidden[torch.arange(len(ids), device=device), end]  # (b, W)
            embeddings.append(hidden)
    return torch.cat(embeddings)
