"""The work that a step needs: against the published figures, and against what PyTorch counts in the models."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vapi_fast.alignment.costs import (
    config_costs,
    head_costs,
    model_flop_utilisation,
    parameters,
    stage_table,
    transformer_costs,
)
from vapi_fast.alignment.kernel_costs import (
    Cost,
    Kernel,
    decoder_cost,
    encoder_cost,
    feature_cost,
    largest_decoder_map,
    network_cost,
    product,
)
from vapi_fast.models import LLAMAGEN_CONFIGS, VQ_CONFIGS, LlamaGen, LlamaGenConfig
from vapi_fast.models.lpips import LPIPS_CONFIGS
from vapi_fast.runtime import forms
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
    """PAPER's figures leave attention's own products out, 6 T forward and 16 T backward, and have the logits once."""
    needed = teraflops()
    assert needed["encode"] == pytest.approx(40, rel=0.01)
    assert needed["lpips"] == pytest.approx(104, rel=0.01)
    attention = 2 * 128 * 48 * 576**2 * 1536 / 1e12
    assert attention == pytest.approx(6.3, abs=0.1)
    assert needed["forward"] + needed["sample"] - attention == pytest.approx(204, rel=0.01)
    training = needed["forward"] + needed["sample"] + needed["loss"] + needed["backward"]
    assert training - 3.5 * attention - needed["sample"] == pytest.approx(613, rel=0.01)
    assert needed["optimizer"] == 0
    released = teraflops(rollout_mode="eval", dropout=0.1, label_dropout=0.1)
    added = {stage: released[stage] - needed[stage] for stage in needed if released[stage] != needed[stage]}
    assert added == pytest.approx({"forward": needed["forward"]})
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
    gathered, whole = (config_costs(XXL, processes=8, sharded=sharded)["optimizer"].bytes for sharded in (True, False))
    assert gathered == pytest.approx(whole / 8)


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
    attended = (
        2 * hidden_scores - hidden_scores / 2
    )  # all scores' four products; half of them, with the scores again: five
    assert backward == expected_backward.flops + attended + gradients.flops


def test_parameters_are_counted() -> None:
    assert parameters(SMALL) == sum(each.numel() for each in LlamaGen(SMALL).parameters())
    xxl = parameters(LLAMAGEN_CONFIGS["xxl"])
    assert xxl - (16384 + 1001) * 1536 - 97 * 1536 == pytest.approx(1.384e9, rel=1e-3)  # PAPER: matmul parameters


class Small(nn.Module):
    """A map [1, 2, 8, 8] normed, upsampled, convolved, added to itself, normed, convolved and normed, and pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner, self.last = (nn.GroupNorm(1, width, device="meta") for width in (2, 4, 4))
        self.conv = nn.Conv2d(2, 4, 3, padding=1, device="meta")
        self.one = nn.Conv2d(4, 4, 1, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(nn.functional.interpolate(self.norm(x), scale_factor=2.0, mode="nearest"))
        h = self.last(self.one(nn.functional.silu(self.inner(h + h))))
        return nn.functional.max_pool2d(nn.functional.relu(h), 2)


def test_a_networks_kernels_are_counted_by_hand() -> None:
    cost, noted = network_cost(Small(), channels=2, side=8)
    small, large, pooled = 2 * 8 * 8, 4 * 16 * 16, 4 * 8 * 8
    flops = 2 * (16 * 16) * 4 * 2 * 4  # pixels × channels out × channels in × taps
    assert cost.kernels == (
        Kernel("norm", 0, 2 * 4 * small, 3),
        Kernel("convolution", flops, 2 * (small + large + 4 * 2 * 9), shape=(2, 16, 8, 2)),
        Kernel("norm", 0, 2 * 5 * large, 3),  # h read, and h; their sum written and read, its norm written
        Kernel("product", 2 * 256 * 4 * 4, 2 * (2 * large + 16), shape=(256, 4)),
        Kernel("norm", 0, 2 * 3 * large, 3),  # inside of a block
        Kernel("elementwise", 0, 2 * (large + pooled)),
    )
    assert noted.largest_map == large
    assert noted.elements == 2 * small + small + large + large + 4 * large + 2 * large + large + pooled
    single, _ = network_cost(Small(), channels=2, side=8, itemsize=4)
    assert single.bytes == 2 * cost.bytes
    assert all(kernel.single for kernel in single.kernels)


def test_a_decoding_moves_what_its_kernels_say() -> None:
    """`kernels/group_norm` has 1.49 GB of norms for an image of 384²; attention keeps its scores on the chip."""
    kernels = decoder_cost(VQ_CONFIGS["vq-16"], 384).kernels
    assert sum(each.bytes for each in kernels if each.kind == "norm") == pytest.approx(1.49e9, rel=1e-2)
    attended = [each for each in kernels if each.kind == "wide attention"]
    assert sum(each.runs for each in attended) == 4
    assert sum(each.bytes for each in attended) == 4 * 4 * 2 * 576 * 512
    assert sum(each.runs for each in config_costs(XXL)["decode"].kernels) == 16 * sum(each.runs for each in kernels)


def expected(cost: Cost, kind: str) -> float:
    """Bytes of a kind of kernels."""
    return sum(each.bytes for each in cost.kernels if each.kind == kind)


def test_a_convolution_that_adds_and_sums_spares_passes() -> None:
    """`kernels/convolution`: an image moves 0.49 GB less, of 1.53 that norms and sums move."""
    vq16 = VQ_CONFIGS["vq-16"]
    usual = decoder_cost(vq16, 384)
    with forms.taking(convolution="triton"):
        fused = decoder_cost(vq16, 384)
    assert expected(usual, "norm") == pytest.approx(1.49e9, rel=1e-2)
    spared = sum(each.bytes for each in usual.kernels) - sum(each.bytes for each in fused.kernels)
    assert spared == pytest.approx(0.49e9, rel=1e-2)
    assert fused.flops == usual.flops
    with forms.taking(**{"convolution 128→128 384²": "triton"}):
        part = decoder_cost(vq16, 384)
    assert usual.bytes > part.bytes > fused.bytes
    # Six of them: in the middle of a block the norm reads once less; at two of three ends bias, residual and sum are
    # the convolution's; the last end likewise.
    assert usual.bytes - part.bytes == pytest.approx(3 * (1 + 2) * 2 * 128 * 384**2)


def test_an_encoder_in_float16_is_so_above_its_lowest_resolution() -> None:
    vq16 = VQ_CONFIGS["vq-16"]
    usual = encoder_cost(vq16, 384)
    with forms.taking(encoder="float16"):
        half = encoder_cost(vq16, 384)
    assert half.flops == usual.flops
    assert 128 * usual.bytes == pytest.approx(410e9, rel=0.01)
    assert 128 * half.bytes == pytest.approx(219e9, rel=0.01)
    share = sum(each.flops for each in half.kernels if each.kind == "convolution" and not each.single)
    assert share / sum(each.flops for each in usual.kernels if each.kind == "convolution") == pytest.approx(
        0.91, abs=0.02
    )


def test_attention_as_two_products_writes_its_scores() -> None:
    vq16, scores = VQ_CONFIGS["vq-16"], 576**2
    usual = decoder_cost(vq16, 384)
    with forms.taking(wide_attention="matmul"):
        apart = decoder_cost(vq16, 384)
    assert not expected(apart, "wide attention")
    assert apart.flops == usual.flops
    # fp32 written, read and written by the softmax, read and cast; the weights read.
    assert apart.bytes - usual.bytes == pytest.approx(4 * scores * (4 + 8 + 6 + 2))


def test_attention_keeps_its_scores_where_they_are_fewer_than_its_channels() -> None:
    attended = [each for each in decoder_cost(VQ_CONFIGS["vq-16"], 256).kernels if each.kind == "wide attention"]
    assert sum(each.bytes for each in attended) == 4 * 4 * 2 * 256 * 512


def test_a_last_convolution_of_eight_channels_computes_what_nobody_reads() -> None:
    vq16 = VQ_CONFIGS["vq-16"]
    with forms.taking(last_convolution="eight"):
        eight = decoder_cost(vq16, 384).kernels[-1]
    three = decoder_cost(vq16, 384).kernels[-1]
    assert (three.shape, eight.shape) == ((128, 3, 384, 3), (128, 8, 384, 3))
    assert eight.flops == three.flops * 8 / 3
    assert eight.bytes - three.bytes == 2 * 5 * 384**2


def test_rewards_in_float32_move_twice_the_bytes() -> None:
    usual, half, single = (config_costs(XXL | {"reward_dtype": each}) for each in (None, "float16", "float32"))
    assert usual == half == config_costs(XXL)
    for stage, cost in usual.items():
        twice = stage in ("decode", "lpips")
        assert single[stage].bytes == pytest.approx((1 + twice) * cost.bytes)
        assert single[stage].flops == cost.flops
    assert all(each.single for each in single["decode"].kernels)


def test_rewards_in_fp8_write_norms_in_bytes_whose_statistics_ride_on_convolutions() -> None:
    """Of the decoder's full resolution; `kernels/convolution` has what that moves."""
    half, eight = (config_costs(XXL | {"reward_dtype": each}) for each in ("float16", "fp8"))
    assert {stage for stage in half if half[stage] != eight[stage]} == {"decode"}
    assert eight["decode"].flops == half["decode"].flops
    fp8 = [each for each in eight["decode"].kernels if each.kind == "convolution in fp8"]
    largest = 1024 * 128 * 384**2  # numbers
    assert [each.shape for each in fp8] == [(128, 128, 384, 3)] * 6
    # Read in bytes, written in 16 bits; of each block's second one the residual read.
    assert [each.bytes / largest for each in fp8] == pytest.approx([3, 5] * 3, rel=0.01)
    assert sum(each.flops for each in fp8) == 6 * 18 * 128 * largest
    norms = [each.bytes / largest for each in eight["decode"].kernels if each.kind == "norm"]
    # The first of these is that of an upsampling, the last that of the convolution to the image.
    assert norms[-7:] == pytest.approx([7, 3, 3, 3, 3, 3, 4])
    assert [each.bytes / largest for each in half["decode"].kernels if each.kind == "norm"][-7:] == pytest.approx(
        [8, 6, 10, 6, 10, 6, 10]
    )
    assert half["decode"].runs - eight["decode"].runs == 16 * 6  # statistics
    (one, *_) = fp8
    assert one.floor(H100) == max(one.flops / (2 * H100.matmul), one.bytes / H100.copy)


def test_a_pooled_level_is_read_once_for_its_distance_and_its_pooling() -> None:
    """`kernels/perceptual` has 40.8 GB less a step; not where gradients are wanted, nor of AlexNet, which pools 3×3."""
    vgg16, alex = (LPIPS_CONFIGS[name] for name in ("vgg16", "alex"))
    pooled = 2 * sum(width * (384 // 2**level) ** 2 for level, width in enumerate((64, 128, 256, 512)))
    together, apart = feature_cost(vgg16, 384), feature_cost(vgg16, 384, plain=True)
    assert apart.bytes - together.bytes == pooled
    assert apart.runs - together.runs == 4
    assert 9 * 128 * pooled == pytest.approx(40.8e9, rel=1e-3)
    assert feature_cost(alex, 384) == feature_cost(alex, 384, plain=True)
    assert config_costs(XXL | {"method": "ste"})["lpips"].bytes == 2 * 128 * apart.bytes
    assert config_costs(XXL | {"credit_window": 3})["lpips"].bytes == 9 * 128 * apart.bytes


def test_dropout_reads_and_writes_both_branches_of_a_block() -> None:
    plain, dropped = config_costs(XXL), config_costs(XXL | {"dropout": 0.1})
    states = 2 * 128 * 576 * 1536
    added = {stage: dropped[stage].bytes - plain[stage].bytes for stage in plain}
    assert {stage for stage, moved in added.items() if moved} == {"forward", "backward"}
    assert added["forward"] == added["backward"] == pytest.approx(48 * 4 * states)


def test_the_optimizer_moves_eight_floats_a_weight() -> None:
    assert config_costs(XXL)["optimizer"].bytes == pytest.approx(32 * 1.411e9, rel=1e-3)


def test_a_heads_weights_are_cast_once_a_step() -> None:
    """Unless they are sharded. Of each of eight micro-batches' gradients bf16 and sum are read, the sum written."""
    weights, length = 16384 * 1536, 576
    costs, head = config_costs(XXL), head_costs(LLAMAGEN_CONFIGS["xxl"], 128 * length, 8)
    assert {each.kind for each in head[0].kernels} == {"product"}
    cast = [each for each in costs["forward"].kernels if each.kind == "cast"]
    assert sum(each.bytes for each in cast) == pytest.approx(6 * (48 * (4 * 1536**2 + 3 * 1536 * 4096) + weights))
    before = sum(part.bytes for part in head_costs(LLAMAGEN_CONFIGS["xxl"], 128 * length, 8, shards=2))
    # Twice eight casts of half of it; eight times bf16 and fp32 more where autograd adds what it was given in fp32.
    found = sum(part.bytes for part in head)
    assert before - found == pytest.approx(8 * 3 * weights + (8 * 6 + 7 * 12 - 6 - 7 * 10) * weights)


def test_smaller_micro_batches_read_the_weights_more_often() -> None:
    def moved(stage: str, micro_batch: int) -> float:
        return config_costs(XXL | {"micro_batch": micro_batch})[stage].bytes

    assert moved("optimizer", 4) == moved("optimizer", 16)
    blocks = 48 * (4 * 1536**2 + 3 * 1536 * 4096)
    shares = 4 * 264 * 97 * 1536
    # Read forward and for the input's gradient; their own read and written by what adds to it, as norms' shares are.
    assert moved("forward", 4) - moved("forward", 16) == pytest.approx(24 * 2 * blocks)
    assert moved("backward", 4) - moved("backward", 16) == pytest.approx(24 * ((2 + 8) * blocks + 2 * shares))


def test_gradients_of_norms_are_summed_up_once_a_step() -> None:
    """Sharded ones in each of eight micro-batches, and added in seven: of 97 norms; a block's matrices so too."""

    def launches(shards: int) -> float:
        return sum(part.runs for part in transformer_costs(LLAMAGEN_CONFIGS["xxl"], 128, passes=8, shards=shards))

    assert launches(1) == 8 * 48 * 25 + 2
    assert launches(2) - launches(1) == 15 * (97 + 48) - 2


def test_a_kernel_computes_while_it_moves_and_the_next_one_waits() -> None:
    ceilings = Ceilings(copy=10.0, matmul=100.0)
    computing, moving = Kernel("product", 200, 10), Kernel("norm", 200, 30)
    assert (computing.floor(ceilings), moving.floor(ceilings)) == (2.0, 3.0)
    both = Cost((computing, moving))
    assert (both.floor(ceilings), both.bound(ceilings)) == (5.0, "copy")
    assert (both.times(2).floor(ceilings), both.times(2).runs, both.times(2, 1).runs) == (10.0, 4, 2)
    assert Cost((computing,)).bound(ceilings) == "matmul"
    assert Kernel("product", 200, single=True).floor(ceilings) == 4.0
    assert Kernel("product", 200, single=True).floor(Ceilings(10.0, 100.0, single_share=1.0)) == 2.0


def test_a_products_rows_grow_with_the_images_of_a_launch() -> None:
    image = Cost((Kernel("product", 2 * 6 * 5 * 7, shape=(6, 7)),))
    assert image.times(32, 4).kernels[0] == Kernel("product", 32 * 420, 0, 4, shape=(48, 7))
    assert product(6, 5, 7, 3).kernels[0] == Kernel("product", 3 * 420, 3 * 2 * (30 + 35 + 42), 3, shape=(6, 7))


def test_stage_table_holds_measured_seconds_against_the_ceilings() -> None:
    costs = config_costs(XXL)
    table = stage_table(XXL, {"data": 0.1, "decode": 1.3, "optimizer": 0.03, "loss": 0.0}, H100)
    assert table["data"] == {"seconds": 0.1}
    assert table["loss"] == {"seconds": 0.0}
    assert table["decode"]["tflops"] == pytest.approx(522 / 1.3, rel=0.01)
    assert table["decode"]["bound"] == "matmul"
    assert table["decode"]["share"] == pytest.approx(1.21 / 1.3, rel=0.01)
    assert table["optimizer"]["bound"] == "copy"
    assert table["optimizer"]["share"] == pytest.approx(costs["optimizer"].bytes / 3e12 / 0.03)
    eighth = stage_table(XXL, {"decode": 1.3}, H100, processes=8)
    assert eighth["decode"]["floor"] == pytest.approx(table["decode"]["floor"] / 8)


def test_model_flop_utilisation_counts_the_transformer_alone() -> None:
    costs = config_costs(XXL)
    assert model_flop_utilisation(costs, 2.95, H100) == pytest.approx(638 / 2.95 / 798, rel=0.01)


def test_ceilings_are_measured_in_a_moment() -> None:
    found = measure(torch.device("cpu"))
    assert 1e8 < found.copy < 1e12
    assert 1e8 < found.matmul < 1e14


@pytest.mark.gpu
def test_ceilings_of_a_gpu() -> None:
    found = measure(torch.device("cuda"))
    assert 5e11 < found.copy < 1e13
    assert 5e13 < found.matmul < 5e15
