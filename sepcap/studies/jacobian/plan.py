"""Plan of a study of Jacobians: the tokens, the method and the cost of its Jacobians."""

import dataclasses
import os
import sys
import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sepcap.checks import checked
from sepcap.errors import warn
from sepcap.interventions.patching import check_layers
from sepcap.models.blocks.parts import block_part, check_part
from sepcap.models.forward import device_of
from sepcap.models.kinds import kind_of
from sepcap.models.loading.load import DTYPES
from sepcap.models.sites import n_layers
from sepcap.statistics.spectrum import BLOCKS, CHUNK_BYTES, OVERSAMPLE, PROBES, jacobian_products
from sepcap.studies.base.provenance import made_with
from sepcap.studies.base.text import counted
from sepcap.studies.jacobian.config import JacobianSpectrumConfig
from sepcap.tasks.batches import TokenSample, separator_of
from sepcap.tasks.load import load_task
from sepcap.tasks.samples import MaskedSample, sample_task

EXACT_BYTES = 256 * 2**20
"""Memory up to which "auto" computes the full Jacobian: the matrix, and twice as much during its decomposition."""

APART = 512
"""Tokens of the task sampled per row, so that rows are from different texts, or from distant parts of one text."""


@dataclass(frozen=True, eq=False)
class JacobianSpectrumPlan:
    """All inputs of the Jacobians, sampled and checked; nothing is computed yet.

    Attributes:
        config: the configuration as given.
        model: the trained model.
        layers: numbers of the layers.
        rows: token ids, and the positions that are varied.
        method: "exact" or "randomized".
        resolved: the configuration as stored.
    """

    config: JacobianSpectrumConfig
    model: Any
    layers: tuple[int, ...]
    rows: tuple[tuple[Tensor, list[int]], ...]
    method: str
    resolved: dict[str, Any]

    @property
    def jacobians(self) -> int:
        """Number of Jacobians, including those of the control."""
        return len(self.layers) * len(self.rows) * (2 if self.config.control else 1)

    @property
    def products(self) -> int:
        """Products with one Jacobian; an upper limit if the method is randomised."""
        if self.method == "exact":
            return self.resolved["size"] // (self.config.tokens if self.config.part == "mlp" else 1)
        return _products_at_most(self.config.k, self.resolved["size"])

    def cost(self) -> str:
        """Work, memory and time in one sentence; the time is estimated from a few products that are computed here."""
        c, size = self.config, self.resolved["size"]
        how = "the full matrix" if self.method == "exact" else f"the {min(c.k, size)} leading values by products alone"
        whole = bytes_needed("exact", c, size, self.resolved["d_model"])
        switched = c.method == "auto" and self.method == "randomized"
        seconds, working = self._measured()
        memory = bytes_needed(self.method, c, size, self.resolved["d_model"]) + working
        return (
            f"{self.model.cfg.model_name}: {counted(self.jacobians, 'Jacobian')} ({counted(len(self.layers), 'layer')}, "
            f"{counted(len(self.rows), 'row')}{', trained and random weights' if c.control else ''}) of {size:,} x {size:,} numbers, "
            f"{_megabytes(size**2 * _itemsize(c))} each if written out; {how}"
            + (f" (method='auto': all values would need {_megabytes(whole)}; ranks can be lower bounds only)" if switched else "")
            + f": {'' if self.method == 'exact' else 'at most '}{self.products:,} products per Jacobian, {_megabytes(memory)} at once, "
            f"{_megabytes(working)} of it for one batch of products, about {self.jacobians * seconds / 60:.2g} minutes"
        )

    def _measured(self) -> tuple[float, int]:
        """Seconds per Jacobian, and bytes for one batch of products.

        The time is estimated from a few products and a small decomposition, which scales with the third power of the size.
        """
        c, size = self.config, self.resolved["size"]
        ids, kept = self.rows[0]
        with block_part(self.model, self.layers[0], c.part, ids, kept, norm=c.norm, dtype=DTYPES[c.precision]) as part:
            few = min(32, size)
            products = jacobian_products(part.function, part.at, chunk_of(part.product_bytes, size))
            some = torch.eye(size, few, dtype=part.at.dtype, device=part.at.device)
            products.transposed(some)
            started = time.perf_counter()
            products.transposed(some)
            per_product = (time.perf_counter() - started) / few
            width = self.resolved["d_model"] if c.part == "mlp" else size
            probe = min(width, 256)
            matrix = torch.randn(probe, probe, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(part.at)
            started = time.perf_counter()
            torch.linalg.svdvals(matrix)
            small = time.perf_counter() - started
        decompose = small * (width / probe) ** 3 * (size // width) if self.method == "exact" else 0.0
        together = min(c.k + OVERSAMPLE, size) if self.method == "randomized" else width
        return self.products * per_product + decompose, part.product_bytes * min(together, chunk_of(part.product_bytes, size))


@checked()
def plan_jacobian_spectrum(model: Any, config: JacobianSpectrumConfig) -> JacobianSpectrumPlan:
    """Choose rows and method, and check that every Jacobian can be computed; `.cost()` of the plan states the cost.

    Example:
        >>> plan_jacobian_spectrum(model, JacobianSpectrumConfig(tokens=8)).cost()  # doctest: +SKIP
    """
    if not hasattr(model, "cfg"):
        raise TypeError(f"model is a {type(model).__name__}; give what sepcap.load_model returns")
    check_part(model, config.part, DTYPES[config.precision])  # before the model is used
    layers = check_layers(None if config.layers == "all" else config.layers, n_layers(model))
    width = int(model.cfg.d_model)
    size = config.tokens * width
    config.check_threshold(size)
    needed = bytes_needed("exact", config, size, width)
    method = ("exact" if needed <= EXACT_BYTES else "randomized") if config.method == "auto" else config.method
    check_part(model, config.part, DTYPES[config.precision], forward=method == "randomized")
    if method == "exact" and needed > (there := _memory(device_of(model))):
        raise MemoryError(
            f"method='exact' with tokens={config.tokens} needs {_megabytes(needed)} for one Jacobian of {size:,} rows, and "
            f"{_megabytes(there)} are available; give fewer tokens, or method='randomized'"
        )
    sample = _sample(model, config)
    rows = _rows(sample, config)
    resolved = dataclasses.asdict(dataclasses.replace(config, task=sample.task, method=method)) | {
        **made_with(model),
        "layers": list(layers),
        "size": size,
        "d_model": width,
        "rows": len(rows),
        "sample": [ids.tolist() for ids, _ in rows],
        "documents": list(sample.indices),
        "n_documents": sample.n_documents,
    }
    return JacobianSpectrumPlan(config, model, layers, rows, method, resolved)


def bytes_needed(method: str, config: JacobianSpectrumConfig, size: int, width: int) -> int:
    """Memory for one Jacobian without the batch of products: three matrices of its size for the decomposition, or the two bases."""
    if method == "randomized":
        return 3 * size * _itemsize(config) * _products_at_most(config.k, size) // 2
    return 3 * _itemsize(config) * (config.tokens * width**2 if config.part == "mlp" else size**2)


def _products_at_most(k: int, size: int) -> int:
    block = min(size, k + OVERSAMPLE)
    return block + 2 * min(BLOCKS * block, size) + PROBES


def _itemsize(config: JacobianSpectrumConfig) -> int:
    return DTYPES[config.precision].itemsize


def chunk_of(product_bytes: int, size: int) -> int:
    """Number of products to compute at once."""
    return max(1, min(size, CHUNK_BYTES // product_bytes))


def _megabytes(n: int) -> str:
    return f"{n / 1e6:,.3g} MB" if n < 1e9 else f"{n / 1e9:,.3g} GB"


def _memory(device: torch.device) -> int:
    """Free memory of a GPU, or total memory of the machine, whose caches can be released."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # a system that does not report it
        return sys.maxsize


def _sample(model: Any, config: JacobianSpectrumConfig) -> TokenSample:
    ends = 2 if kind_of(model) == "masked" else int(separator_of(model.tokenizer) is not None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a task with too little text for distant rows may still have enough rows
        return sample_task(model, load_task(config.task), "evaluate", config.rows * max(APART, config.tokens), config.tokens + ends)


def _rows(sample: TokenSample, config: JacobianSpectrumConfig) -> tuple[tuple[Tensor, list[int]], ...]:
    """Full rows of one document each, spread over the sample, with the positions that are neither BOS nor another special token."""
    special = sample.special if isinstance(sample, MaskedSample) else (sample.bos,)
    inside = [(row, [i for i, token in enumerate(row.tolist()) if token not in special]) for row in sample.rows]
    whole = [(torch.from_numpy(row), kept) for row, kept in inside if len(kept) == config.tokens]
    if not whole:
        raise ValueError(
            f"task {sample.task!r} has no row of {config.tokens} tokens of one text to evaluate; give fewer tokens, or more text"
        )
    if len(whole) < config.rows:
        warn(f"task {sample.task!r} has {len(whole)} rows of {config.tokens} tokens, not {config.rows}")
    n = min(config.rows, len(whole))
    return tuple(whole[i * len(whole) // n] for i in range(n))
