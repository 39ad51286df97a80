"""`cd tests && python -m rehearsal`: play the scenes, print what was found; exit code 1 if anything was."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from . import device


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m rehearsal", description=__doc__)
    parser.add_argument("--only", nargs="*", default=[], metavar="SCENE", help="those whose name contains one")
    parser.add_argument("--depth", type=int, default=2, help="transformer blocks; 0: all of them")
    parser.add_argument("--record", nargs="?", const=True, type=Path, help="write kernels/launches.json, or this file")
    parser.add_argument("--faults", action="store_true", help="instead find the faults that are planted for it")
    options = parser.parse_args()
    if options.record and options.only:
        parser.error("--record needs all scenes: leave --only out")
    try:
        device.load()
    except device.AbsentError as error:
        print(f"rehearsal: {error}", file=sys.stderr)
        return 2
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
    from vapi_fast.kernels import launches

    from . import faults
    from .scenes import SCENES, rehearse
    from .watch import Watch

    watch = Watch()
    names = [name for name in SCENES if not options.only or any(each in name for each in options.only)]
    if options.faults:
        with device.present(watch.host):
            return 1 if faults.play(watch) else 0
    with device.present(watch.host):
        for name in names:
            start = time.perf_counter()
            rehearse(watch, name, options.depth or None)
            print(f"{name}: {len(watch.launches[name])} launches, {time.perf_counter() - start:.1f} s", flush=True)
    if options.record:
        file = launches.FILE if options.record is True else options.record
        file.write_text(launches.text(watch.specialisations()), encoding="utf-8")
    for finding, count in watch.findings.items():
        print(f"{count} × {finding}")
    return 1 if watch.findings else 0


if __name__ == "__main__":
    sys.exit(main())
