#!/usr/bin/env bash
# A study of scaling: the same 100 steps of a run on 1, 2, 4, ... nodes, a job each, which all start as nodes come free.
#
#     bash jobs/scaling.sh CONFIG.toml SITE.toml MOST_NODES [section.key=value ...]
#
# Each writes runs/scaling/NODES/metrics.jsonl, with the tokens a second of every step.
set -euo pipefail
config=$1 site=$2 most=$3
shift 3
mkdir -p runs/scaling
for ((nodes = 1; nodes <= most; nodes *= 2)); do
    hpcmp job "$config" --site "$site" --nodes "$nodes" --time 30 --name "scaling-$nodes" \
        --out "runs/scaling/$nodes.sbatch" --submit \
        train.steps=100 optimizer.warmup=10 checkpoint.resume=false run.directory="runs/scaling/$nodes" "$@"
done
