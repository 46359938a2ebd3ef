# seconds: 190 gpus: 1
here=$(cd "$(dirname "$0")" && pwd)
export NAME_K=$(basename "$here")
O="$OUT/$NAME_K"
mkdir -p "$O"
export PYTHONPATH="$here:$here/after/triton_kernels:$here/after:$PYTHONPATH"
cd "$here"
start=$(date +%s)
tests=""
for i in 0 1 2 3; do
  (cd after && SHARD=$i/4 timeout -k 5 75 python3 -m pytest -o addopts="--import-mode=importlib --strict-markers" -m "not slow" -q --tb=short -p no:cacheprovider -p shard tests/kernels/int8 > "$O/pytest$i.txt" 2>&1) &
  tests="$tests $!"
done
pids=""
for i in 0 1 2 3 4 5 6 7 8 9 10 11; do
  timeout -k 5 70 python3 bench.py compile $i 12 > "$O/compile$i.txt" 2>&1 &
  pids="$pids $!"
done
for l in 0 1 4; do
  LOOK=$l timeout -k 5 70 python3 bench.py compile 0 1 > "$O/compile-look$l.txt" 2>&1 &
  pids="$pids $!"
done
for p in $pids; do wait $p; done
cat "$O"/compile*.txt | head -60
echo "compiled after $(($(date +%s) - start)) s"
for p in $tests; do wait $p; done
tail -q -n 6 "$O"/pytest*.txt
echo "tests after $(($(date +%s) - start)) s"
while [ ! -e /tmp/nccl_done ]; do sleep 0.5; done
LIMIT=60 timeout -k 5 85 python3 bench.py time > "$O/table.txt" 2>&1
cat "$O/table.txt"
for l in 0 1 4; do
  echo "== look $l"
  LOOK=$l LIMIT=15 timeout -k 5 25 python3 bench.py time 2>&1 | tee "$O/look$l.txt"
done
echo "done after $(($(date +%s) - start)) s"
