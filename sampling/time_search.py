"""Time points of stochastic sampling, found one after another by a metric (Song et al. 2023, Section 6): the
search, and nothing else.

More steps give a consistency model better images where its noise levels tau_1 > tau_2 > ... are well chosen.
Song et al. choose greedily: tau_1 alone first, then tau_2 below it with tau_1 held fixed, and so on, each by
a ternary search, as if the metric had a single valley along each of them. What is searched is a list of
candidates in falling order, and what is minimized any function of a list of points.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

DEFAULT_TOLERANCE = 0.05


def log_levels(low: float, high: float, tolerance: float) -> list[float]:
    """Falling noise levels between `high` and `low`, both left out, evenly spaced in ln sigma.

    Each is at most 1 + `tolerance` times the next.

    They have six digits, to be read and typed.
    """
    count = math.ceil(math.log(high / low) / math.log1p(tolerance))
    return [float(f'{high * (low / high) ** (i / count):.6g}') for i in range(1, count)]


def find_points(
    function: Callable[[list[float]], float], candidates: Sequence[float], points: int, scan: int = 0
) -> Iterator[tuple[list[float], float]]:
    """The best points and the function's value at them: of one point, then of two of which the first stays,
    up to `points`.

    Args:
        function: to be minimized, of a list of candidates in their order.
        candidates: at least as many as `points`. Each search leaves enough of them for the points to come.
        scan: see `least`.
    """
    found, first = [], 0
    for still_to_come in reversed(range(points)):
        free = candidates[first : len(candidates) - still_to_come]
        place, value = least(lambda i: function([*found, free[i]]), len(free), scan)  # noqa: B023  (called at once)
        found, first = [*found, free[place]], first + place + 1
        yield found, value


def least(function: Callable[[int], float], count: int, scan: int = 0) -> tuple[int, float]:
    """Where a function of 0 ... count − 1 is least, and its value there; exact where it falls strictly, then
    rises strictly.

    Ternary search with its two inner points a Fibonacci number from either end of the bracket: the one that
    stays inside is an inner point again, so that a step costs one evaluation, and no method needs fewer in
    the worst case (Kiefer 1953). Nothing is evaluated twice. Where the function has several valleys the
    result is the least of what was evaluated, the first of equals.

    Args:
        scan: this many places, evenly spread, are evaluated first, and the search is between the neighbors of
            the best of them. A function with plateaus, or with a hump in the middle, would otherwise send the
            search to the wrong side.
    """
    values: dict[int, float] = {}
    start, end = -1, count  # the least lies strictly between

    def value(i: int) -> float:
        if i >= end:
            return math.inf  # the bracket is filled up to a Fibonacci number
        if i not in values:
            values[i] = function(i)
        return values[i]

    if scan:
        places = [start, *scanned(count, scan), end]
        best = places.index(min(places[1:-1], key=value))
        start, end = places[best - 1], places[best + 1]
    shorter, longer = 1, 2
    while longer < end - start:
        shorter, longer = longer, shorter + longer
    while longer > 2:
        if value(start + longer - shorter) > value(start + shorter):
            start += longer - shorter
        shorter, longer = longer - shorter, shorter
    value(start + 1)
    return min(values.items(), key=lambda item: (item[1], item[0]))


def scanned(count: int, scan: int) -> list[int]:
    """The places, of 0 ... count − 1, that are evaluated first: `scan` of them, or all."""
    scan = min(scan, count)
    return [round((k + 1) * (count + 1) / (scan + 1)) - 1 for k in range(scan)]


def most_evaluations(count: int, points: int = 1, scan: int = 0) -> int:
    """The most evaluations that `least` makes for `count` candidates; with `points`, `find_points`."""
    count -= points - 1
    scan, between = min(scan, count), count
    if scan:  # then the search is between places that are two apart
        places = [-1, *scanned(count, scan), count]
        between = max(end - start for start, end in zip(places, places[2:])) - 1
    evaluations, shorter, longer = 1, 1, 2
    while longer <= between:
        shorter, longer, evaluations = longer, shorter + longer, evaluations + 1
    return points * (scan + evaluations if scan < count else scan)
