"""What scores are worth: their intervals, the paired change between two CLIPs, its p-value, and the verdict in words.

`rights` are a CLIP's outcomes: for each embedding of the image, which pairs it has right, (pairs,) bool. `types` are
the pairs' types. All scores are in percent, all changes in points.
"""

from __future__ import annotations

import math

import numpy as np

from harness.recipes import BASELINES, RECIPES, TYPES

Rights = dict[str, np.ndarray]


def type_names(types: list[str]) -> list[str]:
    """The types that occur, the paper's nine first and in its order, then others as they come."""
    return [t for t in TYPES if t in types] + [t for t in dict.fromkeys(types) if t not in TYPES]


def type_scores(values: np.ndarray, types: list[str]) -> dict[str, float]:
    """The mean of a value per pair within each type, in percent."""
    return {name: 100 * float(values[np.array(types) == name].mean()) for name in type_names(types)}


def average(values: np.ndarray, types: list[str]) -> float:
    """The benchmark's figure: the mean of the types' scores, in percent."""
    return float(np.mean(list(type_scores(values, types).values())))


def interval(values: np.ndarray, types: list[str]) -> tuple[float, float]:
    """The 95% interval of `average`: a seeded bootstrap over pairs, drawn within each type; in percentage points.

    `values` is one number a pair: right or wrong, or the change between two CLIPs (-1, 0 or 1).
    """
    rng = np.random.default_rng(0)
    groups = [values[np.array(types) == name].astype(float) for name in type_names(types)]
    means = [rng.choice(group, (10_000, len(group))).mean(1) for group in groups]
    low, high = np.percentile(100 * np.mean(means, axis=0), [2.5, 97.5]).round(6) + 0.0  # no -0.0
    return float(low), float(high)


def mcnemar(won: int, lost: int) -> float:
    """The exact two-sided McNemar p-value: `won` pairs against `lost` ones, were each as likely as the other."""
    n, k = won + lost, min(won, lost)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def scores(rights: Rights, types: list[str]) -> dict[str, dict]:
    """A CLIP's scores for each embedding: the average, its interval (low, high), and the types'."""
    rows = {}
    for embedding, right in rights.items():
        low, high = interval(right, types)
        rows[embedding] = dict(average=average(right, types), low=low, high=high, types=type_scores(right, types))
    return rows


def paired_change(before: Rights, after: Rights, types: list[str]) -> list[dict]:
    """The paired change between two CLIPs for each embedding: points, their 95% interval, pairs won and lost, p."""
    changes = []
    for embedding, old in before.items():
        new = after[embedding]
        won, lost = int((new & ~old).sum()), int((old & ~new).sum())
        difference = new.astype(int) - old.astype(int)
        low, high = interval(difference, types)
        row = dict(embedding=embedding, points=average(difference, types), low=low, high=high)
        changes.append(row | dict(won=won, lost=lost, p=mcnemar(won, lost)))
    return changes


def table(clips: list[Rights], recipes: list[str | None], types: list[str]) -> str:
    """The scores as text: types as rows; a column for each CLIP and embedding, and for the paper's figures where known.

    `recipes` are for each CLIP the recipe that it is, if it is one: its published scores get a column.
    """
    columns = [["% right (chance: 25)", *type_names(types), "average", "95% interval"]]
    for k, (rights, recipe) in enumerate(zip(clips, recipes), start=1):
        for embedding, score in scores(rights, types).items():
            figures = [f"{value:.1f}" for value in [*score["types"].values(), score["average"]]]
            columns.append([f"{k} {embedding}", *figures, f"{score['low']:.1f}–{score['high']:.1f}"])
        if recipe in BASELINES and type_names(types) == TYPES:
            figures = [f"{value:.1f}" for value in [*BASELINES[recipe], RECIPES[recipe].published[0]]]
            columns.append([f"{k} paper", *figures, ""])
    blocks = []
    for start in range(1, len(columns), 6):  # as many as fit a terminal
        shown = [columns[0], *columns[start : start + 6]]
        widths = [max(len(cell) for cell in column) for column in shown]
        lines = []
        for i in range(len(columns[0])):
            figures = [column[i].rjust(width + 2) for column, width in zip(shown[1:], widths[1:])]
            lines.append(shown[0][i].ljust(widths[0]) + "".join(figures))
        lines.insert(-2, "-" * len(lines[0]))
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def draws_in_words(averages: list[float]) -> str:
    """What a random reading gives over its draws, and what one finds who keeps the best of k of them."""
    n, ordered = len(averages), np.sort(averages)
    if n == 1:
        return f"{averages[0]:.1f}"
    best = []
    for k in (2, 5, 10, 100):
        chances = (np.arange(1, n + 1) / n) ** k - (np.arange(n) / n) ** k  # that the best of k is the i-th
        best.append(f"{k}: {chances @ ordered:.1f}")
    return (
        f"mean of {n} draws {ordered.mean():.1f} (standard deviation {ordered.std(ddof=1):.1f}, from {ordered[0]:.1f} "
        f"to {ordered[-1]:.1f}); the best of k draws comes to {', '.join(best)} on the average"
    )


def verdict(change: dict, pairs: int) -> str:
    """What `paired_change` found for an embedding, on this many pairs, as a sentence: what it is, how much, how sure.

    A gain or a loss needs an interval that leaves out zero and p < 0.05. Without them, the sentence says the smallest
    change that would show: the outcome is inconclusive if the interval still holds it, and no effect is seen if not.
    """
    visible = smallest_visible(change["won"] + change["lost"], pairs)
    would_show = f"; with {pairs} pairs, only a change of about {visible:.1f} points or more would show"
    if change["p"] < 0.05 and not change["low"] <= 0 <= change["high"]:
        outcome, would_show = "A gain" if change["points"] > 0 else "A loss", ""
    elif visible > 100:
        outcome, would_show = "Inconclusive", f"; {pairs} pairs are too few to show any change"
    else:
        outcome = "Inconclusive" if max(-change["low"], change["high"]) >= visible else "No effect seen"
    figures = (
        "{points:+.1f} points (95% interval {low:+.1f} … {high:+.1f}; pairs won {won}, lost {lost}, exact McNemar p = "
        "{p:.2g})"
    )
    return f"{outcome} in {change['embedding']}: {figures.format(**change)}{would_show}."


def smallest_visible(changed: int, pairs: int) -> float:
    """The smallest change, in points, that p < 0.05 shows if `changed` of the pairs change."""
    changed = max(changed, 6)  # five pairs are too few: 5 won and 0 lost have p = 0.06
    lost = next(n for n in range(changed // 2, -1, -1) if mcnemar(changed - n, n) < 0.05)
    return 100 * (changed - 2 * lost) / pairs
