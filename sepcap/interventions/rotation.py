"""Rotation: value and output weights in the singular basis of their product (METHODS 7)."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sepcap.checks import checked
from sepcap.errors import CorruptFile, unknown
from sepcap.interventions.resample import undisturbed
from sepcap.interventions.trial import check_same, one_pass, small_input
from sepcap.models.forward import measuring, run_hooks
from sepcap.models.kinds import architecture_of
from sepcap.models.sites import bind, get_site, live_weight, live_weights, n_layers, norm_inside, write_weight, write_weights
from sepcap.models.weights import hash_of
from sepcap.models.wrappers import check_plain_weights
from sepcap.progress import progress
from sepcap.storage import load_tensors, save_tensors

SITES = ("attn_value", "attn_pre_out")
NULL = 2.0**-23
"""A singular value below this fraction of its head's largest counts as zero: it is within the rounding of float32 weights."""
ROUNDING = 5e-3
"""Relative tolerance of a mixture of values (float32 on tensor cores; eight units of rounding if that is more)."""
LARGE = 100.0
"""Size of the test values: beyond any bound at which an architecture clips values."""


@dataclass(frozen=True, eq=False)
class Rotation:
    """The basis in which every value head's W_V W_O = U S Vᵀ is diagonal: W_V' = W_V A = U√S and W_O' = B W_O = √S Vᵀ.

    Under grouped-query attention all query heads of a value head share one basis. The singular values of a head are in
    descending order; the entry of largest magnitude of every left vector U[:, i] is positive (the first of several); if singular
    values are equal, the basis is not unique. Null directions are last: their columns of A and rows of B are zero, so that they
    contribute nothing. U is W_V A / √S and Vᵀ is B W_O / √S.

    Attributes:
        bias: treatment of the value bias, "fold" or "rotate".
        singular_values: S, float64 [layer, value_head, d_head].
        basis: A, float64 [layer, value_head, d_head, d_head]; activations rotate as v' = v A.
        inverse: B, of the same shape; A B is the identity on everything that reaches the output.
        shift: subtracted from activations before they are rotated, [layer, value_head, d_head]: b_V under "fold", else 0.
        output_bias: what is added to b_O, [layer, d_model].
        source: hash of the value and output weights the basis was computed from.
        rotated: hash of these weights after `rotate_values`, else "".
        original: the weights before `rotate_values`, [layer, …] each, which `undo` restores.
    """

    bias: Literal["fold", "rotate"]
    singular_values: Float[Tensor, "layer value_head d_head"]
    basis: Float[Tensor, "layer value_head d_head d_head"]
    inverse: Float[Tensor, "layer value_head d_head d_head"]
    shift: Float[Tensor, "layer value_head d_head"]
    output_bias: Float[Tensor, "layer d_model"]
    source: str
    rotated: str = ""
    original: dict[str, Tensor] = field(default_factory=dict)

    def _tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("singular_values", "basis", "inverse", "shift", "output_bias")}

    @property
    def fingerprint(self) -> str:
        """Hash of the basis: the same for the same weights and bias."""
        return hash_of([*self._tensors().items(), (self.bias, torch.empty(0))])

    @checked()
    def activations(self, site: str, layer: int, z: Float[Tensor, "batch pos head d_head"]) -> Float[Tensor, "batch pos head d_head"]:
        """Transform activations of the unedited model to those of the rotated one; half precision is returned as float32.

        Rows of attention sum to 1, so that under "fold" z, like v, contains the value bias once.

        Args:
            site: "attn_value" or "attn_pre_out".
            layer: which layer.
            z: activations at the site's hook.
        """
        if site not in SITES:
            raise unknown("site", site, SITES, "Only value and output weights are rotated.")
        dtype = z.dtype if z.dtype == torch.float64 else torch.float32
        basis, shift = (tensor[layer].to(z.device, dtype) for tensor in (self.basis, self.shift))
        group = z.shape[2] // len(basis)
        if z.shape[2:] != (len(basis) * max(group, 1), basis.shape[-1]) or (site == "attn_value" and group != 1):
            raise ValueError(f"z has heads [{z.shape[2]}, {z.shape[3]}]; this rotation has {len(basis)} value heads of {basis.shape[-1]}")
        basis, shift = (tensor.repeat_interleave(group, dim=0) for tensor in (basis, shift))
        return torch.einsum("bphd,hde->bphe", z.to(dtype) - shift, basis)

    @checked()
    @torch.no_grad()
    def apply(self, model: Any) -> None:
        """Edit the weights of the model that the basis was computed from, and compare the attention outputs in a short pass.

        Raises:
            ValueError: another model, or one whose logits would change (it is not changed then).
        """
        original = _circuit(model)
        if hash_of(original.items()) != self.source:
            raise ValueError("model: its value and output weights are not those this rotation was computed from")
        neurons = bind(model, "attn_pre_out")
        before = one_pass(neurons)
        try:
            for layer in range(n_layers(model)):
                self._apply_to(model, layer)
            after = one_pass(neurons, before.entered)
            check_same(model, after, before, "rotation", "in another basis of the values the attention output differs")
        except BaseException:
            _write_circuit(model, original)
            raise

    def _apply_to(self, model: Any, layer: int) -> None:
        attn = model.blocks[layer].attn
        w_v, b_v = live_weight(attn, "W_V"), live_weight(attn, "b_V", None)
        basis, inverse = (tensor[layer].to(w_v.device) for tensor in (self.basis, self.inverse))
        write_weight(model, layer, "attn.W_V", w_v.double() @ basis)
        if b_v is not None:
            rotated = torch.einsum("hd,hde->he", b_v.double(), basis)
            write_weight(model, layer, "attn.b_V", torch.zeros_like(rotated) if self.bias == "fold" else rotated)
        group = len(attn.W_O) // len(inverse)
        write_weight(model, layer, "attn.W_O", inverse.repeat_interleave(group, dim=0) @ attn.W_O.double())
        if bool(self.output_bias[layer].any()):
            write_weight(model, layer, "attn.b_O", attn.b_O.double() + self.output_bias[layer].to(attn.b_O.device))

    @checked()
    @torch.no_grad()
    def undo(self, model: Any) -> None:
        """Restore the value and output weights that the model had before `rotate_values`, bit for bit.

        Raises:
            ValueError: this object did not rotate a model, or not this one, or its attention was edited since.
        """
        if not self.original:
            raise ValueError("there is nothing to undo: this rotation comes from compute_rotation, which edits no model")
        if hash_of(_circuit(model).items()) != self.rotated:
            raise ValueError("model: its value and output weights are not as rotate_values left them (another model, or edited since)")
        _write_circuit(model, self.original)

    @checked()
    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically; it includes the weights for `undo`, if any."""
        tensors = self._tensors() | {f"original.{name}": weight for name, weight in self.original.items()}
        save_tensors(path, tensors, {"kind": "rotation", "bias": self.bias, "source": self.source, "rotated": self.rotated})

    @classmethod
    @checked()
    def load(cls, path: str | Path) -> "Rotation":
        """Read what `save` wrote."""
        tensors, meta = load_tensors(path, "rotation")
        original = {name.removeprefix("original."): tensors.pop(name) for name in list(tensors) if name.startswith("original.")}
        try:
            return cls(meta["bias"], **tensors, source=meta["source"], rotated=meta["rotated"], original=original)
        except TypeError as error:
            raise CorruptFile(f"{path}: incomplete rotation ({error}); compute it again") from error

    @checked()
    def to(self, device: str | torch.device) -> "Rotation":
        """The same rotation on another device; the weights for `undo` are not moved."""
        return replace(self, **{name: tensor.to(device) for name, tensor in self._tensors().items()})

    def __repr__(self) -> str:
        layers, heads, d_head = self.singular_values.shape
        rank = (self.singular_values > 0).sum(-1).double().mean()
        return f"Rotation({self.bias}, {layers} layers of {heads} value heads, mean rank {rank:.1f} of {d_head})"


@torch.no_grad()
@checked()
def compute_rotation(model: Any, bias: Literal["fold", "rotate"] = "fold") -> Rotation:
    """The rotation of a model's value/output circuits, without editing the model.

    Per value head two thin QR factorisations and one SVD of d_head × d_head, in float64: with W_V = Q₁R₁ and W_Oᵀ = Q₂R₂,
    R₁R₂ᵀ = u S vᵀ gives A = R₂ᵀ v S^-½ and B = S^-½ uᵀ R₁. The d_model × d_model product is never formed.

    Args:
        model: a hooked model.
        bias: "fold" moves the value bias into the output bias (exact, because rows of attention sum to 1); "rotate" keeps it,
            b_V' = b_V A, and moves only the part of it in null directions, if any.

    Returns:
        Rotation, for `collect(..., rotation=...)`.

    Raises:
        NotImplementedError: an architecture whose output depends on the basis of the values; see `check_rotation`.
        ValueError: a model with a value bias but no output bias to move it to.

    Source: [SEP] section 2.4; METHODS section 7.

    Example:
        >>> rotation = sepcap.compute_rotation(model)  # doctest: +SKIP
        >>> sepcap.collect(model, "local-code", sites="attn_value", rotation=rotation)  # doctest: +SKIP
    """
    check_rotation(model, bias)
    parts = [_of_layer(model.blocks[layer].attn, bias) for layer in progress(range(n_layers(model)), desc="rotate", leave=True)]
    singular_values, basis, inverse, shift, output_bias = (torch.stack(part) for part in zip(*parts, strict=True))
    for layer in range(n_layers(model)):
        if bool(output_bias[layer].any()) and model.blocks[layer].attn.b_O is None:
            raise ValueError(
                f"bias='rotate': the value bias of layer {layer} has a part in null directions of W_V W_O, "
                "and this model has no b_O to take it"
            )
    return Rotation(bias, singular_values, basis, inverse, shift, output_bias, hash_of(_circuit(model).items()))


def check_rotation(model: Any, bias: str) -> None:
    """Raise if a model's values cannot be rotated, or its value bias cannot be folded.

    Rotation requires that the input of W_O is a weighted sum of values, coordinate by coordinate; folding requires that the
    weights sum to 1. Both are tested by giving every layer known values.

    Raises:
        NotImplementedError: an architecture without value weights, with a norm, gate or bound between the values and W_O, or, under
            "fold", with a value bias and attention whose rows do not sum to 1, or no output bias.
    """
    d_head = bind(model, "attn_value").shape[-1]
    check_plain_weights(model, ["attn"], "rotation")
    attn, name = model.blocks[0].attn, architecture_of(model)
    tolerance = max(ROUNDING, 8 * torch.finfo(attn.W_V.dtype).eps)
    if bias == "fold" and attn.b_V is not None and attn.b_O is None:
        raise NotImplementedError(f"bias='fold' on {name}: it has a value bias, but no output bias b_O to fold it into; use bias='rotate'")
    for layer, (turned, expected, ones) in enumerate(_mixtures_of_known_values(model, d_head)):
        if not float((turned - expected).abs().max()) <= tolerance * float(expected.abs().max()):
            norm = norm_inside(model.blocks[layer].attn)
            raise NotImplementedError(
                f"rotation of {name}: {norm or 'a gate, bound or norm'} is between the values and W_O in layer {layer}, so that another "
                "basis of the values would change its output. Use statistics and ablation in the original basis instead"
            )
        if bias == "fold" and attn.b_V is not None and not float((ones - 1).abs().max()) <= tolerance:
            raise NotImplementedError(
                f"bias='fold' on {name}: rows of attention do not sum to 1 in layer {layer} (attention sinks), so that the contribution of "
                "the value bias depends on the position; use bias='rotate'"
            )


@torch.no_grad()
def _mixtures_of_known_values(model: Any, d_head: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Outputs of attention for values N A, for N (then times A) and for ones, in every layer; N is noise, A an arbitrary matrix.

    A batch of three equal rows differs only in the values. The difference does not enter the residual stream, so that
    all rows have the same attention patterns in all layers.
    """
    generator = torch.Generator().manual_seed(0)
    turn = torch.randn(d_head, d_head, generator=generator) / d_head**0.5
    mixtures = []

    def give(v: Tensor, hook: Any) -> Tensor:
        noise = torch.randn(v.shape[1:], generator=generator)
        return torch.stack([noise @ turn, noise, torch.ones_like(noise)]).to(v) * LARGE

    def look(z: Tensor, hook: Any) -> Tensor:
        turned, straight, ones = z.detach().float().cpu() / LARGE
        mixtures.append((turned, straight @ turn, ones))
        return torch.zeros_like(z)

    sites = (("attn_value", give), ("attn_pre_out", look))
    hooks = [(get_site(site).hook_name(layer), function) for layer in range(n_layers(model)) for site, function in sites]
    with measuring(model), undisturbed(model):
        run_hooks(model, small_input(model, 3), hooks)
    return mixtures


@checked(stopped="the model may be changed in part: load it again")
def rotate_values(model: Any, bias: Literal["fold", "rotate"] = "fold") -> Rotation:
    """Edit a model so that its value neurons are the singular directions of W_V W_O; its logits are preserved (1e-4 in float32).

    Args:
        model: a hooked model; it is changed.
        bias: treatment of the value bias, see `compute_rotation`.

    Returns:
        Rotation; `.undo(model)` restores the old weights from its copy.

    Raises:
        NotImplementedError: an architecture whose output depends on the basis of the values; see `check_rotation`.
        ValueError: a model with a value bias but no output bias to move it to (it is not changed then).

    Source: [SEP] section 2.4; METHODS section 7.

    Example:
        >>> rotation = sepcap.rotate_values(model, bias="fold")  # doctest: +SKIP
        >>> rotation.undo(model)  # doctest: +SKIP
    """
    rotation = compute_rotation(model, bias)
    original = _circuit(model)
    rotation.apply(model)
    return replace(rotation, original=original, rotated=hash_of(_circuit(model).items()))


def _of_layer(attn: Any, bias: str) -> tuple[Tensor, ...]:
    """S, A, B, shift and the addition to b_O, of one layer."""
    w_v, w_o = live_weight(attn, "W_V").detach().double(), attn.W_O.detach().double()
    heads, d_model, d_head = w_v.shape
    grouped = w_o.view(heads, -1, d_head, d_model).transpose(1, 2).flatten(2)  # W_O of a group's heads side by side
    r1, r2 = (torch.linalg.qr(weight, mode="r").R for weight in (w_v, grouped.mT))
    u, s, vt = torch.linalg.svd(r1 @ r2.mT, full_matrices=False)
    root = torch.where(s > NULL * s[:, :1], s, torch.inf).rsqrt()  # 0 in null directions
    basis, inverse = r2.mT @ (vt.mT * root[:, None, :]), root[:, :, None] * (u.mT @ r1)
    left = w_v @ basis
    largest = left.gather(1, left.abs().argmax(dim=1, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).double()
    s = s.masked_fill(root == 0, 0)
    basis, inverse = basis * sign, inverse * sign.mT
    b_v = live_weight(attn, "b_V", None)
    b_v = torch.zeros_like(s) if b_v is None else b_v.detach().double()
    kept = torch.zeros_like(b_v) if bias == "fold" else torch.einsum("hd,hde,hef->hf", b_v, basis, inverse)
    rows = w_o.view(heads, -1, d_head, d_model).sum(1)  # what one unit of each value adds to the output
    moved, whole = (torch.einsum("hd,hdm->hm", b, rows) for b in (b_v - kept, b_v))
    # rounding residue of a bias that is kept entirely is set to zero
    moved = moved.masked_fill(moved.norm(dim=1, keepdim=True) <= NULL * whole.norm(dim=1, keepdim=True), 0)
    shift = b_v if bias == "fold" else torch.zeros_like(b_v)
    return tuple(part.cpu() for part in (s, basis, inverse, shift, moved.sum(0)))


def _circuit(model: Any) -> dict[str, Tensor]:
    """Copies of the value and output weights of all layers, on the CPU."""
    of_layers = [live_weights(block, "attn") for block in model.blocks]
    return {name: torch.stack([weights[name].detach().cpu() for weights in of_layers]) for name in of_layers[0]}


def _write_circuit(model: Any, circuit: dict[str, Tensor]) -> None:
    write_weights(model, {f"attn.{name}": weights for name, weights in circuit.items()})
