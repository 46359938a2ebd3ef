# seconds: 170 gpus: 1
# Decode with transformers' modules, offload to the CPU, eager host times: bigq, bitsandbytes, bf16, accelerate.
HERE=$(cd "$(dirname "$0")" && pwd); ROOT=$(cd "$HERE/../.." && pwd)
mkdir -p "$OUT/tables-2"; export RESULTS=$(cd "$OUT/tables-2" && pwd)
export PYTHONPATH="$ROOT:$ROOT/triton_kernels:$ROOT/.peers/site:$PYTHONPATH" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
cd "$HERE" || exit 1
nvidia-smi --query-gpu=name,driver_version,memory.used --format=csv,noheader | tee "$RESULTS/gpu.txt"
nproc >> "$RESULTS/gpu.txt"
SHM=/dev/shm/tables2; [ "$(df --output=avail -k /dev/shm | tail -1)" -gt 18000000 ] || SHM=/tmp/tables2
echo "$SHM" >> "$RESULTS/gpu.txt"
BUDGET=155 timeout -k 3 164 python3 -W ignore tables.py $SHM > "$RESULTS/stdout.txt" 2> "$RESULTS/stderr.txt"
echo "rc $?"
rm -rf $SHM
for f in "$RESULTS"/worker_*.log; do tail -c 4000 "$f" > "$f.tail"; rm "$f"; done
cut -c1-260 "$RESULTS/stdout.txt"; tail -n 3 "$RESULTS/stderr.txt" | cut -c1-300
