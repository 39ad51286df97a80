"""Resumable states: exact, whole or refused, and independent of the number of processes."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import pickle
import resource
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import PATIENCE, forkserver
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from vapi_fast.alignment import snapshots
from vapi_fast.alignment.snapshots import Snapshots, saved_steps
from vapi_fast.models import LlamaGen
from vapi_fast.runtime.errors import CheckpointError

EXTRA = {"config": {"lr": "1e-06"}, "curves": {"reward": [-0.1, float("nan")]}}


class StepInGroup(torch.optim.Optimizer):
    """Keeps its state as apex's FusedAdam does: no step per parameter, one in each group."""

    def __init__(self, params: Iterable[nn.Parameter]) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                average = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                average.lerp_(p.grad, 0.5)
                p.data.sub_(average, alpha=group["lr"] / group["step"])


def make_model(seed: int = 0, layers: int = 2) -> LlamaGen:
    torch.manual_seed(seed)
    return LlamaGen.from_name("tiny", layers=layers)


def make_adamw(model: nn.Module) -> torch.optim.AdamW:
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    others = [p for name, p in model.named_parameters() if "norm" not in name]
    return torch.optim.AdamW([{"params": others}, {"params": norms, "weight_decay": 0.0}], lr=1e-2)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> None:
    """Optimizer steps on gradients that depend on the step alone, sharded as the parameters are."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            gradient = torch.randn(p.shape, generator=generator)
            p.grad = distribute_tensor(gradient, p.device_mesh, p.placements) if isinstance(p, DTensor) else gradient
        optimizer.step()
        optimizer.zero_grad()


def whole_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copies of all weights and optimizer states, unsharded."""
    state = {}
    for name, p in model.named_parameters():
        for key, value in {"weight": p, **optimizer.state.get(p, {})}.items():
            value = value.full_tensor() if isinstance(value, DTensor) else value
            state[f"{name}.{key}"] = value.detach().clone()
    return state


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])]
    assert not different


@contextlib.contextmanager
def full_disk(size: int = 100_000) -> Iterator[None]:
    """No file of this process can grow beyond `size` bytes: writing fails, as it does where no space is left."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))  # Python ignores the signal that comes with it
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def run_children(target: Callable[..., None], arguments: list[tuple[Any, ...]]) -> None:
    children = [forkserver.Process(target=target, args=a) for a in arguments]
    for child in children:
        child.start()
    for child in children:
        child.join(PATIENCE)
        child.kill()
    assert [child.exitcode for child in children] == [0] * len(children)


@pytest.fixture
def trained() -> tuple[LlamaGen, torch.optim.AdamW]:
    model = make_model(layers=1)
    optimizer = make_adamw(model)
    train(model, optimizer, range(3))
    return model, optimizer


def save(directory: Path, steps: Iterable[int], trained: tuple[LlamaGen, torch.optim.AdamW], **kwargs: Any) -> None:
    states = Snapshots(directory, **kwargs)
    for step in steps:
        states.save(step, *trained, EXTRA | {"step": step})
        states.finish()


def restored_step(directory: Path, layers: int = 1) -> int:
    model = make_model(1, layers)
    return Snapshots(directory).restore(model, make_adamw(model))[0]


@pytest.mark.parametrize("make_optimizer", [make_adamw, lambda model: StepInGroup(model.parameters())])
def test_round_trip_is_exact(tmp_path: Path, make_optimizer: Callable[..., torch.optim.Optimizer]) -> None:
    """Weights, optimizer state and counters come back bit for bit, and training goes on as if never interrupted."""
    model = make_model()
    optimizer = make_optimizer(model)
    train(model, optimizer, range(3))
    states = Snapshots(tmp_path / "run" / "snapshots")
    states.save(3, model, optimizer, EXTRA)
    states.finish()
    saved = whole_state(model, optimizer)

    other = make_model(1)
    other_optimizer = make_optimizer(other)
    step, extra = Snapshots(tmp_path / "run" / "snapshots").restore(other, other_optimizer)
    assert (step, str(extra)) == (3, str(EXTRA))  # text: NaN is not equal to itself
    assert_equal(whole_state(other, other_optimizer), saved)
    for m, o in ((model, optimizer), (other, other_optimizer)):
        train(m, o, range(3, 5))
    assert_equal(whole_state(other, other_optimizer), whole_state(model, optimizer))


def test_nothing_saved_nothing_restored(tmp_path: Path) -> None:
    model = make_model(layers=1)
    states = Snapshots(tmp_path / "snapshots")
    assert states.restore(model, make_adamw(model)) is None
    states.clear()
    assert not (tmp_path / "snapshots").exists()


def test_state_before_the_first_step(tmp_path: Path) -> None:
    """The optimizer has no state yet; after restoring, its first step is the first."""
    model = make_model(layers=1)
    optimizer = make_adamw(model)
    save(tmp_path, [0], (model, optimizer))
    other = make_model(1, layers=1)
    other_optimizer = make_adamw(other)
    assert Snapshots(tmp_path).restore(other, other_optimizer)[0] == 0
    for m, o in ((model, optimizer), (other, other_optimizer)):
        train(m, o, [0])
    assert_equal(whole_state(other, other_optimizer), whole_state(model, optimizer))


def test_keeps_the_newest(tmp_path: Path, trained: Any) -> None:
    save(tmp_path, [1, 2, 10, 9_999_999], trained)
    assert saved_steps(tmp_path) == [10, 9_999_999]
    save(tmp_path, [10_000_000], trained, keep=1)
    assert {path.name for path in tmp_path.iterdir()} == {"step-10000000"}
    Snapshots(tmp_path).clear()
    assert not tmp_path.exists()


def test_saving_a_step_again_replaces_it(tmp_path: Path, trained: Any) -> None:
    save(tmp_path, [3], trained)
    train(*trained, [3])
    save(tmp_path, [3], trained)
    model = make_model(1, layers=1)
    optimizer = make_adamw(model)
    Snapshots(tmp_path).restore(model, optimizer)
    assert_equal(whole_state(model, optimizer), whole_state(*trained))
    assert {path.name for path in tmp_path.iterdir()} == {"step-000003"}


def test_training_goes_on_while_it_is_written(tmp_path: Path, trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What happens to weights, optimizer and curves after `save` has returned is not in the snapshot."""
    changed = threading.Event()
    real_save = snapshots.dcp.save

    def save_late(*args: Any, **kwargs: Any) -> None:
        assert changed.wait(PATIENCE)
        real_save(*args, **kwargs)

    monkeypatch.setattr(snapshots.dcp, "save", save_late)
    states = Snapshots(tmp_path)
    before = whole_state(*trained)
    curve = [1.0]
    states.save(3, *trained, {"curve": curve})
    train(*trained, [3])
    curve.append(2.0)
    assert not saved_steps(tmp_path)
    changed.set()
    states.finish()
    model = make_model(1, layers=1)
    optimizer = make_adamw(model)
    assert Snapshots(tmp_path).restore(model, optimizer) == (3, {"curve": [1.0]})
    assert_equal(whole_state(model, optimizer), before)


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def change_number(path: Path) -> None:
    """Still readable, and every file it names is whole."""
    path.write_text(path.read_text().replace('"world_size": 1', '"world_size": 2'))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("damage", "name", "message"),
    [
        (truncate, "__0_0.distcp", "is truncated"),
        (flip_byte, "__0_0.distcp", "is damaged"),
        (Path.unlink, "__0_0.distcp", "is missing"),
        (flip_byte, ".metadata", "is damaged"),
        (truncate, ".metadata", "is truncated"),
        (flip_byte, "manifest.json", "is damaged"),
        (truncate, "manifest.json", "is damaged"),
        (change_number, "manifest.json", "is damaged"),
        (lambda path: path.write_text("[]"), "manifest.json", "is damaged"),
        (Path.unlink, "manifest.json", "is missing"),
    ],
)
def test_damaged_state_is_named_and_the_one_before_used(
    tmp_path: Path, trained: Any, capfd: Any, damage: Callable[[Path], None], name: str, message: str
) -> None:
    save(tmp_path, [3], trained)
    expected = whole_state(*trained)
    train(*trained, [3])
    save(tmp_path, [4], trained)
    damage(tmp_path / "step-000004" / name)

    model = make_model(1, layers=1)
    optimizer = make_adamw(model)
    step, extra = Snapshots(tmp_path).restore(model, optimizer)
    assert (step, extra["step"]) == (3, 3)
    assert_equal(whole_state(model, optimizer), expected)
    (warning,) = capfd.readouterr().err.splitlines()
    assert f"{tmp_path / 'step-000004' / name} {message}" in warning
    assert "not used" in warning

    damage(tmp_path / "step-000003" / name)
    with pytest.raises(CheckpointError, match=r"every saved state is damaged; start again"):
        Snapshots(tmp_path).restore(model, optimizer)


def test_next_state_replaces_newer_damaged_ones(tmp_path: Path, trained: Any) -> None:
    """They would otherwise count as the newest, and push out the whole ones."""
    save(tmp_path, [3, 9], trained)
    (tmp_path / "step-000009" / "manifest.json").unlink()
    assert restored_step(tmp_path) == 3
    save(tmp_path, [4], trained)
    assert saved_steps(tmp_path) == [3, 4]


def test_leftovers_of_a_kill_are_removed(tmp_path: Path, trained: Any) -> None:
    save(tmp_path, [3], trained)
    for name in (".step-000004.tmp", ".step-000002.old"):
        shutil.copytree(tmp_path / "step-000003", tmp_path / name)
    assert restored_step(tmp_path) == 3
    assert {path.name for path in tmp_path.iterdir()} == {"step-000003"}


def test_state_of_another_model_is_refused(tmp_path: Path, trained: Any) -> None:
    save(tmp_path, [3], trained)
    with pytest.raises(CheckpointError, match=r"step-000003: does not fit this model and optimizer: .*layers\.1"):
        restored_step(tmp_path, layers=2)


def assert_saving_fails(directory: Path, trained: Any, capfd: Any, step: int, warning: str) -> None:
    states = Snapshots(directory)
    states.save(step, *trained, EXTRA)
    states.finish()
    printed = capfd.readouterr().err
    assert printed.splitlines() == [
        f"vapi-fast: warning: the state of step {step} could not be saved in {directory}: {warning}"
    ]


def test_full_disk_does_not_end_the_run(tmp_path: Path, trained: Any, capfd: Any) -> None:
    save(tmp_path, [3], trained)
    with full_disk():
        assert_saving_fails(tmp_path, trained, capfd, 4, "File too large; the state of step 3 stays")
    assert {path.name for path in tmp_path.iterdir()} == {"step-000003"}
    assert restored_step(tmp_path) == 3
    save(tmp_path, [5], trained)
    assert restored_step(tmp_path) == 5


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
@pytest.mark.parametrize(
    ("owner", "earlier", "name"),
    [
        (snapshots.AtomicWriter, "prepare_local_plan", "__0_0.distcp"),
        (snapshots.AtomicWriter, "prepare_local_plan", ".metadata.tmp"),
        (snapshots, "fingerprints", "manifest.json"),
    ],
)
def test_no_space_left_in_any_file(
    tmp_path: Path, trained: Any, capfd: Any, monkeypatch: pytest.MonkeyPatch, owner: Any, earlier: str, name: str
) -> None:
    """The kernel's own ENOSPC, for each of the files that are written; `earlier` is called just before that."""
    real = getattr(owner, earlier)

    def link_then_write(*args: Any) -> Any:
        result = real(*args)
        (next(tmp_path.glob(".step-*.tmp")) / name).symlink_to("/dev/full")
        return result

    monkeypatch.setattr(owner, earlier, link_then_write)
    assert_saving_fails(tmp_path, trained, capfd, 4, "No space left on device; there is no earlier one")
    assert not list(tmp_path.iterdir())


def save_as_nobody(directory: Path, printed: Path) -> None:
    """In a child process: root may write anywhere."""
    if os.getuid() == 0:
        os.setuid(65534)
    model = make_model(layers=1)
    optimizer = make_adamw(model)
    train(model, optimizer, [0])
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        save(directory, [1], (model, optimizer))
    printed.write_text(stderr.getvalue())


def test_read_only_directory_does_not_end_the_run() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        locked = Path(folder) / "locked"
        locked.mkdir(mode=0o555)
        run_children(save_as_nobody, [(locked / "snapshots", Path(folder) / "printed")])
        assert "Permission denied; there is no earlier one" in (Path(folder) / "printed").read_text()


@contextlib.contextmanager
def sharded_model(rank: int, world_size: int, store: Path) -> Iterator[nn.Module]:
    """This rank's part of an FSDP2 model of other weights than the saved ones; a plain model for one process."""
    model = make_model(seed=world_size)
    if world_size == 1:
        yield model
        return
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    mesh = init_device_mesh("cpu", (world_size,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    yield fully_shard(model, mesh=mesh)
    dist.destroy_process_group()


def relay(rank: int, world_size: int, leg: int, directory: Path) -> None:
    """One runner: restores what the one before left, takes two steps, saves."""
    with sharded_model(rank, world_size, directory / f"store-{leg}") as model:
        optimizer = make_adamw(model)
        states = Snapshots(directory / "snapshots")
        restored = states.restore(model, optimizer)
        start, extra = restored or (0, {"leg": -1})
        assert extra == {"leg": leg - 1}
        found = whole_state(model, optimizer)
        train(model, optimizer, range(start, start + 2))
        states.save(start + 2, model, optimizer, {"leg": leg})
        left = whole_state(model, optimizer)
        train(model, optimizer, [99])  # while it is written
        states.finish()
        if rank == 0:
            torch.save({"found": found, "left": left}, directory / f"leg-{leg}.pt")


def test_any_number_of_processes_goes_on_from_any_other(tmp_path: Path) -> None:
    """Saved by 2, restored by 1, 4 and 2 again: exactly the same state, and the end that one process alone reaches."""
    sizes = [2, 1, 4, 2]
    for leg, size in enumerate(sizes):
        run_children(relay, [(rank, size, leg, tmp_path) for rank in range(size)])
    legs = [torch.load(tmp_path / f"leg-{leg}.pt") for leg in range(len(sizes))]
    for before, after in itertools.pairwise(legs):
        assert_equal(after["found"], before["left"])

    model = make_model(seed=sizes[0])
    optimizer = make_adamw(model)
    train(model, optimizer, range(2 * len(sizes)))
    alone = whole_state(model, optimizer)
    assert alone["norm.weight.step"] == 2 * len(sizes)
    for name, value in legs[-1]["left"].items():
        torch.testing.assert_close(value, alone[name], rtol=1e-6, atol=1e-7)


def one_full_disk(rank: int, directory: Path) -> None:
    with sharded_model(rank, 2, directory / "store") as model, contextlib.redirect_stderr(io.StringIO()) as stderr:
        optimizer = make_adamw(model)
        train(model, optimizer, [0])
        states = Snapshots(directory / "snapshots")
        states.save(1, model, optimizer, {})
        states.finish()
        with full_disk() if rank == 1 else contextlib.nullcontext():
            states.save(2, model, optimizer, {})
            states.finish()
        assert saved_steps(directory / "snapshots") == [1]
        (directory / f"printed-{rank}").write_text(stderr.getvalue())
        dist.barrier()
        states.save(3, model, optimizer, {})
        states.finish()
        assert saved_steps(directory / "snapshots") == [1, 3]


def test_full_disk_of_one_process_is_reported_once(tmp_path: Path) -> None:
    run_children(one_full_disk, [(rank, tmp_path) for rank in range(2)])
    assert "step 2 could not be saved" in (tmp_path / "printed-0").read_text()
    assert "File too large; the state of step 1 stays" in (tmp_path / "printed-0").read_text()
    assert not (tmp_path / "printed-1").read_text()
    assert {path.name for path in (tmp_path / "snapshots").iterdir()} == {"step-000001", "step-000003"}


class TouchesFile:
    """A pickle that, loaded carelessly, makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


def forge(folder: Path, changes: Callable[[dict[str, Any]], Any] = lambda manifest: None) -> None:
    """Make the manifest fit the folder's files, as whoever prepares a folder would, after some `changes`."""
    manifest = json.loads((folder / "manifest.json").read_text())["state"]
    manifest["files"] = {name: snapshots.fingerprint(folder / name) for name in manifest["files"]}
    manifest = changes(manifest) or manifest
    record = {"crc32": snapshots.checksum_of(manifest), "state": manifest}
    (folder / "manifest.json").write_text(json.dumps(record))


@pytest.mark.parametrize("where", ["metadata", "a value", "another file"])
def test_a_prepared_state_runs_no_code(tmp_path: Path, trained: Any, where: str) -> None:
    save(tmp_path / "states", [3], trained)
    folder, touched = tmp_path / "states" / "step-000003", tmp_path / "touched"
    if where == "metadata":
        (folder / ".metadata").write_bytes(pickle.dumps(TouchesFile(touched)))
    else:
        metadata = pickle.loads((folder / ".metadata").read_bytes())
        info = next(info for index, info in metadata.storage_data.items() if index.fqn.endswith("param_groups.0.lr"))
        if where == "a value":
            payload = io.BytesIO()
            torch.save(TouchesFile(touched), payload)
            data = folder / info.relative_path
            info.offset, info.length = data.stat().st_size, len(payload.getvalue())
            data.write_bytes(data.read_bytes() + payload.getvalue())
        else:
            info.relative_path = "../../elsewhere"
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    forge(folder)
    with pytest.raises(CheckpointError) as refused:
        restored_step(tmp_path / "states")
    assert "\n" not in str(refused.value)
    assert not touched.exists()


@pytest.mark.parametrize(
    "changes",
    [
        lambda manifest: manifest.update(step=4),
        lambda manifest: manifest.update(step="3/../../other"),
        lambda manifest: manifest["files"].update({"../step-000002/x": [1, 2]}),
        lambda manifest: manifest.pop("stepped") and None,
        lambda manifest: manifest.pop("files") and None,
        lambda manifest: [1],
        lambda manifest: manifest["files"].update({"x": None}),
        lambda manifest: manifest["files"].update({"x": []}),
        lambda manifest: manifest["files"].update({"\0": [1, 2]}),
    ],
)
def test_a_manifest_speaks_of_its_own_folder_alone(tmp_path: Path, trained: Any, changes: Any) -> None:
    save(tmp_path, [3], trained)
    forge(tmp_path / "step-000003")
    assert restored_step(tmp_path) == 3
    forge(tmp_path / "step-000003", changes)
    with pytest.raises(CheckpointError, match="every saved state is damaged"):
        restored_step(tmp_path)


def test_what_is_no_state_is_none(tmp_path: Path, trained: Any) -> None:
    save(tmp_path, [3], trained)
    (tmp_path / "step-foo").mkdir()
    (tmp_path / "step-000007").write_text("a file")
    (tmp_path / ("step-" + "9" * 30)).mkdir()
    (tmp_path / "step-0000003").mkdir()  # another spelling
    (tmp_path / ".step-mine").mkdir()
    (tmp_path / ".step-000003.tmp").mkdir()
    assert saved_steps(tmp_path) == [3]
    assert restored_step(tmp_path) == 3
    assert (tmp_path / ".step-mine").exists()
    assert not (tmp_path / ".step-000003.tmp").exists()


@pytest.mark.parametrize("name", ["manifest.json", ".metadata", "__0_0.distcp"])
def test_a_state_is_made_of_regular_files(name: str, tmp_path: Path, trained: Any) -> None:
    save(tmp_path, [3], trained)
    (tmp_path / "step-000003" / name).unlink()
    os.mkfifo(tmp_path / "step-000003" / name)
    with pytest.raises(CheckpointError, match="every saved state is damaged"):
        restored_step(tmp_path)
