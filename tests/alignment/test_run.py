"""A whole run on the tiny preset: what it writes, and that an interrupted one goes on where it stopped."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import roofline
import torch
from comparison import Comparison, PublishedRecipe
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import vapi_fast
from vapi_fast import AlignConfig
from vapi_fast.alignment import loop, run
from vapi_fast.alignment import step as alignment
from vapi_fast.alignment.figures import StepResult
from vapi_fast.alignment.outcome import Outcome
from vapi_fast.alignment.step import Trainer, align_step
from vapi_fast.data.dataset import ImageBatch
from vapi_fast.data.pictures import GAP, MARGIN, SHEET_GAP
from vapi_fast.kernels import library
from vapi_fast.models import LlamaGen
from vapi_fast.runtime import forms
from vapi_fast.runtime.errors import ConfigError, NonFiniteError

Make = Callable[..., AlignConfig]
SCORES = {"fid", "fid_se", "inception_score", "inception_score_se", "precision", "recall"}


def weights(path: Path) -> torch.Tensor:
    return torch.cat([p.flatten() for p in LlamaGen.from_checkpoint(path, "tiny").state_dict().values()])


@pytest.mark.usefixtures("image_sets")
def test_run_writes_everything(tiny_config: Make, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(evaluate=True, eval_samples=140, steps=3, lr=1e-3)
    returned = vapi_fast.align(config, source=Comparison())
    output = config.output_dir
    assert {path.name for path in output.iterdir()} == {
        "run.json",
        "samples.png",
        "originals.png",
        "reward.png",
        "stages.png",
        "aligned.pt",
        "tensorboard",
        "progress.jsonl",
    }
    record = json.loads((output / "run.json").read_text())
    assert record == json.loads(json.dumps(returned))
    assert record["config"]["lr"] == 1e-3
    assert record["config"]["data"].endswith("train.parquet")
    assert record["versions"]["torch"] == torch.__version__
    assert record["forms"] == forms.taken("")
    for name in ("base", "aligned"):
        for scores in (record[name], record[name]["cfg"]):
            assert set(scores) >= SCORES
            assert all(math.isfinite(scores[key]) and scores[key] >= 0 for key in SCORES)
        figures = record[name]
        assert figures["reward"] == pytest.approx(-figures["mse"] - figures["lpips"], rel=1e-5)
        assert 0 < figures["entropy"] < figures["cross_entropy"] < math.log(512)
    assert record["base"]["fid"] != record["aligned"]["fid"]
    assert len(record["reward"]) == 3
    assert all(-3 < reward < 0 for reward in record["reward"])
    seconds = record["seconds"]
    assert seconds["total"] >= seconds["startup"] + seconds["alignment"] + seconds["evaluation"]
    stages = seconds["stages"]
    assert set(stages) >= {"startup", "data", "encode", "forward", "sample", "decode", "lpips", "loss", "backward"}
    assert stages["startup"] == seconds["startup"]
    # The comparison of the gradients is in no stage.
    assert 0 < sum(stages.values()) - stages["startup"] < 1.01 * seconds["alignment"]
    assert 0 < record["stages"]["forward"]["seconds"] < stages["forward"] / 2
    assert record["stages"]["forward"]["tflops"] > 0
    assert record["images_per_second"] == pytest.approx(4 / record["step_seconds"])
    assert 0 < record["model_flop_utilisation"] < 1
    assert record["peak_memory"] > 1e8
    each = record["seconds_per_step"]
    assert record["speedup_over_reference"] == pytest.approx(each["published_recipe"] / each["vapi_fast"])
    compared = record["comparison"]
    assert compared["steps"] == 2
    assert compared["gradient_relative_error"] < 1e-5
    assert compared["advantages_cosine"] > 0.9999
    assert compared["tokens_equal"] == 1
    assert compared["peak_memory"] == {"vapi_fast": None, "published_recipe": None}  # of one process's, on a CPU
    assert compared["speedup"]["backward"] == pytest.approx(
        compared["stages"]["published_recipe"]["backward"] / compared["stages"]["vapi_fast"]["backward"]
    )
    lines = [json.loads(line) for line in (output / "progress.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert [line["reward"] for line in lines] == record["reward"]
    # The last two were compared: what is known before the first published step ends is ours, and what it ends with.
    assert ["speedup_over_reference" in line for line in lines] == [False, True, True]
    assert lines[0]["step_seconds"] > 0
    assert lines[0]["stages"]["decode"] > 0
    assert lines[-1]["comparison"] == compared
    assert roofline.main([str(output / "run.json"), "--gpu", "h100"]) == 0
    printed = capsys.readouterr().out
    decode = f"{record['stages']['decode']['seconds']:.4f}"  # in the run's own table and in the roofline's
    assert sum(line.startswith("decode") and decode in line for line in printed.splitlines()) >= 2
    assert f"{record['aligned']['entropy']:9.3f}{record['aligned']['cross_entropy']:8.3f}" in printed
    for text in ("base", "aligned, CFG", "± standard error", "images/s", "faster", "of ceiling", "gradients differ by"):
        assert text in printed

    moved = weights(output / "aligned.pt") - weights(config.gpt_ckpt)
    assert 0 < moved.abs().max() <= 3.1e-3  # AdamW moves a weight by at most lr a step
    for name in ("samples.png", "originals.png"):
        with Image.open(output / name) as picture:  # nine classes a sheet, of each class a row of seven
            assert picture.width == 2 * (MARGIN + 7 * (96 + GAP) - GAP) + SHEET_GAP
            assert picture.height > 2 * MARGIN + 9 * (96 + GAP)
    with Image.open(output / "reward.png") as picture:
        assert picture.size[0] > 400
    events = EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    logged = [event.value for event in events.Scalars("reward")]
    assert logged == pytest.approx(record["reward"])


def interrupted_at(step: int) -> Callable[..., Any]:
    def stop(*arguments: Any, **options: Any) -> StepResult:
        if arguments[2] == step:
            raise KeyboardInterrupt
        return align_step(*arguments, **options)

    return stop


@pytest.mark.usefixtures("image_sets")
def test_resumed_run_equals_an_uninterrupted_one(tiny_config: Make, tmp_path: Path, monkeypatch: Any) -> None:
    whole = tiny_config(steps=5, output_dir=tmp_path / "whole")
    record = vapi_fast.align(whole)
    half = {"steps": 5, "output_dir": tmp_path / "half", "checkpoint_every": 2}
    with monkeypatch.context() as patch:
        patch.setattr(loop, "align_step", interrupted_at(3))
        with pytest.raises(KeyboardInterrupt):
            vapi_fast.align(tiny_config(**half))
    resumed = vapi_fast.align(tiny_config(**half, resume=True))
    assert resumed["reward"] == record["reward"]
    assert torch.equal(weights(tmp_path / "half" / "aligned.pt"), weights(tmp_path / "whole" / "aligned.pt"))
    assert not (tmp_path / "half" / "snapshots").exists()


@pytest.mark.usefixtures("image_sets")
def test_a_run_stopped_in_its_first_steps_keeps_the_measurement_before_it(tiny_config: Make, monkeypatch: Any) -> None:
    evaluated = {"evaluate": True, "eval_samples": 8, "eval_batch": 8}
    with monkeypatch.context() as patch:
        patch.setattr(loop, "align_step", interrupted_at(0))
        with pytest.raises(KeyboardInterrupt):
            vapi_fast.align(tiny_config(**evaluated))
    measured = []
    measure = run.Run.measured
    monkeypatch.setattr(run.Run, "measured", lambda self, name: (measured.append(name), measure(self, name))[1])
    record = vapi_fast.align(tiny_config(**evaluated, resume=True))
    assert measured == ["aligned"]
    assert record["base"]["fid"] > 0
    assert len(record["reward"]) == 2


@pytest.mark.usefixtures("image_sets")
def test_resume_refuses_another_configuration(tiny_config: Make, monkeypatch: Any) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(loop, "align_step", interrupted_at(1))
        with pytest.raises(KeyboardInterrupt):
            vapi_fast.align(tiny_config(checkpoint_every=1))
    with pytest.raises(ConfigError, match=r"was started with --clip-range .*, now it is 0\.5"):
        vapi_fast.align(tiny_config(checkpoint_every=1, resume=True, clip_range=0.5))
    found = run.identity
    monkeypatch.setattr(run, "identity", lambda path: found(path) | {"blake2b": "0"})
    with pytest.raises(ConfigError, match="was started with another --gpt-ckpt than it is now"):
        vapi_fast.align(tiny_config(checkpoint_every=1, resume=True))


RECORD = {
    "config": {"lr": "1e-5"},
    "curves": {"loss": [1.0, 2.0]},
    "measured": {},
    "data": {"split": None, "images": 3, "classes": {"0": {"name": "cat", "images": 3}}},
}


@pytest.mark.parametrize(
    "changes",
    [
        {"config": None},
        {"config": {"lr": 3}},
        {"curves": 3},
        {"curves": {"loss": [1.0]}},
        {"curves": {"loss": ["a", "b"]}},
        {"data": {}},
        {"data": {"split": None, "classes": {"x": {"name": "cat", "images": 3}}}},
        {"data": {"split": None, "classes": {"0": None}}},
        {"measured": []},
        {"files": 3},
    ],
)
def test_what_a_state_says_of_its_run(changes: dict[str, Any]) -> None:
    assert run.is_record(RECORD, 2)
    assert not run.is_record(RECORD | changes, 2)
    assert not run.is_record({}, 0)


@pytest.mark.usefixtures("image_sets")
def test_non_finite_step_keeps_the_last_good_weights(tiny_config: Make, tmp_path: Path, monkeypatch: Any) -> None:
    """The state saved at a NaN is the weights before that step, and the run can go on from it."""

    def broken_at_2(trainer: Trainer, batch: ImageBatch, step: int, **options: Any) -> StepResult:
        if step == 2:
            batch.images[0] = float("nan")
        return align_step(trainer, batch, step, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "align_step", broken_at_2)
        with pytest.raises(NonFiniteError, match=r"step 3: mse is not finite .*weights up to step 2"):
            vapi_fast.align(tiny_config(steps=4, output_dir=tmp_path / "nan"))
    vapi_fast.align(tiny_config(steps=4, output_dir=tmp_path / "nan", resume=True))
    vapi_fast.align(tiny_config(steps=4, output_dir=tmp_path / "good"))
    assert torch.equal(weights(tmp_path / "nan" / "aligned.pt"), weights(tmp_path / "good" / "aligned.pt"))


@pytest.mark.usefixtures("image_sets")
def test_same_seed_same_run_and_another_seed_another(tiny_config: Make, tmp_path: Path) -> None:
    rewards = [
        vapi_fast.align(tiny_config(seed=seed, output_dir=tmp_path / name))["reward"]
        for seed, name in ((0, "a"), (0, "b"), (1, "c"))
    ]
    assert rewards[0] == rewards[1]
    assert rewards[0] != rewards[2]


def labels_of(outcome: Outcome) -> dict[str, list[str]]:
    return {name: [label for label, _ in sheets] for name, sheets in outcome.sheets.items()}


@pytest.mark.usefixtures("image_sets")
def test_a_finished_alignment_is_resumed_for_its_measurement(
    tiny_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while the aligned generator is measured: nothing is aligned again. Fewer steps than done are refused."""
    options = {"evaluate": True, "eval_samples": 140, "output_dir": tmp_path / "a"}

    def killed(self: run.Run, name: str) -> dict[str, float]:
        if name == "aligned":
            raise KeyboardInterrupt
        return {"fid": 1.0}

    with monkeypatch.context() as patch:
        patch.setattr(run.Run, "measured", killed)
        with pytest.raises(KeyboardInterrupt):
            vapi_fast.align(tiny_config(**options))
    with pytest.raises(ConfigError, match="2 steps are done already; pass --steps 2 or more"):
        vapi_fast.align(tiny_config(**options, resume=True, steps=1))
    labels, write = [], run.report.write_pictures
    with monkeypatch.context() as patch:
        patch.setattr(run.Run, "measured", lambda self, name: {"fid": 2.0})
        patch.setattr(run.report, "scores_table", lambda *_: [])
        patch.setattr(
            run.report, "write_pictures", lambda found, at: (labels.append(labels_of(found)), write(found, at))
        )
        record = vapi_fast.align(tiny_config(**options, resume=True))
        whole = vapi_fast.align(tiny_config(**options | {"output_dir": tmp_path / "b"}))
    assert (record["base"], record["aligned"]) == ({"fid": 1.0}, {"fid": 2.0})
    assert len(record["reward"]) == 2
    assert record["images_per_second"] is None
    sheets = {"originals.png": ["original", "reconstruction"], "samples.png": ["base", "aligned"]}
    assert labels == [sheets] * 2
    for name in sheets:  # the base is drawn anew, before the state is read
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert record["reward"] == whole["reward"]
    assert torch.equal(weights(tmp_path / "a" / "aligned.pt"), weights(tmp_path / "b" / "aligned.pt"))


@pytest.mark.usefixtures("image_sets")
def test_a_lower_learning_rate_on_resume(tiny_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the message about infinities advises."""
    options = {"steps": 3, "checkpoint_every": 1, "output_dir": tmp_path / "a"}
    with monkeypatch.context() as patch:
        patch.setattr(loop, "align_step", interrupted_at(2))
        with pytest.raises(KeyboardInterrupt):
            vapi_fast.align(tiny_config(**options, lr=1e-3))
    used = []
    step_unless = alignment.step_unless

    def noted(optimizer: torch.optim.Optimizer, failed: torch.Tensor) -> None:
        used.extend(group["lr"] for group in optimizer.param_groups)
        step_unless(optimizer, failed)

    monkeypatch.setattr(alignment, "step_unless", noted)
    vapi_fast.align(tiny_config(**options, lr=1e-5, resume=True))
    assert used == [1e-5, 1e-5]  # both parameter groups


@pytest.mark.usefixtures("image_sets")
def test_straight_through_and_next_token_runs(tiny_config: Make, tmp_path: Path) -> None:
    for method in ("ste", "ntp"):
        record = vapi_fast.align(tiny_config(method=method, output_dir=tmp_path / method))
        assert all(math.isfinite(value) for value in record["curves"]["loss"])
        assert (tmp_path / method / "reward.png").exists() is (method == "ste")


def test_the_published_recipe_alone_and_made_up_images(tiny_config: Make, tmp_path: Path) -> None:
    """--path reference trains too; --random-init and --synthetic-data need no files, and nothing is measured."""
    bare = {"gpt_ckpt": None, "vq_ckpt": None, "vgg_weights": None, "data": None}
    config = tiny_config(random_init=True, synthetic_data=True, evaluate=True, output_dir=tmp_path / "a", **bare)
    record = vapi_fast.align(config, source=PublishedRecipe())
    assert record["config"]["evaluate"] is False
    assert "comparison" not in record
    assert all(math.isfinite(value) for value in record["curves"]["loss"] + record["reward"])
    median = float(weights(config.output_dir / "aligned.pt").abs().median())
    assert median == pytest.approx(0.6745 * 0.02, rel=0.01)  # normal with deviation 0.02, as initialised
    again = vapi_fast.align(dataclasses.replace(config, output_dir=tmp_path / "b"))
    assert again["reward"][0] == pytest.approx(record["reward"][0], abs=0.1)  # the same models and images, other draws


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dropout": 0.1}, "needs --rollout-mode eval: the published recipe draws rollouts without dropout"),
        ({"method": "ntp"}, "needs --method vapi: the published recipe is VA-π"),
        ({"rollouts": "free"}, "needs the published recipe's own --rollouts and --reward"),
        ({"top_p": 0.9}, "needs --top-k 0 and --top-p 1: the published recipe has no filters"),
        ({"steps": 1}, "needs --steps 2 or more: it does not compare the first, which warms up"),
        ({}, "needs one process, this is one of 2"),
    ],
)
def test_what_the_published_recipe_cannot_do(
    tiny_config: Make, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    if not changes:
        monkeypatch.setenv("WORLD_SIZE", "2")
    config = tiny_config(**changes)
    for source in (PublishedRecipe(), Comparison()):
        if "steps" not in changes or source.path == "both":
            with pytest.raises(ConfigError, match=f"--path {source.path} {message}"):
                vapi_fast.align(config, source=source)
    assert not config.output_dir.exists()


def test_the_first_rank_of_a_machine_has_kernels_compiled(
    tiny_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr("vapi_fast.kernels.compile.in_background", lambda arch: asked.append(arch) or nullcontext())
    monkeypatch.setattr("vapi_fast.kernels.launch.device_architecture", lambda index: "sm_90")
    gpu = torch.device("cuda", 0)
    xxl = AlignConfig(model="xxl", random_init=True, synthetic_data=True)
    for config, device, local_rank in ((xxl, gpu, "1"), (xxl, torch.device("cpu"), "0"), (tiny_config(), gpu, "0")):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        with run.kernels_compiled(config, device):
            assert asked == []
    monkeypatch.setenv("LOCAL_RANK", "0")
    with run.kernels_compiled(xxl, gpu):
        assert asked == ["sm_90"]
    library.served.cache_clear()
    monkeypatch.setenv("VAPI_FAST_KERNELS", str(tmp_path))
    with pytest.raises(ConfigError, match="no library of kernels"):
        run.kernels_compiled(xxl, gpu)
