"""Sites: their hooks fire, with the activations that the plain model has there, and editing them reaches the logits."""

import pytest
import torch
from plain import Plain, token_ids

from sepcap.models.sites import SITES, get_site, resolve_sites, site_shape

SHAPES = {"mlp": (72,), "attn_pre_out": (4, 8), "attn_value": (4, 8)}


def shape_of(site, family):
    return (2, 8) if (site, family) == ("attn_value", "mistral") else SHAPES[site]


@pytest.mark.parametrize("site", SITES)
def test_shape_hook_and_effect(tiny, tiny_folders, family, site):
    ids = token_ids()
    assert site_shape(tiny, site) == (2, *shape_of(site, family))
    plain = {}

    def look(name, layer, z):
        plain[name, layer] = z

    Plain(family, tiny_folders[family]).run(ids, look=look)
    with torch.no_grad():
        before = tiny(ids)
        for layer in range(2):
            seen = []
            with tiny.hooks(fwd_hooks=[(get_site(site).hook_name(layer), lambda z, hook, seen=seen: seen.append(z.clone()))]):
                tiny(ids)
            (z,) = seen  # exactly once
            assert z.shape == (3, 20, *shape_of(site, family))
            torch.testing.assert_close(z, plain[site, layer], atol=1e-5, rtol=1e-4)
            with tiny.hooks(fwd_hooks=[(get_site(site).hook_name(layer), lambda z, hook: z + 1)]):
                assert (tiny(ids) - before).abs().max() > 1e-2


def test_every_neuron_is_its_own(tiny_opt):
    """Editing one coordinate of z is editing one row of W_O: the shape [head, d_head] is the weights' own."""
    ids = token_ids()
    with torch.no_grad():
        before = tiny_opt(ids)
        for head, d in ((0, 0), (1, 5), (3, 7)):

            def edit(z, hook, head=head, d=d):
                z = z.clone()
                z[:, :, head, d] += 1
                return z

            with tiny_opt.hooks(fwd_hooks=[("blocks.1.attn.hook_z", edit)]):
                by_hook = tiny_opt(ids)
            row = tiny_opt.blocks[1].attn.W_O[head, d]
            with tiny_opt.hooks(fwd_hooks=[("blocks.1.attn.o.hook_out", lambda out, hook, row=row: out + row)]):
                by_weight = tiny_opt(ids)
            assert (by_hook - before).abs().max() > 1e-3
            torch.testing.assert_close(by_hook, by_weight, atol=1e-5, rtol=0)


def test_resolve_sites_keeps_order_and_drops_repeats():
    assert resolve_sites("mlp") == ("mlp",)
    assert resolve_sites(["attn_value", "mlp", "attn_value"]) == ("attn_value", "mlp")
    with pytest.raises(ValueError, match="sites is empty"):
        resolve_sites([])
