"""Normalised area under a trajectory of two accuracies (METHODS 11)."""

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
