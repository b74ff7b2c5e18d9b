"""An OPT model in which the truth about a paragraph break is planted: what it knows, in which layer, and what it makes the model write.

Words belong to topics a, b and c. Two attention heads do everything:

    layer 0, at the break: looks at the words before it and writes their topic into the residual stream ("memory"). At every other
        token, and where no word stands before the break, it looks at the beginning token, whose value is zero.
    layer 1, at every token: looks at breaks, reads their memory, and writes the topic's words into what the unembedding reads.

Without a memory the model writes words of topic c; all K words of a topic are equally likely. A break alone thus gives c, with the
activations of a break after words of topic a it gives a, each word with probability 1/K. Patched in layer 1 alone, only the token after the
break is changed: later tokens read the memory that layer 0 wrote.

The residual stream is x = [u, −u], so that LayerNorm only scales it; scores are so large that attention is exact in float32.
"""

from pathlib import Path
from typing import Any

import torch

import sepcap

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
TOPICS = "abc"
WORDS = 4
CONTEXT = 64
D_HEAD = 8
SHARP = 2000.0
LOUD = 40.0
"""Logit of a topic's words against all others: exp(−40) is nothing."""


def tokenizer(newline: str) -> Any:
    """One token per word; the break is one token where `newline` is "\\n\\n", and two where it is "\\n"."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = [*SPECIAL, newline, *(f"{topic}{k}" for topic in TOPICS for k in range(WORDS))]
    whole = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    split = [pre_tokenizers.Split(Regex(f"{newline}|[^\\s]+"), "removed", invert=True)]
    whole.pre_tokenizer = pre_tokenizers.Sequence(split)
    return PreTrainedTokenizerFast(tokenizer_object=whole, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


BREAK = len(SPECIAL)


def word(topic: str, k: int) -> int:
    """Id of word k of a topic."""
    return BREAK + 1 + TOPICS.index(topic) * WORDS + k % WORDS


def text(topic: str, before: int = 6, after: int = 5, start: int = 0, newline: str = "\n\n") -> str:
    """Words of a topic, a break, words of the same topic."""
    gap = newline if newline == "\n\n" else newline * 2
    left = " ".join(f"{topic}{(start + k) % WORDS}" for k in range(before))
    return left + gap + " ".join(f"{topic}{(start + 2 * k) % WORDS}" for k in range(after))


@torch.no_grad()
def build(folder: Path, newline: str = "\n\n") -> Any:
    """Save the model and load it as any other folder."""
    from transformers import OPTConfig, OPTForCausalLM

    own = tokenizer(newline)
    vocabulary, topics = len(own), len(TOPICS)
    # coordinates of u: which topic a word has; whether a token is a break, the beginning, a word; the memory; what is to be written
    topic, is_break, is_start, is_word, memory, write = 0, topics, topics + 1, topics + 2, topics + 3, 2 * topics + 3
    half = 3 * topics + 3
    half += -half % D_HEAD
    config = OPTConfig(
        hidden_size=2 * half,
        word_embed_proj_dim=2 * half,
        ffn_dim=4,
        num_hidden_layers=2,
        num_attention_heads=2 * half // D_HEAD,
        max_position_embeddings=CONTEXT,
        vocab_size=vocabulary,
        tie_word_embeddings=False,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )
    hf: Any = OPTForCausalLM(config)
    for name, parameter in hf.named_parameters():
        if "layer_norm" not in name:
            parameter.zero_()

    def both(slot: int) -> torch.Tensor:
        direction = torch.zeros(2 * half)
        direction[slot], direction[half + slot] = 1, -1
        return direction

    embedding, unembedding = hf.model.decoder.embed_tokens.weight, hf.lm_head.weight
    embedding[BREAK] += both(is_break)
    embedding[0] += both(is_start)
    for t, name in enumerate(TOPICS):
        for k in range(WORDS):
            embedding[word(name, k)] += both(topic + t) + both(is_word)
            unembedding[word(name, k)] += both(write + t)
    # what is written without a memory: a constant, weaker than any memory
    default, loud = hf.model.decoder.layers[1].fc2.bias, LOUD
    default += 0.2 * both(write + TOPICS.index("c"))
    unembedding *= loud

    first, second = (layer.self_attn for layer in hf.model.decoder.layers)
    # layer 0, head 0: a break looks for words, everything for the beginning, where nothing better is to be seen
    first.q_proj.weight[0] = SHARP * both(is_break)
    first.q_proj.bias[1] = SHARP
    first.k_proj.weight[0] = 2 * both(is_word)
    first.k_proj.weight[1] = 0.1 * both(is_start)
    # layer 1, head 0: everything looks for a break
    second.q_proj.bias[0] = SHARP
    second.k_proj.weight[0] = both(is_break)
    for t in range(topics):
        first.v_proj.weight[t] = both(topic + t)
        first.out_proj.weight[:, t] = both(memory + t)
        second.v_proj.weight[t] = both(memory + t)
        second.out_proj.weight[:, t] = 3 * both(write + t)
    hf.save_pretrained(folder)
    own.save_pretrained(folder)
    return sepcap.load_model(folder, device="cpu")
