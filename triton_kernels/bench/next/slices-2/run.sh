# seconds: 190 gpus: 1
set -u
here=$(cd "$(dirname "$0")" && pwd)
out="$OUT/slices-2"
mkdir -p "$out"
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}"
export PYTHONPATH="$here:$here/tree:$here/tree/triton_kernels:$here/tree/tests/support:${PYTHONPATH:-}"
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-/tmp/triton-slices}"
cd "$here"
TIME_S=50 timeout 115 python3 bench.py > "$out/bench.log" 2>&1
echo "bench rc $?"; tail -12 "$out/bench.log" | cut -c1-300
cd "$here/tree"
N=""
python3 -c "import xdist" 2>/dev/null && N="-n 12 --dist=worksteal"
timeout 75 python3 -m pytest -o addopts="--import-mode=importlib --strict-markers" -q -p no:cacheprovider -p no:benchmark $N -m "not slow" \
  tests/kernels/block4/gluon/test_sliced.py tests/kernels/block4/gluon/test_sliced_stack.py tests/kernels/block4/test_row_parts.py tests/kernels/block4/test_grouped.py \
  -k "no_weight or slices or abreast or each_row or repeats or block_sizes or rows_of_a_linear or any_order" > "$out/tests.log" 2>&1
echo "tests rc $?"; tail -8 "$out/tests.log" | cut -c1-300
