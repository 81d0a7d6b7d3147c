"""LoRA adapters of PEFT, merged into the weights on their way to the file, in float32.

An adapter folder holds adapter_config.json and adapter_model.safetensors (or .bin). For each adapted module
it has A (r, in) and B (out, r); the merged weight is W + scale · B · A, with scale = alpha / r, or
alpha / sqrt(r) for rank-stabilized adapters. GPT-2's Conv1D stores W as (in, out): there the product is
transposed, whatever ``fan_in_fan_out`` says, which PEFT saves as the last module had it. With an adapted
embedding or head PEFT saves its W too (``base_layer``), which then counts. One band of rows is merged at a
time.

Source: the formats as PEFT 0.17 to 0.21 write them; Hu et al., arXiv 2106.09685.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from azquant.architectures.base import show_shape
from azquant.checkpoint import Checkpoint, LazyTensor, open_checkpoint
from azquant.checkpoint.jsonfile import read_object
from azquant.errors import ConversionError, InputFileError

__all__ = ["Adapter", "MergedTensor", "open_adapter"]

Floats = NDArray[np.float32]

_CONFIG_BYTES = 16_000_000
_WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_KEY = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<part>A|B)(?:\.default)?\.weight")
_EMBEDDING_KEY = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)\.lora_embedding_(?P<part>A|B)(?:\.default)?"
)
_BASE_KEY = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.base_layer\.weight")
# What makes a LoRA into something else; a value that is false, empty or absent is plain LoRA.
_REFUSED = (
    "use_dora", "modules_to_save", "layer_replication", "megatron_config", "trainable_token_indices",
    "use_qalora", "target_parameters", "alora_invocation_tokens", "corda_config", "arrow_config",
    "use_bdlora", "kasa_config", "velora_config", "monteclora_config",
)  # fmt: skip
# Ways to begin (init_lora_weights) that leave the weights alone; others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA)
# take a part out of them, which the checkpoint still has.
_STARTS = ("gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True)
class _Pair:
    """The two factors of one module, so that scale · b @ a has the shape of ``nn.Linear``'s weight."""

    a: Floats  # (r, in)
    b: Floats  # (out, r), scale included
    embedding: bool


class MergedTensor:
    """A checkpoint's tensor with an adapter's product added to whatever is read of it."""

    def __init__(self, base: LazyTensor, pair: _Pair, *, transposed: bool) -> None:
        self.base = base
        self._left: Floats = pair.a.T if transposed else pair.b
        self._right: Floats = pair.b.T if transposed else pair.a
        self.name, self.shape, self.dtype = base.name, base.shape, base.dtype
        self.file: Path = base.file
        self.nbytes = base.nbytes

    def read_f32(self, start: int = 0, stop: int | None = None) -> Floats:
        """Rows ``[start:stop]`` as float32, merged. Errors are those of :meth:`LazyTensor.read_f32`."""
        rows = self.base.read_f32(start, stop)
        rows += self._left[start : start + rows.shape[0]] @ self._right
        return rows


class Adapter:
    """An opened adapter: which modules it changes, and how."""

    def __init__(self, folder: Path, config: Mapping[str, Any], checkpoint: Checkpoint) -> None:
        self.folder, self.config, self._checkpoint = folder, config, checkpoint
        self._bases: dict[str, LazyTensor] = {}  # by module: weights that the adapter brings along
        self._pairs = self._read_pairs()

    @property
    def files(self) -> tuple[Path, ...]:
        """The weight files."""
        return self._checkpoint.files

    @property
    def base_model(self) -> str:
        """What the adapter says it was trained on; empty when it does not."""
        name = self.config.get("base_model_name_or_path")
        return name if isinstance(name, str) else ""

    def __len__(self) -> int:
        return len(self._pairs)

    def _read_pairs(self) -> dict[str, _Pair]:
        factors: dict[str, dict[str, Floats]] = {}
        embeddings: set[str] = set()
        for key, tensor in self._checkpoint.tensors.items():
            if base := _BASE_KEY.fullmatch(key):
                self._bases[base["module"]] = tensor
                continue
            match = _KEY.fullmatch(key) or _EMBEDDING_KEY.fullmatch(key)
            if match is None or len(tensor.shape) != 2:
                raise ConversionError(
                    f"{tensor.file}: tensor {key} is no pair of LoRA matrices; only plain LoRA is merged"
                )
            if "lora_embedding" in key:
                embeddings.add(match["module"])
            factors.setdefault(match["module"], {})[match["part"]] = tensor.read_f32()
        if not factors:
            raise ConversionError(f"{self.folder}: the adapter holds no LoRA matrices")
        return {
            module: self._pair(module, pair, embedding=module in embeddings)
            for module, pair in factors.items()
        }

    def _pair(self, module: str, pair: dict[str, Floats], *, embedding: bool) -> _Pair:
        if len(pair) != 2:
            raise ConversionError(f"{self.folder}: {module} has only one of lora_A and lora_B")
        a, b = pair["A"], pair["B"]
        if embedding:  # the weight of an Embedding (tokens, width) gets (B · A) transposed
            a, b = b.T, a.T
        if a.shape[0] != b.shape[1]:
            raise ConversionError(
                f"{self.folder}: {module} has lora_A {show_shape(a.shape)} and lora_B {show_shape(b.shape)}, "
                "which do not multiply"
            )
        return _Pair(np.ascontiguousarray(a), b * np.float32(self._scale(module, a.shape[0])), embedding)

    def _scale(self, module: str, rank: int) -> float:
        alpha = self._of(module, "alpha_pattern", self.config.get("lora_alpha", 8))
        stated = self._of(module, "rank_pattern", self.config.get("r", rank))
        if stated != rank:
            raise ConversionError(
                f"{self.folder / 'adapter_config.json'}: the rank of {module} is {stated}, but its matrices "
                f"have rank {rank}"
            )
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
            raise ConversionError(
                f"{self.folder / 'adapter_config.json'}: lora_alpha is {alpha!r:.60}, not a number"
            )
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") is True else rank)

    def _of(self, module: str, pattern: str, default: Any) -> Any:
        """The value that ``pattern`` (a table of regular expressions for ends of names) has for a module."""
        table = self.config.get(pattern)
        for key, value in table.items() if isinstance(table, dict) else ():
            if re.fullmatch(rf"(.*\.)?({key})", module):
                return value
        return default

    def merge(
        self, tensors: Mapping[str, LazyTensor], *, head: str, embedding: str, transposed: Collection[str]
    ) -> dict[str, Any]:
        """``tensors`` of the checkpoint, those that the adapter changes replaced.

        A ``head`` that is not there is a copy of ``embedding``; both, and the ``transposed`` that store
        (in, out), are named without a prefix. Raises ConversionError for a module that the checkpoint does
        not have, or in another shape.
        """
        merged: dict[str, Any] = dict(tensors)
        unused = set(self._bases).difference(self._pairs)
        if unused:
            raise ConversionError(f"{self.folder}: {min(unused)} has a base_layer, but no LoRA matrices")
        for module, pair in self._pairs.items():
            name = self._find(module, tensors, head, embedding)
            tied = name == head and head not in tensors
            where = self._find(embedding.removesuffix(".weight"), tensors) if tied else name
            base = self._bases.get(module) or tensors[where]
            turned = _is_among(name, transposed)
            shape = (pair.b.shape[0], pair.a.shape[1])
            expected = shape[::-1] if turned else shape
            if tuple(base.shape) != expected:
                raise ConversionError(
                    f"{self.folder}: the adapter changes {module} by {show_shape(expected)}, but {name} of "
                    f"{base.file} has shape {show_shape(base.shape)}"
                )
            merged[name] = MergedTensor(base, pair, transposed=turned)
        return merged

    def _find(
        self, module: str, tensors: Mapping[str, LazyTensor], head: str = "", embedding: str = ""
    ) -> str:
        name = f"{module}.weight"
        if name in tensors:
            return name
        if head and name == head and any(_is_among(key, (embedding,)) for key in tensors):
            return head
        # Checkpoints of the bare model lack the prefix that the adapter's modules have, or have one more.
        _, _, short = name.partition(".")
        ends = [key for key in tensors if key == short or key.endswith(f".{name}")]
        if len(ends) != 1:
            raise ConversionError(
                f"{self.folder}: the adapter changes {module}, which the checkpoint does not have"
            )
        return ends[0]


def _is_among(name: str, short_names: Collection[str]) -> bool:
    """Whether ``name`` is one of ``short_names``, whatever prefix it has before that."""
    parts = name.split(".")
    return any(".".join(parts[i:]) in short_names for i in range(len(parts)))


def open_adapter(folder: Path, opened: ExitStack) -> Adapter:
    """Open a PEFT folder; ``opened`` closes its files.

    Raises InputFileError, CheckpointError, and ConversionError for an adapter that is more than plain LoRA.
    """
    config_path = folder / "adapter_config.json"
    if not config_path.is_file():
        raise InputFileError(f"{folder}: there is no adapter_config.json; --lora wants the folder PEFT saved")
    config = read_object(config_path, _CONFIG_BYTES)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ConversionError(f"{config_path}: peft_type is {kind!r:.40}; only LORA adapters are merged")
    for key in _REFUSED:
        if config.get(key):
            raise ConversionError(f"{config_path}: {key} is set; only plain LoRA is merged")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower() not in _STARTS:
        raise ConversionError(
            f"{config_path}: init_lora_weights is {start!r:.40}, so the adapter belongs to weights that PEFT "
            "changed at the start; save it with path_initial_model_for_weight_conversion"
        )
    if config.get("bias", "none") != "none":
        raise ConversionError(f"{config_path}: bias is {config['bias']!r:.40}; trained biases are not merged")
    weights = next((folder / name for name in _WEIGHT_FILES if (folder / name).is_file()), None)
    if weights is None:
        raise InputFileError(f"{folder}: none of {', '.join(_WEIGHT_FILES)} is in this folder")
    checkpoint = open_checkpoint(weights)
    opened.callback(checkpoint.close)
    return Adapter(folder, config, checkpoint)
