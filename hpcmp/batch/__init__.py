"""The batch system: which job this process is in, what launched it, how long it still has, and how to be run again.

The one place that knows schedulers (Slurm, PBS, LSF, Flux) and launchers (mpirun, srun, ...):

    job = find_job()              # from the environment alone, on any rank: Job("Slurm", "4711", ...), or Job() outside
    job.scheduler, job.id         # "Slurm", "PBS", "LSF", "Flux" or ""
    seconds = time_left(job)      # asks the scheduler: on one rank, once; None if it is unknown, or there is no limit
    command = requeue_command(job)    # what would run this job again, or None
    launcher()                    # rank, size, local rank and local size, as the launcher says: without a message

It lies on the ground: nothing here imports another part of hpcmp but ``hpcmp.errors``.
"""

from .job import SCHEDULERS as SCHEDULERS
from .job import Job as Job
from .job import find_job as find_job
from .job import switches_above as switches_above
from .launcher import Launcher as Launcher
from .launcher import launcher as launcher
from .requeue import RESUBMIT as RESUBMIT
from .requeue import requeue as requeue
from .requeue import requeue_command as requeue_command
from .scheduler import has_ended as has_ended
from .scheduler import time_left as time_left
