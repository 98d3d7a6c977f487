"""What a layer keeps of its forward pass for the backward pass; the rest is computed again."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name

_INPUT = "layer_input"

# name -> a policy of jax.checkpoint, None: everything is kept. "full" keeps a layer's input alone: the least memory, a
# third more arithmetic. "dots" keeps the results of products with weights too, which are nine tenths of the arithmetic.
# "offload" keeps the input, in the host's memory: less still on the device, for the way there and back.
POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def remat(layer: Callable, name: str) -> Callable:
    """The body ``layer(x, weights)`` of a scan over layers, under the policy of this name."""
    if POLICIES[name] is None:
        return layer

    def named(x, weights):
        return layer(checkpoint_name(x, _INPUT), weights)

    # In a scan nothing of a layer can be merged with its recomputation, and the barriers against that cost memory.
    return jax.checkpoint(named, policy=POLICIES[name], prevent_cse=False)
