"""GPTs as people write them, tiny and untrained: nanoGPT's modules, and those of the from-scratch course.

Written for these tests after the modules' names and formulas. Random weights of a size that makes every part
matter: with torch's own initial values, attention and biases hardly show in the logits.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

WIDTH, HEADS, LAYERS, POSITIONS, VOCAB = 64, 4, 2, 128, 96


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.c_attn = nn.Linear(width, 3 * width, bias=bias)
        self.c_proj = nn.Linear(width, width, bias=bias)
        self.heads = heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        split = (batch, length, self.heads, width // self.heads)
        q, k, v = (part.view(split).transpose(1, 2) for part in self.c_attn(x).split(width, dim=2))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(x.shape))


class _LayerNorm(nn.Module):
    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class _MLP(nn.Module):
    def __init__(self, width: int, bias: bool, activation: nn.Module) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width, bias=bias)
        self.c_proj = nn.Linear(4 * width, width, bias=bias)
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(self.activation(self.c_fc(x)))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, bias: bool, activation: nn.Module) -> None:
        super().__init__()
        self.ln_1, self.attn = _LayerNorm(width, bias), _Attention(width, heads, bias)
        self.ln_2, self.mlp = _LayerNorm(width, bias), _MLP(width, bias, activation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    """nanoGPT's model: head and embedding one matrix, exact GELU, ``bias`` everywhere or nowhere."""

    def __init__(self, bias: bool = True, vocab: int = VOCAB, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab, WIDTH),
                "wpe": nn.Embedding(POSITIONS, WIDTH),
                "h": nn.ModuleList(
                    _Block(WIDTH, HEADS, bias, activation or nn.GELU()) for _ in range(LAYERS)
                ),
                "ln_f": _LayerNorm(WIDTH, bias),
            }
        )
        self.lm_head = nn.Linear(WIDTH, vocab, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight
        self.model_args = {
            "n_layer": LAYERS,
            "n_head": HEADS,
            "n_embd": WIDTH,
            "block_size": POSITIONS,
            "bias": bias,
            "vocab_size": vocab,
            "dropout": 0.0,
        }

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        parts: Any = self.transformer
        x = parts["wte"](tokens) + parts["wpe"](torch.arange(tokens.shape[1]))
        for block in parts["h"]:
            x = block(x)
        return self.lm_head(parts["ln_f"](x))


class _Head(nn.Module):
    def __init__(self, width: int, size: int, scale: float) -> None:
        super().__init__()
        self.key = nn.Linear(width, size, bias=False)
        self.query = nn.Linear(width, size, bias=False)
        self.value = nn.Linear(width, size, bias=False)
        self.register_buffer("tril", torch.tril(torch.ones(POSITIONS, POSITIONS)))
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        scores = self.query(x) @ self.key(x).transpose(-2, -1) * self.scale
        mask: Any = self.tril
        scores = scores.masked_fill(mask[:length, :length] == 0, float("-inf"))
        return functional.softmax(scores, dim=-1) @ self.value(x)


class _MultiHead(nn.Module):
    def __init__(self, width: int, heads: int, scale: float) -> None:
        super().__init__()
        self.heads = nn.ModuleList(_Head(width, width // heads, scale) for _ in range(heads))
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(torch.cat([head(x) for head in self.heads], dim=-1))


class _FeedForward(nn.Module):
    def __init__(self, width: int, activation: nn.Module) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(width, 4 * width), activation, nn.Linear(4 * width, width), nn.Dropout(0.1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class _CourseBlock(nn.Module):
    def __init__(self, width: int, heads: int, scale: float, activation: nn.Module) -> None:
        super().__init__()
        self.sa, self.ffwd = _MultiHead(width, heads, scale), _FeedForward(width, activation)
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.sa(self.ln1(x))
        return x + self.ffwd(self.ln2(x))


class CourseGPT(nn.Module):
    """The course's model: one module a head, a head with a bias; ``scale_by`` what scores are divided by."""

    def __init__(
        self, activation: nn.Module | None = None, scale_by: str = "head", vocab: int = VOCAB
    ) -> None:
        super().__init__()
        scale = 1 / math.sqrt(WIDTH if scale_by == "embedding" else WIDTH // HEADS)
        self.token_embedding_table = nn.Embedding(vocab, WIDTH)
        self.position_embedding_table = nn.Embedding(POSITIONS, WIDTH)
        self.blocks = nn.Sequential(
            *[_CourseBlock(WIDTH, HEADS, scale, activation or nn.GELU()) for _ in range(LAYERS)]
        )
        self.ln_f = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, vocab)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.token_embedding_table(tokens) + self.position_embedding_table(torch.arange(tokens.shape[1]))
        return self.lm_head(self.ln_f(self.blocks(x)))


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with weights around 0.1 (norms around 1), ready to be asked."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = name.rpartition(".")[0].rpartition(".")[2].startswith("ln") and name.endswith("weight")
            parameter.copy_(1 + 0.1 * noise if is_norm else 0.15 * noise)
    return model.eval()


def save_nanogpt(path: Path, model: NanoGPT, compiled: bool = False) -> Path:
    """The checkpoint that nanoGPT's train.py writes, optimizer state and all."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.arange(8)[None]).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    state = {name: x.detach().clone() for name, x in model.state_dict().items()}
    state["lm_head.weight"] = state["transformer.wte.weight"]  # one storage, as torch saves tied weights
    checkpoint = {
        "model": {("_orig_mod." if compiled else "") + name: x for name, x in state.items()},
        "optimizer": optimizer.state_dict(),
        "model_args": model.model_args,
        "iter_num": 2000,
        "best_val_loss": torch.tensor(1.4697),
        "config": {
            "batch_size": 64,
            "out_dir": "out-shakespeare-char",
            "learning_rate": 1e-3,
            "compile": compiled,
        },
    }
    torch.save(checkpoint, path)
    return path


def logits(model: nn.Module, tokens: list[int]) -> Any:
    """(T, vocab) float32."""
    with torch.no_grad():
        return model(torch.tensor([tokens]))[0].numpy()
