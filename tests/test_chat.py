"""Chat templates: the same prompts as transformers makes, and nothing that a bad template could do."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from engine_support import END, byte_tokenizer, tiny_model
from transformers import PreTrainedTokenizerFast

import azquant
from azquant.engine import chat
from azquant.engine.chat import render_chat
from azquant.errors import ArgumentError, ModelError
from azquant.gguf import open_gguf

CHATML = (
    "{%- for message in messages %}\n"
    "    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n"
)
INST = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = false %}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if loop.index0 == 0 and system %}{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + "
    "message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
JSON = (
    "{% for m in messages %}{% if loop.last %}{% continue %}{% endif %}{{ m | tojson }}{% endfor %}"
    "{{ messages | tojson(indent=2) }}"
)
TALK = [
    {"role": "system", "content": "Qısa cavab ver."},
    {"role": "user", "content": '  Salam, <necəsən> & "sən"? 😀\n'},
    {"role": "assistant", "content": "Yaxşı!"},
    {"role": "user", "content": "Əla."},
]


@pytest.mark.parametrize("template", [CHATML, INST, JSON], ids=["chatml", "inst", "json"])
def test_same_text_as_transformers(template: str) -> None:
    other = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), bos_token=END, eos_token=END)
    wanted = other.apply_chat_template(
        TALK, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    assert render_chat(template, TALK, {"bos_token": END, "eos_token": END}) == wanted


def test_chat(tmp_path: Path) -> None:
    template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    )
    model = azquant.load(tiny_model(tmp_path, "gpt2", template=template, n_positions=64))
    tokens = model.chat_tokens([{"role": "user", "content": "salam"}])
    assert tokens == [256, *model.tokenizer.encode("user: salam"), 256]
    answer = model.chat([{"role": "user", "content": "salam"}], max_tokens=10)
    assert answer == "".join(model.stream(tokens, max_tokens=10)) != ""


def test_no_template(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no chat template"):
        azquant.load(tiny_model(tmp_path, "gpt2")).chat([{"role": "user", "content": "a"}])


# ---- bad input (class 49): nothing happens, in bounded time

ATTACKS = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__.os }}",
    "self": "{{ self._TemplateReference__context.environment }}",
    "cycler": "{{ cycler.__init__.__globals__.os.system('touch MARK') }}",
    "lipsum": "{{ lipsum.__globals__['os'].popen('touch MARK').read() }}",
    "joiner": "{{ joiner.__init__.__globals__.os.system('touch MARK') }}",
    "attr": "{{ (''|attr('__class__')).__mro__ }}",
    "format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "mutation": "{{ messages.append(1) }}",
    "include": "{% include '/etc/passwd' %}",
    "range": "{% for i in range(10**12) %}x{% endfor %}",
    "nested loops": "{% for i in range(99999) %}{% for i in range(99999) %}{% endfor %}{% endfor %}",
    "endless output": "{% for i in range(99999) %}{% for j in range(999) %}xxxxx{% endfor %}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "repetition": "{{ 'x' * 10**10 }}",
    "power": "{{ 9**(9**(9**9)) }}",
    "width": "{{ '%10000000000d' % 1 }}",
    "padding": "{{ 'a'.ljust(10**11) }}",
    "doubling": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "words": "{{ lipsum(n=10000000) }}",
    "syntax": "{% if",
    "unknown": "{% frobnicate %}",
    "undefined": "{{ messages[9].content.x }}",
    "deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_bad_templates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attack: str) -> None:
    mark, begin = tmp_path / "mark", time.monotonic()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="template"):
        render_chat(ATTACKS[attack].replace("MARK", str(mark)), TALK, {})
    assert time.monotonic() - begin < 8  # a second of processor time, on a machine that may be busy
    assert not list(tmp_path.iterdir())


def test_a_lone_surrogate_is_the_tokenizers_to_refuse() -> None:
    assert render_chat("{{ '\\ud800' }}", TALK, {}) == "\ud800"


def test_the_wall_clock_bounds_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "CPU_SECONDS", 60)
    monkeypatch.setattr(chat, "WALL_SECONDS", 0.5)
    begin = time.monotonic()
    with pytest.raises(ModelError, match=r"after 0\.5 s"):
        render_chat(ATTACKS["nested loops"], TALK, {})
    assert time.monotonic() - begin < 5


def test_templates_are_not_run_on_load(tmp_path: Path, shared_data: Path) -> None:
    with open_gguf(shared_data / "bad-gguf/model-level/LOAD_but_bounded_jinja_infinite_loop.gguf") as file:
        template = file.metadata["tokenizer.chat_template"]
    assert isinstance(template, str)
    model = azquant.load(tiny_model(tmp_path, "gpt2", template=template))
    assert isinstance(model.generate("a", max_tokens=2), str)
    begin = time.monotonic()
    with pytest.raises(ModelError, match="template"):
        model.chat([{"role": "user", "content": "a"}])
    assert time.monotonic() - begin < 8


@pytest.mark.parametrize(
    "messages",
    [
        None,
        [],
        "hello",
        {"role": "user"},
        [1],
        [{}],
        [{"role": 1, "content": "a"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": "a", "extra": object()}],
        [{"role": "user", "content": [float("nan")]}],
    ],
    ids=str,
)
def test_wrong_messages(messages: Any) -> None:
    with pytest.raises(ArgumentError):
        render_chat("x", messages, {})
