"""Texts as Python objects: data sets, columns, arrays, lists. Errors for other objects show the call that works."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from sepcap.tasks.sources.files import checked_text, unix_lines
from sepcap.tasks.sources.quiet import quietly


def dataset_of(given: Any) -> Any:
    """Convert texts to a `datasets.Dataset`: a Dataset is returned as it is, others as one with the single column `text`.

    Args:
        given: a `datasets.Dataset`, or a list, tuple, column or array of strings (numpy, pandas, pyarrow).

    Raises:
        TypeError: anything else; the error shows the right call if there is one.
        ValueError: a list of files.
    """
    import datasets

    if isinstance(given, datasets.Dataset):
        return given
    refuse(given)
    texts = _listed(given)
    if not all(isinstance(text, str) for text in texts):
        kinds = sorted({type(text).__name__ for text in texts})
        paths = "; for a file use load_task(path), for several give their folder" if any(isinstance(t, os.PathLike) for t in texts) else ""
        wrong = next(i for i, text in enumerate(texts) if not isinstance(text, str))
        raise TypeError(f"task is a list of {', '.join(kinds)}; a list must contain only strings (entry {wrong} is not one){paths}")
    if texts and all(len(text) < 4096 and _is_file(text) for text in texts):
        raise ValueError(
            f"task is a list of files ({texts[0]!r}, …), not of texts: use load_task(path) for one, the path of a folder for several, "
            "or the texts themselves: [Path(p).read_text() for p in paths]"
        )
    features = datasets.Features({"text": datasets.Value("large_string")})
    return datasets.Dataset.from_dict({"text": [checked_text(text, f"row {i}", "text") for i, text in enumerate(texts)]}, features=features)


def refuse(given: Any) -> None:
    """Raise an error for plausible arguments that are not a fixed list of texts.

    Raises:
        TypeError: such an argument; the error shows the right call.
    """
    import datasets

    kind = type(given).__name__
    if isinstance(given, datasets.DatasetDict):
        raise TypeError(f"task is a DatasetDict; choose one of its splits: {', '.join(f'data[{s!r}]' for s in given)}")
    if isinstance(given, datasets.IterableDatasetDict | datasets.IterableDataset):
        split = "" if isinstance(given, datasets.IterableDataset) else f"[{next(iter(given), 'train')!r}]"
        raise TypeError(
            f"task is an {kind}, which may have no end; take as many of its rows as you need: "
            f"load_task(datasets.Dataset.from_list(list(data{split}.take(10_000)))), or stream a data set of the hub with register_task"
        )
    if hasattr(given, "columns") and hasattr(given, "iloc"):
        raise TypeError(f"task is a {kind}; give the column with the texts, data['…'], one of {list(map(str, given.columns))[:20]}")
    if isinstance(given, bytes | bytearray):
        raise TypeError(f"task is a {kind}; give strings: a list of text.decode()")
    if isinstance(given, Set):
        raise TypeError(f"task is a {kind}; give a list: load_task(sorted(texts))")
    if isinstance(given, Iterator):
        raise TypeError(f"task is a {kind}, which can be read only once; give a list: load_task(list(texts))")
    if isinstance(given, Mapping):
        raise TypeError(f"task is a {kind}; give a list of its texts, or datasets.Dataset.from_dict(data)")


def _listed(given: Any) -> list[Any]:
    for method in ("tolist", "to_pylist", "to_list"):  # numpy and pandas, pyarrow, polars
        if hasattr(given, method):
            given = getattr(given, method)()
            break
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise TypeError(f"task is a {type(given).__name__}; give a name, a path, a datasets.Dataset or a list of strings")
    return list(given)


def _is_file(text: str) -> bool:
    try:
        return os.path.isfile(text)
    except ValueError:  # it contains a NUL
        return False


def plain(dataset: Any) -> Any:
    """The same data set without a format, so that its texts are strings.

    Raises:
        ValueError: a transform, which may return different texts on each read.
    """
    if dataset.format["type"] == "custom":
        raise ValueError(
            "task is a Dataset with a transform, which may return different texts on each read: store its texts, "
            "data.with_format(None).map(transform, batched=True), or remove it, data.with_format(None)"
        )
    return dataset.with_format(None)


def saved_dataset(folder: Path) -> Any:
    """The `datasets.Dataset` that `save_to_disk` wrote to a folder; None if there is none.

    Raises:
        ValueError: several splits, listed with their paths; or a damaged file.
    """
    import datasets
    import pyarrow
    import pyarrow.compute

    state = folder / "state.json"
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(path.parent for path in folder.glob("*/state.json"))
        ways = " or ".join(repr(str(split)) for split in splits[:8]) or "it contains none"
        raise ValueError(f"{folder} is a saved DatasetDict; choose one of its splits by its path: {ways}")
    if not state.is_file() or not (folder / "dataset_info.json").is_file():
        return None
    file = state
    try:
        names = [str(each["filename"]) for each in json.loads(state.read_text(encoding="utf-8"))["_data_files"]]
        if any(Path(name).name != name for name in names):
            raise ValueError("it names a file outside the folder")
        parts = []
        for file in [folder / name for name in names]:
            if not file.is_file():
                raise FileNotFoundError("it does not exist")
            parts.append(datasets.Dataset.from_file(str(file)))
            parts[-1].data.table.validate(full=True)
        whole = datasets.concatenate_datasets(parts)
    except (OSError, ValueError, LookupError, TypeError, RecursionError, pyarrow.ArrowException) as error:
        raise ValueError(f"{file} of the saved data set cannot be read: {type(error).__name__}: {error}") from error
    strings = [name for name, kind in whole.features.items() if getattr(kind, "dtype", "") in ("string", "large_string")]
    compute: Any = pyarrow.compute  # its functions are made at run time
    if not any(compute.any(compute.match_substring(whole.data[name], "\r")).as_py() for name in strings):
        return whole
    return quietly(whole.map, lambda row: {name: unix_lines(row[name]) for name in strings if isinstance(row[name], str)})
