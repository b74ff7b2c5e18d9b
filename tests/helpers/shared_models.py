"""What a model that several tests share must still be after each of them: weights, hooks, mode, gradients."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from transformer_lens.hook_points import HookPoint

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def models_in(value: Any, depth: int = 2) -> Iterator[torch.nn.Module]:
    """The models that a fixture gives: itself, or in a list, a dictionary or a dataclass."""
    if isinstance(value, torch.nn.Module):
        yield value
    elif depth and isinstance(value, list | tuple | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from models_in(part, depth - 1)
    elif depth and is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from models_in(getattr(value, field.name, None), depth - 1)


class Snapshot:
    """A model as it is now."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.weights = {name: value.detach().clone() for name, value in self._tensors()}
        self.marks = self._marks()

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.model.named_parameters()
        yield from self.model.named_buffers()

    def _marks(self) -> dict[str, Any]:
        modules = {
            f"{name or 'the model'}: {what}": _hooks(module, what) for name, module in self.model.named_modules() for what in HOOKS
        }
        modes = {f"{name or 'the model'}: training": module.training for name, module in self.model.named_modules()}
        return modules | modes | {f"{name}: requires_grad": value.requires_grad for name, value in self.model.named_parameters()}

    def changes(self) -> list[str]:
        """What is no longer as it was."""
        now, marks = dict(self._tensors()), self._marks()
        moved = [
            name
            for name in self.weights.keys() | now.keys()
            if name not in now or name not in self.weights or not _same(self.weights[name], now[name])
        ]
        return sorted(moved) + [f"{mark} {was} -> {marks.get(mark)}" for mark, was in self.marks.items() if marks.get(mark) != was]


def _hooks(module: torch.nn.Module, what: str) -> int:
    """How many hooks stand there. A bridge hooks its norms at its first pass and keeps these; on hook points they are somebody's."""
    found = getattr(module, what).values()
    return sum(isinstance(module, HookPoint) or not str(hook.__module__).startswith("transformer_lens.") for hook in found)


def _same(before: torch.Tensor, after: torch.Tensor) -> bool:
    return before.shape == after.shape and bool(torch.equal(before.nan_to_num(7.0), after.detach().nan_to_num(7.0)))


class Watched:
    """The models of the fixtures that live longer than a test, by the name of the fixture."""

    def __init__(self) -> None:
        self.snapshots: dict[str, list[Snapshot]] = {}

    def add(self, name: str, value: Any) -> None:
        """A fixture was made: in the place of what had its name before."""
        self.snapshots[name] = [Snapshot(model) for model in models_in(value)]

    def check(self, names: list[str]) -> None:
        """Fail where a model of these fixtures has changed; the next test is not blamed for it."""
        for name in names:
            for i, snapshot in enumerate(self.snapshots.get(name, ())):
                if changes := snapshot.changes():
                    self.snapshots[name][i] = Snapshot(snapshot.model)
                    raise AssertionError(f"this test changed the model of {name!r}, which other tests use too: {', '.join(changes[:5])}")
