"""Rotary positions, with the scalings that stretch a model to longer texts."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

Rotation = tuple[jax.Array, jax.Array]  # cosines and sines [B, 1, L, Dh/2], float32, or [R, B, 1, L, Dh/2] of R kinds


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's scaling (``rope_type: llama3`` in config.json): long wavelengths are stretched by ``factor``, short
    ones are kept, those between are blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int
    amplitude = 1.0

    def scale(self, frequency: jax.Array, head_dim: int, theta: float) -> jax.Array:
        wavelength = 2 * math.pi / frequency
        longest_kept = self.original_max_positions / self.high_freq_factor
        shortest_stretched = self.original_max_positions / self.low_freq_factor
        smooth = (self.original_max_positions / wavelength - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        blended = (1 - smooth) * frequency / self.factor + smooth * frequency
        scaled = jnp.where(wavelength > shortest_stretched, frequency / self.factor, blended)
        return jnp.where(wavelength < longest_kept, frequency, scaled)


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Position interpolation (``linear``, arXiv 2306.15595): all wavelengths are stretched by ``factor``."""

    factor: float
    amplitude = 1.0

    def scale(self, frequency: jax.Array, head_dim: int, theta: float) -> jax.Array:
        return frequency / self.factor


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """YaRN (``yarn``, arXiv 2309.00071): pairs that turn at least ``beta_fast`` times within the original positions are
    kept, those that turn at most ``beta_slow`` times are stretched by ``factor``, those between are blended by their
    index. Cosines and sines are multiplied by ``amplitude``, which makes attention sharper."""

    factor: float
    original_max_positions: int
    amplitude: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def scale(self, frequency: jax.Array, head_dim: int, theta: float) -> jax.Array:
        def find_pair(turns: float) -> float:
            return head_dim * math.log(self.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

        first = max(math.floor(find_pair(self.beta_fast)), 0)
        last = min(math.ceil(find_pair(self.beta_slow)), head_dim - 1)
        index = jnp.arange(head_dim // 2, dtype=jnp.float32)
        stretched = jnp.clip((index - first) / max(last - first, 1e-3), 0, 1)
        return frequency / self.factor * stretched + frequency * (1 - stretched)


RopeScaling = Llama3Scaling | LinearScaling | YarnScaling


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> jax.Array:
    """Return the angular frequencies [Dh/2] in radians per position, after scaling."""
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    frequency = theta**-exponent
    return frequency if scaling is None else scaling.scale(frequency, head_dim, theta)


def rotation(positions_BxL: jax.Array, frequencies: jax.Array, amplitude: float | jax.Array = 1.0) -> Rotation:
    """Return the rotation of each position by ``frequencies`` [Dh/2], or [R, 1, 1, 1, Dh/2]; cosines and sines are
    multiplied by ``amplitude``, a number or [R, 1, 1, 1, 1]."""
    angle = positions_BxL.astype(jnp.float32)[:, None, :, None] * frequencies
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    if isinstance(amplitude, float) and amplitude == 1.0:
        return cos, sin
    return amplitude * cos, amplitude * sin


def rotate(x_BxHxLxDh: jax.Array, rope: Rotation) -> jax.Array:
    """Rotate pairs of x (RoPE, arXiv 2104.09864); as in Hugging Face checkpoints, a pair is (i, i + Dh/2)."""
    cos, sin = rope
    x1, x2 = jnp.split(x_BxHxLxDh.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x_BxHxLxDh.dtype)
