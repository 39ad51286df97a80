"""Minimal models of the public LlamaGen repository's structure: its attributes, signatures and state-dict keys.

Written for these tests; what they compute is what `FoundationVision/LlamaGen` computes in the parts tested.
"""

from __future__ import annotations

import math
from collections import namedtuple
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vapi_fast.reference.filters import filter_logits


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        scale = x.float().pow(2).mean(-1, keepdim=True).add(self.eps).rsqrt()
        return (x.float() * scale).type_as(x) * self.weight


class FeedForward(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        hidden = -(-int(8 * config.dim / 3) // config.multiple_of) * config.multiple_of
        self.w1 = nn.Linear(config.dim, hidden, bias=False)
        self.w3 = nn.Linear(config.dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, config.dim, bias=False)
        self.ffn_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn_dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))


class KVCache(nn.Module):
    def __init__(self, rows: int, slots: int, heads: int, head_dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("k_cache", torch.zeros(rows, heads, slots, head_dim, dtype=dtype))
        self.register_buffer("v_cache", torch.zeros(rows, heads, slots, head_dim, dtype=dtype))

    def update(self, input_pos: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.k_cache[:, :, input_pos] = k
        self.v_cache[:, :, input_pos] = v
        return self.k_cache, self.v_cache


def rotated(x: Tensor, freqs_cis: Tensor) -> Tensor:
    pairs = x.float().unflatten(-1, (-1, 2))
    cosine, sine = freqs_cis.view(1, x.shape[1], 1, -1, 2).unbind(-1)
    turned = pairs[..., 0] * cosine - pairs[..., 1] * sine, pairs[..., 1] * cosine + pairs[..., 0] * sine
    return torch.stack(turned, -1).flatten(-2).type_as(x)


class Attention(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.dim, self.n_head, self.n_kv_head = config.dim, config.n_head, config.n_kv_head or config.n_head
        self.head_dim = config.dim // config.n_head
        self.wqkv = nn.Linear(config.dim, (self.n_head + 2 * self.n_kv_head) * self.head_dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)
        self.kv_cache = None
        self.attn_dropout_p = config.attn_dropout
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, freqs_cis: Tensor = None, input_pos: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        parts = self.wqkv(x).split([n * self.head_dim for n in (self.n_head, self.n_kv_head, self.n_kv_head)], dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in parts)
        q, k, v = (part.transpose(1, 2) for part in (rotated(q, freqs_cis), rotated(k, freqs_cis), v))
        if self.kv_cache is not None:
            k, v = self.kv_cache.update(input_pos, k, v)
        k, v = (part.repeat_interleave(self.n_head // self.n_kv_head, dim=1) for part in (k, v))
        dropout = self.attn_dropout_p if self.training else 0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, dropout_p=dropout)
        return self.resid_dropout(self.wo(out.transpose(1, 2).flatten(2)))


class TransformerBlock(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim)
        self.ffn_norm = RMSNorm(config.dim)
        self.drop_path = nn.Identity()

    def forward(self, x: Tensor, freqs_cis: Tensor, start_pos: Tensor | None, mask: Tensor | None = None) -> Tensor:
        h = x + self.drop_path(self.attention(self.attention_norm(x), freqs_cis, start_pos, mask))
        return h + self.drop_path(self.feed_forward(self.ffn_norm(h)))


class LabelEmbedder(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.num_classes, self.dropout_prob = config.num_classes, config.dropout
        self.embedding_table = nn.Embedding(config.num_classes + 1, config.dim)

    def forward(self, labels: Tensor, train: bool) -> Tensor:
        if train and self.dropout_prob > 0:
            labels = torch.where(torch.rand(len(labels)) < self.dropout_prob, self.num_classes, labels)
        return self.embedding_table(labels).unsqueeze(1)


class MLP(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.caption_dim, config.dim, bias=False)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class CaptionEmbedder(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.cap_proj = MLP(config)
        self.register_buffer("uncond_embedding", nn.Parameter(torch.randn(config.cls_token_num, config.caption_dim)))
        self.uncond_prob = config.dropout

    def forward(self, caption: Tensor, train: bool) -> Tensor:
        if train and self.uncond_prob > 0:
            dropped = torch.rand(len(caption)) < self.uncond_prob
            caption = torch.where(dropped[:, None, None], self.uncond_embedding, caption)
        return self.cap_proj(caption)


class Transformer(nn.Module):
    def __init__(self, **changes: Any) -> None:
        super().__init__()
        plain = {"dim": 32, "n_layer": 2, "n_head": 2, "n_kv_head": None, "vocab_size": 40, "block_size": 9}
        plain |= {"num_classes": 6, "model_type": "c2i", "cls_token_num": 1, "caption_dim": 12, "multiple_of": 16}
        plain |= {"dropout": 0.1, "attn_dropout": 0.0}
        config = self.config = SimpleNamespace(**(plain | changes))
        self.vocab_size, self.block_size, self.n_layer = config.vocab_size, config.block_size, config.n_layer
        self.num_classes, self.model_type = config.num_classes, config.model_type
        self.cls_token_num = config.cls_token_num
        self.cls_embedding = (LabelEmbedder if config.model_type == "c2i" else CaptionEmbedder)(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.tok_dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(TransformerBlock(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.dim)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.freqs_cis = positions_2d(int(config.block_size**0.5), config.dim // config.n_head, config.cls_token_num)
        self.max_batch_size = self.max_seq_length = -1

    def setup_caches(self, max_batch_size: int, max_seq_length: int, dtype: torch.dtype) -> None:
        self.max_batch_size, self.max_seq_length = max_batch_size, -(-max_seq_length // 8) * 8
        for layer in self.layers:
            attention = layer.attention
            shape = max_batch_size, self.max_seq_length, attention.n_head, attention.head_dim
            attention.kv_cache = KVCache(*shape, dtype)
        causal = torch.ones(self.max_seq_length, self.max_seq_length, dtype=torch.bool).tril()
        self.causal_mask = causal.repeat(max_batch_size, 1, 1)

    def forward(
        self,
        idx: Tensor | None,
        cond_idx: Tensor | None,
        input_pos: Tensor | None = None,
        targets: Tensor | None = None,
        mask: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        parts = []
        if cond_idx is not None:
            parts.append(self.cls_embedding(cond_idx, train=self.training)[:, : self.cls_token_num])
        if idx is not None:
            parts.append(self.tok_embeddings(idx))
        embeddings = torch.cat(parts, dim=1)
        if len(parts) == 1:
            mask = self.causal_mask[: len(embeddings), None, input_pos]
        h = self.tok_dropout(embeddings)
        freqs_cis = self.freqs_cis[: h.shape[1]] if self.training else self.freqs_cis[input_pos]
        for layer in self.layers:
            h = layer(h, freqs_cis, input_pos, mask)
        logits = self.output(self.norm(h)).float()
        if self.training:
            logits = logits[:, self.cls_token_num - 1 :].contiguous()
        loss = None
        if valid is not None:
            each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
            kept = valid[:, None].repeat(1, targets.shape[1]).flatten()
            loss = (each * kept).sum() / max(kept.sum(), 1)
        elif targets is not None:
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss


def positions_2d(side: int, head_dim: int, prefix: int) -> Tensor:
    frequencies = 10000.0 ** -(torch.arange(0, head_dim // 2, 2) / (head_dim // 2))
    angles = torch.outer(torch.arange(side), frequencies)
    rows, columns = angles[:, None].expand(-1, side, -1), angles[None].expand(side, -1, -1)
    grid = torch.cat([rows, columns], dim=-1).flatten(0, 1)
    table = torch.stack([grid.cos(), grid.sin()], dim=-1)
    return torch.cat([torch.zeros(prefix, *table.shape[1:]), table])


@torch.no_grad()
def generate(
    model: Transformer,
    cond: Tensor,
    max_new_tokens: int,
    emb_masks: Tensor | None = None,
    cfg_scale: float = 1.0,
    cfg_interval: int = -1,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    sample_logits: bool = True,
    cfg_type: str = "constant",
    cfg_power: float = 1.0,
) -> Tensor:
    """LlamaGen's loop over a static cache, with the guidance schedule of VA-π's fork."""
    guided, batch = cfg_scale > 1, len(cond)
    prefix = 1 if model.model_type == "c2i" else cond.shape[1]
    if guided:
        captions = model.model_type == "t2i"
        none = model.cls_embedding.uncond_embedding.expand_as(cond) if captions else cond * 0 + model.num_classes
        cond = torch.cat([cond, none])
    model.setup_caches(len(cond), prefix + max_new_tokens, model.tok_embeddings.weight.dtype)
    if emb_masks is not None:
        model.causal_mask[:, :, :prefix] &= emb_masks.bool().repeat(len(cond) // batch, 1)[:, None]
        model.causal_mask |= torch.eye(model.max_seq_length, dtype=torch.bool)

    def draw(logits: Tensor, with_guidance: bool, scale: float) -> Tensor:
        logits = logits[:, -1]
        if guided:
            conditional, unconditional = logits.chunk(2)
            logits = unconditional + (conditional - unconditional) * scale if with_guidance else conditional
        probabilities = filter_logits(logits / max(temperature, 1e-5), top_k, top_p).softmax(-1)
        return torch.multinomial(probabilities, 1) if sample_logits else probabilities.argmax(-1, keepdim=True)

    tokens = [draw(model(None, cond, torch.arange(prefix))[0], True, cfg_scale)]
    position = torch.tensor([prefix], dtype=torch.int)
    for step in range(max_new_tokens - 1):
        last = torch.cat([tokens[-1]] * (2 if guided else 1))
        logits, _ = model(last, cond_idx=None, input_pos=position)
        scale = cfg_scale
        if cfg_type == "power-cosine":
            rise = 0.5 - 0.5 * math.cos(math.pi * (step / (max_new_tokens - 1)) ** cfg_power)
            scale = 1 + (cfg_scale - 1) * rise
        tokens.append(draw(logits, cfg_interval < 0 or step <= cfg_interval, scale))
        position += 1
    return torch.cat(tokens, dim=1).int()


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(4, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, dropout: float) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.use_conv_shortcut = in_channels, out_channels, False
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(swish(self.norm1(x)))
        h = self.conv2(self.dropout(swish(self.norm2(h))))
        return (x if self.in_channels == self.out_channels else self.nin_shortcut(x)) + h


class AttnBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (part(h).flatten(2) for part in (self.q, self.k, self.v))
        weights = torch.bmm(q.transpose(1, 2), k).mul(x.shape[1] ** -0.5).softmax(dim=2)
        return x + self.proj_out(torch.bmm(v, weights.transpose(1, 2)).view(x.shape))


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.with_conv = True
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.with_conv = True
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Coder(nn.Module):
    """What the encoder and the decoder, which has `up`, have in common."""

    def __init__(self, widths: list[int], in_channels: int, out_channels: int, up: bool, dropout: float) -> None:
        super().__init__()
        self.num_resolutions, self.num_res_blocks = len(widths), 2
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        last = len(widths) - 1
        for i, width in enumerate(widths):
            level, before = nn.Module(), widths[max(i - 1, 0)]
            level.res = nn.ModuleList(ResnetBlock(width if j else before, width, dropout) for j in range(2 + up))
            level.attn = nn.ModuleList(AttnBlock(width) for _ in range(2 + up) if i == (0 if up else last))
            if i < last:
                setattr(level, "upsample" if up else "downsample", (Upsample if up else Downsample)(width))
            self.conv_blocks.append(level)
        width = widths[0] if up else widths[-1]
        blocks = [ResnetBlock(width, width, dropout), AttnBlock(width), ResnetBlock(width, width, dropout)]
        self.mid = nn.ModuleList(blocks)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def middle(self, h: Tensor) -> Tensor:
        for block in self.mid:
            h = block(h)
        return h

    def levels(self, h: Tensor, change: str) -> Tensor:
        for level in self.conv_blocks:
            for j, block in enumerate(level.res):
                h = block(h)
                h = level.attn[j](h) if level.attn else h
            h = level._modules[change](h) if change in level._modules else h
        return h

    def last(self, h: Tensor) -> Tensor:
        return self.conv_out(swish(self.norm_out(h)))


class Encoder(Coder):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.levels(self.conv_in(x), "downsample")))


class Decoder(Coder):
    def forward(self, z: Tensor) -> Tensor:
        return self.last(self.levels(self.middle(self.conv_in(z)), "upsample"))


class VectorQuantizer(nn.Module):
    def __init__(self, entries: int, width: int, beta: float, entropy_loss_ratio: float) -> None:
        super().__init__()
        self.n_e, self.e_dim, self.beta, self.entropy_loss_ratio = entries, width, beta, entropy_loss_ratio
        self.l2_norm = self.show_usage = True
        self.embedding = nn.Embedding(entries, width)
        self.register_buffer("codebook_used", nn.Parameter(torch.zeros(65536)))

    def forward(self, z: Tensor) -> tuple[Any, ...]:
        z = F.normalize(z.permute(0, 2, 3, 1).contiguous(), dim=-1)
        codes = F.normalize(self.embedding.weight, dim=-1)
        flat = z.reshape(-1, self.e_dim)
        distances = flat.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * flat @ codes.T
        indices = distances.argmin(1)
        z_q = codes[indices].view(z.shape)
        losses, usage = (None, None, None), 0
        if self.training:
            with torch.no_grad():  # which LlamaGen lacks: there this raises, as long as the buffer is a parameter
                self.codebook_used.copy_(torch.cat([self.codebook_used[len(indices) :], indices.float()]))
            usage = len(self.codebook_used.unique()) / self.n_e
            spread = (-distances / 0.01).softmax(-1)
            entropy = -(spread * (spread + 1e-5).log()).sum(-1).mean()
            vq_loss = (z_q - z.detach()).square().mean()
            commitment = self.beta * (z_q.detach() - z).square().mean()
            losses = vq_loss, commitment, self.entropy_loss_ratio * entropy
        z_q = (z + (z_q - z).detach()).permute(0, 3, 1, 2)
        return z_q, (*losses, usage), (None, None, indices)

    def get_codebook_entry(
        self, indices: Tensor, shape: tuple[int, ...] | None = None, channel_first: bool = True
    ) -> Tensor:
        z_q = F.normalize(self.embedding.weight, dim=-1)[indices]
        if shape is not None and channel_first:
            return z_q.reshape(shape[0], shape[2], shape[3], shape[1]).permute(0, 3, 1, 2).contiguous()
        return z_q if shape is None else z_q.view(shape)


class VQModel(nn.Module):
    def __init__(self, entropy_loss_ratio: float = 0.0, dropout: float = 0.1) -> None:
        super().__init__()
        self.encoder = Encoder([8, 16], 3, 12, up=False, dropout=dropout)
        self.decoder = Decoder([16, 8], 12, 3, up=True, dropout=dropout)
        self.quantize = VectorQuantizer(40, 8, 0.25, entropy_loss_ratio)
        self.quant_conv = nn.Conv2d(12, 8, 1)
        self.post_quant_conv = nn.Conv2d(8, 12, 1)

    def encode(self, x: Tensor) -> tuple[Any, ...]:
        return self.quantize(self.quant_conv(self.encoder(x)))

    def decode(self, quant: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(quant))

    def decode_code(self, code_b: Tensor, shape: Any = None, channel_first: bool = True) -> Tensor:
        return self.decode(self.quantize.get_codebook_entry(code_b, shape, channel_first))

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
        quant, losses, _ = self.encode(x)
        return self.decode(quant), losses


class ScalingLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.shift) / self.scale


class Slices(nn.Module):
    """A VGG of two levels; layers are named by their place in the whole."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        place, channels = 0, 3
        for level, width in enumerate(widths):
            layers = nn.Sequential()
            new = [nn.MaxPool2d(2)] if level else []
            new += [
                nn.Conv2d(channels, width, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1),
                nn.ReLU(),
            ]
            for layer in new:
                layers.add_module(str(place), layer)
                place += 1
            self.add_module(f"slice{level + 1}", layers)
            channels = width

    def forward(self, x: Tensor) -> Any:
        first = self.slice1(x)
        return namedtuple("Outputs", ["relu1", "relu2"])(first, self.slice2(first))


class NetLinLayer(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Dropout(), nn.Conv2d(channels, 1, 1, bias=False))


class LPIPS(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scaling_layer = ScalingLayer()
        self.chns = [6, 10]
        self.net = Slices(self.chns)
        self.lin0, self.lin1 = NetLinLayer(6), NetLinLayer(10)
        for lin in (self.lin0, self.lin1):
            nn.init.uniform_(lin.model[-1].weight)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        total = 0.0
        outs = zip(self.net(self.scaling_layer(input)), self.net(self.scaling_layer(target)), strict=True)
        for lin, (a, b) in zip((self.lin0, self.lin1), outs, strict=True):
            a, b = (x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10) for x in (a, b))
            total = total + lin.model((a - b) ** 2).mean([2, 3], keepdim=True)
        return total


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights for everything, norms and biases too, so that nothing that is left out goes unseen."""
    generator = torch.Generator("cpu").manual_seed(seed)
    for parameter in model.parameters():
        values = torch.empty(parameter.shape, device="cpu")
        if parameter.ndim < 2:
            values.uniform_(0.5, 1.5, generator=generator)
        else:
            values.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
        parameter.data.copy_(values)
    if isinstance(model, LPIPS):
        for lin in (model.lin0, model.lin1):
            lin.model[-1].weight.data.abs_()
    return model
