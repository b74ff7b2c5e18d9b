"""Run a study in its folder: start or resume it, and write the result last."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sepcap.studies.base.folder import Pieces, is_finished, open_study
from sepcap.studies.base.result import Result, StudyResult


@contextlib.contextmanager
def study_folder(out: str | Path | None, kind: type[StudyResult], config: Mapping[str, Any]) -> Iterator[Pieces]:
    """The pieces of a study, in the given folder or in a temporary one."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory())) / kind.STUDY if out is None else Path(out)
        yield stack.enter_context(open_study(folder, kind.STUDY, config))


def run_study(
    kind: type[Result],
    config: Mapping[str, Any],
    compute: Callable[[Pieces], Result],
    out: str | Path | None,
    cost: Callable[[], str] = str,
    say: Callable[[str], Any] | None = None,
) -> Result:
    """Compute a study, or read it if it is finished.

    Args:
        kind: class of its result.
        config: resolved configuration, as stored in the folder.
        compute: makes the result; the pieces that it stores are reused when an interrupted study is resumed.
        out: folder of the study; None keeps nothing.
        cost: returns the work to do and its cost, in a sentence.
        say: receives that sentence before the work begins, or that the study is finished.
    """
    with study_folder(out, kind, config) as pieces:
        finished = is_finished(pieces)
        if say is not None:
            say(f"{out} is finished; nothing is recomputed" if finished else cost())
        result = kind.load(pieces.folder) if finished else compute(pieces)
    return result if finished or out is None else kind.load(result.save(out))
