"""Every published form of weights is read to the last bit, CLIP's and φ's; what does not fit is refused."""

from test_smoke import CPU, run, write_clip, write_mmvp  # first: it sets what the libraries read when they are imported

# isort: split
import json
import logging
import pickle
import re
import shutil
import sys
import zipfile
from pathlib import Path

import diffusers
import open_clip
import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file

import evaluate_mmvp
import harness.tensors
import model
from harness.errors import UserError
from harness.pretrained import quiet
from harness.recipes import MINIATURE, locate_clip, recipe_of, split_weights
from harness.weights import to_transformers

VIT = dict(image_size=16, patch_size=4, width=24, layers=2, head_width=12)
SIGLIP = dict(image_size=18, timm_model_name="tiny_siglip", timm_pool="map", timm_proj="none")
SIGLIP_TEXT = dict(no_causal_mask=True, proj_bias=True, pool_type="last", tokenizer_kwargs=dict(clean="canonicalize"))


@timm.models.register_model
def tiny_siglip(pretrained=False, **options):
    """SigLIP's vision tower, made small: timm's own small ones have class tokens or registers."""
    sizes = dict(img_size=18, patch_size=4, embed_dim=24, depth=2, num_heads=2, mlp_ratio=3.7)  # two pixels are cut off
    return timm.models.VisionTransformer(num_classes=0, global_pool="map", class_token=False, **sizes)


def write_tiny_siglip(folder: Path) -> Path:
    tanh = dict(norm_kwargs=dict(eps=1e-6), act_kwargs=dict(approximate="tanh"), mlp_ratio=3.7)
    return write_clip(folder, 24, SIGLIP, text_cfg=SIGLIP_TEXT | tanh, custom_text=True, init_logit_bias=-10)


def shaken(clip: model.Clip) -> model.Clip:
    """No two of its weights are alike any more: a fresh CLIP's biases are all 0, its norms 1."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in clip.model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return clip


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> dict[str, str]:
    """A ViT, a small SigLIP, and a ViT whose text tower open_clip nests under `text.`."""
    folder = tmp_path_factory.mktemp("clips")
    nested = write_clip(folder / "nested", 20, VIT, custom_text=True)
    return dict(miniature="miniature", siglip=f"{write_tiny_siglip(folder / 'siglip')}", nested=f"{nested}")


def named(state: dict, prefix: str) -> dict:
    return {prefix + name: value for name, value in state.items()}


def openai(clip) -> dict:
    scalars = {name: torch.tensor(7) for name in ("input_resolution", "context_length", "vocab_size")}
    return {name.removeprefix("text."): value for name, value in clip.state_dict().items()} | scalars


def transformers_whole(clip) -> dict:
    positions = {f"{part}_model.embeddings.position_ids": torch.arange(9)[None] for part in ("text", "vision")}
    return to_transformers(clip.state_dict()) | positions


def transformers_tower(clip) -> dict:
    return {name: value for name, value in to_transformers(clip.state_dict()).items() if name.startswith("vis")}


WHOLE = {
    "open_clip.pth": lambda clip: clip.state_dict(),
    "open_clip.safetensors": lambda clip: clip.state_dict(),
    "openai.pt": openai,
    "trained.ckpt": lambda clip: dict(epoch=3, state_dict=named(clip.state_dict(), "module.")),
    "model.pth": lambda clip: dict(model=clip.state_dict(), optimizer=dict(step=3)),
    "transformers.bin": transformers_whole,
    "transformers.safetensors": transformers_whole,
}
TOWER = {
    "tower.ckpt": lambda clip: clip.visual.state_dict(),
    "tower.safetensors": lambda clip: clip.visual.state_dict(),
    "visual.pth": lambda clip: named(clip.visual.state_dict(), "visual."),
    "module.pth": lambda clip: named(clip.visual.state_dict(), "module."),
    "both.pth": lambda clip: dict(model=named(clip.visual.state_dict(), "module.visual.")),
    "transformers.bin": transformers_tower,
    "wrapped.bin": lambda clip: named(transformers_tower(clip), "clip."),
}
FORMS = [(whole, form) for whole, forms in ((True, WHOLE), (False, TOWER)) for form in forms]


def write(path: Path, state: dict) -> Path:
    if path.suffix == ".safetensors":
        save_file({name: value.contiguous() for name, value in state.items()}, path)
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("name", ["miniature", "siglip", "nested"])
@pytest.mark.parametrize("whole, form", FORMS)
def test_each_form_is_read_to_the_last_bit(clips, tmp_path, capsys, name, whole, form):
    before, after = model.load_clip(clips[name]), shaken(model.load_clip(clips[name]))
    file = write(tmp_path / form, (WHOLE if whole else TOWER)[form](after.model))
    read = model.load_clip(f"{clips[name]}@{file}")
    for key, value in read.model.state_dict().items():
        changed = whole or key.startswith("visual.")
        assert torch.equal(value, (after if changed else before).model.state_dict()[key]), key
    assert read.config == before.config and read.image_size == before.image_size
    assert torch.equal(read.tokenizer()(["a photo of red cat"]), before.tokenizer()(["a photo of red cat"]))
    assert capsys.readouterr().err == ""


def equal(one: dict, other: dict) -> bool:
    return all(torch.equal(value, other[key]) for key, value in one.items())


def released(clip) -> dict:
    """What the released code saves: the state dict of its whole model, Stable Diffusion and all."""
    state = named(clip.state_dict(), "class_model.model.") | {"class_model.final_fc.bias": ROW, "visual_proj.bias": ROW}
    for part, prefix in (("vae", "vae."), ("unet", "unet."), ("text_encoder", "text_encoder.text_model.")):
        (file,) = (MINIATURE / "diffusion" / part).glob("*.safetensors")
        state |= named(load_file(file), prefix)
    return state


def test_a_clip_inside_something_else_is_known_by_its_vision_tower(tmp_path, capsys):
    after, file = shaken(model.load_clip("miniature")).model, tmp_path / "CLIP_after_GenFT.pth"
    write(file, released(after))
    assert equal(model.load_clip(f"miniature@{file}").model.state_dict(), after.state_dict())
    aside = "class_model.final_fc, text_encoder, unet, vae, visual_proj"
    assert capsys.readouterr().err == f"{file}: the CLIP is class_model.model.*; left aside: {aside}\n"
    compiled = {re.sub(r"(blocks\.\d+\.)", r"\1_orig_mod.", name): v for name, v in after.state_dict().items()}
    for wrapper in ("model_state_dict", "module", "ema", "state_dict_ema"):
        write(file, {wrapper: named(compiled, "module."), "step": 3})
        assert equal(model.load_clip(f"miniature@{file}").model.state_dict(), after.state_dict())
    write(file, released(after) | dict(ema=after.visual.state_dict()))
    with pytest.raises(UserError, match=r"GenFT.pth: holds 2 CLIPs \(class_model.model.\*, ema.\*\); save the one"):
        model.load_clip(f"miniature@{file}")


@pytest.mark.parametrize(
    "names, message",
    [
        ("model-00001-of-00002.safetensors model-00002-of-00002.safetensors", ""),
        ("pytorch_model-00001-of-00001.bin training_args.bin", ""),
        ("model-00001-of-00002.safetensors", "a part of the weights is missing: model-00002-of-00002.safetensors"),
        ("model.safetensors model_1.safetensors", "in model.safetensors or in model_1.safetensors.* name the file"),
        ("model-00001-of-00001.safetensors model.safetensors", "in model-00001-of-00001.safetensors or in model.safe"),
        ("model_ema.safetensors model.safetensors", "in model.safetensors or in model_ema.safetensors"),
        ("pytorch_model.bin pytorch_model_1.bin", "in pytorch_model.bin or in pytorch_model_1.bin"),
    ],
)
def test_only_the_parts_of_one_model_are_put_together(tmp_path, names, message):
    after, names = shaken(model.load_clip("miniature")).model.state_dict(), names.split()
    weights = [name for name in names if "args" not in name]
    for name in names:
        share = dict(list(after.items())[weights.index(name) :: len(weights)]) if name in weights else dict(code=[1])
        write(tmp_path / name, share)
    if message:
        with pytest.raises(UserError, match=f"{tmp_path}: .*{message}"):
            model.load_clip(f"miniature@{tmp_path}")
    else:
        assert equal(model.load_clip(f"miniature@{tmp_path}").model.state_dict(), after)


def test_a_siglip_vision_model_is_a_tower(clips, tmp_path):
    after = shaken(model.load_clip(clips["siglip"])).model
    bare = {name.removeprefix("vision_model."): value for name, value in transformers_tower(after).items()}
    read = model.load_clip(f"{clips['siglip']}@{write(tmp_path / 'bare.bin', bare)}").model.visual.state_dict()
    assert equal(read, after.visual.state_dict())


def test_fp16_becomes_fp32(tmp_path):
    after = shaken(model.load_clip("miniature")).model.half().state_dict()
    read = model.load_clip(f"miniature@{write(tmp_path / 'half.pth', after)}").model.state_dict()
    assert all(v.dtype == torch.float32 and torch.equal(v, after[k].float()) for k, v in read.items())


def test_the_same_weights_are_said_to_be_the_same(tmp_path, capsys):
    tower = model.load_clip("miniature").model.visual.state_dict()
    file = write(tmp_path / "tower.pth", tower)
    model.load_clip(f"miniature@{file}")
    assert capsys.readouterr().err == f"{file}: the same weights as this CLIP's own\n"
    assert model.load_clip(f"miniature@{MINIATURE}/clip").source.endswith("clip")  # open_clip's own folder
    assert "the same weights" in capsys.readouterr().err
    tower["ln_post.bias"][0] += 1e-6
    model.load_clip(f"miniature@{write(file, tower)}")
    assert capsys.readouterr().err == ""


def transformers_model(family: str):
    """A CLIPModel or SiglipModel of transformers' own making, as small as `clips`."""
    sizes = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2)
    vision = sizes | dict(intermediate_size=96, image_size=16, patch_size=4, hidden_act="gelu")
    text = sizes | dict(intermediate_size=96, vocab_size=55, max_position_embeddings=24, hidden_act="gelu")
    text |= dict(bos_token_id=1, eos_token_id=54, pad_token_id=0)
    torch.manual_seed(3)
    if family == "CLIP":
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)
        return transformers.CLIPModel(config).eval()
    config = transformers.SiglipConfig(text_config=text, vision_config=vision | dict(image_size=18))
    return transformers.SiglipModel(config).eval()


@pytest.mark.parametrize("pickled", [True, False])
@pytest.mark.parametrize("family", ["CLIP", "Siglip"])
def test_a_folder_of_transformers_gives_its_features(tmp_path, family, pickled):
    theirs, text = transformers_model(family), dict(width=24, heads=2, layers=2, norm_kwargs=dict(eps=1e-5))
    if family == "CLIP":
        ours = write_clip(tmp_path / "ours", 20, VIT, text_cfg=text)
    else:
        text |= SIGLIP_TEXT | dict(norm_kwargs=dict(eps=1e-6))
        timm_tower = SIGLIP | dict(timm_model_name="square_siglip")
        ours = write_clip(tmp_path / "ours", 24, timm_tower, text_cfg=text, custom_text=True, init_logit_bias=-10)
    theirs.save_pretrained(tmp_path / "theirs")
    if pickled:  # as GenHancer's and DCR's
        (tmp_path / "theirs" / "model.safetensors").unlink()
        torch.save(theirs.state_dict(), tmp_path / "theirs" / "pytorch_model.bin")
        torch.save([1], tmp_path / "theirs" / "training_args.bin")  # no weights
    clip = model.load_clip(f"{ours}@{tmp_path}/theirs").model
    images, ids = torch.randn(2, 3, clip.visual.image_size[0], clip.visual.image_size[0]), torch.randint(54, (2, 24))
    ids[:, -1] = 54
    with torch.no_grad():
        for features, expected in (
            (clip.encode_image(images), theirs.get_image_features(images).pooler_output),
            (clip.encode_text(ids), theirs.get_text_features(ids).pooler_output),
        ):
            assert (features - expected).abs().max() < 1e-5 * expected.abs().max()
    assert clip.logit_scale == theirs.logit_scale


@timm.models.register_model
def square_siglip(pretrained=False, **options):
    sizes = dict(img_size=18, patch_size=4, embed_dim=24, depth=2, num_heads=2)
    return timm.models.VisionTransformer(num_classes=0, global_pool="map", class_token=False, **sizes)


def without(state: dict, name: str) -> dict:
    return {key: value for key, value in state.items() if key != name}


MISFITS = {
    "it has no visual.ln_post.bias": lambda clip: without(clip.state_dict(), "visual.ln_post.bias"),
    "it has no visual.proj": lambda clip: without(clip.visual.state_dict(), "proj"),
    "it has no ln_final.weight": lambda clip: without(clip.state_dict(), "ln_final.weight"),
    "it has no visual.proj$": lambda clip: without(transformers_tower(clip), "visual_projection.weight"),
    r"it has no visual.transformer.resblocks.0.attn.in_proj_bias$": lambda clip: without(
        to_transformers(clip.state_dict()), "vision_model.encoder.layers.0.self_attn.k_proj.bias"
    ),
    r"it has no visual.class_embedding \(and 55 more such names\)": lambda clip: dict(other=torch.ones(3)),
    "it has final_fc.weight, which this CLIP has not": lambda clip: clip.state_dict() | {"final_fc.weight": ROW},
    "it has visual.projection, which this CLIP has not": lambda clip: clip.visual.state_dict() | dict(projection=ROW),
    r"it has vision_model.layers.9.bias \(and 1 more such names\), which this CLIP has not": lambda clip: (
        transformers_tower(clip) | {"vision_model.layers.9.bias": ROW, "lora": ROW}
    ),
    r"its visual.proj is \(3,\), this CLIP's \(128, 128\)": lambda clip: clip.visual.state_dict() | dict(proj=ROW),
    "does not fit: ": lambda clip: (
        to_transformers(clip.state_dict()) | {"vision_model.encoder.layers.0.self_attn.k_proj.weight": torch.ones(2, 3)}
    ),
}
ROW = torch.ones(3)


@pytest.mark.parametrize("message", MISFITS)
def test_what_does_not_fit_is_refused(tmp_path, message):
    file = write(tmp_path / "misfit.pth", MISFITS[message](model.load_clip("miniature").model))
    with pytest.raises(UserError, match=f"{file}: does not fit: .*{message.removeprefix('does not fit: ')}"):
        model.load_clip(f"miniature@{file}")


def test_weights_of_another_clip_are_refused(clips, tmp_path):
    files = {name: write(tmp_path / f"{name}.pth", model.load_clip(clips[name]).model.state_dict()) for name in clips}
    for name, other in (("miniature", "siglip"), ("siglip", "miniature"), ("miniature", "nested")):
        with pytest.raises(UserError, match=f"{other}.pth: does not fit: ") as stop:
            model.load_clip(f"{clips[name]}@{files[other]}")
        assert "\n" not in str(stop.value)


class Payload:
    """A pickle that leaves a file behind when it is executed."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("suffix", [".pth", ".bin", ".safetensors"])
@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_refused(tmp_path, suffix, share):
    file = write(tmp_path / f"cut{suffix}", model.load_clip("miniature").model.state_dict())
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(UserError, match=f"{file}: could not be read as weights: .*[a-z]") as stop:
        model.load_clip(f"miniature@{file}")
    assert "\n" not in str(stop.value) and len(str(stop.value)) < 400


@pytest.mark.parametrize("suffix", [".pth", ".bin", ".safetensors"])
@pytest.mark.parametrize(
    "content, message",
    [
        ("epoch 1, loss 0.1\n", "could not be read as weights: it is neither of safetensors nor of torch.save"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a pointer of git-lfs.*git lfs pull"),
        ("\n<!DOCTYPE html><html>", "is a web page"),
    ],
)
def test_a_file_of_text_is_refused_in_words(tmp_path, suffix, content, message):
    file = tmp_path / f"log{suffix}"
    file.write_text(content)
    with pytest.raises(UserError, match=f"{file}: {message}"):
        model.load_clip(f"miniature@{file}")


@pytest.mark.parametrize(
    "name, tokens", [("openai-vit-l-14-224", 257), ("openai-vit-l-14-336", 577), ("ARCH:openai", 50)]
)
def test_openais_own_archive_is_sent_to_its_recipe(tmp_path, name, tokens):
    with zipfile.ZipFile(tmp_path / "ViT.pt", "w") as archive:  # as torch.jit.save lays it out
        archive.writestr("ViT/data/7", bytes(2 * tokens * 1024))  # the positional embedding, in fp16
        archive.writestr("ViT/constants.pkl", pickle.dumps(()))
    with pytest.raises(UserError, match=f"ViT.pt: is a TorchScript program, and is not executed; .*{name}"):
        model.load_clip(f"miniature@{tmp_path}/ViT.pt")


def test_safetensors_are_read_whatever_their_name(tmp_path):
    after = shaken(model.load_clip("miniature")).model.state_dict()
    file = write(tmp_path / "x.safetensors", after).rename(tmp_path / "x.ckpt")
    assert equal(model.load_clip(f"miniature@{file}").model.state_dict(), after)


@pytest.mark.parametrize("legacy", [True, False])
def test_nothing_pickled_is_executed(tmp_path, legacy):
    file, payload = tmp_path / "code.pth", Payload(tmp_path / "executed")
    if legacy:
        file.write_bytes(pickle.dumps(payload))
    else:
        torch.save(model.load_clip("miniature").model.state_dict() | dict(code=payload), file)
    with pytest.raises(UserError, match=f"{file}: holds pickled objects that are no tensors; nothing pickled is exec"):
        model.load_clip(f"miniature@{file}")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [[1, 2], torch.ones(3), {1: torch.ones(3)}, "words", 3])
def test_files_of_something_else_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(UserError, match="odd.pth: (could not be read as weights|does not fit): "):
        model.load_clip(f"miniature@{tmp_path}/odd.pth")


@pytest.mark.parametrize(
    "weights, message",
    [
        ("", "no such weights"),
        ("nowhere.pth", "nowhere.pth: no such weights"),
        ("hf-hub:BAAI/DIVA", "hf-hub:BAAI/DIVA: no such weights; name a file, a folder, or hf-hub:OWNER/NAME/PATH"),
        ("miniature", "miniature: no weights in this folder"),
        ("hf-hub:BAAI/DIVA/x.pth", "hf-hub:BAAI/DIVA/x.pth could not be fetched from the hub: "),
    ],
)
def test_weights_that_are_not_there_are_refused(monkeypatch, weights, message):
    monkeypatch.chdir(MINIATURE.parent)
    with pytest.raises(UserError, match=message) as stop:
        model.load_clip(f"{MINIATURE.name}/clip@{weights}")
    assert "\n" not in str(stop.value)


def test_weights_come_from_the_hub(tmp_path, monkeypatch):
    after = shaken(model.load_clip("miniature")).model.visual.state_dict()
    folder = tmp_path / "Some" / "model2.5b"
    folder.mkdir(parents=True)
    write(folder / "tower.pth", after)
    write(folder / "model.safetensors", after)
    asked = []
    monkeypatch.setattr(harness.tensors, "hf_hub_download", lambda *a: asked.append(a) or tmp_path / a[1])
    monkeypatch.setattr(harness.tensors, "snapshot_download", lambda *a, **k: asked.append((*a, k)) or tmp_path)
    for path in ("Some/model2.5b/tower.pth", "Some/model2.5b"):
        read = model.load_clip(f"miniature@hf-hub:OWNER/NAME/{path}").model.visual.state_dict()
        assert equal(read, after)
    assert asked == [
        ("OWNER/NAME", "Some/model2.5b/tower.pth"),
        ("OWNER/NAME", dict(allow_patterns="Some/model2.5b/*model*")),
    ]


def test_an_architecture_alone_takes_a_whole_clip(tmp_path, monkeypatch):
    config = json.loads((MINIATURE / "clip" / "open_clip_config.json").read_text())["model_cfg"]
    (tmp_path / "tiny-arch.json").write_text(json.dumps(config | dict(quick_gelu=True)))
    open_clip.add_model_config(tmp_path / "tiny-arch.json")
    after = shaken(model.load_clip("miniature")).model
    read = model.load_clip(f"tiny-arch@{write(tmp_path / 'whole.pth', after.state_dict())}")
    assert equal(read.model.state_dict(), after.state_dict())
    assert type(read.model.visual.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"
    with pytest.raises(UserError, match="tower.pth: holds the vision tower alone; for a text tower, name ARCH:TAG"):
        model.load_clip(f"tiny-arch@{write(tmp_path / 'tower.pth', after.visual.state_dict())}")
    random = model.load_clip("tiny-arch", random_weights=True)
    assert random.image_size == 64 and random.tokenizer_error.startswith("random weights have none")
    with pytest.raises(UserError, match="tiny-arch: no such CLIP; name a recipe .*ARCH:TAG"):
        model.load_clip("tiny-arch")
    with pytest.raises(UserError, match="CLIP no-arch could not be loaded: "):
        model.load_clip("no-arch", random_weights=True)


def test_names_with_an_at_sign(tmp_path, monkeypatch):
    home = tmp_path / "user@corp.example.com"
    for folder in (tmp_path / "me@home", home / "clip"):
        shutil.copytree(MINIATURE / "clip", folder)
    monkeypatch.chdir(tmp_path)
    assert split_weights("me@home") == ("me@home", None) and locate_clip("me@home") == ("local-dir:me@home", None)
    Path("L@224.pth").touch()
    assert split_weights("ViT-L-14:openai@L@224.pth") == ("ViT-L-14:openai", "L@224.pth")
    assert locate_clip("ViT-L-14:openai@L@224.pth") == ("ViT-L-14", "openai")
    assert locate_clip("ViT-L-14@L@224.pth") == ("ViT-L-14", None)
    (home / "w@1.pth").touch()
    for weights in (f"{home}/w@1.pth", "L@224.pth", "hf-hub:a/b/c.pth"):
        assert split_weights(f"{home}/clip@{weights}") == (f"{home}/clip", weights)
    with pytest.raises(UserError, match="^typo.pth: no such weights"):
        locate_clip(f"{home}/clip@typo.pth")
    assert recipe_of("openai-vit-l-14-224") and not recipe_of("openai-vit-l-14-224@L@224.pth")  # other scores


def test_weights_stand_wherever_a_clip_is_named(tmp_path, monkeypatch):
    after = shaken(model.load_clip("miniature")).model.state_dict()
    file = write(tmp_path / "after.pth", after)
    out = run(tmp_path / "run", f"--clip miniature@{file} --lr 0")
    assert equal(load_file(out / "clip" / SAVED), after)
    command = f"evaluate_mmvp.py miniature@{file} {out}/clip --mmvp {write_mmvp(tmp_path / 'mmvp')} --out {tmp_path}"
    monkeypatch.setattr(sys, "argv", command.split())
    evaluate_mmvp.main()
    pairs = [line.split(",", 1)[1] for line in (tmp_path / "pairs.csv").read_text().splitlines()[1:]]  # with cosines
    assert pairs and pairs[: len(pairs) // 2] == pairs[len(pairs) // 2 :]


SAVED = "open_clip_model.safetensors"


def test_a_folder_gives_every_weight_of_its_clip(clips, tmp_path):
    """Also the bias of a SigLIP, in whose place open_clip puts a zero."""
    folder = shutil.copytree(clips["siglip"], tmp_path / "clip")
    write(folder / SAVED, without(load_file(folder / SAVED), "logit_bias"))
    with pytest.raises(UserError, match=f"{folder}: does not fit: it has no logit_bias$"):
        model.load_clip(f"{folder}")


# ---------------------------------------------------------------------------------------------------------------------
# The diffusion model's files

PARTS = dict(unet="diffusion_pytorch_model", vae="diffusion_pytorch_model", text_encoder="model")  # as safetensors
PICKLED = PARTS | dict(text_encoder="pytorch_model")


def load_phi(folder: Path) -> model.Diffusion:
    return model.load_diffusion(f"{folder}", "red house", torch.float32, CPU)


def copied(folder: Path, part: str) -> tuple[Path, Path, dict]:
    """A copy of the miniature's diffusion model, a part's file and what it holds."""
    shutil.copytree(MINIATURE / "diffusion", folder)
    file = folder / part / f"{PARTS[part]}.safetensors"
    return folder, file, load_file(file)


@pytest.mark.parametrize("part", PARTS)
def test_every_weight_of_the_diffusion_model_comes_from_its_files(tmp_path, part):
    folder, file, state = copied(tmp_path / "phi", part)
    last = list(state)[-1]
    for wrong, message in (
        (without(state, last), f"has no {last}$"),
        (state | dict(extra=ROW, more=ROW + 1), "has extra .and 1 more such names., for which there is no place"),
        (state | {last: ROW}, f"has another shape of {last} than its config.json says"),
    ):
        write(file, wrong)
        with pytest.raises(UserError, match=f"diffusion model {folder} could not be loaded: its {part} {message}"):
            load_phi(folder)
    file.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match=f"{file}: is a pointer of git-lfs"):
        load_phi(folder)
    write(file, state).rename(file.with_stem("odd"))
    with pytest.raises(UserError, match=f"its {part}: .*no file named {file.name}.* Give that name .* odd.safetensors"):
        load_phi(folder)


def test_old_names_of_the_diffusion_models_weights_are_known(tmp_path):
    """Those of Stable Diffusion 1.x: attention in the VAE, numbers of positions in the text encoder."""
    folder, file, state = copied(tmp_path / "phi", "vae")
    renamed = {}
    for name, value in state.items():
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            name = name.replace(f".{new}.", f".{old}.")
        renamed[name] = value
    assert renamed.keys() != state.keys()
    write(file, renamed)
    file = folder / "text_encoder" / "model.safetensors"
    write(file, load_file(file) | {"text_model.embeddings.position_ids": torch.arange(24)[None]})
    old, new = load_phi(folder), load_phi(MINIATURE / "diffusion")
    assert equal(old.vae.state_dict(), new.vae.state_dict()) and torch.equal(old.text, new.text)


@pytest.mark.parametrize("suffix", [".fp16.safetensors", ".bin", ".fp16.bin"])
def test_a_diffusion_models_files_are_read_by_their_other_names(tmp_path, suffix):
    folder = shutil.copytree(MINIATURE / "diffusion", tmp_path / "phi")
    for part, stem in PARTS.items():
        file, name = folder / part / f"{stem}.safetensors", PICKLED[part] if "bin" in suffix else stem
        write(file.with_name(name + suffix), load_file(file))
        file.unlink()
    read, whole = load_phi(folder), load_phi(MINIATURE / "diffusion")
    assert all(equal(getattr(read, part).state_dict(), getattr(whole, part).state_dict()) for part in ("unet", "vae"))
    assert torch.equal(read.text, whole.text)


def test_quiet_inside_quiet_stays_quiet_and_ends():
    libraries = [diffusers.utils.logging, transformers.utils.logging]
    for library in libraries:
        library.enable_progress_bar()
    with quiet():
        with quiet():
            pass
        assert not logging.getLogger().isEnabledFor(logging.ERROR)
        assert not any(library.is_progress_bar_enabled() for library in libraries)
    assert logging.getLogger().isEnabledFor(logging.ERROR)
    assert all(library.is_progress_bar_enabled() for library in libraries)
