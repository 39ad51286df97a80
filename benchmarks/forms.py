"""Which forms of the same work a GPU is to take, by the rates that a GPU check measured on it.

    python benchmarks/forms.py gpu_check.json [--dry-run]

Compares each form of `vapi_fast/runtime/forms.py` with the usual one, in seconds of the same run, prints both, and
notes what is faster by a margin under the GPU's architecture in `vapi_fast/runtime/forms.json`, which the package takes
from then on. A form that was not measured stays as it is. What a form costs in exactness the package's tests hold.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from prediction import RatesError, read_rates
from rates import BLOCKS, GRAPHS, MICRO_BATCHES

from vapi_fast.runtime import forms
from vapi_fast.runtime.checkpoint import write_atomically

MARGIN = 1.03  # that a form must be faster by, as medians of a rate differ by a percent or two from run to run
Seconds = Mapping[str, float]


class Comparison(NamedTuple):
    """kind: of FORMS, with the shape where each has its own. usual, other: the same work, in seconds."""

    kind: str
    form: str
    usual: float
    other: float

    @property
    def faster(self) -> bool:
        return self.usual >= MARGIN * self.other

    def __str__(self) -> str:
        verdict = "taken" if self.faster else "left"
        return f"{self.kind}={self.form}: {1e3 * self.usual:.3f} → {1e3 * self.other:.3f} ms, {verdict}"


def comparisons(seconds: Seconds) -> Iterator[Comparison]:
    """Of all forms whose rates, and those of the usual one, are among `seconds`, by the names of `rates.py`."""

    def compared(kind: str, form: str, usual: Sequence[str], other: Sequence[str]) -> Iterator[Comparison]:
        if all(name in seconds for name in (*usual, *other)):
            yield Comparison(kind, form, *(sum(map(seconds.__getitem__, names)) for names in (usual, other)))

    trained = "attention, T 576, heads of 64, {}, forward and backward"
    packages = (name for name in ("flash-attn", "xformers") if trained.format(name) in seconds)
    usual = trained.format(next(packages, "default"))
    for form, row in (("cudnn", "cuDNN"), ("flash-attn-3", "flash-attn-3")):
        yield from compared("attention", form, [usual], [trained.format(row)])
    for kind, (_, form, *_) in forms.FORMS.items():
        usual = [f"{coder} as a CUDA graph" for coder, others in GRAPHS.items() if f"{kind}={form}" in others]
        if usual:
            yield from compared(kind, form, usual, [f"{each}, {kind}={form}" for each in usual])
    for images in MICRO_BATCHES:
        kind = f"micro-batch of {images}"
        yield from compared(kind, "graph", *([f"{kind}, {form}"] for form in forms.FORMS["micro-batch"]))
    for inputs, outputs, side in BLOCKS:
        shape = f"{inputs}→{outputs} {side}²"
        ends = (f"block end bfloat16 {shape}, {form}" for form in forms.FORMS["convolution"])
        yield from compared(f"convolution {shape}", "triton", *([end] for end in ends))


def fastest(found: Sequence[Comparison]) -> dict[str, str]:
    """Of each kind the form that gains most, where one gains enough."""
    gains = sorted((each for each in found if each.faster), key=lambda each: each.usual / each.other)
    return {each.kind: each.form for each in gains}


def noted(table: Mapping[str, Mapping[str, str]], architecture: str, found: Sequence[Comparison]) -> dict[str, Any]:
    """`forms.json` with what was measured: a kind that was, and whose usual form is as fast, is not in it any more."""
    kept = {
        kind: form for kind, form in table.get(architecture, {}).items() if kind not in {each.kind for each in found}
    }
    return dict(table) | {architecture: dict(sorted((kept | fastest(found)).items()))}


def measured(path: Path) -> tuple[str, list[Comparison]]:
    """The architecture that a GPU check ran on, and what it found. Raises RatesError."""
    rows = read_rates(path)
    try:
        major, minor = json.loads(path.read_text(encoding="utf-8"))["device"]["capability"]
    except (ValueError, KeyError, TypeError) as error:
        raise RatesError(f"{path}: no GPU is named in it: pass a gpu_check.json") from error
    seconds = {row["name"]: row["seconds"] for row in rows if "seconds" in row}
    return f"sm_{major}{minor}", list(comparisons(seconds))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("check", type=Path, help="a gpu_check.json")
    parser.add_argument("--dry-run", action="store_true", help="only print")
    options = parser.parse_args(arguments)
    try:
        architecture, found = measured(options.check)
    except RatesError as error:
        parser.error(str(error).removeprefix("--rates "))
    print("\n".join(map(str, found)) or "no form was measured beside its usual one")
    if not options.dry_run:
        table = noted(json.loads(forms.MEASURED.read_text(encoding="utf-8")), architecture, found)
        text = json.dumps(table, ensure_ascii=False, indent=1) + "\n"
        write_atomically(forms.MEASURED, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        print(f"{architecture} takes, in {forms.MEASURED.name}: {table[architecture] or 'the usual forms'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
