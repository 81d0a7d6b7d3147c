"""Loaded models: logits, generation, streaming, chat."""

from __future__ import annotations

import os
import threading
import warnings
from array import array
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from types import TracebackType
from typing import TYPE_CHECKING, Any, overload
from weakref import WeakSet

from azquant._backend import kernels
from azquant._lazy import np
from azquant.architectures import architecture_of_gguf
from azquant.cpu import COMPUTE_MODES, num_threads
from azquant.engine._memory import MemoryNeeds, available_memory, cache_bytes, memory_limit
from azquant.engine.chat import render_chat
from azquant.engine.generation import Generation
from azquant.engine.options import GenerateOptions, Options
from azquant.engine.request import Request
from azquant.engine.sampling import check_count
from azquant.engine.scheduler import Scheduler
from azquant.engine.session import STEP_TOKENS, Session
from azquant.engine.weights import FileWeights
from azquant.errors import ArgumentError, BackendWarning, ContextLengthError, ModelError, OutOfMemoryError
from azquant.gguf import GGUFFile, open_gguf
from azquant.program import ProgramSpec
from azquant.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    import numpy.typing as npt
    from typing_extensions import Self, Unpack

__all__ = ["Model", "load"]

KV_TYPES = ("f16", "f32", "q8_0")

_MOST_SEQUENCES = 16
"""Answers computed at once, unless the caller or the memory says otherwise."""

_WORTH_A_THREAD = 32 << 20
"""Bytes of weights from which on packing takes longer than building the tokenizer; that is done beside it."""


def load(
    path: str | PathLike[str],
    *,
    reproducible: bool = False,
    compute: str = "auto",
    kv_type: str = "f16",
    n_ctx: int | None = None,
    n_seq: int | None = None,
) -> Model:
    """Opens a GGUF model for running. The file is mapped, not read; packing happens here.

    ``reproducible`` gives the same logits, bit for bit, for any number of threads, alone or in a batch, with
    the prompt in one piece or in several, from the cache or computed anew. ``compute`` is that of
    :func:`azquant.matmul`; ``compute="fp32"`` with ``kv_type="f32"`` is the accuracy reference.

    ``n_seq`` answers are computed at once (default: 16, fewer where half of the memory would not hold them);
    more wait their turn. Each has ``n_ctx`` positions for prompt and answer (default and most: those of the
    model). The cache is reserved with the first answer, and takes memory as positions are used. ``kv_type``
    "q8_0" halves it: 8 bits a number and a scale for 32.

    What all this takes is known, and :attr:`Model.memory` afterwards, before any of it is allocated: more
    than is available is refused here. A cache whose size the caller did not choose (neither ``n_ctx`` nor
    ``n_seq``) does not count, as it may never fill.

    Raises InputFileError, GGUFError, ModelError (missing or contradicting tensors and metadata, types that
    cannot be run, an unknown architecture), ArgumentError, OutOfMemoryError.
    """
    if compute not in COMPUTE_MODES:
        raise ArgumentError(f"compute={compute!r}: must be one of {', '.join(COMPUTE_MODES)}")
    if kv_type not in KV_TYPES:
        raise ArgumentError(f"kv_type={kv_type!r}: must be one of {', '.join(KV_TYPES)}")
    if n_ctx is not None:
        check_count(n_ctx, "n_ctx", 1)
    if n_seq is not None:
        check_count(n_seq, "n_seq", 1, 4096)
    if reproducible and compute == "auto":
        compute = "int8"  # one way of computing at every batch size; types without int8 use fp32
    if reproducible and kernels().NAME == "numpy":
        warnings.warn(
            "reproducible=True needs the C kernels: NumPy's products may differ in the last bits",
            BackendWarning,
            stacklevel=2,
        )
    with open_gguf(path) as file:
        return Model(file, compute=compute, kv_type=kv_type, n_ctx=n_ctx, n_seq=n_seq)


class Model:
    """A model that is ready to run. Its methods may be called from several threads, and after a fork.

    Answers that are asked for at the same time, in whatever way, are computed together. :meth:`close`, or
    leaving a ``with`` block, ends those that run and frees the cache.
    """

    def __init__(
        self,
        file: GGUFFile,
        *,
        compute: str,
        kv_type: str,
        n_ctx: int | None = None,
        n_seq: int | None = None,
    ) -> None:
        self.path = file.path
        if file.byte_order != "<":
            raise ModelError(
                f"{file.path}: big-endian files can be inspected, not run; convert the model again"
            )
        if not file.has_data:
            raise ModelError(f"{file.path}: the file holds a header only, no weights")
        metadata: Mapping[str, Any] = file.metadata
        try:
            architecture = architecture_of_gguf(metadata)
            self.config = architecture.config.from_gguf(metadata)
            architecture.check_tensors(self.config, file.tensors)
        except ModelError as error:
            raise ModelError(f"{file.path}: {error}") from None
        self.architecture = architecture.name
        self._compute, self._kv_type = compute, kv_type
        self._weights = FileWeights(file)
        self._spec = architecture.program(self.config, self._weights)
        self._n_ctx = self.context_length if n_ctx is None else min(int(n_ctx), self.context_length)
        self._n_seq = n_seq
        multiplied = [matrix for op in self._spec.ops for matrix in op.matrices]
        packed = [] if compute == "fp32" else multiplied
        asked = n_ctx is not None or n_seq is not None
        self._memory = self._needs(packed)
        self._memory.check(str(file.path), available_memory(), whole_cache=asked)
        if self._memory.weights >= _WORTH_A_THREAD:
            self._weights.pack(packed, lambda: self._load_tokenizer(metadata).prepare())
        else:
            self._load_tokenizer(metadata)
            self._weights.pack(packed)
        self._program = kernels().Program(self._spec)
        self._lock = threading.Lock()
        self._closed = False
        self._scheduler: Scheduler | None = None
        _models.add(self)

    def _load_tokenizer(self, metadata: Mapping[str, Any]) -> Tokenizer:
        self.tokenizer = load_tokenizer(metadata)
        if self.tokenizer.n_vocab > self.config.vocab_size:
            raise ModelError(
                f"{self.path}: the tokenizer lists {self.tokenizer.n_vocab} tokens, "
                f"the embedding has rows for {self.config.vocab_size}"
            )
        return self.tokenizer

    @property
    def n_vocab(self) -> int:
        """Number of logits per position."""
        return self._spec.n_vocab

    @property
    def memory(self) -> MemoryNeeds:
        """What the model takes: weights, KV cache and buffers."""
        return self._memory

    def _needs(self, packed: list[Any]) -> MemoryNeeds:
        spec = self._spec
        slot = cache_bytes(spec, self._n_ctx, self._kv_type)
        n_seq = self._n_seq or max(1, min(_MOST_SEQUENCES, memory_limit() // 2 // slot))
        # Quantized activations take less than the rows they are made of; scores are four rows a thread.
        widths = [buffer.width * (n_seq if buffer.outputs else 2 * STEP_TOKENS) for buffer in spec.buffers]
        scores = 4 * self._n_ctx * num_threads()
        return MemoryNeeds(self._weights.running_bytes(packed), slot, n_seq, 4 * (sum(widths) + scores))

    @property
    def step_bytes(self) -> int:
        """Bytes of weights that one decode step reads: every matrix it multiplies with, as it is kept.

        Of experts as many as one token takes.
        """
        sizes: dict[int, float] = {}
        for op in self._spec.ops:
            for i, matrix in enumerate(op.matrices):
                share = op.n_used / len(op.experts) if i else 1.0  # experts come after their router
                sizes[id(matrix)] = share * (matrix.packed_bytes() or matrix.data_bytes)
        return round(sum(sizes.values()))

    @property
    def context_length(self) -> int:
        """Most tokens, prompt and answer together, that the model was made for."""
        length: int = self.config.context_length
        return length

    @property
    def n_ctx(self) -> int:
        """Most tokens, prompt and answer together, of an answer: context_length, or what load() was told."""
        return self._n_ctx

    def __repr__(self) -> str:
        sizes = f"{self.n_vocab} tokens, context {self.context_length}"
        return f"<{self.architecture} model {str(self.path)!r}: {sizes}>"

    # ---- life ------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancels the answers that are being made, frees the cache; the model answers no more after that."""
        with self._lock:
            scheduler, self._scheduler, self._closed = self._scheduler, None, True
        if scheduler is not None:
            scheduler.close()

    def _after_fork(self) -> None:
        """In the child: no worker, and nothing that one of the parent's threads may have been changing."""
        _abandoned.append(self._program)  # the fork may have cut a step in two: not even fit to be freed
        self._program = kernels().Program(self._spec)
        self._lock = threading.Lock()
        self._scheduler = None
        self.tokenizer._lock = threading.Lock()

    def _ready_scheduler(self) -> Scheduler:
        with self._lock:
            if self._closed:
                raise ArgumentError("the model was closed; load it again")
            if self._scheduler is None:
                self._scheduler = Scheduler(self._program, self._new_cache(), self._compute)
            return self._scheduler

    def _new_cache(self) -> Any:
        spec, n_ctx, n_seq = self._spec, self._n_ctx, self._memory.n_seq
        try:
            return kernels().KVCache(spec.n_layer, n_seq, n_ctx, spec.n_head_kv, spec.head_dim, self._kv_type)
        except MemoryError:
            raise OutOfMemoryError(
                f"a KV cache of {n_seq} sequences of {n_ctx} positions takes {self._memory.cache} bytes; "
                "load the model with a smaller n_ctx or n_seq"
            ) from None

    # ---- tokens --------------------------------------------------------------------------------------

    def _check_tokens(self, tokens: Any, most: int | None = None) -> array[int]:
        most = self.context_length if most is None else most
        usual = type(tokens) is list and 0 < len(tokens) <= most and set(map(type, tokens)) == {int}
        if usual and min(tokens) >= 0 and max(tokens) < self.n_vocab:
            return array("i", tokens)  # without NumPy
        try:
            given = np.asarray(tokens)
        except (ValueError, OverflowError):  # ragged, or beyond 64 bits
            raise ArgumentError("tokens must be a flat sequence of integers") from None
        if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
            raise ArgumentError("tokens must be a flat sequence of integers")
        if given.size == 0:
            raise ArgumentError(
                "there are no tokens to start from: the prompt is empty and the model has no BOS"
            )
        if given.min() < 0 or given.max() >= self.n_vocab:
            raise ArgumentError(f"token ids must lie in 0 .. {self.n_vocab - 1}")
        if given.size > most:
            raise ContextLengthError(
                f"{given.size} tokens given, but there are {most} positions; shorten the prompt"
            )
        return array("i", given.astype(np.int32).tobytes())

    def _prompt(self, prompt: Any) -> array[int]:
        if isinstance(prompt, str):
            longest = self.tokenizer.longest_token
            if len(prompt) > 4 * longest * self._n_ctx + 1024:  # no use in spending minutes on it
                raise ContextLengthError(
                    f"the prompt has {len(prompt)} characters, more than {self._n_ctx} tokens can stand for"
                )
            tokens = self.tokenizer.encode(prompt)
            if not tokens and self.tokenizer.bos_id is not None:
                tokens = [self.tokenizer.bos_id]  # something must be there to continue from
            return self._check_tokens(tokens, self._n_ctx)
        if isinstance(prompt, (bytes, Mapping)) or not hasattr(prompt, "__len__"):
            raise ArgumentError(f"a prompt must be a str or a list of token ids, not {type(prompt).__name__}")
        return self._check_tokens(prompt, self._n_ctx)

    # ---- logits --------------------------------------------------------------------------------------

    def session(
        self, n_seq: int = 1, n_ctx: int | None = None, spec: ProgramSpec[Any] | None = None
    ) -> Session:
        """A new KV cache for ``n_seq`` sequences of up to ``n_ctx`` (at most context_length) positions.

        ``spec`` is another program over the model's weights that is to run in it.
        """
        n_ctx = self.context_length if n_ctx is None else min(n_ctx, self.context_length)
        program = self._program if spec is None else kernels().Program(spec)
        return Session(program, spec or self._spec, self._compute, self._kv_type, n_seq, n_ctx)

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

    # ---- answers -------------------------------------------------------------------------------------

    def _start(self, prompts: Sequence[Any], as_text: Sequence[bool], options: Options) -> list[Generation]:
        requests = []
        for prompt, text in zip(prompts, as_text, strict=True):
            tokens = self._prompt(prompt)
            bad = [token for token in options.stop_tokens if token >= self.n_vocab]
            if bad:
                raise ArgumentError(f"stop_tokens names token {bad[0]}; ids end at {self.n_vocab - 1}")
            decoder = self.tokenizer.stream_decoder(after=tokens.tolist()) if text or options.stop else None
            requests.append(Request(tokens, options, self.n_vocab, self.tokenizer.end_ids, decoder))
        if options.max_tokens == 0:
            for request in requests:
                request.finish("length")
        else:
            self._ready_scheduler().submit(*requests)
        return [Generation(request, text) for request, text in zip(requests, as_text, strict=True)]

    def submit(self, prompt: str | Sequence[int], **options: Unpack[GenerateOptions]) -> Generation:
        """Starts to continue a prompt and returns at once; the answer is read from the handle.

        A handle can be iterated over, waited for, awaited and cancelled; see :class:`Generation`. Of all that
        runs at the same time each step computes some tokens: answers being written one token each, prompts
        being read an equal share each of what is left, so that a long prompt holds up nobody.

        Raises what :meth:`generate` raises; nothing has been queued then.
        """
        return self._start([prompt], [isinstance(prompt, str)], Options(**options))[0]

    @overload
    def generate(  # type: ignore[overload-overlap]  # a str is a Sequence[str] too; the first fit counts
        self, prompt: str, **options: Unpack[GenerateOptions]
    ) -> str: ...
    @overload
    def generate(self, prompt: Sequence[str], **options: Unpack[GenerateOptions]) -> list[str]: ...
    @overload
    def generate(self, prompt: Sequence[int], **options: Unpack[GenerateOptions]) -> list[int]: ...
    @overload
    def generate(
        self, prompt: Sequence[Sequence[int]], **options: Unpack[GenerateOptions]
    ) -> list[list[int]]: ...

    def generate(
        self,
        prompt: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]],
        **options: Unpack[GenerateOptions],
    ) -> Any:
        """Continues a prompt; the prompt itself is not part of the answer.

        A str gives a str, a list of token ids a list of token ids, and a list of prompts of either kind a
        list with an answer for each, computed together. An answer depends on its own prompt and the options
        only, not on what else is computed: equal prompts with equal seeds get equal answers.

        ``options`` are those of :class:`Options`: ``max_tokens`` (64), ``stop``, ``stop_tokens``, and the
        sampling of :class:`Sampler` (greedy unless ``temperature`` is given).

        An answer that reaches the last position of the context ends there: positions are never reused, as a
        shifted cache would no longer hold what the model computes. :meth:`submit` tells the reason.

        Raises ArgumentError, ContextLengthError (a prompt longer than the context), TokenizerError,
        OutOfMemoryError (no room for the KV cache), ModelError (weights that give NaN).
        """
        if options.get("logprobs") is not None:
            raise ArgumentError("generate() returns no log-probabilities; use submit(...).result().logprobs")
        many = _is_batch(prompt)
        prompts: list[Any] = list(prompt) if many else [prompt]
        as_text = [isinstance(p, str) for p in prompts]
        handles = self._start(prompts, as_text, Options(**options))
        results: list[Any] = []
        try:
            for handle, text in zip(handles, as_text, strict=True):
                done = handle.result()
                results.append(done.text if text else done.tokens)
        finally:  # after Ctrl-C, or the error of one, the others need not go on
            for handle in handles:
                handle.cancel()
        return results if many else results[0]

    def stream(self, prompt: str | Sequence[int], **options: Unpack[GenerateOptions]) -> Iterator[str]:
        """Continues a prompt and yields the text piece by piece, as soon as whole characters are there.

        The pieces join to what :meth:`generate` gives for a str. Arguments and errors are those of generate;
        they are checked when the first piece is asked for. Closing the iterator cancels the rest.
        """
        if options.get("logprobs") is not None:
            raise ArgumentError("stream() yields text only; use submit(...) for log-probabilities")
        handle = self._start([prompt], [True], Options(**options))[0]
        try:
            yield from handle
        finally:
            handle.cancel()

    # ---- chat ----------------------------------------------------------------------------------------

    def chat_tokens(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The token ids of a conversation, by the model's own chat template, up to where its answer begins.

        ``messages`` are ``{"role": ..., "content": ...}``. The template comes with the file and is not
        trusted: it runs in a sandbox, in a process of its own, with bounds on time, memory and output.
        Special tokens are recognized in the result, wherever they stand, as every chat template needs.

        Raises ArgumentError for messages that are none, ModelError for a file without a template or with one
        that fails or exceeds its bounds, MissingDependencyError without jinja2.
        """
        tokenizer = self.tokenizer
        if tokenizer.chat_template is None:
            raise ModelError(
                f"{self.path}: the file has no chat template; use generate() with a plain prompt"
            )
        special = {
            name: "" if token_id is None else tokenizer.token(token_id)
            for name, token_id in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id))
        }
        tokens = tokenizer.encode(render_chat(tokenizer.chat_template, messages, special), add_special=False)
        if tokenizer.add_bos and tokenizer.bos_id is not None and tokens[:1] != [tokenizer.bos_id]:
            tokens.insert(0, tokenizer.bos_id)
        return tokens

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Unpack[GenerateOptions]) -> str:
        """The model's answer to a conversation. :meth:`submit_chat` gives it piece by piece.

        Raises what :meth:`chat_tokens` and :meth:`generate` raise.
        """
        return "".join(self.stream(self.chat_tokens(messages), **options))

    def submit_chat(
        self, messages: Sequence[Mapping[str, Any]], **options: Unpack[GenerateOptions]
    ) -> Generation:
        """Starts to answer a conversation and returns at once; the handle gives the answer's text.

        Raises what :meth:`chat_tokens` and :meth:`generate` raise.
        """
        return self._start([self.chat_tokens(messages)], [True], Options(**options))[0]


def _is_batch(prompt: Any) -> bool:
    """Whether ``prompt`` is several prompts rather than one. An empty list is one without tokens."""
    if isinstance(prompt, (str, bytes, Mapping)) or not hasattr(prompt, "__getitem__"):
        return False
    return len(prompt) > 0 and (isinstance(prompt[0], str) or hasattr(prompt[0], "__len__"))


_models: WeakSet[Model] = WeakSet()
_abandoned: list[Any] = []


def _after_fork() -> None:
    for model in list(_models):
        model._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
