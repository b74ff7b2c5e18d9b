"""The plain Hugging Face model, looked at and ablated with torch hooks alone: what sepcap is compared with."""

from dataclasses import dataclass
from functools import partial

import torch
import transformers


@dataclass(frozen=True)
class Layout:
    """Where a family keeps what makes its sites.

    Attributes:
        layers: path of the list of blocks in the model.
        mlp: path in a block of the module that the mlp neurons are the input of.
        out: of the module that the heads' outputs are the input of.
        value: of the module that the values are the output of, alone or with queries and keys.
        fused: how the values lie in that output: "" (alone), "thirds", "each head" (query, key, value of every head) or "end".
        auto: the class that loads it.
    """

    layers: str
    mlp: str
    out: str
    value: str
    fused: str = ""
    auto: str = "AutoModelForCausalLM"


LLAMA = Layout("model.layers", "mlp.down_proj", "self_attn.o_proj", "self_attn.v_proj")
BERT = ("output.dense", "attention.output.dense", "attention.self.value", "", "AutoModelForMaskedLM")
LAYOUTS = {
    "opt": Layout("model.decoder.layers", "fc2", "self_attn.out_proj", "self_attn.v_proj"),
    "gpt2": Layout("transformer.h", "mlp.c_proj", "attn.c_proj", "attn.c_attn", "thirds"),
    "neox": Layout("gpt_neox.layers", "mlp.dense_4h_to_h", "attention.dense", "attention.query_key_value", "each head"),
    "llama": LLAMA,
    "mistral": LLAMA,
    "phi": Layout("model.layers", "mlp.fc2", "self_attn.dense", "self_attn.v_proj"),
    "phi3": Layout("model.layers", "mlp.down_proj", "self_attn.o_proj", "self_attn.qkv_proj", "end"),
    "bert": Layout("bert.encoder.layer", *BERT),
    "roberta": Layout("roberta.encoder.layer", *BERT),
    "vit": Layout("vit.layers", "mlp.fc2", "attention.o_proj", "attention.v_proj", "", "AutoModelForImageClassification"),
}


class Plain:
    """A checkpoint folder as its auto class loads it, looked at by torch hooks on the modules of a layout."""

    def __init__(self, family, folder, **options):
        self.layout = LAYOUTS[family]
        self.hf = getattr(transformers, self.layout.auto).from_pretrained(folder, **options).eval()
        config = self.hf.config
        self.heads = config.num_attention_heads
        self.value_heads = getattr(config, "num_key_value_heads", None) or self.heads
        self.d_head = getattr(config, "head_dim", None) or config.hidden_size // self.heads

    def modules(self, layer):
        """site -> (module, "in" or "out"): where the site's activations pass. A module that a layer lacks has no place here."""
        block, layout = self.hf.get_submodule(self.layout.layers)[layer], self.layout
        places = {"mlp": (layout.mlp, "in"), "attn_pre_out": (layout.out, "in"), "attn_value": (layout.value, "out")}
        modules = dict(block.named_modules())
        return {site: (modules[path], where) for site, (path, where) in places.items() if path in modules}

    def values(self, projected):
        """View of the values in what the value projection gives: [..., head, d_head]."""
        if self.layout.fused == "thirds":
            projected = projected.chunk(3, dim=-1)[2]
        if self.layout.fused == "end":
            projected = projected[..., -self.value_heads * self.d_head :]
        if self.layout.fused == "each head":
            return projected.unflatten(-1, (self.heads, 3, self.d_head))[..., 2, :]
        return projected.unflatten(-1, (self.value_heads, self.d_head))

    def shaped(self, site, activation):
        if activation.dim() == 2:  # OPT flattens [batch, pos] before its mlp
            activation = activation.unflatten(0, self.batch_shape)
        if site == "mlp":
            return activation
        return self.values(activation) if site == "attn_value" else activation.unflatten(-1, (self.heads, -1))

    @torch.no_grad()
    def run(self, ids, look=None, zero=None):
        """Logits [batch, pos, vocab]; `look(site, layer, activation)` sees activations; `zero` (site -> mask) are set to 0."""
        handles = []
        self.batch_shape = tuple(ids.shape)

        def on_input(site, layer, module, args):
            z = args[0].clone()
            if zero and site in zero:
                self.shaped(site, z)[..., zero[site][layer]] = 0
            if look:
                look(site, layer, self.shaped(site, z))
            return (z, *args[1:])

        def on_output(site, layer, module, args, output):
            z = output.clone()
            if zero and site in zero:
                self.values(z)[..., zero[site][layer]] = 0
            if look:
                look(site, layer, self.values(z))
            return z

        try:
            for layer in range(self.hf.config.num_hidden_layers):
                for site, (module, where) in self.modules(layer).items():
                    if where == "in":
                        handles.append(module.register_forward_pre_hook(partial(on_input, site, layer)))
                    else:
                        handles.append(module.register_forward_hook(partial(on_output, site, layer)))
            return self.hf(ids).logits
        finally:
            for handle in handles:
                handle.remove()


def token_ids(seed=0, batch=3, length=20, vocabulary=320):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocabulary, (batch, length), generator=generator)
