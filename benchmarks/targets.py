"""What each operation should reach on an H100 at XXL sizes (`operations.XXL`), as data, and whether it does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from baseline import EQUAL
from operations import BOTH, FORWARD
from shapes import XXL

# Kind and limit: "ms" at most; "share" of the governing ceiling (copy or matrix product) at least; "gemms": time at
# most that multiple of four products of the head's size; "memory" beyond the inputs at most that part of eager's.
TARGETS: dict[tuple[str, str], list[tuple[str, float]]] = {
    ("group_sample", FORWARD): [("ms", 0.25)],
    ("policy_loss", BOTH): [("gemms", 1.6), ("memory", 0.15)],
    ("vq_lookup", FORWARD): [("ms", 0.15)],
    ("straight_through_lookup", FORWARD): [("share", 0.70)],
    ("straight_through_lookup", BOTH): [("share", 0.70)],
    ("lpips_distance", FORWARD): [("share", 0.80)],
    ("lpips_distance of pairs", BOTH): [("share", 0.80)],
    ("bias_group_norm_silu C@S", FORWARD): [("share", 0.80)],
    ("add_group_norm_silu C@S", FORWARD): [("share", 0.80)],
    ("add_group_norm_silu 2C@S/2", FORWARD): [("share", 0.80)],
    ("add_group_norm_silu C@S phases", FORWARD): [("share", 0.80)],
    ("decode_attention", FORWARD): [("share", 0.75)],
    ("decode_attention prefix", FORWARD): [("share", 0.75)],
}
TARGETS |= {
    (name, each): [("share", 0.80)]
    for name in (
        "group_norm_silu C@S",
        "group_norm_silu 2C@S/2",
        "group_norm_silu 4C@S/8",
        "rms_norm",
        "rotary_2d",
        "swiglu",
    )
    for each in (FORWARD, BOTH)
}


def verdicts(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """`{"target": text, "met": bool}` for a measured row of `bench_ops`; every row should beat its rivals."""
    own = row["seconds"]["vapi_fast"]
    for kind, limit in TARGETS.get((row["operation"], row["pass"]), []):
        if kind == "ms":
            yield {"target": f"{limit} ms", "met": 1e3 * own <= limit}
        elif kind == "share":
            yield {"target": f"{limit:.0%} of {row['bounded_by']}", "met": row["share"] >= limit}
        elif kind == "gemms":
            met = own <= limit * 4 * XXL.gemm / row["ceilings"]["matmul"]
            yield {"target": f"{limit} × 4 GEMMs", "met": met}
        elif "eager" in row["peak_bytes"]:
            met = row["peak_bytes"]["vapi_fast"] <= limit * row["peak_bytes"]["eager"]
            yield {"target": f"{limit:.0%} of eager's memory", "met": met}
    for name, seconds in row["seconds"].items():
        if name != "vapi_fast":
            yield {"target": f"not slower than {name}", "met": EQUAL * own <= seconds}
