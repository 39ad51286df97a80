"""`generate` on files: what is drawn, that an interrupted run ends the same, and what is refused."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import on_two_ranks
from safetensors import SafetensorError
from torch import Tensor

from vapi_fast import generate, tiny
from vapi_fast.data import sample_files
from vapi_fast.data.image_sets import open_image_set
from vapi_fast.data.pictures import GAP, MARGIN, SHEET_GAP
from vapi_fast.generation import folder as samples
from vapi_fast.generation.conditions import read_captions
from vapi_fast.generation.config import GenerateConfig, parse_class_ids
from vapi_fast.generation.folder import Sampler, batch_that_fits, draw_samples
from vapi_fast.generation.heatmaps import save_entropy_maps
from vapi_fast.generation.sequences import bytes_of_sequence
from vapi_fast.models import LlamaGen, VQTokenizer
from vapi_fast.models.frozen import FrozenTokenizer
from vapi_fast.runtime.checkpoint import identity, save_generator
from vapi_fast.runtime.errors import CheckpointError, ConfigError, DataError, Error


def config(out: Path, **changes: object) -> GenerateConfig:
    small = {"model": "tiny", "num": 6, "batch_size": 4, "class_ids": (0, 3, 8, 3), "seed": 5, "cfg_scale": 1.5}
    return GenerateConfig(out=out, **(small | changes))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def expected_images() -> Tensor:
    """The six images of `config` by the library's own calls, uint8 [6,3,32,32]."""
    model = LlamaGen.from_checkpoint(tiny.FILES.generator, "tiny").eval()
    tokenizer = VQTokenizer.from_checkpoint(tiny.FILES.tokenizer, "tiny")
    with torch.no_grad():
        tokens = generate(model, torch.tensor([0, 3, 8, 3, 0, 3]), seed=5, cfg_scale=1.5)
        return ((tokenizer.decode(tokens).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


@pytest.fixture(scope="module")
def png(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("samples") / "png"
    draw_samples(config(out))
    return out


@pytest.fixture(scope="module")
def npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("samples") / "npz"
    draw_samples(config(out, format="npz"))
    return out


def test_images_are_the_librarys_draws(png: Path, npz: Path) -> None:
    expected = expected_images()
    assert len({image.numpy().tobytes() for image in expected}) == 6
    stored = np.load(npz / "samples.npz", allow_pickle=False)
    assert stored.files == ["arr_0"]
    assert (stored["arr_0"].dtype, stored["arr_0"].shape) == (np.uint8, (6, 32, 32, 3))
    assert set(contents(npz)) == {"samples.npz", "manifest.json", "contact_sheet.png"}
    for index in range(6):
        image = np.asarray(Image.open(png / f"images/{index:06d}.png"))
        assert (image == stored["arr_0"][index]).all()
        # another batch size: rounding may move a pixel by one count
        assert np.abs(image.astype(int) - expected[index].permute(1, 2, 0).numpy()).max() <= 1
    for out in (png, npz):
        assert torch.cat(list(open_image_set(out, 32).batches(0, 6, 6))).shape == (6, 3, 32, 32)


def test_manifest_says_what_every_image_is(png: Path, npz: Path) -> None:
    manifest = json.loads((png / "manifest.json").read_text())
    assert [image["class"] for image in manifest["images"]] == [0, 3, 8, 3, 0, 3]
    assert manifest["images"][4] == {"id": 4, "file": "images/000004.png", "class": 0, "seed": 5}
    assert manifest["configuration"]["cfg_scale"] == 1.5
    size = tiny.FILES.generator.stat().st_size
    fingerprint = manifest["files"]["generator"].pop("blake2b")
    assert fingerprint not in (manifest["files"]["tokenizer"]["blake2b"], "")
    assert manifest["files"]["generator"] == {"name": tiny.FILES.generator.name, "bytes": size}
    assert manifest["draw"] == "token t of image i takes its random bits from seed, i and t alone"
    assert json.loads((npz / "manifest.json").read_text())["images"][4]["file"] == "samples.npz"


def draw_noted(config: GenerateConfig, batches: int | None = None) -> list[list[int]]:
    """Draw, or be interrupted after so many batches; the ids of each batch that was drawn."""
    drawn: list[list[int]] = []
    draw = Sampler.draw

    def noted(self: Sampler, ids: Tensor) -> Tensor:
        if len(drawn) == batches:
            raise KeyboardInterrupt
        drawn.append(ids.tolist())
        return draw(self, ids)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sampler, "draw", noted)
        with contextlib.nullcontext() if batches is None else pytest.raises(KeyboardInterrupt):
            draw_samples(config)
    return drawn


@pytest.mark.parametrize("form", ["png", "npz"])
def test_an_interrupted_run_ends_the_same(form: str, png: Path, npz: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    draw_noted(config(out, format=form), batches=1)
    folder = out / {"png": "images", "npz": "parts"}[form]
    for path in folder.iterdir():  # files are written in the background
        if path.name in ("000001.png", "000002.png"):
            path.unlink()
    (folder / {"png": ".000005.png.x1.tmp.png", "npz": ".000004.safetensors.x1.tmp.safetensors"}[form]).write_bytes(
        b"half"
    )
    assert draw_noted(config(out, format=form)) == {"png": [[1, 2, 4, 5]], "npz": [[4, 5]]}[form]
    assert contents(out) == contents({"png": png, "npz": npz}[form])
    # Nothing is missing: another batch size does not matter.
    assert draw_noted(config(out, format=form, batch_size=3)) == []


@pytest.mark.usefixtures("image_sets")
def test_two_ranks_give_the_same_files_as_one(png: Path, npz: Path, tmp_path: Path) -> None:
    flags = "--model tiny --num 6 --batch-size 4 --class-ids 0,3,8,3 --seed 5 --cfg-scale 1.5"
    lines = [f"generate {flags} --format {form} --out {tmp_path / form}" for form in ("png", "npz")]
    lines.append(f"evaluate --model tiny --samples {tmp_path / 'png'} --output {tmp_path / 'scores.json'}")
    printed = on_two_ranks(tmp_path, *lines)
    assert contents(tmp_path / "png") == contents(png)
    assert contents(tmp_path / "npz") == contents(npz)
    from vapi_fast.evaluation.scoring import EvaluateConfig, evaluate

    with pytest.warns(UserWarning, match="FID from 6 samples"):
        report = evaluate(EvaluateConfig(model="tiny", samples=png))
    scores = json.loads((tmp_path / "scores.json").read_text())
    for name in ("fid", "sfid", "inception_score", "precision", "recall"):
        assert scores[name] == pytest.approx(getattr(report, name), rel=1e-6)
    assert printed.count("6 images against 428 images") == 1


def test_save_size_resizes_the_decoded_image(png: Path, tmp_path: Path) -> None:
    draw_samples(config(tmp_path / "small", num=2, save_size=16))
    large, small = (np.asarray(Image.open(out / "images/000001.png")) for out in (png, tmp_path / "small"))
    assert small.shape == (16, 16, 3)
    halved = large.reshape(16, 2, 16, 2, 3).mean((1, 3))
    assert np.abs(small - halved).mean() < 8 < np.abs(small[::-1] - halved).mean()


def test_captions_stay_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features = np.random.default_rng(0).normal(size=(3, 5, 16)).astype(np.float32)
    np.save(tmp_path / "captions.npy", features)
    loaded, load = [], np.load
    monkeypatch.setattr(np, "load", lambda *args, **kwargs: loaded.append(load(*args, **kwargs)) or loaded[-1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = read_captions(tmp_path / "captions.npy", 5, 16).rows
    assert isinstance(loaded[0], np.memmap)
    assert rows.data_ptr() == loaded[0].ctypes.data
    assert (rows.numpy() == features).all()


def test_a_folder_of_another_run_is_left_alone(png: Path, tmp_path: Path) -> None:
    before = contents(png)
    other = tmp_path / "other.safetensors"
    shutil.copy(tiny.FILES.generator, other)
    for changes, message in (
        ({"seed": 6}, "seed is 5 there, 6 now"),
        ({"num": 7}, "num is 6 there, 7 now"),
        ({"class_ids": (0, 3)}, r"class_ids is \[0, 3, 8, 3\] there, \[0, 3\] now"),
        ({"gpt_ckpt": other}, "generator is .*generator.safetensors.* there, .*other.safetensors"),
    ):
        with pytest.raises(ConfigError, match=f"holds samples of another run .{message}.*choose another folder"):
            draw_samples(config(png, **changes))
    assert contents(png) == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds other files: choose another folder"):
        draw_samples(config(tmp_path))
    (tmp_path / "manifest.json").write_text('{"configuration": 3}')
    with pytest.raises(ConfigError, match=r"its manifest\.json is damaged"):
        draw_samples(config(tmp_path))


def test_a_checkpoint_of_equal_name_and_size_is_another_one(tmp_path: Path) -> None:
    model = LlamaGen.from_checkpoint(tiny.FILES.generator, "tiny")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_generator(tmp_path / name / "aligned.pt", model.state_dict())
        with torch.no_grad():
            model.layers[1].attention.wo.weight[3, 4] += 1
    sizes = {(tmp_path / name / "aligned.pt").stat().st_size for name in ("a", "b")}
    assert len(sizes) == 1
    draw_samples(config(tmp_path / "out", num=2, gpt_ckpt=tmp_path / "a/aligned.pt"))
    before = contents(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"another run .generator is .* now.: choose another folder") as caught:
        draw_samples(config(tmp_path / "out", num=2, gpt_ckpt=tmp_path / "b/aligned.pt"))
    assert "\n" not in str(caught.value)
    assert contents(tmp_path / "out") == before
    (tmp_path / "a").rename(tmp_path / "moved")
    draw_samples(config(tmp_path / "out", num=2, gpt_ckpt=tmp_path / "moved/aligned.pt"))  # the same file elsewhere


def test_a_large_file_is_known_by_samples_of_it(tmp_path: Path) -> None:
    path = tmp_path / "large.pt"
    size = 64 << 20
    with path.open("wb") as file:
        file.truncate(size)
    identities = {identity(path)["blake2b"]}
    for place in (0, 1 << 19, size // 2, size - 1, size // 64 * 5, size // 64 * 63 + 1000):
        with path.open("r+b") as file:
            file.seek(place)
            file.write(b"x")
        identities.add(identity(path)["blake2b"])
    assert len(identities) == 7
    with path.open("r+b") as file:
        file.truncate(size - 1)
    assert identity(path)["blake2b"] not in identities


def test_leftovers_of_a_killed_run_do_not_stand_in_the_way(png: Path, tmp_path: Path) -> None:
    (tmp_path / ".manifest.json.x1.tmp.json").write_text('{"half')
    draw_samples(config(tmp_path))
    assert contents(tmp_path) == contents(png)


def test_images_are_decoded_by_the_frozen_tokenizer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sampler = Sampler.load(config(tmp_path, num=32, batch_size=32), tiny.FILES.generator, torch.device("cpu"))
    chunks = []
    replayed = sampler.codec._decode
    function = replayed.function
    assert isinstance(function.__self__, FrozenTokenizer)
    monkeypatch.setattr(replayed, "function", lambda x: chunks.append(len(x)) or function(x))
    tokens = torch.randint(512, (20, 64), generator=torch.Generator().manual_seed(0))
    decoded = sampler.decode(tokens)
    assert chunks == [16, 16]
    plain = VQTokenizer.from_checkpoint(tiny.FILES.tokenizer, "tiny").decode(tokens).detach().clamp(-1, 1)
    assert (decoded - plain).abs().max() < 1e-4
    counts = [(x * 127.5 + 127.5).round() for x in (decoded, plain)]
    assert (counts[0] - counts[1]).abs().max() <= 1
    assert (counts[0] != counts[1]).float().mean() < 1e-3


def test_the_tokenizers_batch_has_its_place_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = LlamaGen.from_checkpoint(tiny.FILES.generator, "tiny")
    one = bytes_of_sequence(model.config, torch.float32, torch.float32, guided=True)
    rows = 16 * samples.DECODED_PIXEL_BYTES * 32**2 / one
    settings = config(tmp_path)
    for fitting, expected in ((math.ceil(rows) + 7, 7), (3, 1), (10**6, 256)):
        monkeypatch.setattr(samples, "rows_that_fit", lambda *args, count=fitting, **kwargs: count)
        assert batch_that_fits(settings, model, torch.device("cuda")) == expected
    monkeypatch.setattr(samples, "rows_that_fit", lambda *args, **kwargs: 9)
    assert batch_that_fits(settings, model, torch.device("cpu")) == 9


def test_what_the_engine_refuses_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise ValueError("kv_dtype 'fp8' needs a GPU of compute capability 8.9")

    with monkeypatch.context() as patch:
        patch.setattr(samples, "check_engine", refuse)
        with pytest.raises(ConfigError, match="'fp8' needs a GPU"):
            draw_samples(config(tmp_path / "out", kv_dtype="fp8"))
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(samples, "guidance_scales", refuse)
    with pytest.raises(ConfigError, match="'fp8' needs a GPU"):
        draw_samples(config(tmp_path / "out"))


def test_a_full_disk_names_the_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(sample_files, "save_file", full)
    told = (
        r"parts/000000.safetensors could not be written: .*No space left.*; the results take up to .*same command goes"
    )
    with pytest.raises(Error, match=told):
        draw_samples(config(tmp_path / "out", format="npz", num=2))
    assert not list((tmp_path / "out/parts").iterdir())


def test_a_part_damaged_before_the_merge_is_named(tmp_path: Path) -> None:
    files = sample_files.NpzFiles(tmp_path, 2)
    files.add([0, 1], torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    (tmp_path / "parts/000000.safetensors").write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"parts/000000.safetensors is damaged .*: delete it"):
        files.finish()
    assert not (tmp_path / "samples.npz").exists()


def test_a_damaged_part_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples.FORMATS["npz"], "finish", lambda self: None)
    monkeypatch.setattr(samples.FORMATS["npz"], "read", lambda self, ids: torch.zeros(len(ids), 3, 8, 8).byte())
    draw_samples(config(tmp_path / "out", format="npz", num=2, batch_size=2))
    (tmp_path / "out/parts/000000.safetensors").write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"parts/000000.safetensors is damaged .*: delete it"):
        draw_samples(config(tmp_path / "out", format="npz", num=2, batch_size=2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cfg_scale": 0.5}, "--cfg-scale must be at least 1, got 0.5"),
        ({"cfg_scale": math.nan}, "--cfg-scale must be at least 1"),
        ({"cfg_scale": math.inf}, "--cfg-scale must be finite and less than 2.63, got inf"),
        ({"temperature": math.inf}, "--temperature must be finite and less than 2.63, got inf"),
        ({"out": Path("x.npz")}, r"--out x.npz is a folder; the images go to OUT/samples.npz: leave out the .npz"),
        ({"num": 0}, "--num must be between 1 and 10000000"),
        ({"top_p": 0.0}, "--top-p"),
        ({"cfg_power": 0.0}, "--cfg-power must be greater than 0"),
        ({"cfg_interval": -2}, "--cfg-interval must be at least -1"),
        ({"cfg_schedule": "linear"}, "--cfg-schedule linear: choose one of constant, power-cosine, rar"),
        ({"kv_dtype": "int4"}, "--kv-dtype int4: choose one of int8, fp8"),
        ({"temperature": 0.0}, "--temperature must be at least 1e-06"),
        ({"image_size": 30}, "--image-size must be a multiple of 4"),
        ({"format": "jpg"}, "--format jpg: choose one of png, npz"),
        ({"model": "huge"}, "--model huge: unknown"),
        ({"model": "xxxl"}, "--gpt-ckpt is required for --model xxxl: the hub has none for --image-size 384"),
        ({"gpt_ckpt": Path("absent.pt")}, "--gpt-ckpt absent.pt: no such file"),
        ({"class_ids": "0,x"}, "--class-ids 0,x: expected numbers and ranges"),
        ({"class_ids": "5-3"}, "5-3 is not a range from low to high"),
        ({"class_ids": ()}, "--class-ids must be whole numbers, at least one"),
        ({"class_ids": (1.5,)}, "--class-ids must be whole numbers"),
        ({"class_ids": 3}, "--class-ids must be whole numbers"),
        ({"num": "6"}, "--num must be a whole number, got '6'"),
        ({"num": 6.0}, "--num must be a whole number, got 6.0"),
        ({"temperature": True}, "--temperature must be a number, got True"),
        ({"entropy_maps": "no"}, "--entropy-maps must be True or False, got 'no'"),
        ({"gpt_ckpt": b"a"}, "--gpt-ckpt must be a path"),
        ({"model": None}, "--model None: unknown"),
        ({"out": None}, "--out must be given, got None"),
        ({"class_ids": "9" * 5000}, "expected numbers and ranges"),
        ({"caption_features": Path(__file__)}, "one kind of condition"),
    ],
)
def test_bad_options(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**({"out": tmp_path / "out"} | changes))


def test_unknown_classes_and_misfitting_checkpoints_leave_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown class 9, 12, this checkpoint has 0-8"):
        draw_samples(config(tmp_path / "out", class_ids="0,9,12"))
    with pytest.raises(CheckpointError, match="no weight named tok_embeddings"):
        draw_samples(config(tmp_path / "out", gpt_ckpt=tiny.FILES.tokenizer))
    with pytest.raises(CheckpointError, match="no weight named tok_embeddings"):
        draw_samples(config(tmp_path / "out", compare_ckpt=tiny.FILES.tokenizer))
    assert not (tmp_path / "out").exists()


def test_class_ids_are_numbers_and_ranges() -> None:
    assert parse_class_ids("7,0-3, 10-10 ") == (7, 0, 1, 2, 3, 10)


def test_views_are_drawn_where_asked_for(png: Path, tmp_path: Path) -> None:
    """Pictures beside the samples; the samples stay the same, and are one of the compared sheets, ordered by class."""
    other = LlamaGen.from_checkpoint(tiny.FILES.generator, "tiny")
    with torch.no_grad():
        other.output.weight.mul_(3)
    save_generator(tmp_path / "sharper.pt", other.state_dict())
    draw_samples(config(tmp_path / "out", compare_ckpt=tmp_path / "sharper.pt", entropy_maps=True))
    found = contents(tmp_path / "out")
    entropy = Image.open(tmp_path / "out" / "entropy.png")
    comparison = np.asarray(Image.open(tmp_path / "out" / "comparison.png").convert("RGB"))[-MARGIN - 2 * 96 - GAP :]
    step = 96 + GAP
    for place, i in enumerate((0, 4, 1, 3, 5, 2)):  # of classes 0, 0, 3, 3, 3, 8
        y, x = place // 3 * step, MARGIN + place % 3 * step
        before, after = (
            comparison[y : y + 96 : 3, left : left + 96 : 3].astype(int) for left in (x, x + 3 * step - GAP + SHEET_GAP)
        )
        image = np.asarray(Image.open(tmp_path / "out" / "images" / f"{i:06d}.png"))
        assert np.abs(before - image).max() <= 1
        assert np.abs(after - image).max() > 100
    assert {name: found[name] for name in contents(png)} == contents(png)
    assert set(found) - set(contents(png)) == {"comparison.png", "entropy.png"}
    assert entropy.width > entropy.height


def test_the_heat_map_glows_where_entropy_is_high(tmp_path: Path) -> None:
    entropies = torch.zeros(1, 16)
    entropies[0, :8] = 5.0  # the upper half
    save_entropy_maps(tmp_path / "map.png", torch.zeros(1, 3, 32, 32), entropies)
    picture = np.asarray(Image.open(tmp_path / "map.png").convert("RGB")).astype(int)
    right_half = picture[:, picture.shape[1] // 3 : 2 * picture.shape[1] // 3]
    middle = len(picture) // 2
    upper, lower = right_half[middle - 40 : middle - 20].mean(), right_half[middle + 30 : middle + 50].mean()
    assert upper > lower + 50
    with pytest.raises(ValueError, match="15 tokens do not fill a square grid"):
        save_entropy_maps(tmp_path / "map.png", torch.zeros(1, 3, 32, 32), entropies[:, 1:])
    with pytest.raises(ValueError, match="not finite"):
        save_entropy_maps(tmp_path / "map.png", torch.zeros(1, 3, 32, 32), entropies / 0)
