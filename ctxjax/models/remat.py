"""What a layer keeps of its forward pass for the backward pass, which recomputes the rest."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name

_INPUT = "layer_input"

# Name -> a policy of jax.checkpoint, None: keep everything. "full" keeps only a layer's input: least memory, a third
# more arithmetic. "dots" also keeps the results of products with weights, nine tenths of the arithmetic. "offload"
# keeps the input in pinned host memory: less memory on the device, but every input is copied to the host and back.
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
    """Return ``layer(x, weights)``, the body of a scan over layers, under the policy of this name."""
    if POLICIES[name] is None:
        return layer

    def named(x, weights):
        return layer(checkpoint_name(x, _INPUT), weights)

    # Inside a scan, XLA cannot merge a layer with its recomputation; the barriers that prevent it would cost memory.
    return jax.checkpoint(named, policy=POLICIES[name], prevent_cse=False)
