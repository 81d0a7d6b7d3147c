#!/usr/bin/env bash
# Builds llama.cpp natively for comparison, from the copy inside llama-cpp-python's source archive (PyPI).
#
#     benchmarks/build_peers.sh FOLDER [--avx2]     then make bench-peers bench-model PEERS=FOLDER
#
# --avx2 builds the kernels a second time, for AVX2 and nothing beyond (FOLDER/llama.cpp/build-avx2); all else of
# llama.cpp is the same code on every processor.
# Takes some 10 minutes on 2 cores. Needs a C++ compiler; cmake and ninja come from PyPI into FOLDER/venv.
set -euo pipefail
usage="usage: build_peers.sh FOLDER [--avx2]"
folder=$(mkdir -p "${1:?$usage}" && cd "$1" && pwd)
case "${2-}" in "" | --avx2) ;; *) echo "$usage" >&2 && exit 2 ;; esac
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
common=(-S llama.cpp -G Ninja -DCMAKE_BUILD_TYPE=Release -DGGML_OPENMP=OFF -DLLAMA_CURL=OFF
    -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF)
cmake "${common[@]}" -B llama.cpp/build -DGGML_NATIVE=ON
cmake --build llama.cpp/build --target llama-quantize llama-bench llama-batched-bench llama-completion \
    llama-perplexity llama-imatrix
echo "built: $folder/llama.cpp/build/bin"
if [ "${2-}" = --avx2 ]; then
    cmake "${common[@]}" -B llama.cpp/build-avx2 -DGGML_NATIVE=OFF -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON \
        -DGGML_F16C=ON -DGGML_BMI2=ON
    cmake --build llama.cpp/build-avx2 --target ggml-cpu
    echo "built: $folder/llama.cpp/build-avx2/bin"
fi
