#!/usr/bin/env bash
# Every measurement of docs/benchmarks.md, beside PyTorch: three quarters of an hour on two idle cores.
#
#     bash benchmarks/run.sh PYTHON [SIZES]          # an interpreter that has PyTorch; "S M L" if no sizes are given
#
# Writes to benchmarks/results and prints its table. OpenBLAS chooses its code for the processor: what the environment
# says of that (OPENBLAS_CORETYPE) is left out.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
torch=${1:?an interpreter that has PyTorch}
sizes=${2:-S M L}
unset OPENBLAS_CORETYPE
source jobs/environment.sh
hpcmp_environment openmpi

step() { python benchmarks/step.py --torch "$torch" --rounds 5 "$@" || echo "failed: $*" >&2; }

for size in $sizes; do
    steps=$([[ $size == S ]] && echo 3 || echo 1)
    for threads in 1 2; do
        step --size "$size" --threads "$threads" --steps "$steps" --variants eager,tuned,compiled
    done
    for layout in tp dp pp; do
        step --size "$size" --layout "$layout" --steps "$steps" --variants eager,tuned
    done
done
python benchmarks/overhead.py --torch "$torch"
mpirun -n 2 python benchmarks/overhead.py
mpirun -n 2 python benchmarks/collectives.py --torch "$torch"
mpirun -n 2 python benchmarks/overlap.py
python benchmarks/kernels.py
python benchmarks/report.py benchmarks/results/*-[SML]-*.json
