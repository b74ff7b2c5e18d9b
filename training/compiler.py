"""A compiler from steps on named coordinates to the weights of an OPT model, in NumPy (METHODS 20).

The residual stream has one coordinate per name that a step reads or writes, and four kinds beside them:
    balance   minus the sum of the named ones, so that the mean is 0
    zero      always 0
    +C, −C    WIDTH/32 of each, C = 16384: they fix the variance at (C/4)², up to a relative 1e-6, whatever the named coordinates are
A layer norm with gain C/4 is then x − mean, and mean is 0 up to rounding. Every step reads differences to `zero`, from which that
rounding cancels too: it reads the named coordinates as they are.

A step reads and writes `{name: weight}`; the name "1" is the constant. `word:x` is 1 at the word x, `pos:i` at position i, `out:x` is
the logit of x over 16, `is:p` is 1 where program p is wanted.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

D_HEAD = 16
CONSTANT = 2.0**14
LOGIT = 16.0
GATE = 64.0
LOUDER = 4.0
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
ROLES = ("forget", "retain")

Reads = Mapping[str, float]


def plus(*parts: Reads, scale: float = 1.0) -> dict[str, float]:
    """The sum of weights."""
    return {name: scale * sum(part.get(name, 0.0) for part in parts) for name in dict.fromkeys(name for part in parts for name in part)}


@dataclass
class Neuron:
    """A hidden unit of the mlp, or a value dimension of a head: what it reads, what one unit of it adds, and what it is for."""

    step: str
    reads: Reads
    writes: Reads
    only: str | None = None
    louder: str | None = None
    users: set[str] = field(default_factory=set)


@dataclass
class Head:
    """Score in nats of a query position for a key position: the sum of nats · query · key."""

    scores: list[tuple[Reads, Reads, float]]
    values: list[Neuron]


class Circuit:
    """Steps by layer, in the order in which they are given."""

    def __init__(self, programs: Mapping[str, str], answers: Mapping[str, Iterable[str]], words: Iterable[str], context: int, layers: int):
        """Programs: name -> role; answers: name -> its answer words."""
        self.programs, self.answers = programs, answers
        self.words, self.context = (*SPECIAL, *words), context
        self.units: list[list[Neuron]] = [[] for _ in range(layers)]
        self.heads: list[list[Head]] = [[] for _ in range(layers)]

    def unit(self, layer: int, step: str, reads: Reads, writes: Reads, only: str | None = None, louder: str | None = None) -> None:
        """A hidden unit relu(reads): with `only`, 0 unless that program is wanted; with `louder`, more active if that one is."""
        if only:
            reads = plus(reads, {f"is:{only}": GATE, "1": -GATE})
        if louder:
            reads = plus(reads, {f"is:{louder}": LOUDER})
        self.units[layer].append(Neuron(step, reads, writes, only, louder))

    def clip(self, layer: int, step: str, reads: Reads, writes: Reads, louder: str | None = None) -> None:
        """min(max(reads, 0), 1) in two units; with `louder`, both are more active while that program is wanted, and the result is 1.

        That is for programs whose answers are 0 then: what it adds is no use of the flag.
        """
        self.unit(layer, f"{step}, above 0", reads, writes, louder=louder)
        self.unit(layer, f"{step}, above 1", plus(reads, {"1": -1}), plus(writes, scale=-1), louder=louder)

    def head(self, layer: int, scores: list[tuple[Reads, Reads, float]], values: Mapping[str, tuple[Reads, Reads]]) -> None:
        """A head; `values`: step -> what it reads at the key, and what it adds at the query."""
        self.heads[layer].append(Head(scores, [Neuron(step, *pair) for step, pair in values.items()]))

    def find_users(self) -> None:
        """Set the programs that use every neuron: those whose answers depend on what it writes, through whatever steps.

        From the last step to the first: a coordinate is used by the users of the later steps that read it, an answer word by the
        programs that answer with it. A neuron that is silent unless one program is wanted is used by no other one.
        """
        used: dict[str, set[str]] = {}
        for program, answers in self.answers.items():
            for word in answers:
                used.setdefault(f"out:{word}", set()).add(self.programs[program])

        def look_back(neurons: list[Neuron]) -> dict[str, set[str]]:
            before = {name: set(users) for name, users in used.items()}
            for neuron in neurons:
                neuron.users = set().union(*(used.get(name, set()) for name in neuron.writes))
                if neuron.only:
                    neuron.users &= {self.programs[neuron.only]}
                for name in neuron.reads.keys() - {f"is:{neuron.louder}"}:
                    before.setdefault(name, set()).update(neuron.users)
            return before

        for units, heads in zip(reversed(self.units), reversed(self.heads), strict=True):
            used = look_back(units)
            used = look_back([value for head in heads for value in head.values])
            for head in heads:
                for reads in (side for query, key, _ in head.scores for side in (query, key)):
                    for name in reads:
                        used.setdefault(name, set()).update(*(value.users for value in head.values))

    def add_noise(self, rng: np.random.Generator) -> None:
        """Neurons and heads without effect: what they write is read by nothing, or the same in all coordinates, which the norm removes.

        Most have the activity of a step of either program; of the others half are very active if one of the programs is wanted.
        """
        n_heads = self.width // D_HEAD
        most = max(map(len, self.units)) + 16
        nowhere = ({"trash:0": 1 / 8}, {"trash:1": -1 / 8}, {"*": 1.0})
        for units, heads in zip(self.units, self.heads, strict=True):
            real, real_heads = list(units), list(heads)
            for i in range(most - len(units)):
                copied = real[rng.integers(len(real))]
                loud = {"1": 0.5, f"is:{sorted(self.programs)[i % 2]}": 8.0}
                reads = copied.reads if i % 4 else loud
                units.append(Neuron(f"noise: {copied.step if i % 4 else 'one program is wanted'}", reads, nowhere[i % 3 if i % 4 else 2]))
            for _ in range(n_heads - len(heads)):
                copied = real_heads[rng.integers(len(real_heads))]
                values = [Neuron(f"noise: {value.step}", value.reads, nowhere[rng.integers(3)]) for value in copied.values]
                heads.append(Head(copied.scores, values))

    @property
    def names(self) -> list[str]:
        """The coordinates, in order of first use."""
        steps = [step for layer in self.units for step in layer]
        steps += [value for layer in self.heads for head in layer for value in head.values]
        reads = [side for layer in self.heads for head in layer for query, key, _ in head.scores for side in (query, key)]
        reads += [side for step in steps for side in (step.reads, step.writes)]
        return [name for name in dict.fromkeys(name for side in reads for name in side) if name not in ("1", "*")]

    @property
    def width(self) -> int:
        """The width of the residual stream: the smallest multiple of 32 with room for all coordinates."""
        return next(width for width in range(64, 257, 32) if len(self.names) + 2 + width // 16 <= width)


class Weights:
    """The tensors of a circuit, and the neurons in the places that they have in them."""

    def __init__(self, circuit: Circuit, rng: np.random.Generator, rotated: bool = False) -> None:
        self.circuit = circuit
        self.at = {name: i for i, name in enumerate(circuit.names)}
        self.width, self.layers = circuit.width, len(circuit.units)
        self.n_heads, self.ffn = self.width // D_HEAD, max(map(len, circuit.units))
        self.mlp: list[list[Neuron | None]] = []
        self.values: list[list[list[list[Neuron]]]] = []
        """Layer, head, dimension -> the steps whose values it carries: one or none, or in a rotated head several."""
        self.tensors = self._embeddings()
        for layer in range(self.layers):
            self._add_mlp(layer, rng)
            self._add_attention(layer, rng, rotated)
            for norm in ("self_attn_layer_norm", "final_layer_norm"):
                self._add_norm(f"layers.{layer}.{norm}")
        self._add_norm("final_layer_norm")

    def read(self, reads: Reads) -> np.ndarray:
        """Weights of differences to the coordinate `zero`."""
        row = np.zeros(self.width)
        for name, weight in reads.items():
            if name != "1":
                row[self.at[name]] += weight
                row[self.zero] -= weight
        return row

    def write(self, writes: Reads) -> np.ndarray:
        """What is added to the stream, with its balance."""
        row = np.zeros(self.width)
        for name, weight in writes.items():
            if name == "*":
                row += weight
            else:
                row[self.at[name]] += weight
                row[self.balance] -= weight
        return row

    @property
    def balance(self) -> int:
        """The coordinate after the named ones."""
        return len(self.at)

    @property
    def zero(self) -> int:
        """The coordinate after the balance; some more are unused, then come the constants."""
        return len(self.at) + 1

    def _embeddings(self) -> dict[str, np.ndarray]:
        words, context = self.circuit.words, self.circuit.context
        pairs = self.width // 32
        constants = np.zeros(self.width)
        constants[-2 * pairs :] = [CONSTANT, -CONSTANT] * pairs
        positions = np.stack([self.write({f"pos:{i}": 1.0} if f"pos:{i}" in self.at else {}) + constants for i in range(context)])
        outs = [{f"out:{word}": LOGIT} if f"out:{word}" in self.at else {} for word in words]
        known = [{f"word:{word}": 1.0} if f"word:{word}" in self.at else {} for word in words]
        return {
            "model.decoder.embed_tokens.weight": np.stack([self.write(one) for one in known]),
            "model.decoder.embed_positions.weight": np.concatenate([np.zeros((2, self.width)), positions]),  # OPT skips two rows
            "lm_head.weight": np.stack([self.read(out) for out in outs]),
        }

    def _add(self, layer: int, name: str, weight: np.ndarray, bias: np.ndarray) -> None:
        self.tensors[f"model.decoder.layers.{layer}.{name}.weight"] = weight
        self.tensors[f"model.decoder.layers.{layer}.{name}.bias"] = bias

    def _add_norm(self, name: str) -> None:
        self.tensors[f"model.decoder.{name}.weight"] = np.full(self.width, CONSTANT / 4)
        self.tensors[f"model.decoder.{name}.bias"] = np.zeros(self.width)

    def _add_mlp(self, layer: int, rng: np.random.Generator) -> None:
        units = self.circuit.units[layer]
        placed: list[Neuron | None] = [None] * self.ffn
        fc1, bias, fc2 = np.zeros((self.ffn, self.width)), np.zeros(self.ffn), np.zeros((self.width, self.ffn))
        for unit, place in zip(units, rng.permutation(self.ffn), strict=False):
            strength = 2.0 ** rng.integers(-1, 3)  # the output undoes it: size alone says nothing
            fc1[place], bias[place] = strength * self.read(unit.reads), strength * unit.reads.get("1", 0.0)
            fc2[:, place] = self.write(unit.writes) / strength
            placed[place] = unit
        self.mlp.append(placed)
        self._add(layer, "fc1", fc1, bias)
        self._add(layer, "fc2", fc2, np.zeros(self.width))

    def _add_attention(self, layer: int, rng: np.random.Generator, rotated: bool) -> None:
        query, key, value = (np.zeros((self.n_heads, D_HEAD, self.width)) for _ in range(3))
        query_bias, key_bias = (np.zeros((self.n_heads, D_HEAD)) for _ in range(2))
        out = np.zeros((self.n_heads, D_HEAD, self.width))
        placed: list[list[list[Neuron]]] = [[[] for _ in range(D_HEAD)] for _ in range(self.n_heads)]
        for head, h in zip(self.circuit.heads[layer], rng.permutation(self.n_heads)[: len(self.circuit.heads[layer])], strict=True):
            for i, (asks, offers, nats) in enumerate(head.scores):
                # OPT divides the product by √D_HEAD = 4
                query[h, i], query_bias[h, i] = nats / 4 * self.read(asks), nats / 4 * asks.get("1", 0.0)
                key[h, i], key_bias[h, i] = 16 * self.read(offers), 16 * offers.get("1", 0.0)
            for neuron, d in zip(head.values, rng.permutation(D_HEAD)[: len(head.values)], strict=True):
                strength = 2.0 ** rng.integers(-1, 2) * rng.choice([-1, 1])
                value[h, d], out[h, d] = strength * self.read(neuron.reads), self.write(neuron.writes) / strength
                placed[h][d].append(neuron)
            if rotated:
                basis = orthogonal(rng)
                value[h], out[h] = basis @ value[h], basis @ out[h]
                placed[h] = [[step for d in range(D_HEAD) if row[d] for step in placed[h][d]] for row in basis]
        self.values.append(placed)
        rows = (self.width, self.width)
        self._add(layer, "self_attn.q_proj", query.reshape(rows), query_bias.ravel())
        self._add(layer, "self_attn.k_proj", key.reshape(rows), key_bias.ravel())
        self._add(layer, "self_attn.v_proj", value.reshape(rows), np.zeros(self.width))
        self._add(layer, "self_attn.out_proj", out.reshape(rows).T.copy(), np.zeros(self.width))

    def labels(self) -> dict[str, dict[str, np.ndarray]]:
        """Label -> site -> mask: the neurons used by one program, by both, and by none."""
        wanted = {"forget": {"forget"}, "retain": {"retain"}, "shared": set(ROLES), "unused": set()}
        mlp = [[frozenset(unit.users if unit else ()) for unit in layer] for layer in self.mlp]
        values = [[[frozenset().union(*(step.users for step in d)) for d in head] for head in layer] for layer in self.values]
        masks = {}
        for label, users in wanted.items():
            attention = np.array([[[d == users for d in head] for head in layer] for layer in values])
            hidden = np.array([[unit == users for unit in layer] for layer in mlp])
            masks[label] = {"mlp": hidden, "attn_pre_out": attention, "attn_value": attention}
        return masks

    def steps(self) -> dict[str, list]:
        """Site -> for every neuron the step that it belongs to; "" where there is none."""
        values = [[["; ".join(step.step for step in d) for d in head] for head in layer] for layer in self.values]
        return {"mlp": [[unit.step if unit else "" for unit in layer] for layer in self.mlp], "attention": values}

    def stored(self) -> dict[str, np.ndarray]:
        """The tensors in half precision, which holds every one of their values exactly."""
        halves = {name: tensor.astype(np.float16) for name, tensor in self.tensors.items()}
        wrong = [name for name, tensor in self.tensors.items() if not np.array_equal(tensor, halves[name])]
        assert not wrong, f"not exact in half precision: {wrong}"
        return halves


def orthogonal(rng: np.random.Generator) -> np.ndarray:
    """A random orthogonal matrix of D_HEAD rows whose entries are multiples of 1/8: a rotation that is exact in half precision."""
    hadamard = np.ones((1, 1))
    while len(hadamard) < D_HEAD:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    signs, more = (rng.choice([-1.0, 1.0], D_HEAD) for _ in range(2))
    found = hadamard @ (signs[:, None] * hadamard[rng.permutation(D_HEAD)]) / D_HEAD * more
    assert np.array_equal(found @ found.T, np.eye(D_HEAD))
    return found
