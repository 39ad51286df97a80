"""The sheets' layout and pixels, the reward curve, the bars of stages, and that none leaves half a file."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vapi_fast.alignment.charts import STAGE_COLOURS, _running_mean, save_reward_curve, save_stage_bars
from vapi_fast.alignment.run import PICTURES_BYTES
from vapi_fast.data.pictures import BACKGROUND, GAP, MARGIN, SHEET_GAP, save_sheets, spread
from vapi_fast.runtime.clock import STAGES

LABELS = ("base", "aligned")


def flat(*levels: int, side: int = 32) -> Tensor:
    """One evenly grey image [3, side, side] in [−1, 1] for each level of 0 … 255."""
    return (torch.tensor(levels) / 127.5 - 1).view(-1, 1, 1, 1).expand(-1, 3, side, side)


def sheets(count: int, side: int = 32) -> list[tuple[str, Tensor]]:
    """Image n of sheet s is grey of level 2 n + s."""
    return [(label, flat(*range(s, 2 * count, 2), side=side)) for s, label in enumerate(LABELS)]


def read(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB"))


def cell_origin(pixels: np.ndarray, rows: int, side: int) -> int:
    """Top of the first row of cells: rows are counted from the bottom margin, so no knowledge of the header is used."""
    return pixels.shape[0] - MARGIN - rows * (side + GAP) + GAP


def test_every_image_is_in_the_same_place_on_every_sheet(tmp_path: Path) -> None:
    """In rows, enlarged from 32 to 96 pixels, the rest being background, also where the last row ends early."""
    save_sheets(tmp_path / "samples.png", sheets(8), columns=3)
    pixels = read(tmp_path / "samples.png").copy()
    width = 3 * 96 + 2 * GAP
    assert pixels.shape[1] == 2 * MARGIN + 2 * width + SHEET_GAP
    top = cell_origin(pixels, rows=3, side=96)
    for sheet in range(2):
        for n in range(8):
            y, x = top + n // 3 * (96 + GAP), MARGIN + sheet * (width + SHEET_GAP) + n % 3 * (96 + GAP)
            assert (pixels[y : y + 96, x : x + 96] == 2 * n + sheet).all()
            pixels[y : y + 96, x : x + 96] = BACKGROUND
    assert (pixels[top:] == BACKGROUND).all()


def test_small_images_are_enlarged_without_smoothing_and_keep_their_channels(tmp_path: Path) -> None:
    image = torch.full((1, 3, 2, 3), -1.0)
    image[0, 0, 0, 0] = image[0, 1, 0, 2] = image[0, 2, 1, 1] = 1.0  # red top left, green top right, blue below
    save_sheets(tmp_path / "samples.png", [("a", image)], columns=8)
    pixels = read(tmp_path / "samples.png")
    cell = pixels[cell_origin(pixels, 1, 96) :][:96, MARGIN : MARGIN + 144]  # 2 × 3 → factor 48
    expected = np.zeros((2, 3, 3), dtype=np.uint8)
    expected[0, 0, 0] = expected[0, 2, 1] = expected[1, 1, 2] = 255
    assert (cell == expected.repeat(48, axis=0).repeat(48, axis=1)).all()


@pytest.mark.parametrize(("side", "cell"), [(96, 96), (192, 192), (256, 128), (384, 192), (512, 171)])
def test_larger_images_keep_their_size_or_are_averaged(tmp_path: Path, side: int, cell: int) -> None:
    image = torch.rand(2, 3, side, side, generator=torch.manual_seed(1)) * 2.4 - 1.2
    save_sheets(tmp_path / "samples.png", [("", image)], columns=2)
    pixels = read(tmp_path / "samples.png")
    assert pixels.shape == (2 * MARGIN + cell, 2 * MARGIN + 2 * cell + GAP, 3)
    factor = -(-side // cell)
    rounded = ((image.clamp(-1, 1) + 1) * 127.5).round()
    expected = torch.nn.functional.avg_pool2d(rounded, factor, ceil_mode=True).permute(0, 2, 3, 1).numpy()
    for n in range(2):
        found = pixels[MARGIN : MARGIN + cell, MARGIN + n * (cell + GAP) :][:, :cell]
        assert np.abs(found - expected[n]).max() < 0.6  # Pillow rounds a mean of nine a little otherwise


def test_labels_are_written_above_every_sheet_and_inside_it(tmp_path: Path) -> None:
    """Where there are none, no room is left for them."""
    long = [(f"{label} generator", images) for label, images in sheets(2)]  # written smaller, or it would not fit
    save_sheets(tmp_path / "samples.png", long, columns=1)
    pixels = read(tmp_path / "samples.png")
    header = pixels[MARGIN : cell_origin(pixels, 2, 96)].min(axis=2)
    for x in (MARGIN, MARGIN + 96 + SHEET_GAP):
        assert (header[:, x : x + 96] < 100).sum() > 40
        header[:, x : x + 96] = 255
    assert (header > 200).all()
    save_sheets(tmp_path / "unlabelled.png", [("", images) for _, images in sheets(2)], columns=1)
    assert read(tmp_path / "unlabelled.png").shape[0] == 2 * MARGIN + 2 * 96 + GAP


def test_captions_stand_above_their_images(tmp_path: Path) -> None:
    levels = torch.arange(11, dtype=torch.uint8) * 20
    images = levels.view(-1, 1, 1, 1).expand(-1, 3, 32, 32)
    save_sheets(tmp_path / "sheet.png", [("", images)], 8, ["" if i == 3 else f"class {i}" for i in range(11)])
    picture = read(tmp_path / "sheet.png")
    assert picture.shape[:2] == (2 * 16 + 2 * (96 + 18 + 6) - 6, 2 * 16 + 8 * 102 - 6)
    for index in range(11):
        top, left = 16 + index // 8 * 120 + 18, 16 + index % 8 * 102
        assert (picture[top : top + 96, left : left + 96] == 20 * index).all()
        assert (picture[top - 18 : top, left : left + 96].min() < 100) == (index != 3)


def test_one_caption_stands_above_neighbours_that_share_it_and_long_ones_are_cut(tmp_path: Path) -> None:
    images = torch.full((6, 3, 32, 32), 128, dtype=torch.uint8)
    shared, cut = "a photo of two dogs and a cat", "a photo of a dog left of the\nother one, and so on " * 9
    save_sheets(tmp_path / "sheet.png", [("", images)], 3, [shared, shared, "b", *[cut] * 3])
    picture = read(tmp_path / "sheet.png")
    first, second = (picture[16 + row * 120 :][:18].min(axis=2) for row in range(2))
    dark = [np.flatnonzero((row < 128).any(0)) for row in (first[:, : 16 + 198], first[:, 16 + 204 :], second)]
    assert dark[0].min() > 16 + 10
    assert abs((dark[0].min() + dark[0].max()) / 2 - (16 + 198 / 2)) < 3  # once, in the middle of both
    assert abs((dark[1].min() + dark[1].max()) / 2 - 48) < 3
    assert 16 <= dark[2].min() < 30
    assert 270 < dark[2].max() < 16 + 3 * 102 - 6


@pytest.mark.parametrize("side", [32, 95, 97, 192, 256, 384])
def test_four_sheets_of_noise_are_no_more_than_a_run_makes_room_for(tmp_path: Path, side: int) -> None:
    """Samples and originals; of every size there are enough to compare, and in as many columns as rows."""
    ids, columns = spread(torch.arange(1000), side)
    assert len(ids) == columns**2 >= 16
    noise = torch.randint(256, (len(ids), 3, side, side), dtype=torch.uint8)
    save_sheets(tmp_path / "samples.png", [("a", noise), ("b", noise)], columns)
    assert (tmp_path / "samples.png").stat().st_size < PICTURES_BYTES * 0.4


@pytest.mark.parametrize(
    ("counts", "side", "rows", "columns"),
    [
        ([13, 73, 16, 12, 34, 10, 27, 31, 34], 32, 9, 7),  # the tiny preset's: a class a row
        ([40] * 5, 32, 10, 6),  # two rows a class
        ([100], 32, 8, 8),
        ([100, 100], 384, 4, 4),
        ([3] * 20, 32, 7, 9),  # three classes a row, but for the last
        ([5] * 64, 32, 8, 8),
        ([1, 1], 32, 1, 2),
        ([1], 32, 1, 1),
    ],
)
def test_sheets_show_all_classes_alike_and_in_order(counts: list[int], side: int, rows: int, columns: int) -> None:
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)) * 10
    labels = labels[torch.randperm(len(labels), generator=torch.manual_seed(0))]
    positions, found = spread(labels, side)
    assert found == columns
    assert -(-len(positions) // columns) == rows
    assert len(positions.unique()) == len(positions)
    shown = labels[positions]
    assert shown.tolist() == sorted(shown.tolist())
    assert (shown[:, None] == labels.unique()).sum(0).unique().numel() == 1
    for label in shown.unique():  # those that come first
        mine = positions[shown == label]
        assert torch.equal(mine, (labels == label).nonzero()[: len(mine), 0])


@pytest.mark.parametrize(
    ("counts", "side", "each", "columns"),
    [
        ([4] * 553, 32, 4, 4),  # GenEval's, on 16 rows
        ([4] * 553, 256, 4, 4),  # 9 rows
        ([4] * 553, 384, 4, 4),
        ([12] * 3, 32, 8, 8),  # whole rows alone
        ([20] * 2, 32, 16, 8),
        ([11], 32, 11, 8),  # all of one
        ([3, 2, 3], 32, 2, 2),
    ],
)
def test_rows_of_one_class_each(counts: list[int], side: int, each: int, columns: int) -> None:
    labels = torch.tensor([label for k in range(max(counts)) for label, count in enumerate(counts) if k < count])
    positions, found = spread(labels, side, rows=True)
    assert found == columns
    shown = labels[positions]
    room = {32: 64, 256: 36, 384: 16}[side]
    assert len(positions) == each * min(len(counts), room // each)
    assert shown.unique(return_counts=True)[1].unique().tolist() == [each]
    assert len(counts) == 1 or all(len(row.unique()) == 1 for row in shown.split(columns))
    assert spread(torch.arange(30), side, rows=True)[1] == spread(torch.arange(30), side)[1]  # one image each


def test_of_many_classes_evenly_spaced_ones_are_shown() -> None:
    assert spread(torch.arange(1000), 384)[0].tolist() == [i * 1000 // 16 for i in range(16)]
    assert spread(torch.tensor([5, 2, 5, 5, 5]), 32)[0].tolist() == [1, 0, 2, 3, 4]  # a class that has few


def test_pictures_are_the_same_bytes_every_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_sheets(tmp_path / f"{name}.png", sheets(2), columns=2)
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


@pytest.mark.parametrize("save", ["sheets", "curve", "bars"])
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
        "sheets": (partial(save_sheets, columns=1), sheets(1)),
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
        ([("a", torch.zeros(2, 3, 8, 8)), ("b", torch.zeros(1, 3, 8, 8))], r"sheet 'b' has shape \[1, 3, 8, 8\]"),
        ([("a", torch.zeros(2, 1, 8, 8))], r"sheet 'a' has shape \[2, 1, 8, 8\]"),
        ([("a", torch.full((1, 3, 8, 8), torch.nan))], "sheet 'a' has values that are not finite"),
    ],
)
def test_bad_sheets_raise_one_line(tmp_path: Path, bad: list[tuple[str, Tensor]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        save_sheets(tmp_path / "samples.png", bad, columns=8)
    with pytest.raises(ValueError, match="2 captions given for 11 images"):
        save_sheets(tmp_path / "samples.png", sheets(11), 8, ["a", "b"])
    assert not list(tmp_path.iterdir())


def test_no_rewards_raise_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no rewards"):
        save_reward_curve(tmp_path / "reward.png", [])
