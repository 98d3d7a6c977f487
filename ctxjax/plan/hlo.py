"""Read from the text of a compiled program how much the devices send to each other.

A collective in a loop body counts as often as the loop runs. That number is the trip count that the compiler notes, or
the constant that the loop counter is compared with. Loops over response columns can end early; here all responses have
full length, so the decode loops for fewer rows do not run.
"""

from __future__ import annotations

import dataclasses
import math
import re

from ctxjax.distill.sampling import DECODE_TO, FEWER_ROWS

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8, "u64": 8}
_OPS = "all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute|collective-broadcast"
_COLLECTIVE = re.compile(rf"= (\(?[^=]*?) ({_OPS})(-start)?\(")
_COMMENT = re.compile(r"/\*index=\d+\*/")  # every fifth element of a tuple has one
_LAYOUT = re.compile(r"\{[^{}]*\}")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_CALLED = re.compile(r"(?:calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_SHAPE = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_KNOWN = re.compile(r'known_trip_count"?:\s*\{"n":"(\d+)"')
_CONSTANT = re.compile(r"[su](?:32|64)\[\]\S* constant\((\d+)\)")
_NAME = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass
class Traffic:
    """One kind of collective in a whole step. ``count``: how often it runs. ``sent``: bytes that one device sends."""

    count: int = 0
    sent: float = 0.0


def count_traffic(text: str, head_chunks: int) -> dict[str, Traffic]:
    """Return a compiled program's collectives by kind. ``head_chunks``: trips of the loop over the head's chunks."""
    computations, entry = _split_computations(text)
    totals: dict[str, Traffic] = {}
    trips = _count_trips(computations, head_chunks)

    def walk(name: str, times: int, inside: str) -> None:
        for line in computations.get(name, ()):
            match = _COLLECTIVE.search(line)
            if match:
                kind, is_start = match[2], bool(match[3])
                size = _measure_bytes(_find_results(match[1], kind, is_start))
                if kind == "all-reduce" and "all-reduce-scatter" in inside:  # a TPU's reduce-scatter
                    kind, size = "reduce-scatter", size / _find_group_size(line)
                total = totals.setdefault(kind, Traffic())
                total.count += times
                total.sent += times * compute_sent_bytes(kind, size, _find_group_size(line))
            often = times * trips.get(line, 1) if " while(" in line else times
            for called in _find_calls(line):
                walk(called, often, called if " fusion(" in line else inside)

    walk(entry, 1, "")
    return totals


def compute_sent_bytes(kind: str, size: float, group: int) -> float:
    """Return the least number of bytes that each of ``group`` devices sends; ``size``: bytes of the result on each."""
    others = group - 1
    return {
        "all-reduce": 2 * size * others / group,
        "reduce-scatter": size * others,
        "all-gather": size * others / group,
        "all-to-all": size * others / group,
        "ragged-all-to-all": size * others / group,
    }.get(kind, size)


def _split_computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Return the lines of each computation, and the name of the entry computation."""
    found, entry, lines = {}, "", None
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            lines = found.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            lines = None
        elif lines is not None:
            lines.append(_COMMENT.sub("", line))
    return found, entry


def _find_calls(line: str) -> list[str]:
    branches = _BRANCHES.search(line)
    names = [name.strip().lstrip("%") for name in branches[1].split(",")] if branches else []
    return names + _CALLED.findall(line)


def _count_trips(computations: dict[str, list[str]], head_chunks: int) -> dict[str, int]:
    """Return how often each loop runs, by its line."""
    loops = [line for lines in computations.values() for line in lines if " while(" in line]
    found, decode = {}, []
    for line in loops:
        known = _KNOWN.search(line)
        condition = re.search(r"condition=%?([\w.\-]+)", line)
        bounds = [int(n) for l in computations.get(condition[1], ()) for n in _CONSTANT.findall(l)] if condition else []
        name = _NAME.search(line)
        stop = name and re.search(rf"{DECODE_TO}(\d+)\W*/while$", name[1])
        if known:
            found[line] = int(known[1])
        elif stop and FEWER_ROWS in name[1]:
            found[line] = 0
        elif stop:
            decode.append((int(stop[1]), line))
        else:
            found[line] = max(bounds) if bounds else head_chunks
    stops = sorted({stop for stop, _ in decode})  # a second rollout, of retention, ends at the same ones
    before = dict(zip(stops, [1, *stops]))  # the pass over the prompt gives the first token
    return found | {line: stop - before[stop] for stop, line in decode}


def _find_results(shapes: str, kind: str, is_start: bool) -> str:
    """Return the part of a collective's type that is its results.

    The type of an asynchronous one is (inputs, results, ...), each an array or a tuple of arrays; that of an all-reduce
    is always its results alone.
    """
    if not is_start or kind == "all-reduce" or not shapes.startswith("("):
        return shapes
    parts, depth = [""], 0
    for letter in _LAYOUT.sub("", shapes)[1:-1]:
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return parts[1]


def _measure_bytes(shapes: str) -> int:
    """Return the bytes of all arrays of a type."""
    return sum(
        BYTES.get(kind, 1 if kind.startswith("f8") else 4) * math.prod(int(n) for n in dims.split(",") if n)
        for kind, dims in _SHAPE.findall(shapes)
    )


def _find_group_size(line: str) -> int:
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    if listed:
        return len(listed[1].split(","))
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]", line)
    return int(iota[1]) if iota else 2
