# seconds: 140 gpus: 1
# QLoRA steps with compiled blocks by turns: bigq, bitsandbytes, bf16; and 4 x 512 without checkpointing.
HERE=$(cd "$(dirname "$0")" && pwd); ROOT=$(cd "$HERE/../.." && pwd)
mkdir -p "$OUT/tables-4"; export RESULTS=$(cd "$OUT/tables-4" && pwd)
export PYTHONPATH="$ROOT:$ROOT/triton_kernels:$ROOT/.peers/site:$PYTHONPATH" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
cd "$HERE" || exit 1
nvidia-smi --query-gpu=name,driver_version,memory.used --format=csv,noheader | tee "$RESULTS/gpu.txt"
nproc >> "$RESULTS/gpu.txt"
BUDGET=126 timeout -k 3 135 python3 -W ignore train.py > "$RESULTS/stdout.txt" 2> "$RESULTS/stderr.txt"
echo "rc $?"
tail -c 300000 "$RESULTS/stderr.txt" > "$RESULTS/stderr_tail.txt"; rm "$RESULTS/stderr.txt"
cut -c1-230 "$RESULTS/stdout.txt" | grep -v '"row": "profile"'
grep -c "Recompiling function" "$RESULTS/stderr_tail.txt"
tail -n 3 "$RESULTS/stderr_tail.txt" | cut -c1-300
