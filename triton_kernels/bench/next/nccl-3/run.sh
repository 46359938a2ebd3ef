# seconds: 190 gpus: 2
HERE=$(cd "$(dirname "$0")" && pwd); ROOT=$(cd "$HERE/../.." && pwd)
RES="$OUT/nccl-3"; mkdir -p "$RES"; TMP=$(mktemp -d); began=$SECONDS
paths=""; IFS=:; for p in $PYTHONPATH; do case "$p" in /*) paths="$paths:$p";; ?*) [ -e "$HERE/$p" ] && paths="$paths:$HERE/$p" || paths="$paths:$ROOT/$p";; esac; done; unset IFS
export PYTHONPATH="$HERE/early:$HERE/tree:$HERE/tree/triton_kernels:$HERE/tree/tests/support$paths:$ROOT/.peers/site"
export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 TORCH_NCCL_ASYNC_ERROR_HANDLING=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false STACKS_EVERY=75
cd "$HERE/tree" || exit 1
LOG="$RES/report.txt"; : > "$LOG"
say() { echo "$@" | tee -a "$LOG"; }
mkdir -p "$TMP/stacks"
run_tests() { # name, arguments of pytest
  start=$SECONDS; name=$1; shift
  STACKS="$TMP/stacks" STACKS_NAME="$name" timeout -k 5 "${LIMIT:-100}" python3 -m pytest -n 0 --nccl -p no:cacheprovider -q --tb=short -ra --durations=4 --durations-min=0.5 "$@" > "$TMP/$name.txt" 2>&1
  code=$?; echo "$name: exit $code after $((SECONDS - start)) s: $(tail -1 "$TMP/$name.txt")" >> "$TMP/codes.txt"
}
SHM=/dev/shm/nccl3; [ "$(df --output=avail -k /dev/shm | tail -1)" -gt 18000000 ] || SHM=/tmp/nccl3
timeout -k 5 60 python3 "$HERE/loads.py" make $SHM > "$TMP/make.txt" 2>&1 & maker=$!
F=tests/integrations/test_frozen_shards
run_tests mixed ${F}_of_any_model.py -k "2 and mixed" & a=$!
run_tests any ${F}_of_any_model.py -k "2 and not mixed" & b=$!
run_tests frozen-slow $F.py -m slow & c=$!
run_tests frozen $F.py & d=$!
run_tests tags tests/integrations/test_unit_tags.py & e=$!
wait $a $b $c $d $e $maker
say "-- tests ($((SECONDS - began)) s in all)"; tee -a "$LOG" < "$TMP/codes.txt"
for n in mixed any frozen-slow frozen tags; do say "-- $n"; tail -c 9000 "$TMP/$n.txt" >> "$LOG"; tail -12 "$TMP/$n.txt" | cut -c1-250; done
last=""; grep -q "exit 1[23]" "$TMP/codes.txt" && last=--last
timeout 20 python3 "$HERE/early/stack_summary.py" "$TMP/stacks" $last >> "$LOG" 2>&1
say "-- seconds of loads ($((SECONDS - began)) s in all)"
timeout -k 5 35 python3 "$HERE/loads.py" run $SHM 2>&1 | grep -v Warning | tail -30 | tee -a "$LOG"
say "-- what tags cost ($((SECONDS - began)) s in all)"
timeout -k 5 45 python3 "$HERE/overhead.py" 2>&1 | tail -12 | tee -a "$LOG"
say "-- done after $((SECONDS - began)) s"
rm -rf $SHM "$TMP"
exit 0
