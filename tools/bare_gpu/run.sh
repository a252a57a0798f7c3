#!/usr/bin/env bash
# Everything that is tried on a bare GPU machine, most valuable first; each step has a limit and a log of its own, and
# none stops another. Run in the repository root, where prepare.sh has made FOLDER.
# usage: bash FOLDER/run.sh [step ...]       steps: see `all` below; default: all of them
# SECONDS_IN_ALL (default 530) ends the last step early; results and logs: $OUT (default ./build/gpu).
set -u
folder=$(cd "$(dirname "$0")" && pwd)
all=(libraries answers kernels ops serving steps)
steps=("${@:-${all[@]}}")
out=${OUT:-$PWD/build/gpu}
deadline=${SECONDS_IN_ALL:-530}
mkdir -p "$out/logs" "$out/json"
site=/tmp/site
export PYTHONUNBUFFERED=1 PYTHONPATH="$site:$PWD" TRITON_CACHE_DIR=/tmp/triton VLLM_CACHE_ROOT=/tmp/vllm
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 XDG_CACHE_HOME=/tmp/cache TOKENIZERS_PARALLELISM=false
# There may be no network but the loopback, and FlashInfer is not carried.
export VLLM_HOST_IP=127.0.0.1 NCCL_SOCKET_IFNAME=lo GLOO_SOCKET_IFNAME=lo VLLM_USE_FLASHINFER_SAMPLER=0
unset VLLM_ATTENTION_BACKEND TRITON_INTERPRET || true

left() { echo $((deadline - SECONDS)); }
try() { # try LIMIT NAME COMMAND...: the command in a log of its own, its result in one line
    local limit=$1 name=$2 begin=$SECONDS code=0 rest
    shift 2
    rest=$(left)
    [ "$rest" -lt 15 ] && { echo "SKIPPED $name: $rest s left"; return 1; }
    [ "$limit" -gt "$rest" ] && limit=$rest
    timeout --kill-after=5 "$limit" "$@" >"$out/logs/$name.log" 2>&1 || code=$?
    if [ $code = 0 ]; then echo "OK      $name ($((SECONDS - begin)) s)"; else
        echo "FAILED  $name with $code ($((SECONDS - begin)) s); the end of its log:"
        tail -n 12 "$out/logs/$name.log" | cut -c1-300 | sed 's/^/        /'
    fi
    return $code
}
finish() { # what comes back: a few small files
    (cd "$out" && tar -czf logs.tar.gz logs json && rm -rf logs)
    for file in "$out"/json/*.json; do [ -s "$file" ] && echo "== ${file##*/}" && head -c 1500 "$file" | tr -d '\n ' && echo; done
    rm -rf "$out/json"
    echo "in all $SECONDS s; everything is in logs.tar.gz"
}
trap finish EXIT

if [ ! -f $site/done ]; then
    try 60 install python3 -m tools.bare_gpu.install "$folder/site.tar.xz" "$site" || exit 1
fi
cat "$out/logs/install.log" 2>/dev/null

has() { [[ " ${steps[*]} " == *" $1 "* ]]; }

if has libraries; then
    try 90 libraries python3 -m tools.bare_gpu.libraries "$out/json/libraries.json"
fi
bench() { # bench LIMIT NAME ARGUMENTS: a part of bench-gpu, its result in json/NAME.json
    local limit=$1 name=$2
    shift 2
    try "$limit" "$name" python3 -m ficoco_vllm.benchmarks.gpu --out "$out/json/$name.json" "$@"
    grep '^BAR' "$out/logs/$name.log" 2>/dev/null
}
# These two look at results, not at time: they run concurrently.
if has answers; then
    OMP_NUM_THREADS=2 bench 200 answers --steps answers &
fi
if has kernels; then
    # Warnings of other versions than the lock's are not failures, and tests/conftest.py imports what is not there.
    try 200 kernels python3 -m pytest tests/kernels --confcutdir=tests/kernels -q --no-header -p no:cacheprovider \
        -W default -n 6 --dist worksteal --timeout 120 --junitxml="$out/logs/kernels.xml" &
fi
wait
grep -hE '[0-9]+ (passed|failed)' "$out/logs/kernels.log" 2>/dev/null | tail -n 1
if has ops; then
    bench 90 ops --steps kernels
    try 60 ops-against-torch python3 -m ficoco_vllm.benchmarks.kernels.bench --out "$out/json/ops-against-torch.json"
fi
if has serving; then
    bench 360 serving --steps serving
fi
if has steps; then
    bench 150 steps --steps steps
fi
exit 0
