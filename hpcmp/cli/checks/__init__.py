"""The checks of ``hpcmp doctor``: a module for each subject, of which ``SUBJECT`` is what ranks look at and judge.

software   versions, packages and settings that differ or mislead
launch     the MPI library and who started the ranks
cores      threads, binding, quotas, speed
limits     memory, ulimits, TMPDIR, /dev/shm
network    names, addresses, InfiniBand; clocks, links and sums, which take messages
storage    a directory, on every host
gpu        GPUs, drivers, NCCL
needs      what the run of a configuration needs of all of these
"""

from .base import Check as Check
from .base import Ranks as Ranks
from .base import examine as examine
from .base import guarded as guarded
