"""The command line, warnings and output files of evaluate_mmvp.py. No torch here, so that --help is fast."""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

from harness.errors import UserError, usage_error, warn
from harness.files import check_writable, write_atomically
from harness.recipes import RECIPES, locate_clip, recipe_of, split_weights


def read_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line. `kinds` has the kind of released embedding of each CLIP; empty without --released."""
    parser = argparse.ArgumentParser(
        description="MMVP-VLM scores of any number of CLIPs, side by side.",
        epilog="A CLIP is a recipe, ARCH:TAG of open_clip, hf-hub:OWNER/NAME, or a folder saved by a run. CLIP@WEIGHTS "
        "is that CLIP with its weights loaded from WEIGHTS. Recipes: " + ", ".join(RECIPES) + ".",
    )
    parser.error = usage_error
    parser.add_argument("clips", nargs="+", metavar="CLIP", help="the CLIPs to score; each is compared with the first")
    mmvp = "a folder or a data set on the hub (default: the first recipe's benchmark, or MMVP/MMVP_VLM)"
    parser.add_argument("--mmvp", metavar="PATH", help=mmvp)
    released = "also score as DIVA's released evaluation does for the CLIP's recipe, or RECIPE if there is none"
    parser.add_argument("--released", metavar="RECIPE", nargs="?", const="", help=released)
    parser.add_argument("--out", metavar="DIR", help="write scores.json and pairs.csv to DIR")
    parser.add_argument("--batch-size", type=int, default=32, help="images per forward pass (default: %(default)s)")
    args = parser.parse_args(argv)
    for name in args.clips:
        locate_clip(name)
    if args.batch_size < 1:
        raise UserError("--batch-size: must be at least 1")
    if args.out:
        check_writable(args.out, "--out")
    recipes = [recipe_of(split_weights(name)[0]) for name in args.clips]
    benchmarks = [RECIPES[recipe].mmvp for recipe in recipes if recipe]
    args.mmvp = args.mmvp or next(filter(None, benchmarks), "MMVP/MMVP_VLM")
    args.kinds = []
    if args.released is not None:
        other = args.released or next(filter(None, recipes), "")
        if other not in RECIPES:
            raise UserError(f"--released {other}: needs the name of a recipe: {', '.join(RECIPES)}")
        args.kinds = [RECIPES[recipe or other].released for recipe in recipes]
    return args


def warn_of_limits(clip, pairs: list) -> None:
    """Warns if `cls+local` says little about this CLIP, or if its tokenizer does not know the statements' words."""
    if clip.pools_by_attention:
        warn(
            f"{clip.source} pools by attention, so its patch tokens are not in the joint space with the text; "
            f"cls+local is shown only for completeness"
        )
    tokenizer = clip.tokenizer()
    words = getattr(tokenizer, "tokenizer", None)  # transformers', unless it is built into open_clip
    unknown = getattr(words, "unk_token_id", None)
    if unknown is not None and unknown != words.eos_token_id:  # else it also marks the end of each text
        ids = tokenizer([statement for pair in pairs for statement in pair.statements])  # (2 · pairs, L)
        count = int((ids == unknown).any(1).sum())
        if count:
            warn(
                f"{clip.source}: {count:,} of {len(ids):,} statements have words that its tokenizer does not know; the "
                f"miniature's CLIP knows only the words and images of its drawn world"
            )


def save_scores(folder: Path, clips: list[dict], cosines: list, rights: list[dict], pairs: list) -> None:
    """Writes pairs.csv (cosines and outcomes of each CLIP and pair) and scores.json (`clips`)."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for clip, clip_cosines, right in zip(clips, cosines, rights):
        for p, pair in enumerate(pairs):
            row = dict(clip=clip["clip"], type=pair.type, id1=pair.ids[0], id2=pair.ids[1])
            row |= dict(statement1=pair.statements[0], statement2=pair.statements[1])
            for embedding, cosine in zip(right, clip_cosines[:, p]):
                row |= {f"{embedding} s{s + 1} i{i + 1}": f"{cosine[s, i]:.7f}" for s in (0, 1) for i in (0, 1)}
                row[f"{embedding} right"] = int(right[embedding][p])
            rows.append(row)
    with open(folder / "pairs.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    content = json.dumps(dict(pairs=len(pairs), clips=clips), indent=2) + "\n"
    write_atomically(folder / "scores.json", content)  # last: it marks a run as scored
