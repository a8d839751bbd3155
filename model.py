"""GPT-2 and Llama, side by side in one file.

    python model.py config/llama_58m.py      # prints the model and its parameter count

Shapes: B batch, T positions, C width (n_embd), H heads, D = C / H, V vocabulary.
Modules carry the names of Hugging Face's Llama, with its half-split rotary layout, so Llama weights
move in and out without renaming; GPT-2's fused, transposed projections are kept apart here.
"""
import contextlib
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lib.configurator import launch, need


@dataclass
class ModelConfig:
    arch: Literal["llama", "gpt2"] = "llama"
    vocab_size: int = 0           # 0 = the data's; another number must equal it
    n_layer: int = 8
    n_head: int = 8
    n_kv_head: int = 0            # grouped-query attention: key/value heads; 0 = n_head
    n_embd: int = 256
    intermediate_size: int = 1024 # width inside the MLP
    block_size: int = 256         # positions the model has
    dropout: float = 0.0          # embedding, attention and residual
    attn_dropout: float = 0.0     # of attention, where it is more than that
    tie_weights: bool = False     # output head shares the input embedding (GPT-2: True)
    causal: bool = True           # False: a masked language model, which sees both sides
    n_labels: int = 0             # of a classifier (tools/finetune.py), in the vocabulary's place; 0 = none
    rope_theta: float = 10000.0   # llama only
    norm_eps: float = 1e-6        # gpt2: 1e-5
    # experts (Switch Transformer): MLPs in the place of one, of which a token meets one
    n_experts: int = 0            # 0 = none
    expert_capacity: float = 1.0  # training: times T / n_experts tokens of a row an expert takes; 0 = all
    sparse_every: int = 2         # layers with experts: 1, 3, 5 ...; 1 = all
    router_jitter: float = 0.01   # training: the router's input times uniform(1 - jitter, 1 + jitter)


class LanguageModel(nn.Module):
    """Body and head: token ids (B, T) to logits (B, T, V). What does not want all the logits at once takes
    the body's final hidden states, `model.model(x)` (B, T, C), and the head, `model.lm_head`."""

    def __init__(self, cfg):
        super().__init__()
        check_model_config(cfg)
        self.cfg = cfg
        self.model = Transformer(cfg)
        self.lm_head = nn.Linear(cfg.n_embd, cfg.n_labels or cfg.vocab_size, bias=False)
        self.init_weights()
        if cfg.tie_weights:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, x):
        return self.lm_head(self.model(x))

    def init_weights(self):
        """normal(0, 0.02), biases 0, norms 1; GPT-2's two residual projections are scaled by
        1/sqrt(2 n_layer), Llama's are not (the Hugging Face defaults, as in the papers' code)."""
        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Embedding)):
                nn.init.normal_(m.weight, std=0.02)
                if getattr(m, "bias", None) is not None:
                    nn.init.zeros_(m.bias)
        if self.cfg.arch == "gpt2":
            for name, m in self.model.layers.named_modules():
                if name.endswith(("o_proj", "down_proj")):
                    nn.init.normal_(m.weight, std=0.02 / math.sqrt(2 * self.cfg.n_layer))
        for m in self.modules():  # last: with one expert the other weights are the dense model's
            if isinstance(m, Experts):
                nn.init.normal_(m.router, std=0.02)

    def n_params(self):
        """Parameters, a tied head counted once."""
        return sum(p.numel() for p in self.parameters())


class Transformer(nn.Module):
    """Token ids (B, T), or what takes their embeddings' place (B, T, C), to final hidden states
    (B, T, C) after the last norm."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.embed_positions = nn.Embedding(cfg.block_size, cfg.n_embd) if cfg.arch == "gpt2" else None
        self.drop = nn.Dropout(cfg.dropout)
        self.layers = nn.ModuleList(Block(cfg, has_experts(cfg, i)) for i in range(cfg.n_layer))
        self.norm = make_norm(cfg)
        rope = rope_table(cfg, cfg.block_size) if cfg.arch == "llama" else (None, None)
        self.register_buffer("cos", rope[0], persistent=False)  # (block_size, D)
        self.register_buffer("sin", rope[1], persistent=False)

    def forward(self, x, positions=None, mask=None):
        """positions (B, T), where they are not 0, 1, 2, ...; mask (B, 1, T, T), True where a position sees
        another, where that is not all those before it (lib/scoring.py reads texts as trees)."""
        T = x.shape[1]
        h = x if x.is_floating_point() else self.embed_tokens(x)  # (B, T, C)
        if self.embed_positions is not None:
            h = h + self.embed_positions(torch.arange(T, device=x.device) if positions is None else positions)
            rope = None
        elif positions is None:
            rope = self.cos[:T], self.sin[:T]
        else:
            rope = self.cos[positions][:, None], self.sin[positions][:, None]  # (B, 1, T, D)
        h = self.drop(h)
        for layer in self.layers:
            h = layer(h, rope, mask)
        return self.norm(h)

    def extend(self, positions):
        """Let a Llama read on past its block_size: rotary angles are computed for as many positions."""
        if self.cos is not None and positions > len(self.cos):
            cos, sin = rope_table(self.cfg, positions)
            self.cos, self.sin = cos.to(self.cos), sin.to(self.sin)

    def compile_layers(self):
        """Compile each layer in place. One after another and not as a whole: layers alike compile once,
        and DDP can send a layer's gradient while the layers below it are still being differentiated."""
        torch._dynamo.config.cache_size_limit = 64  # of all models together; past it torch gives up silently
        torch._dynamo.config.optimize_ddp = False  # what is compiled is a layer, not to be cut by DDP
        for layer in self.layers:
            layer.compile(dynamic=False)


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, cfg, experts=False):
        super().__init__()
        self.input_layernorm = make_norm(cfg)
        self.self_attn = Attention(cfg)
        self.post_attention_layernorm = make_norm(cfg)
        self.mlp = Experts(cfg) if experts else make_mlp(cfg)
        self.drop = nn.Dropout(cfg.dropout)

    def forward(self, h, rope, mask=None):
        h = h + self.drop(self.self_attn(self.input_layernorm(h), rope, mask))
        return h + self.drop(self.mlp(self.post_attention_layernorm(h)))


class Attention(nn.Module):
    """Self-attention; with n_kv_head < n_head, groups of query heads share keys and values."""

    def __init__(self, cfg):
        super().__init__()
        bias = cfg.arch == "gpt2"
        self.n_head, self.n_kv_head = cfg.n_head, cfg.n_kv_head or cfg.n_head
        head_dim = cfg.n_embd // cfg.n_head
        self.q_proj = nn.Linear(cfg.n_embd, self.n_head * head_dim, bias)
        self.k_proj = nn.Linear(cfg.n_embd, self.n_kv_head * head_dim, bias)
        self.v_proj = nn.Linear(cfg.n_embd, self.n_kv_head * head_dim, bias)
        self.o_proj = nn.Linear(self.n_head * head_dim, cfg.n_embd, bias)
        self.dropout, self.causal = max(cfg.dropout, cfg.attn_dropout), cfg.causal

    def forward(self, x, rope, mask=None):
        B, T, C = x.shape
        q = self.q_proj(x).view(B, T, self.n_head, -1).transpose(1, 2)     # (B, H, T, D)
        k = self.k_proj(x).view(B, T, self.n_kv_head, -1).transpose(1, 2)  # (B, H_kv, T, D)
        v = self.v_proj(x).view(B, T, self.n_kv_head, -1).transpose(1, 2)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        # on CPU torch's fused attention takes several times as long backward as the plain formula; trees of
        # tokens, which have a mask, are only read
        plain = x.device.type == "cpu" and mask is None
        with sdpa_kernel(SDPBackend.MATH) if plain else contextlib.nullcontext():
            y = F.scaled_dot_product_attention(
                q, k, v, mask, self.dropout if self.training else 0.0,
                is_causal=self.causal and mask is None, enable_gqa=self.n_kv_head < self.n_head)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """GPT-2's: GELU in its tanh form ('gelu_new'), biases."""

    def __init__(self, cfg):
        super().__init__()
        self.up_proj = nn.Linear(cfg.n_embd, cfg.intermediate_size)
        self.down_proj = nn.Linear(cfg.intermediate_size, cfg.n_embd)

    def forward(self, x):
        return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))


class SwiGLU(nn.Module):
    """Llama's: silu(gate) * up, no biases."""

    def __init__(self, cfg):
        super().__init__()
        self.gate_proj = nn.Linear(cfg.n_embd, cfg.intermediate_size, bias=False)
        self.up_proj = nn.Linear(cfg.n_embd, cfg.intermediate_size, bias=False)
        self.down_proj = nn.Linear(cfg.intermediate_size, cfg.n_embd, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """The Switch Transformer's layer (Fedus et al. 2021): y = p_e expert_e(x), p = softmax(W x), p_e largest.

    In training an expert has places for a part of a row's T tokens, and who comes too late is dropped: y = 0.
    In evaluation nobody is, or a text's score would depend on the texts and padding beside it in its row."""

    def __init__(self, cfg):
        super().__init__()
        self.experts = nn.ModuleList(make_mlp(cfg) for _ in range(cfg.n_experts))
        self.router = nn.Parameter(torch.empty(cfg.n_experts, cfg.n_embd))
        self.capacity, self.jitter = cfg.expert_capacity, cfg.router_jitter

    def forward(self, x):
        (B, T, C), E = x.shape, len(self.experts)
        k = places(self.capacity if self.training else 0, E, T)
        with torch.autocast(x.device.type, enabled=False):
            noisy = x.float()
            if self.training and self.jitter:
                noisy = noisy * torch.empty_like(noisy).uniform_(1 - self.jitter, 1 + self.jitter)
            z = F.linear(noisy, self.router.float())  # (B, T, E)
        p = z.softmax(-1)
        gate, e = p.max(-1)                                         # (B, T)
        met = e[..., None] == torch.arange(E, device=x.device)      # (B, T, E)
        place = met.cumsum(1).gather(-1, e[..., None])[..., 0] - 1  # (B, T), those before it in the row
        row = torch.arange(B, device=x.device)[:, None]
        slot = torch.where(place < k, (e * B + row) * k + place, E * B * k).flatten()  # the last: dropped
        slots = x.new_zeros(E * B * k + 1, C).index_copy(0, slot, x.flatten(0, 1))
        y = torch.cat([expert(part) for expert, part in zip(self.experts, slots[:-1].chunk(E))])
        y = F.pad(y, (0, 0, 0, 1)).index_select(0, slot).view(B, T, C)
        if self.training:  # what train.py adds to the loss; a row's balance is 1 if all experts meet as many
            balance = E * (met.float().mean(1) * p.mean(1)).sum(-1).mean()
            self.measured = balance, z.logsumexp(-1).square().mean(), (place >= k).float().mean()
        return y * gate[..., None].to(y.dtype)


def places(capacity, n_experts, T):
    """That an expert has for the T tokens of a row; with capacity 0 for all."""
    return min(T, math.ceil(capacity * T / n_experts)) if capacity else T


def has_experts(cfg, layer):
    return cfg.n_experts > 0 and layer % cfg.sparse_every == 1 % cfg.sparse_every


def make_mlp(cfg):
    return SwiGLU(cfg) if cfg.arch == "llama" else MLP(cfg)


def make_norm(cfg):
    return (nn.RMSNorm if cfg.arch == "llama" else nn.LayerNorm)(cfg.n_embd, cfg.norm_eps)


def rope_table(cfg, positions):
    """cos and sin of position * theta^(-2i/D), each (positions, D), the D/2 angles twice over; sin with the
    sign that the first half of `rotate` wants."""
    head_dim = cfg.n_embd // cfg.n_head
    freqs = cfg.rope_theta ** (-torch.arange(0, head_dim, 2).float() / head_dim)
    angles = torch.outer(torch.arange(positions).float(), freqs).repeat(1, 2)
    sin = angles.sin()
    sin[:, :head_dim // 2].neg_()
    return angles.cos(), sin


def rotate(x, cos, sin):
    """Rotary position embedding, half-split: pairs are (i, i + D/2). x (B, H, T, D), cos (T, D) or
    (B, 1, T, D)."""
    # rolled, not cut and joined, whose compiled gradient (torch 2.13, CPUs with AVX-512) is not a number
    return (x * cos + x.roll(x.shape[-1] // 2, -1) * sin).type_as(x)


def check_model_config(cfg):
    """Exit with one line if the sizes do not make a model."""
    need(cfg, **{key: (getattr(cfg, key) > 0, "at least 1") for key in
                 ("vocab_size", "n_layer", "n_head", "n_embd", "intermediate_size", "block_size",
                  "sparse_every")})
    need(cfg,
         n_embd=(cfg.n_embd % cfg.n_head == 0, f"a multiple of n_head={cfg.n_head}"),
         n_head=(cfg.n_head % (cfg.n_kv_head or 1) == 0, f"a multiple of n_kv_head={cfg.n_kv_head}"),
         rope_theta=(cfg.rope_theta > 0, "above 0"),
         dropout=(cfg.dropout < 1, "below 1"),
         attn_dropout=(cfg.attn_dropout < 1, "below 1"),
         n_experts=(not cfg.n_experts or cfg.n_layer > 1 or cfg.sparse_every == 1,
                    "0 with n_layer=1, unless sparse_every=1"),
         router_jitter=(cfg.router_jitter < 1, "below 1"))
    if cfg.arch == "llama":
        need(cfg, n_embd=(cfg.n_embd // cfg.n_head % 2 == 0,
                          f"an even multiple of n_head={cfg.n_head}: rotary positions turn pairs"))


# --- int8, weight only, for frozen teachers -------------------------------------------------------

class Int8Linear(nn.Module):
    """y = (x W_q^T) * scale + b, with W_q int8 (out, in) and one scale per output channel."""

    def __init__(self, table, scale, bias=None):
        super().__init__()
        self.register_buffer("weight", table)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    def forward(self, x):
        # up to 127 each, weights would sum to what float16 cannot hold; a power of two rounds nothing
        y = F.linear(x, self.weight.to(x.dtype) / 1024).float() * (1024 * self.scale)
        return (y if self.bias is None else y + self.bias).to(x.dtype)


class Int8Embedding(nn.Module):
    """Rows of an int8 table (V, C) times the row's scale, in float32."""

    def __init__(self, table, scale):
        super().__init__()
        self.register_buffer("weight", table)
        self.register_buffer("scale", scale)

    def forward(self, x):
        return self.weight[x].float() * self.scale[x, None]


@torch.no_grad()
def quantize_int8_(model):
    """Replace every Linear and Embedding of a LanguageModel by its symmetric int8 form, in place.
    A tied head goes on sharing the embedding's table and scales."""
    tables = {}  # id of a float weight -> its (int8 table, scale)

    def quantized(weight):
        if id(weight) not in tables:
            scale = weight.abs().amax(dim=1).clamp(min=1e-12) / 127
            tables[id(weight)] = (weight / scale[:, None]).round().to(torch.int8), scale
        return tables[id(weight)]

    for parent in list(model.modules()):
        for name, m in list(parent.named_children()):
            if isinstance(m, nn.Linear):
                bias = None if m.bias is None else m.bias.detach()
                setattr(parent, name, Int8Linear(*quantized(m.weight), bias))
            elif isinstance(m, nn.Embedding):
                setattr(parent, name, Int8Embedding(*quantized(m.weight)))
    return model


def float_weight(m, dtype):
    """The matrix (V, C) of an output layer or embedding in `dtype`, int8 or not."""
    return (m.weight * m.scale[:, None] if m.weight.dtype == torch.int8 else m.weight).to(dtype)


def describe(cfg):
    cfg.vocab_size = cfg.vocab_size or 16000  # the papers'
    with torch.device("meta"):
        model = LanguageModel(cfg)
    print(model)
    print(f"{cfg.arch}: {cfg.n_layer} layers, {cfg.n_embd} wide, {cfg.n_head} heads, "
          f"{cfg.block_size} positions, vocabulary {cfg.vocab_size}")
    print(f"{model.n_params():,} parameters")


if __name__ == "__main__":
    launch(describe, ModelConfig, others=True)
