"""Pretrained models as libraries and hubs give them: without their chatter, and with every weight from the files."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import warnings
from pathlib import Path

import diffusers
import open_clip
import torch
import transformers
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from open_clip.pretrained import get_pretrained_cfg

from harness.errors import UserError, one_line
from harness.recipes import locate_clip, split_weights
from harness.tensors import first_of, refuse_placeholder

FORMS = (  # of a part's files: the first form that is there is read, pickled ones as tensors alone (`weights_only`)
    dict(use_safetensors=True),
    dict(use_safetensors=True, variant="fp16"),
    dict(use_safetensors=False),
    dict(use_safetensors=False, variant="fp16"),
)


@contextlib.contextmanager
def quiet():
    """Keeps the libraries' chatter (progress bars, warnings, unused weights) off the terminal while they load."""
    level = logging.root.manager.disable
    libraries = [diffusers.utils.logging, transformers.utils.logging]
    with_bars = [library for library in libraries if library.is_progress_bar_enabled()]
    for library in with_bars:
        library.disable_progress_bar()
    logging.disable(max(level, logging.ERROR))  # an error is raised as well, and said once
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        for library in with_bars:
            library.enable_progress_bar()


@contextlib.contextmanager
def loading(what: str, way_out: str = ""):
    """Loads quietly. Whatever open_clip, diffusers, transformers, safetensors or the hub raises is a UserError."""
    try:
        with quiet():
            yield
    except Exception as error:
        raise UserError(f"{what} could not be loaded: {one_line(error)}{way_out}") from error


def clip_options(name: str, random_weights: bool) -> tuple[str, dict, list[str]]:
    """What open_clip calls a CLIP, the options of its `create_model`, and which weights to put in place after that.

    These are a folder's, read by harness/weights.py because it is strict, and those after an @.

    Raises:
        UserError: there is no such CLIP.
    """
    source, tag = locate_clip(name, random_weights)
    options, folder, weights = dict(load_weights=False), source.removeprefix("local-dir:"), split_weights(name)[1]
    if not random_weights and (tag or source.startswith("hf-hub:")):
        options = dict(pretrained=tag, require_pretrained=True)
    if tag:
        published = get_pretrained_cfg(source, tag)
        if not published:
            known = ", ".join(open_clip.list_pretrained_tags_by_model(source)) or "none: no such architecture"
            raise UserError(f"{name}: open_clip has no weights of that name (for {source}: {known})")
        options["force_quick_gelu"] = published.get("quick_gelu", False)  # the activation that the weights know
        if random_weights:  # no weights are loaded, so their preprocessing is given
            options["force_preprocess_cfg"] = {k: published[k] for k in ("mean", "std", "interpolation", "resize_mode")}
    files = [folder] if folder != source else []
    if weights:
        files.append(weights)
    return source, options, [] if random_weights else files


def load_tokenizer(source: str, config: dict):
    """The tokenizer of an open_clip CLIP: one that is built in, or that of its folder, or the hub's (SigLIP's).

    Raises:
        UserError: it cannot be loaded.
    """
    folder, options = source.removeprefix("local-dir:"), {}
    if config["text_cfg"].get("hf_tokenizer_name"):  # else it is built into open_clip
        options["trust_remote_code"] = False
        if folder != source and not Path(folder, "tokenizer_config.json").is_file():
            raise UserError(f"{folder}: this CLIP was saved without its tokenizer")
    with loading(f"the tokenizer of {source}"):
        return open_clip.get_tokenizer(source, **options)


def load_part(kind: type, name: str, part: str, **options) -> torch.nn.Module:
    """A part of a Stable Diffusion: a `kind` of diffusers' or transformers', with the weights of `name`/`part`.

    Raises:
        UserError: there are none; or a weight is missing, left over or of another shape, where the libraries go on
            with random ones.
    """
    options |= dict(subfolder=part, output_loading_info=True, ignore_mismatched_sizes=True)
    folder, missing = Path(name, part), None
    for form in FORMS:
        try:
            module, report = kind.from_pretrained(name, **options, **form)
            break
        except Exception as error:
            if "file named" not in str(error):  # it is there, and cannot be read
                for file in folder.glob("*.safetensors" if form["use_safetensors"] else "*.bin"):
                    refuse_placeholder(file)
                pickled = isinstance(error, pickle.UnpicklingError)  # its message advises to execute them
                reason = "holds pickled objects that are no tensors" if pickled else one_line(error)
                raise UserError(f"its {part}: {reason}") from error
            missing = missing or error
    else:
        others = sorted(path.name for path in folder.glob("*") if path.suffix != ".json")
        way_out = f" Give that name to the right one of {', '.join(others)}" if others else ""
        raise UserError(f"its {part}: {one_line(missing)}{way_out}")
    mismatched = [key for key, *_ in report["mismatched_keys"]]
    for keys, problem in (
        (report["missing_keys"], "has no {}"),
        (report["unexpected_keys"], "has {}, for which there is no place"),
        (mismatched, "has another shape of {} than its config.json says"),
    ):
        if keys:
            raise UserError(f"its {part} {problem.format(first_of(sorted(keys)))}")
    return module


def check_kind(name: str, vae: torch.nn.Module, unet: torch.nn.Module, prediction_type: str) -> None:
    """UserError for what is no plain Stable Diffusion: SDXL, an inpainting or upscaling one, one that predicts else."""
    reads, gives = unet.config.in_channels, vae.config.latent_channels
    more = unet.config.addition_embed_type or unet.config.class_embed_type  # SDXL's and others' further conditions
    if prediction_type not in ("epsilon", "v_prediction") or reads != gives or more:
        raise UserError(
            f"{name}: no Stable Diffusion 1.x or 2.x (it predicts {prediction_type}; its VAE gives {gives} channels, "
            f"its U-Net reads {reads}{f' and a condition of kind {more}' if more else ''})"
        )


def random_diffusion(name: str, dtype: torch.dtype, device) -> tuple:
    """VAE, U-Net, scheduler and a text's embedding (1, 77, W), all seeded and random.

    The architectures are those of a folder, else those of 2.1-base.
    """
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
    return vae, unet, DDPMScheduler.from_config(scheduler), torch.randn(1, 77, unet.config.cross_attention_dim)
