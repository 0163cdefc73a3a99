"""Scores with their intervals, and the paired change between two CLIPs with its p-value and a verdict in words.

`Rights` are a CLIP's outcomes: for each embedding of the image, which pairs are right, (pairs,) bool. `types` are the
pairs' types. Scores are in percent, changes in points.
"""

from __future__ import annotations

import math

import numpy as np

from harness.recipes import BASELINES, RECIPES, TYPES

Rights = dict[str, np.ndarray]


def type_names(types: list[str]) -> list[str]:
    """The types in use: the paper's nine in its order, then others in order of appearance."""
    return [t for t in TYPES if t in types] + [t for t in dict.fromkeys(types) if t not in TYPES]


def type_scores(values: np.ndarray, types: list[str]) -> dict[str, float]:
    """The mean of `values` (pairs,) within each type, in percent."""
    return {name: 100 * float(values[np.array(types) == name].mean()) for name in type_names(types)}


def average(values: np.ndarray, types: list[str]) -> float:
    """The benchmark's score: the mean over types, in percent."""
    return float(np.mean(list(type_scores(values, types).values())))


def bootstrap_means(outcomes: np.ndarray, rng: np.random.Generator, draws: int = 10_000) -> np.ndarray:
    """Bootstrap means of `outcomes` (n, ...), each of n outcomes drawn with replacement: (draws, ...).

    Draws a count for each distinct outcome, so memory grows with the number of distinct outcomes, not with n.
    """
    distinct, counts = np.unique(outcomes, axis=0, return_counts=True)
    times = rng.multinomial(len(outcomes), counts / len(outcomes), draws)  # (draws, distinct)
    return np.tensordot(times / len(outcomes), distinct, 1)


def percentile_interval(samples: np.ndarray) -> tuple[float, float]:
    """The middle 95% of bootstrap samples (draws,): the 2.5th and 97.5th percentiles."""
    low, high = np.percentile(samples, [2.5, 97.5]).round(6) + 0.0  # no -0.0
    return float(low), float(high)


def interval(values: np.ndarray, types: list[str]) -> tuple[float, float]:
    """The 95% interval of `average`, by a seeded bootstrap over the pairs of each type; in points.

    `values` has one number per pair: right or wrong, or the change between two CLIPs (-1, 0 or 1).
    """
    rng = np.random.default_rng(0)
    means = [bootstrap_means(values[np.array(types) == name], rng) for name in type_names(types)]
    return percentile_interval(100 * np.mean(means, axis=0))


def mcnemar(won: int, lost: int) -> float:
    """The exact two-sided p-value of McNemar's test, for `won` and `lost` pairs."""
    n, k = won + lost, min(won, lost)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def scores(rights: Rights, types: list[str]) -> dict[str, dict]:
    """A CLIP's scores for each embedding: `average`, its interval `low` and `high`, and the scores of `types`."""
    rows = {}
    for embedding, right in rights.items():
        low, high = interval(right, types)
        rows[embedding] = dict(average=average(right, types), low=low, high=high, types=type_scores(right, types))
    return rows


def paired_change(before: Rights, after: Rights, types: list[str]) -> list[dict]:
    """The paired change between two CLIPs for each embedding: points, 95% interval, pairs won and lost, p-value."""
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
    """The scores as text: a row for each type, a column for each CLIP and embedding.

    `recipes` holds each CLIP's recipe, or None. The paper's scores for a recipe get another column.
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
    for start in range(1, len(columns), 6):  # six fit in a terminal
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
    """The average of the released embedding, with its spread if it draws patches at random."""
    if len(averages) == 1:
        return f"{averages[0]:.1f}"
    mean, deviation = np.mean(averages), np.std(averages, ddof=1)
    spread = f"standard deviation {deviation:.1f}, from {min(averages):.1f} to {max(averages):.1f}"
    return f"mean of {len(averages)} draws {mean:.1f} ({spread})"


def verdict(change: dict, pairs: int) -> str:
    """An item of `paired_change`, measured on `pairs` pairs, as a sentence.

    A gain or a loss needs p < 0.05 and an interval that excludes zero. Otherwise the sentence states the smallest
    visible change, and says "Inconclusive" if the interval reaches it, "No effect seen" if not.
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
    """The smallest change, in points, that has p < 0.05 if `changed` of the pairs change."""
    changed = max(changed, 6)  # five are too few: 5 won and 0 lost have p = 0.06
    lost = next(n for n in range(changed // 2, -1, -1) if mcnemar(changed - n, n) < 0.05)
    return 100 * (changed - 2 * lost) / pairs
