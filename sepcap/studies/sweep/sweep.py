"""One study at every cell of a grid (METHODS 24)."""

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sepcap.checks import FROM_0, FROM_1, checked
from sepcap.errors import warn
from sepcap.progress import progress as bar_of
from sepcap.progress import reporting
from sepcap.studies.base.runner import Progress
from sepcap.studies.base.text import counted
from sepcap.studies.catalog import FUNCTIONS
from sepcap.studies.sweep.estimate import Estimate
from sepcap.studies.sweep.folder import CELLS, WORKERS, Ledger, fingerprints_of, names_of, open_sweep, state_of
from sepcap.studies.sweep.grid import Cell, Grid, cells_of, given, in_words, plain
from sepcap.studies.sweep.result import Sweep
from sepcap.workers.dispatch import Task, carried_out
from sepcap.workers.engines import Engine, Target, Worker
from sepcap.workers.pool import check_engine, workers_of
from sepcap.workers.shards import repeat_once


@checked(workers=FROM_1, threads=FROM_1, gpus_per_run=FROM_0)
def sweep(
    base: Any,
    grid: Grid,
    *,
    out: str | Path,
    engine: Engine = "here",
    workers: int | None = None,
    gpus_per_run: float | None = None,
    threads: int = 1,
    load: Mapping[str, Any] | None = None,
    progress: Progress = True,
) -> Sweep:
    """Carry out a study at every cell of a grid: importances × fractions × seeds × models, as one table.

    Every cell is an ordinary folder of the study in `out/cells`, with the bits that the study alone has with as many threads, whatever the
    engine and the number of workers. The plan is written and announced first. A cell that fails is recorded with its error, and the others
    continue. The same call resumes after an interruption of the driver, a worker or a machine; it tries failed cells again,
    and carries out cells that were added to the grid. Each worker loads a model once, and prunes from statistics of step 0 that it has
    collected once for all of its cells that share them.

    Args:
        base: configuration of a study, such as a `PruningConfig`: the fields that the grid does not set. Tasks and models are names or
            paths, because cells are carried out in other processes.
        grid: field -> list of values, of which all combinations are cells; or a list of such grids, whose cells are joined.
        out: folder of the sweep.
        engine: "here" for this process; "processes" for worker processes of this machine; "ray" for actors of a Ray cluster (extra `ray`):
            the one that this process is connected to or RAY_ADDRESS names, else one of this machine. All of its machines must see `out`
            and the models under the same paths.
        workers: number of workers; default as many as GPUs or processor cores allow, and at most one per cell.
        gpus_per_run: GPUs per worker; below 1, several share one. Default 1 if there are GPUs.
        threads: threads of torch per worker. It is part of the plan: other numbers change last bits.
        load: arguments of `sepcap.load_model`, such as {"dtype": "bfloat16"} or {"device_map": "auto"}; part of the plan.
        progress: True announces the plan and shows a bar, False shows nothing; a function receives the announcements, and every cell.

    Returns:
        Sweep with `.table`, `.over_seeds()`, `.best()`, `.figure("strip" | "heat" | "trajectories")`, `.result(**fields)`.

    Raises:
        ValueError: an unknown field, no values, a repeated cell, or a cell that its configuration refuses; nothing is written then.
        FileExistsError: the folder holds something else, or a sweep of another base (the differing fields are named).
        ImportError: `engine="ray"` without ray.
        RuntimeError: a worker that cannot start.

    Example:
        >>> import sepcap
        >>> base = sepcap.PruningConfig(steps=20, fractions={"mlp": 0.05})
        >>> grid = {"importance": ["abs", "rms", "std"], "seed": [0, 1, 2]}
        >>> found = sepcap.sweep(base, grid, out="runs/sweep", engine="processes")  # doctest: +SKIP
        >>> found.over_seeds()  # doctest: +SKIP
    """
    cells = cells_of(base, grid)
    check_engine(engine, workers)
    kind, out = type(base).__name__, Path(out)
    fixed = {
        "kind": kind,
        "base": {name: plain("base", name, value) for name, value in given(base).items()},
        "load": plain("load", "arguments", dict(load or {})),
        "threads": threads,
    }
    target = Target("studies.sweep.cell.Cells", {"kind": kind, "load": fixed["load"]}, threads)
    on_cpu = str(fixed["load"].get("device", "")).startswith("cpu")
    with contextlib.ExitStack() as stack:

        def ready(most: int) -> tuple[Callable[[int], Worker], int, str]:
            return workers_of(stack, target, out / WORKERS, engine, workers, gpus_per_run, most, on_cpu, waits=True)

        if not os.path.lexists(out / "config.json"):
            ready(len(cells))  # what has no room is refused before the plan is written
        say = stack.enter_context(reporting(progress))
        config = stack.enter_context(open_sweep(out, fixed, cells))
        ledger = Ledger(out)
        names = names_of(config, cells)
        todo = [(name, cell) for name, cell in zip(names, cells, strict=True) if state_of(out, ledger, name) != "finished"]
        if not todo:
            say(f"{out} is finished ({counted(len(cells), 'cell')}); nothing is recomputed")
            return Sweep(out)
        start, n, where = ready(len(todo))
        work = {name: float(cell.tokens or 1) for name, cell in zip(names, cells, strict=True)}
        left = dict(todo)
        estimate = Estimate(work, {name: ledger.ended[name] for name in work if name not in left}, n)
        time = "" if estimate.seconds is None else f"; {estimate.in_words()}"
        say(f"{_cost(kind, cells, [cell for _, cell in todo])}{time}; {where}; folder {out}")
        _go_on(out, ledger, todo, start, n, len(cells), estimate, say)
    found = Sweep(out)
    if failed := [name for name, _ in todo if ledger.ended[name]["state"] == "failed"]:
        first = ledger.ended[failed[0]]["error"]
        warn(f"{len(failed)} of {counted(len(cells), 'cell')} failed, the first ({failed[0]}) with {first}. The same call tries them again")
    return found


def _cost(kind: str, cells: Sequence[Cell], todo: Sequence[Cell]) -> str:
    """The work and its cost, in a sentence."""
    function = FUNCTIONS[kind].rsplit(".", 1)[1]
    done = len(cells) - len(todo)
    said = f"{counted(len(cells), 'cell')} of {function}" + f", of which {done:,} are finished" * bool(done)
    tokens = [cell.tokens for cell in todo if cell.tokens is not None]
    if tokens:
        least, most, total = (f"{n / 1e6:,.3g}" for n in (min(tokens), max(tokens), sum(tokens)))
        said += f"; at most {total} M tokens through the model ({least if least == most else f'{least} to {most}'} M a cell)"
    return said


def _go_on(
    out: Path,
    ledger: Ledger,
    todo: Sequence[tuple[str, Cell]],
    start: Callable[[int], Worker],
    workers: int,
    total: int,
    estimate: Estimate,
    say: Callable[[str], Any],
) -> None:
    """Carry out the cells that are left, and write what becomes of each."""
    by_name, finished = dict(todo), total - len(todo)
    at = out.absolute() / CELLS
    known, _ = fingerprints_of(out, ledger)  # read when a cell is begun
    tasks = [Task(name, {"config": cell.config, "folder": str(at / name), "known": known}, cell.shares) for name, cell in todo]
    how: dict[str, Any] = {"desc": "sweep", "unit": "cell", "leave": None, "delay": 0}
    repeated: set[str] = set()
    outcomes = contextlib.closing(carried_out(tasks, start, workers))
    with bar_of(total=total, initial=finished, **how) as bar, outcomes as outcomes:
        for name, outcome in outcomes:
            repeat_once(outcome, repeated)
            ledger.add(name, outcome)
            known.update(outcome.get("made_of", {}))
            estimate.add(name, outcome)
            finished += 1
            bar.update(1)
            if not bar.disable:
                bar.set_postfix_str(estimate.in_words())
                continue
            error = f" with {outcome['error']}" if outcome["state"] == "failed" else ""
            say(
                f"{in_words(by_name[name].fields)}: {outcome['state']}{error} after {outcome['seconds']:.1f} s; "
                f"{finished} of {total} cells, {estimate.in_words()}"
            )
