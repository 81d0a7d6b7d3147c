"""LoRA on 4-bit weights: adapters trained on a quantized model, on the CPU, and taken to GGUF in two ways.

    python examples/lora_az.py                          # trains on a few riddles for a minute
    python examples/lora_az.py --text my_text.txt --steps 400

The base model's layers are quantized in place and stay frozen; only the small matrices A and B of each
adapter learn. The folder given by --out then holds

    base-q4_0.gguf          the quantized base model, the very bytes that were trained on
    adapter.gguf            the adapter alone: llama-completion -m base-q4_0.gguf --lora adapter.gguf
    adapter/                the same in PEFT's format
    merged-q4_0.gguf        base and adapter merged in float32, then quantized

Needs: pip install 'azquant[torch,text]' transformers
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn
from transformers import GPT2LMHeadModel

import azquant as aq
from azquant.torch import QuantLinear, quantize_, save_gguf, save_lora_gguf

HERE = Path(__file__).resolve().parent

RIDDLES = """\
Sual: Göydə durar, yerə vurar. Bu nədir? Cavab: İldırım.
Sual: Yol üstündə bir ağac, hər budağı bir qulac. Bu nədir? Cavab: İl.
Sual: Ağzı var, dili yox; yatağı var, yuxusu yox. Bu nədir? Cavab: Çay.
Sual: Gündüz yatar, gecə yanar. Bu nədir? Cavab: Ulduz.
Sual: Suda doğular, sudan qorxar. Bu nədir? Cavab: Duz.
Sual: Ayağı yox, gəzər; dili yox, deyər. Bu nədir? Cavab: Məktub.
Sual: Hamını geyindirər, özü çılpaq gəzər. Bu nədir? Cavab: İynə.
Sual: Nə yeri var, nə göyü; hamı ondan keçir. Bu nədir? Cavab: Vaxt.
"""


class LoRALinear(nn.Module):
    """A frozen layer plus alpha / r · B A x (Hu et al., arXiv 2106.09685); B is zero at first."""

    def __init__(self, base: QuantLinear, rank: int, alpha: float) -> None:
        super().__init__()
        self.base, self.scale = base, alpha / rank
        self.a = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.scale * (x @ self.a.T) @ self.b.T


def add_adapters(model: nn.Module, rank: int, alpha: float) -> dict[str, LoRALinear]:
    """Wraps every quantized layer of the blocks; returns the wrappers by the layers' names."""
    model.requires_grad_(False)
    layers = {
        name: m for name, m in model.named_modules() if isinstance(m, QuantLinear) and m.tied_to is None
    }
    adapters = {name: LoRALinear(layer, rank, alpha) for name, layer in layers.items()}
    for name, adapter in adapters.items():
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, adapter)
    return adapters


def batches(tokens: torch.Tensor, length: int, size: int, steps: int) -> list[torch.Tensor]:
    """Random windows (size, length + 1) of the text, which is repeated where it is shorter."""
    tokens = tokens.repeat(-(-(length + 2) // len(tokens)) + 1)
    random = torch.Generator().manual_seed(0)
    starts = torch.randint(len(tokens) - length, (steps, size), generator=random)
    return [torch.stack([tokens[s : s + length + 1] for s in row]) for row in starts.tolist()]


def train(
    model: nn.Module, adapters: dict[str, LoRALinear], windows: list[torch.Tensor], rate: float
) -> list[float]:
    """Teaches the adapters; returns the loss of every step."""
    parameters = [p for adapter in adapters.values() for p in (adapter.a, adapter.b)]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    losses = []
    for step, window in enumerate(windows):
        logits = model(window[:, :-1]).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 10 == 0 or step == len(windows) - 1:
            print(f"  step {step:4}  loss {losses[-1]:.3f}", flush=True)
    return losses


def save_peft(folder: Path, adapters: dict[str, LoRALinear], rank: int, alpha: float) -> Path:
    """The adapter as PEFT saves it, which azquant.convert merges."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, adapter in adapters.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = adapter.a.detach().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = adapter.b.detach().contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha, "bias": "none",
        "fan_in_fan_out": True, "target_modules": sorted({name.split(".")[-1] for name in adapters}),
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    return folder


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=HERE / "az_llm_tiny", help="a GPT-2 checkpoint folder")
    parser.add_argument("--text", type=Path, help="what to train on (UTF-8); default: a few riddles")
    parser.add_argument("--out", type=Path, default=Path("lora_az"), help="folder for the results")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=4, help="windows per step")
    parser.add_argument("--length", type=int, default=96, help="tokens per window")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=float, default=16.0)
    parser.add_argument("--rate", type=float, default=5e-3, help="learning rate")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)

    model = GPT2LMHeadModel.from_pretrained(options.model).float().eval()
    report = quantize_(model, "q4_0")
    print(f"{len(report.replaced)} layers quantized: {report.before:,} -> {report.after:,} bytes")
    save_gguf(model, out / "base-q4_0.gguf", folder=options.model, overwrite=True)

    adapters = add_adapters(model, options.rank, options.alpha)
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{len(adapters)} adapters of rank {options.rank}: {learning:,} numbers to learn")
    text = options.text.read_text(encoding="utf-8") if options.text else RIDDLES
    tokenizer = Tokenizer.from_file(str(options.model / "tokenizer.json"))
    tokens = torch.tensor(tokenizer.encode(text).ids)
    windows = batches(tokens, options.length, options.batch, options.steps)
    losses = train(model, adapters, windows, options.rate)

    factors = {name: (adapter.a, adapter.b) for name, adapter in adapters.items()}
    # The names are those of the layers before they were wrapped, so the unwrapped model is asked.
    for name, adapter in adapters.items():
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, adapter.base)
    save_lora_gguf(model, out / "adapter.gguf", factors, options.alpha, overwrite=True)
    peft = save_peft(out / "adapter", adapters, options.rank, options.alpha)
    aq.convert(options.model, out / "merged-q4_0.gguf", "q4_0", lora=peft, overwrite=True)

    prompt = text.strip().splitlines()[0].split("?")[0] + "?"
    for name in ("base-q4_0.gguf", "merged-q4_0.gguf"):
        answer = aq.load(out / name).generate(prompt, max_tokens=16, temperature=0)
        print(f"{name}: {prompt}{answer!r}")
    return losses


if __name__ == "__main__":
    main()
