"""Trajectories of the methods, each stored before the next begins, and the models at one of their points (METHODS 22)."""

from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sepcap.evaluation.result import ratio
from sepcap.evaluation.trajectory import area
from sepcap.learning.unlearn import Passes, counted
from sepcap.models.weights import EveryWeight
from sepcap.progress import progress
from sepcap.studies.base.folder import Pieces
from sepcap.studies.certificate.arms import REFERENCE, UNTOUCHED, Arm
from sepcap.studies.certificate.measured import Sums, measured
from sepcap.studies.unlearning.methods import METHODS, Walk, seeds_of, tried
from sepcap.studies.unlearning.plan import UnlearningPlan


@dataclass(frozen=True, eq=False)
class Trajectory:
    """What was measured along one trajectory.

    Attributes:
        walk: how it was made.
        sums: texts -> evaluation sums at every point, that of the untouched model first.
        forward, backward: tokens that passes of the method had processed by every point; evaluations are not counted.
        diverged: whether a loss was not finite, so that the last points are missing.
    """

    walk: Walk
    sums: dict[str, Float[np.ndarray, "point cluster count"]]
    forward: tuple[int, ...]
    backward: tuple[int, ...]
    diverged: bool

    def at(self, point: int) -> str:
        """Name of a point."""
        return f"{self.walk.name}@{point}"

    def held_out(self, metric: str, role: str) -> Float[np.ndarray, " point"]:
        """Accuracy on held-out collection texts at every point, relative to the untouched model."""
        values = ratio(self.sums[f"held-{role}"], metric)
        return values / values[0]

    def held_area(self, metric: str) -> float:
        """Normalised area on held-out collection texts; −∞ if the trajectory diverged."""
        if self.diverged:
            return -np.inf
        return float(area(self.held_out(metric, "forget"), self.held_out(metric, "retain")))

    def nearest(self, metric: str, role: str, level: float) -> int:
        """The point whose relative accuracy on held-out collection texts is nearest to a level; the first of equal ones."""
        return int(np.abs(self.held_out(metric, role) - level).argmin())


@contextmanager
def restored(model: Any) -> Iterator[None]:
    """The weights of a model have their bits back afterwards."""
    saved = EveryWeight(model)
    try:
        yield
    finally:
        saved.restore()


def _walked(plan: UnlearningPlan, walk: Walk, passes: Passes) -> Generator[int, None, None]:
    """Carry out a method on the model, in place; yields the number of every point."""
    with closing(METHODS[walk.method](plan, plan.model, walk)) as steps:
        for point in range(1, plan.config.steps + 1):
            with counted(plan.model, passes):
                next(steps)
            yield point


def untouched(plan: UnlearningPlan, pieces: Pieces) -> Sums:
    """Evaluation sums of the untouched model.

    Raises:
        ValueError: an accuracy of 0, which no method can lower.
    """

    def make() -> tuple[dict[str, Tensor], None]:
        return {name: torch.from_numpy(sums) for name, sums in measured(plan.certificate, plan.model).items()}, None

    found = {name: value.numpy() for name, value in pieces.once("walks/untouched", make)[0].items()}
    for name, sums in found.items():
        if not ratio(sums, plan.config.metric) > 0:
            texts = "held-out collection" if name.startswith("held") else "evaluation"
            role = name.removeprefix("held-")
            raise ValueError(f"{plan.config.metric} of the untouched model is 0 on the {texts} texts of {role}: there is nothing to lose")
    return found


def _measure(plan: UnlearningPlan, whole: Sums, walk: Walk) -> tuple[dict[str, Tensor], dict[str, Any]]:
    passes, found = Passes(), [whole]
    note: dict[str, Any] = {"forward": [0], "backward": [0], "diverged": False}
    with restored(plan.model), closing(_walked(plan, walk, passes)) as points:  # an interrupt restores the model at once
        try:
            for _ in points:
                found.append(measured(plan.certificate, plan.model))
                note["forward"].append(passes.forward)
                note["backward"].append(passes.backward)
        except FloatingPointError:
            note["diverged"] = True
            note["forward"][-1], note["backward"][-1] = passes.forward, passes.backward  # what the lost part cost belongs to the rest
    return {f"sums/{name}": torch.from_numpy(np.stack([sums[name] for sums in found])) for name in found[0]}, note


def trajectory(plan: UnlearningPlan, pieces: Pieces, whole: Sums, walk: Walk) -> Trajectory:
    """A trajectory as it is stored, or measured now; it begins with the sums of the untouched model."""
    tensors, note = pieces.once(f"walks/{walk.name}", partial(_measure, plan, whole, walk))
    sums = {name.removeprefix("sums/"): value.numpy() for name, value in tensors.items()}
    return Trajectory(walk, sums, tuple(note["forward"]), tuple(note["backward"]), note["diverged"])


def trajectories(plan: UnlearningPlan, pieces: Pieces) -> tuple[dict[str, list[Trajectory]], list[dict[str, Any]]]:
    """The trajectories of all methods, with the learning rate that has the largest area on held-out texts.

    Returns:
        Method -> trajectory of every seed, and one row per trajectory that was measured.

    Raises:
        ValueError: the untouched model has an accuracy of 0.
        FloatingPointError: every learning rate of a method diverges, or the kept one with another seed.
    """
    c, whole = plan.config, untouched(plan, pieces)
    found: dict[str, list[Trajectory]] = {}
    rows = []
    with progress(total=len(c.methods), desc="compare unlearning", unit="method") as bar:
        for method in c.methods:
            options = [trajectory(plan, pieces, whole, walk) for walk in tried(c, method)]
            best = max(options, key=lambda each: each.held_area(c.metric))
            others = [Walk(method, seed, best.walk.lr, best.walk.beta) for seed in seeds_of(c, method)[1:]]
            found[method] = [best, *(trajectory(plan, pieces, whole, walk) for walk in others)]
            for each in found[method]:
                if each.diverged:
                    raise FloatingPointError(
                        f"{method}: the loss of seed {each.walk.seed} is NaN or infinite at lr={each.walk.lr}, the best of lrs={c.lrs}; "
                        "give smaller ones, or load the model with dtype='float32'"
                    )
            rows += [_row(c.metric, each, each is best) for each in options] + [_row(c.metric, each, True) for each in found[method][1:]]
            bar.update()
    return found, rows


def _row(metric: str, each: Trajectory, kept: bool) -> dict[str, Any]:
    walk = each.walk
    setting = {"lr": np.nan if walk.lr is None else walk.lr, "beta": np.nan if walk.beta is None else walk.beta}
    passes = {"forward_tokens": each.forward[-1], "backward_tokens": each.backward[-1]}
    held = np.nan if each.diverged else each.held_area(metric)
    return {"method": walk.method, "seed": walk.seed, **setting, "held_out_area": held, "diverged": each.diverged, "kept": kept, **passes}


class States:
    """The models of a comparison as a certificate takes them: untouched, and at one point of every trajectory.

    Args:
        plan: the plan.
        pieces: keeps the weights that a method changed.
        found: method -> trajectory of every seed.
    """

    def __init__(self, plan: UnlearningPlan, pieces: Pieces, found: dict[str, list[Trajectory]]) -> None:
        self.plan, self.pieces, self.found = plan, pieces, found

    @property
    def kinds(self) -> list[str]:
        """Untouched, and the methods."""
        return [UNTOUCHED, *self.found]

    def seeded(self, kind: str) -> bool:
        """Whether a method has a trajectory per seed."""
        return len(self.found.get(kind, ())) > 1

    def trajectory(self, kind: str, seed: int) -> Trajectory:
        """The trajectory of a method and seed; that of the first seed if all are the same."""
        of_kind = self.found[kind]
        return of_kind[self.plan.config.seeds.index(seed)] if self.seeded(kind) else of_kind[0]

    def point(self, kind: str, seed: int) -> int:
        """Number of the point at which a method is tested."""
        c = self.plan.config
        return self.trajectory(kind, seed).nearest(c.metric, c.match, c.level)

    @contextmanager
    def made(self, arm: Arm) -> Iterator[Any]:
        """The model of an arm; its weights have their bits back afterwards."""
        model = self.plan.reference if arm.kind == REFERENCE else self.plan.model
        changed = {} if arm.kind in (REFERENCE, UNTOUCHED) else self._changed(arm)
        with restored(model):
            weights = list(dict.fromkeys(model.parameters()))
            with torch.no_grad():
                for number, values in changed.items():
                    weights[int(number)].copy_(values)
            yield model

    def _changed(self, arm: Arm) -> dict[str, Tensor]:
        """The weights that differ from the untouched model at the point, by their number among all weights."""
        walk, last = self.trajectory(arm.kind, arm.seed).walk, self.point(arm.kind, arm.seed)

        def make() -> tuple[dict[str, Tensor], dict[str, int]]:
            weights = list(dict.fromkeys(self.plan.model.parameters()))
            before = [weight.detach().clone() for weight in weights]
            with restored(self.plan.model), closing(_walked(self.plan, walk, Passes())) as points:
                if last:
                    next(point for point in points if point == last)
                now = enumerate(zip(weights, before, strict=True))
                changed = {str(i): new.detach().cpu().clone() for i, (new, old) in now if not torch.equal(new, old)}
            return changed or {"0": before[0].cpu()}, {"point": last}

        return self.pieces.once(f"states/{walk.name}-{last}", make)[0]
