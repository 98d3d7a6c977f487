"""Checksums of arrays on any mesh, to find a damaged checkpoint or a changed model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import jax
from jax import lax
import jax.numpy as jnp


def compute_checksums(tree) -> dict[str, int]:
    """Return a checksum of 32 bits for every array of a tree, by its path.

    It depends on every value and its place, and not on how the array is sharded. It is not cryptographic.
    """
    sums = jax.device_get(_sums(tree))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): int(value)
        for path, value in jax.tree_util.tree_leaves_with_path(sums)
    }


def compute_fingerprint(tree) -> str:
    """Return a digest of a whole tree of arrays: 64 bits as hexadecimal digits."""
    return compute_digest(compute_checksums(tree))


def compute_digest(value) -> str:
    """Return a digest of a value that JSON can represent: 64 bits as hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def hash_file(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@jax.jit
def _sums(tree):
    return jax.tree.map(_sum, tree)


def _sum(x: jax.Array) -> jax.Array:
    """Return the sum, modulo 2^32, of the values' bits, each mixed with its place in the array."""
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = x.astype(unsigned) if x.dtype == bool else lax.bitcast_convert_type(x, unsigned)
    place, stride = jnp.uint32(0), 1
    for axis in reversed(range(x.ndim)):
        steps = lax.broadcasted_iota(jnp.uint32, x.shape, axis, out_sharding=jax.typeof(x).sharding)
        place += steps * jnp.uint32(stride % 2**32)
        stride *= x.shape[axis]
    mixed = (bits.astype(jnp.uint32) ^ place * jnp.uint32(0x9E3779B1)) * jnp.uint32(0x85EBCA6B)
    return jnp.sum(mixed ^ mixed >> 15, dtype=jnp.uint32)
