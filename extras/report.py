"""A run as a page to read, and as a model card: the verdict in words, the scores, the curves, the pictures.

    python extras/report.py runs/l14
    python extras/report.py runs/l14 --mmvp MMVP_VLM  # where the benchmark's images are, if they have moved

Writes RUN/report.html, one file that needs no other, and, once the run is finished, the card RUN/clip/README.md.
Nothing is scored again: the figures are those of RUN/mmvp and, for CLIPs kept along the run, of RUN/mmvp-steps.
"""

import argparse
import base64
import contextlib
import csv
import io
import json
import re
import shlex
import sys
from html import escape
from pathlib import Path
from string import Template

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
from evaluate_mmvp import EMBEDDINGS
from harness.checkpoint import read_state
from harness.errors import UserError, exit_on_user_error, one_line, usage_error, warn
from harness.files import write_atomically
from harness.mmvp import read_mmvp
from harness.recipes import beyond_the_paper
from harness.scores import verdict

SHOWN = 100  # of the pairs that changed, at most: 2 to 3 MB
NAMES = ("type", "id1", "id2", "statement1", "statement2")  # of a pair
OUTCOMES = {("0", "0"): "", ("0", "1"): "won", ("1", "0"): "lost", ("1", "1"): ""}  # of right before and after
SUMMARY = (
    "{clip} learnt from {diffusion}, on {data}: {taken:,} of {steps:,} steps of {batch_size} images, recipe {recipe}, "
    "recap {recap}, text by {join}, N = {states}, {optimizer} at {lr}, seed {seed}, {precision}; {versions}."
)
CARD = """---
library_name: open_clip
pipeline_tag: zero-shot-image-classification
---

<h1>$clip, after diffusion feedback</h1>
<p>$method</p>
<p>$summary</p>
<p>$verdict</p>
<table>$table</table>

The vision tower was trained further, on images without captions: its features are the condition of a frozen diffusion
model, whose loss is the feedback. `open_clip.create_model_and_transforms("local-dir:FOLDER")` loads this CLIP.
The weights keep the licence of the CLIP that they come from; this card claims none.
"""


class Html(str):
    """Text that is HTML already."""


def fill(template: str, **values) -> Html:
    """`template` with its $values: the one place where text becomes HTML, and where it is escaped, as one line.

    Html stays as it is; of a list, so do its elements. In a card, Markdown leaves what is inside of HTML alone.
    """

    def safe(value) -> str:
        if isinstance(value, list):
            return "".join(map(safe, value))
        return value if isinstance(value, Html) else escape(" ".join(str(value).split()))

    return Html(Template(template).substitute({name: safe(value) for name, value in values.items()}))


@contextlib.contextmanager
def reading(path: Path):
    """UserError, with `path`, for whatever goes wrong with what is found there."""
    try:
        yield
    except Exception as error:  # csv, json, numpy, Pillow and what is looked for in vain each raise their own
        raise UserError(f"{path}: cannot be read ({type(error).__name__}: {one_line(error)})") from None


def describe(path: Path, taken: int) -> tuple[dict, dict]:
    """A run's settings, and what a page and a card say of it after `taken` steps; of paths their last two parts."""
    with reading(path):
        args = json.loads(path.read_text(encoding="utf-8"))
        names = [args["clip"], args["diffusion"], args["mmvp"] or "", *args["data"][:3]]
        clip, diffusion, mmvp, *data = ("/".join(name.split("/")[-2:]) for name in names)
        words = dict(clip=clip, diffusion=diffusion, mmvp=mmvp, taken=taken, data=", ".join(data))
        words["data"] += " and more" if len(args["data"]) > 3 else ""
        words["versions"] = ", ".join(f"{name} {version}" for name, version in args["versions"].items())
        words["summary"], deviations = SUMMARY.format_map(args | words), beyond_the_paper(args)
        for old, new in zip(args["code"], args["code"][1:]):
            changed = ", ".join(name for name in new if name != "step" and new[name] != old.get(name))
            deviations.append(f"from step {new['step']} on with another {changed}")
        if args["random_weights"]:
            words["summary"] += " Its weights were random at the start, so there is nothing to score."
    words["method"] = "By its settings, the method is DIVA's (arXiv 2407.20171)"
    words["method"] += f", but for: {'; '.join(deviations)}." if deviations else "."
    return args, words


def figure(name: str, lines: list[np.ndarray], last: int) -> Html:
    """Lines over the steps 0 to `last`, in one frame; each is (n, 2), step and number; the last one is in colour."""
    values, drawn = np.concatenate(lines)[:, 1], []
    low, high = values.min(), values.max()
    if not np.isfinite(values).all():
        raise ValueError("a number is not finite")
    for line in lines:
        dots = [f"{x / (last or 1):.4f},{(high - y) / ((high - low) or 1):.4f}" for x, y in line]
        drawn.append(fill('<polyline points="$dots"/>', dots=" ".join([*dots, dots[-1]])))  # one alone shows too
    words = f"{name}: {line[0, 1]:.3g} → {line[-1, 1]:.3g}"
    template = """<figure><figcaption>$words</figcaption><p>$high</p>
<svg viewBox="0 0 1 1" preserveAspectRatio="none" role="img" aria-label="$words">$drawn</svg>
<p><span>$low</span><span>step $last</span></p></figure>"""
    return fill(template, words=words, drawn=drawn, low=f"{low:.3g}", high=f"{high:.3g}", last=f"{last:,}")


def draw_training(path: Path) -> tuple[list[Html], int, int]:
    """The loss and the learning rate; how many steps were taken, and how many images could not be read."""
    with reading(path):
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []  # the last may be cut off
        lines, figures = json.loads("[" + ",\n".join(lines) + "]"), []  # at once, so that an error names the line
        if not lines:
            raise ValueError("no step was taken yet")
        for key, name in (("loss", "Loss"), ("lr", "Learning rate")):
            values = np.array([[i + 0.5, float(line[key])] for i, line in enumerate(lines)])
            parts = [np.array_split(values, min(count, len(lines))) for count in (300, 20)]  # what is drawn are means
            figures.append(figure(name, [np.array([part.mean(0) for part in some]) for some in parts], len(lines)))
        return figures, len(lines), int(lines[-1]["unreadable"])


def draw_scores(path: Path) -> list[Html]:
    """The scores of CLIPs kept along a run, with their intervals, over the steps in their names."""
    with reading(path):
        clips, figures = json.loads(path.read_text(encoding="utf-8"))["clips"], []
        steps = [re.search("clip-([0-9]+)/?$", clip["clip"]) for clip in clips]
        if not all(steps[1:]):  # the first one may be the untouched CLIP
            raise ValueError("a CLIP's name tells no step, as clip-000100 does")
        steps = [int(step[1]) if step else 0 for step in steps]
        for e in EMBEDDINGS:
            lines = [np.array([[k, float(c[e]["low"])], [k, float(c[e]["high"])]]) for k, c in zip(steps, clips)]
            lines.append(np.array(sorted([k, float(c[e]["average"])] for k, c in zip(steps, clips))))
            figures.append(figure(f"Pairs right by {e}, %", lines, max(steps)))
    note = "Grey: 95% intervals. The best of several is chosen with the benchmark in hand: score it on other pairs."
    return [*figures, fill("<p>$note</p>", note=note)]


def read_scores(path: Path) -> tuple[str, str, list[Html]]:
    """The verdict, on how many pairs, and a table: for each embedding the scores by type before, after, the change."""
    with reading(path):
        content = json.loads(path.read_text(encoding="utf-8"))
        before, after = content["clips"]
        columns = [["Pairs right, %", *before[EMBEDDINGS[0]]["types"], "Average", "95% interval"]]
        for change in after["change"]:
            e = change["embedding"]
            types = {name: after[e]["types"][name] - score for name, score in before[e]["types"].items()}
            rows = [("before", before[e], "{:.1f}"), ("after", after[e], "{:.1f}")]
            rows.append(("change", change | dict(types=types, average=change["points"]), "{:+.1f}"))
            for name, row, form in rows:
                figures = [form.format(value) for value in [*row["types"].values(), row["average"]]]
                ends = f"{form} … {form}".format(row["low"], row["high"])
                columns.append([f"{e} {name}", *figures, ends])
        rows = [[fill("<td>$cell</td>", cell=cell) for cell in row] for row in zip(*columns)]
        table = [fill("<tr>$row</tr>\n", row=row) for row in rows]
        verdicts = [verdict(change, content["pairs"]) for change in after["change"]]
        return " ".join(verdicts), f"{content['pairs']:,}", table


def read_pairs(path: Path) -> list[dict]:
    """The pairs, with what changed in each: `changes` are (won or lost, embedding)."""
    with reading(path), open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, strict=True))
        pairs, half = [{name: row[name] for name in NAMES} for row in rows], len(rows) // 2
        if not pairs or pairs[:half] != pairs[half:]:
            raise ValueError("the pairs of the two CLIPs differ")
        for pair, old, new in zip(pairs, rows[:half], rows[half:]):
            outcomes = [(OUTCOMES[old[f"{e} right"], new[f"{e} right"]], e) for e in EMBEDDINGS]
            pair["changes"] = [(how, e) for how, e in outcomes if how]
        return pairs[:half]


def picture(path: Path, side: int, kind: str) -> Html:
    """An image, at most `side` pixels wide and high, as part of the page."""
    with reading(path), Image.open(path) as image:
        image.thumbnail((side, side))
        image.convert("RGB").save(file := io.BytesIO(), kind, quality=85)
    content = base64.b64encode(file.getvalue()).decode()
    return fill('<img alt="" src="data:image/$kind;base64,$content">', kind=kind, content=content)


def show_changes(pairs: list[dict], mmvp: str) -> Html:
    """The pairs won and lost, spread over types and outcomes, with their images where `mmvp` has them."""
    changed = [pair for pair in pairs if pair["changes"]]
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
    except (UserError, OSError) as gone:
        warn(missing := f"Without images, which --mmvp PATH brings back: {one_line(gone)}")
        note += " " + missing
    template = """<article><h3>$type <small>$id1, $id2</small></h3>$images<p>$statement1</p><p>$statement2</p>$outcomes
</article>"""
    for pair in shown:
        pair["outcomes"] = [fill('<b class="$how">$how in $e</b>', how=how, e=e) for how, e in pair["changes"]]
    cards = [fill(template, **dict(images="") | pair) for pair in shown]
    return fill("<h2>Pairs won and lost</h2><p>$note</p><div>$cards</div>", note=note, cards=cards)


def report(folder: Path, mmvp: str | None = None) -> dict[Path, Html]:
    """The page of the run in `folder`, and the card if it is finished. `mmvp`: where the benchmark is now.

    UserError: there is no run, it has taken no step yet, or one of its files is not what a run writes.
    """
    if not (folder / "args.json").is_file():
        raise UserError(f"{folder}: no run in this folder (args.json is missing)")
    curves, taken, unreadable = draw_training(folder / "metrics.jsonl")
    args, words = describe(folder / "args.json", taken)
    if unreadable:
        words["summary"] += f" {unreadable:,} images could not be read."
    words |= dict(folder=folder, verdict="Not scored", table="", pairs="", drawn="")
    if (folder / "mmvp" / "scores.json").exists() and not args["random_weights"]:  # it is written once all is scored
        words["verdict"], count, words["table"] = read_scores(folder / "mmvp" / "scores.json")
        benchmark = words["mmvp"] or "a benchmark that the run does not name"  # it was scored by hand
        words["summary"] += f" Scored on {count} pairs of {benchmark}; chance is 25."
        words["pairs"] = show_changes(read_pairs(folder / "mmvp" / "pairs.csv"), mmvp or args["mmvp"] or benchmark)
    if (folder / "mmvp-steps" / "scores.json").exists():
        curves += draw_scores(folder / "mmvp-steps" / "scores.json")
    if (folder / "reconstruct.png").exists():
        words["drawn"] = picture(folder / "reconstruct.png", 2000, "png")
    words |= dict(curves=curves, out=shlex.quote(str(folder)))
    files = {folder / "report.html": fill(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"), **words)}
    finished = (read_state(folder / "checkpoint") or {}).get("step") == args["steps"]
    if finished and (folder / "clip").is_dir():
        files[folder / "clip" / "README.md"] = fill(CARD, **words)
    return files


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write a run's report.html, and the model card of its CLIP.")
    parser.error = usage_error
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder that train.py wrote (--out)")
    parser.add_argument("--mmvp", metavar="PATH", help="the benchmark, if it is no longer where the run found it")
    args = parser.parse_args(argv)
    for path, content in report(args.run, args.mmvp).items():
        write_atomically(path, content)
        print(f"written: {path}")


if __name__ == "__main__":
    with exit_on_user_error("report.py"):
        main()
