"""Rotary positions, with the frequency scaling of Llama 3.1."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

Rotation = tuple[jax.Array, jax.Array]  # cosines and sines [B, 1, L, Dh/2], float32, or [R, B, 1, L, Dh/2] of R kinds


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's frequency scaling (``rope_type: llama3`` in config.json): long wavelengths are stretched by
    ``factor``, short ones are kept, those between are blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> jax.Array:
    """Return the angular frequencies [Dh/2] in radians per position, after scaling."""
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    frequency = theta**-exponent
    if scaling is None:
        return frequency
    wavelength = 2 * math.pi / frequency
    longest_kept = scaling.original_max_positions / scaling.high_freq_factor
    shortest_stretched = scaling.original_max_positions / scaling.low_freq_factor
    smooth = (scaling.original_max_positions / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended = (1 - smooth) * frequency / scaling.factor + smooth * frequency
    scaled = jnp.where(wavelength > shortest_stretched, frequency / scaling.factor, blended)
    return jnp.where(wavelength < longest_kept, frequency, scaled)


def rotation(positions_BxL: jax.Array, frequencies: jax.Array) -> Rotation:
    """Return the rotation of each position by ``frequencies`` [Dh/2], or [R, 1, 1, 1, Dh/2]."""
    angle = positions_BxL.astype(jnp.float32)[:, None, :, None] * frequencies
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x_BxHxLxDh: jax.Array, rope: Rotation) -> jax.Array:
    """Rotate pairs of x (RoPE, arXiv 2104.09864); as in Hugging Face checkpoints, a pair is (i, i + Dh/2)."""
    cos, sin = rope
    x1, x2 = jnp.split(x_BxHxLxDh.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x_BxHxLxDh.dtype)
