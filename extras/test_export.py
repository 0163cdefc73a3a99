"""The exported CLIP: transformers gives from it what open_clip gives from ours; what it cannot express is refused."""

from test_smoke import write_clip  # first: it sets what the libraries read when they are imported

# isort: split
import math
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image

import condition
import model
from extras import export
from harness.errors import UserError
from harness.recipes import MINIATURE, RECIPES
from harness.test_weights import SIGLIP, SIGLIP_TEXT, VIT, shaken, write_tiny_siglip
from harness.weights import read_weights

OPENAI_TEXT = dict(context_length=77, vocab_size=49408, hf_tokenizer_name=None)  # with open_clip's built-in tokenizer
FULL_SIZE = [name for name in RECIPES if name != "miniature"]


def write_clip_to_export(folder: Path, name: str, resize_mode: str = "squash") -> Path:
    if name == "siglip":
        write_tiny_siglip(folder)
    elif name == "openai":
        write_clip(folder, 20, VIT, text_cfg=OPENAI_TEXT, quick_gelu=True)
    else:
        write_clip(folder, 20, VIT | dict(norm_kwargs=dict(eps=0.1)))
    clip = shaken(model.load_clip(f"{folder}"))
    clip.model.visual.preprocess_cfg["resize_mode"] = resize_mode
    clip.save(folder)
    return folder


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("name, resize_mode", [("vit", "squash"), ("siglip", "squash"), ("openai", "shortest")])
def test_the_exported_clip_is_ours(tmp_path, capsys, name, resize_mode):
    folder, out = write_clip_to_export(tmp_path / "clip", name, resize_mode), tmp_path / "exported"
    export.main([f"{folder}", f"{out}"])
    said = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in said[:3]] == ["image features", "patch tokens", "text features"]
    assert said[3:] == [f"written: {out}"]

    clip, theirs = model.load_clip(f"{folder}"), transformers.AutoModel.from_pretrained(out)
    assert type(theirs).__name__ == ("SiglipModel" if name == "siglip" else "CLIPModel")
    image = Image.effect_noise((50, 37), 90).convert("RGB")
    ours = clip.preprocess()(image)[None]
    for backend, grey_levels in (("pil", 1e-3), ("torchvision", 2.01)):  # transformers' default rounds differently
        processor = transformers.AutoImageProcessor.from_pretrained(out, backend=backend)
        pixels = processor(images=image, return_tensors="pt").pixel_values
        std = torch.tensor(clip.model.visual.preprocess_cfg["std"])[:, None, None]
        assert ((pixels - ours) * std * 255).abs().max() < grey_levels

    texts = ["a photo of red hat", " Two\n dogs,  left_right! ", "", "blue " * 100]
    ids, tokenizer = clip.tokenizer()(texts), transformers.AutoTokenizer.from_pretrained(out)
    tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    assert ids.shape == tokens.input_ids.shape and torch.equal(ids[ids > 0], tokens.input_ids[ids > 0])  # 0 pads

    with torch.no_grad():
        cls, local = condition.visual_tokens(clip.model.visual, ours)
        found = theirs.vision_model(ours, output_hidden_states=True)
        patches = found.last_hidden_state
        if name != "siglip":
            patches = theirs.visual_projection(theirs.vision_model.post_layernorm(patches[:, 1:]))
        assert relative(theirs.get_image_features(ours).pooler_output, cls) < 1e-5
        assert relative(patches, local) < 1e-5
        assert relative(theirs.get_text_features(**tokens).pooler_output, clip.model.encode_text(ids)) < 1e-5
        if name != "siglip":  # what LLaVA reads
            vision = transformers.CLIPVisionModel.from_pretrained(out)(ours, output_hidden_states=True)
            before = clip.model.visual.forward_intermediates(ours, indices=2, output_fmt="NLC")["image_intermediates"]
            assert relative(vision.hidden_states[-2][:, 1:], before[0]) < 1e-5
    for scalar in ("logit_scale", "logit_bias"):
        if getattr(clip.model, scalar) is not None:
            assert getattr(theirs, scalar).item() == getattr(clip.model, scalar).item()

    back = model.load_clip(f"{folder}@{out}").model.state_dict()  # and CLIP@WEIGHTS is the way back
    assert all(torch.equal(value, back[key]) for key, value in clip.model.state_dict().items())


def test_the_miniature_is_exported(tmp_path):
    clip = model.load_clip(f"{MINIATURE}/clip")
    (tmp_path / "exported.old").mkdir()  # a person's, who has made room
    assert max(export.export(clip, tmp_path / "exported").values()) < 5e-6
    assert (tmp_path / "exported.old").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    clip = model.load_clip("miniature")
    with torch.no_grad():
        clip.model.token_embedding.weight[5, 0] = value  # of a word that no text of the comparison has
    with pytest.raises(UserError, match="its text_model.embeddings.token_embedding.weight is not finite"):
        export.export(clip, tmp_path / "exported")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "vision, more, message",
    [
        (VIT | dict(ls_init_value=0.1), {}, "it and a CLIPModel differ in vision_model.encoder.layers.0.ls_1.gamma"),
        (VIT | dict(no_ln_pre=True), {}, "it and a CLIPModel differ in vision_model.pre_layrnorm.bias"),
        (VIT, dict(init_logit_bias=-10), "it and a CLIPModel differ in logit_bias"),
        (VIT, dict(text_cfg=dict(pool_type="first")), "its text features differ from a CLIPModel's by "),
        (
            SIGLIP,
            dict(text_cfg=SIGLIP_TEXT | dict(no_causal_mask=False, layers=2)),
            "its text features differ from a SiglipModel's by ",
        ),
        (SIGLIP, {}, "it and a SiglipModel differ in text_model.head.bias"),
        (
            SIGLIP | dict(timm_model_name="test_vit", image_size=160),
            dict(text_cfg=SIGLIP_TEXT),
            "differ in vision_model.cls_token",
        ),
    ],
)
def test_what_transformers_cannot_express_is_refused(tmp_path, vision, more, message):
    if "timm_model_name" in vision:
        more = more | dict(custom_text=True, init_logit_bias=-10)
    folder = write_clip(tmp_path / "clip", 64 if vision["image_size"] == 160 else 24, vision, **more)
    with pytest.raises(UserError, match=f"local-dir:{folder} cannot be exported: .*{message}") as stop:
        export.main([f"{folder}", f"{tmp_path}/exported"])
    assert "\n" not in str(stop.value) and [path.name for path in tmp_path.iterdir()] == ["clip"]


def test_padding_and_other_activations_are_refused(tmp_path):
    folder = write_clip_to_export(tmp_path / "clip", "vit", "longest")
    with pytest.raises(UserError, match="no image processor that fits the longest side and pads"):
        export.main([f"{folder}", f"{tmp_path}/exported"])
    clip = model.load_clip(f"{folder}")
    clip.model.transformer.resblocks[0].mlp.gelu = torch.nn.SiLU()
    with pytest.raises(UserError, match="the activation SiLU.* is none of QuickGELU"):
        export.export(clip, tmp_path / "exported")
    assert [path.name for path in tmp_path.iterdir()] == ["clip"]


def test_an_export_takes_a_new_folder(tmp_path):
    (tmp_path / "exported").mkdir()
    with pytest.raises(UserError, match="exported: exists already; an export takes a new folder"):
        export.main([f"{MINIATURE}/clip", f"{tmp_path}/exported"])


def test_a_clip_without_its_tokenizer_is_exported_all_the_same(tmp_path, capsys):
    folder, out = write_clip_to_export(tmp_path / "clip", "siglip"), tmp_path / "exported"
    (folder / "tokenizer_config.json").unlink()
    export.main([f"{folder}", f"{out}"])
    assert f"without a tokenizer: {folder}: this CLIP was saved without its tokenizer" in capsys.readouterr().out
    names = sorted(path.name for path in out.iterdir())
    assert names == ["config.json", "model.safetensors", "preprocessor_config.json"]


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL_SIZE)
def test_every_architecture_is_exported_and_read_back(tmp_path, name):
    clip = shaken(model.load_clip(name, random_weights=True))
    differences = export.export(clip, tmp_path / "exported")
    print(name, differences)
    assert max(differences.values()) < 5e-6
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "exported", backend="pil")
    image = Image.effect_noise((500, 333), 90).convert("RGB")
    assert (processor(images=image, return_tensors="pt").pixel_values[0] - clip.preprocess()(image)).abs().max() < 1e-5
    back = read_weights(f"{tmp_path}/exported", clip.model)
    assert all(torch.equal(value, back[key]) for key, value in clip.model.state_dict().items())
