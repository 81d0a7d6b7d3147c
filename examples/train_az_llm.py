#!/usr/bin/env python3
"""Train a tiny Azerbaijani language model on a CPU and save it as a Hugging Face checkpoint.

    python train_az_llm.py TEXT [TEXT ...] --out my_az_llm

The script goes the whole way from plain text to a checkpoint folder, one function a station:

    texts --read_texts--> training and held-out text --train_tokenizer--> byte-level BPE
          --encode--> token ids --train--> GPT-2 weights --save--> config.json, model.safetensors,
                                                                   tokenizer.json and their companions

The defaults make a model of about one million parameters that trains in some eight minutes on one idle core.
It learns the endings, the common words and the look of a sentence; half a megabyte of text is far too
little to learn sense. `azquant convert my_az_llm my-az-llm-q4_0.gguf --type q4_0` then makes a 4-bit GGUF
file of the folder.

Needs torch, transformers and tokenizers. The same texts, options, seed, thread count and library versions
give the same checkpoint (with --steps; --minutes depends on the machine's speed). Ctrl-C stops early and
still saves.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

END_OF_TEXT = "<|endoftext|>"  # stands between documents; GPT-2's one special token
DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16}
EVALUATIONS = 40  # how often a run looks at the held-out text
PROMPT = "Azərbaycan"


# ---- 1. Text -----------------------------------------------------------------------------------------------


def is_prose(piece: str) -> bool:
    """Whether a piece of text reads like a sentence, and not like a heading, a table cell or code.

    It ends as sentences do, has four words or more, and nearly all of it is letters. Rough rules, but they
    clean half a megabyte in a blink.
    """
    letters = sum(character.isalpha() or character == " " for character in piece)
    ends_well = piece.rstrip("\"'”’»)]").endswith((".", "!", "?", "…"))
    return ends_well and len(piece.split(" ")) >= 4 and letters >= 0.85 * len(piece)


def keep_prose(text: str) -> str:
    """Keep the prose of `text`, one piece a line, and its blank lines, which divide documents.

    Two spaces or a tab stand between the cells of a table that has lost its lines, so they end a piece too.
    """
    kept = []
    for line in text.split("\n"):
        pieces = [piece.strip() for piece in re.split(r" {2,}|\t", line.strip())]
        kept += [piece for piece in pieces if is_prose(piece)] if any(pieces) else [""]
    return "\n".join(kept)


def read_texts(paths: Sequence[Path], held_out: float, every_line: bool) -> tuple[list[str], list[str]]:
    """Read UTF-8 files, keep their prose (or `every_line`), and hold out the last part of each.

    `held_out` is that part's fraction. It is the tail of every file, not the tail of all text, so that both
    parts hold the same mixture. (Lines drawn at random would leave half of a story in each part, and the
    held-out loss would flatter the model.)

    Returns:
        (training texts, held-out texts), one of each per file.

    Raises:
        ValueError: a file is not UTF-8, or has too little prose to be cut in two.
    """
    training, held = [], []
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: byte {error.start} cannot be decoded") from error
        text = (text if every_line else keep_prose(text)).strip()
        cut = text.find("\n", int(len(text) * (1 - held_out)))
        if cut <= 0:
            raise ValueError(f"{path} has too little prose to hold out {held_out:.0%} (see --every-line)")
        training.append(text[:cut].strip())
        held.append(text[cut:].strip())
    return training, held


# ---- 2. Tokenizer ------------------------------------------------------------------------------------------


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer, GPT-2's kind: it can encode any text, because it knows every byte.

    The pre-tokenizer cuts text into words by GPT-2's regular expression, and merges never cross a cut. All
    256 byte symbols are in the vocabulary, whether the texts hold them or not.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,  # a pair seen once is not a pattern
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> torch.Tensor:
    """Encode texts to one stream of token ids, shape (tokens,), int64. A blank line ends a document."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    ids = [end]
    for text in texts:
        for document in filter(None, map(str.strip, text.split("\n\n"))):
            ids += [*tokenizer.encode(document).ids, end]
    return torch.tensor(ids)


# ---- 3. Model ----------------------------------------------------------------------------------------------


def build_model(options: argparse.Namespace, vocab_size: int, end: int) -> GPT2LMHeadModel:
    """Make a GPT-2 with random weights whose output head is the token embedding itself ("tied").

    `end` is the id of END_OF_TEXT. It must be given: GPT2Config's own default, 50256, is the id in OpenAI's
    vocabulary and lies outside this one.
    """
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=options.context,
        n_embd=options.n_embd,
        n_layer=options.n_layer,
        n_head=options.n_head,
        embd_pdrop=options.dropout,
        resid_pdrop=options.dropout,
        # GPT-2's 0.02 suits its width of 768. The same at 128 would start out with signals far too weak: 1200
        # steps then end at a held-out loss of 5.13, with the scaled value at 4.93.
        initializer_range=0.02 * math.sqrt(768 / options.n_embd),
        # Dropping attention weights slowed learning badly at this size: held-out loss 5.83 against 5.37 after
        # one minute of training, all else alike.
        attn_pdrop=0.0,
        bos_token_id=end,
        eos_token_id=end,
        tie_word_embeddings=True,
    )
    return GPT2LMHeadModel(config)


def next_token_loss(model: GPT2LMHeadModel, windows: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy, in nats a token, of guessing windows[:, 1:] from what stands before each token.

    `windows` are token ids, shape (batch, length).
    """
    logits = model(windows[:, :-1], use_cache=False).logits  # (batch, length - 1, vocab)
    return functional.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: GPT2LMHeadModel, ids: torch.Tensor) -> float:
    """Mean loss (nats a token) over `ids`, shape (tokens,), read in windows of the model's context."""
    model.eval()
    context, total = model.config.n_positions, 0.0
    for start in range(0, len(ids) - 1, context):
        window = ids[start : start + context + 1].unsqueeze(0)
        total += next_token_loss(model, window).item() * (window.shape[1] - 1)
    model.train()
    return total / (len(ids) - 1)


# ---- 4. Training -------------------------------------------------------------------------------------------


class StopButton:
    """Ctrl-C as a flag, so that the step under way is finished. A second Ctrl-C interrupts as usual."""

    pressed = False

    def __enter__(self) -> StopButton:
        self._before = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _press(self, *_: object) -> None:
        self.pressed = True
        signal.signal(signal.SIGINT, self._before)


def make_optimizer(model: GPT2LMHeadModel, weight_decay: float) -> torch.optim.AdamW:
    """AdamW that decays the matrices alone: pulling biases and norms towards zero helps nothing."""
    parameters = list(model.parameters())
    return torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.99),
    )


def learning_rate(done: float, peak: float, warmup: float = 0.04, floor: float = 0.02) -> float:
    """The rate after the fraction `done` of the run: a climb to `peak`, then a cosine to floor * peak."""
    if done < warmup:
        height = done / warmup
    else:
        height = 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))
    return peak * (floor + (1 - floor) * height)


def line_starts(tokenizer: Tokenizer, ids: torch.Tensor, length: int) -> torch.Tensor:
    """Where in `ids` a line begins that has `length` tokens from there on; shape (lines,), int64."""
    ends = torch.tensor([tokenizer.token_to_id(END_OF_TEXT), *tokenizer.encode("\n").ids])
    starts = 1 + torch.isin(ids, ends).nonzero().flatten()
    return starts[starts <= len(ids) - length]


def draw_batch(
    ids: torch.Tensor, starts: torch.Tensor, length: int, size: int, generator: torch.Generator
) -> torch.Tensor:
    """Cut `size` windows of `length` tokens out of `ids`; returns shape (size, length).

    Half of them begin anywhere, which shows the model every token at every position. The others begin with a
    line, as a prompt does: without them the model would take a prompt for the middle of a sentence.
    """
    anywhere = torch.randint(len(ids) - length + 1, (size,), generator=generator)
    if len(starts):
        at_line = starts[torch.randint(len(starts), (size,), generator=generator)]
        coin = torch.rand(size, generator=generator) < 0.5
        anywhere = torch.where(coin, at_line, anywhere)
    return ids[anywhere.unsqueeze(1) + torch.arange(length)]


def train(
    model: GPT2LMHeadModel,
    training: torch.Tensor,
    starts: torch.Tensor,
    held: torch.Tensor,
    options: argparse.Namespace,
) -> tuple[float, bool]:
    """Train `model` in place and leave in it the weights that did best on the held-out tokens.

    `training` and `held` are token ids; `starts` says where lines begin in `training`.

    A model this large can learn a text this small by heart, after which its training loss still falls but the
    held-out loss rises; keeping the best weights is the guard against that.

    Returns:
        (best held-out loss in nats a token, whether Ctrl-C ended the run early).

    Raises:
        ValueError: the loss became infinite or NaN before there were any weights to keep.
    """
    optimizer = make_optimizer(model, options.weight_decay)
    generator = torch.Generator().manual_seed(options.seed)
    best_loss, best_weights = math.inf, {}
    step, done, average = 0, 0.0, math.nan
    begin = time.monotonic()
    model.train()
    with StopButton() as stop:
        print("training (Ctrl-C stops early and saves)", flush=True)
        stopped = False
        while done < 1 and not stopped:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(done, options.learning_rate)
            windows = draw_batch(training, starts, options.context + 1, options.batch_size, generator)
            loss = next_token_loss(model, windows)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

            average = loss.item() if step == 0 else 0.98 * average + 0.02 * loss.item()
            step, before = step + 1, done
            seconds = time.monotonic() - begin
            done = min(1.0, seconds / (60 * options.minutes) if options.minutes else step / options.steps)
            stopped = stop.pressed  # read once a step: it can change at any moment
            if int(done * EVALUATIONS) == int(before * EVALUATIONS) and not stopped:
                continue
            held_loss = evaluate(model, held)
            mark = ""
            if held_loss < best_loss:
                best_loss, mark = held_loss, "  *"
                best_weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            epochs = step * windows[:, 1:].numel() / len(training)
            print(
                f"{done:4.0%}  step {step}  {epochs:.1f} epochs  {seconds:.0f} s  "
                f"loss {average:.3f}  held-out {held_loss:.4f}{mark}",
                flush=True,
            )
    if not best_weights:
        raise ValueError("training diverged: the loss is not a number; try a lower --learning-rate")
    model.load_state_dict(best_weights)
    return best_loss, stopped


# ---- 5. Saving, and a look at the result -------------------------------------------------------------------


def save(model: GPT2LMHeadModel, tokenizer: Tokenizer, folder: Path) -> PreTrainedTokenizerFast:
    """Write model and tokenizer as transformers does; returns the tokenizer in transformers' wrapping."""
    model.generation_config.pad_token_id = model.config.eos_token_id  # generate() warns where there is none
    model.save_pretrained(folder)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=model.config.n_positions,
        clean_up_tokenization_spaces=False,
    )
    wrapped.save_pretrained(folder)
    # transformers 5 writes its new name of this class, which transformers 4 does not know; both know the old.
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return wrapped


def sample(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, seed: int, **how: Any) -> str:
    """Continue PROMPT by up to 60 tokens; `how` is passed on to transformers' generate()."""
    torch.manual_seed(seed)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    prompt = {key: prompt[key] for key in ("input_ids", "attention_mask")}
    length = min(60, model.config.n_positions - prompt["input_ids"].shape[1])
    ids = model.generate(**prompt, max_new_tokens=length, **how)
    return str(tokenizer.decode(ids[0], skip_special_tokens=True))


# ---- The command -------------------------------------------------------------------------------------------


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; ends the program with a message (exit code 2) when it cannot be right."""
    parser = argparse.ArgumentParser(description="Train a tiny GPT-2 on text files, on a CPU.")
    add = parser.add_argument
    add("texts", nargs="+", type=Path, metavar="TEXT", help="UTF-8 text files; a blank line ends a document")
    add("--out", type=Path, required=True, help="folder of the checkpoint")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, default=6000, help="optimizer steps (default %(default)s)")
    length.add_argument("--minutes", type=float, help="train for this long instead; not repeatable")
    add("--seed", type=int, default=1, help="of weights, batches and dropout (default %(default)s)")
    add("--vocab-size", type=int, default=2048, help="tokens, the 256 bytes included (default %(default)s)")
    add("--n-embd", type=int, default=128, help="width, a multiple of 32 (default %(default)s)")
    add("--n-layer", type=int, default=4, help="transformer blocks (default %(default)s)")
    add("--n-head", type=int, default=4, help="attention heads (default %(default)s)")
    add("--context", type=int, default=256, help="tokens the model can look back on (default %(default)s)")
    add("--dtype", choices=DTYPES, default="f16", help="of the saved weights (default %(default)s)")
    # Small batches win here: for a given time on a CPU, many rough steps teach more than a few smooth ones.
    add("--batch-size", type=int, default=2, help="windows a step (default %(default)s)")
    add("--learning-rate", type=float, default=2e-3, help="peak (default %(default)s)")
    add("--weight-decay", type=float, default=0.5, help="of matrices (default %(default)s)")
    add("--dropout", type=float, default=0.25, help="of embeddings and residuals (default %(default)s)")
    add("--held-out", type=float, default=0.05, help="fraction never trained on (default %(default)s)")
    add("--every-line", action="store_true", help="keep headings, tables and code too, not prose alone")
    add("--threads", type=int, help="CPU threads (default: torch's choice)")
    options = parser.parse_args(arguments)
    if options.n_embd % 32 or options.n_embd % options.n_head:
        parser.error("--n-embd must be a multiple of 32, a block of Q4_0, and of --n-head")
    if options.vocab_size < 257:
        parser.error("--vocab-size must be at least 257: the 256 bytes and <|endoftext|>")
    if not 0 < options.held_out < 1:
        parser.error("--held-out must lie between 0 and 1")
    for name in ("steps", "minutes", "n_embd", "n_layer", "n_head", "context", "batch_size", "threads"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            parser.error(f"--{name.replace('_', '-')} must be more than 0")
    return options


def run(options: argparse.Namespace) -> bool:
    """Do the whole job; returns whether Ctrl-C cut it short."""
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    torch.use_deterministic_algorithms(True)
    transformers_logging.disable_progress_bar()
    options.out.mkdir(parents=True, exist_ok=True)  # now, not after the training, is the time to find out

    training_texts, held_texts = read_texts(options.texts, options.held_out, options.every_line)
    tokenizer = train_tokenizer(training_texts, options.vocab_size)
    training, held = encode(tokenizer, training_texts), encode(tokenizer, held_texts)
    held_bytes = sum(len(text.encode()) for text in held_texts)
    print(f"text: {len(training)} tokens to train on, {len(held)} held out ({held_bytes} bytes)")
    if len(training) <= options.context:
        raise ValueError(f"the texts give only {len(training)} tokens: more than --context are needed")

    model = build_model(options, tokenizer.get_vocab_size(), tokenizer.token_to_id(END_OF_TEXT))
    print(f"model: {model.num_parameters()} parameters, vocabulary {model.config.vocab_size}")
    starts = line_starts(tokenizer, training, options.context + 1)
    loss, stopped = train(model, training, starts, held, options)

    model.to(DTYPES[options.dtype])
    wrapped = save(model, tokenizer, options.out)
    rounded = evaluate(model.float(), held)  # weights as saved; only the arithmetic is float32 again
    bits_per_byte = rounded * (len(held) - 1) / held_bytes / math.log(2)
    print(f"held-out loss: {loss:.4f} in float32, {rounded:.4f} as saved in {options.dtype}")
    print(f"held-out perplexity: {math.exp(rounded):.2f} a token ({bits_per_byte:.4f} bits a byte)")
    size = sum(file.stat().st_size for file in options.out.iterdir())
    print(f"saved {'after Ctrl-C ' if stopped else ''}to {options.out} ({size} bytes)")

    model.eval()
    print(f"\ngreedy:  {sample(model, wrapped, options.seed, do_sample=False)}")
    how = {"do_sample": True, "temperature": 0.8, "top_k": 40}
    print(f"\nsampled: {sample(model, wrapped, options.seed, **how)}")
    return stopped


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 2 for input that cannot be used, 130 after Ctrl-C."""
    options = parse_options(arguments)
    try:
        return 130 if run(options) else 0
    except (OSError, ValueError) as error:
        print(f"train_az_llm: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train_az_llm: interrupted, nothing saved", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
