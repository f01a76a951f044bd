#!/usr/bin/env bash
# The tests of hpcmp in batch jobs, on a real Slurm of four virtual nodes that is started on this machine and stopped at
# the end. Arguments go to pytest:
#
#     bash tests/cluster/run.sh                                  # needs root, and Debian's or Ubuntu's Slurm
#     HPCMP_CLUSTER_INSTALL=1 bash tests/cluster/run.sh          # which this lets it install; so does CI=true
#     bash tests/cluster/run.sh -k limit
#
# Where that cannot be, one line says why, and the exit code is 0. About two minutes on 2 cores.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PATH=$PATH:/usr/sbin:/sbin
packages=(iproute2 slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge libpmix-dev)

skip() { echo "tests/cluster: skipped: $*" && exit 0; }

installed() {
    command -v slurmctld slurmd srun munged unshare nsenter ip tc >/dev/null &&
        compgen -G "/usr/lib/*/libpmix.so" >/dev/null    # what srun --mpi=pmix looks for
}

[[ $(id -u) == 0 ]] || skip "virtual nodes need root"
unshare --net --uts --ipc --mount --pid --fork --mount-proc true 2>/dev/null || skip "no namespaces on this machine"
if ! installed; then
    command -v apt-get >/dev/null || skip "there is no Slurm, and no apt-get to install it"
    [[ ${CI:-} == true || -n ${HPCMP_CLUSTER_INSTALL:-} ]] || skip "needs: apt-get install ${packages[*]}"
    echo "tests/cluster: installing ${packages[*]}"
    { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends "${packages[@]}"; } \
        >/dev/null || skip "apt-get cannot install ${packages[*]}"
    installed || skip "what apt-get has installed is not all that is needed"
fi

source jobs/environment.sh
hpcmp_environment openmpi,test
scratch=$(mktemp -d)
export SLURMBOX=$scratch/box SLURMBOX_PORT=$((20000 + RANDOM % 240 * 50))
trap 'tests/cluster/slurmbox stop; rm -rf "$scratch"' EXIT
tests/cluster/slurmbox start -n 4 -c 8
eval "$(tests/cluster/slurmbox env)"
code=0
timeout --foreground --kill-after=20 540 python -m pytest tests/cluster --basetemp "$scratch/pytest" -p no:cacheprovider "$@" || code=$?
tests/cluster/slurmbox stop || code=1
exit $code
