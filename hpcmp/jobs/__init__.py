"""Batch scripts of a run, for each scheduler, and their submission (``hpcmp job``).

    site = load_site("jobs/sites/gpu-cluster.toml")      # what a site needs: modules, environment, launcher, cores
    job = make_job("gpt.toml", site=site, scheduler="slurm", nodes=4, time="2:00:00")
    text = script(job)
    write(job)
    ids = submit(job)

What a job finds out about itself while it runs is in ``hpcmp.batch``.
"""

from .job import Job as Job
from .job import Member as Member
from .job import make_job as make_job
from .script import script as script
from .site import Site as Site
from .site import load_site as load_site
from .submit import submit as submit
from .submit import write as write
