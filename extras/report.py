"""A run as a page to read, and as a card for the hub: what the paper's Table 1 and Figures 1 and 3 are to the paper.

    python extras/report.py runs/l14
    python extras/report.py runs/l14 --mmvp MMVP_VLM  # where the benchmark's images are, if they have moved

writes RUN/report.html, one file that needs no other, and, once the run is finished, RUN/clip/README.md. train.py ends
with the same. The figures are those that the run has left in RUN/mmvp: nothing is scored again.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import csv
import html
import io
import json
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from string import Template

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
from evaluate_mmvp import BASELINES, READINGS, TYPES, Pair, average, read_mmvp, type_names, type_scores
from model import RECIPES, brief, one_sentence, read_state, recipe_of, write_whole

PICTURES = 100  # pairs shown with their images, at most: 2 to 3 MB
CURVES = dict(loss="Loss: mean squared error", grad_norm="Norm of its gradient, unclipped", lr="Learning rate")
SETTINGS = ("recap", "join", "states", "lr", "seed", "precision", "random_weights")  # that the card names
NUMBERS = ("step", *CURVES, "images_per_second", "unreadable")  # of a line of metrics.jsonl


# ---------------------------------------------------------------------------------------------------------------------
# What a run has left


@dataclass
class Run:
    """`args` as in args.json; `steps` an array for each of NUMBERS; `saved` how many steps the checkpoint has.
    The rest is empty unless the run was scored.

    `cosines` (2 CLIPs, readings, P pairs, 2 statements, 2 images); `right` (2 CLIPs, readings, P), 0 or 1; `outcomes`
    (readings, P), 1 for a pair won, -1 for one lost, else 0; `intervals` (low, high) of each CLIP and reading, in
    percent; `changes` as `evaluate_mmvp.change` makes them; `paper` what the paper has beside each line of `scores`.
    """

    folder: Path
    args: dict
    steps: dict[str, np.ndarray]
    saved: int
    passed_over: list[str]
    pairs: list[Pair] = field(default_factory=list)
    cosines: np.ndarray | None = None
    right: np.ndarray | None = None
    outcomes: np.ndarray | None = None
    intervals: list[list[list[float]]] = field(default_factory=list)
    changes: list[dict[str, float]] = field(default_factory=list)
    paper: list[tuple[float, ...]] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return self.saved == self.args["steps"]

    @property
    def types(self) -> list[str]:
        return [pair.type for pair in self.pairs]

    def scores(self, r: int) -> list[tuple[str, float, float]]:
        """Name, before and after of each type and of the average, in percent, in reading `r`."""
        before, after = ([*type_scores(x[r], self.types).values(), average(x[r], self.types)] for x in self.right)
        return list(zip([*type_names(self.types), "Average"], before, after))


@contextlib.contextmanager
def reading(path: Path):
    """SystemExit, with `path`, for whatever is found there that no run has written."""
    try:
        yield path
    except Exception as error:  # csv, json, numpy and what is looked for in vain each raise their own
        raise SystemExit(f"{path}: not what a run writes ({type(error).__name__}: {brief(error)})") from None


def numbers(values: list) -> np.ndarray:
    """ValueError or TypeError: they are not all finite numbers."""
    values = np.array([float(value) for value in values])
    if not np.abs(values).max() < 1e100:  # NaN included
        raise ValueError("a number is not finite")
    return values


def read_run(folder: Path) -> Run:
    """SystemExit: there is no run in `folder`, it has taken no step yet, or one of its files is not a run's."""
    if not (folder / "args.json").is_file():
        raise SystemExit(f"{folder}: {'no run in it (args.json is missing)' if folder.is_dir() else 'no such folder'}")
    with reading(folder / "args.json") as path:
        args = json.loads(path.read_text(encoding="utf-8"))
        args |= {key: str(args[key] or "") for key in ("recipe", "clip", "diffusion", "mmvp")}
        args |= {key: int(args[key]) for key in ("steps", "batch_size")} | {key: args[key] for key in SETTINGS}
        args |= dict(data=[str(path) for path in args["data"]], versions=dict(args["versions"]))
    with reading(folder / "metrics.jsonl") as path:
        lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
        if not lines[:-1]:  # the last may be on its way
            raise SystemExit(f"{folder}: this run has taken no step yet")
        lines = json.loads("[" + ",\n".join(lines[:-1]) + "]")  # at once, so that an error names the line
        steps = {key: numbers([line[key] for line in lines]) for key in NUMBERS}
        state = read_state(folder / "checkpoint") or dict(step=0)
        passed_over = [str(name) for line in lines for name in line.get("passed_over", ())]
        run = Run(folder, args, steps, state["step"], passed_over)
    if not (folder / "mmvp/scores.json").exists():  # which is written last
        return run
    with reading(folder / "mmvp/pairs.csv") as path:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, strict=True))
        pairs = [
            Pair((row["id1"], row["id2"]), row["type"], (row["statement1"], row["statement2"]), ()) for row in rows
        ]
        run.pairs = pairs[: len(rows) // 2]
        if pairs != 2 * run.pairs:
            raise ValueError("the pairs of the two CLIPs differ")
        cosines = [row[f"{r} s{s} i{i}"] for row in rows for r in READINGS for s in (1, 2) for i in (1, 2)]
        run.cosines = numbers(cosines).reshape(2, -1, 2, 2, 2).swapaxes(1, 2)
        right = numbers([row[f"{r} right"] for row in rows for r in READINGS])
        run.right = (right == 1).astype(int).reshape(2, -1, 2).swapaxes(1, 2)
        run.outcomes = run.right[1] - run.right[0]
    with reading(folder / "mmvp/scores.json") as path:
        clips = json.loads(path.read_text(encoding="utf-8"))["clips"]
        keys = ("points", "low", "high", "won", "lost", "p")
        run.changes = [dict(zip(keys, numbers([c[k] for k in keys]).tolist())) for c in clips[1]["change"]]
        run.intervals = [[numbers([c[r]["low"], c[r]["high"]]).tolist() for r in READINGS] for c in clips]
        counted = [[(outcomes == sign).sum() for sign in (1, -1)] for outcomes in run.outcomes]
        if [[c["won"], c["lost"]] for c in run.changes] != counted or len(run.intervals) != 2:
            raise ValueError("its scores are not those of pairs.csv")
    recipe = None if args["random_weights"] else recipe_of(args["clip"])
    if recipe in BASELINES and type_names(run.types) == TYPES:
        run.paper = [*((score,) for score in BASELINES[recipe]), RECIPES[recipe].published]
    return run


# ---------------------------------------------------------------------------------------------------------------------
# In words


def plural(count: float, noun: str) -> str:
    return f"{count:,.0f} {noun}{'' if count == 1 else 's'}"


def signed(number: float) -> str:
    return f"{number:+z.1f}".replace("-", "−")


def verdict(run: Run, r: int) -> str:
    """A gain or a loss only where the 95% interval leaves out zero."""
    c, pairs = run.changes[r], plural(len(run.pairs), "pair")
    if not c["won"] + c["lost"]:
        return f"No effect: not one of {pairs} changed"
    if c["low"] <= 0 <= c["high"]:
        return f"No effect that {pairs} can show"
    return ("A gain" if c["low"] > 0 else "A loss") + ", though not by the exact test" * (c["p"] >= 0.05)


def headline(run: Run, r: int) -> tuple[str, str, str]:
    """The averages, the change between them, and the pairs that made it."""
    (_, before, after), c = run.scores(r)[-1], run.changes[r]
    change = f"{signed(c['points'])} points, 95% interval {signed(c['low'])} … {signed(c['high'])}"
    pairs = f"{plural(c['won'], 'pair')} won, {c['lost']:,.0f} lost, p = {c['p']:.2g}"
    return f"{before:.1f} → {after:.1f}", change, pairs


def summary(run: Run, args: dict) -> str:
    """What learnt from what, for how long, in what that differs from the recipe, and on what it was scored."""
    own = vars(RECIPES[args["recipe"]]) if args["recipe"] in RECIPES else {}
    silent = ("clip", "diffusion", "data", "mmvp", "patches", "published")
    silent += ("steps", "batch_size", "micro_batch", "save_every")
    differs = [f"{k} {args[k]}" for k in own if k not in silent and args.get(k, own[k]) != own[k]]
    random = ", both with random weights," if args["random_weights"] else ""
    so_far = "" if run.finished else f" of {args['steps']:,} (it is not finished)"
    scored = f"Scored on {plural(len(run.pairs), 'pair')} of {args['mmvp']}." if run.pairs else "Not scored."
    return (
        f"{args['clip']} learnt from {args['diffusion']}{random} for {plural(len(run.steps['step']), 'step')}{so_far}, "
        f"{plural(args['batch_size'], 'image')} each: recipe {', '.join([args['recipe'], *differs])}. {scored}"
    )


def score_rows(run: Run) -> list[list[str]]:
    """The scores as a table, with a head: both readings, before, after and the change, and what the paper has."""
    rows = [["pairs right, %"], *([name] for name, *_ in run.scores(0)), ["95% interval"]]
    for r, (name, change) in enumerate(zip(READINGS, run.changes)):
        rows[0] += [f"{name} before", f"{name} after", f"{name} change"]
        for row, (_, before, after) in zip(rows[1:], run.scores(r)):
            row += [f"{before:.1f}", f"{after:.1f}", signed(after - before)]
        rows[-1] += ["{:.1f}–{:.1f}".format(*intervals[r]) for intervals in run.intervals]
        rows[-1] += [f"{signed(change['low'])} … {signed(change['high'])}"]
    paper = ["paper", *(" → ".join(map(str, figures)) for figures in run.paper), ""]
    return [row + [cell] for row, cell in zip(rows, paper)] if run.paper else rows


# ---------------------------------------------------------------------------------------------------------------------
# The page; whatever comes from a file goes through `text`


def text(value: object) -> str:
    return html.escape(str(value))


def table(rows: list[list[str]], kind: str) -> str:
    """The first row is the head. A cell that begins with ✓ or ✗ has the colour of won or lost."""
    head = "".join(f'<th scope="col">{text(cell)}</th>' for cell in rows[0])
    body = ""
    for first, *rest in rows[1:]:
        marks = [{"✓": ' class="won"', "✗": ' class="lost"'}.get(cell[:1], "") for cell in rest]
        cells = "".join(f"<td{mark}>{text(cell)}</td>" for mark, cell in zip(marks, rest))
        body += f'<tr><th scope="row">{text(first)}</th>{cells}</tr>'
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def svg(name: str, height: int, title: str, description: str, parts: list[str]) -> str:
    """As wide as its place: what is in it has places in percent and sizes in pixels, so that no text is scaled."""
    return (
        f'<svg role="img" aria-labelledby="{name}-t {name}-d" width="100%" height="{height}"><title id="{name}-t">'
        f'{text(title)}</title><desc id="{name}-d">{text(description)}</desc>{"".join(parts)}</svg>'
    )


def bars(run: Run, r: int) -> str:
    """The scores in a reading, before and after, with the average's intervals and, where known, the paper's figures."""
    rows, parts, scale = run.scores(r), [], 0.86  # of the width; the rest is for the numbers beside the bars
    height = 50 * len(rows) + 36
    for tick in (0, 25, 50, 75, 100):
        x, kind, anchor = scale * tick, "chance" if tick == 25 else "grid", "middle" if tick else "start"
        parts.append(f'<line class="{kind}" x1="{x}%" x2="{x}%" y1="18" y2="{height}"/>')
        parts.append(f'<text class="tick" x="{x}%" y="12" text-anchor="{anchor}">{tick}</text>')
    for i, (name, *pair) in enumerate(rows):
        last = i == len(rows) - 1
        top, paper = 50 * i + 24 + 8 * last, run.paper[i] if run.paper and r == 0 else ()
        parts.append(f'<text y="{top + 12}">{text(name)}</text>')
        for c, score in enumerate(pair):
            y, end = top + 18 + 13 * c, scale * score
            parts.append(f'<rect class="{("before", "after")[c]}" y="{y}" width="{end:.2f}%" height="10"/>')
            if last:
                low, end = (scale * bound for bound in run.intervals[c][r])
                parts.append(f'<line class="interval" x1="{low:.2f}%" x2="{end:.2f}%" y1="{y + 5}" y2="{y + 5}"/>')
            for x in (scale * figure for figure in paper[c : c + 1]):
                parts.append(f'<line class="paper" x1="{x:.2f}%" x2="{x:.2f}%" y1="{y - 1}" y2="{y + 11}"/>')
                end = max(end, x)
            parts.append(f'<text class="tick" x="{end:.2f}%" dx="6" y="{y + 9}">{score:.1f}</text>')
    values = "; ".join(f"{name} {before:.1f} → {after:.1f}" for name, before, after in rows)
    return svg(f"bars{r}", height, f"Pairs right by type, before and after, {READINGS[r]}", values, parts)


def curve(run: Run, key: str) -> str:
    """A number of metrics.jsonl over the steps: at most 300 means, and 20 that show the course of a noisy one."""

    def means(values: np.ndarray, count: int) -> np.ndarray:
        return np.array([part.mean() for part in np.array_split(values, min(count, len(values)))])

    steps, values, parts = run.steps["step"], run.steps[key], []
    low, high = (fine := means(values, 300)).min(), fine.max()
    low = 0 if 0 < low < high / 2 else low
    if high - low <= 1e-6 * abs(high):  # a constant, or one step
        low, high = low - (abs(low) or 1) / 10, high + (abs(high) or 1) / 10
    for share in (0, 0.5, 1):
        value, y = high + (low - high) * share, 12 + 130 * share
        parts.append(f'<line class="grid" x1="16%" x2="100%" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="14.5%" y="{y + 4}" text-anchor="end">{value:.3g}</text>')
    first, last = steps[0], steps[-1]
    parts.append(f'<text class="tick" x="16%" y="162">step {first:,.0f}</text>')
    parts.append(f'<text class="tick" x="100%" y="162" text-anchor="end">{last:,.0f}</text>' * (len(steps) > 1))
    parts.append('<svg x="16%" y="12" width="84%" height="130" viewBox="0 0 1 1" preserveAspectRatio="none">')
    for count in (300, 20) if len(steps) >= 40 and key != "lr" else (300,):
        xs, ys = (means(steps, count) - first) / max(last - first, 1), (high - means(values, count)) / (high - low)
        points = [f"{x:.4f},{y:.4f}" for x, y in zip(xs, ys)]
        points, kind = (points, "line") if len(points) > 1 else (2 * points, "dot")  # one point would not be drawn
        parts.append(f'<polyline class="{kind}" points="{" ".join(points)}"/>')
    tenth = max(1, len(values) // 10)
    words = f"mean of the first tenth {values[:tenth].mean():.3g}, of the last {values[-tenth:].mean():.3g}"
    words = f"at most {values.max():.3g}" if key == "lr" else words
    drawn = svg(key, 168, f"{CURVES[key]}, by step", words, [*parts, "</svg>"])
    return f"<figure><figcaption>{CURVES[key]}<small>{words}</small></figcaption>{drawn}</figure>"


def pictures(run: Run, shown: list[int], mmvp: str) -> dict[int, list[str]]:
    """Both images of these pairs as data URIs, at most 224 pixels wide and high.

    SystemExit: `mmvp` cannot be read, or is not the benchmark that was scored.
    """
    found, images = {pair.ids: pair for pair in read_mmvp(mmvp)} if shown else {}, {p: [] for p in shown}
    for p in shown:
        pair, there = run.pairs[p], found.get(run.pairs[p].ids)
        if there is None or (there.type, there.statements) != (pair.type, pair.statements):
            raise SystemExit(f"{mmvp}: not the benchmark that was scored (pair {', '.join(pair.ids)} differs)")
        for path in there.images:
            try:
                with Image.open(path) as image:
                    image.thumbnail((224, 224))
                    image.convert("RGB").save(jpeg := io.BytesIO(), "JPEG", quality=85)
            except Exception as error:  # Pillow raises almost any exception on a broken file
                raise SystemExit(f"{path}: not a readable image ({brief(error)})") from None
            images[p].append("data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode())
    return images


def chosen(cosines: np.ndarray, right: int) -> tuple[int, int]:
    """The image that each statement found; cosines (2 statements, 2 images), 7 digits: `right` knows more of a tie."""
    (a, b), (c, d) = cosines
    first = 0 if right or a > b else 1  # a tie goes to the second image
    return first, 1 if right or c < d or (c == d and first) else 0


def pair_card(run: Run, p: int, images: list[str]) -> str:
    """A pair's images and statements, and for each reading in which it was won or lost the similarities and choices."""
    pair, badges, figures, tables = run.pairs[p], "", "", ""
    for i, statement in enumerate(pair.statements):
        image = f'<img src="{images[i]}" alt="{text(f"image {i + 1}: {statement}")}">' if images else ""
        figures += f"<figure>{image}<figcaption>{i + 1} {text(statement)}</figcaption></figure>"
    for r in np.flatnonzero(run.outcomes[:, p]):
        outcome = "won" if run.outcomes[r, p] == 1 else "lost"
        badges += f' <b class="{outcome}">{outcome} in {READINGS[r]}</b>'
        rows = [[READINGS[r], "image 1", "image 2"]]
        for s, c in ((0, 0), (0, 1), (1, 0), (1, 1)):
            choice = chosen(run.cosines[c, r, p], run.right[c, r, p])[s]
            marks = ["✗✓"[i == s] + " " if i == choice else "" for i in (0, 1)]
            cells = [f"{mark}{cosine:.5f}" for mark, cosine in zip(marks, run.cosines[c, r, p, s])]
            rows.append([f"statement {s + 1}, {('before', 'after')[c]}", *cells])
        tables += table(rows, "numbers")
    head = f"{text(pair.type)} <small>{text(', '.join(pair.ids))}</small>{badges}"
    return f'<article><h3>{head}</h3><div class="two">{figures}</div>{tables}</article>'


def pair_sections(run: Run, mmvp: str | None) -> tuple[str, str]:
    """The pairs won and lost, by type and with pictures; and the others. `mmvp`: where the benchmark is, if it moved.

    SystemExit: it is not there either. Where no other place is named, the page says that the images are gone.
    """
    types, outcomes, seen, nth = run.types, run.outcomes.T.tolist(), Counter(), {}
    order = {name: n for n, name in enumerate(type_names(types))}
    by_type = sorted(range(len(types)), key=lambda p: (order[types[p]], [(-abs(o), -o) for o in outcomes[p]]))
    for p in by_type:
        if any(outcomes[p]):
            seen[kind := (types[p], outcomes[p][0] or outcomes[p][1])] += 1
            nth[p] = seen[kind]
    shown = sorted(nth, key=nth.get)[:PICTURES]  # of each type the first won and lost, then the second …
    images, note = {}, "Cosine similarities; at the image that a statement found, ✓ if it is its own and ✗ if not."
    if len(shown) < len(nth):
        note += f" {PICTURES} of {len(nth):,} are shown, as many of each type won as lost where there are."
    try:
        images = pictures(run, shown, mmvp or run.args["mmvp"])
    except (SystemExit, OSError) as gone:
        if mmvp:
            raise
        note += f" Without pictures, which --mmvp PATH brings back: {brief(gone)}"
    cards = "".join(pair_card(run, p, images.get(p, [])) for p in by_type if p in shown)
    rest = [["pair", "type", "statement 1", "statement 2"]]
    rest[0] += [f"{name} {when}" for name in READINGS for when in ("before", "after")]
    for p in (p for p in by_type if p not in shown):
        marks = ["✗✓"[right] for right in run.right[:, :, p].T.flat]
        rest.append([", ".join(run.pairs[p].ids), types[p], *run.pairs[p].statements, *marks])
    cards = f'<p class="note">{text(note)}</p><div class="cards">{cards}</div>' if cards else "<p>None.</p>"
    return f"<h2>Pairs won and lost</h2>{cards}", f"<h2>The other pairs</h2>{table(rest, 'wide')}"


PAGE = Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))


def page(run: Run, mmvp: str | None = None) -> str:
    """The report as HTML; `mmvp` as in `pair_sections`."""
    scores = changed = others = ""
    hint = "It is scored at its end." if run.args["mmvp"] else "The same command with --mmvp scores it."
    stats = "" if run.pairs else f"<p>{hint}</p>"
    if run.pairs:
        for r, name in enumerate(READINGS):
            averages, change, pairs = headline(run, r)
            own = ("the benchmark’s own reading", "the class token with the local ones")[r]
            stats += f'<div><p class="note">{name}, {own}</p><p class="big">{averages}</p>'
            stats += f"<p>{change}</p><p>{pairs}</p><p>{verdict(run, r)}.</p></div>"
            scores += f"<figure><figcaption>{name}<small>pairs right, %</small></figcaption>{bars(run, r)}</figure>"
        kinds = {kind: kind for kind in ("before", "after", "interval", "chance", "paper")}
        kinds["interval"] = "95% interval of the average"
        kinds = [item for item in kinds.items() if item[0] != "paper" or run.paper]
        legend = "".join(f'<span class="{kind}">{name}</span>' for kind, name in kinds)
        scores = f'<h2>Scores by type</h2><p class="legend">{legend}</p><div class="charts">{scores}</div>'
        scores += table(score_rows(run), "numbers")
        changed, others = pair_sections(run, mmvp)
    speed, unread = np.median(run.steps["images_per_second"]), run.steps["unreadable"][-1]
    names = ": " + "; ".join(run.passed_over[:10]) if run.passed_over else ""
    settings = {key: value for key, value in run.args.items() if key != "versions"} | run.args["versions"]
    settings = {k: value if value and isinstance(value, str) else json.dumps(value) for k, value in settings.items()}
    return PAGE.substitute(
        folder=text(run.folder),
        heading=verdict(run, 0) if run.pairs else "Not scored",
        stats=stats,
        summary=text(summary(run, run.args)),
        scores=scores,
        changed=changed,
        curves="".join(curve(run, key) for key in CURVES),
        speed=text(f"{speed:.3g} images per second (median); {plural(unread, 'image')} could not be read{names}."),
        settings="".join(f"<div><dt>{text(key)}</dt><dd>{text(value)}</dd></div>" for key, value in settings.items()),
        others=others,
    )


# ---------------------------------------------------------------------------------------------------------------------
# The card; whatever comes from a file goes through `markdown`


CARD = Template("""---
library_name: open_clip
pipeline_tag: zero-shot-image-classification
tags:
- clip
- diva
---

# $clip, after diffusion feedback

The vision tower of this CLIP was trained further, on images without captions, by DIVA
([Diffusion Feedback Helps CLIP See Better](https://arxiv.org/abs/2407.20171)): its visual features are the condition
of a frozen diffusion model, and the gradient of that model's loss is the feedback. The text tower is as it was.

    folder = huggingface_hub.snapshot_download("OWNER/NAME")
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")

## Training and scores

$summary

- images: $data
- recap $recap, text joins by $join, N = $states, learning rate $lr, seed $seed, $precision
- $versions
$scores

## Licence

The weights keep the licence of the CLIP that they come from, $clip; this card claims none. The diffusion model and
the images have licences of their own.
""")


def markdown(value: object) -> str:
    """One line of Markdown that shows `value` and does nothing else."""
    return html.escape(re.sub(r"[\\`*_\[\]|#~$!]", r"\\\g<0>", " ".join(str(value).split())), quote=False)


def card(run: Run) -> str:
    """The model card of RUN/clip. Of paths it names the last two parts, as it is there to be published."""

    def short(path: str) -> str:
        return "/".join(path.split("/")[-2:])

    args = run.args | {key: short(run.args[key]) for key in ("clip", "diffusion", "mmvp")}
    args |= dict(data=", ".join(map(short, args["data"])), versions=", ".join(map(" ".join, args["versions"].items())))
    lines = []
    if run.pairs:
        for r, name in enumerate(READINGS):
            lines.append("- {}: {}, {}; {}. {}.".format(name, *headline(run, r), verdict(run, r)))
        head, *rows = ("| " + " | ".join(map(markdown, row)) + " |" for row in score_rows(run))
        lines += ["", head, "|---" * (head.count(" | ") + 1) + "|", *rows]
    values = {key: markdown(value) for key, value in args.items()}
    return CARD.substitute(values, summary=markdown(summary(run, args)), scores="\n".join(lines))


# ---------------------------------------------------------------------------------------------------------------------
# The command


def write_report(folder: Path, mmvp: str | None = None) -> str:
    """Writes report.html, of a finished run also the card, and says so; `mmvp` as in `pair_sections`.

    SystemExit: there is no run in `folder`, or a part of it is none of a run's; nothing is written then.
    """
    run = read_run(folder)
    files = {folder / "report.html": page(run, mmvp)}
    if run.finished and (folder / "clip").is_dir():
        files[folder / "clip" / "README.md"] = card(run)
    for path, content in files.items():
        write_whole(path, content)
    return "written: " + ", ".join(map(str, files))


def report_finished(folder: Path) -> str:
    """`write_report` for the end of a run, which is whole without one: says why, if there can be none."""
    try:
        return write_report(folder)
    except (SystemExit, OSError) as error:
        return f"no report: {error}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a run's report.html, and the model card of its CLIP.")
    parser.error = sys.exit
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder that train.py wrote (--out)")
    parser.add_argument("--mmvp", metavar="PATH", help="the benchmark, if it is no longer where the run found it")
    args = parser.parse_args()
    print(write_report(args.run, args.mmvp))


if __name__ == "__main__":
    with one_sentence("report.py"):
        main()
