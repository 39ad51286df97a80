"""What kernels, stages and many GPUs are expected to take, and how measured rates take the place of estimates."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import bench_generate_janus
import prediction
import pytest
import rates as rates_script
import roofline
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vapi_fast.alignment.costs import config_costs
from vapi_fast.alignment.kernel_costs import FP32, Cost, Kernel, product
from vapi_fast.models import Janus, catalog
from vapi_fast.models.families import generator_config
from vapi_fast.models.sizes import JANUS_CONFIGS
from vapi_fast.runtime import forms

STAGES = ["encode", "forward", "sample", "decode", "lpips", "loss", "backward", "optimizer"]
XXL: dict[str, Any] = catalog.entry("xxl").preset("align", "lean") | {"model": "xxl"}
GB = 10**9


def rates(gpu: str = "h100") -> prediction.Rates:
    return prediction.builtin(gpu, roofline.DEVICES[gpu].ceilings, gpu)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert roofline.main(["--predict", *arguments]) == 0
    return capsys.readouterr().out.splitlines()


def cells(lines: list[str], stage: str) -> list[str]:
    (line,) = (line for line in lines if line.startswith(f"{stage} "))
    return line.split()[1:]


def test_an_xxl_step_by_stage(capsys: pytest.CaptureFixture[str]) -> None:
    """3.7 s on an H100 and 3.4 s on an H200, derived by hand with the same rates, and by stage as far as that goes."""
    lines = printed(capsys, "--recipe", "lean")
    assert [line.split()[0] for line in lines[3:12]] == [*STAGES, "total"]
    by_hand = {"encode": (0.34, 0.31), "forward": (0.42, 0.39), "decode": (1.82, 1.69)}
    by_hand["lpips"] = 0.29 - 0.016, 0.27 - 0.011  # the poolings were put together with the distances since
    by_hand |= {"backward": (0.84, 0.79), "optimizer": (0.02, 0.02), "total": (3.7, 3.45)}
    for stage, expected in by_hand.items():
        floor, *found = map(float, cells(lines, stage)[:3])
        assert found == pytest.approx(expected, rel=0.05, abs=0.05), stage
        assert found[0] > floor
    total = [sum(float(cells(lines, stage)[column]) for stage in STAGES) for column in range(3)]
    assert [float(cell) for cell in cells(lines, "total")[:3]] == pytest.approx(total, abs=5e-3)
    assert "convolution 0.9" in lines[6]
    assert "norm 0.637" in lines[6]


def seconds_with(taken: dict[str, str], gpu: str = "h100", **changes: Any) -> dict[str, float]:
    """Of a step's stages, with these forms."""
    with forms.taking(**taken):
        costs = config_costs(XXL | changes)
    stages = {stage: sum(rates(gpu).by_kind(cost).values()) for stage, cost in costs.items()}
    return stages | {"step": sum(stages.values())}


def test_what_other_forms_are_expected_to_bring_is_what_the_docs_say() -> None:
    text = (Path(__file__).parents[2] / "docs" / "development.md").read_text(encoding="utf-8")
    usual, rows = seconds_with({}), re.findall(r"^\| `([\w-]+)=(\w+)` \| .* \| (\w+ .* → .*) \|$", text, re.MULTILINE)
    stated = {kind: (form, re.findall(r"(\w+) ([\d.]+) → ([\d.]+)", changes)) for kind, form, changes in rows}
    assert set(stated) >= {"encoder", "wide-attention", "last-convolution", "convolution"}
    for kind, (form, changes) in stated.items():
        found = seconds_with({kind: form})
        assert {stage for stage, *_ in changes} <= {stage for stage in usual if found[stage] < usual[stage]}
        for stage, before, after in changes:
            assert [usual[stage], found[stage]] == pytest.approx([float(before), float(after)], abs=6e-4)
    fp8 = {"reward_dtype": "fp8"}
    three = {"encoder": "float16", "wide-attention": "matmul", "convolution": "triton"}
    assert f"expected to take {seconds_with(three)['step']:.2f} s on an H100" in text
    four = three | {"last-convolution": "eight"}
    assert f"last convolution {seconds_with(four)['step']:.2f};" in text
    alone, *others = (seconds_with({}, **fp8), seconds_with(four, **fp8), seconds_with(four, "h200", **fp8))
    assert f"below, {alone['step']:.2f} s by itself" in text
    assert "four forms {:.2f} s, {:.2f} s on an H200.".format(*(each["step"] for each in others)) in text


def test_a_run_or_an_architecture_brings_its_forms(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = cells(printed(capsys, "--gpu", "h100"), "encode")
    monkeypatch.setattr(forms, "measured", lambda name: {"encoder": "float16"} if name == "sm_90" else {})
    lines = printed(capsys, "--gpu", "h100")
    assert lines[2] == "forms: encoder=float16"
    assert float(cells(lines, "encode")[1]) < float(usual[1])
    record = {"config": XXL, "device": "NVIDIA H100 80GB HBM3", "stages": {}, "forms": {"wide-attention": "matmul"}}
    (tmp_path / "run.json").write_text(json.dumps(record))
    monkeypatch.setenv(forms.VARIABLE, "encoder=float16")  # is not the run's
    lines = printed(capsys, str(tmp_path / "run.json"))
    assert lines[2] == "forms: wide-attention=matmul"
    assert float(cells(lines, "decode")[1]) == pytest.approx(seconds_with(record["forms"])["decode"], abs=6e-4)


def test_graphs_take_launching_from_the_host() -> None:
    eager = prediction.share_of_step(XXL, 1, rates(), 80 * GB)
    with forms.taking(**{"micro-batch of 4": "graph"}):
        assert prediction.share_of_step(XXL, 1, rates(), 80 * GB) == eager  # whose micro-batches are of 16
    with forms.taking(**{"micro-batch of 16": "graph"}):
        recorded, sharded = (prediction.share_of_step(XXL, gpus, rates(), 80 * GB) for gpus in (1, 8))
    assert recorded.host < eager.host / 50
    assert recorded.launched < eager.launched / 10
    assert recorded.kernels == eager.kernels
    assert sharded == prediction.share_of_step(XXL, 8, rates(), 80 * GB)  # whose weights are gathered: no graph


def test_a_kernel_takes_the_longer_of_its_times_and_the_gap_before_the_next() -> None:
    h100 = rates()
    gap = prediction.RATES["launch"][0]
    moving = Kernel("norm", 0, 2.4e12, runs=2)
    assert h100.seconds(moving) == pytest.approx(1 + 2 * gap)
    convolution = Kernel("convolution", 520e12, 1, shape=(128, 128, 384, 3))
    assert h100.seconds(convolution) == pytest.approx(1 + gap)
    single = Kernel("convolution", 520e12, 1, single=True, shape=(128, 128, 384, 3))
    assert h100.seconds(single) == pytest.approx(1 / 0.42 + gap)
    assert h100.by_kind(Cost((moving, single))) == pytest.approx(
        {"norm": 1 + 2 * gap, "TF32 convolution": 1 / 0.42 + gap}
    )


def test_a_products_last_wave_takes_as_long_as_a_full_one() -> None:
    def filled(rows: int, columns: int, inner: int = 512) -> float:
        return prediction.filled(product(rows, inner, columns).kernels[0])

    assert filled(128 * 132, 256) == 1  # a tile a multiprocessor
    assert filled(128 * 178, 256) == pytest.approx(0.85 * 356 / 396)  # smaller tiles lose less than 178 of 264
    assert filled(128, 256) == pytest.approx(0.6 * 4 / 132)  # the smallest tiles
    assert filled(128, 256, 4096) == pytest.approx(4 * 0.9 * 0.6 * 4 / 132)  # four parts of the sum each
    assert prediction.filled(Kernel("product", 1.0)) == 1
    whole, chunked = (filled(rows, 16384) for rows in (2304, 2560))
    assert whole == pytest.approx(0.97, abs=0.01)  # `kernels.head`'s chunks
    assert chunked < 1


def test_rewards_in_fp8() -> None:
    """The figures of `docs/development.md`."""
    usual, eight = (rates().by_kind(config_costs(XXL | {"reward_dtype": each})["decode"]) for each in (None, "fp8"))
    assert sum(usual.values()) == pytest.approx(1.750, abs=1e-3)
    assert sum(eight.values()) == pytest.approx(1.291, abs=1e-3)
    assert usual["convolution"] - eight["convolution"] == pytest.approx(0.514, abs=1e-3)
    assert eight["convolution in fp8"] == pytest.approx(0.297, abs=1e-3)
    assert (usual["norm"], eight["norm"]) == pytest.approx((0.637, 0.396), abs=1e-3)


def measured_rows() -> list[dict[str, Any]]:
    return [
        {"name": "copy", "rate": 4e12},
        {"name": "matmul", "rate": 900e12},
        {"name": "convolution 3×3 bfloat16 128→128 384²", "rate": 100e12},
        {"name": "convolution 3×3 bfloat16 128→128 192²", "rate": 300e12},
        {"name": "convolution 3×3 bfloat16 128→128 384², cudnn.benchmark", "rate": 999e12},
        {"name": "convolution 3×3 TF32 128→128 384²", "rate": 50e12},
        {"name": "convolution 3×3 fp8 128→128 384²", "rate": 700e12},
        {"name": "block end fp8 128→128 384², triton", "rate": 600e12},
        {"name": "add_group_norm_silu C@S, bfloat16", "rate": 2e12},
        {"name": "group_norm_silu C@S, float32", "rate": 9e12},
        {"name": "attention, one head of 512, default", "rate": 10e12},
        {"name": "attention, one head of 512, flash", "unavailable": "No available kernel"},
        {"name": "attention, T 576, heads of 64, default, forward", "rate": 200e12},
        {"name": "attention, T 576, heads of 64, default, forward and backward", "rate": 175e12},
        {"name": "poisoned memory, float32", "failure": "RuntimeError"},
    ]


def test_measured_rates_take_the_place_of_estimates(tmp_path: Path) -> None:
    check, lines = tmp_path / "gpu_check.json", tmp_path / "rates.txt"
    check.write_text(json.dumps({"parts": {"rates": {"figures": measured_rows()}, "sampling": {"figures": None}}}))
    lines.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in measured_rows()) + "Error: half a {li"
    )
    found = [prediction.corrected(rates(), prediction.read_rates(path)) for path in (check, lines)]
    assert found[0] == found[1]
    corrected = found[0]
    assert (corrected.ceilings.copy, corrected.ceilings.matmul) == (4e12, 900e12)
    gap = corrected.table["launch"]

    def seconds(kind: str, flops: float, moved: float = 0, *shape: int, single: bool = False) -> float:
        return corrected.seconds(Kernel(kind, flops, moved, single=single, shape=shape)) - gap

    assert seconds("convolution", 100e12, 0, 128, 128, 384, 3) == pytest.approx(1)  # its own
    assert seconds("convolution", 200e12, 0, 256, 128, 192, 3) == pytest.approx(1)  # the median of those to 128
    assert seconds("convolution", 50e12, 0, 128, 128, 384, 3, single=True) == pytest.approx(1)
    assert seconds("convolution", 600e12, 0, 512, 512, 24, 3) == pytest.approx(1)  # still the estimate
    assert seconds("convolution in fp8", 700e12, 0, 128, 128, 384, 3) == pytest.approx(1)
    assert seconds("norm", 0, 2e12) == pytest.approx(1)
    assert seconds("elementwise", 0, 4e12) == pytest.approx(1 / 0.86)  # of the copy that was measured
    assert seconds("product", 0.91 * 900e12) == pytest.approx(1)
    assert seconds("wide attention", 10e12) == pytest.approx(1)
    forward, backward = seconds("attention", 1e12), seconds("attention backward", 2.5e12)
    assert forward + backward == pytest.approx(3.5e12 / 175e12)
    assert "norm 2 T (measured)" in str(corrected)
    assert "elementwise 0.86 of copy" in str(corrected)


def test_what_rates_measures_is_what_a_step_launches() -> None:
    """By the names that it reports them under: most of the time of an XXL step's convolutions."""
    named = {
        prediction.convolution_name(3, kind, *shape)
        for kind, shapes in (
            ("bfloat16", rates_script.CONVOLUTIONS),
            ("TF32", rates_script.ENCODER),
        )
        for shape in shapes
    } | {prediction.convolution_name(2, "bfloat16", *shape) for shape in rates_script.PHASES}
    known = missed = 0.0
    for kernel in itertools.chain.from_iterable(cost.kernels for cost in config_costs(XXL).values()):
        if kernel.kind == "convolution":
            inputs, outputs, side, taps = kernel.shape
            name = prediction.convolution_name(taps, "TF32" if kernel.single else "bfloat16", inputs, outputs, side)
            if name in named:
                known += kernel.flops
            else:
                missed += kernel.flops
    assert known > 0.75 * (known + missed)


def test_what_the_rates_script_prints_can_be_read(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    bench = rates_script.Bench(rates_script.torch.device("cpu"), shrink=64)
    rates_script.convolution(bench, (128, 128, 384), rates_script.torch.bfloat16)
    path = tmp_path / "rates.txt"
    path.write_text(capsys.readouterr().out)
    (row,) = prediction.read_rates(path)
    table = prediction.corrected(rates(), [row]).table
    assert table["convolution to 128"] == table["convolution 3×3 bfloat16 128→128 384²"] == row["rate"]


def test_rates_reach_the_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "gpu_check.json"
    path.write_text(json.dumps({"parts": {"rates": {"figures": measured_rows()}}}))
    plain, slow = (printed(capsys, "--gpu", "h100", *more) for more in ([], ["--rates", str(path)]))
    assert float(cells(slow, "decode")[1]) > 1.5 * float(cells(plain, "decode")[1])
    assert "wide attention 10 T (measured)" in " ".join(slow)
    lines = printed(capsys, "--gpu", "a100-80", "--rates", str(path))  # of others with measured rates alone
    assert "A100 80 GB" in lines[2]
    for arguments, message in (
        (["--predict", "--gpu", "a100-80"], "no kernel's rates are known for A100 80 GB: pass --rates"),
        (["--predict", "--rates", str(tmp_path / "none.json")], "No such file"),
        (["--predict", "--rates", __file__], "no rates in it: pass a gpu_check.json"),
        (["--rates", str(path)], "--rates goes with --predict"),
    ):
        with pytest.raises(SystemExit):
            roofline.main(arguments)
        assert message in capsys.readouterr().err


def test_a_run_stands_beside_what_was_expected(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    config = {name: value for name, value in XXL.items() if not isinstance(value, Path)}
    stages = {"decode": {"seconds": 0.25}, "data": {"seconds": 0.1}}
    ceilings = {"copy": 3e12, "matmul": 798e12, "single_share": 0.5}
    record = {"config": config, "device": "NVIDIA H100 80GB HBM3", "processes": 8, "stages": stages}
    path.write_text(json.dumps(record | {"ceilings": ceilings}, default=dict))
    lines = printed(capsys, str(path))
    assert "measured s" in lines[2]
    floor, expected, measured = map(float, cells(lines, "decode")[:3])
    assert (floor, measured) == (0.150, 0.25)
    assert expected == pytest.approx(1.750 / 8, abs=2e-3)
    assert not any(line.startswith("many GPUs") for line in lines)


def test_a_token_of_sampling() -> None:
    """11.1 ms a token with the cache in bf16 and 40 images/s on an H100, 51 on an H200; 63 and 76 with 8 bits."""
    config = generator_config("xxl")
    for gpu, expected in (("h100", (40, 63)), ("h200", (51, 76))):
        caches = (torch.bfloat16, torch.float8_e4m3fn)
        found = [256 / 576 / sum(prediction.token_seconds(config, 256, rates(gpu), each).values()) for each in caches]
        assert found == pytest.approx(expected, rel=0.1)


def test_many_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    h100 = rates()
    steps = {gpus: prediction.share_of_step(XXL, gpus, h100, 80 * GB) for gpus in (1, 8, 32, 128)}
    alone = steps[1]
    assert (alone.exposed, alone.step) == (0, sum(alone.kernels.values()))
    assert alone.kernels == h100.by_kind(sum(config_costs(XXL).values(), Cost()))
    assert steps[8].kernels["optimizer"] == pytest.approx(alone.kernels["optimizer"] / 8, rel=0.01)
    assert [steps[gpus].step > alone.step / gpus for gpus in (32, 128)] == [True, True]
    assert steps[32].host == pytest.approx(steps[8].host, rel=0.05)  # a micro-batch is launched whatever its size
    assert steps[32].with_host == pytest.approx(steps[32].step + steps[32].host - steps[32].launched)
    assert set(steps[32].lost(alone, 32)) == {*alone.kernels, "exposed"}
    whole = prediction.share_of_step(XXL, 8, h100, 80 * GB, sharded=False)
    assert whole.kernels["optimizer"] == alone.kernels["optimizer"]
    assert whole.memory > steps[8].memory
    assert whole.host == pytest.approx(alone.host / 8, rel=0.1)
    assert steps[8].host == pytest.approx(whole.host, rel=0.15)
    assert steps[8].host > whole.host  # norms' gradients are summed up in each micro-batch
    assert prediction.share_of_step(XXL, 1, h100, 30 * GB).memory is None

    lines = printed(capsys, "--recipe", "lean")
    start = next(index for index, line in enumerate(lines) if line.startswith("many GPUs"))
    assert "NVLink 350 GB/s, InfiniBand 45 GB/s a GPU" in lines[start]
    rows = [line.split() for line in lines[start + 2 : start + 7]]
    assert [row[:2] for row in rows] == [["1", "128"], ["8", "16"], ["32", "4"], ["64", "2"], ["128", "1"]]
    assert float(rows[1][4]) == pytest.approx(steps[8].step, abs=1e-3)
    assert "45 µs each; from 32 GPUs on that takes longer than those kernels; past 128 GPUs" in lines[start + 7]


def test_collectives_move_over_the_slower_of_two_links() -> None:
    weights = FP32 * 1.4e9
    assert prediction.collective(weights, 8) == pytest.approx(weights * 7 / 8 / 350e9)
    assert prediction.collective(weights, 32) == pytest.approx(weights * max(31 / 32 / 350e9, 3 / 4 / (8 * 45e9)))


class Launches(TorchDispatchMode):
    """Counts what launches a kernel: whatever is no view and no bare allocation."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        view = any(each.alias_info and not each.alias_info.is_write for each in operation._schema.returns)
        self.count += not view and not re.search("empty|_unsafe_view", operation.name())
        return operation(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:.*past_key_values:FutureWarning")
def test_launches_of_janus_public_loop() -> None:
    """As `transformers` makes them today, in bf16: by layer and around them, within a tenth."""
    pytest.importorskip("transformers")
    counts = {}
    for layers in (1, 3):
        config = replace(JANUS_CONFIGS["tiny-janus"], layers=layers, grid_size=2)
        model = Janus(config).to(torch.bfloat16).eval()
        ids = torch.tensor([config.bos, 5, config.begin_image])
        setting = bench_generate_janus.Setting("small", model, bench_generate_janus.public_model(model), [ids], 1)
        with Launches() as launches:
            bench_generate_janus.public_loop(setting, ids)
        counts[layers] = launches.count / config.grid_size**2
    by_layer = (counts[3] - counts[1]) / 2
    assert by_layer == pytest.approx(prediction.LAYER_LAUNCHES, rel=0.1)
    assert counts[1] - by_layer == pytest.approx(prediction.TOKEN_LAUNCHES, rel=0.1)


def test_janus_guided_sampling_beside_the_public_loop(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = (line for line in printed(capsys, "--model", "janus-pro-1b") if "the public loop" in line)
    engine, loop, times = map(float, re.findall(r"([\d.]+)(?: images/s| ×)", line))
    assert times == pytest.approx(engine / loop, rel=0.05)
    public = prediction.public_token(generator_config("janus-pro-1b").fitted(40), 16, rates())
    assert public.launches == 24 * prediction.LAYER_LAUNCHES + prediction.TOKEN_LAUNCHES
    assert public.host > public.reading > 0.8e-3  # 2.5 GB of weights alone
    assert loop == pytest.approx(16 / 576 / public.host, rel=0.05)


def test_the_host_takes_some_time_for_a_layer() -> None:
    forward, backward = prediction.host_seconds(rounds=3)
    assert 1e-5 < forward < 0.1
    assert 1e-5 < backward < 0.1


def test_the_host_of_a_micro_batch_from_graphs() -> None:
    """Less than that of its kernels, of six layers; of a step in micro-batches of four, less than half of the GPU's."""
    layers = 6
    forward, backward = prediction.host_seconds(rounds=3)
    replay = prediction.replay_seconds(layers, rounds=5)
    assert 1e-5 < replay < layers * (forward + backward)
    cost, passes = prediction.recorded_costs("xxl", 4)
    assert passes == 32
    graphs = passes * (replay + len(prediction.RECORDED) * prediction.HOST) + prediction.NODE * cost.runs
    assert graphs < sum(rates().by_kind(cost).values()) / 2
