"""Resample ablation: replace activations of neurons by those on another text or image at the same position (METHODS 8).

The other text or image, the donor, is run through the model without hooks, in a separate pass before each ablated pass. Only
the donor's activations of the ablated neurons are kept, until they are used.

Position p is the p-th token of a row, not counting padding. If the donor has fewer tokens, its positions from 1 on are repeated;
position 0, whose activations are outliers, is used for position 0 only. A pass that continues the previous one (generation, with
or without a key-value cache) keeps its donors.

For a masked language model, donors have the same positions hidden: beginning, end and mask tokens stay in place, and padding of
a donor is masked. Images all have the same positions.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from sepcap.errors import UnknownName, unknown
from sepcap.models.forward import Hook, Stop, call, device_of, with_hooks
from sepcap.models.kinds import inner, is_hooked_transformer, kind_of
from sepcap.models.sites import get_site
from sepcap.selection.neurons import NeuronSet
from sepcap.tasks.batches import pad, separator_of
from sepcap.tasks.documents import Spelling
from sepcap.tasks.images import pixels_of
from sepcap.tasks.load import load_task
from sepcap.tasks.registry import TASKS
from sepcap.tasks.samples import check_content
from sepcap.tasks.task import Task

Rows = list[np.ndarray]
"""Token ids [pos], or pixels [channel, height, width], each."""

Draw = Callable[[Rows, int, Rows], Rows]
"""Returns the donors of a batch, given its rows, the number of earlier rows, and the rows of the previous batch."""

CHARACTERS = [chr(code) for code in range(32, 127)]
PIECE = 64
"""Tokens or characters drawn at once: the donor of a longer row begins like that of a shorter one."""


def _other_rows(model: Any, seed: int) -> Draw:
    def draw(rows: Rows, first: int, former: Rows) -> Rows:
        rng = np.random.default_rng([seed, first])
        if len(rows) == 1:
            if not former:
                others = _quoted(name for name in _sources(model) if name != "batch")
                raise ValueError(
                    "source='batch': a batch of one row has no other row to take from; "
                    f"give larger batches or another source=: {others} or a task"
                )
            return [former[rng.integers(len(former))]]
        # one cycle through all rows, so that no row is its own donor
        order = rng.permutation(len(rows))
        donors = np.empty(len(rows), dtype=int)
        donors[order] = np.roll(order, 1)
        return [rows[donor] for donor in donors]

    return draw


def _random_tokens(model: Any, seed: int) -> Draw:
    known = np.arange(min(len(model.tokenizer), model.cfg.d_vocab))
    ids = np.setdiff1d(known, model.tokenizer.all_special_ids)
    return _streamed(model, seed, lambda rng: rng.choice(ids, PIECE))


def _random_characters(model: Any, seed: int) -> Draw:
    spelling = Spelling(model.tokenizer)
    return _streamed(model, seed, lambda rng: spelling.ids("".join(rng.choice(CHARACTERS, PIECE))))


def _other_texts(model: Any, seed: int, task: Task) -> Draw:
    parts = [source.documents("collect") for source in task.sources]
    spelling = Spelling(model.tokenizer, task.special_tokens)

    def piece(rng: np.random.Generator) -> list[int]:
        part = parts[rng.integers(len(parts))]
        # the beginning of a long document is enough for most rows; if it is not, another document follows
        return spelling.ids(part[int(rng.integers(len(part)))]["text"][: PIECE**2])

    return _streamed(model, seed, piece)


def _streamed(model: Any, seed: int, piece: Callable[[np.random.Generator], Iterable[int]]) -> Draw:
    """Donors concatenated from pieces; every row has its own random stream, so they do not depend on the batch size."""
    bos = separator_of(model.tokenizer)
    fixed = model.tokenizer.all_special_ids if kind_of(model) == "masked" else [] if bos is None else [bos]

    def fill(row: np.ndarray, number: int) -> np.ndarray:
        rng = np.random.default_rng([seed, number])
        free = ~np.isin(row, fixed)
        stream: list[int] = []
        while len(stream) < free.sum():
            stream.extend(piece(rng))
        donor = row.copy()
        donor[free] = stream[: free.sum()]
        return donor

    return lambda rows, first, former: [fill(row, first + i) for i, row in enumerate(rows)]


def _random_pixels(model: Any, seed: int) -> Draw:
    from PIL import Image

    def picture(rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
        channels, *size = shape
        return Image.fromarray(rng.integers(0, 256, size if channels == 1 else (*size, channels), dtype=np.uint8))

    return _pictures(model, seed, picture)


def _other_images(model: Any, seed: int, task: Task) -> Draw:
    parts = [source.documents("collect") for source in task.sources]

    def picture(rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
        part = parts[rng.integers(len(parts))]
        return part[int(rng.integers(len(part)))]["image"]

    return _pictures(model, seed, picture)


def _pictures(model: Any, seed: int, picture: Callable[[np.random.Generator, tuple[int, ...]], Any]) -> Draw:
    """Image donors, preprocessed by the model's processor; each has its own random stream, as for texts."""

    def draw(rows: Rows, first: int, former: Rows) -> Rows:
        drawn = [picture(np.random.default_rng([seed, first + i]), row.shape) for i, row in enumerate(rows)]
        return list(pixels_of(drawn, model.processor, len(rows[0])).numpy())

    return draw


SOURCES: dict[str, Callable[[Any, int], Draw]] = {"batch": _other_rows, "tokens": _random_tokens, "characters": _random_characters}
"""Sources of donors by name; any other `source` is a task whose texts or images are used."""

IMAGE_SOURCES: dict[str, Callable[[Any, int], Draw]] = {"batch": _other_rows, "pixels": _random_pixels}
"""The same for image classifiers."""


def _sources(model: Any) -> dict[str, Callable[[Any, int], Draw]]:
    return IMAGE_SOURCES if kind_of(model) == "images" else SOURCES


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def get_draw(model: Any, source: Any, seed: int) -> Draw:
    """Function that draws donors from a source: a name in `SOURCES` or `IMAGE_SOURCES`, or anything that `load_task` accepts."""
    sources = _sources(model)
    if isinstance(source, str) and source in sources:
        return sources[source](model, seed)
    try:
        task = load_task(source)
    except UnknownName:
        hint = f"For this model: {_quoted(sources)}; or a task, a path, a datasets.Dataset, a list of strings, or a Task."
        raise unknown("source", source, [*sources, *TASKS], hint) from None
    check_content(model, task)
    return (_other_images if task.content == "images" else _other_texts)(model, seed, task)


def _input_point(model: Any) -> str:
    """Name of the hook point that receives the token ids or pixels. In a HookedTransformer it is optional; it is enabled here."""
    if not is_hooked_transformer(model):
        return "embed.hook_in"
    if not model.cfg.use_hook_tokens:
        from transformer_lens.hook_points import HookPoint

        model.hook_tokens, model.cfg.use_hook_tokens = HookPoint(), True
        model.setup()
    return "hook_tokens"


class Donors:
    """The donors of one use of an ablation, pass by pass.

    Attributes:
        hooks: plain TransformerLens `fwd_hooks`. The first is called with the token ids or pixels, before everything else.
    """

    def __init__(self, model: Any, neurons: NeuronSet, draw: Draw) -> None:
        self._model, self._draw = model, draw
        self._masks = {get_site(site).hook_name(layer): mask for site, layer, mask in neurons.by_layer()}
        self.hooks: list[Hook] = [(name, partial(self._replace, name)) for name in self._masks]
        if self.hooks:
            self.hooks.insert(0, (_input_point(model), self._begin_image if kind_of(model) == "images" else self._begin))
        # rows of a masked language model are separated and ended by tokens that are not padding
        self._separator = separator_of(model.tokenizer) if kind_of(model) == "causal" else None
        self._ids = np.empty((0, 0), dtype=np.int64)
        self._rows: Rows = []
        self._former: Rows = []
        self._first = 0
        self._call: Mapping[str, Any] | None = None
        self._found: dict[str, Tensor] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Also record the attention mask and the key-value cache of every pass, which hooks do not receive."""
        handle = inner(self._model).register_forward_pre_hook(self._notice, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _notice(self, module: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        self._call = kwargs

    def _begin(self, ids: Int[Tensor, "..."], hook: Any) -> None:
        new = torch.atleast_2d(ids).numpy(force=True)
        past = self._past(new)
        if past > self._ids.shape[1]:
            raise ValueError(f"this pass continues {past} tokens of a cache from outside the ablation: their ids are not known")
        whole = np.concatenate([self._ids[:, :past], new], axis=1) if past else new
        if not past and not _begins_with(whole, self._ids):
            self._first, self._former = self._first + len(self._rows), self._rows
        real = self._real(whole)
        self._ids, self._call = whole, None
        self._rows = [row[kept] if kept.any() else row[:1] for row, kept in zip(whole, real, strict=True)]
        donors = self._draw(self._rows, self._first, self._former)
        columns = _columns(real, np.array([len(donor) for donor in donors]))[:, past:]
        filled, whose = pad(donors, self._separator or 0)
        # under causal attention no token attends to later ones
        found = self._activations(filled, None if kind_of(self._model) == "causal" or bool(whose.all()) else whose)
        rows = np.arange(len(donors))[:, None]
        self._found = {name: z[rows, columns] for name, z in found.items()}

    def _begin_image(self, pixels: Float[Tensor, "batch channel height width"], hook: Any) -> None:
        rows = list(pixels.float().numpy(force=True))
        self._first, self._former, self._rows = self._first + len(self._rows), self._rows, rows
        donors = self._draw(rows, self._first, self._former)
        self._found = self._activations(torch.from_numpy(np.stack(donors)), None)

    @torch.no_grad()
    def _activations(
        self, inputs: Shaped[Tensor, "batch ..."], mask: Bool[Tensor, "batch pos"] | None
    ) -> dict[str, Float[Tensor, "batch pos chosen"]]:
        device, found = device_of(self._model), {}

        def keep(name: str, z: Tensor, hook: Any) -> None:
            found[name] = z[..., self._masks[name].to(z.device)]
            if len(found) == len(self._masks):
                raise Stop

        try:
            with undisturbed(self._model), with_hooks(self._model, [(name, partial(keep, name)) for name in self._masks]):
                call(self._model, inputs.to(device), None if mask is None else mask.to(device))
        except Stop:
            pass
        return found

    def _past(self, new: np.ndarray) -> int:
        if self._call is None:  # plain hooks: a single token can only be the next one
            return self._ids.shape[1] if new.shape[1] == 1 and len(new) == len(self._ids) else 0
        cache = self._call.get("past_key_values")
        if cache is None and (cache := self._call.get("past_kv_cache")) is not None:  # of a HookedTransformer
            return int(cache[0].past_keys.shape[1])
        return 0 if cache is None else int(cache.get_seq_length())

    def _real(self, whole: np.ndarray) -> Bool[np.ndarray, "batch pos"]:
        mask = None if self._call is None else self._call.get("attention_mask")
        if mask is not None and tuple(mask.shape) == whole.shape:
            return mask.bool().numpy(force=True)
        return _not_padding(whole, self._model.tokenizer, self._separator)

    def _replace(self, name: str, z: Float[Tensor, "..."], hook: Any) -> Tensor:
        if name not in self._found:
            raise RuntimeError(f"resample at {name}: this pass did not begin with token ids or pixels, so no donors can be drawn")
        z = z.clone()
        z[..., self._masks[name].to(z.device)] = self._found.pop(name).to(z.device, z.dtype)
        return z


def _begins_with(ids: np.ndarray, former: np.ndarray) -> bool:
    longer = former.size > 0 and len(ids) == len(former) and ids.shape[1] > former.shape[1]
    return longer and bool((ids[:, : former.shape[1]] == former).all())


def _not_padding(ids: Int[np.ndarray, "batch pos"], tokenizer: Any, separator: int | None) -> Bool[np.ndarray, "batch pos"]:
    """All positions but the run of padding at either end. If the pad token also starts rows, the last of a leading run is kept."""
    padding = tokenizer.pad_token_id
    behind = np.isin(ids, [t for t in (padding, separator) if t is not None])[:, ::-1].cumprod(axis=1)[:, ::-1].astype(bool)
    ahead = (ids == (-1 if padding is None else padding)).cumprod(axis=1).astype(bool)
    if padding == separator:
        ahead[:, :-1] &= ahead[:, 1:]
        ahead[:, -1] = False
    return ~(behind | ahead)


def _columns(real: Bool[np.ndarray, "batch pos"], lengths: Int[np.ndarray, " batch"]) -> Int[np.ndarray, "batch pos"]:
    """Position in the donor's row for every position of the batch; see the module docstring."""
    position = np.maximum(real.cumsum(axis=1) - 1, 0)
    n = lengths[:, None]
    again = np.minimum(1 + (position - 1) % np.maximum(n - 1, 1), n - 1)
    return np.where(position < n, position, again)


@contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """The unmodified model, for a pass inside a pass: only permanent hooks, and every block computes."""
    points = {id(point): point for point in model.hook_dict.values()}.values()
    temporary = [(point._forward_hooks, [handle.hook.id for handle in point.fwd_hooks if not handle.is_permanent]) for point in points]
    others = inner(model)._forward_pre_hooks
    temporary.append((others, [key for key, hook in others.items() if isinstance(getattr(hook, "__self__", None), Donors)]))
    # whole tables are restored, because hooks are called in their order
    before = [(hooks, keys, dict(hooks)) for hooks, keys in temporary if keys]
    # a pass that starts from a later layer has replaced `forward`
    replaced = [(block.__dict__, block.__dict__["forward"]) for block in model.blocks if "forward" in block.__dict__]
    try:
        for hooks, keys, _ in before:
            for key in keys:
                hooks.pop(key, None)
        for own, _ in replaced:
            del own["forward"]
        yield
    finally:
        for hooks, _, entries in before:
            hooks.clear()
            hooks.update(entries)
        for own, forward in replaced:
            own["forward"] = forward
