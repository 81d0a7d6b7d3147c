"""Programs: the flat list of ops that an architecture builds once and both executors run.

A :class:`ProgramBuilder` names buffers (``width`` floats for every token of a step, or for every row whose
logits are asked for) and appends ops over them. ``csrc/azq.h`` says what each op computes; the C executor
and the NumPy executor in ``azquant._fallback_program`` run the same list.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeAlias, TypeVar

from azquant._lazy import np

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats: TypeAlias = npt.NDArray[np.float32] | array[float]

__all__ = ["Buffer", "Op", "ProgramBuilder", "ProgramSpec", "Ref", "StepArrays", "as_indices", "zeros"]


class MatrixLike(Protocol):
    """What the builder needs to know of a backend's matrix."""

    @property
    def shape(self) -> tuple[int, int]:
        """(n, k)"""
        ...


M = TypeVar("M", bound=Any)


@dataclass(frozen=True)
class Buffer:
    """``width`` floats a row; rows are tokens, or with ``outputs`` the rows whose logits are asked for."""

    width: int
    outputs: bool = False


@dataclass(frozen=True)
class Ref:
    """Columns of a buffer, from ``col`` on."""

    buffer: int
    col: int = 0

    def at(self, col: int) -> Ref:
        """The same buffer, ``col`` columns further right."""
        return Ref(self.buffer, self.col + col)


@dataclass(frozen=True)
class Op(Generic[M]):
    """One op; the fields that its kind does not use keep their defaults."""

    kind: str
    out: Ref
    width: int
    a: Ref | None = None
    b: Ref | None = None
    w: M | None = None
    w2: M | None = None
    vec0: Floats | None = None
    vec1: Floats | None = None
    layer: int = 0
    n_head: int = 0
    n_head_kv: int = 0
    head_dim: int = 0
    n_rot: int = 0
    rope_neox: bool = False
    activation: str | None = None
    window: int = 0
    eps: float = 0.0
    scale: float = 1.0
    softcap: float = 0.0
    experts: tuple[tuple[M, M, M], ...] = ()
    n_used: int = 0
    work: Ref | None = None

    @property
    def matrices(self) -> tuple[M, ...]:
        """Every matrix that it multiplies by; an op with experts multiplies a token by some of them."""
        if self.kind not in ("linear", "experts") or self.w is None:
            return ()
        return (self.w, *chain.from_iterable(self.experts))


@dataclass(frozen=True)
class ProgramSpec(Generic[M]):
    """A finished program and the shape of the KV cache it needs."""

    ops: tuple[Op[M], ...]
    buffers: tuple[Buffer, ...]
    n_vocab: int
    n_layer: int
    n_head_kv: int
    head_dim: int


@dataclass
class ProgramBuilder(Generic[M]):
    """Collects buffers and ops. Every method appends one op; ``width`` follows from the weights."""

    ops: list[Op[M]] = field(default_factory=list)
    buffers: list[Buffer] = field(default_factory=list)
    _works: dict[int, Ref] = field(default_factory=dict, init=False, repr=False)
    """By width: buffers that ops with experts use one after the other."""

    def buffer(self, width: int, *, outputs: bool = False) -> Ref:
        """A new buffer."""
        self.buffers.append(Buffer(width, outputs))
        return Ref(len(self.buffers) - 1)

    def embed(self, out: Ref, table: M, positions: M | None = None, *, scale: float = 1.0) -> None:
        """out = table[token] * scale (+ positions[position])."""
        self.ops.append(Op("embed", out, table.shape[1], w=table, w2=positions, scale=scale))

    def layer_norm(self, out: Ref, a: Ref, weight: Floats, bias: Floats | None, eps: float) -> None:
        """out = (a - mean) / sqrt(variance + eps) * weight + bias."""
        self.ops.append(Op("layer_norm", out, len(weight), a=a, vec0=weight, vec1=bias, eps=eps))

    def rms_norm(self, out: Ref, a: Ref, weight: Floats, eps: float, *, n_head: int = 0) -> None:
        """out = a / sqrt(mean(a²) + eps) * weight; with ``n_head`` each of so many heads by itself."""
        width = len(weight) * max(n_head, 1)
        self.ops.append(Op("rms_norm", out, width, a=a, vec0=weight, n_head=n_head, eps=eps))

    def linear(
        self,
        out: Ref,
        a: Ref,
        w: M,
        bias: Floats | None = None,
        *,
        activation: str | None = None,
        residual: Ref | None = None,
    ) -> None:
        """out = activation(a · wᵀ + bias) + residual."""
        self.ops.append(Op("linear", out, w.shape[0], a=a, b=residual, w=w, vec0=bias, activation=activation))

    def rope(
        self,
        x: Ref,
        n_head: int,
        head_dim: int,
        frequencies: Floats,
        *,
        neox: bool = False,
        scale: float = 1.0,
    ) -> None:
        """Rotates the first 2 * len(frequencies) dimensions of n_head heads of x in place; scales them."""
        self.ops.append(
            Op(
                "rope",
                x,
                n_head * head_dim,
                vec0=frequencies,
                n_head=n_head,
                head_dim=head_dim,
                n_rot=2 * len(frequencies),
                rope_neox=neox,
                scale=scale,
            )
        )

    def attention(
        self,
        out: Ref,
        qkv: Ref,
        layer: int,
        n_head: int,
        n_head_kv: int,
        head_dim: int,
        scale: float,
        *,
        window: int = 0,
        softcap: float = 0.0,
    ) -> None:
        """Causal attention over the layer's cache; qkv holds queries, keys and values side by side.

        ``window`` > 0: a token sees so many positions, its own included. ``softcap`` > 0: a score s becomes
        softcap · tanh(s / softcap) before the softmax.
        """
        self.ops.append(
            Op(
                "attention",
                out,
                n_head * head_dim,
                a=qkv,
                layer=layer,
                n_head=n_head,
                n_head_kv=n_head_kv,
                head_dim=head_dim,
                scale=scale,
                window=window,
                softcap=softcap,
            )
        )

    def glu(self, out: Ref, gate: Ref, up: Ref, width: int, activation: str) -> None:
        """out = activation(gate) * up."""
        self.ops.append(Op("glu", out, width, a=gate, b=up, activation=activation))

    def experts(
        self,
        out: Ref,
        a: Ref,
        router: M,
        experts: Sequence[tuple[M, M, M]],
        n_used: int,
        activation: str,
        *,
        residual: Ref | None = None,
    ) -> None:
        """out = the sum of share · down · (activation(gate · a) * (up · a)) over its experts + residual.

        A token's experts are the ``n_used`` that ``router`` rates highest, their shares the softmax of their
        ratings. ``experts`` has gate, up and down of each.
        """
        gate, _, down = experts[0]
        width = len(experts) + n_used * (2 * gate.shape[0] + max(router.shape[1], down.shape[0]))
        work = self._works.get(width) or self._works.setdefault(width, self.buffer(width))
        self.ops.append(
            Op(
                "experts",
                out,
                down.shape[0],
                a=a,
                b=residual,
                w=router,
                experts=tuple(experts),
                n_used=n_used,
                work=work,
                activation=activation,
            )
        )

    def select(self, out: Ref, a: Ref, width: int) -> None:
        """out = the rows of a whose logits are asked for."""
        self.ops.append(Op("select", out, width, a=a))

    def add(self, out: Ref, a: Ref, b: Ref, width: int, *, scale: float = 1.0) -> None:
        """out = a * scale + b."""
        self.ops.append(Op("add", out, width, a=a, b=b, scale=scale))

    def softcap(self, out: Ref, a: Ref, width: int, cap: float) -> None:
        """out = cap * tanh(a / cap)."""
        self.ops.append(Op("softcap", out, width, a=a, softcap=cap))

    def build(self, *, n_layer: int, n_head_kv: int, head_dim: int) -> ProgramSpec[M]:
        """The finished program; its last op makes the logits."""
        n_vocab = self.ops[-1].width
        return ProgramSpec(tuple(self.ops), tuple(self.buffers), n_vocab, n_layer, n_head_kv, head_dim)


class StepArrays:
    """What steps read and write, used by one step after the other; see ``Program.run``.

    ``tokens``, ``sequence``, ``position`` (tokens,) and ``out_rows`` (outputs,) are filled in before a step.
    ``logits`` (outputs, n_vocab) and, where asked for, ``likeliest`` (outputs,), the first of the largest
    logits of each row, hold what it made, until the next one. Every array may be longer than a step needs.
    """

    def __init__(self, n_vocab: int) -> None:
        self._n_vocab = n_vocab
        self.tokens, self.sequence, self.position = zeros(0), zeros(0), zeros(0)
        self.out_rows, self.likeliest = zeros(0), zeros(0)
        self._numbers = memoryview(bytearray()).cast("f")
        self.pointers: Any = None
        """The backend's; forgotten when an array is replaced."""

    def reserve(self, n_tokens: int, n_out: int) -> None:
        """Makes room. What the arrays held is lost where they grow."""
        if n_tokens > len(self.tokens):
            self.tokens, self.sequence, self.position = (zeros(n_tokens) for _ in range(3))
            self.pointers = None
        if n_out > len(self.out_rows):
            self.out_rows, self.likeliest = zeros(n_out), zeros(n_out)
            self._numbers = memoryview(bytearray(4 * n_out * self._n_vocab)).cast("f")
            self.pointers = None

    @property
    def logits(self) -> npt.NDArray[np.float32]:
        """(outputs, n_vocab), as an array."""
        numbers: npt.NDArray[np.float32] = np.asarray(self._numbers)
        return numbers.reshape(-1, self._n_vocab)

    @property
    def numbers(self) -> memoryview[float]:
        """All logits, row after row."""
        return self._numbers

    def row(self, number: int) -> memoryview[float]:
        """The logits of one output."""
        return self._numbers[number * self._n_vocab : (number + 1) * self._n_vocab]


def zeros(n: int) -> array[int]:
    """``n`` int32."""
    return array("i", bytes(4 * n))


def as_indices(values: Any) -> npt.NDArray[np.int32]:
    """Tokens, positions and the like as int32 (contiguous). What int32 cannot hold becomes -1 or its largest
    number: out of range as well, never another index.
    """
    given = np.asarray(values)
    if given.dtype != np.int32:
        given = np.clip(given, -1, np.iinfo(np.int32).max)
    return np.ascontiguousarray(given, dtype=np.int32)
