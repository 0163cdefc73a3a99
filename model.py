"""CLIP θ, which is trained, and the diffusion model φ, which judges it: how they are loaded, used and saved.

What their files hold is read by harness/weights.py (CLIP's) and harness/pretrained.py (φ's), to the last weight.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from open_clip.push_to_hf_hub import save_config_for_hf
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import AutoTokenizer, CLIPTextModel

from harness.errors import UserError, brief
from harness.pretrained import check_kind, clip_options, load_part, load_tokenizer, loading, random_diffusion
from harness.recipes import SD21, SD21_MIRROR, check_diffusion
from harness.weights import replace_weights

# ---------------------------------------------------------------------------------------------------------------------
# CLIP, θ


@dataclass
class Clip:
    """A CLIP of open_clip with what belongs to it.

    `source` is what open_clip calls it (an architecture, `hf-hub:…` or `local-dir:…`), `config` its `model_cfg`,
    `num_patches` the number P of local tokens that its vision tower gives.
    """

    model: torch.nn.Module
    source: str
    config: dict
    num_patches: int
    tokenizer_error: str = ""  # why it could not be loaded, once that is known: asking a hub in vain takes long

    @property
    def image_size(self) -> int:
        """The side of its images in pixels (224 for ViT-L-14)."""
        return self.model.visual.preprocess_cfg["size"][0]

    @functools.cached_property
    def normalisation(self) -> torch.Tensor:
        """Its mean and its standard deviation, (2, 3, 1, 1); cached, since a GPU would wait for a copy in each step."""
        cfg = self.model.visual.preprocess_cfg
        return torch.tensor([cfg["mean"], cfg["std"]], device=self.model.logit_scale.device)[..., None, None]

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        """Pixels in [0, 1] (B, 3, S, S) → CLIP's input (B, 3, s, s): bicubic, antialiased, its own normalisation."""
        size = self.image_size
        if images.shape[-1] != size:
            images = F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = self.normalisation
        return (images - mean) / std

    @functools.cached_property
    def preprocess(self):
        """CLIP's own evaluation transform, a PIL image → (3, s, s)."""
        return image_transform_v2(PreprocessCfg(**self.model.visual.preprocess_cfg), is_train=False)

    def read(self, path: str | Path) -> torch.Tensor:
        """An image file as `preprocess` gives it, (3, s, s). UserError: it cannot be read."""
        preprocess = self.preprocess  # made here, so that its own faults are not the image's
        try:
            with Image.open(path) as image:
                return preprocess(image)
        except Exception as error:  # Pillow raises almost any exception on a broken file
            raise UserError(f"{path}: not a readable image ({brief(error)})") from None

    def tokenizer(self):
        """Its tokenizer. SigLIP's comes from a hub, so call this only where there is text to read.

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
        """Writes the whole CLIP into `folder`, which open_clip loads with `local-dir:`: config, weights, tokenizer.

        A tokenizer that cannot be had is left out; `tokenizer_error` then says why.
        """
        weights = {key: value.contiguous() for key, value in self.model.state_dict().items()}
        save_file(weights, folder / "open_clip_model.safetensors")
        save_config_for_hf(self.model, folder / "open_clip_config.json", model_config=self.config)
        if self.config["text_cfg"].get("hf_tokenizer_name"):  # else it is built into open_clip
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
    source, options, files = clip_options(name, random_weights)
    torch.manual_seed(0)  # every process draws the same random weights
    with loading(f"CLIP {name}"):
        model = open_clip.create_model(source, device=device, **options).eval()
        config = open_clip.get_model_config(source)
        clip = Clip(model, source, config, count_patches(model.visual))
    for i, file in enumerate(files):
        whole = i == 0 and "pretrained" not in options  # it must hold both towers
        replace_weights(model, file, whole)
    if options.get("force_quick_gelu"):
        config["quick_gelu"] = True
    if random_weights and ":" not in source and config["text_cfg"].get("hf_tokenizer_name"):
        clip.tokenizer_error = "random weights have none, and a hub is not asked"
    return clip


def count_patches(visual: torch.nn.Module) -> int:
    """P, the number of local tokens of a vision tower of open_clip.

    Raises:
        UserError: it is neither a ViT that pools by class token nor a timm tower that pools by attention.
    """
    if getattr(visual, "pool_type", None) == "tok" and visual.attn_pool is None and not visual.final_ln_after_pool:
        return visual.grid_size[0] * visual.grid_size[1]
    trunk = getattr(visual, "trunk", None)
    if (
        getattr(trunk, "attn_pool", None) is not None
        and isinstance(trunk.head, torch.nn.Identity)
        and not len(visual.head)
    ):
        return trunk.patch_embed.num_patches
    raise UserError("this vision tower is neither a ViT with a class token nor a timm one that pools by attention")


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
    def downsampling(self) -> int:
        """Pixels per latent along a side (8)."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def image_size(self) -> int:
        """The side S of its own images in pixels (512 for 2.1-base)."""
        return self.unet.config.sample_size * self.downsampling

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
    with loading(f"diffusion model {name}", f"; the same weights: --diffusion {SD21_MIRROR}" if name == SD21 else ""):
        if random_weights:
            vae, unet, scheduler, embedding = random_diffusion(name, dtype, device)
        else:  # in this order, so that what is wrong shows before the large parts are read
            scheduler = DDPMScheduler.from_pretrained(name, subfolder="scheduler")
            embedding = embed_texts(name, [text], device)
            vae = load_part(AutoencoderKL, name, "vae", torch_dtype=dtype)
            unet = load_part(UNet2DConditionModel, name, "unet", torch_dtype=dtype)
    predicts = scheduler.config.prediction_type
    check_kind(name, vae, unet, predicts)
    for module in (vae, unet):  # Alg. 1, line 6: φ never changes; none of its weights takes a gradient
        module.requires_grad_(False).eval().to(device)
    return Diffusion(vae, unet, scheduler.alphas_cumprod.float().to(device), predicts, embedding.float().to(device))


def embed_texts(name: str, texts: list[str], device="cpu", end_only: bool = False) -> torch.Tensor:
    """Texts' states after the final LayerNorm, (n, L, W), or that of the end token alone, (n, W).

    The text encoder leaves memory when this returns.
    """
    tokenizer = AutoTokenizer.from_pretrained(name, subfolder="tokenizer", trust_remote_code=False)
    encoder = load_part(CLIPTextModel, name, "text_encoder", dtype=torch.float32).eval().to(device)
    length = encoder.config.max_position_embeddings
    tokens = tokenizer(texts, padding="max_length", max_length=length).input_ids
    longest = max(len(ids) for ids in tokens)
    if longest > length:
        raise UserError(f"--text: has {longest} tokens with its start and end, and this text encoder reads {length}")
    tokens = torch.tensor(tokens, device=device)
    embedded = []
    with torch.no_grad():
        for ids in tokens.split(64):
            states = encoder(ids).last_hidden_state  # (b, L, W)
            if end_only:
                end = (ids == tokenizer.eos_token_id).int().argmax(1)  # its first place
                states = states[torch.arange(len(ids), device=device), end]  # (b, W)
            embedded.append(states)
    return torch.cat(embedded)
