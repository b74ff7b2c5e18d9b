"""A campaign of bad input: 300 calls of functions and commands, and 300 damaged folders (`make campaign`).

Every call has one wrong argument and must end in one error that begins with its name, within a minute, without a traceback on the
command line and without a file left behind. Every damaged folder must give the numbers it gave before or one error that names the
damaged file, when it is read and when the call that made it is repeated in it. `--calls 40 --folders 10` takes a few of both.
Exit status 1 where one does not.
"""

import argparse
import contextlib
import io
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "helpers"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

SECONDS = 60
"""Within which every call must end."""

NUMBERS: list[Any] = [0, -1, 1.5, True, "3", None, float("nan"), float("inf"), [1], {}, 10**30]
COUNTS = [value for value in NUMBERS if value != 10**30]
"""Wrong counts: a huge one is only more than there is."""
SIZES = [value for value in NUMBERS if value is not None]
SEEDS = [-1, 1.5, True, "3", None, float("nan"), [1]]
INSTEAD = (r"site='mpl'", r"tasks?( is|=|\[)", r"the dataset has no text", r"texts?( is|=|\[)", r"'?/no/such", r"a key of ")
"""Beginnings that name a wrong argument as well as its name does."""
FLAGS: list[Any] = ["no", 1, 0.0, [True]]
NAMES: list[Any] = ["nothing-of-this-name", 3, "", ["abs"], True]
TASKS: list[Any] = ["no-such-task", 5, [], ["", " "], [1, 2], "/no/such/file.jsonl", {"text": ["a"]}, True]
MODELS: list[Any] = ["local-code", 5, None, object(), {}]
AMOUNTS: list[Any] = [{"mlp": v} for v in (0, -1, 1.5, True, "3", 0.0, 10**9, float("nan"))] + [{}, {"mpl": 0.1}, 0.1, None, [0.1]]


def calls(model: Any, texts: list[str], other: list[str], folder: Path, run: Any) -> Iterator[tuple[str, Callable[[], Any], str]]:
    """What is called, the call, and the argument that its error must name."""
    import torch

    import sepcap

    quick = {"tokens": 100, "context": 16}
    stats = sepcap.collect(model, texts, histogram=True, **quick)
    scores = sepcap.score(stats, sepcap.collect(model, other, histogram=True, **quick))
    neurons = sepcap.NeuronSet.random(model, {"mlp": 0.2})
    wrong: dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, list[Any]]]] = {
        "collect": (
            sepcap.collect,
            {"model": model, "task": texts, **quick},
            {
                "tokens": COUNTS,
                "context": SIZES,
                "seed": SEEDS,
                "batch_size": COUNTS,
                "histogram": FLAGS,
                "gradients": ["nothing", 3, ("atp", "nothing"), {}],
                "replicates": [-1, 1.5, True, "3", None, float("nan")],
                "positions": ["nothing", 3, None, torch.ones(2, 2, dtype=torch.bool)],
                "per_document": [value for value in NAMES if value != 3],
                "k": COUNTS[:-2],
                "include_bos": FLAGS,
                "sites": ["mpl", 3, []],
                "task": TASKS,
                "model": MODELS,
            },
        ),
        "evaluate": (
            sepcap.evaluate,
            {"model": model, "task": texts, **quick},
            {"tokens": COUNTS, "context": SIZES, "batch_size": COUNTS, "task": TASKS, "model": MODELS},
        ),
        "score": (
            sepcap.score,
            {"forget": stats, "retain": stats},
            {
                "importance": NAMES,
                "eps": [0, -1, True, "3", float("nan"), [1]],
                "forget": [1, "x", None],
                "contrast": NAMES,
                "lam": [-1, True, "3", None, float("nan"), [1]],
                "q": [-0.1, 1.1, True, "3", None, float("nan")],
            },
        ),
        "top": (scores.top, {"fractions": {"mlp": 0.1}}, {"fractions": AMOUNTS, "per_layer": FLAGS, "aggregate": NAMES}),
        "random": (
            sepcap.NeuronSet.random,
            {"model": model, "fractions": {"mlp": 0.1}},
            {"fractions": AMOUNTS, "seed": [-1, 1.5, True, "3", None]},
        ),
        "ablate": (
            sepcap.ablate,
            {"model": model, "neurons": neurons},
            {"kind": ["nothing", True, float("nan"), float("inf"), None], "neurons": [1, "x", {}], "model": MODELS, "seed": [-1, 1.5, "3"]},
        ),
        "delete": (sepcap.delete, {"model": model, "neurons": neurons}, {"neurons": [1, "x", None], "model": MODELS}),
        "compare_ablations": (
            sepcap.compare_ablations,
            {"model": model, "task": texts, "layer": 0, "head": 1, "kinds": ("zero",), **quick},
            {
                "layer": [99, -1, 1.5, True, "3"],
                "head": [99, -1, 1.5, "3"],
                "kinds": [(), ("nothing",), 3],
                "controls": [-1, 1.5, True, 10**6],
                "together": FLAGS,
            },
        ),
        "ablate_each": (
            sepcap.ablate_each,
            {"model": model, "forget": texts, "retain": other, "tokens": 100, "reference_tokens": 100, "context": 16, "progress": False},
            {
                "forget": TASKS,
                "site": NAMES,
                "kind": NAMES,
                "layers": [99, -1, 1.5, True, "3"],
                "sample": [0, -1, 1.5, True, "3", 10**9],
                "pairs": [0, -1, 1.5, "3", [(1,)]],
                "importance": NAMES,
                "tokens": COUNTS,
                "seed": SEEDS,
                "batch_size": COUNTS,
                "whole_heads": FLAGS,
            },
        ),
        "learn_ranking": (
            sepcap.learn_ranking,
            {"model": model, "forget": texts, "retain": other, "tokens": 200, "eval_tokens": 100, "steps": 1, "progress": False},
            {
                "retain": TASKS,
                "site": [*NAMES, ()],
                "steps": COUNTS,
                "init": ["nothing-of-this-name", 3, "", True],
                "constants": NAMES,
                "lr": [0, -1, True, "3", None, float("nan")],
                "tau": [0, -1, True, "3", None, float("nan")],
                "step_tokens": COUNTS,
                "check_every": COUNTS,
                "seed": SEEDS,
            },
        ),
        "compare_importances": (
            sepcap.compare_importances,
            {"model": model, "forget": texts, "retain": other, "sites": ("mlp",), "scores": ("abs",), "tokens": 100, "progress": False},
            {
                "forget": TASKS,
                "sites": [("mpl",), 3, ()],
                "scores": [("nothing",), 3, ("abs", "abs")],
                "seeds": [(), (-1,), (1.5,), 3, ("x",)],
                "effect_tokens": COUNTS,
                "effect_context": [0, 1, -1, 1.5, True, "3", None],
                "sample": [0, -1, 1.5, True, "3"],
                "best": [value for value in COUNTS if value != 0],
                "control": FLAGS,
                "compiled": ["nothing", 3],
            },
        ),
        "compare_activations": (
            sepcap.compare_activations,
            {"model": model, "progress": False},
            {"what": NAMES, "layer": [99, -1, 1.5, True, "3"], "head": [99, -1, 1.5, True, "3"], "scaled": FLAGS},
        ),
        "transfer_paragraphs": (
            sepcap.transfer_paragraphs,
            {"model": model, "texts": texts, "progress": False},
            {
                "n": COUNTS,
                "following": COUNTS,
                "layers": [(99,), (-1,), 3, ("x",), ()],
                "sites": [("nothing",), 3, ()],
                "scale": [True, "3", None, float("nan")],
                "temperature": [-1, True, "3", None, float("nan")],
                "generate": FLAGS,
                "profile": NAMES,
                "seed": SEEDS,
            },
        ),
        "jumps": (
            run.jumps,
            {"model": model},
            {
                "steps": [[99], [-1], 3, ["x"], [1.5]],
                "top": COUNTS,
                "batch_size": [0, -1, 1.5, True, "3"],
                "seed": SEEDS,
                "tasks": [3, "x", {"forget": 5}],
            },
        ),
        "load_model": (
            sepcap.load_model,
            {"model": "default"},
            {
                "model": ["/no/such/folder", "", 5, None, "a/b/c", str(folder)],
                "dtype": ["float33", 3],
                "device": ["cuda:99", "cqu"],
                "seed": [1.5, "3"],
                "random_weights": FLAGS,
            },
        ),
        "load_task": (sepcap.load_task, {"task": texts}, {"task": TASKS, "column": ["nothing", 3]}),
        "register_task": (
            lambda name, **rest: sepcap.register_task(name, **rest),
            {"name": "campaign", "repository": "a/b"},
            {"name": [5, None, "local-code"], "repository": [5]},
        ),
    }
    for name, (function, good, table) in wrong.items():
        for argument, values in table.items():
            for value in values:
                given = {**good, argument: value}
                yield f"{name}({argument}={value!r:.40})", lambda function=function, given=given: function(**given), argument
    fields = {
        "steps": COUNTS,
        "tokens": COUNTS,
        "eval_tokens": [0, -1, 1.5, "3"],
        "batch_size": [0, -1, 1.5, "3"],
        "seed": [-1, 1.5, "3", float("nan")],
        "importance": NAMES,
        "rotation": NAMES,
        "offset": NAMES,
        "aggregate": NAMES,
        "recollect": FLAGS,
        "per_layer": FLAGS,
        "eps": [0, -1, "3", float("nan")],
        "schedule": [3, "x", [3], [{}], [{"mpl": 0.1}], [{"mlp": 2.0}], [{"mlp": True}]],
        "fractions": AMOUNTS[:1] + AMOUNTS[2:6] + AMOUNTS[7:],
    }
    for argument, values in fields.items():
        for value in values:
            if argument == "fractions" and value == {"mlp": 10**9}:
                continue
            yield f"PruningConfig({argument}={value!r:.40})", lambda a=argument, v=value: sepcap.PruningConfig(**{a: v}), argument


def commands(model: Path, run: Path, texts: Path, place: Path) -> Iterator[tuple[str, list[str], str]]:
    """A command with one wrong argument, and what its error must name."""
    (place / "empty.jsonl").write_text("")
    (place / "a-file").write_text("mine")
    (place / "taken").mkdir()
    (place / "taken" / "mine.txt").write_text("mine")
    os.mkfifo(place / "fifo.safetensors")
    base = ["--model", str(model)]
    tasks = ["--forget", str(texts), "--retain", str(texts.with_name("other.jsonl"))]
    quick = ["--tokens", "100", "--eval-tokens", "100", "--steps", "1"]
    for argument, values in {
        "--tokens": ["0", "-1", "1.5", "x", "nan", ""],
        "--steps": ["0", "-3", "1.5", "x"],
        "--eval-tokens": ["0", "x"],
        "--seed": ["-1", "x"],
        "--batch-size": ["0", "x"],
        "--fractions": ["mlp", "mlp=", "mlp=2.0", "mlp=0", "mpl=0.1", "mlp=0.1,mlp=0.2", "mlp=-1"],
        "--importance": ["nothing", ""],
        "--rotation": ["turn"],
        "--offset": ["much"],
        "--model": ["/no/such/model", str(place), str(place / "a-file")],
        "--forget": ["no-such-task", str(place / "empty.jsonl"), "/no/such.jsonl"],
        "--device": ["cuda:77", "nowhere"],
        "--dtype": ["float33"],
        "--context": ["1", "x", "100000"],
        "--out": [str(place / "a-file"), str(place / "taken")],
    }.items():
        for value in values:
            given = {"--out": str(place / "new")} | ({argument: value} if argument == "--out" else {})
            rest = [part for pair in given.items() for part in pair]
            own = [] if argument == "--out" else [argument, value]
            word = "|".join(
                [argument.lstrip("-").replace("-", "[-_]"), *([re.escape(value)] if "/" in value else []), "task=", "site='mpl'"]
            )
            yield f"prune {argument} {value}", ["prune", *base, *tasks, *quick, *rest, *own], word
    yield from (
        (
            "evaluate a FIFO",
            ["evaluate", *base, "--tasks", str(texts), "--tokens", "100", "--neurons", str(place / "fifo.safetensors")],
            "fifo",
        ),
        ("evaluate nothing", ["evaluate", *base, "--tasks", "--tokens", "100"], "tasks"),
        ("evaluate an empty file", ["evaluate", *base, "--tasks", str(place / "empty.jsonl"), "--tokens", "100"], "empty"),
        ("report of nothing", ["report", str(place / "taken")], "taken"),
        ("report over a folder", ["report", str(run), "--out", str(place / "taken")], "taken"),
        ("report over a FIFO", ["report", str(run), "--out", str(place / "fifo.safetensors")], "fifo"),
        ("check nothing", ["check", str(place / "a-file")], "a-file"),
        ("no such task", ["tasks", "local-cod"], "local-cod"),
        ("no such command", ["prun"], "prun"),
        ("no such option", ["prune", "--tokns", "3"], "tokns"),
        ("compare ablations layer", ["compare", "ablations", *base, "--task", str(texts), "--layer", "99", "--head", "0"], "99"),
        ("compare ablations head", ["compare", "ablations", *base, "--task", str(texts), "--layer", "0", "--head", "-1"], "head"),
        ("jacobian layer", ["geometry", "jacobian", *base, "--layers", "99"], "layers"),
    )
    for words, wrong in OTHERS.items():
        for option, value in wrong:
            line = [*words.split(), *(["--run-folder", str(run)] if words == "jumps" else []), option, value]
            out = [] if words in ("jumps", "models") else ["--out", str(place / "new")]
            yield f"{words} {option} {value}", [*line, *out], option.lstrip("-").replace("-", "[-_]")


OTHERS = {
    "demo": (("--steps", "0"), ("--baseline-seeds", "x"), ("--fractions", "mpl=0.1")),
    "learn-ranking": (("--steps", "0"), ("--site", "mpl"), ("--lr", "-1"), ("--model", "/no/such")),
    "score": (("--tokens", "0"), ("--importance", "nothing"), ("--forget", "no-such-task")),
    "ablate": (("--steps", "0"), ("--kinds", "nothing"), ("--task", "no-such-task")),
    "ablate-each": (("--kind", "nothing"), ("--tokens", "-1"), ("--sample", "0")),
    "compare methods": (("--methods", "nothing"), ("--seeds", "x"), ("--steps", "0")),
    "compare importances": (("--scores", "nothing"), ("--best", "-1"), ("--sites", "mpl")),
    "modules concentration": (("--k", "0"), ("--seeds", "x")),
    "modules overlap": (("--draws", "0"), ("--tokens", "x")),
    "modules cross-task": (("--tokens", "0"), ("--model", "/no/such")),
    "modules selection": (("--checks", "nothing"), ("--tokens", "0")),
    "geometry similarity": (("--what", "nothing"), ("--layer", "x")),
    "geometry dimensions": (("--dims", "x"), ("--model", "/no/such")),
    "geometry find-dimensions": (("--n", "0"), ("--stages", "x")),
    "paragraphs": (("--n", "0"), ("--scale", "x"), ("--profile", "nothing")),
    "jumps": (("--top", "0"), ("--steps", "x")),
    "models": (("--nothing", "x"),),
}
"""Words of a command -> an option of it with a wrong value."""


@contextlib.contextmanager
def within(seconds: int) -> Iterator[None]:
    """Raise in a call that does not end."""

    def late(*_: Any) -> None:
        raise TimeoutError("no end")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def of_call(call: Callable[[], Any], argument: str) -> str:
    """What a wrong call comes to; empty where it ends as it should."""
    try:
        with within(SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            given = call()
    except TimeoutError as error:
        return "no end" if str(error) == "no end" else ""
    except (ValueError, TypeError, OSError, LookupError, NotImplementedError, ImportError, RuntimeError) as error:
        text = str(error)
        named = [rf"{re.escape(argument.rstrip('s'))}s?( is|=|\[|:|,)", *INSTEAD]
        first = any(re.match(begins, text) for begins in named)
        return "" if first else f"an error that does not begin with {argument}: {type(error).__name__}: {text:.160}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return f"taken: {given!r:.80}"


def of_command(line: list[str], word: str) -> str:
    """What a wrong command comes to; empty where it ends as it should."""
    from sepcap.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    try:
        with within(SECONDS), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main(line)
    except TimeoutError:
        return "no end"
    except SystemExit as stop:
        said = err.getvalue()
        if "Traceback" in said + out.getvalue():
            return "a traceback"
        if stop.code not in (1, 2):
            return f"exit {stop.code}"
        named = "|".join((word, *INSTEAD))
        return "" if re.search(named, said + out.getvalue(), re.IGNORECASE) else f"does not name it: {said[-200:]!r}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "exit 0"


def repeated(again: Callable[[Path], Any], copy: Path, right: list[Any], named: set[str]) -> str:
    """What the call that made a folder comes to in a damaged copy: "same", "error" with the name of a file, or what is wrong with it."""
    from damage import numbers_of, same

    from sepcap.errors import CorruptFile

    try:
        found = list(numbers_of(again(copy)))
    except (CorruptFile, OSError) as error:
        return "error" if any(name in str(error) for name in {*named, copy.name}) else f"resumed: an error that names no file: {error}"
    return "same" if same(found, right) else "resumed: other numbers, and nothing said"


def damaged(folders: dict[Path, Callable[[Path], Any]], count: int, seed: int, place: Path) -> Iterator[tuple[str, str]]:
    """What reading and resuming come to, of so many copies with one or two damaged files; empty where both end as they should."""
    from damage import DAMAGES, files_of, numbers_of, outcome, sibling_of

    from sepcap.studies.catalog import load_result

    rng = random.Random(seed)
    right = {folder: list(numbers_of(load_result(folder))) for folder in folders}
    names = sorted(DAMAGES)
    for number in range(count):
        folder = rng.choice(list(folders))
        copy = shutil.copytree(folder, place / "copies" / f"{number}")  # alone: a swap takes its sibling from beside the folder
        said, named = [], set()
        for _ in range(rng.choice((1, 1, 2))):
            file = rng.choice(files_of(copy))
            damage = rng.choice(names)
            if damage == "swap":
                if sibling_of(file) == file:
                    damage = "flip"
                else:
                    named.add(sibling_of(file).name)
            if damage == "flip" and file.stat().st_size == 0:
                damage = "delete"
            named |= {file.name, file.parent.name}
            if damage == "flip":
                from damage import flip

                flip(file, rng.random() * 0.999, rng.randrange(8))
            else:
                DAMAGES[damage](file)
            said.append(f"{damage} {file.relative_to(copy)}")
        try:
            with within(2 * SECONDS):
                found = outcome(copy, right[folder], named)
                if found in ("same", "error"):
                    found = repeated(folders[folder], copy, right[folder], named)
        except TimeoutError:
            found = "no end"
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        shutil.rmtree(copy)
        yield f"{folder.name}: {', '.join(said)}", "" if found in ("same", "error") else found


def main() -> int:
    """Run the campaign and say what was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=10**6, help="at most so many calls and commands, evenly from all")
    parser.add_argument("--folders", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    import torch
    from tiny import save_tiny, words, write_jsonl

    import sepcap

    torch.set_num_threads(1)
    started = time.time()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        tiny = save_tiny("opt", place / "tiny")
        model, texts, other = sepcap.load_model(tiny, device="cpu"), words(0), words(0, alphabet="0123456789")
        for name, lines in (("texts", texts), ("other", other)):
            write_jsonl(place / f"{name}.jsonl", lines)
        quick = {"forget": texts, "retain": other, "tokens": 150, "eval_tokens": 150, "context": 16, "fractions": {"mlp": 0.2}, "steps": 2}
        head = {"layer": 0, "head": 1, "kinds": ("zero", "mean"), "tokens": 100, "context": 16, "progress": False}
        pair = {"forget": texts, "retain": other, "progress": False}
        each = {"layers": 0, "sample": 20, "tokens": 100, "reference_tokens": 100, "context": 16}
        learn = {"tokens": 300, "eval_tokens": 150, "steps": 2, "step_tokens": 50}
        compiled = sepcap.load_compiled("sort-and-reverse")  # an order is learned only where the unpruned model has accuracy to lose
        folders: dict[Path, Callable[[Path], Any]] = {
            place / "run": lambda out: sepcap.prune(model, sepcap.PruningConfig(**quick), out=out),
            place / "ablations": lambda out: sepcap.compare_ablations(model, task=texts, **head, out=out),
            place / "comparison": lambda out: sepcap.compare_directions(model, out=out, progress=False, **quick),
            place / "jacobian": lambda out: sepcap.jacobian_spectrum(
                model, layers=[0], tokens=2, task=texts, rows=2, out=out, progress=False
            ),
            place / "each": lambda out: sepcap.ablate_each(model, **pair, **each, out=out),
            place / "learned": lambda out: sepcap.learn_ranking(compiled.model, **compiled.tasks, progress=False, **learn, out=out),
        }
        for made, make in folders.items():
            make(made)
        run = place / "run"
        before = {name: value.clone() for name, value in model.state_dict().items()}
        work = place / "work"
        work.mkdir()
        os.chdir(work)
        wrong: list[tuple[str, str]] = []
        tried: Counter[str] = Counter()
        todo = [
            (text, lambda call=call, argument=argument: of_call(call, argument))
            for text, call, argument in calls(model, texts, other, work, sepcap.load_result(run))
        ]
        todo += [
            (f"sepcap {text}", lambda line=line, word=word: of_command(line, word))
            for text, line, word in commands(tiny, run, place / "texts.jsonl", place)
        ]
        todo = todo[:: max(1, len(todo) // asked.calls)]
        for text, attempt in todo:
            tried["calls"] += 1
            if found := attempt():
                wrong.append((text, found))
                print(f"{text}: {found}", flush=True)
        if left := sorted(path.name for path in work.rglob("*")) + [p.name for p in (place / "new",) if p.exists()]:
            wrong.append(("files left behind", str(left)))
        if any(not torch.equal(value, before[name]) for name, value in model.state_dict().items()):
            wrong.append(("the model", "has other weights than before"))
        for text, found in damaged(folders, asked.folders, asked.seed, place):
            tried["folders"] += 1
            if found:
                wrong.append((text, found))
                print(f"{text}: {found}", flush=True)
        os.chdir("/")
    print(f"{tried['calls']} calls and {tried['folders']} damaged folders in {time.time() - started:.0f} s: {len(wrong)} wrong")
    for text, found in wrong[-2:]:
        print(f"  {text}: {found}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
