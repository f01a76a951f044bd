"""ReFrame's checks of an installation of hpcmp on a site (ReFrame 4; no data are needed, nothing is left behind).

reframe --config-file SITE.py --checkpath packaging/reframe --run
reframe ... --setvar ranks=16 --setvar ranks_per_node=8 --setvar device=cuda
"""

import reframe as rfm
import reframe.utility.sanity as sn
from reframe.core.builtins import parameter, run_before, sanity_function, variable


class HpcmpCheck(rfm.RunOnlyRegressionTest):
    """A command of hpcmp on several ranks; ``hpcmp`` is on PATH, or a module of the environment provides it."""

    ranks = variable(int, value=4)
    ranks_per_node = variable(int, value=2)
    device = variable(str, value="cpu")
    valid_systems = ["*"]
    valid_prog_environs = ["*"]
    executable = "hpcmp"
    time_limit = "10m"

    @run_before("run")
    def set_ranks(self):
        self.num_tasks, self.num_tasks_per_node = self.ranks, self.ranks_per_node
        self.env_vars["OMP_NUM_THREADS"] = "1"


@rfm.simple_test
class HpcmpDoctor(HpcmpCheck):
    """MPI joins all ranks, and ``hpcmp doctor`` finds no problem."""

    descr = "hpcmp doctor: MPI, HDF5, threads, GPUs"
    executable_opts = ["doctor", "--json"]

    @sanity_function
    def no_problem(self):
        return sn.assert_found(r'"exit_code": 0', self.stdout)


@rfm.simple_test
class HpcmpVerify(HpcmpCheck):
    """A layout has the serial model's gradients and weights, to 1e-10: MPI, NCCL and the kernels compute rightly."""

    layout = parameter(["tp=2", "pp=2,tp=2", "cp=2", "zero=3"])
    descr = "hpcmp verify: a layout has the serial model's numbers"

    @run_before("run")
    def write_configuration(self):
        model = 'style = "llama"\\nlayers = 4\\nhidden = 64\\nheads = 4\\nsequence = 64\\nvocabulary = 256'
        train = f'batch = 8\\ndevice = "{self.device}"'
        self.prerun_cmds = [f"printf '[model]\\n{model}\\n[train]\\n{train}\\n' >check.toml"]
        self.executable_opts = ["verify", "check.toml", "--layout", self.layout, "--json"]

    @sanity_function
    def equals_the_serial_model(self):
        return sn.assert_found(r'"exit_code": 0', self.stdout)
