"""Make docs/families.md: what works for which family, found out by running the checks of tests/families (`make families`).

It takes about a minute, and pillow. A check that fails for another reason than that the architecture cannot do it ends the command:
then the package is wrong, and the tests say so too.
"""

import sys
import tempfile
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "tests"), str(HERE.parent / "tests" / "families")]

from checks import CHECKS, Check  # noqa: E402
from family_rows import FAMILIES, SITES, Family, save_family  # noqa: E402

from sepcap.models.hooked_families import HOOKED_FAMILIES, LONGEST  # noqa: E402

Outcome = Mapping[str, str]
"""Site -> why it cannot work; empty where all of it works."""

TITLE = """# Families

Made by `make families` from the checks in `tests/families`, which run on a small random model of each family's real configuration
class, saved to and loaded from a folder. Versions: transformers {transformers}, transformer-lens {transformer-lens}.

"works": on the sites `mlp`, `attn_pre_out` and `attn_value`. Else what does not, with the number of the error that says why.
"""


LINES = """
## With transformer-lens 3.9

`make lines` tries this in an environment of its own.

- `backend="hooked"`, a HookedTransformer: {hooked}. Collection, scores, ablation, evaluation, deletion, rotation, pruning and saving
  work. Settings that HookedTransformer does not have are refused (OPT-350m, Galactica). With rotary positions it has at most
  {longest} of them. What reads the Hugging Face model (the harness, toxicity, transfer, a control with random weights, a tight pass)
  needs the bridge.
- Bridges: as in the table, without RoBERTa, Qwen-3.5 and DeepSeek-V3, which are refused.
"""


def outcome(row: Family, name: str, check: Check, folder: Path) -> Outcome:
    """What a check says about a family: of all sites at once, and of every site alone where that does not work."""

    def why_not(sites: tuple[str, ...]) -> str | None:
        with tempfile.TemporaryDirectory() as out:
            try:
                check(row, folder, sites, Path(out))
            except NotImplementedError as error:
                return str(error)
        return None

    reason = why_not(SITES)
    if reason is None:
        return {}
    if name.startswith("rotation"):  # of the model, not of a site
        return dict.fromkeys(SITES, reason)
    return {site: why for site in SITES if (why := why_not((site,)))}


def page(outcomes: Mapping[str, Mapping[str, Outcome]]) -> str:
    """The page: a table of family and check, the checks, and the errors in the order in which the table has them."""
    reasons: dict[str, int] = {}
    for outcome in (outcome for by_check in outcomes.values() for outcome in by_check.values()):
        for reason in outcome.values():
            reasons.setdefault(reason, len(reasons) + 1)
    versions = {name: version(name) for name in ("transformers", "transformer-lens")}
    lines = [TITLE.format(**versions), *_table(outcomes, reasons), "", "What is checked:", ""]
    lines += [f"- {name}: {_first_line(check)}" for name, check in CHECKS.items()]
    lines += ["", "Errors:", "", *(f"{number}. {reason}" for reason, number in reasons.items())]
    return "\n".join(lines) + "\n" + LINES.format(hooked=", ".join(HOOKED_FAMILIES), longest=LONGEST)


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
    """Run all checks and write the page."""
    disable_progress_bar()
    outcomes = {}
    for row in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            save_family(row, Path(folder))
            outcomes[row.name] = {name: outcome(row, name, check, Path(folder)) for name, check in CHECKS.items()}
        print(row.name, flush=True)
    (HERE / "families.md").write_text(page(outcomes))


if __name__ == "__main__":
    main()
