"""extras/report.py: each figure is recomputed from the cosines; text is never read as HTML."""

import html.parser
import io
import json
import re
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from PIL import Image

from evaluate_mmvp import EMBEDDINGS, compare
from extras import report
from harness.errors import UserError, exit_on_user_error
from harness.mmvp import read_mmvp
from harness.recipes import RECIPES, TYPES
from harness.scores import interval, mcnemar, verdict


def write_mmvp(folder: Path, pairs: int = 2, types=("Color", "Text"), statement: str = "a cat") -> Path:
    """A benchmark; image number i has gray i."""
    lines = ["Question ID,Type,Statement"]
    for type_name in types:
        (folder / "MLLM_VLM Images" / type_name).mkdir(parents=True)
        for i in range(len(lines), len(lines) + 2 * pairs):
            Image.new("L", (30, 20), i % 256).save(folder / "MLLM_VLM Images" / type_name / f"{i}.jpg")
            lines.append(f"{i},{type_name},{statement}")
    (folder / "Questions.csv").write_text("\n".join(lines))
    return folder


def write_scores(folder: Path, names: list[str], mmvp: Path) -> np.ndarray:
    """Writes what evaluate_mmvp.py does; returns random cosines with ties, (CLIPs, embeddings, pairs, 2, 2)."""
    pairs = read_mmvp(str(mmvp))
    cosines = np.random.default_rng(0).random((len(names), 2, len(pairs), 2, 2), dtype=np.float32)
    cosines[:, :, 0, :, 0] = cosines[:, :, 0, :, 1]
    compare(names, list(cosines), pairs, folder)
    return cosines


def write_run(out: Path, mmvp: Path | None = None, steps: int = 3, recipe: str = "openai-vit-l-14-224", **more) -> Path:
    """The files of a finished run that the report reads."""
    args = asdict(RECIPES[recipe]) | dict(recipe=recipe, clip="a/folder/vit", data=["my/photos"], steps=steps)
    args |= dict(mmvp=mmvp and str(mmvp), precision="fp32", random_weights=False, versions=dict(torch="2.14.1"))
    args |= dict(code=[{"step": 0, "train.py": "aa"}]) | more
    state = dict(step=steps, unreadable=0, images="5", settings={}, code=[{}])
    losses = np.random.default_rng(0).random(steps)
    lines = [json.dumps(dict(step=i, loss=loss, lr=0.1, unreadable=i)) + "\n" for i, loss in enumerate(losses)]
    (out / "clip").mkdir(parents=True)
    (out / "args.json").write_text(json.dumps(args))
    torch.save(state, out / "checkpoint.pt")
    (out / "metrics.jsonl").write_text("".join(lines))
    if mmvp:
        write_scores(out / "mmvp", ["before", "after"], mmvp)
    return out


class Page(html.parser.HTMLParser):
    """A page as a browser parses it; it may not run or load anything. `elements` are (tag, attributes, text)."""

    def __init__(self, content: str):
        super().__init__()
        self.elements = [("", {}, "")]
        self.feed(content)
        self.text = " ".join(" ".join(text for _, _, text in self.elements).split())
        self.images = [Image.open(io.BytesIO(urlopen(src).read())) for src in self.all("img", "src")]
        dots = [points.split()[:-1] for points in self.all("polyline", "points")]
        self.lines = [np.array([dot.split(",") for dot in line], float) for line in dots]  # each (n, 2)

    def handle_starttag(self, tag, attributes):
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "form", "a")
        for name, value in attributes:
            assert not name.startswith("on") and name not in ("href", "style", "srcset")
            assert name != "src" or value.startswith("data:image/")
        self.elements.append((tag, dict(attributes), ""))

    def handle_data(self, data):
        tag, attributes, text = self.elements[-1]
        self.elements[-1] = tag, attributes, text + data

    def all(self, tag: str, attribute: str | None = None) -> list[str]:
        """The text of all elements `tag`, or one of their attributes."""
        return [values[attribute] if attribute else text.strip() for name, values, text in self.elements if name == tag]


def read_report(out: Path, mmvp: Path | None = None) -> tuple[Page, str | None]:
    """The page and the card."""
    files = report.report(out, mmvp and str(mmvp))
    return Page(files[out / "report.html"]), files.get(out / "clip" / "README.md")


def test_the_page_says_what_the_cosines_say(tmp_path):
    """Each figure is recomputed; exactly the changed pairs are shown, with their images."""
    out = write_run(tmp_path / "run", write_mmvp(tmp_path / "mmvp", 3, TYPES))
    cosines = write_scores(out / "mmvp", ["before", "after"], tmp_path / "mmvp")  # once more, for the cosines
    right = (cosines[..., 0, 0] > cosines[..., 0, 1]) & (cosines[..., 1, 1] >= cosines[..., 1, 0])  # (CLIPs, e, pairs)
    page, card = read_report(out)
    table = np.reshape(page.all("td"), (12, 7)).tolist()
    by_type = 100 * right.reshape(2, 2, 9, 3).mean(3)  # (CLIPs, e, types)
    figures = np.concatenate([by_type, by_type.mean(2, keepdims=True)], 2)
    for name, row, (old, new) in zip([*TYPES, "Average"], table[1:], np.moveaxis(figures, 2, 0)):
        assert row == [name, *(cell for b, a in zip(old, new) for cell in (f"{b:.1f}", f"{a:.1f}", f"{a - b:+.1f}"))]
    changes = json.loads((out / "mmvp" / "scores.json").read_text())["clips"][1]["change"]
    assert table[-1][3::3] == ["{low:+.1f} … {high:+.1f}".format(**change) for change in changes]
    gain, local = (f"{b:.1f} → {a:.1f} ({a - b:+.1f})" for b, a in figures[:, :, -1].T)
    words = " ".join(verdict(change, 27) for change in changes)
    assert page.all("h1") == [gain] and f"{local}. 27 pairs of" in page.text and "chance is 25" in page.text
    assert all(text in card and text in page.text for text in (gain, local, words))
    assert all(f"<td>{cell}</td>" in card for row in table for cell in row)
    x = np.array([float(x) for x in page.all("circle", "cx")]).reshape(2, 9, 2)  # (e, types, CLIPs), 2.2 a percent
    assert (x - 155) / 2.2 == pytest.approx(by_type.transpose(1, 2, 0), abs=0.05)
    changed = np.reshape(page.all("text"), (2, 23))[:, 6::2]  # after five marks of the axis: types, changes
    assert changed.tolist() == [[f"{change:+.1f}" for change in row] for row in by_type[1] - by_type[0]]
    for change, old, new in zip(changes, *right):  # in scores.json
        won, lost = int((new > old).sum()), int((old > new).sum())
        assert (change["low"], change["high"]) == interval(new.astype(int) - old, [t for t in TYPES for _ in range(3)])
        assert (change["won"], change["lost"], change["p"]) == (won, lost, mcnemar(won, lost))

    pairs, embeddings = np.nonzero((right[0] != right[1]).T)
    told = [f"{'won' if right[1, e, i] else 'lost'} in {EMBEDDINGS[e]}" for i, e in zip(pairs, embeddings)]
    ids = [2 * i + k for i in dict.fromkeys(pairs.tolist()) for k in (1, 2)]
    assert page.all("b") == told and ", ".join(page.all("small")) == ", ".join(map(str, ids)) and len(told) > 5
    assert f"{len(ids) // 2} of 27 pairs changed; {len(ids) // 2} are shown." in page.text
    assert [np.mean(image) for image in page.images] == pytest.approx(ids, abs=1)


def test_of_many_pairs_all_types_and_outcomes_are_shown(tmp_path):
    page, _ = read_report(write_run(tmp_path / "run", write_mmvp(tmp_path / "mmvp", 200)))
    assert re.search("[0-9]+ of 400 pairs changed; 100 are shown", page.text)
    follows = [(tag, text.strip()) for tag, _, text in page.elements if tag in ("h3", "b")]
    kinds = Counter((a, b) for (_, a), (tag, b) in zip(follows, follows[1:]) if a in ("Color", "Text") and tag == "b")
    assert len(kinds) == 8 and set(kinds.values()) == {12, 13}  # 2 types, won or lost, in cls or in cls+local alone


def test_the_page_tells_what_is_not_the_papers(tmp_path):
    """A run with random weights has no scores, and an unfinished one has no card."""
    code, mmvp = {"step": 0, "train.py": "aa", "data.py": "bb"}, write_mmvp(tmp_path / "mmvp")
    for words, out in (
        ("The run's options are DIVA's (arXiv 2407.20171).", write_run(tmp_path / "paper")),
        ("--freeze-projection; --ldifs 0.02", write_run(tmp_path / "miniature", recipe="miniature")),
        (
            "except for: train.py changed at step 2.",
            write_run(tmp_path / "code", code=[code, code | {"step": 2, "train.py": "cc"}]),
        ),
        ("knows only its drawn scenes", write_run(tmp_path / "photos", clip="x/miniature/clip")),
        ("started from random weights", write_run(tmp_path / "random", mmvp, random_weights=True)),
    ):
        page, card = read_report(out)
        for text in (page.text, Page(card).text):
            assert words in text and text.count("DIVA") == 1 and "a/folder" not in text
            assert ("drawn scenes" in text) == (out.name == "photos")
            assert "3 of 3 steps" in text and "2 images could not be read" in text and "chance is" not in text
        assert page.all("h1") == ["Not scored"] and not page.all("td") + page.all("article") + page.all("circle")
    text = (out / "metrics.jsonl").read_text()
    (out / "metrics.jsonl").write_text(text[:-20])  # the run still writes it
    torch.save(torch.load(out / "checkpoint.pt") | dict(step=2), out / "checkpoint.pt")
    page, card = read_report(out)
    assert "2 of 3 steps" in page.text and card is None


@pytest.mark.parametrize(
    "steps, count, words",
    [
        (30_000, 300, "Loss, averaged over 1500 steps (gray: 100):"),
        (301, 300, "Loss, averaged over 16 steps (gray: 2):"),
        (40, 40, "Loss, averaged over 2 steps (gray: 1):"),
        (1, 1, "Loss:"),
    ],
)
def test_the_loss_is_averaged_and_the_rate_is_not(tmp_path, steps, count, words):
    out, rates = write_run(tmp_path / "run", steps=steps), 1e-3 * np.random.default_rng(1).random(steps)
    lines = (out / "metrics.jsonl").read_text().splitlines()
    lines = [json.loads(line) | dict(lr=lr) for line, lr in zip(lines, rates)]
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page, _ = read_report(out)
    fine, coarse, rate = page.lines
    losses = np.array_split(np.array([line["loss"] for line in lines]), count)
    means, middles = np.array([part.mean() for part in losses]), (np.arange(count) + 0.5) / count
    expected = np.stack([middles, (means.max() - means) / (np.ptp(means) or 1)], 1)
    assert fine == pytest.approx(expected, abs=0.004) and len(coarse) == min(20, steps)
    loss, lr = page.all("figcaption")
    assert loss.startswith(words) and lr == f"Learning rate: {rates[0]:.3g} → {rates[-1]:.3g}"
    assert f"{means.max():.3g}" in page.text and f"{rates.max():.3g}" in page.text and f"step {steps:,}" in page.text
    if steps < 1000:  # else the drawn places are too coarse to tell the step
        drawn = rates.max() - rate[:, 1] * np.ptp(rates)
        assert drawn == pytest.approx(rates[(rate[:, 0] * steps).astype(int)], abs=1e-6)


def test_scores_along_a_run_are_drawn_over_its_steps(tmp_path):
    out, mmvp = write_run(tmp_path / "run"), write_mmvp(tmp_path / "mmvp")
    write_scores(out / "mmvp-steps", ["vit", "x/clip-000200/", "x/clip-000100"], mmvp)
    Image.new("RGB", (40, 20), (255, 0, 0)).save(out / "reconstruct.png")
    page, _ = read_report(out)
    assert page.images[0].getpixel((9, 9)) == (255, 0, 0) and "inflates its score" in page.text
    clips, lines = json.loads((out / "mmvp-steps" / "scores.json").read_text())["clips"], page.lines[3:]
    for e, drawn in (("cls", lines[:4]), ("cls+local", lines[4:])):
        figures = np.array([[clip[e][key] for key in ("low", "high", "average")] for clip in clips])
        y = (figures.max() - figures) / np.ptp(figures)
        intervals = [[(x, y[k, 0]), (x, y[k, 1])] for k, x in enumerate((0, 1, 0.5))]
        expected = [*intervals, [(0, y[0, 2]), (0.5, y[2, 2]), (1, y[1, 2])]]
        assert np.concatenate(drawn) == pytest.approx(np.concatenate(expected), abs=1e-3)
    write_scores(out / "mmvp-steps", ["vit", "x/clip"], mmvp)
    with pytest.raises(UserError, match="mmvp-steps/scores.json: .* name has no step"):
        read_report(out)


def test_hostile_text_stays_text(tmp_path):
    script, image, markdown = "<script>e()</script>", 'x"><img src=x onerror=e>', "`c` [d](javascript:e) *f*\n\n# {{i}}"
    mmvp = write_mmvp(tmp_path / "mmvp", 3, statement=image)
    args = dict(clip=script, diffusion=image, data=[script, markdown + "\udc80"], recap=markdown, join=image)
    args |= dict(versions={script: image}, code=[{"step": 0}, {"step": image, script: markdown}], page=script)
    out = write_run(tmp_path / "run", mmvp, **args)
    for name, quoted in (("pairs.csv", f'"{markdown}"'), ("scores.json", json.dumps(markdown)[1:-1])):
        text = (out / "mmvp" / name).read_text().replace("Color", script).replace("Text", quoted)
        (out / "mmvp" / name).write_text(text)
    page, card = read_report(out)  # checks every element and attribute
    seen = (script, image, "`c` [d](javascript:e) *f* # {{i}}")
    assert all(text in page.text and text in Page(card).text for text in seen) and not page.images
    assert {tag for tag, _, _ in Page(card).elements} == {"", "h1", "p", "table", "tr", "td"}
    for line in card.splitlines():  # Markdown does not interpret a block of HTML
        assert line.startswith("<") or not re.search("script|img|# ", line)


def test_a_missing_or_different_benchmark_is_reported(tmp_path, capsys):
    mmvp, other = write_mmvp(tmp_path / "mmvp"), write_mmvp(tmp_path / "other", statement="a dog")
    out = write_run(tmp_path / "run", mmvp)
    mmvp.rename(tmp_path / "moved")
    for where, why in ((None, f"{mmvp}: no such folder"), (other, "not the benchmark that was scored")):
        page, _ = read_report(out, where)
        assert re.search(f"No images: .*{why}.*Use --mmvp PATH", page.text) and not page.images
        assert why in capsys.readouterr().err
    page, _ = read_report(out, tmp_path / "moved")
    assert len(page.images) == 2 * len(page.all("article")) > 0 and "No images" not in page.text


@pytest.mark.parametrize(
    "name, old, new, message",
    [
        ("args.json", '"clip"', '"klip"', "args.json: cannot be read .KeyError: 'clip'"),
        ("metrics.jsonl", "(?s).*", "", "metrics.jsonl: .*no step was taken yet"),
        ("metrics.jsonl", '"step": 1, "loss"', '"step": 1, loss', "metrics.jsonl: .*: line 2 col"),
        ("metrics.jsonl", '"lr": 0.1', '"lr": NaN', "metrics.jsonl: .*a number is not finite"),
        ("mmvp/pairs.csv", "before,Color", "before,Colour", "pairs.csv: .*the pairs of the two CLIPs differ"),
    ],
)
def test_broken_files_are_refused(tmp_path, capsys, name, old, new, message):
    """One sentence, exit code 2, and an earlier report is kept."""
    out = write_run(tmp_path / "run", write_mmvp(tmp_path / "mmvp"))
    (out / "report.html").write_text("the last one")
    (out / name).write_text(re.sub(old, new, (out / name).read_text(errors="replace")))
    with pytest.raises(SystemExit) as stop, exit_on_user_error("report.py"):
        report.main(report.read_args([str(out)]))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and re.search(message, error)
    assert (out / "report.html").read_text() == "the last one" and not (out / "clip" / "README.md").exists()
    with pytest.raises(UserError, match="no run in this folder .args.json is missing"):
        report.main(report.read_args([str(tmp_path)]))


@pytest.mark.parametrize(
    "name", ["args.json", "metrics.jsonl", "mmvp/scores.json", "mmvp/pairs.csv", "mmvp-steps/scores.json"]
)
def test_no_broken_file_crashes_the_report(tmp_path, name):
    """Truncated or altered files lead to a page or to one sentence."""
    out, rng, refused = write_run(tmp_path / "run", write_mmvp(tmp_path / "mmvp")), np.random.default_rng(0), 0
    write_scores(out / "mmvp-steps", ["vit", "clip-1"], tmp_path / "mmvp")
    good, odd = (out / name).read_bytes(), [b'"', b",", b"\n", b"\0", b"-", b"9" * 5000, b"{", b"[", b"\xe9"]
    for i in range(60):
        at, skipped = rng.integers(len(good)), rng.integers(3)
        (out / name).write_bytes(good[:at] + (odd[i % 9] + good[at + skipped :] if i % 4 else b""))
        try:
            read_report(out)
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 5
