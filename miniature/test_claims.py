"""claims.py and keeps.py: their figures are compared with figures computed in another way."""

import numpy as np
import pytest
import torch

from evaluate_mmvp import EMBEDDINGS, pairs_right, similarities
from harness.mmvp import read_mmvp
from harness.recipes import MINIATURE
from harness.scores import average, interval
from miniature import claims, gates, keeps, world
from model import load_clip


def test_the_mask_covers_the_thing():
    """The pictures of two colours differ exactly under the mask; `draw` has the same pixels."""
    for i, scene in enumerate(world.random_scenes(20, 46)):
        scene[1], other = 0, scene.copy()
        other[1] = 2
        (red, mask), (blue, again) = (world.draw_with_mask(s, np.random.default_rng(i)) for s in (scene, other))
        assert red.tobytes() == world.draw(scene, np.random.default_rng(i)).tobytes()
        assert mask.size == red.size and mask.tobytes() == again.tobytes()
        changed = np.abs(np.asarray(red).astype(int) - np.asarray(blue)).max(-1) > 0
        hat = (np.asarray(red)[..., 2] > 190) & (np.asarray(red)[..., 0] < 60)  # covers the thing
        assert changed.any() and (changed <= (np.asarray(mask) > 0)).all()
        assert (changed | hat)[np.asarray(mask) > 128].all()


@pytest.mark.parametrize("width", [5, 90])  # fewer columns than rows, and more
def test_ridge_is_least_squares_with_the_penalty_as_rows(width):
    rng = np.random.default_rng(0)
    labels = np.stack([rng.integers(0, 3, 80), rng.integers(0, 4, 80)], 1)
    x = rng.normal(size=(80, width)) + labels[:, :1]
    fitted = 50
    z = (x - x[:fitted].mean(0)) / x[:fitted].std(0, ddof=1) / width**0.5
    rows = np.concatenate([z[:fitted], 0.3**0.5 * np.eye(width)])
    expected = []
    for column in labels.T:
        targets = np.eye(column.max() + 1)[column[:fitted]]
        right = np.concatenate([targets - targets.mean(0), np.zeros((width, targets.shape[1]))])
        expected.append((z[fitted:] @ np.linalg.lstsq(rows, right, rcond=None)[0] + targets.mean(0)).argmax(1))
    found = gates.ridge(torch.from_numpy(x), labels[:fitted], penalty=0.3)
    assert (found == np.stack(expected, 1)).all()


def test_each_row_measures_what_its_name_says():
    """300 scenes, 200 of them for fitting, and 27 pairs."""
    clip, drawn, pairs = load_clip("miniature"), claims.draw_scenes(300, 48), read_mmvp(f"{MINIATURE}/mmvp")[::34]
    rows, (scenes, pictures, labels) = claims.measure(clip, drawn, pairs, 200), drawn
    assert list(rows) == list(claims.ROWS) and len(np.unique(scenes, axis=0)) == 300
    score = {name: claims.score(outcomes.sum(0)) for name, outcomes in rows.items()}
    types = [pair.type for pair in pairs]
    for embedding, right in zip(EMBEDDINGS, pairs_right(similarities(clip, pairs, "cpu"))):
        assert score[f"pair score, {embedding}"] == pytest.approx(average(right, types))

    images = torch.stack([clip.preprocess_image(picture) for picture in pictures])
    with torch.no_grad():
        out = clip.model.visual.forward_intermediates(images, indices=1, normalize_intermediates=True)
        local = (out["image_intermediates"][-1].flatten(2).transpose(1, 2) @ clip.model.visual.proj).numpy()
        cls = clip.model.encode_image(images)
        named = clip.tokenizer()([f"a photo of the {name}" for name in world.CLASSES])
        classes = clip.model.encode_text(named, normalize=True)
        full = clip.tokenizer()(["a photo of " + world.caption(scene, [True] * 10) for scene in scenes[200:]])
        captions = clip.model.encode_text(full, normalize=True)
    nearest = (cls @ classes.T).argmax(1).numpy()
    assert score["class accuracy"] == pytest.approx(100 * (nearest == scenes[:, 0]).mean())
    cosines = (torch.nn.functional.normalize(cls[200:], dim=-1) @ captions.T).numpy()
    own = cosines.diagonal()
    first = [own == cosines.max(0), own == cosines.max(1)]
    assert score["retrieval of full captions"] == pytest.approx(100 * np.mean(first))
    all_tokens = np.concatenate([cls.numpy(), local.reshape(300, -1)], 1)
    read_from = {"the mean patch token": local.mean(1), "all tokens": all_tokens, "the class token": cls.numpy()}
    for name, tokens in read_from.items():
        right = gates.ridge(torch.from_numpy(tokens), scenes[:200]) == scenes[200:]
        assert score[f"details from {name}"] == pytest.approx(100 * right[:, 2:].mean())

    confusion, flat = np.zeros((11, 11)), torch.from_numpy(local.reshape(-1, local.shape[-1]))
    read = gates.ridge(flat, labels[:200].reshape(-1, 1))[:, 0]
    np.add.at(confusion, (labels[200:].ravel(), read), 1)
    hit = confusion.diagonal()
    assert score["patches, mean IoU"] == pytest.approx(100 * (hit / (confusion.sum(0) + confusion.sum(1) - hit)).mean())
    assert 0.02 < (labels > 0).mean() < 0.5


def test_the_interval_is_a_bootstrap_over_scenes():
    rng = np.random.default_rng(0)
    before, after = (rng.random(400) < share for share in (0.5, 0.6))
    points, low, high = claims.change(claims.answers(before), claims.answers(after))
    expected = interval(after.astype(int) - before, ["all"] * 400)
    assert points == pytest.approx(100 * (after.mean() - before.mean()))
    assert (low, high) == pytest.approx(expected, abs=0.5)
    assert claims.change(claims.answers(before), claims.answers(before)) == (0, 0, 0)


@pytest.mark.parametrize(
    "kept, low, high, holds",
    [
        (False, 0.1, 3, "holds"), (False, -0.1, 0.9, "does not hold"), (False, -3, -1, "does not hold"),
        (False, -0.1, 1.1, "not shown"), (False, 0.1, 0.9, "holds, by less than a point"),
        (True, -0.9, 0.4, "holds"), (True, 1, 2, "holds"),
        (True, -1.5, -0.1, "does not hold"), (True, -1.5, 0.1, "not shown"),
    ],
)  # fmt: skip
def test_the_verdict_follows_the_interval(kept, low, high, holds):
    assert claims.verdict(kept, low, high) == holds


def test_keeps_counts_scene_by_scene():
    scenes, rng = world.random_scenes(50, 49), np.random.default_rng(0)
    reads = [np.where(rng.random(scenes.shape) < share, scenes, scenes + 1) for share in (1, 0.8, 0.3, 0.6)]
    lines = keeps.table(scenes, reads).splitlines()
    assert len({len(line) for line in lines}) == 1  # aligned
    rows = [[cell.strip(" *") for cell in line.split("|")[1:-1]] for line in lines[2:]]
    assert [row[0] for row in rows] == ["class", "colour", *world.DETAILS, "mean of the nine"]
    for k, row in enumerate(rows):
        part = slice(2, 11) if k == 11 else k
        shares = [f"{100 * (read == scenes)[:, part].mean():.1f}" for read in reads]
        another = np.mean([reads[3][i, part] == scenes[i - 1, part] for i in range(50)])
        assert [*row[1:5], row[6]] == [*shares, f"{100 * another:.1f}"]
