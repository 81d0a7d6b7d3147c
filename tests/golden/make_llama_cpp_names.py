"""Makes llama_cpp_names.json: what llama.cpp's converter writes for the models of ``tests/tiny_models.py``.

    AZQUANT_LLAMA_CPP=<a checkout of llama.cpp> python tests/golden/make_llama_cpp_names.py

The converter runs as it is, but for two things. Every model has the same byte-level tokenizer, which it would
refuse because it does not know its hash. And keys of config.json that it reads, but that transformers
writes no more or elsewhere, are put back (OLD_KEYS); without them it ends with a KeyError. Hashes are left
out (null) where the converter ignores a flag of the config that changes the tensor.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from convert_support import read_metadata, read_tensors  # noqa: E402
from tiny_models import MODELS, build, save  # noqa: E402

RUN = """
import json, runpy, sys
sys.path.insert(0, sys.argv[1])
sys.path.insert(1, sys.argv[1] + "/gguf-py")
from conversion.base import ModelBase, TextModel
load, old = ModelBase.load_hparams, json.loads(sys.argv[4])
ModelBase.load_hparams = staticmethod(lambda *args, **kwargs: load(*args, **kwargs) | old)
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
for name in ("_set_vocab_sentencepiece", "_set_vocab_llama_hf"):
    def missing(self, *args, **kwargs):
        raise FileNotFoundError
    setattr(TextModel, name, missing)
import conversion
from conversion import gemma, phi
for cls in (gemma.Gemma2Model, phi.Phi3MiniModel):
    cls.set_vocab = TextModel._set_vocab_gpt2
sys.argv = ["convert_hf_to_gguf.py", sys.argv[2], "--outtype=f32", "--outfile=" + sys.argv[3]]
runpy.run_path(sys.path[0] + "/convert_hf_to_gguf.py", run_name="__main__")
"""

OLD_KEYS = {
    "gpt2": {"n_ctx": 128},
    "gptneox": {"rotary_pct": 0.5},
    "gptneox serial": {"rotary_pct": 0.25},
    "falcon": {"num_kv_heads": 1},  # multi_query, which it does not read
}

# Parts of tensor names, for each model whose config has a flag that the converter ignores.
IGNORED = {
    "llama": "rope_freqs",  # original_max_position_embeddings, where it is part of rope_parameters
    "mixtral one of eight": "rope_freqs",
    "gpt2": "attn_qkv",  # scale_attn_by_inverse_layer_idx
    "gemma2": "attn_q.",  # query_pre_attn_scalar
    "gemma3": "attn_q_norm",
}


def main() -> None:
    llama_cpp = os.environ["AZQUANT_LLAMA_CPP"]
    result: dict[str, object] = {}
    for name in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            hf, out = save(build(name), Path(folder) / "hf"), Path(folder) / "out.gguf"
            old = json.dumps(OLD_KEYS.get(name, {}))
            command = [sys.executable, "-c", RUN, llama_cpp, str(hf), str(out), old]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                result[name] = {"refused": done.stderr.strip().splitlines()[-1]}
                continue
            metadata = read_metadata(out)
            architecture = metadata["general.architecture"][1]
            ignored = IGNORED.get(name)
            result[name] = {
                "architecture": architecture,
                "metadata": {
                    key: value[1] for key, value in metadata.items() if key.startswith(f"{architecture}.")
                },
                "tensors": {
                    tensor: [
                        list(shape),
                        None if ignored and ignored in tensor else hashlib.sha256(data).hexdigest(),
                    ]
                    for tensor, (shape, _, data) in sorted(read_tensors(out).items())
                },
            }
    text = json.dumps(result, indent=1, sort_keys=True)
    (HERE / "llama_cpp_names.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
