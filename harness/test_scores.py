"""harness/scores.py: what a change is called in words."""

import re

import pytest

from harness.scores import mcnemar, verdict


def change(points: float, low: float, high: float, won: int, lost: int) -> dict:
    return dict(embedding="cls", points=points, low=low, high=high, won=won, lost=lost, p=mcnemar(won, lost))


@pytest.mark.parametrize(
    "before, pairs, said",
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
def test_a_change_in_words(before, pairs, said):
    assert re.match(said, verdict(before, pairs))


def test_the_change_that_would_show_is_the_smallest():
    """Of as many changed pairs, one fewer won would leave p at 0.05 or more, and this many do not."""
    for changed in (6, 13, 40):
        half = changed // 2
        said = verdict(change(0, -1, 1, half, changed - half), 135)
        net = round(float(re.search("about (.*) points", said)[1]) * 1.35)
        won = (changed + net) // 2
        assert mcnemar(won, changed - won) < 0.05 <= mcnemar(won - 1, changed - won + 1)
