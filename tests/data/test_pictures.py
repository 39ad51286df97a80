"""The picture grid's layout and pixels, the reward curve, the bars of stages, and that none leaves half a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vapi_fast.alignment.charts import STAGE_COLOURS, _running_mean, save_reward_curve, save_stage_bars
from vapi_fast.data.pictures import BLOCK_GAP, GAP, MARGIN, save_grid
from vapi_fast.runtime.clock import STAGES

LABELS = ("original", "reconstruction", "base sample", "aligned sample")


def flat(*levels: float, side: int = 32) -> Tensor:
    """One evenly grey image [3, side, side] for each level in [−1, 1]."""
    return torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, 3, side, side)


def columns(count: int, side: int = 32) -> list[tuple[str, Tensor]]:
    """Image n of column c is grey of level 4 n + c, in 8-bit counts."""
    return [
        (label, flat(*((4 * n + c) / 127.5 - 1 for n in range(count)), side=side)) for c, label in enumerate(LABELS)
    ]


def read(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB"))


def cell_origin(pixels: np.ndarray, rows: int, side: int) -> int:
    """Top of the first row of cells: rows are counted from the bottom margin, so no knowledge of the header is used."""
    return pixels.shape[0] - MARGIN - rows * (side + GAP) + GAP


def test_grid_places_every_image_enlarged_under_its_column(tmp_path: Path) -> None:
    save_grid(tmp_path / "samples.png", columns(3))
    pixels = read(tmp_path / "samples.png")
    assert pixels.shape[1] == 2 * MARGIN + 4 * 96 + 3 * GAP  # one block, 32 → 96 pixels
    top = cell_origin(pixels, rows=3, side=96)
    for n in range(3):
        for c in range(4):
            y, x = top + n * (96 + GAP), MARGIN + c * (96 + GAP)
            cell = pixels[y : y + 96, x : x + 96]
            assert (cell == 4 * n + c).all()
            assert (pixels[y : y + 96, x - GAP : x] > 200).all()  # the gap is background


def test_grid_enlarges_without_smoothing_and_keeps_channel_order(tmp_path: Path) -> None:
    image = torch.full((1, 3, 2, 3), -1.0)
    image[0, 0, 0, 0] = image[0, 1, 0, 2] = image[0, 2, 1, 1] = 1.0  # red top left, green top right, blue below
    save_grid(tmp_path / "samples.png", [("a", image)])
    pixels = read(tmp_path / "samples.png")
    cell = pixels[cell_origin(pixels, 1, 96) :][:96, MARGIN : MARGIN + 144]  # 2 × 3 → factor 48
    expected = np.zeros((2, 3, 3), dtype=np.uint8)
    expected[0, 0, 0] = expected[0, 2, 1] = expected[1, 1, 2] = 255
    assert (cell == expected.repeat(48, axis=0).repeat(48, axis=1)).all()


def test_grid_keeps_large_images_at_their_size_and_clamps_values(tmp_path: Path) -> None:
    save_grid(tmp_path / "samples.png", [("a", flat(1.7, side=200)), ("b", flat(-3.0, side=200))])
    pixels = read(tmp_path / "samples.png")
    assert pixels.shape[1] == 2 * MARGIN + 2 * 200 + GAP
    assert (pixels[-MARGIN - 200 : -MARGIN, MARGIN : MARGIN + 200] == 255).all()
    assert (pixels[-MARGIN - 200 : -MARGIN, MARGIN + 200 + GAP : -MARGIN] == 0).all()


@pytest.mark.parametrize("count", [24, 40])
def test_many_rows_become_blocks_in_a_landscape_picture(tmp_path: Path, count: int) -> None:
    save_grid(tmp_path / "samples.png", columns(count, side=96))
    pixels = read(tmp_path / "samples.png")
    height, width, _ = pixels.shape
    assert 1.2 < width / height < 1.9
    block = 4 * (96 + GAP) - GAP + BLOCK_GAP
    blocks = (width - 2 * MARGIN + BLOCK_GAP) // block
    rows = -(-count // blocks)
    assert blocks > 1
    last_row, last_block = (count - 1) % rows, (count - 1) // rows
    y = cell_origin(pixels, rows, 96) + last_row * (96 + GAP)
    x = MARGIN + last_block * block + 3 * (96 + GAP)
    assert (pixels[y : y + 96, x : x + 96] == 4 * (count - 1) + 3).all()


def test_headers_are_written_above_every_column_and_inside_it(tmp_path: Path) -> None:
    save_grid(tmp_path / "samples.png", columns(2))
    pixels = read(tmp_path / "samples.png")
    header = pixels[MARGIN : cell_origin(pixels, 2, 96)].min(axis=2)
    for c in range(4):
        x = MARGIN + c * (96 + GAP)
        assert (header[:, x : x + 96] < 100).sum() > 40
    between = [column for c in range(1, 4) for column in range(MARGIN + c * (96 + GAP) - GAP, MARGIN + c * (96 + GAP))]
    assert (header[:, between] > 200).all()


def test_pictures_are_the_same_bytes_every_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_grid(tmp_path / f"{name}.png", columns(2))
        save_reward_curve(tmp_path / f"{name}-reward.png", [-0.5, -0.4, -0.45])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a-reward.png").read_bytes() == (tmp_path / "b-reward.png").read_bytes()


def test_reward_curve_rises_from_left_to_right_with_the_rewards(tmp_path: Path) -> None:
    save_reward_curve(tmp_path / "reward.png", [step / 100 - 1 for step in range(100)])
    pixels = read(tmp_path / "reward.png").astype(int)
    blue = (pixels[..., 2] - pixels[..., 0] > 100) & (pixels[..., 0] < 60)  # the running mean's colour
    heights = {x: np.flatnonzero(blue[:, x]).min() for x in np.flatnonzero(blue.any(axis=0))}
    quarter = (max(heights) - min(heights)) // 4
    assert heights[min(heights) + 3 * quarter] < heights[min(heights) + quarter] - 50


def test_running_mean_is_centred_and_shrinks_at_the_ends() -> None:
    assert _running_mean([0.0, 3.0, 6.0, 0.0, -6.0], window=3) == [1.5, 3.0, 3.0, 0.0, -3.0]


def test_one_step_makes_a_curve(tmp_path: Path) -> None:
    save_reward_curve(tmp_path / "reward.png", [-0.5])
    assert read(tmp_path / "reward.png").shape[1] == 900


def bar_widths(path: Path, stage: str) -> list[int]:
    """Pixels of a stage's colour across each bar, from the top: below the legend, in rows where every bar is whole."""
    pixels = read(path)
    colour = np.array([int(STAGE_COLOURS[stage][i : i + 2], 16) for i in (1, 3, 5)])
    mask = (pixels == colour).all(axis=2).sum(axis=1)
    bars, row = [], 0
    while row < len(mask):
        end = row
        while end < len(mask) and mask[end]:
            end += 1
        if end - row > 25:  # a legend's patch is lower
            bars.append(int(mask[row + 4]))
        row = end + 1
    return bars


def test_stages_are_stacked_in_proportion_to_their_seconds(tmp_path: Path) -> None:
    runs = [("vapi-fast", {"forward": 1.0, "decode": 2.0}), ("published recipe", {"forward": 6.0, "decode": 3.0})]
    save_stage_bars(tmp_path / "stages.png", runs)
    forward, decode = (bar_widths(tmp_path / "stages.png", stage) for stage in ("forward", "decode"))
    assert len(forward) == len(decode) == 4  # two bars in seconds, two in shares
    second = forward[1] / 6
    assert [forward[0], decode[0], decode[1]] == pytest.approx([second, 2 * second, 3 * second], abs=2)
    share = forward[2] + decode[2]
    assert [forward[2], decode[2]] == pytest.approx([share / 3, 2 * share / 3], abs=2)
    assert [forward[3], decode[3]] == pytest.approx([2 * share / 3, share / 3], abs=2)


def test_one_run_has_one_bar_and_every_stage_a_colour_of_its_own(tmp_path: Path) -> None:
    save_stage_bars(tmp_path / "stages.png", [("vapi-fast", dict.fromkeys(STAGES, 1.0))])
    for stage in STAGES:
        assert len(bar_widths(tmp_path / "stages.png", stage)) == 1
    assert tuple(STAGE_COLOURS) == STAGES
    assert len(set(STAGE_COLOURS.values())) == len(STAGES)


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([], "no runs"),
        ([("a", {"score": 1.0})], "run 'a': unknown stage 'score'"),
        ([("a", {"decode": 1.0}), ("b", {"decode": float("nan")})], "run 'b': seconds must be finite"),
        ([("a", {"decode": 1.0, "lpips": -1.0})], "run 'a': seconds must be finite, not negative"),
        ([("a", {"decode": 0.0})], "run 'a': .*not all zero"),
    ],
)
def test_bad_seconds_raise_one_line(tmp_path: Path, runs: list[tuple[str, dict[str, float]]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        save_stage_bars(tmp_path / "stages.png", runs)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("save", ["grid", "curve", "bars"])
def test_failure_while_writing_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save: str
) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(b"older picture")

    def fail(self: object, target: Path, *args: object, **kwargs: object) -> None:
        Path(target).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("PIL.Image.Image.save", fail)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    save_picture, content = {
        "grid": (save_grid, columns(1)),
        "curve": (save_reward_curve, [-0.5]),
        "bars": (save_stage_bars, [("vapi-fast", {"decode": 1.0})]),
    }[save]
    with pytest.raises(OSError, match="no space left"):
        save_picture(path, content)
    assert path.read_bytes() == b"older picture"
    assert [file.name for file in tmp_path.iterdir()] == ["picture.png"]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([], "no images"),
        ([("a", torch.zeros(0, 3, 8, 8))], "no images"),
        ([("a", torch.zeros(2, 3, 8, 8)), ("b", torch.zeros(1, 3, 8, 8))], r"column 'b' has shape \[1, 3, 8, 8\]"),
        ([("a", torch.zeros(2, 1, 8, 8))], r"column 'a' has shape \[2, 1, 8, 8\]"),
        ([("a", torch.full((1, 3, 8, 8), torch.nan))], "column 'a' has values that are not finite"),
    ],
)
def test_bad_columns_raise_one_line(tmp_path: Path, bad: list[tuple[str, Tensor]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        save_grid(tmp_path / "samples.png", bad)
    assert not list(tmp_path.iterdir())


def test_no_rewards_raise_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no rewards"):
        save_reward_curve(tmp_path / "reward.png", [])
