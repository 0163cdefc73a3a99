"""extras/zero_shot.py: the accuracy equals one computed by hand; the interval's ends solve Wilson's equation."""

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from extras import zero_shot
from harness.errors import UserError
from harness.scores import mcnemar
from miniature import world
from model import load_clip

TEMPLATES = ["a photo of the {}", "the near {} on white"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """Forty drawn images, by class; `tree` is called `fire_tree`."""
    out, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(45)
    for i, scene in enumerate(world.random_scenes(40, 45)):
        name = world.CLASSES[scene[0]].replace("tree", "fire_tree")
        (out / name).mkdir(exist_ok=True)
        world.draw(scene, rng).save(out / name / f"{i}.png")
    return str(out)


def test_accuracy_is_the_one_by_hand(folder, capsys):
    """Image by image, in float64; a class is the unit mean of the unit embeddings of its two sentences."""
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
    zero_shot.main(zero_shot.read_args(["miniature", "miniature", "--data", folder, "--templates", *TEMPLATES]))
    printed = capsys.readouterr().out
    assert 0.3 < np.mean(right) < 1 and printed.count(f"miniature: {100 * np.mean(right):.2f}%") == 2
    assert "40 images of 10 classes" in printed and "won 0, lost 0, exact McNemar p = 1" in printed

    found, paths, labels = zero_shot.read_folder(folder)
    assert found == [name.replace("_", " ") for name in names] and len(paths) == 40
    batches = list(zero_shot.read_pictures(clip, paths, 7))
    assert (zero_shot.classify(clip, batches, found, "cpu", TEMPLATES) == labels).tolist() == right
    clip.model.visual.proj.data[0, 0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        zero_shot.classify(clip, batches, found, "cpu", TEMPLATES)


@pytest.mark.parametrize("right, n", [(0, 20), (8, 10), (97, 100), (30, 30)])
def test_wilsons_ends_are_1_96_standard_errors_away(right, n):
    for end in zero_shot.wilson(np.arange(n) < right):
        p = end / 100
        assert 0 <= round(p, 12) <= 1 and (right / n - p) ** 2 == pytest.approx(1.96**2 * p * (1 - p) / n, abs=1e-12)


def test_the_change_is_the_bootstraps_over_images():
    before, after = (np.random.default_rng(k).random(500) < 0.1 * k for k in (7, 8))
    won, lost = int((after & ~before).sum()), int((before & ~after).sum())
    means = np.random.default_rng(1).choice(after.astype(int) - before, (10_000, 500)).mean(1)  # image by image
    text = zero_shot.change(before, after)
    assert f"{(won - lost) / 5:+.2f} points" in text and f"won {won}, lost {lost}" in text
    assert f"p = {mcnemar(won, lost):.2g}" in text
    low, high = (float(word.strip("()")) for word in text.split("interval")[1].split(",")[0].split(" … "))
    assert [low, high] == pytest.approx(np.percentile(100 * means, [2.5, 97.5]), abs=0.3) and low < high - 3


@pytest.mark.parametrize("form", ["n{:07}0", "{}"])
def test_imagenets_numbers_get_its_names(tmp_path, monkeypatch, form):
    """`10` follows `9`, as in ImageNet-V2. Numbers are refused unless all of ImageNet's are there: here 12."""
    monkeypatch.setattr(open_clip, "IMAGENET_CLASSNAMES", open_clip.IMAGENET_CLASSNAMES[:12])
    numbers = [form.format(i) for i in range(12)]
    for number in numbers:
        (tmp_path / number).mkdir()
        (tmp_path / number / "0.png").touch()
    names, paths, labels = zero_shot.read_folder(str(tmp_path))
    named = {Path(path).parent.name: names[label] for path, label in zip(paths, labels)}
    assert named == dict(zip(numbers, open_clip.IMAGENET_CLASSNAMES))
    (tmp_path / numbers[-1]).rename(tmp_path / "1000")  # a number too many, and one missing
    with pytest.raises(UserError, match="is a number, not a name"):
        zero_shot.read_folder(str(tmp_path))


def test_hidden_and_other_files_are_skipped(tmp_path, capsys):
    for name in ("cat", "dog", ".git", "dog/.ipynb_checkpoints"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").touch()
    (tmp_path / "dog" / "notes.txt").touch()
    (tmp_path / "0.png").touch()
    names, paths, labels = zero_shot.read_folder(str(tmp_path))
    assert (names, labels.tolist()) == (["cat", "dog"], [0, 1])
    assert paths == [f"{tmp_path}/cat/0.png", f"{tmp_path}/dog/0.png"]
    assert ".txt" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, sentence",
    [
        ("miniature --data nowhere", "no such folder"),
        ("miniature --data TMP/broken/cat", "has 0 subfolders, but needs one per class"),
        ("miniature --data TMP/empty", "empty/dog: no images"),
        ("miniature --data TMP/broken", "dog/0.jpg: not a readable image"),
        ("miniature --data TMP/twice", "2 subfolders name the class 'fire truck'"),
        ("miniature nothing --data nowhere", "nothing: no such CLIP"),
        ("miniature --data TMP/broken --templates photo", "must contain {} where the name goes"),
    ],
)
def test_what_cannot_be_measured_is_refused(tmp_path, options, sentence):
    for name in ("broken/cat", "broken/dog", "empty/cat", "empty/dog", "twice/fire truck", "twice/Fire_truck"):
        (tmp_path / name).mkdir(parents=True)
        if name != "empty/dog":
            Image.effect_noise((64, 64), 90).save(tmp_path / name / "0.jpg")
    cut = (tmp_path / "broken/dog/0.jpg").read_bytes()[:1500]
    (tmp_path / "broken/dog/0.jpg").write_bytes(cut)
    with pytest.raises(UserError, match=sentence):
        zero_shot.main(zero_shot.read_args(options.replace("TMP", str(tmp_path)).split()))
