#!/bin/bash
# From the published model to the table. The same command goes on where it was stopped.
#   bash examples/smollm2/run.sh FOLDER [--config.KEY=VALUE ...]
# FOLDER holds model/ and data/ (README.md); all results go there too. Settings hold for all stages.
set -e
here=$(cd "$(dirname "$0")" && pwd)
export PYTHONPATH="$here/../..:$here${PYTHONPATH:+:$PYTHONPATH}"
config="$here/../../configs/aepo_smollm2.py"
cd "$1"
settings=("${@:2}")

evaluate() {  # RUN BENCHMARK OTHER_FLAGS; without a BENCHMARK several samples of SVAMP's problems
  [ -e "$1/evaluate/${2:+file_}${2:-test}/results.json" ] || python -m ares_jax.evaluate \
    --config="$config" --workdir="$1" --benchmark="${2:+data/$2.jsonl}" "${@:3}" "${settings[@]}"
}

[ -e inspect/index.html ] || python -m ares_jax.inspect_data --config="$config" "${settings[@]}"
published=(--model=model --judge=last_number:verdicts)
evaluate base svamp_test "${published[@]}"
python -m ares_jax.train --config="$config" --workdir=cold "${settings[@]}" --config.aepo.steps=0
evaluate base gsm8k_test "${published[@]}"
evaluate cold gsm8k_test
evaluate base "" "${published[@]}" --config.evaluate.samples=2
for arm in aepo grpo; do
  if [ ! -e $arm/config.json ]; then  # both arms begin with the same cold start
    rm -rf $arm && mkdir $arm
    cp -r cold/warmup cold/adacs cold/curation.json cold/results.json $arm
  fi
  python -m ares_jax.train --config="$config:$arm" --workdir=$arm "${settings[@]}"
  evaluate $arm gsm8k_test
  for check in hwe kl passk; do
    python -m ares_jax.diagnose $check --workdir=$arm > $arm/$check.txt
  done
  python -m ares_jax.report --workdir=$arm
done
python "$here/table.py" .
