"""Profiles whose task names and tokens hold markup and script."""

from dataclasses import replace

import sepcap
from sepcap.tasks.load import load_task

MARKUP = "<img src=x onerror=window.__pwned=1></script><script>window.__pwned=2</script>"


def hostile_profiles(model, letters, digits, n=6):
    """Profiles of some mlp neurons and heads; every 20th token is markup."""
    tasks = (load_task(letters, name=f"code {MARKUP}"), load_task(digits, name=f"prose {MARKUP}"))
    places = [(0, i) for i in range(n)]
    how = {"tokens": 900, "k": 4, "window": 16, "min_count": 3, "progress": False}
    found = sepcap.examine(model, places, tasks=tasks, **how)
    words = found.tables["vocabulary"].copy()
    words.loc[::20, "text"] = f"{MARKUP}\n--><!--\u2028&amp;"
    return replace(found, tables={**found.tables, "vocabulary": words})
