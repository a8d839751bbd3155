"""Classifiers of texts from language models: other heads, several as one, LoRA.

Shapes: B texts, T tokens of the longest, C width, K labels.
"""
import math
from dataclasses import replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import LanguageModel


def classifier(model, n_labels):
    """A language model with a new head of `n_labels` rows in the place of its own; its body is kept."""
    new = LanguageModel(replace(model.cfg, n_labels=n_labels, tie_weights=False))
    new.model = model.model
    return new.train()


def mlp_classifier(model, n_labels):
    """The same with the head of 2025 and 2026; its norms have no weights."""
    C = model.cfg.n_embd
    model.lm_head = nn.Sequential(
        nn.LayerNorm(C, elementwise_affine=False), nn.Linear(C, C), nn.GELU(),
        nn.LayerNorm(C, elementwise_affine=False), nn.Dropout(0.1), nn.Linear(C, n_labels))
    return model.train()


class Ensemble(nn.Module):
    """Classifiers as one: the mean of their logits."""

    def __init__(self, models, padding="right"):
        super().__init__()
        self.models, self.padding = nn.ModuleList(models), padding

    def forward(self, batch):
        """(B, K), of the last token of each text; by the rules of 2025 texts were cut to their first."""
        rows = torch.arange(len(batch.x), device=batch.x.device)
        shifted = after_padding(batch) if self.padding == "left" else None
        members = []
        for m in self.models:
            positions = shifted if m.cfg.arch == "gpt2" else None  # a Llama knows distances alone
            members.append(m.lm_head(m.model(batch.x, positions)[rows, batch.last]).float())
        return sum(members) / len(members)


def after_padding(batch):
    """(B, T), the positions of tokens that stand behind their text's padding: transformers' GPT-2 counts from
    the start of the padded row, so the longest text of a batch shifts the others."""
    T = batch.x.shape[1]
    padding = T - 1 - batch.last  # (B,)
    return (torch.arange(T, device=batch.x.device) + padding[:, None]).clamp(max=T - 1)


class LoRALinear(nn.Linear):
    """A frozen linear layer and an adapter: x W^T + (alpha / r) dropout(x) A^T B^T, with A (r, in) and
    B (out, r). Its state_dict has the sum as `weight`, so that checkpoints are plain ones."""

    def __init__(self, base, rank, alpha, dropout):
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.a = nn.Parameter(torch.empty(rank, base.in_features, device=base.weight.device))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))  # as PEFT does
        self.scale, self.drop = alpha / rank, nn.Dropout(dropout)

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        return y + F.linear(F.linear(self.drop(x), self.a), self.b) * self.scale

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[prefix + "weight"] = (self.weight + self.scale * self.b @ self.a).detach()
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias.detach()

    def _load_from_state_dict(self, state_dict, prefix, *args):
        with torch.no_grad():
            self.weight.copy_(state_dict[prefix + "weight"])  # has the adapter in it
            self.b.zero_()
            if self.bias is not None:
                self.bias.copy_(state_dict[prefix + "bias"])


def add_lora(model, cfg):
    """Freeze all but the head, and adapt what PEFT does by default: queries and values; GPT-2's keys too,
    which are fused with them there (in PEFT the three share one A)."""
    model.model.requires_grad_(False)
    names = ("q_proj", "v_proj") if model.cfg.arch == "llama" else ("q_proj", "k_proj", "v_proj")
    for layer in model.model.layers:
        for name in names:
            base = getattr(layer.self_attn, name)
            setattr(layer.self_attn, name, LoRALinear(base, cfg.lora_rank, cfg.lora_alpha, cfg.lora_dropout))
