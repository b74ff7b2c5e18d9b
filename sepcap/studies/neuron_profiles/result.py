"""Profiles of neurons: tables, figures, a page, and a view for notebooks (METHODS 23)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from sepcap.checks import checked, wrong
from sepcap.drawing.page import page_path
from sepcap.selection.neurons import NeuronSet
from sepcap.storage import write_atomically
from sepcap.studies.base.result import Figures, StudyResult
from sepcap.studies.base.text import counted, documents_in_words
from sepcap.studies.neuron_profiles import figures
from sepcap.studies.neuron_profiles.explorer import explorer_page
from sepcap.studies.neuron_profiles.units import GROUPS, ROLES, named_unit, words_of
from sepcap.studies.neuron_profiles.widget import explored


class NeuronProfiles(StudyResult):
    """What some neurons, or heads, do: contexts, preferred tokens, direct logit effects and histograms on two tasks.

    Attributes:
        config: the resolved configuration.
        tables: "neurons", one row per unit: site, layer, head, neuron, score, rank and importances and `delta_…` as far as they are
            known; for both tasks mean, abs (mean absolute activation), positive (share of positions above 0) and strongest (activation
            of the strongest context); preferred_forget, preferred_retain, promoted and suppressed, the first tokens of each.
            "contexts": unit, task, group ("strongest", or a group of quantiles), rank, document, row, position, activation, before, token,
            after, source, source_position, contribution. "tokens": unit, list ("preferred", "promoted", "suppressed"), task, rank, token,
            text, count, value (of a preferred token its lift, else the effect). "vocabulary": text of every token that occurs. "notes":
            what is missing, and why.
        tensors: the same as arrays, with the activation of every token of a context: `forget/top/window` [unit, context, token], …

    Example:
        >>> profiles = sepcap.examine(model, [(4, 812)], tokens=20_000)  # doctest: +SKIP
        >>> profiles.contexts((4, 812)).head()  # doctest: +SKIP
    """

    STUDY = "neuron-profiles"
    TITLE = "What do these neurons do?"
    FIGURES: ClassVar[Figures] = {
        "profile": ("Activations and direct logit effect of a neuron", figures.profile),
        "tasks": ("Mean activation on both tasks", figures.both_tasks),
    }

    @classmethod
    def of(
        cls, config: dict[str, Any], units: pd.DataFrame, tensors: Mapping[str, Tensor], notes: list[str], tokenizer: Any
    ) -> "NeuronProfiles":
        """The result with its tables."""
        ids = torch.cat([t.flatten().long() for name, t in tensors.items() if name.endswith(("token", "tokens"))])
        words = words_of(tokenizer, [i for i in torch.unique(ids).tolist() if i >= 0])
        tokens = _token_table(tensors, words)
        firsts: dict[str, Any] = {f"preferred_{role}": "" for role in ROLES}  # there, too, if no token is frequent enough
        for name, rows in cast(Any, tokens.groupby(["list", "task"], sort=False)):
            few = rows[rows["rank"] <= 5].groupby("unit")["text"].agg(lambda texts: " ".join(map(repr, texts)))
            firsts["_".join(filter(None, map(str, name)))] = few.reindex(range(len(units)), fill_value="").to_numpy()
        counted_documents = {f"n_documents_{role}": n for role, n in config["n_documents"].items()}
        tables = {
            "neurons": units.assign(**firsts, **counted_documents),
            "contexts": _context_table(tensors, words),
            "tokens": tokens,
            "vocabulary": pd.DataFrame({"token": list(words), "text": list(words.values())}),
            "notes": pd.DataFrame({"note": pd.array(notes, dtype="str")}),
        }
        return cls(config, tables, dict(tensors))

    def number(self, neuron: Any = 0) -> int:
        """Number of a unit in the table: given by that number, or by its place, such as (layer, neuron) or ("mlp", layer, neuron)."""
        table = self.tables["neurons"]
        if isinstance(neuron, int | np.integer) and not isinstance(neuron, bool):
            if 0 <= int(neuron) < len(table):
                return int(neuron)
            raise IndexError(f"neuron={neuron}: there are the units 0 to {len(table) - 1}; a place is a tuple, such as (layer, neuron)")
        if not isinstance(neuron, tuple | list):
            raise wrong("neuron", neuron, "the number of a row of the table, or a place such as (layer, neuron)")
        places = table[["site", "layer", "head", "neuron"]].itertuples(index=False)
        wanted = tuple(neuron)
        found = [i for i, place in enumerate(places) if wanted in (kept := tuple(p for p in place if not pd.isna(p)), kept[1:])]
        if len(found) != 1:
            raise ValueError(f"neuron={wanted!r}: {counted(len(found), 'profile')} of such a place; give a site too, or a row of .table")
        return found[0]

    def contexts(self, neuron: Any = 0) -> pd.DataFrame:
        """The contexts and samples of one unit, see `.tables`."""
        table = self.tables["contexts"]
        return table.loc[table["unit"] == self.number(neuron)].reset_index(drop=True)

    def tokens(self, neuron: Any = 0) -> pd.DataFrame:
        """The preferred, promoted and suppressed tokens of one unit, see `.tables`."""
        table = self.tables["tokens"]
        return table.loc[table["unit"] == self.number(neuron)].reset_index(drop=True)

    def neurons(self, *chosen: Any, model: Any) -> NeuronSet:
        """Some units as a NeuronSet of the model, to ablate or delete; default all."""
        found: dict[str, Tensor] = {}
        for i in map(self.number, chosen or range(len(self.table))):
            unit = self.table.iloc[i]
            empty = NeuronSet.empty(model, unit["site"])
            mask = found.setdefault(unit["site"], empty.masks[unit["site"]])
            mask[tuple(int(unit[name]) for name in ("layer", "head", "neuron") if not pd.isna(unit[name]))] = True
        return NeuronSet(found)

    def figure(self, kind: Any = None, **options: Any) -> Any:
        """The figure of one unit, given as for `number`, or a figure by its name: "profile" (of `neuron=`), or "tasks", of all units."""
        if kind is not None and not isinstance(kind, str):
            kind, options = "profile", {"neuron": kind, **options}
        return super().figure(kind, **options)

    @checked()
    def report(self, path: str | Path | None = None) -> Path:
        """Write one self-contained HTML page to look through the profiles: searched, sorted, without a server or a network.

        Args:
            path: the file to write; default `report.html` in the folder that the result was loaded from or saved to.
        """
        if path is None:
            if self.folder is None:
                raise ValueError("path=None: this result has no folder; give the name of the file to write, or save it first")
            path = Path(self.folder) / "report.html"
        path = page_path(path)
        write_atomically(path, explorer_page(self).encode("utf-8", "replace"))
        return path

    @checked()
    def explore(self, model: Any = None, *, tasks: Any = None, tokens: int = 4_096) -> Any:
        """The same view in a notebook. With the extra `widget` and a model, a click ablates the neuron and measures the cost on both tasks.

        Args:
            model: the model of the profiles; without one there is nothing to click.
            tasks: the two tasks, if they cannot be loaded by their names.
            tokens: predictions per task, from the evaluation texts, on which an ablation is measured.

        Returns:
            An anywidget, or without the package the page as an object that notebooks show; a warning says so if a model is given.
        """
        return explored(self, model, tasks, tokens)

    def summary(self) -> list[str]:
        """What was read, on which task the units are more active, and what is missing."""
        c, table = self.config, self.tables["neurons"]
        heads = bool(table["neuron"].isna().any())
        what = "head" if heads else f"{' and '.join(dict.fromkeys(table['site']))} neuron"
        read = " and ".join(
            f"{c['tokens_found'][role]:,} tokens of {task} ({counted(c['n_documents'][role], 'document')})"
            for role, task in zip(ROLES, c["tasks"], strict=True)
        )
        more, (forget, retain) = int((table["abs_forget"].to_numpy() > table["abs_retain"].to_numpy()).sum()), c["tasks"]
        said = [
            f"Profiles of {counted(len(table), what)} of {c['model']} on {read}.",
            f"The mean absolute activation is higher on {forget} for {more:,} of them, on {retain} for {len(table) - more:,}.",
            "All texts are from the collection parts: the evaluation parts are left for checks.",
        ]
        return said + [f"{note[0].upper()}{note[1:]}." for note in self.tables["notes"]["note"]]

    def __repr__(self) -> str:
        names = [named_unit(unit) for unit in self.tables["neurons"].head(3).to_dict("records")]
        more = ", …" if len(self.table) > 3 else ""
        parts = (self.config["model"], documents_in_words(self.n_documents), f"{len(self.table):,} of {', '.join(names)}{more}")
        return f"NeuronProfiles({'; '.join(filter(None, parts))})"


def _token_table(tensors: Mapping[str, Tensor], words: Mapping[int, str]) -> pd.DataFrame:
    parts = []
    for name, role in [("preferred", role) for role in ROLES] + [("promoted", ""), ("suppressed", "")]:
        at = f"{role}/{name}" if role else name
        if f"{at}/token" not in tensors:
            continue
        token = tensors[f"{at}/token"].numpy()
        unit, rank = np.nonzero(token >= 0)
        part = {"unit": unit, "list": name, "task": role, "rank": rank + 1, "token": token[unit, rank]}
        part["text"] = [words[i] for i in part["token"].tolist()]
        part["count"] = pd.array(tensors[f"{at}/count"].numpy()[unit, rank] if role else [pd.NA] * len(unit), dtype="Int64")
        part["value"] = tensors[f"{at}/{'lift' if role else 'effect'}"].numpy()[unit, rank]
        parts.append(pd.DataFrame(part))
    return pd.concat(parts, ignore_index=True)


def _context_table(tensors: Mapping[str, Tensor], words: Mapping[int, str]) -> pd.DataFrame:
    parts = []
    for role in ROLES:
        for name in ("top", "sample"):
            at = {key: tensors[f"{role}/{name}/{key}"].numpy() for key in ("row", "position", "start", "document", "activation", "tokens")}
            where = np.nonzero(at["row"] >= 0)
            part: dict[str, Any] = {"unit": where[0], "task": role}
            part["group"] = "strongest" if name == "top" else np.array(GROUPS, dtype=object)[where[1]]
            part["rank"] = where[-1] + 1
            part |= {key: at[key][where] for key in ("document", "row", "position", "activation")}
            middle = (at["position"] - at["start"])[where]
            texts = [[words.get(int(i), "") for i in ids] for ids in at["tokens"][where]]
            part["before"] = ["".join(text[:m]) for text, m in zip(texts, middle, strict=True)]
            part["token"] = [text[m] for text, m in zip(texts, middle, strict=True)]
            part["after"] = ["".join(text[m + 1 :]) for text, m in zip(texts, middle, strict=True)]
            if name == "top":
                token, source = (tensors[f"{role}/top/{key}"].numpy()[where] for key in ("source_token", "source"))
                part["source"] = [words.get(int(i)) for i in token]
                part["source_position"] = pd.array([int(i) if i >= 0 else pd.NA for i in source], dtype="Int64")
                part["contribution"] = tensors[f"{role}/top/contribution"].numpy()[where]
            parts.append(pd.DataFrame(part))
    return pd.concat(parts, ignore_index=True)
