"""Coverage-guided mutation of GGUF files: ``python tests/fuzz/fuzz_gguf.py --seconds 60``.

Files are grown by the rules of the format with wrong fields here and there, or mutated, and put through
opening, reading, verifying and editing. An input that takes a way through azquant.gguf or azquant.evaluate
not seen before joins the corpus. A finding is anything but a valid object or an exception of azquant's own:
another exception, a warning, a crash, more than two seconds, memory beyond the limit, an output left behind
after a refusal.

The work runs in a child process under RLIMIT_AS and an alarm; a finding's input is saved to ``--findings``
and the exit code is 1. ``--seed`` repeats a run up to the speed of the machine.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import signal
import struct
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from gguf_builder import (  # noqa: E402  (the path comes first)
    ARRAY,
    BOOL,
    F32,
    F64,
    I32,
    STRING,
    U8,
    U16,
    U32,
    U64,
    array,
    gguf,
    info,
    pair,
    text,
)

SECONDS = 2
MEMORY = 300_000_000
LARGEST = 1 << 16
WATCHED = (str(ROOT / "azquant/gguf"), str(ROOT / "azquant/evaluate"))
NUMBERS = [0, 1, 2, 3, 4, 7, 8, 9, 13, 31, 32, 33, 42, 43, 63, 64, 255, 256, 65535, 65536]
NUMBERS += [2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1]
WORDS = [b"general.alignment", b"general.architecture", b"split.count", b"split.no", b"gpt2", b"llama"]
WORDS += [
    b"tokenizer.ggml.tokens",
    b"tokenizer.ggml.bos_token_id",
    b"token_embd.weight",
    b"GGUF",
    b"\xff\xc3",
]


def seeds() -> list[bytes]:
    """Small files that between them use everything the format has."""
    result = []
    for order in "<>":

        def number(letter: str, value: float, order: str = order) -> bytes:
            return struct.pack(order + letter, value)

        words = b"".join(text(word, order) for word in ("a", "", "ə"))
        scalars = [
            pair("general.architecture", STRING, text("gpt2", order), order),
            pair("general.alignment", U32, number("I", 64), order),
            pair("a", U8, b"\7", order),
            pair("b", BOOL, b"\1", order),
            pair("c", F64, number("d", 0.5), order),
            pair("d", U64, number("Q", 2**40), order),
            pair("gpt2.block_count", U32, number("I", 1), order),
            pair("gpt2.embedding_length", U32, number("I", 32), order),
            pair("tokenizer.ggml.bos_token_id", U32, number("I", 1), order),
        ]
        arrays = [
            pair("tokenizer.ggml.tokens", ARRAY, array(STRING, 3, words, order), order),
            pair("tokenizer.ggml.scores", ARRAY, array(F32, 3, number("f", 1) * 3, order), order),
            pair("tokenizer.ggml.token_type", ARRAY, array(I32, 3, number("i", 6) * 3, order), order),
            pair(
                "n",
                ARRAY,
                array(
                    ARRAY, 2, array(U8, 1, b"\1", order) + array(STRING, 1, text("x", order), order), order
                ),
                order,
            ),
        ]
        infos = [
            info("token_embd.weight", [32, 3], 2, 0, order),
            info("blk.0.ffn_up.weight", [4], 0, 64, order),
            info("k", [256], 14, 128, order),
        ]
        result.append(
            gguf(scalars + arrays, infos, bytes(range(256)) + bytes(128), order=order, alignment=64)
        )
        result.append(gguf(arrays, [], b"", order=order, version=2))
        result.append(
            gguf([], [info("a", [8], 0, 0, order), info("b", [2, 2], 1, 32, order)], bytes(64), order=order)
        )
    split = [
        pair("split.no", U16, bytes(2)),
        pair("split.count", U16, b"\1\0"),
        pair("split.tensors.count", I32, b"\1\0\0\0"),
    ]
    result.append(gguf(split, [info("a", [32], 8)], bytes(64)))
    result.append(
        gguf([], [info(f"t{kind}", [256], kind, 2048 * kind) for kind in (0, 1, 2, 3, 30)], bytes(1 << 16))
    )
    deep = array(ARRAY, 1, b"") * 3000 + array(U8, 0, b"")
    result.append(gguf([pair("deep", ARRAY, deep)]))
    return [content[:LARGEST] for content in result]


def grow(rng: random.Random) -> bytes:
    """A file put together anew, in which each field is now and then one that a sound file would not have."""
    order = "<" if rng.random() < 0.8 else ">"

    def odd(usual: int, bits: int = 64, often: float = 0.06) -> int:
        if rng.random() > often:
            return usual % (1 << bits)
        return (rng.choice(NUMBERS) + rng.choice((0, 0, 1, -1))) % (1 << bits)

    def word() -> bytes:
        return rng.choice(WORDS) if rng.random() < 0.7 else rng.randbytes(rng.randrange(9))

    def string() -> bytes:
        content = word()
        return text(content, order, odd(len(content), often=0.02))

    def value(kind: int, depth: int = 0) -> bytes:
        if kind == STRING:
            return string()
        if kind == ARRAY:
            inner = rng.choice((U8, I32, F32, STRING, BOOL, U64, ARRAY if depth < 9 else U8))
            count = rng.choice((0, 1, 2, 3, 3, 70))
            items = b"".join(value(inner, depth + 1) for _ in range(min(count, 3 if depth else 70)))
            count = min(count, 3) if depth else count
            return array(odd(inner, 32, 0.02), odd(count, often=0.04), items, order)
        size = {U8: 1, BOOL: 1, U16: 2, U32: 4, I32: 4, F32: 4, U64: 8, F64: 8}[kind]
        return odd(rng.choice((0, 1, 3, 32, 64)), 8 * size, 0.3).to_bytes(
            size, "little" if order == "<" else "big"
        )

    known = {
        b"general.alignment": U32,
        b"general.architecture": STRING,
        b"gpt2.block_count": U32,
        b"gpt2.embedding_length": U32,
        b"gpt2.attention.head_count": U32,
        b"tokenizer.ggml.tokens": ARRAY,
        b"tokenizer.ggml.token_type": ARRAY,
        b"tokenizer.ggml.bos_token_id": U32,
        b"split.count": U16,
        b"split.no": U16,
    }
    pairs = []
    for _ in range(rng.randrange(7)):
        if rng.random() < 0.7:
            key, kind = rng.choice(list(known.items()))
        else:
            key, kind = (
                rng.randbytes(rng.randrange(1, 5)).hex().encode(),
                rng.choice((U8, BOOL, F64, STRING, ARRAY)),
            )
        if rng.random() < 0.04:
            kind = rng.choice((U8, U16, U32, U64, I32, F32, STRING, ARRAY, BOOL))
        pairs.append(
            text(key, order, odd(len(key), often=0.01))
            + struct.pack(order + "I", odd(kind, 32, 0.01))
            + value(kind)
        )
    infos, at = [], 0
    for index in range(rng.randrange(5)):
        kind = rng.choice((0, 0, 1, 2, 8, 14, 24, 30, 39, 42))
        dims = [rng.choice((0, 1, 2, 32, 64, 256)) for _ in range(rng.randrange(5))]
        name = rng.choice((b"t%d" % index, b"token_embd.weight", b"blk.0.ffn_up.weight"))
        infos.append(
            info(
                name,
                [odd(d) for d in dims],
                odd(kind, 32, 0.04),
                odd(at, often=0.06),
                order,
                odd(len(dims), 32) if rng.random() < 0.05 else None,
            )
        )
        at += rng.choice((32, 64, 512, 4096))
    return gguf(
        pairs,
        infos,
        rng.randbytes(rng.choice((0, 64, 4096, 8192))),
        order=order,
        version=odd(rng.choice((2, 3)), 32, 0.02),
        n_pairs=odd(len(pairs), often=0.02),
        n_infos=odd(len(infos), often=0.02),
        alignment=rng.choice((32, 32, 64, 1)),
    )[:LARGEST]


def mutate(content: bytes, corpus: list[bytes], rng: random.Random) -> bytes:
    """One to four changes."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(data) + 1)
        if rng.random() < 0.6:
            at = rng.randrange(min(len(data), 700) + 1)  # the header, mostly
        kind = rng.randrange(8)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(data):
            data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif kind in (2, 3):
            size = rng.choice((2, 4, 8))
            value = rng.choice(NUMBERS) + rng.choice((0, 0, 0, 1, -1))
            data[at : at + size] = (value % (1 << 8 * size)).to_bytes(size, rng.choice(("little", "big")))
        elif kind == 4:
            del data[at : at + rng.choice((1, 4, 8, 16, 64))]
        elif kind == 5:
            word = rng.choice(WORDS)
            data[at:at] = rng.choice((word, text(word), bytes(rng.randrange(1, 40))))
        elif kind == 6:
            other = rng.choice(corpus)
            start = rng.randrange(len(other) + 1)
            data[at : at + rng.choice((0, 8, 32))] = other[start : start + rng.choice((4, 12, 40, 200))]
        elif rng.random() < 0.3:
            del data[at:]
    return bytes(data[:LARGEST])


class Coverage:
    """Which lines followed which, in the watched folders, by settrace: pairs of lines say more than lines."""

    def __init__(self) -> None:
        self.seen: set[tuple[int, int, int]] = set()
        self._new = False
        self._codes: dict[Any, bool] = {}

    def run(self, action: Callable[[], None]) -> bool:
        """Whether ``action`` went a way that none before it went. What it raises passes through."""
        self._new = False
        sys.settrace(self._enter)
        try:
            action()
        finally:
            sys.settrace(None)
        return self._new

    @property
    def new(self) -> bool:
        """Whether the last run went a new way."""
        return self._new

    def _enter(self, frame: FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        watched = self._codes.get(code)
        if watched is None:
            watched = self._codes[code] = code.co_filename.startswith(WATCHED)
        if not watched:
            return None
        last = 0
        name = id(code)

        def step(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal last
            way = (name, last, frame.f_lineno)
            if way not in self.seen:
                self.seen.add(way)
                self._new = True
            last = frame.f_lineno
            return step

        return step


def exercise(path: Path, out: Path) -> None:
    """What a user could do with a file. AzquantError is an answer; anything else is a finding."""
    from azquant.errors import AzquantError
    from azquant.evaluate import verify
    from azquant.gguf import GGUFArray, edit_gguf, keys, open_gguf

    try:
        with open_gguf(path, join=False) as file:
            for value in file.metadata.values():
                if isinstance(value, GGUFArray):
                    assert len(value.tolist()) == len(value)
            file.copy_metadata()
            for tensor in file.tensors.values():
                if file.has_data or not tensor.nbytes:
                    assert tensor.raw.size == tensor.nbytes
    except AzquantError:
        pass
    for attempt in (
        lambda: verify(path, path),
        lambda: edit_gguf(path, out, values={"x": keys.u8(1)}, verify=False),
    ):
        try:
            attempt()
        except AzquantError:
            assert not out.exists(), "a refused edit left an output"
    out.unlink(missing_ok=True)


def fuzz(folder: Path, seconds: float, seed: int, findings: Path) -> int:
    """The child: mutates until the time is over. 0, or 1 with the first finding's input saved."""
    import azquant
    import azquant.evaluate
    from azquant._backend import kernels

    warnings.simplefilter("error")
    kernels()
    azquant.set_num_threads(1)
    os.fsync = lambda descriptor: None  # waiting for the disk would be most of the time
    rng = random.Random(seed)
    corpus = seeds()
    coverage = Coverage()
    path, out = folder / "input.gguf", folder / "out.gguf"
    signal.signal(signal.SIGALRM, _too_long)
    now = (
        int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        if os.name == "posix"
        else 0
    )
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))
    waiting = list(corpus)
    began, runs = time.monotonic(), 0
    while waiting or time.monotonic() - began < seconds:
        if waiting:
            content = waiting.pop()
        else:
            content = grow(rng) if rng.random() < 0.5 else rng.choice(corpus)
            if rng.random() < 0.6:
                content = mutate(content, corpus, rng)
        path.write_bytes(content)
        signal.setitimer(signal.ITIMER_REAL, 5 * SECONDS)
        used = time.process_time()
        try:
            coverage.run(lambda: exercise(path, out))
            used = time.process_time() - used
            if used > SECONDS:
                raise TimeoutError(f"{used:.1f} s of processor time, tracing included")
        except BaseException as error:
            sys.settrace(None)
            signal.setitimer(signal.ITIMER_REAL, 0)
            if isinstance(error, KeyboardInterrupt):
                raise
            _save(findings, content)
            traceback.print_exc()
            return 1
        signal.setitimer(signal.ITIMER_REAL, 0)
        runs += 1
        if coverage.new and len(corpus) < 5000:
            corpus.append(content)
    print(f"{runs} inputs, a corpus of {len(corpus)}, {len(coverage.seen)} ways through the code; no finding")
    return 0


def _too_long(signum: int, frame: FrameType | None) -> None:
    raise TimeoutError(f"more than {5 * SECONDS} s")


def _save(findings: Path, content: bytes) -> None:
    findings.mkdir(parents=True, exist_ok=True)
    place = findings / f"finding-{abs(hash(content)):016x}.gguf"
    place.write_bytes(content)
    print(f"finding: the input is {place}", file=sys.stderr)


def main() -> int:
    """Runs :func:`fuzz` in a child, so that a crash is a finding too."""
    import tempfile

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="how long (default: 60)")
    parser.add_argument("--seed", type=int, default=None, help="of the random numbers (default: the clock)")
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"), help="folder of inputs found")
    options = parser.parse_args()
    seed = time.time_ns() % (1 << 32) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = fuzz(folder, options.seconds, seed, options.findings)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            _save(options.findings, (folder / "input.gguf").read_bytes())
            print(f"the process ended by {signal.Signals(os.WTERMSIG(status)).name}", file=sys.stderr)
            return 1
        return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    sys.exit(main())
