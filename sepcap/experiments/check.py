"""Everything that can be checked of a folder: `sepcap check`."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from sepcap.checks import checked
from sepcap.errors import CorruptFile
from sepcap.experiments.baselines import found_again
from sepcap.experiments.check_run import problems
from sepcap.experiments.generations import FILE, texts_kept
from sepcap.experiments.result import FINISHED, PAGES, own_files, read_config, study_damage
from sepcap.experiments.run import Run
from sepcap.experiments.step_files import identity_of
from sepcap.experiments.trackers import LINES, WANDB, JsonLines
from sepcap.storage import PART

BESIDE = ("config.json", "trajectory.parquet", "run.log", LINES, WANDB, FILE)
"""What a run holds that no step lists."""


@dataclass
class Checked:
    """What a check found.

    Attributes:
        folder: that was checked.
        problems: what is damaged, missing or unexpected, one sentence each.
        notes: what is right and worth saying, such as what is not finished.
    """

    folder: Path
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@checked()
def check_folder(folder: str | Path) -> Checked:
    """Compare every file of a run, a study or a comparison with what was noted when it was written.

    Args:
        folder: of the run or the study.

    Raises:
        FileNotFoundError: the folder holds neither.

    Example:
        >>> check_folder("runs/demo").problems  # doctest: +SKIP
        []
    """
    folder = Path(folder)
    found = Checked(folder)
    try:
        config = read_config(folder)
        if "study" not in config:
            _run(found)
        elif "runs" in config:
            _runs(found, config["runs"])
        else:
            _study(found)
    except (CorruptFile, IsADirectoryError) as error:
        found.problems.append(str(error))
    return found


def _run(found: Checked) -> None:
    run = Run(found.folder)
    found.problems += problems(run)
    if gap := run.gap():
        found.problems.append(gap)
    if any(str(found.folder / "steps") in problem for problem in found.problems):
        return  # what is made of the steps cannot be compared
    found.problems += [behind] if (behind := run.trajectory_damage()) else []
    try:
        if (run.folder / LINES).exists() and JsonLines().held(run) < run.steps_done:
            found.problems.append(f"{run.folder / LINES} has not the lines of the steps; the command that made the run makes it again")
        texts_kept(run)
    except (CorruptFile, OSError) as error:
        found.problems.append(str(error))
    known = {*BESIDE, *(name for step in range(run.steps_done + 1) for name in run.record(step)["files"])}
    known |= {f"steps/{step:04d}/record.json" for step in range(run.steps_done + 1)}
    known |= {"statistics/forget.safetensors", "statistics/retain.safetensors", "rotation.safetensors"} if run.steps_done < 0 else set()
    _unexpected(found, {name for name in own_files(run.folder) if not name.startswith("wandb/")} - known)
    if "matched" in run.config and found_again(run) is None:
        lost = f"the run that it is matched with ({run.config['matched']}) is not there, or is another one now"
        found.notes.append(f"{run.folder}: {lost}; whether it has as many neurons of every layer could not be compared")
    state = "finished" if run.finished else f"not finished: {max(0, run.steps_done)} of {run.config['steps']} steps"
    found.notes.append(f"{run.folder}: run, {state}")


def _unexpected(found: Checked, names: set[str]) -> None:
    for name in sorted(names):
        of = "was left by a process that was killed" if name.endswith(PART) else "is unexpected"
        found.problems.append(f"{found.folder / name} {of}")


def _runs(found: Checked, plan: dict[str, str | None]) -> None:
    for name, identity in plan.items():
        if not os.path.lexists(found.folder / name / "config.json"):
            found.notes.append(f"{found.folder / name}: not begun")
            continue
        inner = check_folder(found.folder / name)
        found.problems += inner.problems
        found.notes += inner.notes
        if not inner.problems and identity is not None and identity_of(read_config(found.folder / name)) != identity:
            found.problems.append(f"{found.folder / name / 'config.json'} is not that of the run that config.json of {found.folder} plans")
    _unexpected(found, own_files(found.folder) - {"config.json"})


def _study(found: Checked) -> None:
    if os.path.lexists(found.folder / FINISHED):
        found.problems += study_damage(found.folder)
        found.notes.append(f"{found.folder}: study, finished")
    else:
        done = sorted(path for path in found.folder.rglob("*.safetensors") if path.suffix not in PAGES)
        for path in done:
            found.problems += [wrong] if (wrong := broken(path)) else []
        found.notes.append(f"{found.folder}: study, not finished; {len(done)} pieces are there")
    for path in sorted(found.folder.rglob("*/config.json")):
        inner = check_folder(path.parent)
        found.problems += inner.problems


def broken(path: Path) -> str:
    """What is wrong with a tensor file of any kind, in words."""
    from sepcap.storage import check_seal

    try:
        check_seal(path, "tensors")
    except (CorruptFile, OSError) as error:
        return str(error)
    return ""
