"""Transformers in which the truth is planted: OPT models with weights set by hand (METHODS 16).

Two tasks, `a` and `b`, have K words each and share none. In both, word k is always followed by word k+1 (mod K), so the next word is
a function of the current one, and every word is equally frequent. A neuron fires on one word and writes its successor; without it
that successor has the same logit as its rivals, and ties count against the model. Accuracy is therefore the share of words whose
neuron is left, known before anything is run.

The residual stream is x = [u, −u]: its mean is exactly zero, so LayerNorm only scales it, by a factor that is the same for every
word. The parts of u are
    see     one-hot of the current word, written by the embedding, read by neurons
    next    one-hot of the next word, written by the neurons of one task, read by the unembedding
    index   one-hot of the next word's k without its task, written by shared neurons, read by the unembedding
    which   the task of the current word, a linear path from embedding to unembedding that no neuron is part of
    where   cosine and sine of the position, for attention that looks at its own position only
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import sepcap

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
CONTEXT = 32
LAYERS = 2
D_HEAD = 4


@dataclass(frozen=True)
class Planted:
    """A loaded model and the truth about it.

    Attributes:
        model: what `sepcap.load_model` made of the saved folder.
        truth: the neurons on which only `a`, only `b`, or `both` depend.
        needs: token id -> index, in the mask of the site, of the neuron without which its successor is missed.
        a, b: texts of the two tasks.
    """

    model: Any
    truth: dict[str, sepcap.NeuronSet]
    needs: dict[int, tuple[int, ...]]
    a: list[str]
    b: list[str]


def texts(task: str, words: int) -> list[str]:
    """Every start in the cycle with every length from 20 to 40: distinct texts in which all words are about equally frequent."""
    return [" ".join(f"{task}{(start + i) % words}" for i in range(length)) for start in range(words) for length in range(20, 41)]


def tokenizer(names: list[str]) -> Any:
    """One token per word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    whole_words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    whole_words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=whole_words, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


class Blueprint:
    """An OPT model that knows its words and does nothing yet: all weights are zero but those from embedding to unembedding."""

    def __init__(self, words: int, *, ffn: int = 4, which: float = 0.0, where: float = 0.0, heads: int | None = None) -> None:
        from transformers import OPTConfig, OPTForCausalLM

        self.words = words
        self.names = [*SPECIAL, *(f"{task}{k}" for task in "ab" for k in range(words))]
        vocabulary = len(self.names)
        self.see, self.next, self.index = 0, vocabulary, 2 * vocabulary
        self.which, self.where = self.index + words, self.index + words + 2
        half = self.where + 2
        self.half = half + half % 2  # 2·half is to be a multiple of d_head = 4
        self.width = 2 * self.half
        config = OPTConfig(
            hidden_size=self.width,
            word_embed_proj_dim=self.width,
            ffn_dim=ffn,
            num_hidden_layers=LAYERS,
            num_attention_heads=heads or self.width // D_HEAD,
            max_position_embeddings=CONTEXT,
            vocab_size=vocabulary,
            tie_word_embeddings=False,
            bos_token_id=0,
            pad_token_id=1,
            eos_token_id=2,
        )
        self.hf: Any = OPTForCausalLM(config)
        self.layers: Any = self.hf.model.decoder.layers
        # |x|² = 2·|u|² is the same for every word; LayerNorm divides by its root mean square
        self.gain = 1 / math.sqrt(2 * (1 + which**2 + where**2) / self.width + 1e-5)
        with torch.no_grad():
            for name, parameter in self.hf.named_parameters():
                if "layer_norm" not in name:
                    parameter.zero_()
            embedding, unembedding = self.hf.model.decoder.embed_tokens.weight, self.hf.lm_head.weight
            for token in range(vocabulary):
                embedding[token] += self.both_halves(self.see + token)
                unembedding[token] += self.both_halves(self.next + token)
            for t, task in enumerate("ab"):
                for k in range(words):
                    embedding[self.token(task, k)] += which * self.both_halves(self.which + t)
                    unembedding[self.token(task, k)] += self.both_halves(self.which + t) + self.both_halves(self.index + k)
            positions = self.hf.model.decoder.embed_positions.weight
            for i in range(CONTEXT):
                angle = 2 * math.pi * i / CONTEXT
                turn = math.cos(angle) * self.both_halves(self.where) + math.sin(angle) * self.both_halves(self.where + 1)
                positions[i + 2] += where * turn  # the first two rows of OPT's table are never used

    def both_halves(self, slot: int) -> torch.Tensor:
        """The direction of one coordinate of u in x = [u, −u]."""
        direction = torch.zeros(self.width)
        direction[slot], direction[self.half + slot] = 1, -1
        return direction

    def token(self, task: str, k: int) -> int:
        """Id of word k of a task."""
        return len(SPECIAL) + "ab".index(task) * self.words + k % self.words

    def reader(self, tokens: list[int]) -> torch.Tensor:
        """A weight row whose product with the normalised stream is 1 at the tokens and 0 at all others."""
        return sum((self.both_halves(self.see + t) for t in tokens), torch.zeros(self.width)) / (2 * self.gain)

    def finish(self, folder: Path, truth: dict[str, sepcap.NeuronSet], needs: dict[int, tuple[int, ...]]) -> Planted:
        """Save, and load as any other folder."""
        self.hf.save_pretrained(folder)
        tokenizer(self.names).save_pretrained(folder)
        return Planted(sepcap.load_model(folder, device="cpu"), truth, needs, texts("a", self.words), texts("b", self.words))


@torch.no_grad()
def in_mlp(
    folder: Path, *, words: int = 12, shared: int = 0, busy: int = 0, leak: float = 0.0, seed: int = 0, misled: float = 0.0
) -> Planted:
    """Two circuits of mlp neurons, of which `shared` words use the same neuron.

    Word k < shared of either task fires one common neuron, which writes only "index k+1"; the task comes from the linear path. Every
    other word has a neuron of its own. shared=0: the sum of two independent halves. shared=words: one circuit for both.
    Neurons stand in random places of both layers, and fire with strengths between 0.3 and 3 that their output weights undo, so
    that size alone says nothing about what a neuron is for.

    Args:
        busy: additional neurons that fire strongly at every word of both tasks and write nothing.
        leak: what a neuron gives, relative to its full strength, at words that are not its own.
        misled: what a neuron of one task gives, relative to its full strength, at all words of the other task, where it matters to
            nothing: the linear path writes the task more strongly. By activity every neuron is one of the other task.
    """
    jobs = [("both", [("a", k), ("b", k)]) for k in range(shared)]
    jobs += [(task, [(task, k)]) for task in "ab" for k in range(shared, words)]
    jobs += [("busy", [])] * busy
    per_layer = -(-len(jobs) // LAYERS)
    # attention does nothing here: few heads, or it takes most of the time of a pass
    blueprint = Blueprint(words, ffn=per_layer, which=misled + 1 if misled else 0.5 if shared else 0.0, heads=4)
    generator = torch.Generator().manual_seed(seed)
    places = torch.randperm(LAYERS * per_layer, generator=generator).tolist()
    strengths = (10 ** (torch.rand(len(jobs), generator=generator) - 0.5)).tolist()
    masks = {kind: torch.zeros(LAYERS, per_layer, dtype=torch.bool) for kind in ("a", "b", "both", "busy")}
    needs: dict[int, tuple[int, ...]] = {}
    for (kind, fires_on), place, strength in zip(jobs, places, strengths, strict=False):
        layer, n = divmod(place, per_layer)
        masks[kind][layer, n] = True
        fc1, fc2 = blueprint.layers[layer].fc1, blueprint.layers[layer].fc2
        if kind == "busy":
            fc1.bias[n] = 10.0
            continue
        needs |= {blueprint.token(*word): (layer, n) for word in fires_on}
        # 1 at its own words, `leak` at others; without a leak clearly below zero there, because rounding is not to fire it
        elsewhere = leak if leak else -0.1
        fc1.weight[n] = (1 - elsewhere) * strength * blueprint.reader([blueprint.token(*word) for word in fires_on])
        # at BOS nothing leaks: a prediction there would be an accident of rounding
        fc1.weight[n] -= 2 * leak * strength * blueprint.reader([0])
        fc1.bias[n] = elsewhere * strength
        if misled:
            other = [blueprint.token("ab"[kind == "a"], k) for k in range(words)]
            fc1.weight[n] += (misled - elsewhere) * strength * blueprint.reader(other)
        task, k = fires_on[0]
        successor = blueprint.index + (k + 1) % words if kind == "both" else blueprint.next + blueprint.token(task, k + 1)
        fc2.weight[:, n] = blueprint.both_halves(successor) / strength
    return blueprint.finish(folder, {kind: sepcap.NeuronSet({"mlp": mask}) for kind, mask in masks.items()}, needs)


@torch.no_grad()
def in_attention(folder: Path, *, words: int = 8, seed: int = 0) -> Planted:
    """Two circuits of attention heads: head by head, four words of one task each.

    Every head looks at its own position only, so a value is a function of the current word. One more head is always on
    and writes nothing; the others are idle.
    """
    blueprint = Blueprint(words, where=1.0)
    n_heads = blueprint.width // D_HEAD
    for layer in blueprint.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            for head in range(n_heads):
                for i in range(2):
                    # neighbouring positions differ by 1 − cos(2π/32) = 0.019 in cosine, thus by 138 in attention score:
                    # their attention is exp(−138), zero in float32
                    projection.weight[head * D_HEAD + i, blueprint.where + i] = 120 / blueprint.gain
    jobs = [(task, first) for task in "ab" for first in range(0, words, D_HEAD)] + [("busy", 0)]
    places = torch.randperm(LAYERS * n_heads, generator=torch.Generator().manual_seed(seed)).tolist()
    masks = {kind: torch.zeros(LAYERS, n_heads, D_HEAD, dtype=torch.bool) for kind in ("a", "b", "busy")}
    needs: dict[int, tuple[int, ...]] = {}
    for (kind, first), place in zip(jobs, places, strict=False):
        layer, head = divmod(place, n_heads)
        masks[kind][layer, head] = True
        attention = blueprint.layers[layer].self_attn
        for d in range(D_HEAD):
            neuron = head * D_HEAD + d
            if kind == "busy":
                attention.v_proj.bias[neuron] = 10.0
                continue
            needs[blueprint.token(kind, first + d)] = (layer, head, d)
            # negative values too: only their size is to count
            attention.v_proj.weight[neuron] = (-1) ** d * blueprint.reader([blueprint.token(kind, first + d)])
            attention.out_proj.weight[:, neuron] = (-1) ** d * blueprint.both_halves(blueprint.next + blueprint.token(kind, first + d + 1))
    return blueprint.finish(folder, {kind: sepcap.NeuronSet({"attn_pre_out": mask}) for kind, mask in masks.items()}, needs)
