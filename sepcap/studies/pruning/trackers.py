"""Trackers: where the metrics of every step are sent while a run is made: a file of JSON lines, Weights & Biases, any function.

A tracker is not part of a run. The folder is complete without it, and a run can resume with other trackers.
"""

import contextlib
import importlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from sepcap.errors import missing_extra, unknown, warn
from sepcap.storage import digest_of, open_regular, output_path
from sepcap.studies.pruning.on_disk.run_folder import RunFolder

log = logging.getLogger("sepcap.studies.pruning.prune")  # the logger that is written to run.log of the run

LINES = "metrics.jsonl"
"""File of JSON lines in the folder of a run."""

NAMES = ("jsonl", "wandb", "none")

Callback = Callable[[int, Mapping[str, float]], Any]
"""Receives the number and the values (`values_of`) of every step that the call makes."""

Trackers = str | Callback | Sequence[str | Callback] | None
"""One tracker, several, or none, each by its name or as a function."""


def trackers_of(chosen: Any) -> tuple[str | Callback, ...]:
    """The trackers of a choice.

    Args:
        chosen: "jsonl", "wandb", "none", a function of a step and its values, or several of them.

    Raises:
        ValueError: an unknown name.
        TypeError: something that cannot be called.
        ImportError: wandb is not installed.

    Example:
        >>> trackers_of(["jsonl", print])
        ('jsonl', <built-in function print>)
    """
    listed = [] if chosen is None else [chosen] if isinstance(chosen, str) or not isinstance(chosen, Iterable) else list(chosen)
    for one in listed:
        if isinstance(one, str) and one not in NAMES:
            raise unknown("tracker", one, NAMES, "Or give a function of the step and its values.")
        if not isinstance(one, str) and not callable(one):
            raise TypeError(f"tracker={one!r} is a {type(one).__name__}; give {', '.join(map(repr, NAMES))}, or a function (step, values)")
    if "wandb" in listed:
        try:
            importlib.import_module("wandb")
        except ImportError as error:
            raise missing_extra("wandb", "wandb", "Tracking with Weights & Biases") from error
    return tuple(one for one in listed if one != "none")


def values_of(record: Mapping[str, Any]) -> dict[str, float]:
    """What a tracker receives of a step: every metric as `role/metric`, pruned neurons as `pruned/site`, thresholds, seconds and tokens."""
    values = {f"{role}/{name}": float(value) for role, task in record["tasks"].items() for name, value in task["metrics"].items()}
    values |= {f"pruned/{site}": float(sum(layers)) for site, layers in record["pruned_per_layer"].items()}
    values |= {f"threshold/{name}": float(value) for name, value in record["thresholds"].items()}
    return values | {"seconds": float(record["seconds"]), "tokens": float(record["tokens"])}


def lines_are_behind(run: RunFolder) -> bool:
    """Whether `metrics.jsonl` lacks a line of a step on disk, or has a different one."""
    return len(_right_lines(run)) <= run.steps_done


def write_lines(run: RunFolder) -> None:
    """Bring `metrics.jsonl` up to the steps on disk: one line of JSON per step.

    Right lines stay; a line that a killed process left unfinished, or that is of a step made again, is replaced. A number that JSON does
    not have (infinite, NaN) is null. Read the file with `pandas.read_json(path, lines=True)`.
    """
    right = _right_lines(run)
    with output_path(run.folder / LINES).open("ab") as file:
        end = sum(map(len, right))
        if file.tell() > end:
            file.truncate(end)
        file.writelines(_line(step, run) for step in range(len(right), run.steps_done + 1))


def _right_lines(run: RunFolder) -> list[bytes]:
    """The lines that are those of the steps, up to the first that is not."""
    path, found = run.folder / LINES, []
    if not os.path.lexists(path):
        return found
    with open_regular(path, "file of metrics") as file:
        for step in range(run.steps_done + 1):
            line = _line(step, run)
            if file.readline(len(line) + 1) != line:
                break
            found.append(line)
    return found


def _line(step: int, run: RunFolder) -> bytes:
    finite = {name: value if math.isfinite(value) else None for name, value in values_of(run.record(step)).items()}
    return json.dumps({"step": step, **finite}, allow_nan=False).encode() + b"\n"


def _wandb_run(run: RunFolder) -> Any:
    """A run of Weights & Biases, or the one that this run had before it was interrupted.

    Its settings and environment variables decide where it is sent: WANDB_MODE=offline keeps it on this machine, WANDB_PROJECT names the
    project. For other options, pass a function that logs to a run of your own.
    """
    import wandb

    return wandb.init(
        project=os.environ.get("WANDB_PROJECT", "sepcap"),
        id=digest_of({"run": run.identity, "created": run.config.get("created")}),
        name=run.folder.name,
        config={name: value for name, value in run.config.items() if name != "documents"},  # the lists of documents are long
        dir=os.environ.get("WANDB_DIR", str(run.folder)),
        resume="allow",
        reinit="create_new",
        settings=wandb.Settings(console="off"),
    )


@contextlib.contextmanager
def tracked(run: RunFolder, trackers: Sequence[str | Callback]) -> Iterator[Callable[[int], None]]:
    """A function that sends a step to all trackers. One that raises an error is dropped with a warning, and the run continues."""
    active: dict[str, Callback] = {}
    session: Any = None

    def guarded(name: str, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except Exception as error:  # trackers are foreign code, and a run takes hours
            active.pop(name, None)
            said = f"the tracker {name} is dropped from the run in {run.folder} ({type(error).__name__}: {error})"
            log.warning(said)
            warn(f"{said}; the run continues")

    for number, tracker in enumerate(trackers):
        if tracker == "jsonl":
            active["jsonl"] = lambda step, values: write_lines(run)
            guarded("jsonl", partial(write_lines, run))  # steps that an interrupted call, or one with other trackers, left without a line
        elif isinstance(tracker, str):
            session = guarded("wandb", partial(_wandb_run, run))
            if session is not None:
                active["wandb"] = lambda step, values, session=session: session.log(dict(values), step=step)
        else:
            name = getattr(tracker, "__name__", type(tracker).__name__)
            active[name if name not in active else f"{name} ({number})"] = tracker

    def send(step: int) -> None:
        values = values_of(run.record(step))
        for name, callback in tuple(active.items()):
            guarded(name, partial(callback, step, values))

    try:
        yield send
    finally:
        if "jsonl" in active:  # an interrupt can come between a step and its line
            guarded("jsonl", partial(write_lines, run))
        if session is not None:
            guarded("wandb", lambda: session.finish(exit_code=0 if run.finished else 1))
