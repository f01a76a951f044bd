# A third environment, for the tests of faults: as the first, but its MPI is MPICH. Source it after hpcmp_environment of
# jobs/environment.sh, then call
#
#     hpcmp_mpich_environment     # exports HPCMP_MPICH_PYTHON, its interpreter, or else HPCMP_MPICH_MISSING: why there is none
#
# It lies beside the first (.venv-mpich), is made once and kept.
#
# HPCMP_MPICH         "no": nothing is made
# HPCMP_MPICH_PYTHON  an interpreter of your own, whose mpi4py finds MPICH: nothing is made

hpcmp_mpich_environment() {
    export HPCMP_MPICH_PYTHON=${HPCMP_MPICH_PYTHON:-} HPCMP_MPICH_MISSING=${HPCMP_MPICH_MISSING:-}
    if [[ -n $HPCMP_MPICH_PYTHON$HPCMP_MPICH_MISSING ]]; then return 0; fi   # as the script that called this one found
    local venv=$VIRTUAL_ENV-mpich
    if [[ ${HPCMP_MPICH:-} == no ]]; then
        HPCMP_MPICH_MISSING="HPCMP_MPICH=no"
    elif _hpcmp_is_current "$venv" mpich,test || _hpcmp_mpich_install "$venv"; then
        HPCMP_MPICH_PYTHON=$venv/bin/python
    else
        HPCMP_MPICH_MISSING="no environment with MPICH could be made: see $venv.log (HPCMP_MPICH=no: none is tried)"
    fi
}

_hpcmp_mpich_install() {    # VENV
    local start=$SECONDS
    echo "hpcmp: making $1, with MPICH" >&2
    (PIP_RETRIES=1 HPCMP_VENV=$1 hpcmp_environment mpich,test) >"$1.log" 2>&1 || return 1
    echo "hpcmp: made in $((SECONDS - start)) s" >&2
}
