#!/usr/bin/env bash
# benchmarks/network.py on virtual hosts with a slow link between them (tests/cluster/netbox; needs root):
#
#     bash benchmarks/network.sh [HOSTS] [RANKS A HOST] [MBIT/S OF A LINK]        # 2 2 1000
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
hosts=${1:-2} each=${2:-2} rate=${3:-1000}
source jobs/environment.sh
hpcmp_environment openmpi
scratch=$(mktemp -d)
export NETBOX=$scratch/box OMPI_MCA_btl=self,sm,tcp OMPI_MCA_btl_tcp_links=2
trap 'tests/cluster/netbox stop; rm -rf "$scratch"' EXIT
tests/cluster/netbox start -n "$hosts" -r "$rate"
for by in slot node; do     # in blocks, and in turn
    timeout 300 tests/cluster/netbox mpirun "$each" -n $((hosts * each)) --map-by $by \
        python benchmarks/network.py --name "${hosts}x$each-$rate-$by"
    echo
done
