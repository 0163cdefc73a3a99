"""The vision towers of open_clip: which ones can be trained; each kind is trained, saved and reloaded."""

import json
import re
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import timm
import torch
from open_clip.model import _build_vision_tower
from open_clip.pretrained import get_pretrained_cfg
from open_clip.transform import PreprocessCfg, image_transform_v2

import beyond
import model
import train
from evaluate_mmvp import read_mmvp, similarities
from harness.pretrained import quiet
from harness.recipes import MINIATURE
from harness.test_input import refused
from harness.weights import find_clip
from test_smoke import CPU, NoInit, picture, run, write_clip, write_mmvp

# Convolutional towers have no sequence of tokens; open_clip's `forward_intermediates` fails on CoCa's attention pool.
REFUSED = [
    "coca_ViT-B-32", "coca_ViT-L-14", "convnext_base", "convnext_base_w", "convnext_base_w_320", "convnext_large",
    "convnext_large_d", "convnext_large_d_320", "convnext_small", "convnext_tiny", "convnext_xlarge",
    "convnext_xxlarge", "convnext_xxlarge_320", "MobileCLIP-S1", "MobileCLIP-S2", "MobileCLIP2-S0", "MobileCLIP2-S2",
    "MobileCLIP2-S3", "MobileCLIP2-S4", "RN101", "RN101-quickgelu", "RN50", "RN50-quickgelu", "RN50x16",
    "RN50x16-quickgelu", "RN50x4", "RN50x4-quickgelu", "RN50x64", "RN50x64-quickgelu", "swin_base_patch4_window7_224",
]  # fmt: skip


SIZES = r"\d+|tiny|small|medium|base|x*large|giant(opt)?|gigantic|enormous|so400m"  # in a tower's configuration


def shapes_of(name: str) -> torch.nn.Module:
    """A vision tower on the meta device; with only its first block, since the others do not change the shapes."""
    config = open_clip.get_model_config(name)
    vision = config["vision_cfg"]
    if isinstance(vision.get("layers"), int):
        vision = vision | dict(layers=1)
    with NoInit(), quiet(), torch.device("meta"):
        visual = _build_vision_tower(config["embed_dim"], vision).eval()
    if hasattr(visual, "trunk") and hasattr(visual.trunk, "blocks"):
        visual.trunk.blocks = visual.trunk.blocks[:1]
    size = visual.image_size
    visual.preprocess_cfg = dict(size=size if isinstance(size, tuple) else (size, size))
    return visual


@pytest.mark.parametrize("ignored", [SIZES, pytest.param("^$", marks=pytest.mark.slow)], ids=["kinds", "sizes"])
def test_all_transformers_of_open_clip_can_be_trained(ignored):
    """P is the number of patches on the tower's grid; the refused architectures are those in REFUSED.

    Towers that differ only in what `ignored` matches are tested once: 23 kinds, or each size in the slow test.
    """
    names, towers = open_clip.list_models(), {}
    for name in names:
        config = open_clip.get_model_config(name)
        tower = json.dumps([config["embed_dim"], config["vision_cfg"]], sort_keys=True)
        towers.setdefault(re.sub(ignored, "", tower), []).append(name)
    accepted = []
    for same in towers.values():
        visual = shapes_of(same[0])
        if set(same) & set(REFUSED):
            with refused(f"{same[0]}: its vision tower has no class token with a sequence of patch tokens"):
                model.count_patches(visual, same[0])
            continue
        patches = model.count_patches(visual, same[0])
        if same != ["ViTamin-XL-384"]:  # timm counts patches at 384 pixels, open_clip's image size is 256
            expected = visual.trunk.patch_embed.num_patches if hasattr(visual, "trunk") else np.prod(visual.grid_size)
            assert patches == expected, same
        whole = {f"visual.{key}": value for key, value in visual.state_dict().items()}
        for state in (whole, visual.state_dict()):  # its own weights are recognized, with and without the prefix
            assert find_clip("", state, SimpleNamespace(visual=visual)).keys() == whole.keys(), same
        accepted += same
    assert len(accepted) >= 114 and set(names) == {*accepted, *REFUSED}


def shallow(name: str) -> None:
    """Registers timm's model `name` with two blocks as shallow_NAME."""

    def build(pretrained=False, **options):
        return timm.create_model(name, depth=2, **options)

    build.__name__ = f"shallow_{name}"
    timm.models.register_model(build)


FULL = ["EVA02-B-16", "PE-Core-T-16-384", "ViTamin-S", "MobileCLIP2-B"]


@pytest.mark.parametrize(
    "name, depth",
    [
        ("PE-Core-T-16-384", 2),
        *(pytest.param(name, 2, marks=pytest.mark.slow) for name in (*FULL, "ViT-L-14-CLIPA")),
        *(pytest.param(name, None, marks=pytest.mark.slow) for name in FULL),
    ],
)
def test_a_tower_is_trained_saved_and_reloaded(tmp_path, monkeypatch, name, depth):
    """Each parameter changes; the CLIP in OUT/clip has the same features in open_clip, and the same cosines."""
    config = open_clip.get_model_config(name)
    vision = config["vision_cfg"]
    if depth and "timm_model_name" in vision:
        shallow(vision["timm_model_name"])
        vision = vision | dict(timm_model_name=f"shallow_{vision['timm_model_name']}")
    elif depth:
        vision = vision | dict(layers=depth)
    folder = write_clip(tmp_path / "clip", config["embed_dim"], vision, custom_text=True)
    mmvp, scored = write_mmvp(tmp_path / "mmvp"), []
    monkeypatch.setattr(train, "compare", lambda names, cosines, *more: scored.extend(cosines) or "")
    flags = "--steps 1 --batch-size 2 --micro-batch 2 --optimizer adamw --lr 0.001"  # without weight decay
    out = run(tmp_path / "run", f"--clip {folder} --mmvp {mmvp} {flags}")

    before, after = model.load_clip(f"{folder}"), model.load_clip(f"{out}/clip")
    for (key, old), new in zip(before.model.visual.named_parameters(), after.model.visual.parameters(), strict=True):
        assert new.isfinite().all() and not torch.equal(old, new), key
    assert after.pools_by_attention == (name == "PE-Core-T-16-384")
    reloaded, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{out}/clip")
    image = preprocess(picture(50))[None]
    with torch.no_grad():
        assert torch.equal(reloaded.eval().encode_image(image), after.model.encode_image(image))
    assert np.array_equal(similarities(after, read_mmvp(f"{mmvp}"), CPU), scored[1])


@pytest.mark.parametrize("tag", ["openai", "webli", "datacomp1b", "meta", "dfndr2b", "datacompdr"])
def test_a_batch_is_preprocessed_as_open_clip_preprocesses_an_image(tag):
    """With each family's published mean, std and interpolation, up to Pillow's rounding to 8 bits."""
    names = dict(openai="ViT-B-16", webli="ViT-B-16-SigLIP", datacomp1b="ViT-L-14-CLIPA", meta="PE-Core-T-16-384")
    names |= dict(dfndr2b="MobileCLIP2-L-14", datacompdr="MobileCLIP-B")
    with NoInit():
        clip = model.load_clip(f"{names[tag]}:{tag}", random_weights=True, device="meta")
    published, image = get_pretrained_cfg(names[tag], tag), picture(700)
    numbers = {key: published[key] for key in ("mean", "std", "interpolation", "resize_mode")}
    theirs = image_transform_v2(PreprocessCfg(size=clip.image_size, **numbers), is_train=False)(image)
    clip.model.logit_scale = torch.nn.Parameter(torch.zeros(()))  # the device of `mean_std`; the rest stays on meta
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    difference = (clip.preprocess_batch(pixels)[0] - theirs) * torch.tensor(published["std"])[:, None, None] * 255
    assert difference.abs().max() < 5 and difference.abs().mean() < 0.5
    assert torch.equal(clip.preprocess_image(image), theirs)


def test_phrases_lack_the_text_that_joins():
    """Another text moves φ's embeddings of the phrases by the difference between the texts' embeddings."""
    clip, name = model.load_clip("miniature"), f"{MINIATURE}/diffusion"
    _, plain = beyond.embed_phrases(clip, name, "", CPU, 3)
    _, other = beyond.embed_phrases(clip, name, "the red house", CPU, 3)
    empty, house = model.embed_texts(name, ["", "the red house"], CPU, end_only=True)
    torch.testing.assert_close(plain + empty, other + house)
    assert not torch.allclose(plain, other)
