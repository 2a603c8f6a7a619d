"""Greedy search for the noise levels of stochastic sampling (Song et al. 2023, Section 6).

More steps improve the images of a consistency model if their noise levels tau_1 > tau_2 > ... are well
chosen. Song et al. search tau_1 first, then tau_2 below it with tau_1 fixed, and so on, each by a ternary
search, which assumes that the metric has a single valley along each. Here, the levels come from a list of
candidates in descending order, and the metric is any function of a list of levels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

DEFAULT_TOLERANCE = 0.05  # relative distance between neighboring candidates


def log_levels(low: float, high: float, tolerance: float) -> list[float]:
    """Descending noise levels between `high` and `low`, both excluded, evenly spaced in ln sigma.

    Each is at most 1 + `tolerance` times the next, and has six digits, so that it can be typed.
    """
    count = math.ceil(math.log(high / low) / math.log1p(tolerance))
    return [float(f'{high * (low / high) ** (i / count):.6g}') for i in range(1, count)]


def find_points(
    function: Callable[[list[float]], float], candidates: Sequence[float], points: int, scan: int = 0
) -> Iterator[tuple[list[float], float]]:
    """Yield the best points and the function's value at them, for 1 to `points` points; earlier ones stay.

    Args:
        function: function to minimize, of a list of candidates in their order.
        candidates: at least as many as `points`.
        scan: see `least`.
    """
    found, first = [], 0
    for remaining in reversed(range(points)):
        # Leave enough candidates for the remaining points.
        free = candidates[first : len(candidates) - remaining]
        with_one_more = lambda i, found=found, free=free: function([*found, free[i]])
        place, value = least(with_one_more, len(free), scan)
        found, first = [*found, free[place]], first + place + 1
        yield found, value


def least(function: Callable[[int], float], count: int, scan: int = 0) -> tuple[int, float]:
    """(argmin, minimum) of a function of 0 ... count − 1; exact if it falls strictly, then rises strictly.

    Ternary search whose two inner points are a Fibonacci number from either end of the bracket: one of them
    is an inner point of the next bracket, so a step costs one evaluation, and no method needs fewer in the
    worst case (Kiefer 1953). Nothing is evaluated twice. With several valleys, the result is the least of the
    evaluated values, the first if equal.

    Args:
        scan: evaluate this many evenly spread places first, and search between the neighbors of the best.
            Plateaus, or a hump in the middle, would otherwise send the search to the wrong side.
    """
    values: dict[int, float] = {}
    start, end = -1, count  # the minimum is strictly between

    def value(i: int) -> float:
        if i >= end:
            return math.inf  # the bracket is filled up to a Fibonacci number
        if i not in values:
            values[i] = function(i)
        return values[i]

    # Narrow the bracket by the scan, to the neighbors of its best place.
    if scan:
        places = [start, *scanned(count, scan), end]
        best = places.index(min(places[1:-1], key=value))
        start, end = places[best - 1], places[best + 1]

    # Extend it to a Fibonacci number, then shorten it by one Fibonacci number after another.
    shorter, longer = 1, 2
    while longer < end - start:
        shorter, longer = longer, shorter + longer
    while longer > 2:
        # Compare the two inner points, and keep the part that the smaller one is in.
        if value(start + longer - shorter) > value(start + shorter):
            start += longer - shorter
        shorter, longer = longer - shorter, shorter
    # The last place inside the bracket, which may not have been evaluated.
    value(start + 1)
    return min(values.items(), key=lambda item: (item[1], item[0]))


def scanned(count: int, scan: int) -> list[int]:
    """Evenly spread places of 0 ... count − 1 to evaluate first: `scan` of them, or all."""
    scan = min(scan, count)
    return [round((k + 1) * (count + 1) / (scan + 1)) - 1 for k in range(scan)]


def most_evaluations(count: int, points: int = 1, scan: int = 0) -> int:
    """Upper bound on the evaluations of `find_points` (`least`, for one point) among `count` candidates."""
    # The scan leaves a bracket between places that are two apart.
    # Every point but the last leaves candidates for those after it.
    count -= points - 1
    scan, between = min(scan, count), count
    if scan:
        places = [-1, *scanned(count, scan), count]
        between = max(end - start for start, end in zip(places, places[2:])) - 1

    # Then each Fibonacci number costs one evaluation.
    evaluations, shorter, longer = 1, 1, 2
    while longer <= between:
        shorter, longer, evaluations = longer, shorter + longer, evaluations + 1
    return points * (scan + evaluations if scan < count else scan)
