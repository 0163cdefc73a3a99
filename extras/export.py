"""Exports a CLIP as a transformers folder, from which multimodal language models take their vision tower.

    python extras/export.py runs/openai-vit-l-14-224/clip l14-clip   # the CLIP of a run
    python extras/export.py openai-vit-l-14-224 original-clip        # or any CLIP that evaluate_mmvp.py takes

AutoModel loads a CLIPModel for a ViT with a class token, and a SiglipModel for a SigLIP; AutoImageProcessor and
AutoTokenizer load the rest. Other towers (EVA, PE-Core, ViTamin, MobileCLIP, CLIPA) are refused: transformers has no
CLIP class for them. Before the folder appears, it is loaded and compared with the CLIP in fp32: image features,
patch tokens (of a CLIPModel after the final LayerNorm and the projection, which follow its `last_hidden_state`) and
text features. Differences above TOLERANCE are refused.

With backend="pil", pixels equal open_clip's; transformers' default backend rounds differently, by at most two gray
levels of 255. Call the tokenizer with padding="max_length", truncation=True. It cleans texts as open_clip's does,
except for curly quotes, broken encodings and HTML (ftfy). A CLIPTokenizer pads with the end token, open_clip with 0.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness.errors import UserError, exit_on_user_error, one_line, usage_error


def read_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = usage_error
    parser.add_argument("clip", metavar="CLIP", help="a recipe, ARCH:TAG, hf-hub:OWNER/NAME, a folder, CLIP@WEIGHTS")
    parser.add_argument("folder", metavar="DIR", help="the folder to write; it must not exist")
    args = parser.parse_args(argv)
    if os.path.lexists(args.folder):
        raise UserError(f"{args.folder}: already exists; an export needs a new folder")
    return args


if __name__ == "__main__":  # before the imports that take seconds, so that --help and a typo are answered at once
    with exit_on_user_error("export.py"):
        args = read_args()

import contextlib
import re
import string
import tempfile

import open_clip
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import Regex, normalizers
from torch import nn

from condition import visual_tokens
from harness.pretrained import quiet
from harness.tensors import check_names
from harness.weights import to_transformers
from model import Clip, load_clip

TOLERANCE = 5e-5  # relative to the largest value; at full size fp32 noise is 2e-6, tanh instead of exact GELU 2e-4
TEXTS = ["", "a photo of a cat", "Two dogs, one_on the LEFT!", "it's 12:30\n\tin  São Paulo", "red blue " * 100]
ACTIVATIONS = {  # repr of torch's module → transformers' name
    "QuickGELU()": "quick_gelu",
    "GELU(approximate='none')": "gelu",
    "GELU(approximate='tanh')": "gelu_pytorch_tanh",
    "GELUTanh()": "gelu_pytorch_tanh",
}


def export(clip: Clip, folder: str | os.PathLike) -> dict[str, float]:
    """Writes `clip` as the transformers folder `folder`, which must not exist, and returns its `differences`.

    A tokenizer that cannot be loaded is omitted; `clip.tokenizer_error` then says why.

    Raises:
        UserError: transformers has no class for this CLIP, or the folder cannot be written; nothing is left behind.
    """
    folder = Path(folder)
    try:
        weights = to_transformers(clip.model.state_dict())
        for name, value in weights.items():
            if not value.isfinite().all():
                raise UserError(f"its {name} is not finite")
        family = "Siglip" if "vision_model.head.probe" in weights else "CLIP"
        tokenizer = None
        with contextlib.suppress(UserError):
            tokenizer = transformers_tokenizer(clip)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent) as temporary, quiet():
            new = Path(temporary, folder.name)
            transformers_config(clip, family, tokenizer).save_pretrained(new)
            save_file(weights, new / "model.safetensors", metadata=dict(format="pt"))
            (new / "model.safetensors").chmod(new.stat().st_mode & 0o666)  # safetensors lets only the owner read it
            image_processor(clip, family).save_pretrained(new)
            if tokenizer:
                tokenizer.save_pretrained(new)
            largest = differences(clip, new, family, tokenizer)
            for name, difference in largest.items():
                if not difference <= TOLERANCE:
                    raise UserError(f"its {name} differ from a {family}Model's by {difference:.1e}")
            new.rename(folder)
    except UserError as reason:
        raise UserError(f"{clip.source}: cannot be exported: {reason}") from None
    except (OSError, SafetensorError) as error:  # a full disk, missing permissions
        raise UserError(f"{folder}: could not be written ({one_line(error)})") from error
    return largest


def transformers_config(clip: Clip, family: str, tokenizer):
    """The CLIPConfig or SiglipConfig of `clip`. UserError: transformers has no class for one of its towers."""
    model = clip.model
    patches = next(module for module in model.visual.modules() if isinstance(module, nn.Conv2d))
    vision = tower_config(model.visual) | dict(image_size=clip.image_size, patch_size=patches.kernel_size[0])
    text = tower_config(model.text if hasattr(model, "text") else model.transformer)
    text |= dict(vocab_size=model.vocab_size, max_position_embeddings=model.context_length)
    text |= {f"{k}_token_id": getattr(tokenizer, f"{k}_token_id", None) for k in ("bos", "eos", "pad")}
    if not tokenizer and family == "CLIP":
        text["eos_token_id"] = model.vocab_size - 1  # open_clip takes the text features at the highest token id
    width = {"projection_dim" if family == "CLIP" else "projection_size": clip.config["embed_dim"]}
    return getattr(transformers, f"{family}Config")(
        text_config=text | width, vision_config=vision | width, architectures=[f"{family}Model"], **width
    )


def tower_config(tower: nn.Module) -> dict:
    """The entries that both towers' configurations share. UserError: transformers has no class for this tower."""
    blocks = [module for module in tower.modules() if hasattr(module, "attn") and hasattr(module, "mlp")]
    first, activation = list(blocks[0].mlp.children())[:2] if blocks else (None, None)
    if str(activation) not in ACTIVATIONS:
        raise UserError(f"transformers has no class for its {type(getattr(tower, 'trunk', tower)).__name__}")
    return dict(
        hidden_size=first.in_features,
        intermediate_size=first.out_features,
        hidden_act=ACTIVATIONS[str(activation)],
        num_hidden_layers=len(blocks),
        num_attention_heads=blocks[0].attn.num_heads,
        layer_norm_eps=next(module.eps for module in blocks[0].modules() if isinstance(module, nn.LayerNorm)),
    )


def transformers_tokenizer(clip: Clip):
    """Its tokenizer as a transformers tokenizer that cleans texts itself. UserError: it cannot be loaded."""
    theirs, length = clip.tokenizer(), clip.model.context_length
    if isinstance(theirs, open_clip.SimpleTokenizer):
        words = [*theirs.encoder][:-2] + ["<|startoftext|>", "<|endoftext|>"]
        vocabulary = dict(zip(words, theirs.encoder.values()))
        return transformers.CLIPTokenizer(vocabulary, [*theirs.bpe_ranks], model_max_length=length)
    clean, steps = clip.config["text_cfg"].get("tokenizer_kwargs", {}).get("clean", "whitespace"), []
    if clean == "canonicalize":
        steps += [normalizers.Replace("_", " "), normalizers.Replace(Regex(f"[{re.escape(string.punctuation)}]"), "")]
    if clean != "whitespace":
        steps += [normalizers.Lowercase()]
    backend = theirs.tokenizer.backend_tokenizer
    steps += [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip(), backend.normalizer]
    backend.normalizer = normalizers.Sequence([step for step in steps if step is not None])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=length,
        model_input_names=["input_ids"],  # SigLIP attends to its padding: no attention mask
        **theirs.tokenizer.special_tokens_map,
    )


def image_processor(clip: Clip, family: str):
    """Its preprocessing as a transformers image processor. UserError: it pads."""
    cfg, square = clip.model.visual.preprocess_cfg, dict(height=clip.image_size, width=clip.image_size)
    if cfg["resize_mode"] == "longest":
        raise UserError("transformers has no image processor that resizes the longest side and pads")
    shortest = cfg["resize_mode"] == "shortest"
    return getattr(transformers, f"{family}ImageProcessor")(
        size=dict(shortest_edge=clip.image_size) if shortest else square,
        do_center_crop=shortest,
        crop_size=square,
        resample=2 if cfg["interpolation"] == "bilinear" else 3,
        image_mean=list(cfg["mean"]),
        image_std=list(cfg["std"]),
    )


@torch.no_grad()
def differences(clip: Clip, folder: Path, family: str, tokenizer) -> dict[str, float]:
    """Loads the exported `folder`. Returns, for each output, the largest difference from `clip` over the largest value.

    UserError: its weights do not fit transformers' model.
    """
    options = dict(output_loading_info=True, ignore_mismatched_sizes=True)
    model, report = transformers.AutoModel.from_pretrained(folder, **options)
    misshapen = [key for key, *_ in report["mismatched_keys"]]
    what = f"transformers has no class for it; a {family}Model does not fit"
    check_names(what, report["missing_keys"], report["unexpected_keys"], misshapen)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, clip.image_size, clip.image_size, generator=generator)
    if tokenizer:
        ids, reloaded = clip.tokenizer()(TEXTS), transformers.AutoTokenizer.from_pretrained(folder)
        tokens = reloaded(TEXTS, padding="max_length", truncation=True, return_tensors="pt")
    else:
        ids = torch.randint(clip.model.vocab_size - 1, (4, clip.model.context_length), generator=generator)
        ids[:, -1] = clip.model.vocab_size - 1
        tokens = dict(input_ids=ids)
    vision, text = model.vision_model(images), model.text_model(**tokens)
    theirs = [vision.pooler_output, vision.last_hidden_state, text.pooler_output]
    if family == "CLIP":
        local = model.vision_model.post_layernorm(vision.last_hidden_state[:, 1:])
        theirs = [model.visual_projection(theirs[0]), model.visual_projection(local), model.text_projection(theirs[2])]
    ours = [*visual_tokens(clip.model.visual, images), clip.model.encode_text(ids)]
    names = ("image features", "patch tokens", "text features")
    return {n: float((a - b).abs().max() / b.abs().max()) for n, a, b in zip(names, theirs, ours)}


def main(args: argparse.Namespace) -> None:
    clip = load_clip(args.clip)
    for name, difference in export(clip, args.folder).items():
        print(f"{name:14}  differ by {difference:.1e}")
    why = f", without a tokenizer: {clip.tokenizer_error}" if clip.tokenizer_error else ""
    print(f"written: {args.folder}{why}")


if __name__ == "__main__":
    with exit_on_user_error("export.py"):
        main(args)
