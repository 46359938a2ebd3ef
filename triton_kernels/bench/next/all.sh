ROOT=$PWD; TOP=$OUT; began=$SECONDS
mkdir -p $TOP/wg $TOP/nccl $TOP/tests $TOP/whole-3
T=$ROOT/.bench/int
export PYTHONPATH=$T:$T/triton_kernels:$T/tests/support:$ROOT/.peers/site HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
cd $T
# both GPUs: shards under NCCL
(timeout -k 3 80 python3 -m pytest -o addopts="--import-mode=importlib --strict-markers" -p no:benchmark -p no:cacheprovider -n 0 --nccl -q --tb=short -rfE tests/integrations/test_frozen_shards.py -m slow > $TOP/nccl/frozen-slow.txt 2>&1; echo "rc $? at $((SECONDS-began))" >> $TOP/nccl/frozen-slow.txt) & n1=$!
(timeout -k 3 40 python3 -m pytest -o addopts="--import-mode=importlib --strict-markers" -p no:benchmark -p no:cacheprovider -n 0 --nccl -q --tb=short -rfE tests/integrations/test_unit_tags.py > $TOP/nccl/tags.txt 2>&1; echo "rc $?" >> $TOP/nccl/tags.txt) & n2=$!
# GPU 1: tests
(export CUDA_VISIBLE_DEVICES=1; P="python3 -m pytest -o addopts=--import-mode=importlib -p no:benchmark -p no:cacheprovider -m gpu -q --tb=short -rfE --strict-markers"
timeout -k 3 125 $P -n 14 tests/kernels/block4/gluon/test_wgmma.py tests/kernels/block4/test_grouped.py tests/kernels/block4/gluon/test_sliced.py tests/kernels/block4/gluon/test_sliced_stack.py tests/kernels/block4/test_linear.py tests/kernels/block4/test_row_parts.py tests/kernels/block4/test_tokens.py tests/kernels/block4/test_choose.py > $TOP/tests/one.txt 2>&1; echo "rc $? at $((SECONDS-began))" >> $TOP/tests/one.txt
timeout -k 3 $((208-SECONDS+began)) $P -n 16 -v tests --deselect tests/kernels/block4/gluon/test_wgmma.py --deselect tests/kernels/block4/test_grouped.py --deselect tests/kernels/block4/gluon/test_sliced.py --deselect tests/kernels/block4/gluon/test_sliced_stack.py > $TOP/tests/two.txt 2>&1; echo "rc $? at $((SECONDS-began))" >> $TOP/tests/two.txt) & t=$!
# GPU 0: times
(export CUDA_VISIBLE_DEVICES=0
for i in 0 1 2 3 4 5 6 7 8 9; do timeout -k 2 75 python3 $ROOT/.bench/final.py warm $i 10 > $TOP/wg/warm$i.txt 2>&1 & done; wait $(jobs -p)
echo "warm at $((SECONDS-began))" > $TOP/wg/at.txt
while kill -0 $n1 2>/dev/null; do sleep 0.3; done; echo "nccl ended at $((SECONDS-began))" >> $TOP/wg/at.txt
timeout -k 2 60 python3 $ROOT/.bench/final.py linears > $TOP/wg/linears.txt 2>&1; echo "linears at $((SECONDS-began))" >> $TOP/wg/at.txt
timeout -k 2 40 python3 $ROOT/.bench/final.py stacks > $TOP/wg/stacks.txt 2>&1; echo "stacks at $((SECONDS-began))" >> $TOP/wg/at.txt
left=$((208-SECONDS+began)); cd $ROOT/.bench/whole-3 && timeout -k 2 $left python3 modules.py --seconds $((left-6)) --out $TOP/whole-3/rows.jsonl > $TOP/whole-3/out.txt 2>&1) & w=$!
wait $n1 $n2 $t $w
cat $TOP/wg/at.txt; tail -n 3 $TOP/nccl/*.txt | cut -c1-300; tail -n 12 $TOP/tests/one.txt | cut -c1-250; tail -n 14 $TOP/tests/two.txt | cut -c1-250; grep -h "warm " $TOP/wg/warm*.txt | cut -c1-250 | head; cut -c1-420 $TOP/wg/linears.txt; cut -c1-420 $TOP/wg/stacks.txt; tail -n 3 $TOP/whole-3/out.txt | cut -c1-300
cd $TOP && tar czf all.tgz wg nccl tests whole-3 && rm -rf wg nccl tests whole-3
