"""The proof of a conversion: the file's predictions against those of the checkpoint it was made of.

The checkpoint is run by transformers where that is installed and knows the model, and otherwise by azquant's
own program in float32, which the proof then says. What GGUF's graph cannot carry to llama.cpp (exact GELU, a
bias of the output head) is measured too: the file run exactly, against the file run as llama.cpp runs it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import product
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from azquant.architectures import ARCHITECTURES
from azquant.checkpoint import open_checkpoint
from azquant.conversion import Agreement, ConversionReport, Coverage, convert
from azquant.conversion.agreement import corpus_texts
from azquant.engine import Model, load
from azquant.engine.sampling import log_softmax
from azquant.errors import ArgumentError, ConversionWarning

__all__ = ["Alternative", "Distance", "Proof", "prove"]

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]
Run = Callable[[Ints], Floats]

DEFAULT_TOKENS = 1024
_WINDOW = 256
_CLEARLY = 0.98
"""Perplexity ratio from which an alternative counts as better. Tiny models differ by 4% and more between GELU
and ReLU (tests/test_prove.py trains one); the two scales, or the two GELUs, can differ by less than this."""
_UNSAID = {"activation": ("gelu", "relu"), "attention_scale": ("head", "embedding")}


@dataclass(frozen=True)
class Distance:
    """How far one model's predictions are from another's, over the tokens of a text."""

    max_difference: float
    """Largest difference of two logits."""
    mean_kl: float
    """KL(reference || model) of the next token's distribution, in nats."""
    same_top: float
    """Share of positions at which both find the same token likeliest."""
    perplexity: float
    reference_perplexity: float

    def as_dict(self) -> dict[str, float]:
        """Plain values."""
        return dict(vars(self))


@dataclass(frozen=True)
class Alternative:
    """Options under which a from-scratch checkpoint was tried too."""

    options: dict[str, str]
    perplexity: float


@dataclass(frozen=True)
class Proof:
    """What :func:`prove` found."""

    reference: str
    """What ran the checkpoint."""
    text: str
    """What was predicted."""
    tokens: int
    distance: Distance
    """Of the file from the checkpoint."""
    llama_cpp: Distance | None
    """Of what llama.cpp computes with this file from what azquant does; ``None`` where that is the same."""
    tokenizer: Agreement | None
    coverage: Coverage
    alternatives: tuple[Alternative, ...] = ()
    """What a from-scratch checkpoint predicts under other values of options that were not given."""

    @property
    def better(self) -> Alternative | None:
        """The alternative that predicts the text clearly better: the model was probably trained so."""
        best = min(self.alternatives, key=lambda item: item.perplexity, default=None)
        if best is None or best.perplexity > _CLEARLY * self.distance.reference_perplexity:
            return None
        return best

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        agreement = self.tokenizer
        return {
            "reference": self.reference,
            "text": self.text,
            "tokens": self.tokens,
            **self.distance.as_dict(),
            "alternatives": [{**item.options, "perplexity": item.perplexity} for item in self.alternatives],
            "llama_cpp": None if self.llama_cpp is None else self.llama_cpp.as_dict(),
            "tokenizer": None if agreement is None else {**vars(agreement), "rate": agreement.rate},
            "tensors": {
                "total": self.coverage.total,
                "once": len(self.coverage.once),
                "twice": list(self.coverage.twice),
                "left_out": dict(self.coverage.left_out),
            },
        }


def prove(
    report: ConversionReport,
    *,
    text: str | PathLike[str] | None = None,
    tokens: int = DEFAULT_TOKENS,
    use_transformers: bool = True,
    **options: Any,
) -> Proof:
    """Compare the file that :func:`azquant.convert` reports with the checkpoint it was made of.

    ``text`` is a UTF-8 file to predict (azquant's sample of many scripts if not given; better is text like
    the model's own), of which at most ``tokens`` tokens are taken. A model without a tokenizer predicts
    random ids. Tensors do not tell which activation a from-scratch model was trained with; where that was
    not given but ``text`` is, the others are tried on it too (``alternatives``). ``options`` are those that
    the conversion was given (``tokenizer``, ``activation``, ``attention_scale``, ``heads``, ``lora``); they
    serve where azquant's own program is the reference.

    Both run in float32 with a float32 cache, so that the distance is the file's alone. Raises ArgumentError
    for the report of a dry run, and what :func:`azquant.convert` and :func:`azquant.load` raise.
    """
    if report.file_bytes is None:
        raise ArgumentError("a dry run wrote no file; there is nothing to prove")
    with ExitStack() as stack:
        model = stack.enter_context(load(report.destination, compute="fp32", kv_type="f32"))
        windows, name = _windows(model, None if text is None else Path(text), tokens)
        reference, run = _reference(report, use_transformers and not options.get("lora"), options, stack)
        distance = _distance(windows, run, model.logits)
        as_llama = _as_llama_cpp(model)
        others = (
            () if text is None or not model.tokenizer.can_encode else _alternatives(report, options, windows)
        )
        return Proof(
            reference=reference,
            text=name,
            tokens=sum(map(len, windows)),
            distance=distance,
            llama_cpp=None if as_llama is None else _distance(windows, model.logits, as_llama),
            tokenizer=report.tokenizer,
            coverage=report.coverage,
            alternatives=others,
        )


def _alternatives(
    report: ConversionReport, options: dict[str, Any], windows: list[Ints]
) -> tuple[Alternative, ...]:
    if _has_config(report.source):
        return ()
    unsaid = {key: values for key, values in _UNSAID.items() if options.get(key) is None}
    found = []
    for values in list(product(*unsaid.values()))[1:]:  # the first are the defaults, which the file has
        tried = dict(zip(unsaid, values, strict=True))
        with ExitStack() as stack:
            run = _own_program(report, {**options, **tried}, stack)
            found.append(Alternative(tried, _distance(windows, run, run).perplexity))
    return tuple(found)


def _has_config(source: Path) -> bool:
    with open_checkpoint(source) as checkpoint:
        return checkpoint.config is not None


def _own_program(report: ConversionReport, options: dict[str, Any], stack: ExitStack) -> Run:
    folder = Path(stack.enter_context(TemporaryDirectory(prefix="azquant-")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConversionWarning)  # the conversion itself gave them
        convert(report.source, folder / "f32.gguf", "f32", **options)
    return stack.enter_context(load(folder / "f32.gguf", compute="fp32", kv_type="f32")).logits


def _windows(model: Model, path: Path | None, most: int) -> tuple[list[Ints], str]:
    length = min(_WINDOW, model.context_length)
    if most < 2:
        raise ArgumentError(f"tokens={most}: at least 2 are needed")
    if not model.tokenizer.can_encode:
        ids = np.random.default_rng(0).integers(0, model.n_vocab, min(most, 2 * length)).astype(np.int32)
        name = "random token ids"
    else:
        name, texts = corpus_texts(path)
        found: list[int] = []
        for text in texts:
            found += model.tokenizer.encode(text, add_special=False)
            if len(found) >= most:
                break
        ids = np.asarray(found[:most], dtype=np.int32)
    cut = [ids[at : at + length] for at in range(0, len(ids), length)]
    kept = [window for window in cut if len(window) > 1]
    if not kept:
        raise ArgumentError(f"{name} has {len(ids)} tokens; at least 2 are needed")
    return kept, name


def _reference(
    report: ConversionReport, use_transformers: bool, options: dict[str, Any], stack: ExitStack
) -> tuple[str, Run]:
    own = "azquant's own program in float32"
    if not (report.source.is_dir() and _has_config(report.source)):
        reason = "transformers does not know this layout"
    elif not use_transformers:
        reason = "as asked"
    else:
        try:
            return _transformers(report.source)
        except ImportError:
            reason = "transformers and torch are not installed"
        except Exception as error:  # whatever a library of that size raises, the proof goes on
            reason = f"transformers failed: {type(error).__name__}: {error}"[:200]
    return f"{own} ({reason})", _own_program(report, options, stack)


def _transformers(folder: Path) -> tuple[str, Run]:
    # The one place outside azquant.torch that asks for torch: as a judge, and only if it is there.
    import torch
    import transformers

    talk: Any = transformers.utils.logging
    shown, level = talk.is_progress_bar_enabled(), talk.get_verbosity()
    talk.disable_progress_bar()
    talk.set_verbosity_error()  # what is odd about the config, the conversion has said already
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model: Any = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True, attn_implementation="eager"
            )
    finally:
        talk.set_verbosity(level)
        if shown:
            talk.enable_progress_bar()
    model.eval()

    def run(ids: Ints) -> Floats:
        with torch.no_grad():
            logits: Floats = model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0].numpy()
        return logits

    return f"transformers {transformers.__version__}", run


def _as_llama_cpp(model: Model) -> Run | None:
    """The same weights run by llama.cpp's graph: GELU by tanh, no bias after the head."""
    config: Any = model.config
    changes: dict[str, Any] = {}
    if getattr(config, "activation", None) in ("gelu_erf", "relu"):
        changes["activation"] = "gelu_tanh"
    if getattr(config, "output_bias", None) is not None:
        changes["output_bias"] = None
    if not changes:
        return None
    spec = ARCHITECTURES[model.architecture].program(replace(config, **changes), model._weights)

    def run(ids: Ints) -> Floats:
        return model.session(n_ctx=len(ids), spec=spec).feed([(0, ids)], every=True)

    return run


def _distance(windows: list[Ints], reference: Run, model: Run) -> Distance:
    largest, count = 0.0, 0
    kl, same, nll, reference_nll = 0.0, 0, 0.0, 0.0
    for window, (expected, found) in zip(windows, _both(windows, reference, model), strict=True):
        largest = max(largest, float(np.abs(expected - found).max()))
        p, q = log_softmax(expected), log_softmax(found)
        kl += float((np.exp(p) * (p - q)).sum())
        same += int((p.argmax(axis=1) == q.argmax(axis=1)).sum())
        rows, true = np.arange(len(window) - 1), window[1:]
        reference_nll -= float(p[rows, true].sum())
        nll -= float(q[rows, true].sum())
        count += len(window)
    predicted = count - len(windows)
    return Distance(
        max_difference=largest,
        mean_kl=max(0.0, kl / count),
        same_top=same / count,
        perplexity=math.exp(min(700.0, nll / predicted)),
        reference_perplexity=math.exp(min(700.0, reference_nll / predicted)),
    )


def _both(windows: list[Ints], reference: Run, model: Run) -> Iterator[tuple[Floats, Floats]]:
    for window in windows:
        expected, found = reference(window), model(window)
        if expected.shape != found.shape:
            raise ArgumentError(
                f"the checkpoint gives {expected.shape[1]} logits, the file {found.shape[1]}: the file was "
                "made of another checkpoint"
            )
        yield expected, found
