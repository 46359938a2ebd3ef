# in the tree, PYTHONPATH=.:triton_kernels, one GPU, 30 GB of /dev/shm: tests of decoding on a GPU, and loads of 8B in bf16 and FP8 and of 20B in MXFP4
python3 -m pytest -o addopts="--import-mode=importlib" -p no:benchmark -p no:cacheprovider -n 8 -m gpu -q tests/checkpoint/test_scaled_weights.py tests/loading/test_offloaded_shards.py > $OUT/scaled-tests.txt 2>&1; tail -3 $OUT/scaled-tests.txt
timeout 120 python3 triton_kernels/bench/next/scaled/loads.py /dev/shm/scaled | tee $OUT/scaled.jsonl; rm -rf /dev/shm/scaled
