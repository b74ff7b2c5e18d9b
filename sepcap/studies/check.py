"""Check the files of a run or a study: `sepcap check`."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from sepcap.checks import checked
from sepcap.errors import CorruptFile
from sepcap.storage import PART, check_seal
from sepcap.studies.base.folder import FINISHED, PAGES, identity_of, own_files, read_config, study_damage
from sepcap.studies.pruning.check_run import problems
from sepcap.studies.pruning.generations import FILE, texts_kept
from sepcap.studies.pruning.on_disk.step_files import LEARNED, LEARNING, ROTATION
from sepcap.studies.pruning.random_neurons.baselines import found_again
from sepcap.studies.pruning.run import Run
from sepcap.studies.pruning.trackers import LINES as METRICS
from sepcap.studies.pruning.trackers import lines_are_behind
from sepcap.studies.sweep.folder import LINES, WORKERS, Ledger
from sepcap.studies.sweep.folder import STUDY as SWEEP

BESIDE = ("config.json", "trajectory.parquet", "run.log", METRICS, FILE)
"""Files of a run that no step lists."""


@dataclass
class Checked:
    """Result of a check.

    Attributes:
        folder: the checked folder.
        problems: what is damaged, missing or unexpected, one sentence each.
        notes: remarks that are no problems, such as what is not finished.
    """

    folder: Path
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@checked()
def check_folder(folder: str | Path) -> Checked:
    """Compare every file of a run, a study or a comparison with what was recorded when it was written.

    Args:
        folder: folder of the run or the study.

    Raises:
        FileNotFoundError: the folder contains neither.

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
        elif config["study"] == SWEEP:
            ended = Ledger(folder).ended
            _runs(found, {name: ended.get(Path(name).name, {}).get("identity") for name in config["runs"]}, (LINES, WORKERS))
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
        return  # files derived from the steps cannot be compared
    found.problems += [behind] if (behind := run.trajectory_damage()) else []
    try:
        if (run.folder / METRICS).exists() and lines_are_behind(run):
            found.problems.append(f"{run.folder / METRICS} does not have the lines of the steps; the command that made the run rewrites it")
        texts_kept(run)
    except (CorruptFile, OSError) as error:
        found.problems.append(str(error))
    known = {*BESIDE, *(name for step in range(run.steps_done + 1) for name in run.record(step)["files"])}
    known |= {f"steps/{step:04d}/record.json" for step in range(run.steps_done + 1)}
    before = {"statistics/forget.safetensors", "statistics/retain.safetensors", ROTATION, LEARNED, LEARNING}
    known |= before if run.steps_done < 0 else set()
    _unexpected(found, {name for name in own_files(run.folder) if not name.startswith("wandb/")} - known)
    if "matched" in run.config and found_again(run) is None:
        lost = f"the run that it is matched with ({run.config['matched']}) is missing or has changed"
        found.notes.append(f"{run.folder}: {lost}; the numbers of neurons per layer could not be compared")
    state = "finished" if run.finished else f"not finished: {max(0, run.steps_done)} of {run.config['steps']} steps"
    found.notes.append(f"{run.folder}: run, {state}")


def _unexpected(found: Checked, names: set[str]) -> None:
    for name in sorted(names):
        of = "was left by a killed process" if name.endswith(PART) else "is unexpected"
        found.problems.append(f"{found.folder / name} {of}")


def _runs(found: Checked, plan: dict[str, str | None], beside: tuple[str, ...] = ()) -> None:
    for name, identity in plan.items():
        if not os.path.lexists(found.folder / name / "config.json"):
            found.notes.append(f"{found.folder / name}: not started")
            continue
        inner = check_folder(found.folder / name)
        found.problems += inner.problems
        found.notes += inner.notes
        if not inner.problems and identity is not None and identity_of(read_config(found.folder / name)) != identity:
            found.problems.append(f"{found.folder / name / 'config.json'} does not match the plan in config.json of {found.folder}")
    _unexpected(found, {name for name in own_files(found.folder) if name.split("/")[0] not in ("config.json", *beside)})


def _study(found: Checked) -> None:
    if os.path.lexists(found.folder / FINISHED):
        found.problems += study_damage(found.folder)
        found.notes.append(f"{found.folder}: study, finished")
    else:
        done = sorted(path for path in found.folder.rglob("*.safetensors") if path.suffix not in PAGES)
        for path in done:
            try:
                check_seal(path, "tensors")
            except (CorruptFile, OSError) as error:
                found.problems.append(str(error))
        found.notes.append(f"{found.folder}: study, not finished; {len(done)} pieces exist")
    for path in sorted(found.folder.rglob("*/config.json")):
        inner = check_folder(path.parent)
        found.problems += inner.problems
