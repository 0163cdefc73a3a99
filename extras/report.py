"""Writes a run's report, one HTML page, and the model card of its CLIP.

    python extras/report.py runs/l14
    python extras/report.py runs/l14 --mmvp MMVP_VLM  # if the benchmark's images have moved

RUN/report.html is self-contained: scores, curves, images and the pairs that changed. The card, RUN/clip/README.md, is
written once the run is finished. Nothing is scored again: the figures are read from RUN/mmvp and, for the CLIPs that
--keep-every saved, from RUN/mmvp-steps.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness.errors import UserError, exit_on_user_error, one_line, usage_error, warn


def read_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Write a run's report.html, and the model card of its CLIP.")
    parser.error = usage_error
    parser.add_argument("run", type=Path, metavar="RUN", help="the output folder of train.py (--out)")
    parser.add_argument("--mmvp", metavar="PATH", help="the benchmark, if it has moved since the run")
    return parser.parse_args(argv)


if __name__ == "__main__":  # before the imports that take seconds, so that --help and a typo are answered at once
    with exit_on_user_error("report.py"):
        args = read_args()

import base64
import contextlib
import csv
import io
import json
import math
import re
import shlex

import jinja2  # required by torch
import numpy as np

from evaluate_mmvp import EMBEDDINGS
from harness.checkpoint import read_state
from harness.files import write_atomically
from harness.mmvp import read_mmvp
from harness.pictures import read_image
from harness.recipes import beyond_the_paper
from harness.scores import verdict

SHOWN = 100  # at most this many changed pairs: 2 to 3 MB
NAMES = ("type", "id1", "id2", "statement1", "statement2")  # of a pair
SUMMARY = (
    "{clip} was trained with {diffusion} on {data}: {taken:,} of {steps:,} steps of {batch_size} images, recipe "
    "{recipe}, recap {recap}, text joined by {join}, N = {states}, {optimizer} at {lr}, seed {seed}, {precision}; "
    "{versions}."
)
EXPLAINED = (
    "Percent of pairs right, before → after training, with cls: CLIP's class token, as encode_image returns it. With "
    "cls+local, which adds the mean of the patch tokens: {local}. {count:,} pairs of {mmvp}; chance is 25."
)
CARD = """---
library_name: open_clip
pipeline_tag: zero-shot-image-classification
---

<h1>{{ clip }}, after diffusion feedback</h1>
<p>{{ method }}</p>
<p>{{ summary }}</p>
<p>{{ headline }}. {{ explained }}</p>
<p>{{ verdict }}</p>
<table>
{% for row in table %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>

The vision tower was trained further, on images without captions: its features are the condition of a frozen diffusion
model, whose denoising loss is the training signal. `open_clip.create_model_and_transforms("local-dir:FOLDER")` loads
this CLIP. The license of the original CLIP's weights applies; this card grants none.
"""


def fill(template: str, values: dict) -> str:
    """Fills in a Jinja template. Text becomes HTML only here, and every value is escaped.

    Values are joined into one line: in the card, an empty line would end the HTML and resume Markdown.
    """
    options = dict(autoescape=True, undefined=jinja2.StrictUndefined)
    environment = jinja2.Environment(finalize=lambda value: " ".join(str(value).split()), **options)
    return environment.from_string(template).render(values)


@contextlib.contextmanager
def reading(path: Path):
    """Turns any error in the block into a UserError that names `path`."""
    try:
        yield
    except Exception as error:  # csv, json and numpy raise many kinds; entries of a wrong type raise others
        raise UserError(f"{path}: cannot be read ({type(error).__name__}: {one_line(error)})") from None


def describe(path: Path, taken: int) -> tuple[dict, dict]:
    """A run's settings, and the template's values about them after `taken` steps. Paths keep their last two parts."""
    with reading(path):
        args = json.loads(path.read_text(encoding="utf-8"))
        names = [args["clip"], args["diffusion"], args["mmvp"] or "", *args["data"][:3]]
        clip, diffusion, mmvp, *data = ["/".join(name.split("/")[-2:]) for name in names]
        data = ", ".join(data) + (" and more" if len(args["data"]) > 3 else "")
        versions = ", ".join(f"{name} {version}" for name, version in args["versions"].items())
        words = dict(clip=clip, diffusion=diffusion, mmvp=mmvp, data=data, taken=taken, versions=versions)
        summary, deviations = SUMMARY.format_map(args | words), beyond_the_paper(args)
        for old, new in zip(args["code"], args["code"][1:]):
            changed = ", ".join(name for name in new if name != "step" and new[name] != old.get(name))
            deviations.append(f"{changed} changed at step {new['step']}")
        if args["random_weights"]:
            summary += " It started from random weights, so it is not scored."
        if clip == "miniature/clip" and data != "miniature/images.tar":
            summary += (
                " The miniature's CLIP knows only its drawn scenes: do not expect a gain from training on other images."
            )
    deviations = f", except for: {'; '.join(deviations)}" if deviations else ""
    method = f"The run's options are DIVA's (arXiv 2407.20171){deviations}."
    return args, words | dict(summary=summary, method=method)


def figure(name: str, lines: list[np.ndarray], last: int) -> dict:
    """A plot of lines over the steps 0 to `last`. Each is (n, 2), step and value; the last is blue, the others gray."""
    values, drawn = np.concatenate(lines)[:, 1], []
    low, high = values.min(), values.max()
    if not np.isfinite(values).all():
        raise ValueError("a number is not finite")
    for line in lines:
        dots = [f"{x / (last or 1):.4f},{(high - y) / ((high - low) or 1):.4f}" for x, y in line]
        drawn.append(" ".join([*dots, dots[-1]]))  # the last point twice, to show a single one
    words = f"{name}: {line[0, 1]:.3g} → {line[-1, 1]:.3g}"
    return dict(words=words, lines=drawn, low=f"{low:.3g}", high=f"{high:.3g}", last=f"{last:,}")


def draw_training(path: Path) -> tuple[list[dict], int, int]:
    """The curves of the loss and the learning rate, the number of steps, and the number of unreadable images."""
    with reading(path):
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []  # the last may be cut off
        lines = json.loads("[" + ",\n".join(lines) + "]")  # all at once, so that an error names the line
        if not lines:
            raise ValueError("no step was taken yet")
        loss, lr = (np.array([[i + 0.5, float(line[key])] for i, line in enumerate(lines)]) for key in ("loss", "lr"))
        smooth = [np.array([part.mean(0) for part in np.array_split(loss, min(n, len(loss)))]) for n in (300, 20)]
        gray, blue = (math.ceil(len(loss) / len(line)) for line in smooth)
        name = f"Loss, averaged over {blue} steps (gray: {gray})" if blue > 1 else "Loss"
        some = np.unique([*np.linspace(0, len(lr) - 1, 300).astype(int), lr[:, 1].argmax()])
        figures = [figure(name, smooth, len(lines)), figure("Learning rate", [lr[some]], len(lines))]
        return figures, len(lines), int(lines[-1]["unreadable"])


def draw_scores(path: Path) -> list[dict]:
    """The scores of the CLIPs saved during a run, with their intervals, over the steps in their names."""
    with reading(path):
        clips, figures = json.loads(path.read_text(encoding="utf-8"))["clips"], []
        steps = [re.search("clip-([0-9]+)/?$", clip["clip"]) for clip in clips]
        if not all(steps[1:]):  # the first one may be the untouched CLIP
            raise ValueError("a CLIP's name has no step, as in clip-000100")
        steps = [int(step[1]) if step else 0 for step in steps]
        for e in EMBEDDINGS:
            lines = [np.array([[k, float(c[e]["low"])], [k, float(c[e]["high"])]]) for k, c in zip(steps, clips)]
            lines.append(np.array(sorted([k, float(c[e]["average"])] for k, c in zip(steps, clips))))
            figures.append(figure(f"Pairs right by {e}, %", lines, max(steps)))
        return figures


def read_scores(path: Path, mmvp: str) -> dict:
    """The template's values about the scores on the benchmark called `mmvp`: text, charts and the table."""
    with reading(path):
        content = json.loads(path.read_text(encoding="utf-8"))
        before, after = content["clips"]
        columns = [["Pairs right, %", *before[EMBEDDINGS[0]]["types"], "Average", "95% interval"]]
        charts, averages = [], []
        for change in after["change"]:
            e = change["embedding"]
            old, new = before[e]["types"], after[e]["types"]
            types = {name: new[name] - score for name, score in old.items()}
            rows = [("before", before[e], "{:.1f}"), ("after", after[e], "{:.1f}")]
            rows.append(("change", change | dict(types=types, average=change["points"]), "{:+.1f}"))
            for name, row, form in rows:
                figures = [form.format(value) for value in [*row["types"].values(), row["average"]]]
                ends = f"{form} … {form}".format(row["low"], row["high"])
                columns.append([f"{e} {name}", *figures, ends])
            charts.append((e, [(name, old[name], new[name], f"{types[name]:+.1f}") for name in old]))
            averages.append("{:.1f} → {:.1f} ({:+.1f})".format(*(row["average"] for _, row, _ in rows)))
        headline, local = averages
        return dict(
            headline=headline,
            explained=EXPLAINED.format(count=content["pairs"], mmvp=mmvp, local=local),
            verdict=" ".join(verdict(change, content["pairs"]) for change in after["change"]),
            charts=charts,
            table=list(zip(*columns)),
        )


def read_pairs(path: Path) -> list[dict]:
    """The pairs; `changes` of a pair lists (won or lost, embedding)."""
    with reading(path), open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, strict=True))
        pairs, half = [{name: row[name] for name in NAMES} for row in rows], len(rows) // 2
        if not pairs or pairs[:half] != pairs[half:]:
            raise ValueError("the pairs of the two CLIPs differ")
        for pair, old, new in zip(pairs, rows[:half], rows[half:]):
            changes = {e: int(new[f"{e} right"]) - int(old[f"{e} right"]) for e in EMBEDDINGS}
            pair["changes"] = [("won" if change > 0 else "lost", e) for e, change in changes.items() if change]
        return pairs[:half]


def picture(path: Path, side: int, kind: str) -> str:
    """An image, at most `side` pixels wide and high, as a URL that contains it."""
    image, file = read_image(path), io.BytesIO()
    image.thumbnail((side, side))
    image.save(file, kind, quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def show_changes(pairs: list[dict], mmvp: str) -> dict:
    """The template's values about the pairs won and lost: SHOWN of them, spread over types and outcomes.

    Adds their `images` if `mmvp` has them.
    """
    changed = [pair | dict(images=[]) for pair in pairs if pair["changes"]]
    kinds = [(pair["type"], pair["changes"][0]) for pair in changed]
    turns = [kinds[:k].count(kind) for k, kind in enumerate(kinds)]  # the first of each kind, then the second of each
    shown = [changed[k] for k in sorted(np.argsort(turns, kind="stable")[:SHOWN])]
    note = f"{len(changed):,} of {len(pairs):,} pairs changed; {len(shown)} are shown."
    try:
        images = {(p.type, *p.ids, *p.statements): p.images for p in read_mmvp(mmvp)}
        for pair in shown:
            paths = images.get(tuple(pair[name] for name in NAMES))
            if not paths:
                raise UserError(f"{mmvp}: not the benchmark that was scored")
            pair["images"] = [picture(path, 224, "jpeg") for path in paths]
    except (UserError, OSError) as error:
        warn(missing := f"No images: {one_line(error)}. Use --mmvp PATH if the benchmark has moved.")
        note += " " + missing
    return dict(shown=shown, note=note)


def report(folder: Path, mmvp: str | None = None) -> dict[Path, str]:
    """The page of the run in `folder` and, if the run is finished, the card. `mmvp`: the benchmark, if it has moved.

    Raises:
        UserError: there is no run, it has taken no step yet, or one of its files is broken.
    """
    if not (folder / "args.json").is_file():
        raise UserError(f"{folder}: no run in this folder (args.json is missing)")
    curves, taken, unreadable = draw_training(folder / "metrics.jsonl")
    args, words = describe(folder / "args.json", taken)
    if unreadable:
        words["summary"] += f" {unreadable:,} images could not be read."
    words |= dict(folder=folder, out=shlex.quote(str(folder)), curves=curves, headline="Not scored")
    words |= dict(explained="", verdict="", note="", drawn="", charts=[], table=[], shown=[], along=[])
    if (folder / "mmvp" / "scores.json").exists() and not args["random_weights"]:  # written last
        benchmark = words["mmvp"] or "an unknown benchmark"  # scored with evaluate_mmvp.py
        words |= read_scores(folder / "mmvp" / "scores.json", benchmark)
        words |= show_changes(read_pairs(folder / "mmvp" / "pairs.csv"), mmvp or args["mmvp"] or benchmark)
    if (folder / "mmvp-steps" / "scores.json").exists():
        words["along"] = draw_scores(folder / "mmvp-steps" / "scores.json")
    if (folder / "reconstruct.png").exists():
        words["drawn"] = picture(folder / "reconstruct.png", 2000, "png")
    page = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    files = {folder / "report.html": fill(page, words)}
    finished = (read_state(folder / "checkpoint.pt") or {}).get("step") == args["steps"]
    if finished and (folder / "clip").is_dir():
        files[folder / "clip" / "README.md"] = fill(CARD, words)
    return files


def main(args: argparse.Namespace) -> None:
    for path, content in report(args.run, args.mmvp).items():
        write_atomically(path, content)
        print(f"written: {path}")


if __name__ == "__main__":
    with exit_on_user_error("report.py"):
        main(args)
