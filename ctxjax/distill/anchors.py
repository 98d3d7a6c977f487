"""What the student's context view is held to: the anchors that the literature compares, one line each.

    bare          KL( sg q_x || q_c )        No-Context Anchoring, arXiv 2606.11627: the student's own bare output
    ema           KL( sg ema_x || q_c )      an average of its past selves, bare
    teacher_bare  KL( sg f_x || q_c )        the teacher's bare output: anchors to what was there before
    joint         KL( q_x || q_c )           as "bare", but q_x is moved towards q_c too
    symmetric     (KL(q_x||q_c) + KL(q_c||q_x)) / 2, both moved: "SymKL"
    teacher       KL( q_c || sg f )          the context view is distilled like the bare one: "DualOPD"

Only "bare" and "ema" are known to remove the harm; the others are here to be compared with. All take logits [..., V]
by view and return nats per token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.lax import stop_gradient

from ctxjax.distill.divergences import kl

Logits = dict[str, jax.Array]


class Anchor(NamedTuple):
    """``view`` names what q_c is compared with: "q_x", "f", "f_x" (teacher, bare) or "ema" (averaged student, bare)."""

    view: str
    value: Callable[[Logits], jax.Array]


ANCHORS = {
    "bare": Anchor("q_x", lambda v: kl(stop_gradient(v["q_x"]), v["q_c"])),
    "ema": Anchor("ema", lambda v: kl(stop_gradient(v["ema"]), v["q_c"])),
    "teacher_bare": Anchor("f_x", lambda v: kl(stop_gradient(v["f_x"]), v["q_c"])),
    "joint": Anchor("q_x", lambda v: kl(v["q_x"], v["q_c"])),
    "symmetric": Anchor("q_x", lambda v: 0.5 * (kl(v["q_x"], v["q_c"]) + kl(v["q_c"], v["q_x"]))),
    "teacher": Anchor("f", lambda v: kl(v["q_c"], stop_gradient(v["f"]))),
}
