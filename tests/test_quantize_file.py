"""quantize_file against what llama-quantize made of the same models, and its refusals."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import quantize_cases as cases
from convert_support import llama_cpp
from gguf_builder import STRING, info, pair, text
from gguf_builder import gguf as gguf_bytes

import azquant as aq
from azquant.errors import (
    ArgumentError,
    ConversionError,
    ConversionWarning,
    FormatError,
    NonFiniteError,
    OutputError,
    UnsupportedTypeError,
)
from azquant.gguf import open_gguf
from azquant.gguf.atomic import AtomicFile

LISTED = [
    "q4_0",
    "q4_1",
    "q5_0",
    "q5_1",
    "q8_0",
    "q2_k",
    "q3_k_m",
    "q4_k_m",
    "q5_k_m",
    "q6_k",
    "iq4_nl",
    "f16",
    "bf16",
]
GOLDEN: dict[str, dict[str, Any]] = json.loads(cases.GOLDEN.read_text())


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every case's model and importance matrix."""
    folder = tmp_path_factory.mktemp("sources")
    for name, case in cases.CASES.items():
        cases.write_source(case, folder / f"{name}.gguf")
        if "imatrix" in case:
            cases.write_imatrix(case, folder / f"{name}.imatrix")
    return folder


def quantize(source: Path, made: Path, target: str, **options: Any) -> Any:
    """quantize_file without its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConversionWarning)
        return aq.quantize_file(source, made, target, overwrite=True, **options)


@pytest.mark.parametrize("name", cases.CASES)
def test_types_and_bytes_are_those_of_llama_quantize(name: str, sources: Path, tmp_path: Path) -> None:
    case = cases.CASES[name]
    options = dict(case.get("options", {}))
    if "imatrix" in case:
        options["imatrix"] = sources / f"{name}.imatrix"
    made = tmp_path / "made.gguf"
    different = []
    for target in cases.TARGETS:
        report = quantize(sources / f"{name}.gguf", made, target, **options)
        assert report.file_bytes == report.planned_bytes == made.stat().st_size
        found = cases.digest(made)
        if found != GOLDEN[name][target]:
            different.append((target, found["types"], GOLDEN[name][target]["types"]))
    assert not different


def test_a_tensor_that_has_its_type_already_is_copied(sources: Path, tmp_path: Path) -> None:
    once, twice = tmp_path / "once.gguf", tmp_path / "twice.gguf"
    quantize(sources / "gpt2-256-tied.gguf", once, "q4_0")
    report = quantize(once, twice, "q4_0")
    assert cases.digest(once) == cases.digest(twice)
    with open_gguf(twice) as file:
        assert "azquant.requantized_from" not in file.metadata
    assert report.bits_per_weight < 6


def test_without_verify_the_bytes_are_the_same(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(sources / "gpt2-256-tied.gguf", tmp_path / "a.gguf", "q4_0")

    def never(descriptor: int) -> None:
        raise AssertionError("the disk was waited for")

    monkeypatch.setattr(os, "fsync", never)
    monkeypatch.setattr(AtomicFile, "_sync_folder", lambda self: None)
    quantize(sources / "gpt2-256-tied.gguf", tmp_path / "b.gguf", "q4_0", verify=False)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_requantizing_must_be_allowed_and_is_recorded(sources: Path, tmp_path: Path) -> None:
    once, twice = tmp_path / "once.gguf", tmp_path / "twice.gguf"
    quantize(sources / "gpt2-512-untied.gguf", once, "q8_0")
    with pytest.raises(ConversionError, match=r"is q8_0 already.*allow_requantize"):
        quantize(once, twice, "q4_0")
    assert not twice.exists()
    quantize(once, twice, "q4_0", allow_requantize=True)
    with open_gguf(twice) as file:
        assert list(file.metadata["azquant.requantized_from"]) == ["q8_0"]
        assert file.metadata["general.file_type"] == 2
        values = file.tensors["blk.0.ffn_up.weight"]
    with open_gguf(once) as file:
        before = aq.QTensor(file.tensors[values.name].data, values.shape, "q8_0").dequantize()
    assert (values.data == aq.quantize(before, "q4_0").data).all()


def test_metadata_are_kept(sources: Path, tmp_path: Path) -> None:
    made = tmp_path / "made.gguf"
    quantize(sources / "gpt2-256-imatrix.gguf", made, "q5_k_m", imatrix=sources / "gpt2-256-imatrix.imatrix")
    with open_gguf(sources / "gpt2-256-imatrix.gguf") as file:
        before = dict(file.metadata)
    with open_gguf(made) as file:
        after = dict(file.metadata)
    assert {key: after[key] for key in before} == before
    assert after["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q5_K_M
    assert after["quantize.imatrix.file"] == "gpt2-256-imatrix.imatrix"  # no folder of this machine
    assert after["quantize.imatrix.dataset"] == "text"
    assert after["quantize.imatrix.chunks_count"] == 7
    assert after["quantize.imatrix.entries_count"] == 32


def test_dry_run_tells_the_exact_size_and_writes_nothing(sources: Path, tmp_path: Path) -> None:
    made = tmp_path / "made.gguf"
    planned = quantize(sources / "gpt2-768-tied.gguf", made, "q4_k_m", dry_run=True)
    assert planned.file_bytes is None and not made.exists()
    written = quantize(sources / "gpt2-768-tied.gguf", made, "q4_k_m")
    assert planned.planned_bytes == made.stat().st_size
    assert planned.tensors == written.tensors


def test_rows_that_no_block_fits_are_warned_of_and_refused_when_strict(sources: Path, tmp_path: Path) -> None:
    source, made = sources / "llama-256-ffn-684.gguf", tmp_path / "made.gguf"
    message = r"rows of 684 are no whole number of q4_k blocks \(256\): 2 tensors written as f16"
    with pytest.warns(ConversionWarning, match=message) as caught:
        report = aq.quantize_file(source, made, "q4_k_s")
    assert caught[0].filename == __file__
    assert report.warnings == tuple(str(warning.message) for warning in caught)
    made.unlink()
    with pytest.raises(ConversionError, match=r"tensor blk\.0\.ffn_down\.weight: rows of 684"):
        aq.quantize_file(source, made, "q4_0", strict=True)
    assert not made.exists()


def with_value(
    source: Path, made: Path, value: float, name: str = "blk.1.ffn_up.weight", row: int = 3
) -> Path:
    """A copy of ``source`` with ``value`` in row 3 (or ``row``), column 5 of a tensor."""
    data = bytearray(source.read_bytes())
    with open_gguf(source) as file:
        tensor = file.tensors[name]
        at = tensor.offset + 4 * (row * tensor.shape[-1] + 5)
    data[at : at + 4] = np.float32(value).tobytes()
    made.write_bytes(data)
    return made


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_no_number_is_named(sources: Path, tmp_path: Path, value: float) -> None:
    source = with_value(sources / "gpt2-256-pure.gguf", tmp_path / "source.gguf", value)
    made = tmp_path / "made.gguf"
    with pytest.raises(NonFiniteError, match=rf"'blk\.1\.ffn_up\.weight': {value} at row 3, column 5"):
        quantize(source, made, "q4_k_m")
    assert not made.exists()
    quantize(source, made, "q4_k_m", nonfinite="zero")
    clean = with_value(sources / "gpt2-256-pure.gguf", tmp_path / "clean.gguf", 0.0)
    quantize(clean, tmp_path / "expected.gguf", "q4_k_m")
    assert cases.digest(made) == cases.digest(tmp_path / "expected.gguf")
    with open_gguf(made) as file:
        assert file.metadata["azquant.nonfinite_zeroed"] == 1


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("target", ["q4_0", "f32"])
def test_a_copied_weight_that_is_no_number_is_named(
    sources: Path, tmp_path: Path, value: float, target: str
) -> None:
    source = with_value(
        sources / "gpt2-256-pure.gguf", tmp_path / "s.gguf", value, "blk.1.attn_norm.weight", 0
    )
    made = tmp_path / "made.gguf"
    with pytest.raises(NonFiniteError, match=rf"'blk\.1\.attn_norm\.weight': {value} at row 0, column 5"):
        quantize(source, made, target)
    assert not made.exists()
    quantize(source, made, target, nonfinite="zero")
    with open_gguf(made) as file:
        assert file.metadata["azquant.nonfinite_zeroed"] == 1
        assert np.asarray(file.tensors["blk.1.attn_norm.weight"].data).view("<f4")[5] == 0


@pytest.mark.parametrize("nonfinite", ["error", "zero"])
@pytest.mark.parametrize("dims", [(), (0,), (0, 4), (32, 0), (1,)], ids=str)
def test_tensors_of_odd_shapes_are_copied(tmp_path: Path, dims: tuple[int, ...], nonfinite: str) -> None:
    kv = [pair("general.architecture", STRING, text("llama"))]
    infos = [info("blk.0.ffn_up.weight", (32, 4)), info("scale", dims, offset=512)]
    (tmp_path / "source.gguf").write_bytes(gguf_bytes(kv, infos, b"\0" * 512 + b"\0\0\x80?" * 8))
    quantize(tmp_path / "source.gguf", tmp_path / "made.gguf", "q4_0", nonfinite=nonfinite)
    with open_gguf(tmp_path / "made.gguf") as file:
        assert file.tensors["scale"].shape == dims[::-1]


@pytest.mark.parametrize("nonfinite", ["error", "zero"])
def test_a_copied_block_without_a_scale_is_named(sources: Path, tmp_path: Path, nonfinite: str) -> None:
    source, made = tmp_path / "source.gguf", tmp_path / "made.gguf"
    quantize(sources / "gpt2-256-pure.gguf", source, "q4_0", pure=True)
    data = bytearray(source.read_bytes())
    with open_gguf(source) as file:
        at = file.tensors["blk.1.ffn_up.weight"].offset + 18 * (256 // 32 * 2 + 1)
    data[at : at + 2] = np.float16(np.inf).tobytes()
    source.write_bytes(data)
    with pytest.raises(NonFiniteError, match=r"'blk\.1\.ffn_up\.weight': \S+ at row 2, column 32; the q4_0"):
        quantize(source, made, "q4_0", pure=True, nonfinite=nonfinite)
    assert not made.exists()


def test_an_importance_matrix_that_leaves_tensors_out(sources: Path, tmp_path: Path) -> None:
    case = cases.CASES["llama-256-imatrix"]
    whole = dict(case, imatrix="gguf")
    cases.write_imatrix(dict(whole, layers=7), tmp_path / "less.gguf")
    with pytest.warns(
        ConversionWarning, match=r"less\.gguf says nothing of 7 of the 57 .*\(blk\.7\.attn_outp"
    ):
        aq.quantize_file(
            sources / "llama-256-imatrix.gguf", tmp_path / "a.gguf", "q4_k_s", imatrix=tmp_path / "less.gguf"
        )
    with pytest.raises(ConversionError, match=r"blk\.7\..*weight: q2_k_s needs an importance matrix"):
        quantize(
            sources / "llama-256-imatrix.gguf", tmp_path / "b.gguf", "q2_k_s", imatrix=tmp_path / "less.gguf"
        )
    cases.write_imatrix(whole, tmp_path / "whole.gguf")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        aq.quantize_file(
            sources / "llama-256-imatrix.gguf", tmp_path / "c.gguf", "q2_k_s", imatrix=tmp_path / "whole.gguf"
        )


def test_patterns_in_capitals_match_as_in_llama_quantize(sources: Path, tmp_path: Path) -> None:
    report = quantize(
        sources / "gpt2-256-pure.gguf", tmp_path / "a.gguf", "q4_0", tensor_types=[("FFN_Down", "Q6_K")]
    )
    assert {row.type for row in report.tensors if row.name.endswith("ffn_down.weight")} == {"q6_k"}


def test_a_split_model_becomes_one_file_or_as_many_shards(sources: Path, tmp_path: Path) -> None:
    from azquant.gguf import split_gguf

    whole = sources / "gpt2-256-pure.gguf"
    shards = split_gguf(whole, tmp_path / "source", max_tensors=9)
    expected = quantize(whole, tmp_path / "expected.gguf", "q4_k_m")
    quantize(shards[0], tmp_path / "joined.gguf", "q4_k_m")
    assert (tmp_path / "joined.gguf").read_bytes() == (tmp_path / "expected.gguf").read_bytes()
    report = quantize(shards[0], tmp_path / "made.gguf", "q4_k_m", keep_split=True)
    made = sorted(tmp_path.glob("made-*"))
    assert [path.name for path in made] == [f"made-0000{i}-of-0000{len(shards)}.gguf" for i in range(1, 5)]
    assert report.destination == made[0] and report.file_bytes == sum(path.stat().st_size for path in made)
    assert report.tensors == expected.tensors
    with open_gguf(made[0]) as file, open_gguf(tmp_path / "expected.gguf") as one:
        for name, tensor in one.tensors.items():
            assert (file.tensors[name].data == tensor.data).all()


def test_options_that_are_wrong_are_refused(sources: Path, tmp_path: Path) -> None:
    source, made = sources / "gpt2-256-tied.gguf", tmp_path / "made.gguf"
    with pytest.raises(UnsupportedTypeError, match="cannot make q4 files; known are f32"):
        quantize(source, made, "q4")
    with pytest.raises(UnsupportedTypeError, match="cannot quantize to iq2_xs"):
        quantize(source, made, "q4_0", output_type="iq2_xs")
    with pytest.raises(ArgumentError, match=r"tensor type '\(': .* regular expression"):
        quantize(source, made, "q4_0", tensor_types=[("(", "q4_0")])
    with pytest.raises(ArgumentError, match="nonfinite='ignore'"):
        quantize(source, made, "q4_0", nonfinite="ignore")
    with pytest.raises(ConversionError, match="q2_k_s needs an importance matrix"):
        quantize(source, made, "q2_k_s")
    with pytest.raises(OutputError, match="same file as the input"):
        quantize(source, source, "q4_0")
    assert not made.exists()


def test_an_importance_matrix_of_another_model_is_refused(sources: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"blk\.0\..* has \d+ importances, but 1 x \d+ columns"):
        quantize(
            sources / "gpt2-512-untied.gguf",
            tmp_path / "made.gguf",
            "q4_0",
            imatrix=sources / "gpt2-256-imatrix.imatrix",
        )


@pytest.mark.parametrize("cut", [0, 3, 4, 7, 40, 200, -5])
def test_a_cut_legacy_importance_matrix_is_refused(sources: Path, tmp_path: Path, cut: int) -> None:
    whole = (sources / "llama-256-imatrix.imatrix").read_bytes()
    broken = tmp_path / "broken.dat"
    broken.write_bytes(whole[:cut])
    with pytest.raises(FormatError, match=r"broken\.dat"):
        quantize(sources / "llama-256-imatrix.gguf", tmp_path / "made.gguf", "q4_0", imatrix=broken)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_an_importance_that_is_no_weight_is_refused(sources: Path, tmp_path: Path, value: float) -> None:
    broken = bytearray((sources / "llama-256-imatrix.imatrix").read_bytes())
    broken[-12 - 4 : -12] = np.float32(value).tobytes()
    path = tmp_path / "broken.dat"
    path.write_bytes(broken)
    with pytest.raises(FormatError, match="the importance of blk"):
        quantize(sources / "llama-256-imatrix.gguf", tmp_path / "made.gguf", "q4_0", imatrix=path)


@pytest.mark.parametrize("target", LISTED)
def test_llama_cpp_and_azquant_run_a_file_of_every_target(
    shared_data: Path, tmp_path: Path, target: str
) -> None:
    plain, made = tmp_path / "f32.gguf", tmp_path / "made.gguf"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConversionWarning)
        aq.convert(shared_data / "az_llm_small", plain, "f32")
        aq.convert(shared_data / "az_llm_small", tmp_path / "at_once.gguf", target)
    quantize(plain, made, target)
    assert cases.digest(made) == cases.digest(tmp_path / "at_once.gguf")  # convert follows the same plan
    prompt = [7, 300, 41, 1000, 2, 555]
    ours = aq.load(made, compute="fp32").logits(prompt)[-1]
    answer = llama_cpp(made, {"prompt": prompt, "n_predict": 1, "n_probs": 20})[0]
    rows = answer["completion_probabilities"][0]["top_logprobs"]
    theirs = {row["id"]: row["logprob"] for row in rows}
    log_sum = np.log(np.exp(ours.astype(np.float64) - ours.max()).sum()) + ours.max()
    mine = {token: ours[token] - log_sum for token in theirs}
    # llama.cpp rounds activations to 8 bits: its logits are off by some hundredths.
    assert max(abs(mine[token] - theirs[token]) for token in theirs) < 0.2
