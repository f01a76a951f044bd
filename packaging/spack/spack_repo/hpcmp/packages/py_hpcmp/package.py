# A Spack package (repositories of API v2, Spack 1.0 or later) of a clone of hpcmp:
#
#     spack repo add packaging/spack/spack_repo/hpcmp
#     spack env create hpcmp && spack env activate hpcmp
#     spack add py-hpcmp@main +cuda cuda_arch=90 ^openmpi +cuda fabrics=ucx schedulers=slurm
#     spack install
#
# That builds the head of the clone's branch main. To build the clone as it is, changes included, say before:
#
#     spack develop --path "$PWD" py-hpcmp@main

# ruff: noqa: F403, F405, I001
from pathlib import Path

from spack_repo.builtin.build_systems.cuda import CudaPackage
from spack_repo.builtin.build_systems.python import PythonPackage

from spack.package import *


class PyHpcmp(PythonPackage, CudaPackage):
    """Trains transformers too large for one device, as a batch job under mpirun or srun: NumPy or CuPy, MPI, HDF5."""

    git = Path(__file__).resolve().parents[6].as_uri()  # the clone that this file is in

    license("Apache-2.0")

    version("main", branch="main")

    variant("mpio", default=False, description="Checkpoints of one file through parallel HDF5 (checkpoint.storage)")
    variant("plot", default=False, description="Plots of the loss (run.plot)")

    with default_args(type="build"):
        depends_on("py-setuptools@77:")

    with default_args(type=("build", "run")):
        depends_on("python@3.11:")
        depends_on("py-numpy@2.1:")
        depends_on("py-mpi4py@4:")
        depends_on("py-h5py@3.11:")
        depends_on("py-h5py +mpi", when="+mpio")
        depends_on("py-h5py ~mpi", when="~mpio")
        depends_on("py-ml-dtypes@0.5:")
        depends_on("py-numba@0.62:")
        depends_on("py-xxhash@3.4:")
        depends_on("py-matplotlib@3.8:", when="+plot")
        for arch in CudaPackage.cuda_arch_values:
            depends_on(f"py-cupy@13.3: +cuda cuda_arch={arch}", when=f"+cuda cuda_arch={arch}")

    conflicts("cuda_arch=none", when="+cuda", msg="+cuda needs a cuda_arch, such as 90 for an H100")

    import_modules = ["hpcmp", "hpcmp.cli"]
