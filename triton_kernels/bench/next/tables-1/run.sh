# seconds: 170 gpus: 1
# Loads of a 16.1 GB checkpoint: bigq, transformers + bitsandbytes, accelerate + bitsandbytes, and from_pretrained.
HERE=$(cd "$(dirname "$0")" && pwd); ROOT=$(cd "$HERE/../.." && pwd)
mkdir -p "$OUT/tables-1"; export RESULTS=$(cd "$OUT/tables-1" && pwd)
export PYTHONPATH="$ROOT:$ROOT/triton_kernels:$ROOT/.peers/site:$PYTHONPATH" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
cd "$HERE" || exit 1
nvidia-smi --query-gpu=name,driver_version,memory.used --format=csv,noheader | tee "$RESULTS/gpu.txt"
nproc >> "$RESULTS/gpu.txt"; free -g | head -2 | tail -1 >> "$RESULTS/gpu.txt"
SHM=/dev/shm/tables1; [ "$(df --output=avail -k /dev/shm | tail -1)" -gt 40000000 ] || SHM=/tmp/tables1
echo "$SHM $(df -h /dev/shm | tail -1)" >> "$RESULTS/gpu.txt"
BUDGET=157 timeout -k 3 165 python3 -W ignore tables.py $SHM > "$RESULTS/stdout.txt" 2> "$RESULTS/stderr.txt"
echo "rc $?"
rm -rf $SHM ${SHM}_few ${SHM}_bnb ${SHM}_own
for f in "$RESULTS"/worker_*.log; do tail -c 1500 "$f" > "$f.tail"; rm "$f"; done
cut -c1-260 "$RESULTS/stdout.txt"; tail -n 3 "$RESULTS/stderr.txt" | cut -c1-300
