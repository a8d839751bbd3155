#!/usr/bin/env bash
# The first half hour with a GPU: is it right, how fast is it, and the papers' smallest systems end to end.
#
#   here:  bash tests/gpu_day.sh pack CORPUS EVAL [PEER.py]   makes .gpu/: 10M words prepared, BLiMP, the peer (35 MB)
#   there: bash tests/gpu_day.sh 1    tests, rates, step times
#          bash tests/gpu_day.sh 2    tools.bench, beside the peer
#          bash tests/gpu_day.sh 3    DistilledGPT-44M whole: teachers, student, plain twin; starts Llama-58M
#          bash tests/gpu_day.sh 4    Llama-58M, scores of all, Llama-360M as far as it gets
#          bash tests/gpu_day.sh 5    Llama-360M goes on, then GPT2-705M, then Baby Llama
#
# In the project's root, one call after another. What is cut after LIMIT seconds goes on if its number is repeated.
# Results: $OUT/summary.txt, steps.jsonl, bench.jsonl, runs.tar.gz. EXTRA="--max_iters=26" tries the way.
set -u
[ -f distill.py ] || { echo "run me in the project's root"; exit 1; }
[ $# -gt 0 ] || { sed -n '2,/^set/{/^#/p}' "$0"; exit 1; }
LIMIT=${LIMIT:-525} W=${W:-/tmp/gpu_day} PY=${PY:-python3} EXTRA=${EXTRA:-} OUT=${OUT:-/tmp/gpu_day/results}

if [ "${1:-}" = pack ]; then
  set -e
  mkdir -p .gpu
  [ ! -d .git ] || grep -qx /.gpu/ .git/info/exclude || echo /.gpu/ >> .git/info/exclude
  $PY prepare.py --input_dir="$2" --data_dir=.gpu/babylm --bos=line
  tar czf .gpu/babylm.tar.gz -C .gpu babylm
  rm -r .gpu/babylm
  tar czf .gpu/pairs.tar.gz -C "$3" blimp_filtered supplement_filtered
  [ -z "${4:-}" ] || cp "$4" .gpu/peer.py
  du -sh .gpu
  exit
fi

mkdir -p $W/log $W/done $W/out $W/pairs $OUT
export PYTHONUNBUFFERED=1 TMPDIR=$W OMP_NUM_THREADS=4
export TORCHINDUCTOR_COMPILE_THREADS=8 TORCHINDUCTOR_CACHE_DIR=$W/inductor TRITON_CACHE_DIR=$W/triton
[ -d $W/babylm ] || { tar xzf .gpu/babylm.tar.gz -C $W && tar xzf .gpu/pairs.tar.gz -C $W/pairs; } || exit 1

say() { echo "[$SECONDS s] $*" | tee -a $OUT/summary.txt; }
job() {  # NAME COMMAND...: once; cut at LIMIT, gone on with the next time
  local name=$1 left=$((LIMIT - SECONDS)) began=$SECONDS code
  shift
  [ -e $W/done/$name ] && return 0
  [ $left -lt 15 ] && { say "$name: no time left"; return 1; }
  timeout -k 30 -s TERM $left "$@" >> $W/log/$name.txt 2>&1
  code=$?
  [ $code = 0 ] && touch $W/done/$name
  say "$name: exit $code after $((SECONDS - began)) s: $(tail -n 1 $W/log/$name.txt | cut -c1-300)"
  return $code
}
probe() {
  job $1 $PY tests/gpu_probe.py $1
  cat $W/log/$1.txt >> $OUT/summary.txt
}
step() {  # CONFIG FLAGS...
  local name=step_$(echo "$*" | tr -c 'a-z0-9\n' _)
  job $name $PY tests/gpu_probe.py step config/$1.py --data_dir=$W/babylm "${@:2}" $EXTRA &&
    tail -n 1 $W/log/$name.txt >> $OUT/steps.jsonl
}
benched() {  # NAME COMMAND...
  job bench_$1 "${@:2}" && echo "{\"way\": \"$1\"} $(tail -n 1 $W/log/bench_$1.txt)" >> $OUT/bench.jsonl
}
run() {  # NAME SCRIPT CONFIG FLAGS...
  job $1 $PY $2.py config/$3.py --resume --data_dir=$W/babylm --out_dir=$W/out/$1 --log_interval=100 "${@:4}" $EXTRA
}
score() {  # NAME RUN...: several are an ensemble
  local name=$1 runs=$(printf ",$W/out/%s" "${@:2}")
  job blimp_$name $PY eval_blimp.py --ckpt=${runs:1} --data=$W/pairs/blimp_filtered,$W/pairs/supplement_filtered \
    --batch_tokens=16384 --compile=off --out=$W/out/blimp_$name.json
}
distilled() {
  run distilled_44m distill distilledgpt_44m --teachers=$W/out/gpt2_44m,$W/out/llama_60m --eval_interval=4000
}
plain() {  # its twin, with its recipe
  run plain_44m train tinyminds_gpt2_44m --batch_size=32 --learning_rate=3e-4 --warmup_iters=200 \
    --weight_decay=0.1 --eval_interval=4000
}

for part in "$@"; do case $part in
1)
  probe machine
  job tests $PY -m pytest -q -p no:cacheprovider tests/test_cuda.py
  tail -n 40 $W/log/tests.txt >> $OUT/summary.txt
  probe attention
  probe loss
  step babyllama
  step babyllama --cuda_graphs=off
  step babyllama --loss_chunk=64
  step babyllama --batch_size=8  # what one of four ranks does
  step llama_58m
  step llama_58m --cuda_graphs=off
  for micro in 32 128; do
    step gpt2_705m --micro_batch_size=$micro --max_iters=30
    step babyllama2 --micro_batch_size=$micro --max_iters=30
  done
  ;;
2)
  steps=$([ -n "$EXTRA" ] && echo 10 || echo 100)
  bench="$PY -m tools.bench --json --batch_size=32 --steps=$steps --teachers_dir=$W/bench_teachers"
  for preset in babyllama tinyminds; do
    peer="$PY .gpu/peer.py --preset $preset --batch 32 --seq 128 --steps 25"
    benched ${preset}_bf16 $bench --preset=$preset --dtype=bfloat16
    if [ -f .gpu/peer.py ]; then
      benched ${preset}_peer $peer --bf16
      benched ${preset}_peer_compiled $peer --bf16 --compile
    fi
  done
  bench="$bench --preset=babyllama"
  benched plain_formula $bench --dtype=bfloat16 --compile=off --loss_chunk=0
  benched cache $bench --dtype=bfloat16 --teacher_cache=$W/bench_cache
  benched int8 $bench --dtype=bfloat16 --teacher_dtype=int8
  benched float32 $bench --dtype=float32
  rm -rf $W/bench_teachers $W/bench_cache
  ;;
3)  # side by side, since each alone waits for its host
  run gpt2_44m train tinyminds_gpt2_44m --eval_interval=2000 &
  teachers=$!
  run llama_60m train tinyminds_llama_60m --eval_interval=2000 &
  teachers="$teachers $!"
  plain &
  wait $teachers
  [ -e $W/done/gpt2_44m ] && [ -e $W/done/llama_60m ] && distilled &
  run llama_58m train llama_58m --eval_interval=4000 &
  wait
  ;;
4)
  distilled &
  student=$!
  plain &
  student="$student $!"
  run llama_58m train llama_58m --eval_interval=4000 &
  llama=$!
  run llama_360m train llama_360m --micro_batch_size=128 --eval_interval=500 &
  score gpt2_44m gpt2_44m
  score llama_60m llama_60m
  score ensemble gpt2_44m llama_60m
  wait $student
  score distilled_44m distilled_44m
  score plain_44m plain_44m
  job cpu_scores $PY eval_blimp.py --device=cpu --ckpt=$W/out/distilled_44m --data=$W/pairs/supplement_filtered \
    --compile=off --out=$W/out/blimp_cpu.json
  wait $llama
  [ -e $W/done/llama_58m ] && score llama_58m llama_58m
  wait
  ;;
5)
  run llama_360m train llama_360m --micro_batch_size=128 --eval_interval=500
  run gpt2_705m train gpt2_705m --micro_batch_size=128 --eval_interval=1500
  [ -e $W/done/llama_360m ] && [ -e $W/done/gpt2_705m ] &&
    run babyllama distill babyllama --teachers=$W/out/gpt2_705m,$W/out/llama_360m --eval_interval=4000 &&
    score babyllama babyllama
  ;;
*) echo "no part $part"; exit 1 ;;
esac; done

$PY tests/gpu_probe.py table $W/out | tee -a $OUT/summary.txt
say "end of part $*; done so far: $(ls $W/done | tr '\n' ' ')"
(cd $W && find log out -name '*.txt' -o -name metrics.jsonl -o -name train_config.json -o -name 'blimp_*.json') |
  tar czf $OUT/runs.tar.gz -C $W -T -
