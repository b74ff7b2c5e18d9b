"""Paragraph transfer: how much of the next paragraph is determined at the break before it ([PAR], METHODS 14).

Activations at the break of a source text are patched into the same break alone. The text generated from there, and the likelihood of
the true next paragraph, are compared with the whole context, with the break alone, and with the break of another text.

With learned positions, activations of early layers encode the position of the break; the break alone is at the beginning. Patching from
another text's break transfers its position too, so the difference of the two is free of it.

Tokens of the paragraph given to a baseline count nowhere: neither in the text it generated nor in the text that is compared with it. When
two conditions are compared, both are compared with the same rest of the paragraph. These baselines have no likelihoods of their own:
likelihoods are teacher-forced, so those of the break alone, from the next token on, are the same.
"""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sepcap.checks import checked
from sepcap.evaluation.likelihood import log_likelihoods
from sepcap.evaluation.sampling import sampled
from sepcap.evaluation.texts import Fit, get_embedder, probe
from sepcap.interventions.patching import Taken, check_layers, check_sites, patch_points, put, take
from sepcap.models.forward import measuring, positions_of
from sepcap.models.kinds import check_wraps, kind_of
from sepcap.models.sites import SITES, n_layers, site_shape
from sepcap.progress import progress
from sepcap.studies.base.folder import Pieces, as_json
from sepcap.studies.base.provenance import made_with
from sepcap.studies.base.runner import run_study, study
from sepcap.studies.paragraphs.conditions import OWN, Condition, Prompts, baselines, compared, donors_of, matched, profile
from sepcap.studies.paragraphs.config import ParagraphTransferConfig, Sites
from sepcap.studies.paragraphs.result import ParagraphTransfer
from sepcap.studies.paragraphs.tables import Found, make_tables
from sepcap.tasks.passages import Passage, check_passage, passages, sample_passages


@dataclass(frozen=True, eq=False)
class ParagraphTransferPlan:
    """All inputs of a transfer, tokenised and checked; the model has not been run yet.

    Attributes:
        config: the configuration.
        model: the model.
        passages: the texts.
        prompts: how prompts are made.
        donors: kind of donor -> number of the donor text for every text.
        likelihood: conditions whose likelihoods are measured.
        generation: conditions in which texts are generated.
        embedder: function that fits an embedder to all compared texts, and its name.
        resolved: the configuration as stored.
    """

    config: ParagraphTransferConfig
    model: Any
    passages: list[Passage]
    prompts: Prompts
    donors: dict[str, list[int | None]]
    likelihood: list[Condition]
    generation: list[Condition]
    embedder: tuple[Fit | None, str | None]
    resolved: dict[str, Any]

    def rows(self, condition: Condition, first: int = 0, last: int | None = None) -> list[int]:
        """Texts from `first` to `last` to which the condition applies: with a donor, and with tokens of the paragraph left."""
        whose = self.donors[condition.donor or OWN]
        texts = range(len(self.passages))[first:last]
        return [i for i in texts if whose[i] is not None and len(self.passages[i].following) > condition.given]

    def tokens(self) -> dict[str, int]:
        """Tokens that are run through the model: for sources, for likelihoods, and at most for generation."""
        sources = sum(len(self.prompts.source(p)) for p in self.passages) * len({c.donor for c in self.likelihood if c.donor})

        def of(conditions: list[Condition], more: Any) -> int:
            return sum(len(self.prompts.prompt(self.passages[i], c)) + more(i) for c in conditions for i in self.rows(c))

        c = self.config
        return {
            "sources": sources,
            "likelihood": of(self.likelihood, lambda i: len(self.passages[i].following)),
            "generation": of(self.generation, lambda i: c.tokens) * c.samples,
        }

    def cost(self) -> str:
        """Work and cost in one sentence."""
        tokens, c = self.tokens(), self.config
        held = sum(int(np.prod(shape[1:])) for shape in _shapes(self.model, c.sites)) * max(len(p.gap) for p in self.passages)
        written = f", and {len(self.generation)} × {c.samples * len(self.passages)} texts of {c.tokens} tokens generated" * c.generate
        return (
            f"{self.model.cfg.model_name}: {len(self.passages)} texts, {' and '.join(check_sites(c.sites))} patched at the break; "
            f"likelihoods in {len(self.likelihood)} conditions{written}: {sum(tokens.values()) / 1e6:.3g} M tokens through the model "
            f"({', '.join(f'{name} {n / 1e6:.2g} M' for name, n in tokens.items() if n)}), "
            f"{held * min(c.batch_size, len(self.passages)) * 4 / 1e6:.2g} MB of activations held at a time per donor"
        )


@study(ParagraphTransferConfig)
@checked()
def transfer_paragraphs(
    model: Any, config: ParagraphTransferConfig, *, out: str | Path | None = None, say: Callable[[str], Any]
) -> ParagraphTransfer:
    """Patch activations at the break of source texts into the break alone, and measure how much of the next paragraph they transfer.

    A tokenizer may encode a break as several tokens, or as one that includes neighbouring text: all tokens with a part of it are
    patched, and the neutral prompt has the same tokens, after BOS if the tokenizer has one. With `out`, every part is written before the
    next one begins, the same call resumes an interrupted study and reads a finished one.

    Args:
        model: what `load_model` returns, a causal language model; default is to load `config.model`.
        config: a `ParagraphTransferConfig`; its fields can also be given as keywords.
        out: folder of the study; without one, nothing is saved.
        progress: True announces the work and its cost and shows bars, False shows nothing; a function receives the announcements.

    Returns:
        ParagraphTransfer with `.tables["differences"]`, `.tables["layers"]`, `.summary()` and `.figure()`.

    Raises:
        TypeError: a text, layer or number of the wrong type.
        ValueError: a text without such a break or with nothing after it, or too long; texts mixed with passages; an unknown site; a
            model that is not a causal language model.
        IndexError: a layer that the model does not have.
        FileExistsError: `out` contains something else (the differing fields are named).

    Source: [PAR]; METHODS section 14.

    Example:
        >>> found = sepcap.transfer_paragraphs(model, tasks=["local-prose", "local-python"], n=32)  # doctest: +SKIP
        >>> print(*found.summary(), sep="\\n")  # doctest: +SKIP
    """
    plan = plan_paragraph_transfer(model, config)
    return run_study(ParagraphTransfer, plan.resolved, partial(_result, plan), out, plan.cost, say)


def plan_paragraph_transfer(model: Any, config: ParagraphTransferConfig) -> ParagraphTransferPlan:
    """Tokenise, find the breaks, choose the donors, and check that everything fits."""
    check_wraps(model, "transfer")
    if (kind := kind_of(model)) != "causal":
        raise ValueError(f"model is of kind {kind!r}: it cannot continue texts; give a causal language model")
    layers = _layers(model, config)
    patch_points(model, config.sites, layers)
    texts, without = config.texts, ("tasks",)  # the kinds are the names of the tasks
    if texts is None:
        how = {"context": config.context, "following": config.following, "at": config.at}
        texts = sample_passages(model.tokenizer, config.tasks, config.n, **how)
    else:
        texts, without = _texts(texts), ("tasks", "n", "context", "following")
    found = _passages(model, texts, config)
    prompts = Prompts.of(model.tokenizer, config)
    donors = donors_of(found, config.seed)
    main = compared(layers, list(donors))
    layerwise = [] if config.profile == "none" else list(dict.fromkeys(profile(layers, list(donors)).values()))
    generation = main + baselines(config.given) if config.generate else []
    if config.profile == "generation":
        generation += [c for c in layerwise if c.donor == OWN]
    _check_room(model, found, prompts, main + generation, config)
    decode = model.tokenizer.decode
    used = get_embedder(config.embedder) if config.generate else (None, None)
    spelled = Counter(tuple(decode([token]) for token in p.gap) for p in found)
    fields = dataclasses.asdict(dataclasses.replace(config, texts=(), tasks=(), embedder=None))
    resolved = {name: value for name, value in fields.items() if name not in without} | {
        **made_with(model),
        "layers": list(layers),
        "sites": list(check_sites(config.sites)),
        "texts": len(found),
        "n_documents": len(found),
        "kinds": dict(Counter(p.kind for p in found)),
        "break": _chosen(texts, config),
        "breaks": [[list(tokens), n] for tokens, n in spelled.most_common()],
        "conditions": [c.name for c in main],
        "embedder": used[1],
        # names are not unique: two functions or two folders can share one
        "embedder_probe": None if used[0] is None else probe(used[0]),
        "intervals": "Student's t over texts",
        "donors": matched(found, donors),
        "passages": hashlib.sha256(repr(found).encode()).hexdigest()[:16],
    }
    return ParagraphTransferPlan(config, model, found, prompts, donors, main + layerwise, generation, used, resolved)


def _layers(model: Any, config: ParagraphTransferConfig) -> tuple[int, ...]:
    return check_layers(None if isinstance(config.layers, str) else config.layers, n_layers(model))


def _texts(given: Any) -> list[Any]:
    """Texts or passages, one or several, as a list of one type."""
    if isinstance(given, str | Passage):
        return [given]
    try:
        texts = list(given)
    except TypeError:
        raise TypeError(f"texts={given!r}: give a text, several texts, or passages") from None
    if not texts:
        raise ValueError("texts is empty: give a text or several")
    if 0 < (n := sum(isinstance(text, Passage) for text in texts)) < len(texts):
        raise ValueError(f"texts has {n} passages among {len(texts)} texts: give texts alone or passages alone")
    return texts


def _passages(model: Any, texts: list[Any], config: ParagraphTransferConfig) -> list[Passage]:
    if isinstance(texts[0], Passage):
        found = [check_passage(p, f"texts[{i}]", model.cfg.d_vocab) for i, p in enumerate(texts)]
        return [dataclasses.replace(p, following=p.following[: config.paragraph_tokens]) for p in found]
    return passages(model.tokenizer, texts, config.at, most=config.paragraph_tokens, which=config.which)


def _chosen(texts: list[Any], config: ParagraphTransferConfig) -> str:
    """Which break of every text is used, in words."""
    if isinstance(texts[0], Passage):
        return "the break of each passage"
    number = {-1: "the last", 0: "the first"}.get(config.which, f"number {config.which}")
    return f"{number} of the breaks {config.at!r} that a paragraph follows"


def _check_room(model: Any, found: list[Passage], prompts: Prompts, conditions: list[Condition], config: ParagraphTransferConfig) -> None:
    """Raise if a text does not fit: nothing is truncated silently."""
    most = positions_of(model)
    for i, passage in enumerate(found):
        after = max(len(passage.following), config.tokens if config.generate else 0)
        for condition in conditions:
            ids = len(prompts.prompt(passage, condition))
            if ids + after > most:
                raise ValueError(
                    f"texts[{i}] is too long: {ids} tokens of prompt and {after} after it, but this model takes at most "
                    f"{most}. Shorten the context, or give smaller tokens= and paragraph_tokens="
                )


def _shapes(model: Any, sites: Sequence[Sites]) -> list[tuple[int, ...]]:
    return [site_shape(model, name) if name in SITES else (n_layers(model), model.cfg.d_model) for name in check_sites(sites)]


def _result(plan: ParagraphTransferPlan, pieces: Pieces) -> ParagraphTransfer:
    donors, embedder = plan.donors, plan.embedder[0]
    tables, tensors = make_tables(_measure(plan, pieces), plan.passages, plan.model.tokenizer, donors, plan.config, plan.resolved, embedder)
    return ParagraphTransfer(as_json({"study": ParagraphTransfer.STUDY, **plan.resolved}), tables, tensors)


def _measure(plan: ParagraphTransferPlan, pieces: Pieces) -> Found:
    """Likelihoods and generated texts of every condition, batch by batch."""
    size, n = plan.config.batch_size, len(plan.passages)
    found = Found({}, {})
    starts = range(0, n, size)
    total = len(starts) * (len(plan.likelihood) + len(plan.generation))
    bar = progress(total=total, desc="transfer", unit="part")
    # the norms, attention kernels and modes are set once, not in every pass
    with measuring(plan.model), bar:
        for first in starts:
            batch = _Batch(plan, first, first + size)
            for condition in plan.likelihood:
                name = f"likelihood/{condition.slug}/{first:06d}"
                kept = pieces.get(name)
                values = batch.likelihood(condition) if kept is None else kept[0]["log_likelihood"].numpy()
                if kept is None:
                    pieces.put(name, {"log_likelihood": torch.from_numpy(values)})
                found.add_likelihood(condition, batch.rows(condition), values)
                bar.update()
            for condition in plan.generation:
                name = f"generation/{condition.slug}/{first:06d}"
                kept = pieces.get(name)
                written = batch.generate(condition) if kept is None else kept[1]
                if kept is None:
                    pieces.put(name, {"tokens": torch.tensor(sum(map(len, written)))}, written)
                found.add_texts(condition, batch.rows(condition), written)
                bar.update()
    return found


class _Batch:
    """A batch of texts; activations of each donor are computed once, when they are first needed."""

    def __init__(self, plan: ParagraphTransferPlan, first: int, last: int) -> None:
        self._plan, self._first, self._last = plan, first, last
        self._taken: dict[str, tuple[list[int], Taken]] = {}

    def rows(self, condition: Condition) -> list[int]:
        return self._plan.rows(condition, self._first, self._last)

    def likelihood(self, condition: Condition) -> np.ndarray:
        """Log-likelihoods of the paragraph's tokens, [text, pos]."""
        rows = self.rows(condition)
        if not rows:
            return np.empty((0, 1))
        prompts = self._prompts(condition, rows)
        following = [self._plan.passages[i].following for i in rows]

        def inside(chosen: list[int]) -> AbstractContextManager[Any]:
            return self._patched(condition, [rows[k] for k in chosen])

        return log_likelihoods(self._plan.model, prompts, following, batch_size=self._plan.config.batch_size, inside=inside)

    def generate(self, condition: Condition) -> list[list[int]]:
        """Token ids generated after the prompt; the samples of a text are adjacent."""
        plan, config = self._plan, self._plan.config
        samples = [(i, s) for i in self.rows(condition) for s in range(config.samples)]
        rows = [i for i, _ in samples]
        # random numbers of each text: the same in all conditions and for any batch size
        luck = [np.random.default_rng([config.seed, i, s]).random(config.tokens) for i, s in samples]
        if not rows:
            return []

        def beginning(chosen: list[int]) -> AbstractContextManager[Any]:
            return self._patched(condition, [rows[k] for k in chosen])

        return sampled(
            plan.model,
            self._prompts(condition, rows),
            torch.from_numpy(np.stack(luck)),
            config.temperature,
            batch_size=config.batch_size,
            beginning=beginning,
        )

    def _prompts(self, condition: Condition, rows: list[int]) -> list[list[int]]:
        return [self._plan.prompts.prompt(self._plan.passages[i], condition) for i in rows]

    def _patched(self, condition: Condition, rows: list[int]) -> AbstractContextManager[Any]:
        """The model with the donors' activations at the breaks of these texts."""
        if condition.donor is None:
            return nullcontext()
        plan = self._plan
        texts, taken = self._donors(condition.donor)
        ends = [len(ids) - condition.given for ids in self._prompts(condition, rows)]
        room = [plan.prompts.room(plan.passages[i]) for i in rows]
        points = patch_points(plan.model, plan.config.sites, condition.layers)
        return plan.model.hooks(fwd_hooks=put(taken.of([texts.index(i) for i in rows]), points, ends, room, plan.config.scale))

    def _donors(self, donor: str) -> tuple[list[int], Taken]:
        if donor not in self._taken:
            plan = self._plan
            whose = plan.donors[donor]
            texts = [i for i in range(len(plan.passages))[self._first : self._last] if whose[i] is not None]
            givers = [plan.passages[j] for j in (whose[i] for i in texts) if j is not None]
            points = patch_points(plan.model, plan.config.sites, plan.resolved["layers"])
            sources = [plan.prompts.source(p) for p in givers]
            self._taken[donor] = texts, take(plan.model, sources, [len(p.gap) for p in givers], points)
        return self._taken[donor]
