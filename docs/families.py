"""Make docs/families.md, what works for which family, by running the checks of the tests (`make families`).

It takes a few minutes, and needs pillow and, besides this environment, that of transformer-lens 3.9 (made by `make lines`). A check that
fails for any reason other than a limit of the architecture ends the command: it is an error of the package, and fails in the tests too.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "tests"), str(HERE.parent / "tests" / "helpers")]

from family_checks import CHECKS, Check  # noqa: E402
from family_rows import BACKEND, FAMILIES, SITES, Family, save_family  # noqa: E402

from sepcap.models.hooked_families import LONGEST  # noqa: E402

OLDER = Path(os.environ.get("SEPCAP_TL3_PYTHON", HERE.parent / ".venv-tl39" / "bin" / "python"))
"""A Python interpreter with transformer-lens 3.9."""

NOT_CHECKED = "–"

Outcome = Mapping[str, str]
"""Site -> why it cannot work; empty if everything works."""

TITLE = """# Families

Made by `make families` from the checks in `tests/families`, which run on a small random model of each family's real configuration
class, saved to and loaded from a folder, with transformer-lens 3.9 and 4.x.

"works": on the sites `mlp`, `attn_pre_out` and `attn_value`. Otherwise the sites that do not work, with the number of the error below.
"–": not checked yet.
"""

SECTIONS = {
    "bridge": "Bridges of transformer-lens {transformer-lens}\n\nModels returned by `load_model`, with transformers {transformers}.",
    "hooked": "HookedTransformers of transformer-lens {transformer-lens}\n\nModels returned by `load_model(..., backend=\"hooked\")`, with "
    "transformers {transformers}. With rotary embeddings they have at most {longest} positions.\nFunctions that use the Hugging Face model "
    "(the harness, toxicity, transfer, a control with random weights, Jacobians) need the bridge.",
}


def outcome(row: Family, name: str, check: Check, folder: Path) -> Outcome:
    """Result of a check for a family: of all sites together and, if that does not work, of every site separately."""

    def why_not(sites: tuple[str, ...]) -> str | None:
        with tempfile.TemporaryDirectory() as out:
            try:
                check(row, folder, sites, Path(out))
            except NotImplementedError as error:
                return str(error).replace(str(folder), "…")
        return None

    reason = why_not(SITES)
    if reason is None:
        return {}
    if name.startswith("rotation"):  # rotation is of the model, not of a site
        return dict.fromkeys(SITES, reason)
    return {site: why for site in SITES if (why := why_not((site,)))}


def measured() -> dict[str, dict[str, Outcome] | None]:
    """Family -> check -> outcome, in this environment; None for a family that is refused when it is loaded."""
    found: dict[str, dict[str, Outcome] | None] = {}
    for row in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            save_family(row, Path(folder))
            at_once = row.missing() is not None
            found[row.name] = None if at_once else {name: outcome(row, name, check, Path(folder)) for name, check in CHECKS.items()}
        print(row.name, flush=True)
    return found


def section() -> dict[str, Any]:
    """Outcomes in this environment, with a heading that states its versions."""
    versions = {name: version(name) for name in ("transformers", "transformer-lens")}
    return {"heading": SECTIONS[BACKEND].format(**versions, longest=f"{LONGEST:,}"), "outcomes": measured()}


def older(backend: str) -> dict[str, Any]:
    """A section made in the environment of transformer-lens 3.9."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "section.json"
        subprocess.run([OLDER, __file__, str(out)], env=os.environ | {"SEPCAP_TEST_BACKEND": backend}, check=True)
        return json.loads(out.read_text())


def page(sections: Iterable[Mapping[str, Any]]) -> str:
    """The page: for every section a table of families and checks; then the checks, and the errors in the order of the tables."""
    reasons: dict[str, int] = {}
    lines = [TITLE]
    for found in sections:
        works = {family: by_check for family, by_check in found["outcomes"].items() if by_check is not None}
        for outcome in (outcome for by_check in works.values() for outcome in by_check.values()):
            for reason in outcome.values():
                reasons.setdefault(reason, len(reasons) + 1)
        lines += [f"## {found['heading']}", "", *_table(works, reasons), ""]
        refused = [family for family in found["outcomes"] if family not in works]
        lines += [f"Refused when they are loaded: {'; '.join(refused)}.", ""] if refused else []
    lines += ["## What is checked", "", *(f"- {name}: {_first_line(check)}" for name, check in CHECKS.items())]
    lines += ["", "## Errors", "", *(f"{number}. {reason}" for reason, number in reasons.items())]
    return "\n".join(lines) + "\n"


def _table(outcomes: Mapping[str, Mapping[str, Outcome]], reasons: Mapping[str, int]) -> Iterable[str]:
    yield f"| family | {' | '.join(CHECKS)} |"
    yield "|---" * (len(CHECKS) + 1) + "|"
    for family, by_check in outcomes.items():
        cells = (_cell(by_check[name], reasons) if name in by_check else NOT_CHECKED for name in CHECKS)
        yield f"| {family} | {' | '.join(cells)} |"


def _cell(outcome: Outcome, reasons: Mapping[str, int]) -> str:
    if not outcome:
        return "works"
    if len(set(outcome.values())) == 1 and len(outcome) == len(SITES):
        return f"no ({reasons[outcome[SITES[0]]]})"
    missing = ", ".join(f"`{site}` ({reasons[why]})" for site, why in outcome.items())
    return f"no: {missing}" if len(outcome) == len(SITES) else f"works, but not {missing}"


def _first_line(check: Check) -> str:
    return (getattr(check, "func", check).__doc__ or "").splitlines()[0]


def main() -> None:
    """Run all checks with both versions and write the page; given a file name, write only the section of this environment to it."""
    disable_progress_bar()
    if sys.argv[1:]:
        Path(sys.argv[1]).write_text(json.dumps(section()))
    else:
        (HERE / "families.md").write_text(page([section(), older("bridge"), older("hooked")]))


if __name__ == "__main__":
    main()
