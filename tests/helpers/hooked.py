"""What tests of ablation share: looking at a hook, and counting what is hooked."""

import torch

from sepcap.models.sites import get_site

FRACTIONS = {"mlp": 0.3, "attn_pre_out": 0.3, "attn_value": 0.3}


def at_hook(model, site, layer, run):
    """What stands at a hook, pass by pass, after the ablations that are on."""
    seen = []
    with model.hooks(fwd_hooks=[(get_site(site).hook_name(layer), lambda z, hook: seen.append(z.detach().clone()))]), torch.no_grad():
        run()
    return seen


def hooks_of(model):
    """How many hooks every point has, those that the bridge itself put there included."""
    return {name: (len(point.fwd_hooks), len(point._forward_hooks)) for name, point in model.hook_dict.items()}
