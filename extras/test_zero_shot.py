"""extras/zero_shot.py: the accuracy is the one computed by hand, the interval's ends solve Wilson's equation."""

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from extras import zero_shot
from harness.errors import UserError
from harness.scores import interval, mcnemar
from miniature import world
from model import load_clip

TEMPLATES = ["a photo of the {}", "the near {} on white"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """Forty drawn pictures, by class; `fire_tree` in the place of `tree`."""
    out, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(45)
    for i, scene in enumerate(world.random_scenes(40, 45)):
        name = world.CLASSES[scene[0]].replace("tree", "fire_tree")
        (out / name).mkdir(exist_ok=True)
        world.draw(scene, rng).save(out / name / f"{i}.png")
    return str(out)


def test_accuracy_is_the_one_by_hand(folder, capsys):
    """Picture by picture, in float64, with a class as the unit mean of the unit embeddings of its two sentences."""
    clip, names, rows, right = load_clip("miniature"), sorted(p.name for p in Path(folder).iterdir()), [], []
    mean, std = (np.array(clip.model.visual.preprocess_cfg[k])[:, None, None] for k in ("mean", "std"))
    with torch.no_grad():
        for name in names:
            texts = [text.replace("{}", name.replace("_", " ")) for text in TEMPLATES]
            embeddings = clip.model.encode_text(clip.tokenizer()(texts)).double().numpy()
            row = (embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)).mean(0)
            rows.append(row / np.linalg.norm(row))
        for k, name in enumerate(names):
            for path in sorted((Path(folder) / name).iterdir()):
                pixels = (np.asarray(Image.open(path)).transpose(2, 0, 1) / 255 - mean) / std
                embedding = clip.model.encode_image(torch.from_numpy(pixels[None]).float()).double().numpy()[0]
                right.append(int(np.argmax(np.array(rows) @ embedding)) == k)
    zero_shot.main(["miniature", "miniature", "--data", folder, "--templates", *TEMPLATES])
    printed = capsys.readouterr().out
    assert 0.3 < np.mean(right) < 1 and printed.count(f"miniature: {100 * np.mean(right):.2f}%") == 2
    assert "40 pictures of 10 classes" in printed and "won 0, lost 0, exact McNemar p = 1" in printed

    found, paths, labels = zero_shot.read_folder(folder)
    assert found == [name.replace("_", " ") for name in names] and len(paths) == 40
    batches = list(zero_shot.read_pictures(clip, paths, 7))
    assert (zero_shot.classify(clip, batches, found, "cpu", TEMPLATES) == labels).tolist() == right
    eighty = open_clip.OPENAI_IMAGENET_TEMPLATES  # without templates
    weights = open_clip.build_zero_shot_classifier(clip.model, clip.tokenizer(), found, eighty)
    with torch.no_grad():
        nearest = (clip.model.encode_image(torch.cat(batches), normalize=True) @ weights).argmax(1).numpy()
    assert (zero_shot.classify(clip, batches, found, "cpu") == nearest).all()

    clip.model.visual.proj.data[0, 0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        zero_shot.classify(clip, batches, found, "cpu", TEMPLATES)


@pytest.mark.parametrize("right, n", [(0, 20), (8, 10), (97, 100), (30, 30)])
def test_wilsons_ends_are_1_96_standard_errors_away(right, n):
    for end in zero_shot.wilson(np.arange(n) < right):
        p = end / 100
        assert 0 <= round(p, 12) <= 1 and (right / n - p) ** 2 == pytest.approx(1.96**2 * p * (1 - p) / n, abs=1e-12)


def test_the_change_is_the_bootstraps_over_pictures():
    before, after = (np.random.default_rng(k).random(500) < 0.1 * k for k in (7, 8))
    low, high = interval(after.astype(int) - before, ["all"] * 500)  # which draws every picture
    words = zero_shot.change(before, after)
    won, lost = int((after & ~before).sum()), int((before & ~after).sum())
    assert f"{(won - lost) / 5:+.2f} points" in words and f"won {won}, lost {lost}" in words
    assert f"p = {mcnemar(won, lost):.2g}" in words
    ends = [float(word.strip("()")) for word in words.split("interval")[1].split(",")[0].split(" … ")]
    assert ends == pytest.approx([low, high], abs=0.3) and low < ends[1] - 3


def test_imagenets_numbers_are_read_by_their_names(tmp_path, monkeypatch):
    monkeypatch.setattr(open_clip, "IMAGENET_CLASSNAMES", ["tench", "goldfish", "great white shark"])
    for number in ("n01484850", "n01440764", "n01443537"):
        (tmp_path / number).mkdir()
        (tmp_path / number / "0.png").touch()
    names, paths, labels = zero_shot.read_folder(str(tmp_path))
    assert names == open_clip.IMAGENET_CLASSNAMES and labels.tolist() == [0, 1, 2] and "n01484850" in paths[2]
    (tmp_path / "n01443537").rename(tmp_path / "goldfish")
    with pytest.raises(UserError, match="n01440764 is no name"):
        zero_shot.read_folder(str(tmp_path))


@pytest.mark.parametrize(
    "options, sentence",
    [
        ("miniature --data nowhere", "no such folder"),
        ("miniature --data TMP/broken/cat", "needs a subfolder for each class, and has 0"),
        ("miniature --data TMP/empty", "dog: no images"),
        ("miniature --data TMP/broken", "dog/0.jpg: not a readable image"),
        ("miniature nothing --data nowhere", "nothing: no such CLIP"),
        ("miniature --data TMP/broken --templates photo", "needs {} where the name goes"),
    ],
)
def test_what_cannot_be_measured_is_refused(tmp_path, options, sentence):
    for name in ("broken/cat", "broken/dog", "empty/cat", "empty/dog"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("broken/cat", "broken/dog", "empty/cat"):
        Image.effect_noise((64, 64), 90).save(tmp_path / name / "0.jpg")
    cut = (tmp_path / "broken/dog/0.jpg").read_bytes()[:1500]
    (tmp_path / "broken/dog/0.jpg").write_bytes(cut)
    with pytest.raises(UserError, match=sentence):
        zero_shot.main(options.replace("TMP", str(tmp_path)).split())
