"""Several processes (gloo, FSDP2) against one: the same tokens, the same weights, and the end of a rank that dies."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import PATIENCE, become, on_ranks
from torch import Tensor

from vapi_fast.runtime.checkpoint import load_state_dict
from vapi_fast.tiny import FILES

E2E = Path(__file__).parents[2] / "benchmarks" / "e2e_align.py"
# A seed with which no draw lies where rounding decides it: one that does changes a reward, and so all that follows.
SMALL = {"batch_size": 8, "micro_batch": 1, "group_size": 4, "steps": 3, "evaluate": False, "seed": 1}


def train(rank: int, world_size: int, port: int, output: Path, recipe: str) -> None:
    """One rank of a run; leaves its tokens and rollouts of every step beside the run's results."""
    import vapi_fast
    from vapi_fast.alignment import loop

    become(rank, world_size, port)
    drawn = []
    compute = loop.accumulate_gradients

    def noted(*arguments: object) -> object:
        gradients = compute(*arguments)
        drawn.append((arguments[2].sample_ids, gradients.tokens, gradients.rollouts))
        return gradients

    loop.accumulate_gradients = noted
    vapi_fast.align(vapi_fast.AlignConfig(model="tiny", output_dir=output, recipe=recipe, **SMALL))
    torch.save(
        [torch.cat([part.flatten(1) if part.ndim > 1 else part[:, None] for part in parts], 1) for parts in drawn],
        output / f"drawn-{rank}.pt",
    )


def run_on(world_size: int, output: Path, recipe: str) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Tokens and rollouts of every step in the order of the sample ids, and the final weights."""
    on_ranks(train, world_size, output, recipe)
    shares = [torch.load(output / f"drawn-{rank}.pt", weights_only=True) for rank in range(world_size)]
    drawn = [torch.cat(parts) for parts in zip(*shares, strict=True)]
    return [rows[rows[:, 0].argsort()] for rows in drawn], load_state_dict(output / "aligned.pt")


@pytest.mark.usefixtures("image_sets")
@pytest.mark.parametrize(("recipe", "sizes"), [("lean", (2, 4)), ("va-pi", (2,))])
def test_sharded_runs_draw_the_same_tokens_and_end_with_the_same_weights(
    tmp_path: Path, recipe: str, sizes: tuple[int, ...]
) -> None:
    """One test a recipe, as it takes one undivided run: two workers of pytest would both make it."""
    one_drawn, one_weights = run_on(1, tmp_path / "1", recipe)
    for world_size in sizes:
        drawn, weights = run_on(world_size, tmp_path / str(world_size), recipe)
        assert_same_tokens(one_drawn, drawn)
        assert_same_weights(one_weights, weights)


def assert_same_tokens(one: list[Tensor], several: list[Tensor]) -> None:
    assert len(one) == len(several) == SMALL["steps"]
    for mine, theirs in zip(one, several, strict=True):
        assert mine.shape == (8, 1 + 64 + 4 * 64)
        # Later steps start from weights that differ by float rounding, which can carry a draw over its boundary.
        assert torch.equal(mine, theirs) if mine is one[0] else (mine == theirs).double().mean() > 0.999


def assert_same_weights(one: dict[str, Tensor], several: dict[str, Tensor]) -> None:
    start = load_state_dict(FILES.generator)
    assert one.keys() == several.keys() == start.keys()
    flat_start, flat_one, flat_several = (
        torch.cat([state[name].double().flatten() for name in start]) for state in (start, one, several)
    )
    assert (flat_one - flat_several).norm() < 1e-5 * flat_one.norm()
    assert (flat_one - flat_several).norm() < 1e-3 * (flat_one - flat_start).norm()


def show(rank: int, world_size: int, port: int, output: Path) -> None:
    """Leaves what a rank's pictures show of the held-out images: classes, originals, reconstructions."""
    from vapi_fast import AlignConfig
    from vapi_fast.alignment.measurement import Evaluator
    from vapi_fast.alignment.models import load_models
    from vapi_fast.runtime.distributed import process_group

    become(rank, world_size, port)
    config = AlignConfig(model="tiny", output_dir=output / "run", micro_batch=8, eval_samples=90)
    with process_group() as device:
        test = Evaluator(config, load_models(config, device), device)
        sheets = dict(test.originals())
    torch.save([test.labels[test.shown], sheets["original"], sheets["reconstruction"]], output / f"{rank}.pt")


@pytest.mark.usefixtures("image_sets")
def test_originals_are_of_the_classes_of_the_samples(tmp_path: Path) -> None:
    """On two ranks, where each holds half of them, as on one."""
    from vapi_fast.tiny import build

    found = []
    for world_size in (1, 2):
        (output := tmp_path / str(world_size)).mkdir()
        on_ranks(show, world_size, output)
        found += [torch.load(output / f"{rank}.pt", weights_only=True) for rank in range(world_size)]
    classes, originals, reconstructions = found[0]
    for other in found[1:]:
        assert torch.equal(other[0], classes)
        assert torch.equal(other[1], originals)
        torch.testing.assert_close(other[2], reconstructions)
    images, labels = build.load_images(FILES.heldout_images)
    rows = [(images - original).abs().amax((1, 2, 3)).argmin() for original in originals]
    assert len({int(row) for row in rows}) == len(classes) > 50
    torch.testing.assert_close(originals, images[rows])
    assert torch.equal(labels[rows], classes)
    assert 0 < (reconstructions - originals).square().mean() < 0.1


@pytest.mark.usefixtures("image_sets")
def test_a_rank_that_dies_ends_the_others_with_its_error(tmp_path: Path) -> None:
    """torchrun ends the other rank long before its collective gives up, and prints the error of the one that died."""
    (tmp_path / "breaks.py").write_text(
        f"import os, runpy, sys\n"
        f"sys.path.insert(0, {str(E2E.parent)!r})\n"
        "from vapi_fast.alignment import loop\n"
        "step = loop.align_step\n"
        "def broken(*arguments, **options):\n"
        "    if os.environ['RANK'] == '1' and arguments[2] == 1:\n"
        "        raise RuntimeError('the disk of rank 1 is on fire')\n"
        "    return step(*arguments, **options)\n"
        "loop.align_step = broken\n"
        f"sys.argv[0] = {str(E2E)!r}\n"
        f"runpy.run_path({str(E2E)!r}, run_name='__main__')\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(tmp_path / "breaks.py"), "--model", "tiny", "--no-eval", "--batch-size", "4"]
    finished = subprocess.run(
        [*command, "--output-dir", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=PATIENCE,  # half of a collective's
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert finished.returncode != 0
    assert "the disk of rank 1 is on fire" in finished.stderr
