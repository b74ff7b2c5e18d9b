"""Every family, every check; what an architecture cannot do says why; and docs/families.md says the same."""

import re
from pathlib import Path

import pytest
from family_checks import CHECKS
from family_rows import BACKEND, FAMILIES, SITES, save_family

from sepcap.models.hooked_transformers import line

EVERY_DAY = {"OPT", "GPT-2", "GPT-NeoX (Pythia)", "Mistral", "Phi", "Phi-3", "BERT", "ViT"}
"""One family for each way in which weights lie; the others are in the slow tier."""

SLOW = ("half precision", "profiles")
"""Checks of the slow tier; test_examine_families.py makes profiles of a few families every day."""

WORKS = [
    pytest.param(row, check, sites, marks=[pytest.mark.slow] if check in SLOW or row.name not in EVERY_DAY else [])
    for row in FAMILIES
    for check in CHECKS
    if (sites := tuple(s for s in SITES if not row.refusal(check, s)))
]
REFUSED = [
    # what loads and has no such neurons says the same in every check: the first is enough for every day
    pytest.param(
        row, check, site, why, marks=[pytest.mark.slow] if check not in ("statistics", "sites") and not check.startswith("rotation") else []
    )
    for row in FAMILIES
    for check in CHECKS
    for site in (SITES[:1] if check.startswith("rotation") else SITES)  # rotation is of the model, not of a site
    if (why := row.refusal(check, site)) and (not row.missing() or (check, site) == ("sites", "mlp"))  # once, where it is loaded
]

PAGE = (Path(__file__).parents[2] / "docs" / "families.md").read_text()
ERRORS = {int(number): reason for number, reason in re.findall(r"^(\d+)\. (.+)$", PAGE, re.MULTILINE)}
HERE = f"{'HookedTransformers' if BACKEND == 'hooked' else 'Bridges'} of transformer-lens {line()}."
"""How the heading begins under which the page says what is tried here."""
SECTION = next((part for part in PAGE.split("\n## ") if part.startswith(HERE)), "")
TABLE = [[cell.strip() for cell in row.strip("|").split("|")] for row in SECTION.splitlines() if row.startswith("| ")]
LOADED = [row for row in FAMILIES if not row.missing()]


def named(value):
    return getattr(value, "name", None) or ("+".join(value) if isinstance(value, tuple) else value)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folder of the tiny model of a family, made when it is first asked for."""
    made = {}

    def folder(row):
        if row.layout == "vit":
            pytest.importorskip("PIL")
        if row.name not in made:
            made[row.name] = save_family(row, tmp_path_factory.mktemp("family"))
        return made[row.name]

    return folder


@pytest.mark.parametrize(("row", "check", "sites"), WORKS, ids=named)
def test_works(row, check, sites, folders, tmp_path):
    CHECKS[check](row, folders(row), sites, tmp_path)


@pytest.mark.parametrize(("row", "check", "site", "why"), REFUSED, ids=named)
def test_says_why(row, check, site, why, folders, tmp_path):
    with pytest.raises(NotImplementedError, match=why) as raised:
        CHECKS[check](row, folders(row), (site,), tmp_path)
    if row.missing():
        assert row.name in "".join(re.findall(r"Refused when they are loaded: (.*)\.", SECTION)).split("; ")
        return
    assert str(raised.value) in ERRORS.values(), "docs/families.md is not up to date: make families"


def test_the_table_has_the_rows_and_columns_of_the_code():
    assert TABLE[0] == ["family", *CHECKS]
    assert [line[0] for line in TABLE[1:]] == [row.name for row in LOADED]


def test_the_table_says_what_the_tests_say():
    """Cell by cell: "works", or the sites that do not, with the number of an error that says why."""
    used = set()
    for row, (_, *cells) in zip(LOADED, TABLE[1:], strict=True):
        for check, cell in zip(CHECKS, cells, strict=True):
            if cell == "–":  # not checked yet, with this version
                continue
            why = {site: part for site in SITES if (part := row.refusal(check, site))}
            if re.fullmatch(r"no \(\d+\)", cell):
                numbers = dict.fromkeys(SITES, int(cell[4:-1]))
            else:
                assert re.fullmatch(r"works|(no: |works, but not )(`\w+` \(\d+\)(, )?)+", cell), cell
                assert cell.startswith("works") == (len(why) < len(SITES))
                numbers = {site: int(number) for site, number in re.findall(r"`(\w+)` \((\d+)\)", cell)}
            assert numbers.keys() == why.keys(), f"{row.name}, {check}: {cell}"
            assert all(why[site] in ERRORS[number] for site, number in numbers.items())
            used |= set(numbers.values())
    assert used <= set(ERRORS)


def test_every_error_of_the_page_stands_in_a_table():
    tables = "\n".join(row for row in PAGE.splitlines() if row.startswith("| "))
    assert sorted(ERRORS) == sorted({int(number) for number in re.findall(r"\((\d+)\)", tables)})
