#!/bin/bash
# Tests and times the expert cache on one GPU, in 100 s on an H200. The last line says what failed.
here=$(cd "$(dirname "$0")" && pwd)
root=$here
until [ -f "$root/pyproject.toml" ]; do root=$(dirname "$root"); done
cd "$root" || exit 1
export PYTHONPATH=.:triton_kernels
out=${OUT:-$(mktemp -d)}
python=${PYTHON:-python3.12}
pytest="$python -m pytest -q -p no:cacheprovider -n 0 --durations=5"
failed=
begin=$SECONDS
timeout 55 $pytest -m gpu tests/offload/test_cache_experts.py tests/offload/test_in_place.py >"$out/offload.txt" 2>&1 &
offload=$!
timeout 55 $pytest tests/kernels/test_slots.py >"$out/slots.txt" 2>&1 &
slots=$!
timeout 55 $pytest tests/kernels/block4/test_grouped.py -k part_of >"$out/grouped.txt" 2>&1 &
grouped=$!
wait $offload || failed="$failed offload"
wait $slots || failed="$failed slots"
wait $grouped || failed="$failed grouped"
tail -n 25 "$out"/offload.txt "$out"/slots.txt "$out"/grouped.txt
echo "tests took $((SECONDS - begin)) s"
measure=$root/triton_kernels/bench/next/expertcache/measure.py
timeout $((98 - (SECONDS - begin))) $python "$measure" 2>&1 | tee "$out/measured.txt"
[ "${PIPESTATUS[0]}" = 0 ] || failed="$failed measure"
echo "all took $((SECONDS - begin)) s; failed:${failed:- nothing}"
[ -z "$failed" ]
