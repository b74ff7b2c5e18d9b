"""Who follows a pruning run step by step: a file of JSON lines, Weights & Biases, or an object of the user's own.

A tracker is no part of a run: the folder holds everything without it, and a run may go on with other trackers than it began with.
Whatever a tracker has not got yet, because the process was killed or the tracker is new, it is given from the records of the run.
"""

import contextlib
import json
import logging
import math
import os
import uuid
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from sepcap.checks import warn
from sepcap.errors import CorruptFile, missing_extra, unknown
from sepcap.experiments.run import Run
from sepcap.schemas import Kept
from sepcap.storage import open_regular, output_path, read_json, write_json

log = logging.getLogger("sepcap.experiments.pruning")  # what goes into the run's own run.log

LINES = "metrics.jsonl"
"""The file of `JsonLines` in the folder of a run."""

WANDB = "wandb.json"
"""What `WandB` keeps in the folder of a run: the id there, and the last step of the last session that was ended."""


@runtime_checkable
class Tracker(Protocol):
    """Base of all trackers; only `log` has to be written. An object of another class that has all four methods serves as well.

    Calls come in this order: `held`, `start`, `log` for every step from the first that is not held, `finish` (also when the run was
    interrupted). A tracker that raises an error loses the rest of this call, with a warning, and never the run.

    Example:
        >>> import sepcap
        >>> class Printed(sepcap.Tracker):
        ...     def log(self, step, values):
        ...         print(step, values["forget/top1"])
        >>> sepcap.prune(model, config, out="runs/first", tracker=("jsonl", Printed()))  # doctest: +SKIP
    """

    def held(self, run: Run) -> int:
        """The last step of this run that the tracker has; −1 for none, and then it is given all of them. Nothing is changed."""
        return -1

    def start(self, run: Run) -> None:
        """Begin to follow a run, or take it up again. `run.config` is its configuration, `run.folder` its place."""
        return

    @abstractmethod
    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take down one step, `values` as `values_of` gives them."""
        ...

    def finish(self) -> None:
        """Let go of the run, finished or not."""
        return


class JsonLines(Tracker):
    """One line of JSON per step in `metrics.jsonl` in the folder of the run, flushed before the next step begins.

    Read it with `pandas.read_json(path, lines=True)`. A number that JSON has not (infinite, or none) is null.
    """

    def held(self, run: Run) -> int:
        """The last step up to which every line is whole and in its place, and the run still has the step."""
        return len(_whole_lines(run)) - 1

    def start(self, run: Run) -> None:
        """Open the file behind its last whole line: what a killed process left of another, and steps that are made again, go."""
        self._file = output_path(run.folder / LINES).open("ab")
        end = sum(map(len, _whole_lines(run)))
        if self._file.tell() > end:
            self._file.truncate(end)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the line of a step."""
        self._file.write(_line(step, values))
        self._file.flush()

    def finish(self) -> None:
        """Close the file."""
        self._file.close()


def _whole_lines(run: Run) -> list[bytes]:
    """The lines that are those of the steps, up to the first that is not."""
    path, found = run.folder / LINES, []
    if not os.path.lexists(path):
        return found
    with open_regular(path, "metrics") as file:
        for step in range(run.steps_done + 1):
            line = _line(step, values_of(run.record(step)))
            if file.readline(len(line) + 1) != line:
                break
            found.append(line)
    return found


def _line(step: int, values: Mapping[str, float]) -> bytes:
    finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
    return json.dumps({"step": step, **finite}, allow_nan=False).encode() + b"\n"


class WandB(Tracker):
    """Weights & Biases (extra `wandb`), as its own settings and environment variables say: WANDB_MODE=offline keeps it to this machine.

    A run that goes on has the same id there, which is kept in `wandb.json` in the folder; wandb's own files lie in `wandb` beside it.
    Offline, every call leaves a folder of its own, which `wandb sync` joins by that id. wandb keeps steps in memory before it writes or
    sends them, and says that they have arrived only when a session is ended: after a kill, all steps since the last session that was
    ended are sent again. What had arrived of them is then there twice, with the same number and the same values.

    Args:
        project: default is WANDB_PROJECT, or else "sepcap".
        options: further arguments of `wandb.init`, such as entity, group, tags or mode.

    Raises:
        ImportError: wandb is not installed.
    """

    def __init__(self, project: str | None = None, **options: Any) -> None:
        try:
            import wandb
        except ImportError as error:
            raise missing_extra("wandb", "wandb", "Tracking with Weights & Biases") from error
        self._wandb = wandb
        self._options = {"project": project or os.environ.get("WANDB_PROJECT", "sepcap"), **options}

    def held(self, run: Run) -> int:
        """The last step of the last session that was ended: what was sent later may be lost, if the process was killed."""
        kept = _kept(run)
        return min(kept["held"], run.steps_done) if kept else -1

    def start(self, run: Run) -> None:
        """Begin a run there, or take up the one that this run was."""
        self._run, self._last = run, self.held(run)
        kept = _kept(run)
        self._id = kept["id"] if kept else uuid.uuid4().hex[:8]
        # the lists of documents are long, and in the folder; what is printed here is no part of the run
        config = {name: value for name, value in run.config.items() if name != "documents"}
        options = {"id": self._id, "name": run.folder.name, "config": config, "resume": "allow", "reinit": "create_new"}
        options |= {"dir": os.environ.get("WANDB_DIR", str(run.folder)), "settings": self._wandb.Settings(console="off")}
        self._there = self._wandb.init(**{**options, **self._options})
        self._mark()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send a step."""
        self._there.log(dict(values), step=step)
        self._last = step

    def finish(self) -> None:
        """Wait until everything has arrived; only then is it held."""
        self._there.finish(exit_code=0 if self._run.finished else 1)
        self._mark()

    def _mark(self) -> None:
        write_json(self._run.folder / WANDB, {"id": self._id, "held": self._last})


def _kept(run: Run) -> dict[str, Any] | None:
    path = run.folder / WANDB
    if not os.path.lexists(path):
        return None
    try:
        return read_json(path, Kept)
    except CorruptFile as error:
        raise CorruptFile(f"{error}. Delete it, and the run gets a new id and is sent from its first step on") from error


TRACKERS: dict[str, Callable[[], Tracker]] = {"jsonl": JsonLines, "wandb": WandB}
"""Name of a tracker -> what makes one; "none" stands for no tracker at all."""

METHODS = ("held", "start", "log", "finish")
"""What every tracker has."""

Trackers = str | Tracker | Sequence[str | Tracker] | None
"""One tracker, several, or none, each by its name or as an object."""


def trackers_of(chosen: Any) -> tuple[Tracker, ...]:
    """The trackers of a choice.

    Args:
        chosen: "jsonl", "wandb", "none", a Tracker or another object with its methods, or several of them.

    Raises:
        ValueError: a name that is not known.
        TypeError: what is no tracker, such as the class of one instead of an object.
        ImportError: the package of a tracker is not installed.

    Example:
        >>> trackers_of(("jsonl", WandB(project="pruning", tags=["first"])))  # doctest: +SKIP
    """
    if chosen is None:
        return ()
    made = []
    for one in chosen if isinstance(chosen, Iterable) and not isinstance(chosen, str | Tracker) else [chosen]:
        if isinstance(one, str):
            if one not in (*TRACKERS, "none"):
                raise unknown("tracker", one, [*TRACKERS, "none"], "Or give an object with the methods of a sepcap.Tracker.")
            made += [TRACKERS[one]()] if one in TRACKERS else []
        elif isinstance(one, type):
            raise TypeError(f"tracker={one.__name__} is a class; give an object of it: tracker={one.__name__}()")
        elif isinstance(one, Tracker):
            made.append(one)
        else:
            lacks = ", ".join(name for name in METHODS if not callable(getattr(one, name, None)))
            raise TypeError(
                f"tracker={one!r} is a {type(one).__name__}, which lacks {lacks}; give {', '.join(map(repr, TRACKERS))}, 'none', "
                "or an object of a class that inherits from sepcap.Tracker and has a method log(step, values)"
            )
    return tuple(made)


def values_of(record: Mapping[str, Any]) -> dict[str, float]:
    """What a tracker is told of a step: every metric as `role/metric`, neurons gone as `gone/site`, thresholds, seconds and tokens."""
    values = {f"{role}/{name}": float(value) for role, task in record["tasks"].items() for name, value in task["metrics"].items()}
    values |= {f"gone/{site}": float(sum(layers)) for site, layers in record["gone_per_layer"].items()}
    values |= {f"threshold/{name}": float(value) for name, value in record["thresholds"].items()}
    return values | {"seconds": float(record["seconds"]), "tokens": float(record["tokens"])}


def are_behind(run: Run, trackers: Sequence[Tracker]) -> bool:
    """Whether some tracker lacks steps that are on disk; one that cannot say is asked again when it is given them."""
    for tracker in trackers:
        try:
            if tracker.held(run) < run.steps_done:
                return True
        except Exception:  # whatever it is, `Followers` says it
            return True
    return False


class Followers:
    """The trackers of a run while steps are added to it."""

    def __init__(self, run: Run, trackers: Sequence[Tracker]) -> None:
        self._run = run
        self._left: list[Tracker] = []
        self._told: dict[int, int] = {}  # by identity: a tracker of the user's own need not be hashable
        for tracker in trackers:
            with self._guarded(tracker):
                held = tracker.held(run)
                tracker.start(run)
                self._told[id(tracker)] = held
                self._left.append(tracker)
        self.update()

    def update(self) -> None:
        """Tell all of the steps on disk that they lack."""
        done = self._run.steps_done
        for tracker in tuple(self._left):
            with self._guarded(tracker):
                for step in range(self._told[id(tracker)] + 1, done + 1):
                    tracker.log(step, values_of(self._run.record(step)))
                    self._told[id(tracker)] = step

    def finish(self) -> None:
        """Let all go."""
        self.update()
        for tracker in tuple(self._left):
            with self._guarded(tracker):
                tracker.finish()

    @contextlib.contextmanager
    def _guarded(self, tracker: Tracker) -> Iterator[None]:
        """Hours of computing are worth more than what somebody wanted to be told of them."""
        try:
            yield
        except Exception as error:  # trackers are foreign code
            self._left = [other for other in self._left if other is not tracker]
            said = f"{type(tracker).__name__} stopped following the run in {self._run.folder} ({type(error).__name__}: {error})"
            log.warning(said)
            warn(f"{said}; the run goes on, and the same call gives the tracker what it lacks")


@contextlib.contextmanager
def followed(run: Run, trackers: Sequence[Tracker]) -> Iterator[Followers]:
    """Trackers that are let go of in the end, however it comes."""
    followers = Followers(run, trackers)
    try:
        yield followers
    finally:
        followers.finish()
