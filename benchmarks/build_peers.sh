#!/usr/bin/env bash
# Builds llama.cpp natively for comparison, from the copy inside llama-cpp-python's source archive (PyPI).
#
#     benchmarks/build_peers.sh FOLDER        then AZQUANT_PEERS=FOLDER make bench-peers
#
# Takes some 10 minutes on 2 cores. Needs a C++ compiler; cmake and ninja come from PyPI into FOLDER/venv.
set -euo pipefail
folder=$(mkdir -p "${1:?usage: build_peers.sh FOLDER}" && cd "$1" && pwd)
version=${LLAMA_CPP_PYTHON:-llama-cpp-python}
cd "$folder"

[ -x venv/bin/cmake ] || { "${PYTHON:-python3}" -m venv venv && venv/bin/pip install --quiet cmake ninja; }
if [ ! -d llama.cpp ]; then
    venv/bin/pip download --quiet --no-deps --no-binary llama-cpp-python "$version"
    tar xzf llama_cpp_python-*.tar.gz
    mv llama_cpp_python-*/vendor/llama.cpp llama.cpp
fi

# GCC 12's _tile_loadconfig tells the compiler of the first 8 bytes only, so it drops the stores to the rest
# and AMX dies with an illegal instruction. Name the whole structure as the operand.
sed -i 's|^\( *\)_tile_loadconfig(&tc);|\1__asm__ volatile("ldtilecfg %0" : : "m"(tc));|' \
    llama.cpp/ggml/src/ggml-cpu/amx/mmq.cpp

PATH="$folder/venv/bin:$PATH"
cmake -S llama.cpp -B llama.cpp/build -G Ninja -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DGGML_OPENMP=OFF \
    -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF
cmake --build llama.cpp/build --target llama-quantize llama-bench llama-perplexity llama-imatrix
echo "built: $folder/llama.cpp/build/bin"
