"""The plain Hugging Face model, looked at and ablated with torch hooks alone: what sepcap is compared with."""

from functools import partial

import torch
from transformers import AutoModelForCausalLM


class Plain:
    """A checkpoint folder as `AutoModelForCausalLM` loads it. Knows where each family keeps its projections."""

    def __init__(self, family, folder, **options):
        self.family = family
        self.hf = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
        config = self.hf.config
        self.heads = config.num_attention_heads
        self.value_heads = getattr(config, "num_key_value_heads", None) or self.heads
        self.d_head = config.hidden_size // self.heads

    def modules(self, layer):
        """site -> (module, "in" or "out"): where the site's activations pass."""
        if self.family == "opt":
            block = self.hf.model.decoder.layers[layer]
            mlp, out, value = block.fc2, block.self_attn.out_proj, block.self_attn.v_proj
        elif self.family == "gpt2":
            block = self.hf.transformer.h[layer]
            mlp, out, value = block.mlp.c_proj, block.attn.c_proj, block.attn.c_attn
        elif self.family == "neox":
            block = self.hf.gpt_neox.layers[layer]
            mlp, out, value = block.mlp.dense_4h_to_h, block.attention.dense, block.attention.query_key_value
        else:
            block = self.hf.model.layers[layer]
            mlp, out, value = block.mlp.down_proj, block.self_attn.o_proj, block.self_attn.v_proj
        return {"mlp": (mlp, "in"), "attn_pre_out": (out, "in"), "attn_value": (value, "out")}

    def values(self, projected):
        """View of the values in what the value projection gives: [..., head, d_head]; fused with q and k on two families."""
        if self.family == "gpt2":
            return projected.chunk(3, dim=-1)[2].unflatten(-1, (self.heads, self.d_head))
        if self.family == "neox":
            return projected.unflatten(-1, (self.heads, 3, self.d_head))[..., 2, :]
        return projected.unflatten(-1, (self.value_heads, self.d_head))

    def shaped(self, site, activation):
        if activation.dim() == 2:  # OPT flattens [batch, pos] before its mlp
            activation = activation.unflatten(0, self.batch_shape)
        if site == "mlp":
            return activation
        return self.values(activation) if site == "attn_value" else activation.unflatten(-1, (self.heads, self.d_head))

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
