"""What a compiled program sends between devices, read off its text.

Collectives in loop bodies count as often as the loop runs: by the constant that its counter is compared with, or
that the compiler notes. Loops over response columns end when the responses do; here all are of full length.
"""

from __future__ import annotations

import dataclasses
import math
import re

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8, "u64": 8}
_OPS = "all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute|collective-broadcast"
_COLLECTIVE = re.compile(rf"= (\(?[^=]*?) ({_OPS})(?:-start)?\(")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_CALLED = re.compile(r"(?:calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_SHAPE = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_KNOWN = re.compile(r'known_trip_count"?:\s*\{"n":"(\d+)"')
_CONSTANT = re.compile(r"[su](?:32|64)\[\]\S* constant\((\d+)\)")
_NAME = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass
class Traffic:
    """Of one kind of collective, for a whole step: how often it runs, and the bytes that a device sends for it."""

    count: int = 0
    sent: float = 0.0


def traffic(text: str, head_turns: int) -> dict[str, Traffic]:
    """Collectives of a compiled program by kind. ``head_turns``: how often the loop over the head's chunks runs."""
    computations, entry = _computations(text)
    totals: dict[str, Traffic] = {}
    trips = _trips(computations, head_turns)

    def walk(name: str, times: int, inside: str) -> None:
        for line in computations.get(name, ()):
            match = _COLLECTIVE.search(line)
            if match:
                kind = match[2]
                if kind == "all-reduce" and "all-reduce-scatter" in inside:  # how a TPU writes it
                    kind, size = "reduce-scatter", _bytes(match[1]) / _group(line)
                else:
                    size = _bytes(match[1])
                total = totals.setdefault(kind, Traffic())
                total.count += times
                total.sent += times * sent(kind, size, _group(line))
            often = times * trips.get(line, 1) if " while(" in line else times
            for called in _calls(line):
                walk(called, often, called if " fusion(" in line else inside)

    walk(entry, 1, "")
    return totals


def sent(kind: str, size: float, group: int) -> float:
    """Bytes that each of ``group`` devices sends at least, where a collective's result has ``size`` bytes on each."""
    others = group - 1
    return {
        "all-reduce": 2 * size * others / group,
        "reduce-scatter": size * others,
        "all-gather": size * others / group,
        "all-to-all": size * others / group,
        "ragged-all-to-all": size * others / group,
    }.get(kind, size)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Each computation's lines, and the entry's name."""
    found, entry, lines = {}, "", None
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            lines = found.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            lines = None
        elif lines is not None:
            lines.append(line)
    return found, entry


def _calls(line: str) -> list[str]:
    branches = _BRANCHES.search(line)
    names = [name.strip().lstrip("%") for name in branches[1].split(",")] if branches else []
    return names + _CALLED.findall(line)


def _trips(computations: dict[str, list[str]], head_turns: int) -> dict[str, int]:
    """How often each loop runs, by its line."""
    loops = [line for lines in computations.values() for line in lines if " while(" in line]
    found, decode = {}, []
    for line in loops:
        known = _KNOWN.search(line)
        condition = re.search(r"condition=%?([\w.\-]+)", line)
        bounds = [int(n) for l in computations.get(condition[1], ()) for n in _CONSTANT.findall(l)] if condition else []
        name = _NAME.search(line)
        if known:
            found[line] = int(known[1])
        elif name and re.search(r"decode\W*/while$", name[1]) and bounds:
            decode.append((max(bounds), line))
        else:
            found[line] = max(bounds) if bounds else head_turns
    before = 1  # the first token comes from the prompt's pass
    for stop, line in sorted(decode):
        found[line], before = stop - before, stop
    return found


def _bytes(shapes: str) -> int:
    """Of the largest array of a type: an asynchronous collective's is a tuple that holds its input too."""
    sizes = [
        BYTES.get(kind, 1 if kind.startswith("f8") else 4) * math.prod(int(n) for n in dims.split(",") if n)
        for kind, dims in _SHAPE.findall(shapes)
    ]
    return max(sizes, default=0)


def _group(line: str) -> int:
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    if listed:
        return len(listed[1].split(","))
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]", line)
    return int(iota[1]) if iota else 2
