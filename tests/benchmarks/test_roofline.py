"""The roofline's floors, budget and comparison with a run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import roofline

from vapi_fast import AlignConfig
from vapi_fast.alignment.memory import plan
from vapi_fast.models import LLAMAGEN_CONFIGS
from vapi_fast.runtime.ceilings import Ceilings

ROOT = Path(__file__).parents[2]
STAGES = ["encode", "forward", "sample", "decode", "lpips", "loss", "backward", "optimizer"]


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, list[str]]:
    """The table's rows by stage; its other lines under "text"."""
    assert roofline.main(arguments) == 0
    rows: dict[str, list[str]] = {"text": []}
    for line in capsys.readouterr().out.splitlines():
        name, *cells = line.split()
        if name in (*STAGES, "startup", "data", "total"):
            rows[name] = cells
        else:
            rows["text"].append(line)
    return rows


def run_json(path: Path, **changes: Any) -> Path:
    """A run of the paper's recipe with made-up seconds a step."""
    names = ("model", "tokenizer", "lpips", "image_size", "batch_size", "group_size", "micro_batch", "prior", "method")
    config = AlignConfig(model="xxl", random_init=True, synthetic_data=True)
    record = {
        "config": {name: getattr(config, name) for name in names},
        "device": "NVIDIA H100 80GB HBM3",
        "processes": 1,
    }
    taken = {"data": 0.1, "decode": 1.5, "optimizer": 0.03, "backward": 1.0}
    record["stages"] = {stage: {"seconds": seconds} for stage, seconds in taken.items()}
    path.write_text(json.dumps(record | changes))
    return path


def test_h100_floors_are_those_of_serial_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    """As derived by hand from the kernels' launches: 0.21, 0.34, 0.03 with the loss, 1.22, 0.19, 0.66 and 0.02 s, less
    what passes that were put together spare of encode, decode and lpips: 54, 33 and 51 GB."""
    rows = printed(capsys, "--recipe", "lean")
    assert [name for name in rows if name != "text"] == [*STAGES, "total"]
    assert rows["decode"] == ["521.95", "2517.26", "matmul", "1.2000"]
    assert rows["encode"][2:] == ["copy", "0.1883"]
    assert rows["optimizer"][2:] == ["copy", "0.0151"]
    floors = {stage: float(rows[stage][3]) for stage in STAGES}
    by_hand = {"encode": 0.21 - 0.018, "forward": 0.34, "decode": 1.22 - 0.011, "lpips": 0.19 - 0.017, "backward": 0.66}
    assert {stage: floors[stage] for stage in by_hand} == pytest.approx(by_hand, abs=0.02)
    total = sum(floors.values())
    assert float(rows["total"][2]) == pytest.approx(total, abs=1e-3) == pytest.approx(2.65 - 0.046, abs=0.03)
    assert "copy 3 TB/s (measured), matrix product 798 TFLOP/s (measured)" in rows["text"][1]


def test_the_default_has_a_forward_more(capsys: pytest.CaptureFixture[str]) -> None:
    rows, lean = printed(capsys), printed(capsys, "--recipe", "lean")
    assert float(rows["forward"][0]) == pytest.approx(2 * float(lean["forward"][0]), abs=0.02)
    assert rows["loss"] == lean["loss"]
    assert rows["total"][2:] == ["2.9522"]


def test_text_costs_what_its_page_says(capsys: pytest.CaptureFixture[str]) -> None:
    """Floors of a step, of the captions' encoding, and the planned memory on an 80 GB card."""
    page = (ROOT / "docs" / "captions.md").read_text(encoding="utf-8")
    said = re.search(r"\((\S+) s on an H100, (\S+) s by `lean`; encoding .* takes (\d+) s\), .* memory: (\d+) GB", page)
    assert said is not None
    rows, lean = (printed(capsys, "--model", "t2i-xl", *more) for more in ((), ("--recipe", "lean")))
    assert (said[1], said[2]) == tuple(f"{float(each['total'][2]):.2f}" for each in (rows, lean))
    encoding = re.search(r"captions, encoded once .* (\S+) s$", rows["text"][-1])
    assert encoding is not None
    assert round(float(encoding[1])) == int(said[3])
    config = AlignConfig(model="t2i-xl", random_init=True, synthetic_data=True)
    assert round(plan(config, LLAMAGEN_CONFIGS["t2i-xl"], 80 * 10**9).total / 1e9) == int(said[4])


@pytest.mark.parametrize(("gpu", "copy"), [("a100-40", 1555), ("a100-80", 2039)])
def test_a100_floors_follow_from_its_specification(capsys: pytest.CaptureFixture[str], gpu: str, copy: float) -> None:
    rows = printed(capsys, "--gpu", gpu)
    assert float(rows["decode"][3]) > 521.95 / 312
    assert float(rows["sample"][3]) == pytest.approx(3.711 / 312 + (11.51 - 6.669) / copy, abs=1e-4)
    assert float(rows["optimizer"][3]) == pytest.approx(45.15 / copy, rel=1e-2)
    assert rows["text"][1].count("(specification)") == 2


def test_sizes_change_the_work(capsys: pytest.CaptureFixture[str]) -> None:
    rows = printed(capsys, "--image-size", "192", "--batch-size", "64", "--group-size", "4")
    assert float(rows["decode"][0]) == pytest.approx(521.95 / 4 / 2 / 2, rel=0.01)
    small = printed(capsys, "--gpu", "measure", "--model", "tiny")
    assert 0.05 < float(small["decode"][0]) < 0.2
    assert "CPU" in small["text"][1] or "NVIDIA" in small["text"][1]


def test_a_run_is_held_against_the_floor_of_its_device(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows = printed(capsys, str(run_json(tmp_path / "run.json")))
    assert rows["decode"][4:] == ["1.5000", "348.0", "43.6%", "80.0%"]
    assert rows["optimizer"][4:] == ["0.0300", "0.0", "0.0%", "50.2%"]
    assert rows["data"] == ["0.1000"]
    assert rows["total"][3] == "2.6300"  # a step: data, decode, optimizer, backward
    utilisation = 100 * 637.92e12 / 2.63 / 798e12
    assert f"{utilisation:.1f}%" in rows["text"][3]


def test_a_runs_own_ceilings_and_processes_count(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = run_json(tmp_path / "run.json", ceilings={"copy": 1e12, "matmul": 1e14}, processes=2, device="something")
    rows = printed(capsys, str(path))
    assert float(rows["optimizer"][1]) == pytest.approx(45.15 / 2, abs=0.01)
    assert float(rows["decode"][3]) > 521.95 / 2 / 100
    assert "something: copy 1 TB/s (measured in the run)" in rows["text"][1]
    assert "1/2" in rows["text"][0]
    half = float(printed(capsys, "--recipe", "lean", "--gpu", "h200")["decode"][3]) / 2
    assert float(printed(capsys, str(path), "--gpu", "h200")["decode"][3]) == pytest.approx(half, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100 80GB PCIe", "a100-80"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
    ],
)
def test_devices_are_known_by_name(name: str, key: str) -> None:
    assert roofline.device_of({"device": name}) == roofline.DEVICES[key]


def test_an_unknown_device_needs_a_choice() -> None:
    with pytest.raises(SystemExit, match="no ceilings are known for Radeon: pass --gpu"):
        roofline.device_of({"device": "Radeon"})


def test_every_builtin_figure_says_where_it_is_from() -> None:
    for device in roofline.DEVICES.values():
        assert {device.copy, device.matmul} <= {roofline.MEASURED, roofline.SPECIFICATION}
    assert roofline.DEVICES["h200"].ceilings == Ceilings(4.3e12, 788e12)


def test_janus_is_held_to_prompts_of_usual_length(capsys: pytest.CaptureFixture[str]) -> None:
    """In sampling as in a step: not to the 512 tokens that it takes at most."""
    assert roofline.main(["--model", "janus-pro-1b", "--predict", "--gpu", "h100"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("janus-pro-1b, vapi, 384², 64 images × 8 rollouts")
    rate = re.search(r"cache in bfloat16: .* ([0-9]+) images/s", output)
    assert rate is not None
    # A sequence's keys and values of 40 + 576 / 2 slots alone, at the ceiling of copy, and they are most of it.
    slots, layers, width, sequences = 40 + 288, 24, 2048, 256
    at_most = sequences / (576 * sequences * slots * layers * width * 4 / 3.0e12)
    assert 0.6 * at_most < int(rate[1]) < at_most
