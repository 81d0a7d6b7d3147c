"""Modelfiles: Ollama's grammar, and a clear word about everything it does not know."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from azquant.errors import AzquantWarning, InputFileError, ModelfileError
from azquant.store import Message, Modelfile, parse_modelfile, read_modelfile
from azquant.store.parameters import PARAMETERS


def test_every_instruction_is_read() -> None:
    found = parse_modelfile(
        """# a comment
from llama3.2
  PARAMETER temperature 1
parameter stop "<|end|>"
PARAMETER stop AI assistant:
PARAMETER num_ctx 4096
PARAMETER use_mmap false
TEMPLATE \"\"\"{{ if .System }}<|system|>
{{ .System }}{{ end }}
# no comment
\"\"\"
System You are Mario.
ADAPTER ./lora.gguf
LICENSE "MIT
and more"
LICENSE Apache
MESSAGE user Is Toronto in Canada?
MESSAGE assistant "yes"
RENDERER r
PARSER p
REQUIRES v0.14.0
CAPABILITY tools
"""
    )
    assert found == Modelfile(
        sources=["llama3.2"],
        parameters={
            "temperature": 1.0,
            "stop": ["<|end|>", "AI assistant:"],
            "num_ctx": 4096,
            "use_mmap": False,
        },
        template="{{ if .System }}<|system|>\n{{ .System }}{{ end }}\n# no comment\n",
        system="You are Mario.",
        adapters=["./lora.gguf"],
        licenses=["MIT\nand more", "Apache"],
        messages=[Message("user", "Is Toronto in Canada?"), Message("assistant", "yes")],
        renderer="r",
        parser="p",
        requires="0.14.0",
        capabilities=["tools"],
    )


@pytest.mark.parametrize(
    ("value", "read"),
    [
        ("plain", "plain"),
        ("  blanks around  ", "blanks around"),
        ('"  kept  "', "  kept  "),
        ('""', ""),
        ('""""""', ""),
        ('"""a"b"""', 'a"b'),
        ('"one\ntwo"', "one\ntwo"),
        ('"""\n"""', "\n"),
        ('"""a\n\n\nb"""  ', "a\n\n\nb"),
        ('"ends "inside" here"', 'ends "inside" here'),
        ("no # comment", "no # comment"),
        ("it's", "it's"),
        ('a "quoted" end"', 'a "quoted" end"'),
        ("tab\there", "tab\there"),
        ("dropped\x07 bell", "dropped bell"),
        ('"""dos\r\nlines"""', "dos\r\nlines"),
    ],
)
def test_values_and_quotation_marks(value: str, read: str) -> None:
    for newline in ("", "\n", "\r\n"):
        assert parse_modelfile(f"FROM x\nSYSTEM {value}{newline}").system == read


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there is no FROM line"),
        ("# only\n", "there is no FROM line"),
        ("SYSTEM x\n", "there is no FROM line"),
        ("FORM x\n", r"line 1: unknown instruction 'FORM'; known are ADAPTER, .*FROM"),
        ("FROM x\n\n1\n", "line 3: unknown instruction '1'"),
        ("FROM", "line 1: FROM has no value"),
        ("FROM\nx", "line 1: FROM has no value"),
        ("FROM \nSYSTEM x", "line 1: FROM has no value"),
        ('FROM x\nSYSTEM """never\nclosed', 'line 2: SYSTEM: the quotation mark """ is never closed'),
        ('FROM x\nTEMPLATE "never\nclosed', 'line 2: TEMPLATE: the quotation mark " is never closed'),
        (
            "FROM x\nPARAMETER temprature 1",
            "line 2: unknown parameter 'temprature'; did you mean temperature?",
        ),
        ("FROM x\nPARAMETER zzz 1", "line 2: unknown parameter 'zzz'; known are .*num_ctx"),
        ("FROM x\nPARAMETER num_ctx many", "line 2: parameter num_ctx: 'many' is no whole number"),
        ("FROM x\nPARAMETER num_ctx 1.5", "line 2: parameter num_ctx: '1.5' is no whole number"),
        ("FROM x\nPARAMETER num_ctx 1_000", "is no whole number"),
        ("FROM x\nPARAMETER num_ctx 99999999999999999999", "is no whole number"),
        ("FROM x\nPARAMETER top_p nan", "line 2: parameter top_p: 'nan' is no number"),
        ("FROM x\nPARAMETER top_p 1e99", "is no number"),
        ("FROM x\nPARAMETER use_mmap maybe", "is neither true nor false"),
        ("FROM x\nPARAMETER  temperature 1", "line 2: PARAMETER needs one blank"),
        ("FROM x\nPARAMETER top-p 1", "line 2: PARAMETER top has no value"),
        ("FROM x\nMESSAGE robot hi", "line 2: MESSAGE: the role 'robot' is none of system, user, assistant"),
        ("FROM x\nMESSAGE User hi", "the role 'User'"),
        ("FROM x\nREQUIRES new", "line 2: REQUIRES 'new': write a version such as 0.14.0"),
        ("FROM x\nDRAFT y", "line 2: DRAFT: models with a draft model are not supported"),
        ('FROM x\nSYSTEM """a\nb\nc"""\nOOPS x', "line 5: unknown instruction 'OOPS'"),
        ("FROM x\r\nOOPS x", "line 2: unknown instruction 'OOPS'"),
    ],
)
def test_what_the_grammar_does_not_know_is_named_with_its_line(text: str, message: str) -> None:
    with pytest.raises(ModelfileError, match=message):
        parse_modelfile(text)


def test_a_parameter_that_ollama_dropped_is_left_out_with_a_warning() -> None:
    with pytest.warns(AzquantWarning, match="PARAMETER mirostat: Ollama no longer knows it"):
        assert parse_modelfile("FROM x\nPARAMETER mirostat 1\n").parameters == {}


def test_files_in_utf8_and_utf16_are_read_and_others_named(tmp_path: Path) -> None:
    path = tmp_path / "Modelfile"
    for data in (
        "FROM ə\n".encode("utf-8-sig"),
        "FROM ə\n".encode("utf-16"),
        b"\xfe\xff" + "FROM ə".encode("utf-16-be"),
    ):
        path.write_bytes(data)
        assert read_modelfile(path).sources == ["ə"]
    path.write_bytes(b"FROM x\nSYSTEM \xff\n")
    with pytest.raises(ModelfileError, match=r"Modelfile: line 2: not UTF-8 \(byte 14\)"):
        read_modelfile(path)
    path.write_bytes(b"GGUF\x03\0\0\0")
    with pytest.raises(ModelfileError, match="this is a GGUF file, no Modelfile; give it without -f"):
        read_modelfile(path)
    with pytest.raises(InputFileError, match="is a folder; give a Modelfile"):
        read_modelfile(tmp_path)
    with pytest.raises(InputFileError, match="does not exist"):
        read_modelfile(tmp_path / "missing")


PRINTED = st.text(
    st.characters(codec="utf-8", categories=["L", "N", "P", "S"]) | st.sampled_from(' "\n\t#'), max_size=60
)


@given(PRINTED, st.lists(PRINTED.filter(bool), max_size=3))
def test_what_is_written_reads_as_the_same(text: str, stops: list[str]) -> None:
    made = Modelfile(sources=["x"], template=text, system=text, licenses=[text] if text else [])
    made.messages = [Message("user", text)]
    if stops:
        made.parameters["stop"] = stops
    try:
        written = str(made)
    except ModelfileError:
        assert '"""' in text or any('"""' in stop for stop in stops)
        return
    assert parse_modelfile(written) == made


@given(st.text(max_size=80))
def test_any_text_is_read_or_refused_with_a_word(text: str) -> None:
    for begin in ("", "FROM x\n"):
        try:
            parse_modelfile(begin + text)
        except ModelfileError as error:
            assert str(error)


def test_a_long_text_takes_no_time() -> None:
    text = "line\n" * 300_000
    assert parse_modelfile(f'FROM x\nLICENSE """{text}"""').licenses == [text]


def test_each_parameter_has_a_kind() -> None:
    assert set(PARAMETERS.values()) == {int, float, bool, list}
