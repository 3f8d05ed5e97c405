#!/usr/bin/env bash
# What one GPU does in ten minutes: an 8B shape, then SmolLM2-135M-Instruct in bfloat16, which `keyed` and `repair` correct
# by 1,000 ZsRE records each, asked in chat. The figures: benchmarks/results/gpu, and metrics.json of each run.
#
#   benchmarks/gpu.sh zsre_mend_edit.json nq_open_dev.jsonl [FOLDER OF THE RUNS]
set -euo pipefail
records=$1 irrelevant=$2 runs=${3:-runs/gpu}
python=${PYTHON:-python}
"$python" -m benchmarks gpu --batches 64 --repeats 1 --out benchmarks/results/gpu
for config in zsre_small repair_small; do
    "$python" train.py --config "$config" --model.base smollm2 --model.precision bfloat16 --data.path "$records" \
        --data.format zsre --data.irrelevant "$irrelevant" --data.irrelevant_prefix "nq question: " \
        --data.max_edits "${EDITS:-1000}" --scoreboard.sample 200 --trainer.logger false --run_dir "$runs/$config"
done
