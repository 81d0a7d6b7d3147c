"""Loaded models: logits, generation, streaming."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from azquant._backend import kernels
from azquant.architectures import architecture_of_gguf
from azquant.engine.sampling import Sampler, check_count
from azquant.engine.session import STEP_TOKENS, Session
from azquant.engine.weights import FileWeights
from azquant.errors import ArgumentError, ContextLengthError, ModelError
from azquant.gguf import GGUFFile, open_gguf
from azquant.ops import COMPUTE_MODES
from azquant.tokenizer import Tokenizer, load_tokenizer

__all__ = ["Model", "load"]

KV_TYPES = ("f16", "f32")


def load(
    path: str | PathLike[str],
    *,
    reproducible: bool = False,
    compute: str = "auto",
    kv_type: str = "f16",
) -> Model:
    """Opens a GGUF model for running. The file is mapped, not read; packing happens here.

    ``reproducible`` gives the same logits, bit for bit, for any number of threads, alone or in a batch, with
    the prompt in one piece or in several, from the cache or computed anew. ``compute`` is that of
    :func:`azquant.matmul`; ``compute="fp32"`` with ``kv_type="f32"`` is the accuracy reference.

    Raises InputFileError, GGUFError, ModelError (missing or contradicting tensors and metadata, types that
    cannot be run, an unknown architecture), ArgumentError.
    """
    if compute not in COMPUTE_MODES:
        raise ArgumentError(f"compute={compute!r}: must be one of {', '.join(COMPUTE_MODES)}")
    if kv_type not in KV_TYPES:
        raise ArgumentError(f"kv_type={kv_type!r}: must be one of {', '.join(KV_TYPES)}")
    if reproducible and compute == "auto":
        compute = "int8"  # one way of computing at every batch size; types without int8 use fp32
    with open_gguf(path) as file:
        return Model(file, compute=compute, kv_type=kv_type)


class Model:
    """A model that is ready to run. Its methods may be called from several threads."""

    def __init__(self, file: GGUFFile, *, compute: str, kv_type: str) -> None:
        self.path = file.path
        if file.byte_order != "<":
            raise ModelError(f"{file.path}: big-endian files can be inspected, not run; convert the model again")
        if not file.has_data:
            raise ModelError(f"{file.path}: the file holds a header only, no weights")
        metadata: Mapping[str, Any] = file.metadata
        architecture = architecture_of_gguf(metadata)
        self.architecture = architecture.name
        self.config = architecture.config.from_gguf(metadata)
        architecture.check_tensors(self.config, file.tensors)
        self.tokenizer: Tokenizer = load_tokenizer(metadata)
        if self.tokenizer.n_vocab > self.config.vocab_size:
            raise ModelError(
                f"{file.path}: the tokenizer lists {self.tokenizer.n_vocab} tokens, "
                f"the embedding has rows for {self.config.vocab_size}"
            )
        self._compute, self._kv_type = compute, kv_type
        weights = FileWeights(file)
        self._spec = architecture.program(self.config, weights)
        if compute != "fp32":
            weights.pack()
        self._program = kernels().Program(self._spec)

    @property
    def n_vocab(self) -> int:
        """Number of logits per position."""
        return self._spec.n_vocab

    @property
    def context_length(self) -> int:
        """Most tokens, prompt and answer together, that a sequence may have."""
        length: int = self.config.context_length
        return length

    def __repr__(self) -> str:
        return f"<{self.architecture} model {str(self.path)!r}: {self.n_vocab} tokens, context {self.context_length}>"

    # ---- tokens --------------------------------------------------------------------------------------

    def _check_tokens(self, tokens: Any) -> npt.NDArray[np.int32]:
        array = np.asarray(tokens)
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise ArgumentError("tokens must be a flat sequence of integers")
        if array.size == 0:
            raise ArgumentError("there are no tokens to start from: the prompt is empty and the model has no BOS")
        if array.min() < 0 or array.max() >= self.n_vocab:
            raise ArgumentError(f"token ids must lie in 0 .. {self.n_vocab - 1}")
        if array.size > self.context_length:
            raise ContextLengthError(
                f"{array.size} tokens given, but the model has {self.context_length} positions; shorten the prompt"
            )
        return array.astype(np.int32)

    def _prompt(self, prompt: str | Sequence[int]) -> npt.NDArray[np.int32]:
        if isinstance(prompt, str):
            tokens = self.tokenizer.encode(prompt)
            if not tokens and self.tokenizer.bos_id is not None:
                tokens = [self.tokenizer.bos_id]  # something must be there to continue from
            return self._check_tokens(tokens)
        return self._check_tokens(prompt)

    # ---- running -------------------------------------------------------------------------------------

    def session(self, n_seq: int = 1, n_ctx: int | None = None) -> Session:
        """A new KV cache for ``n_seq`` sequences of up to ``n_ctx`` (at most context_length) positions."""
        n_ctx = self.context_length if n_ctx is None else min(n_ctx, self.context_length)
        return Session(self._program, self._spec, self._compute, self._kv_type, n_seq, n_ctx)

    def logits(self, tokens: Sequence[int] | npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """The logits (T, vocab) that follow each of ``tokens`` (T,), computed from scratch.

        Raises ArgumentError for ids out of range, ContextLengthError for too many.
        """
        checked = self._check_tokens(tokens)
        session = self.session(n_ctx=len(checked))
        bands = [
            session.feed([(0, checked[at : at + STEP_TOKENS])], every=True)
            for at in range(0, len(checked), STEP_TOKENS)
        ]
        return bands[0] if len(bands) == 1 else np.concatenate(bands)

    def _generate_ids(
        self, prompts: Sequence[npt.NDArray[np.int32]], max_tokens: int, sampler: Sampler
    ) -> Iterator[list[tuple[int, int]]]:
        """Steps through a batch; yields the (prompt, token) pairs that each step chose. EOS is not yielded."""
        longest = max(len(prompt) for prompt in prompts)
        session = self.session(len(prompts), longest + max_tokens)
        generators = [sampler.generator(i) for i in range(len(prompts))]
        waiting = [(i, prompt) for i, prompt in enumerate(prompts)]
        made = [0] * len(prompts)
        while waiting:
            logits = session.feed(waiting)
            chosen = []
            for row, (i, _) in enumerate(waiting):
                token = sampler.choose(logits[row], generators[i])
                if token not in self.tokenizer.end_ids:
                    chosen.append((i, token))
            if chosen:
                yield chosen
            waiting = []
            for i, token in chosen:
                made[i] += 1
                if made[i] < max_tokens and len(prompts[i]) + made[i] <= self.context_length:
                    waiting.append((i, np.array([token], dtype=np.int32)))

    @overload
    def generate(self, prompt: str, **options: Any) -> str: ...
    @overload
    def generate(self, prompt: Sequence[str], **options: Any) -> list[str]: ...
    @overload
    def generate(self, prompt: Sequence[int], **options: Any) -> list[int]: ...
    @overload
    def generate(self, prompt: Sequence[Sequence[int]], **options: Any) -> list[list[int]]: ...

    def generate(
        self,
        prompt: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]],
        *,
        max_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Any:
        """Continues a prompt; the prompt itself is not part of the answer.

        A str gives a str, a list of token ids a list of token ids, and a list of prompts of either kind a
        list with an answer for each, computed as one batch. Ends at the model's end token, after
        ``max_tokens``, or where the context is full. ``temperature`` 0 is greedy; see :class:`Sampler`.

        Raises ArgumentError, ContextLengthError (a prompt longer than the context), TokenizerError.
        """
        many = not isinstance(prompt, str) and len(prompt) > 0 and not isinstance(prompt[0], (int, np.integer))
        prompts: list[Any] = list(prompt) if many else [prompt]
        max_tokens = check_count(max_tokens, "max_tokens")
        sampler = Sampler(temperature, top_k, top_p, seed)
        checked = [self._prompt(p) for p in prompts]
        answers: list[list[int]] = [[] for _ in prompts]
        if max_tokens:
            for step in self._generate_ids(checked, max_tokens, sampler):
                for i, token in step:
                    answers[i].append(token)
        results: list[Any] = [
            self._text(ids, after) if isinstance(p, str) else ids
            for p, ids, after in zip(prompts, answers, checked, strict=True)
        ]
        return results if many else results[0]

    def _text(self, ids: list[int], after: npt.NDArray[np.int32]) -> str:
        decoder = self.tokenizer.stream_decoder(after=after.tolist())
        return "".join([decoder.push(token) for token in ids]) + decoder.flush()

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Iterator[str]:
        """Continues a prompt and yields the text piece by piece, as soon as whole characters are there.

        The pieces join to what :meth:`generate` gives for a str. Arguments and errors are those of generate;
        they are checked when the first piece is asked for.
        """
        max_tokens = check_count(max_tokens, "max_tokens")
        sampler = Sampler(temperature, top_k, top_p, seed)
        tokens = self._prompt(prompt)
        decoder = self.tokenizer.stream_decoder(after=tokens.tolist())
        if max_tokens:
            for step in self._generate_ids([tokens], max_tokens, sampler):
                for _, token in step:
                    if piece := decoder.push(token):
                        yield piece
        if rest := decoder.flush():
            yield rest
