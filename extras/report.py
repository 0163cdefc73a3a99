"""A run as a page to read, and as a model card: the verdict, the scores, the pairs that changed, the curves.

    python extras/report.py runs/l14
    python extras/report.py runs/l14 --mmvp MMVP_VLM  # where the benchmark's images are, if they have moved

Writes RUN/report.html, one file that needs no other, and, once the run is finished, the card RUN/clip/README.md.
Nothing is scored again: the figures are those in RUN/mmvp. All settings are in RUN/args.json.
"""

import argparse
import base64
import contextlib
import csv
import io
import json
import sys
from collections import Counter
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
from evaluate_mmvp import EMBEDDINGS, verdict
from extras.card import card, summary
from harness.checkpoint import read_state
from harness.errors import UserError, brief, fail, one_sentence
from harness.files import write_whole
from harness.mmvp import read_mmvp

PICTURES = 100  # pairs shown with their pictures, at most: 2 to 3 MB
NAMES = ("type", "id1", "id2", "statement1", "statement2")  # of a pair


@dataclass
class Run:
    """What a run has left. From `pairs` on all is empty where there are no scores to show."""

    folder: Path
    args: dict  # as in args.json
    finished: bool
    curves: dict[str, np.ndarray]  # the loss and the learning rate, a number a step
    pairs: int = 0
    changed: tuple | list = ()  # of each pair won or lost its NAMES, and `changes`: embedding, outcome, margins
    rows: tuple | list = ()  # the table of the scores; the first row is its head
    verdict: str = "Not scored"


@contextlib.contextmanager
def reading(path: Path):
    """UserError, with `path`, for whatever is found there that no run has written."""
    try:
        yield path
    except Exception as error:  # csv, json, numpy and what is looked for in vain each raise their own
        raise UserError(f"{path}: not what a run writes ({type(error).__name__}: {brief(error)})") from None


def read_run(folder: Path) -> Run:
    """UserError: there is no run in `folder`, it has taken no step yet, or one of its files is not a run's."""
    if not (folder / "args.json").is_file():
        raise UserError(f"{folder}: no run in this folder (args.json is missing)")
    with reading(folder / "args.json") as path:
        args = json.loads(path.read_text(encoding="utf-8"))
        args |= {key: str(args[key] or "") for key in ("recipe", "clip", "diffusion", "mmvp")}
        args |= {key: args[key] for key in ("recap", "join", "states", "lr", "seed", "precision", "random_weights")}
        args |= dict(data=list(map(str, args["data"])), versions=dict(args["versions"]))
        args |= dict(steps=int(args["steps"]), batch_size=int(args["batch_size"]))
    with reading(folder / "metrics.jsonl") as path:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []  # the last may be cut off
        lines = json.loads("[" + ",\n".join(lines) + "]")  # at once, so that an error names the line
        curves = {key: np.array([float(line[key]) for line in lines]) for key in ("loss", "lr")}
        if not all(np.isfinite(values).all() for values in curves.values()):
            raise ValueError("a number is not finite")
    if not lines:
        raise UserError(f"{folder}: this run has taken no step yet")
    run = Run(folder, args, (read_state(folder / "checkpoint") or {}).get("step") == args["steps"], curves)
    if (folder / "mmvp" / "scores.json").exists() and not args["random_weights"]:
        read_scores(run)
    return run


def read_scores(run: Run) -> None:
    """Fills in what follows from the run's scores. UserError: they are not what a run writes."""
    with reading(run.folder / "mmvp" / "pairs.csv") as path:
        rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"), newline=""), strict=True))
        run.pairs, run.changed, counts = len(rows) // 2, [], Counter()
        for both in zip(rows[: run.pairs], rows[run.pairs :], strict=True):  # before and after
            pair, same = ({name: str(row[name]) for name in NAMES} for row in both)
            if pair != same:
                raise ValueError("the pairs of the two CLIPs differ")
            pair["changes"] = []
            for e in (e for e in EMBEDDINGS if both[0][f"{e} right"] != both[1][f"{e} right"]):
                outcome = "won" if both[1][f"{e} right"] == "1" else "lost"
                margins = [float(r[f"{e} s{s} i{s}"]) - float(r[f"{e} s{s} i{3 - s}"]) for s in (1, 2) for r in both]
                pair["changes"].append((e, outcome, margins))
                counts[e, outcome] += 1
            if pair["changes"]:
                run.changed.append(pair)
    with reading(run.folder / "mmvp" / "scores.json") as path:
        clips, changes = json.loads(path.read_text(encoding="utf-8"))["clips"], []
        types = list(clips[0]["cls"]["types"])
        run.rows = [["pairs right, %"], *([name] for name in types), ["Average"], ["95% interval"]]
        for e, change in zip(EMBEDDINGS, clips[1]["change"], strict=True):
            changes.append(dict(embedding=e, won=counts[e, "won"], lost=counts[e, "lost"]))
            changes[-1] |= {key: float(change[key]) for key in ("points", "low", "high", "p")}
            if any(change[key] != value for key, value in changes[-1].items()):
                raise ValueError("its scores are not those of pairs.csv")
            before, after = (clip[e] for clip in clips)
            scores = [(before["types"][name], after["types"][name]) for name in types]
            run.rows[0] += [f"{e} before", f"{e} after", f"{e} change"]
            for row, (old, new) in zip(run.rows[1:], [*scores, (before["average"], after["average"])]):
                row += [f"{old:.1f}", f"{new:.1f}", f"{new - old:+.1f}"]
            run.rows[-1] += ["{low:.1f} … {high:.1f}".format(**clip) for clip in (before, after)]
            run.rows[-1] += ["{low:+.1f} … {high:+.1f}".format(**change)]
        run.verdict = verdict(changes, run.pairs)


def curve(name: str, values: np.ndarray) -> str:
    """A number over the steps: at most 300 means of neighbouring steps, and 20 that show the course of a noisy one."""
    lines = [[part.mean() for part in np.array_split(values, min(n, len(values)))] for n in (300, 20)]
    low, high, drawn = min(lines[0]), max(lines[0]), ""
    for line in lines:
        points = [f"{(i + 0.5) / len(line):.4f},{(high - y) / ((high - low) or 1):.4f}" for i, y in enumerate(line)]
        drawn += f'<polyline points="{" ".join([*points, points[-1]])}"/>'  # a point alone would not be drawn
    tenth = max(1, len(values) // 10)
    words = f"mean of the first tenth {values[:tenth].mean():.3g}, of the last {values[-tenth:].mean():.3g}"
    drawn = f'<svg viewBox="0 0 1 1" preserveAspectRatio="none" role="img" aria-label="{name}: {words}">{drawn}</svg>'
    drawn = f"<p>{high:.3g}</p>{drawn}<p><span>{low:.3g}</span><span>step {len(values):,}</span></p>"
    return f"<figure><figcaption>{name}<small>{words}</small></figcaption>{drawn}</figure>"


def pictures(pair: dict, benchmark: dict) -> str:
    """Both images of a pair, at most 224 pixels wide and high. UserError: one is not readable, or another pair's."""
    there, images = benchmark.get((pair["id1"], pair["id2"])), ""
    if there is None or [there.type, *there.statements] != [pair[k] for k in ("type", "statement1", "statement2")]:
        raise UserError(f"not the benchmark that was scored (pair {pair['id1']}, {pair['id2']} differs)")
    for path in there.images:
        try:
            with Image.open(path) as image:
                image.thumbnail((224, 224))
                image.convert("RGB").save(jpeg := io.BytesIO(), "JPEG", quality=85)
        except Exception as error:  # Pillow raises almost any exception on a broken file
            raise UserError(f"{path}: not a readable image ({brief(error)})") from None
        images += f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(jpeg.getvalue()).decode()}">'
    return images


def changed_pairs(run: Run, mmvp: str | None) -> str:
    """The pairs won and lost. `mmvp`: where the benchmark is, if it moved; UserError: it is not there either."""
    won = [pair for pair in run.changed if pair["changes"][0][1] == "won"]
    lost, half, cards = [pair for pair in run.changed if pair not in won], PICTURES // 2, ""
    shown = won[: max(half, PICTURES - len(lost))] + lost[: max(half, PICTURES - len(won))]
    note, images = f"{len(run.changed):,} of {run.pairs:,} pairs changed; {len(shown)} are shown.", [""] * len(shown)
    try:
        benchmark = {pair.ids: pair for pair in read_mmvp(mmvp or run.args["mmvp"])}
        images = [pictures(pair, benchmark) for pair in shown]
    except (UserError, OSError) as gone:
        if mmvp:
            raise
        note += f" Without pictures, which --mmvp PATH brings back: {brief(gone)}"
    for pair, two in zip(shown, images):
        texts = {name: escape(pair[name]) for name in NAMES}
        cards += "<article><h3>{type} <small>{id1}, {id2}</small></h3>".format(**texts)
        cards += two + "<p>{statement1}</p><p>{statement2}</p>".format(**texts)
        for e, outcome, margins in pair["changes"]:
            cards += f'<b class="{outcome}">{outcome} in {e}</b>'
            cards += "<small>{:+.5f} → {:+.5f}</small><small>{:+.5f} → {:+.5f}</small>".format(*margins)
        cards += "</article>"
    return f'<p class="note">{escape(note)}</p><div class="cards">{cards}</div>'


def page(run: Run, mmvp: str | None = None) -> str:
    """The report as HTML, where whatever comes from a file is escaped; `mmvp` as in `changed_pairs`."""
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    if not run.pairs:
        template = template[: template.index("<h2>Scores")] + template[template.index("<h2>Training") :]
    scores = ""
    for name, *cells in run.rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        scores += f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>'
    return Template(template).substitute(
        folder=escape(str(run.folder)),
        verdict=escape(run.verdict),
        summary=escape(summary(run)),
        scores=scores,
        changed=changed_pairs(run, mmvp) if run.pairs else "",
        curves=curve("Loss: mean squared error", run.curves["loss"]) + curve("Learning rate", run.curves["lr"]),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a run's report.html, and the model card of its CLIP.")
    parser.error = fail
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder that train.py wrote (--out)")
    parser.add_argument("--mmvp", metavar="PATH", help="the benchmark, if it is no longer where the run found it")
    args = parser.parse_args()
    run = read_run(args.run)
    files = {args.run / "report.html": page(run, args.mmvp)}
    if run.finished and (args.run / "clip").is_dir():
        files[args.run / "clip" / "README.md"] = card(run)
    for path, content in files.items():
        write_whole(path, content)
    print("written: " + ", ".join(map(str, files)))


if __name__ == "__main__":
    with one_sentence("report.py"):
        main()
