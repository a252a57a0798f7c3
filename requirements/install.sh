#!/usr/bin/env bash
# Install the CPU build of vLLM, its locked dependencies and this package into a virtual environment.
# usage: requirements/install.sh [--dependencies] [--wheel FILE] PYTHON_OF_THE_VENV [extra lock files]
#   --dependencies  everything but this package
#   --wheel FILE    this package from a wheel; without it, editable from this folder
# All paths are absolute or relative to the repository.
set -euo pipefail
cd "$(dirname "$0")/.."
package=(--editable .)
while [ "${1:0:2}" = -- ]; do
    case $1 in
        --dependencies) package=() ;;
        --wheel) package=(--force-reinstall "$2"); shift ;;
        *) echo "install.sh: unknown option $1" >&2; exit 2 ;;
    esac
    shift
done
python=$1
shift

torch=torch==2.13.0+cpu
pytorch_index=${PYTORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}

# If pip's own configuration offers the CPU wheel of torch, no other index is used. Otherwise PyTorch's index provides
# it, with the matching torchvision.
index=()
if ! "$python" -m pip install --quiet --dry-run --ignore-installed --no-deps "$torch" >/dev/null 2>&1; then
    index=(--extra-index-url "$pytorch_index")
fi

locks=(--requirement requirements/cpu.lock)
for lock in "$@"; do
    locks+=(--requirement "$lock")
done
"$python" -m pip install --disable-pip-version-check --quiet --no-deps "${index[@]}" "$torch" "${locks[@]}"
if [ ${#package[@]} -gt 0 ]; then
    "$python" -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation "${package[@]}"
fi

# Runs in every process of this environment and makes a torchvision built for CUDA importable. The environment may have
# the dependencies only.
site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
needed='import importlib.util as u; u.find_spec("ficoco_vllm") and __import__("ficoco_vllm.compat").compat'
echo "$needed.hook_torchvision()" > "$site/ficoco_vllm_torchvision.pth"

# Reducing in the decoder needs a Triton backend for the CPU. It is kept in a separate folder, which is put on the path
# only if the environment enables Triton's interpreter (TRITON_INTERPRET=1).
rm -rf "$site/ficoco_interpreter_path"
"$python" -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation \
    --target "$site/ficoco_interpreter_path" requirements/interpreter
echo "$needed.hook_interpreter()" > "$site/ficoco_vllm_interpreter.pth"
