"""harness/scores.py: the bootstrap, and the sentences about scores."""

import re

import numpy as np
import pytest

from harness.scores import bootstrap_means, draws_in_words, mcnemar, percentile_interval, verdict


@pytest.mark.parametrize("shape", [(), (3, 2)])
def test_the_bootstrap_draws_with_replacement(shape):
    """Compared with drawing indices: the mean, its standard deviation and its 95% interval."""
    outcomes = np.random.default_rng(0).integers(0, 3, (60, *shape))
    drawn = outcomes[np.random.default_rng(1).integers(60, size=(10_000, 60))].mean(1)
    means = bootstrap_means(outcomes, np.random.default_rng(2))
    assert means.shape == drawn.shape == (10_000, *shape)
    for statistic in (np.mean, np.std):
        np.testing.assert_allclose(statistic(means, axis=0), statistic(drawn, axis=0), atol=0.01)
    low, high = percentile_interval(means.reshape(10_000, -1)[:, 0])
    assert [low, high] == pytest.approx(np.quantile(drawn.reshape(10_000, -1)[:, 0], [0.025, 0.975]), abs=0.03)


def test_draws_in_words():
    averages = list(np.random.default_rng(0).normal(30, 2, 100))
    figures = [float(figure) for figure in re.findall(r"\d+\.\d", draws_in_words(averages))]
    expected = [np.mean(averages), np.std(averages, ddof=1), min(averages), max(averages)]
    assert figures == pytest.approx(expected, abs=0.06)
    assert draws_in_words(averages[:1]) == f"{averages[0]:.1f}"


def change(points: float, low: float, high: float, won: int, lost: int) -> dict:
    return dict(embedding="cls", points=points, low=low, high=high, won=won, lost=lost, p=mcnemar(won, lost))


@pytest.mark.parametrize(
    "row, pairs, sentence",
    [
        (change(0, 0, 0, 0, 0), 135, "No effect seen in cls: .*; with 135 pairs, only a change of about 4.4 points or"),
        (change(0.7, -4.4, 5.9, 7, 6), 135, "No effect seen in cls: .*p = 1.; with .* about 6.7 points"),
        (change(4.4, 0, 8.9, 6, 0), 135, "Inconclusive in cls: .*p = 0.031.; with 135 pairs, .* about 4.4 points"),
        (change(-8.1, -16.3, 0, 10, 21), 135, "Inconclusive in cls: -8.1 points .* about 9.6 points"),
        (change(6.7, 1.5, 11.9, 14, 5), 135, "Inconclusive in cls: .*p = 0.064"),
        (change(7.4, 1.5, 11.9, 15, 5), 135, r"A gain in cls: \+7.4 points .95% interval \+1.5 … \+11.9; pairs won"),
        (change(7.4, 1.5, 11.9, 15, 5), 135, "A gain in cls: .* won 15, lost 5, exact McNemar p = 0.041..$"),
        (change(-7.4, -11.9, -1.5, 5, 15), 135, "A loss in cls: -7.4 points [^;]*; [^;]*$"),
        (change(25, 0, 75, 1, 0), 4, "Inconclusive in cls: .*; 4 pairs are too few to show any change.$"),
    ],
)
def test_a_change_in_words(row, pairs, sentence):
    assert re.match(sentence, verdict(row, pairs))


def test_the_change_that_would_show_is_the_smallest():
    """With this many changed pairs, winning one pair fewer would leave p at 0.05 or more."""
    for changed in (6, 13, 40):
        half = changed // 2
        sentence = verdict(change(0, -1, 1, half, changed - half), 135)
        net = round(float(re.search("about (.*) points", sentence)[1]) * 1.35)
        won = (changed + net) // 2
        assert mcnemar(won, changed - won) < 0.05 <= mcnemar(won - 1, changed - won + 1)
