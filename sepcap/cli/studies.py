"""Commands for stored studies, for a study at every cell of a grid, and for report pages."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from sepcap.cli.options import Command, Study, config_in, parse_fractions, parse_schedule, show, study_command, write_table
from sepcap.errors import unknown
from sepcap.studies.pruning.config import PruningConfig
from sepcap.studies.reproduce.config import ReproductionConfig

STUDIES = Literal["sp-table2", "sp-figure1", "sep-areas", "peak-ablation", "modularity-overlap"]


@study_command(
    "reproduce",
    out="runs/reproduce",
    study=Annotated[STUDIES, tyro.conf.Positional],
    budget=Literal["paper", "minutes"] | None,
    tasks=tyro.conf.Suppress[Any],
)
class Reproduce(ReproductionConfig, Study):  # pyright: ignore[reportIncompatibleVariableOverride]  # the batch size can be the study's
    """Rerun a stored study of a paper, and compare the published values with the measured ones."""

    def load(self, **options: Any) -> Any:
        """Nothing: the study loads its models itself."""


@dataclass(frozen=True)
class Report(Command):
    """Write one HTML page about a run or a study, which needs no network.

    It has a summary, figures, tables, the configuration, and for a run the texts that the model generates before and after it.
    """

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder of the run or the study."""
    out: Path | None = None
    """The page; default is report.html in that folder."""
    baseline: Path | None = None
    """Folder of a random run to compare a run with, or uniform, per_layer or activity for the random runs of its comparison."""
    device: str | None = None
    """Device of the model that writes the texts, such as cpu or cuda:1; default is the GPU if there is one. Its precision is the run's."""

    def run(self) -> None:
        """Carry out the command."""
        from sepcap.studies.catalog import load_result
        from sepcap.studies.pruning.run import Run
        from sepcap.studies.pruning.separability import BASELINES

        result = load_result(self.folder)
        if isinstance(result, Run):
            beside = str(self.baseline) in BASELINES
            baseline = str(self.baseline) if beside else None if self.baseline is None else Run.load(self.baseline)
            print(result.report(self.out, baseline=baseline, device=self.device))
        elif self.baseline is None:
            print(result.report(self.out))
        else:
            raise ValueError(f"baseline={str(self.baseline)!r}: {self.folder} contains a study; only a run is compared with a random run")


KEYS = ("study", "base", "grid", "load", "threads")
"""Keys of a file of a sweep."""

WORDS = {"None": None, "none": None, "null": None, "True": True, "true": True, "False": False, "false": False}


def parse_grid(words: Sequence[str], kind: type = PruningConfig) -> dict[str, list[Any]]:
    """`importance=abs,rms seed=0,1` as a field with its values each; values that have commas themselves are separated by semicolons.

    Args:
        words: `field=value,value` each.
        kind: class of the base, which says what kind of value a field has.

    Raises:
        ValueError: a word of another form, an unknown field, or one that is given twice.

    >>> parse_grid(["importance=abs,rms", "seed=0,1", "fractions=mlp=0.02;mlp=0.05,heads=1"])
    {'importance': ['abs', 'rms'], 'seed': [0, 1], 'fractions': [{'mlp': 0.02}, {'mlp': 0.05, 'heads': 1}]}
    """
    kinds = {field.name: str(field.type) for field in fields(kind) if field.init}  # pyright: ignore[reportArgumentType] (a dataclass)
    grid: dict[str, list[Any]] = {}
    for word in words:
        name, equals, values = word.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not values:
            raise ValueError(f"grid: {word!r} is not of the form field=value,value, as in seed=0,1,2")
        if name not in kinds:
            raise unknown("a field of the grid", name, kinds)
        if name in grid:
            raise ValueError(f"grid: {name!r} is given twice; give all of its values at once, as in seed=0,1,2")
        several = ";" in values or "dict" in kinds[name] or values.lstrip().startswith("[")
        grid[name] = [_value(name, kinds[name], value.strip()) for value in values.split(";" if several else ",")]
    return grid


def _value(name: str, kind: str, text: str) -> Any:
    """One value: a number, flag or list as in JSON, fractions as on the command line, else the text itself."""
    if name == "schedule":
        return list(parse_schedule(text.split()))
    if kind.startswith("dict"):
        return parse_fractions(text)
    if kind == "<class 'str'>":
        return text
    if text in WORDS and "Literal" not in kind:
        return WORDS[text]
    try:
        return json.loads(text)
    except ValueError:
        return text


def read_file(path: Path) -> dict[str, Any]:
    """A sweep from a file of JSON or YAML.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it is neither, or has unknown keys.
    """
    import yaml

    try:
        held = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML too
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"file={str(path)!r} is neither JSON nor YAML: {error}") from error
    if not isinstance(held, Mapping) or "grid" not in held:
        raise ValueError(f"file={str(path)!r}: give base and grid, each with fields, as in {{base: {{steps: 20}}, grid: {{seed: [0, 1]}}}}")
    for key in held:
        if key not in KEYS:
            raise unknown("a key of the file", key, KEYS)
    return dict(held)


@study_command("sweep", out="runs/sweep")
class Sweep(PruningConfig, Study):
    """Prune (or carry out another study, with --file) at every cell of a grid, and make one table of all.

    `sepcap sweep --grid importance=abs,rms --grid seed=0,1,2 --engine processes`. The other options are those of `sepcap prune`, the same
    in all cells. The same command resumes, tries failed cells again, and carries out cells that were added to the grid.
    """

    grid: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A field and its values, field=value,value; once for every field. Values that have commas themselves are separated by semicolons:
    "fractions=mlp=0.02;mlp=0.05,heads=1"."""
    file: Path | None = None
    """JSON or YAML with `base` (fields of the configuration), `grid` (field: list of values), and if wanted `study` (a function such as
    ablate_each; default prune), `load` and `threads`, in place of --grid and the options of pruning."""
    engine: Literal["here", "processes", "ray"] = "here"
    """Where cells are carried out: in this process, in worker processes of this machine, or on a Ray cluster."""
    workers: int | None = None
    """Number of workers; default as many as GPUs or processor cores allow."""
    gpus_per_run: float | None = None
    """GPUs per worker; below 1, several share one. Default 1 if there are GPUs."""
    threads: int = 1
    """Threads of torch per worker; part of the plan."""

    def run(self) -> None:
        """Carry out the command."""
        import sepcap

        base, grid, load, threads = self._given()
        load = {name: value for name in ("device", "dtype") if (value := getattr(self, name)) not in (None, "float32")} | load
        where: dict[str, Any] = {"engine": self.engine, "workers": self.workers, "gpus_per_run": self.gpus_per_run, "threads": threads}
        found = sepcap.sweep(base, grid, out=self.out, load=load, progress=partial(print, flush=True), **where)
        show(found, self.out)
        for name, table in list(found.tables.items())[1:]:
            write_table(table, self.out / f"{name}.csv")

    def _given(self) -> tuple[Any, Any, dict[str, Any], int]:
        """Base, grid, arguments of the loading and threads: from the options, or from the file."""
        if self.file is None:
            if not self.grid:
                raise ValueError("grid: give at least one field with its values, --grid seed=0,1,2, or a file")
            return config_in(PruningConfig, self), parse_grid(self.grid), {}, self.threads
        given = [field.name for field in fields(PruningConfig) if field.init and getattr(self, field.name) != _default(field)]
        given += [name for name in ("grid",) if self.grid]
        if given:
            raise ValueError(f"{given[0]}: the file has the base and the grid; put {given[0]} in there, or leave the file out")
        held = read_file(self.file)
        kind = _config_of(held.get("study", "prune"))
        try:
            base = kind(**held.get("base") or {})
        except TypeError as error:
            raise ValueError(f"base of {self.file}: {error}") from error
        return base, held["grid"], dict(held.get("load") or {}), held.get("threads", self.threads)


def _default(field: Any) -> Any:
    return field.default_factory() if field.default is MISSING else field.default


def _config_of(study: str) -> Any:
    """Class of the configuration of a study, by the name of its function."""
    from sepcap.studies.catalog import FUNCTIONS
    from sepcap.workers.engines import named

    by_name = {path.rsplit(".", 1)[1]: path for path in FUNCTIONS.values()}
    name = str(study).replace("-", "_")
    if name not in by_name:
        raise unknown("study", study, by_name)
    return named(by_name[name]).CONFIG
