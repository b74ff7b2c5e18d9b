"""Numbers of a trajectory: the area under two accuracies (METHODS 11), and where an accuracy falls to a target (METHODS 12)."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float


def area(specific: Float[np.ndarray, "*replicate step"], general: Float[np.ndarray, "*replicate step"]) -> Float[np.ndarray, "*replicate"]:
    """Normalised area under the trajectory in the plane x = specific, y = general.

    The path starts at (0, 0), continues to the last step and follows the trajectory back to the first; the area of the
    trapezoids below it is divided by the area of the triangle below the diagonal.

    Args:
        specific, general: accuracies per step, step 0 first.

    Returns:
        1 if the two are not separable, 2 if the general one is kept to the end, 0 if the specific one is.

    >>> float(area(np.array([1.0, 0.0]), np.array([1.0, 1.0])))
    2.0
    """
    zero = np.zeros((*specific.shape[:-1], 1))
    x = np.concatenate([zero, specific[..., ::-1]], axis=-1)
    y = np.concatenate([zero, general[..., ::-1]], axis=-1)
    trapezoids = 0.5 * np.diff(x, axis=-1) * (y[..., 1:] + y[..., :-1])
    return np.asarray(trapezoids.sum(-1) / (0.5 * specific[..., 0] * general[..., 0]))


class Bracket(NamedTuple):
    """Result of a bisection.

    Attributes:
        above: a number that leaves more than the target.
        n: a number that does not, at most the tolerance above `above`; the largest possible number if the target is not reached.
        reached: whether the value at `n` is at or below the target.
        trace: (number, value) in the order of evaluation.
    """

    above: int
    n: int
    reached: bool
    trace: tuple[tuple[int, float], ...]


def bisect(value: Callable[[int], float], target: float, most: int, tolerance: int = 1) -> Bracket:
    """Find where a value falls to a target, by halving the interval between 0 and the largest number.

    Every halving preserves value(above) > target ≥ value(n). The search ends with n − above ≤ tolerance, so a crossing is between them.
    If the value rises and falls, there may be other crossings. If it never rises, this is the only one, and with tolerance 1
    `n` is the smallest number at which the target is reached.

    Args:
        value: function of a number of neurons; value(0) must be above the target.
        target: value to fall to.
        most: the largest number.
        tolerance: largest distance between the ends.

    Source: METHODS section 12.

    >>> bisect(lambda n: 1 - n / 100, 0.5, 100).n
    50
    """
    trace = [(most, value(most))]
    if trace[0][1] > target:
        return Bracket(0, most, False, tuple(trace))
    above, n = 0, most
    while n - above > tolerance:
        middle = (above + n) // 2
        trace.append((middle, value(middle)))
        if trace[-1][1] > target:
            above = middle
        else:
            n = middle
    return Bracket(above, n, True, tuple(trace))
