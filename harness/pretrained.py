"""Loads pretrained models quietly, and refuses models of the wrong kind and weights that do not fit."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import pickle
import re
import warnings
from pathlib import Path

import diffusers
import open_clip
import torch
import transformers
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from open_clip.pretrained import get_pretrained_cfg
from open_clip.tokenizer import HFTokenizer

from harness.errors import UserError, one_line
from harness.hub import fetch
from harness.recipes import locate_clip, split_weights
from harness.tensors import check_names, refuse_placeholder

for library in (diffusers.utils.logging, transformers.utils.logging):
    library.disable_progress_bar()


@contextlib.contextmanager
def quiet():
    """Silences the libraries' warnings and logs in the block; exceptions are still raised."""
    level = logging.root.manager.disable
    logging.disable(max(level, logging.ERROR))
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(level)


@contextlib.contextmanager
def loading(what: str, way_out: str = ""):
    """Silences the block, which loads `what`, and turns whatever the libraries or the hub raise into a UserError."""
    try:
        with quiet():
            yield
    except Exception as error:
        raise UserError(f"{what} could not be loaded: {one_line(error)}{way_out}") from error


def clip_options(name: str, random_weights: bool) -> tuple[str, dict, list[str]]:
    """open_clip's name for a CLIP, the options for `create_model`, and the weights to load afterwards.

    The weights to load are a saved folder, which harness/weights.py reads strictly, and WEIGHTS after an @.

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
            raise UserError(f"{name}: unknown tag; open_clip's tags for {source}: {known}")
        options["force_quick_gelu"] = published.get("quick_gelu", False)  # the one the weights need
        if random_weights:  # otherwise open_clip takes the preprocessing from the tag
            options["force_preprocess_cfg"] = {k: published[k] for k in ("mean", "std", "interpolation", "resize_mode")}
    files = [folder] if folder != source else []
    if weights:
        files.append(weights)
    return source, options, [] if random_weights else files


def assumptions(source: str, tagged: bool, config: dict, preprocessing: dict) -> str:
    """What open_clip assumes because the CLIP does not specify it, in words; "" if nothing.

    An architecture without a tag specifies neither activation nor preprocessing; a folder may lack the preprocessing.
    """
    assumed, folder = [], source.removeprefix("local-dir:")
    if folder != source:
        saved = json.loads(Path(folder, "open_clip_config.json").read_text())
        if "mean" in (saved.get("preprocess_cfg") or {}):
            return ""
    elif tagged or source.startswith("hf-hub:"):
        return ""
    else:
        assumed = ["QuickGELU" if config.get("quick_gelu") else "exact GELU"]
    numbers = "{mean}, std {std}, {interpolation}, {resize_mode}".format(**preprocessing)
    return " and ".join([*assumed, f"open_clip's default preprocessing (mean {numbers})"])


def load_tokenizer(source: str, config: dict):
    """The tokenizer of an open_clip CLIP: built in, from its folder, or from the hub (SigLIP's).

    Raises:
        UserError: it cannot be loaded.
    """
    text, folder = config["text_cfg"], Path(source.removeprefix("local-dir:"))
    hub_name = text.get("hf_tokenizer_name")  # None: it is built in
    if hub_name and source.startswith("local-dir:") and not (folder / "tokenizer_config.json").is_file():
        raise UserError(f"{folder}: this CLIP was saved without its tokenizer")
    with loading(f"the tokenizer of {source}"):
        if not hub_name:
            return open_clip.get_tokenizer(source)
        if not source.startswith("local-dir:"):  # offline, transformers wants a config.json unless it gets a folder
            folder = fetch(hub_name, "*.json", "*.txt", "*.model")
        options = dict(context_length=text.get("context_length", 77), tokenizer_mode=text.get("tokenizer_mode"))
        return HFTokenizer(f"{folder}", trust_remote_code=False, **options, **text.get("tokenizer_kwargs", {}))


@functools.cache
def find_diffusion(name: str) -> Path:
    """The folder of a diffusion model: `name`, or the local copy of the hub's repository OWNER/NAME.

    Raises:
        UserError: it cannot be fetched.
    """
    if os.path.isdir(name):
        return Path(name)
    parts = ("text_encoder", "unet", "vae")
    weights = [f"{part}/*model.safetensors" for part in parts]
    folder = fetch(name, "scheduler/*", "tokenizer/*", *(f"{part}/config.json" for part in parts), *weights)
    if not all(list(folder.glob(pattern)) for pattern in weights):  # other file names: .fp16., .bin, shards
        fetch(name, *(f"{part}/*" for part in parts))
    return folder


def load_part(kind: type, folder: Path, part: str, **options) -> torch.nn.Module:
    """Loads a part of a Stable Diffusion: the class `kind` of diffusers or transformers, from `folder`/`part`.

    Raises:
        UserError: it has no weights, or one is missing, unexpected or wrongly shaped, which the libraries tolerate.
    """
    options |= dict(subfolder=part, output_loading_info=True, ignore_mismatched_sizes=True)
    for variant in (None, "fp16"):
        try:
            module, report = kind.from_pretrained(folder, variant=variant, **options)
            break
        except Exception as error:
            if "no file named" in str(error):  # try the next variant
                continue
            for file in [*(folder / part).glob("*.safetensors"), *(folder / part).glob("*.bin")]:
                refuse_placeholder(file)
            pickled = isinstance(error, pickle.UnpicklingError)  # its message suggests executing them
            reason = "contains pickled objects other than tensors" if pickled else one_line(error)
            raise UserError(f"its {part}: {reason}") from error
    else:
        expected = f"{'model' if part == 'text_encoder' else 'diffusion_pytorch_model'}.safetensors"
        others = sorted(path.name for path in (folder / part).glob("*") if path.suffix != ".json")
        if any(re.search(r"-\d{5}-of-\d{5}\.", other) for other in others):
            advice = f"; its shards need {expected}.index.json"
        else:
            advice = f"; rename the right one of {', '.join(others)} to {expected}" if others else ""
        raise UserError(f"its {part} has no {expected}{advice}")
    misshapen = [f"{key} {tuple(found)} instead of {tuple(own)}" for key, found, own in report["mismatched_keys"]]
    check_names(f"its {part}", report["missing_keys"], report["unexpected_keys"], misshapen)
    return module


def load_scheduler(folder: Path | str) -> DDPMScheduler:
    """The noise schedule ᾱ of `folder`/scheduler. UserError: it is not a DDPM schedule."""
    config = DDPMScheduler.load_config(folder, subfolder="scheduler")
    needed = {"num_train_timesteps", "beta_start", "beta_end", "beta_schedule"}
    if "FlowMatch" in config.get("_class_name", "") or not (config.get("trained_betas") or needed <= config.keys()):
        raise UserError(
            f"its scheduler, a {config.get('_class_name')}, has no DDPM noise schedule; expected "
            f"{', '.join(sorted(needed))} in scheduler/scheduler_config.json"
        )
    return DDPMScheduler.from_config(config)


def check_kind(name: str, vae: torch.nn.Module, unet: torch.nn.Module, prediction_type: str) -> None:
    """Raises UserError unless it is a plain Stable Diffusion: not SDXL, LCM, inpainting, upscaling or flow matching."""
    reads, gives = unet.config.in_channels, vae.config.latent_channels
    conditions = ("addition_embed_type", "class_embed_type", "num_class_embeds", "encoder_hid_dim_type")
    conditions += ("time_cond_proj_dim",)  # LCM's guidance scale
    more = [condition for condition in conditions if unet.config.get(condition) is not None]
    if prediction_type not in ("epsilon", "v_prediction") or reads != gives or more:
        raise UserError(
            f"{name}: not a Stable Diffusion 1.x or 2.x: it predicts {prediction_type}, its VAE has {gives} latent "
            f"channels, its U-Net reads {reads}{f' and has {more[0]}' if more else ''}"
        )


def random_diffusion(name: str, dtype: torch.dtype, device) -> tuple:
    """VAE, U-Net, scheduler and a text embedding (1, 77, W), with seeded random values.

    The architectures are those of `name` if it is a folder, else those of 2.1-base.
    """
    if os.path.isdir(name):
        vae = AutoencoderKL.load_config(name, subfolder="vae")
        unet = UNet2DConditionModel.load_config(name, subfolder="unet")
        scheduler = load_scheduler(name)
    else:  # 2.1-base, where it differs from diffusers' defaults
        vae = dict(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        )  # fmt: skip
        unet = dict(
            sample_size=64, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
        )
        scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    torch.manual_seed(0)  # every process draws the same φ
    with torch.device(device):
        vae = AutoencoderKL.from_config(vae).to(dtype)
        unet = UNet2DConditionModel.from_config(unet).to(dtype)
    return vae, unet, scheduler, torch.randn(1, 77, unet.config.cross_attention_dim)
