#!/usr/bin/env bash
# Make the folder that travels to a bare GPU machine (README.md): vLLM without what it does not need there, and the Python
# packages that machine lacks, all under names from PyPI. Run in the repository root; network: pip's. Minutes.
# usage: bash tools/bare_gpu/prepare.sh [FOLDER]     FOLDER: default .whl, which git ignores
# Needs: python3 (3.11+), pip, xz, c++filt (binutils). 1.5 GB of room under TMPDIR.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=${1:-.whl}
limit_mib=${LIMIT_MIB:-50} # the working tree travels too, about 10 MiB
vllm=0.32.0

[ -f pyproject.toml ] || { echo "prepare.sh: run it in the repository root" >&2; exit 2; }
mkdir -p "$folder"
cp "$here/run.sh" "$folder/"
finish() {
    local mib
    mib=$(du -sm "$folder" | cut -f1)
    echo "$1: $mib MiB in $folder"
    [ "$mib" -le "$limit_mib" ] || { echo "prepare.sh: more than $limit_mib MiB" >&2; exit 1; }
}
# The archive depends on these files only: nothing to do if they have not changed.
stamp=$(cat "$here/prepare.sh" "$here/slim.py" requirements/cpu.lock | sha256sum | cut -d' ' -f1)
if [ -f "$folder/site.tar.xz" ] && [ "$(cat "$folder/stamp" 2>/dev/null || true)" = "$stamp" ]; then
    finish unchanged
    exit 0
fi
rm -f "$folder/stamp" "$folder/site.tar.xz"
work=$(mktemp -d "${TMPDIR:-/tmp}/prepare.XXXXXX")
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/wheels" "$work/site"

get() { # wheels for the bare machine: Linux x86-64, CPython 3.12, glibc up to 2.39
    local platforms=(--platform linux_x86_64)
    for n in 39 36 35 34 31 28 27 26 24 17 12 5; do platforms+=(--platform "manylinux_2_${n}_x86_64"); done
    platforms+=(--platform manylinux2014_x86_64 --platform manylinux2010_x86_64 --platform manylinux1_x86_64)
    PIP_CONSTRAINT='' python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
        --python-version 3.12 --implementation cp --abi cp312 --abi abi3 --abi none "${platforms[@]}" \
        --dest "$work/wheels" "$@" 2> >(grep -v 'is ignored' >&2)
}
# Packages that vllm.LLM needs and the machine's image lacks, at the versions of the project's lock;
# after `=`, the version of what the lock does not name.
names=(agent-detector annotated-types apache-tvm-ffi=0.1.11 blake3 cachetools cbor2 compressed-tensors depyf dill astor
    fastapi httpcore2 httpx2 ijson interegular jiter jsonschema jsonschema-specifications lark llguidance
    lm-format-enforcer loguru mistral-common msgspec openai opentelemetry-api oss-harmony outlines-core
    partial-json-parser prometheus-fastapi-instrumentator pybase64 pycountry pydantic pydantic-core
    pydantic-extra-types python-json-logger pyzmq referencing rpds-py setproctitle sniffio starlette truststore
    typing-inspection xgrammar)
wanted=()
for name in "${names[@]}"; do
    if [[ $name == *=* ]]; then
        wanted+=("${name%%=*}==${name#*=}")
    else
        wanted+=("$(grep -i "^$name==" requirements/cpu.lock)") || { echo "prepare.sh: $name is not locked" >&2; exit 1; }
    fi
done
echo "downloading ${#wanted[@]} packages and vllm $vllm (330 MB)"
get "${wanted[@]}"
get "vllm==$vllm"

echo "unpacking and trimming"
for wheel in "$work"/wheels/*.whl; do
    python3 -m zipfile -e "$wheel" "$work/site"
done
cd "$work/site"
# Left out: a server in Rust, libraries for other models or GPUs, sources that are compiled at run time, what only a
# browser wants. FlashAttention-2's library is for GPUs without FlashAttention-3.
rm -rf vllm/vllm-rs vllm/third_party/{deep_gemm,fmha_sm100,tml_fa4} vllm/vllm_flash_attn/cute \
    vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so vllm/_{qutlass,flashmla,flashmla_extension,flashkda,deepselect}_C.abi3.so \
    vllm/entrypoints/serve/instrumentator/static vllm/kernels/helion/configs vllm/benchmarks \
    vllm/model_executor/layers/fused_moe/configs vllm/model_executor/layers/quantization/utils/configs \
    pycountry/locales mistral_common/data ./*.data
find . \( -name '*.pyi' -o -name '*.pyc' \) -delete
find . -path '*.dist-info/*' ! -name METADATA ! -name entry_points.txt -type f -delete
python3 "$here/slim.py" vllm
cd - >/dev/null

echo "packing"
tar -C "$work/site" -cf - --sort=name --mtime=@0 --owner=0 --group=0 . | xz -6 -T1 > "$folder/site.tar.xz"
echo "$stamp" > "$folder/stamp"
finish made
