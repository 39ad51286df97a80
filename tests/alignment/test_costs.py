"""The work that a step needs: against the published figures, and against what PyTorch counts in the models."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vapi_fast.alignment.costs import (
    Cost,
    config_costs,
    decoder_cost,
    encoder_cost,
    feature_cost,
    head_costs,
    largest_decoder_map,
    model_flop_utilisation,
    network_cost,
    parameters,
    stage_table,
    transformer_costs,
)
from vapi_fast.models import LLAMAGEN_CONFIGS, VQ_CONFIGS, LlamaGen, LlamaGenConfig
from vapi_fast.models.lpips import LPIPS_CONFIGS
from vapi_fast.runtime.ceilings import Ceilings, measure

XXL = {
    "model": "xxl",
    "tokenizer": "vq-16",
    "lpips": "vgg16",
    "image_size": 384,
    "batch_size": 128,
    "group_size": 8,
    "micro_batch": 16,
    "prior": "ce",
    "method": "vapi",
}
SMALL = LlamaGenConfig(layers=3, heads=4, width=64, vocab_size=1000, grid_size=8, num_classes=9)
H100 = Ceilings(copy=3.0e12, matmul=798e12)


def teraflops(**changes: object) -> dict[str, float]:
    return {stage: cost.flops / 1e12 for stage, cost in config_costs(XXL | changes).items()}


def test_flops_are_those_of_the_paper() -> None:
    """PAPER's figures leave attention's own products out: 6 T forward, 13 T backward."""
    needed = teraflops()
    assert needed["encode"] == pytest.approx(40, rel=0.01)
    assert needed["lpips"] == pytest.approx(104, rel=0.01)
    attention = 2 * 128 * 48 * 576**2 * 1536 / 1e12
    assert attention == pytest.approx(6.3, abs=0.1)
    assert needed["forward"] + needed["sample"] - attention == pytest.approx(204, rel=0.01)
    training = needed["forward"] + needed["sample"] + needed["loss"] + needed["backward"]
    assert training - 3 * attention == pytest.approx(613, rel=0.01)
    assert training == pytest.approx(613, rel=0.04)
    assert needed["optimizer"] == 0
    released = teraflops(rollout_mode="eval", dropout=0.1, label_dropout=0.1)
    added = {stage: released[stage] - needed[stage] for stage in needed if released[stage] != needed[stage]}
    assert added == pytest.approx({"forward": needed["forward"], "loss": needed["sample"]})
    assert sum(added.values()) - attention == pytest.approx(204, rel=0.01)
    assert teraflops(rollout_mode="train", dropout=0.1, label_dropout=0.1) == needed
    assert teraflops(rollout_mode="eval", dropout=0.0, label_dropout=0.0) == needed


def test_a_decoding_spares_five_of_nine_taps_after_upsampling() -> None:
    """570 GFLOP an image become 510: 584 T for the 1024 rollouts become 522 T."""
    vq16 = VQ_CONFIGS["vq-16"]
    upsamplings = [(48, 512), (96, 256), (192, 256), (384, 128)]
    spared = sum(2 * side**2 * width**2 * 5 for side, width in upsamplings)
    assert decoder_cost(vq16, 384).flops + spared == pytest.approx(570e9, rel=0.002)
    assert decoder_cost(vq16, 384).flops == pytest.approx(510e9, rel=0.002)
    assert teraflops()["decode"] == pytest.approx(522, rel=0.002)
    assert encoder_cost(vq16, 256).flops == pytest.approx(138e9, rel=0.01)
    assert feature_cost(LPIPS_CONFIGS["vgg16"], 256).flops == pytest.approx(40e9, rel=0.01)
    assert largest_decoder_map(vq16, 384) == 128 * 384**2


def test_group_size_and_method_decide_what_is_decoded() -> None:
    group, single, base = teraflops(), teraflops(group_size=1), teraflops(prior="kl")
    assert group["decode"] == pytest.approx(8 * single["decode"])
    assert group["lpips"] == pytest.approx(9 / 2 * single["lpips"])
    assert group["forward"] == single["forward"]
    assert base["loss"] - group["loss"] == pytest.approx(group["forward"] + group["sample"])
    assert set(teraflops(method="ntp")) == {"forward", "loss", "backward", "optimizer"}
    through = teraflops(method="ste")
    extra = through["backward"] - group["backward"] - group["loss"]
    assert extra == pytest.approx(through["decode"] + through["lpips"] / 2)


def counted(model: LlamaGen, images: int) -> tuple[int, int, int, int]:
    """FLOPs of forward, head, their backwards, and of attention's forward alone, all scores counted."""
    config = model.config
    inplace = {torch.ops.aten.addmm_: lambda total, a, b, **_: 2 * a[0] * a[1] * b[1]}  # PyTorch leaves it out
    tokens = torch.zeros(images, config.grid_size**2 - 1, dtype=torch.long)
    with FlopCounterMode(display=False, custom_mapping=inplace) as counter, sdpa_kernel(SDPBackend.MATH):
        hidden = model(tokens, torch.zeros(images, dtype=torch.long), return_hidden=True)
        forward = counter.get_total_flops()
        logits = model.output(hidden)
        head = counter.get_total_flops() - forward
        logits.sum().backward()
        backward = counter.get_total_flops() - forward - head
        products = counter.get_flop_counts()["Global"]
    return forward, head, backward, products[torch.ops.aten.bmm]


def test_transformer_flops_are_those_that_pytorch_counts() -> None:
    images, length = 2, 64
    forward, head, backward, attention = counted(LlamaGen(SMALL), images)
    expected_forward, expected_backward = transformer_costs(SMALL, images, passes=1)
    logits, gradients = head_costs(SMALL, images * length, passes=1)
    assert head == logits.flops
    hidden_scores = 2 * images * 3 * length**2 * 64  # PyTorch counts the masked half as well
    assert attention == 3 * 2 * hidden_scores
    assert forward == expected_forward.flops + hidden_scores
    assert backward == expected_backward.flops + 2 * hidden_scores + gradients.flops


def test_parameters_are_counted() -> None:
    assert parameters(SMALL) == sum(each.numel() for each in LlamaGen(SMALL).parameters())
    xxl = parameters(LLAMAGEN_CONFIGS["xxl"])
    assert xxl - (16384 + 1001) * 1536 - 97 * 1536 == pytest.approx(1.384e9, rel=1e-3)  # PAPER: matmul parameters


class Small(nn.Module):
    """A map [1, 2, 8, 8] normed, upsampled, convolved, added to itself, and pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, 2, device="meta")
        self.conv = nn.Conv2d(2, 4, 3, padding=1, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(nn.functional.interpolate(self.norm(x), scale_factor=2.0, mode="nearest"))
        return nn.functional.max_pool2d(nn.functional.relu(h + h), 2)


def test_map_traffic_is_counted_by_hand() -> None:
    cost, traffic = network_cost(Small(), channels=2, side=8)
    small, large, pooled = 2 * 8 * 8, 4 * 16 * 16, 4 * 8 * 8
    assert cost.bytes == 2 * (2 * small + small + large + large + large + pooled)
    assert traffic.largest_map == large
    assert cost.flops == 2 * (16 * 16) * 4 * 2 * 4  # pixels × channels out × channels in × taps


def test_the_optimizer_moves_eight_floats_a_weight() -> None:
    assert config_costs(XXL)["optimizer"].bytes == pytest.approx(32 * 1.411e9, rel=1e-3)


def test_smaller_micro_batches_read_the_weights_more_often() -> None:
    def moved(stage: str, micro_batch: int) -> float:
        return config_costs(XXL | {"micro_batch": micro_batch})[stage].bytes

    blocks = 48 * (4 * 1536**2 + 3 * 1536 * 4096)
    assert moved("forward", 4) - moved("forward", 16) == pytest.approx(24 * 2 * blocks)
    assert moved("backward", 4) - moved("backward", 16) == pytest.approx(24 * (2 + 8) * blocks)


def test_floor_is_that_of_the_slower_of_computing_and_moving() -> None:
    ceilings = Ceilings(copy=10.0, matmul=100.0)
    assert (Cost(200, 10).floor(ceilings), Cost(200, 10).bound(ceilings)) == (2.0, "matmul")
    assert (Cost(200, 30).floor(ceilings), Cost(200, 30).bound(ceilings)) == (3.0, "copy")


def test_stage_table_holds_measured_seconds_against_the_ceilings() -> None:
    costs = config_costs(XXL)
    table = stage_table(XXL, {"data": 0.1, "decode": 1.3, "optimizer": 0.03, "loss": 0.0}, H100)
    assert table["data"] == {"seconds": 0.1}
    assert table["loss"] == {"seconds": 0.0}
    assert table["decode"]["tflops"] == pytest.approx(522 / 1.3, rel=0.01)
    assert table["decode"]["bound"] == "matmul"
    assert table["decode"]["share"] == pytest.approx(522 / 1.3 / 798, rel=0.01)
    assert table["optimizer"]["bound"] == "copy"
    assert table["optimizer"]["share"] == pytest.approx(costs["optimizer"].bytes / 3e12 / 0.03)
    eighth = stage_table(XXL, {"decode": 1.3}, H100, processes=8)
    assert eighth["decode"]["floor"] == pytest.approx(table["decode"]["floor"] / 8)


def test_model_flop_utilisation_counts_the_transformer_alone() -> None:
    costs = config_costs(XXL)
    assert model_flop_utilisation(costs, 2.95, H100) == pytest.approx(631 / 2.95 / 798, rel=0.01)


def test_ceilings_are_measured_in_a_moment() -> None:
    found = measure(torch.device("cpu"))
    assert 1e8 < found.copy < 1e12
    assert 1e8 < found.matmul < 1e14


@pytest.mark.gpu
def test_ceilings_of_a_gpu() -> None:
    found = measure(torch.device("cuda"))
    assert 5e11 < found.copy < 1e13
    assert 5e13 < found.matmul < 5e15
