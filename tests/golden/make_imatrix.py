"""Makes imatrix-stories260K.json from what llama-imatrix wrote.

    llama-imatrix -m stories260K-F32.gguf -f the-verdict.txt -c 256 -b 256 --chunks 6 -o imatrix.gguf
    python make_imatrix.py imatrix.gguf > imatrix-stories260K.json

``-b 256`` puts one window into a batch: with more, llama.cpp may cut it so that the last tokens of some
windows come in pieces of fewer than 16, which llama-imatrix leaves out.
"""

from __future__ import annotations

import json
import sys

import gguf

reader = gguf.GGUFReader(sys.argv[1])
tensors = {tensor.name: tensor.data.reshape(-1) for tensor in reader.tensors}
sums, counts = {}, {}
for name, values in tensors.items():
    if name.endswith(".in_sum2"):
        sums[name.removesuffix(".in_sum2")] = [float(f"{value:.6g}") for value in values]
    if name.endswith(".counts"):
        counts[name.removesuffix(".counts")] = float(values[0])
golden = {
    "chunk_count": int(reader.fields["imatrix.chunk_count"].contents()),
    "chunk_size": int(reader.fields["imatrix.chunk_size"].contents()),
    "counts": counts,
    "sums": sums,
}
print(json.dumps(golden, separators=(",", ":")))
