"""Make docs/families.md: what works for which family, found out by running the checks of tests/families (`make families`).

It takes a few minutes, pillow, and the environment of transformer-lens 3.9 (`make lines` makes it) beside this one. A check that fails for
another reason than that the architecture cannot do it ends the command: then the package is wrong, and the tests say so too.
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
sys.path[:0] = [str(HERE.parent / "tests"), str(HERE.parent / "tests" / "families")]

from checks import CHECKS, Check  # noqa: E402
from family_rows import BACKEND, FAMILIES, SITES, Family, save_family  # noqa: E402

from sepcap.models.hooked_families import LONGEST  # noqa: E402

OLDER = Path(os.environ.get("SEPCAP_TL3_PYTHON", HERE.parent / ".venv-tl39" / "bin" / "python"))
"""A Python that has transformer-lens 3.9."""

Outcome = Mapping[str, str]
"""Site -> why it cannot work; empty where all of it works."""

TITLE = """# Families

Made by `make families` from the checks in `tests/families`, which run on a small random model of each family's real configuration
class, saved to and loaded from a folder, with both lines of transformer-lens.

"works": on the sites `mlp`, `attn_pre_out` and `attn_value`. Else what does not, with the number of the error that says why.
"""

SECTIONS = {
    "bridge": "Bridges of transformer-lens {transformer-lens}\n\nWhat `load_model` gives, with transformers {transformers}.",
    "hooked": "HookedTransformers of transformer-lens {transformer-lens}\n\nWhat `load_model(..., backend=\"hooked\")` gives, with "
    "transformers {transformers}. With rotary positions it has at most {longest} of them. What\nreads the Hugging Face model (the harness, "
    "toxicity, transfer, a control with random weights, a tight pass) needs the bridge.",
}


def outcome(row: Family, name: str, check: Check, folder: Path) -> Outcome:
    """What a check says about a family: of all sites at once, and of every site alone where that does not work."""

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
    if name.startswith("rotation"):  # of the model, not of a site
        return dict.fromkeys(SITES, reason)
    return {site: why for site in SITES if (why := why_not((site,)))}


def measured() -> dict[str, dict[str, Outcome] | None]:
    """Family -> check -> outcome, in this environment; None: a family that is refused when it is loaded."""
    found: dict[str, dict[str, Outcome] | None] = {}
    for row in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            save_family(row, Path(folder))
            at_once = row.missing() is not None
            found[row.name] = None if at_once else {name: outcome(row, name, check, Path(folder)) for name, check in CHECKS.items()}
        print(row.name, flush=True)
    return found


def section() -> dict[str, Any]:
    """What was found in this environment, with the heading that says where."""
    versions = {name: version(name) for name in ("transformers", "transformer-lens")}
    return {"heading": SECTIONS[BACKEND].format(**versions, longest=f"{LONGEST:,}"), "outcomes": measured()}


def older(backend: str) -> dict[str, Any]:
    """The same in the environment of transformer-lens 3.9."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "section.json"
        subprocess.run([OLDER, __file__, str(out)], env=os.environ | {"SEPCAP_TEST_BACKEND": backend}, check=True)
        return json.loads(out.read_text())


def page(sections: Iterable[Mapping[str, Any]]) -> str:
    """The page: for every line a table of family and check; the checks; and the errors in the order in which the tables have them."""
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
        yield f"| {family} | {' | '.join(_cell(by_check[name], reasons) for name in CHECKS)} |"


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
    """Run all checks with both lines and write the page; with the name of a file, run those of this environment and write them there."""
    disable_progress_bar()
    if sys.argv[1:]:
        Path(sys.argv[1]).write_text(json.dumps(section()))
    else:
        (HERE / "families.md").write_text(page([section(), older("bridge"), older("hooked")]))


if __name__ == "__main__":
    main()
