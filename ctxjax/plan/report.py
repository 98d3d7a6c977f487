"""Print a plan as text or as JSON."""

from __future__ import annotations

from ctxjax.plan.chips import CHIPS, USABLE
from ctxjax.plan.remedies import Remedy
from ctxjax.plan.step import Plan

GIB = 2**30


def judge(plan: Plan, hbm_gib: float) -> str:
    """Return "fits", "tight" (more than USABLE of the memory) or "does not fit"."""
    if plan.refused or plan.peak > hbm_gib * GIB:
        return "does not fit"
    return "fits" if plan.peak <= USABLE * hbm_gib * GIB else "tight"


def as_json(plan: Plan, facts: dict, generation: str | None, remedies: list[Remedy]) -> dict:
    """Return the plan as plain values: sizes in bytes per chip, times in seconds.

    ``generation``: of TPUs, or None for local devices.
    """
    chip = CHIPS.get(generation)
    result = facts | {
        "chips": plan.chips,
        "bytes": plan.buffers | {"temporaries": plan.temporaries},
        "inside_temporaries": plan.temporary_parts,
        "total_bytes": plan.total,
        "teacher_stage": plan.teacher_stage,
        "flops": plan.flops,
        "compile_seconds": round(plan.compile_seconds, 1),
        "collectives": None
        if plan.traffic is None
        else {kind: {"count": one.count, "sent_bytes": int(one.sent)} for kind, one in sorted(plan.traffic.items())},
        "refused": plan.refused,
        "effort": plan.effort,
    }
    if chip:
        result |= {
            "hbm_bytes": int(chip.hbm_gib * GIB),
            "share_of_hbm": round(plan.peak / (chip.hbm_gib * GIB), 4),
            "verdict": judge(plan, chip.hbm_gib),
            "floor_seconds": {name: float(f"{value:.4g}") for name, value in plan.compute_floors(chip).items()},
            "remedies": [remedy._asdict() for remedy in remedies],
        }
    return result


def as_text(result: dict) -> str:
    """Format the result of ``as_json`` for a terminal."""
    shown = ("model", "teacher", "task", "arm", "devices", "mesh", "batch", "step", "notes")
    lines = [f"{name}: {result[name]}" for name in shown if result.get(name)]
    lines += ["", "memory of a chip"]
    lines += [f"  {_size(size)}  {name}" for name, size in result["bytes"].items()]
    parts = ", ".join(f"{name} {_size(size).strip()}" for name, size in result["inside_temporaries"].items())
    lines.append(f"               (parts of the temporaries, which need not exist at the same time: {parts})")
    lines += _describe_totals(result)
    if result["refused"]:
        lines.append(f"  the compiler: {result['refused']}")
    lines += ["", f"arithmetic: {result['flops']:.3g} FLOPs per step, with responses of full length"]
    if result["collectives"] is not None:
        lines.append("collectives of a step: kind, count, GB that a chip sends")
        kinds = result["collectives"].items()
        lines += [f"  {kind:20} {one['count']:>9,}  {one['sent_bytes'] / 1e9:10.3f}" for kind, one in kinds] or [
            "  none"
        ]
    if "floor_seconds" in result:
        floors = result["floor_seconds"].items()
        known = [
            f"{name} {value:.3g} s"
            for name, value in floors
            if name != "interconnect" or result["collectives"] is not None
        ]
        lines.append(f"a step takes at least: {', '.join(known)}")
    done = {
        "memory": "compiled until memory was known",
        "least": "compiled with the least optimisation",
        "full": "compiled as a run does",
    }[result["effort"]]
    lines.append(f"{done} in {result['compile_seconds']:.0f} s")
    if result.get("remedies"):
        lines += ["", "memory of a chip with one change:"]
        for one in result["remedies"]:
            how = "compiled" if one["compiled"] else "estimate"
            lines.append(f"  {_size(one['total_bytes'])}  {one['flag']}  ({how})")
    return "\n".join(lines)


def _describe_totals(result: dict) -> list[str]:
    """Return a line for the step and, if there is a teacher's stage, one for this; the larger one has the verdict."""
    sizes = {"in total": result["total_bytes"]}
    if result["teacher_stage"]:
        what = "at least before training, while the teacher decodes (weights alone, no cache)"
        sizes[what] = sum(result["teacher_stage"].values())
    lines = []
    for what, size in sizes.items():
        line = f"  {_size(size)}  {what}"
        if "verdict" in result:
            line += f", {100 * size / result['hbm_bytes']:.0f} % of {_size(result['hbm_bytes']).strip()}"
            line += f": {result['verdict']}" * (size == max(sizes.values()))
        lines.append(line)
    return lines


def _size(size: int) -> str:
    return f"{size / GIB:7.2f} GiB" if size >= GIB // 10 else f"{size / 2**20:7.2f} MiB"
