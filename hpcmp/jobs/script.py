"""The text of a batch script: directives, environment, the start of the ranks, and what follows from how they end."""

from __future__ import annotations

import shlex
import textwrap

from .job import Job, Member
from .schedulers import DIALECTS, Dialect

HEADER = "# Written by: hpcmp job"  # a file with this line may be written again

STOP = """\
# USR1 (LSF: USR2) comes before the time limit, TERM when somebody ends the job. The ranks get USR1 either way, which
# launchers pass on (TERM would end them); they save and stop, and hpcmp ends with 75 if another job is to go on.
told="" step="" again=""
pass_on() {
    told=$1 again=yes
    [ -z "$step" ] || KILL
}
trap 'pass_on USR1' USR1 USR2
trap 'pass_on TERM' TERM INT HUP
"""

WAIT = """\
step=$!
while :; do   # a signal ends a wait
    again=""
    wait "$step"
    code=$?
    [ -n "$again" ] || break
done
step=""
"""

ENOUGH = """\
if [ ${#nodes[@]} -lt "${fitting[-1]}" ]; then
    echo "hpcmp job: ${#nodes[@]} nodes; the layout runs on ${fitting[*]}" >&2
    exit 2
fi
"""

NODES = """
answering() {   # those of the nodes on which a command runs
    local node
    for node in "${nodes[@]}"; do
        { timeout 30 PROBE >/dev/null 2>&1 && echo "$node"; } &
    done | sort -V
}
"""

LOST = """\
    asked=$told
    mapfile -t left < <(answering)
    # That none answers says nothing: this script runs on one. So a rank has crashed, or hung: once more.
    if [ ${#left[@]} -ge ${#nodes[@]} ] || [ ${#left[@]} -eq 0 ]; then
        case $code in 0 | 1 | 2 | 70) exit "$code" ;; esac   # the end of hpcmp; a lost rank has other codes
        [ -z "$crashed$asked" ] || exit "$code"
        [ -z "$told" ] || go_on
        crashed=yes
        echo "hpcmp job: exit code $code, and no node is known to be lost: once more" >&2
        continue
    fi
    echo "hpcmp job: exit code $code; of the nodes ${nodes[*]} these answer: ${left[*]}" >&2
    nodes=("${left[@]}")
    [ -z "$told" ] || go_on
    for n in "${fitting[@]}"; do [ "$n" -gt ${#nodes[@]} ] || continue 2; done
    go_on   # too few are left for this layout
done
"""

# Slurm would end the job once it knew that nodes are lost: so the job gives them up. (scontrol leaves a script behind.)
SHRINK = """\
    hosts=$(IFS=, && echo "${left[*]}")
    (cd "$(mktemp -d)" && scontrol update JobId="$SLURM_JOB_ID" NodeList="$hosts" >/dev/null)
"""


def script(job: Job) -> str:
    """The batch script of ``job``: bash, the same text for the same job."""
    dialect = DIALECTS.get(job.scheduler)
    parts = [_head(job, dialect), _environment(job, dialect), _runs(job, dialect)]
    kill = "flux job killall --force --signal=USR1" if job.launcher == "flux" else 'kill -USR1 "$step" 2>/dev/null'
    parts.append(STOP.replace("KILL", kill))
    if dialect is None:
        return "\n".join([*parts, _here(job)])
    rest = f"{_go_on(job, dialect)}\n{_loop(job, dialect)}"
    if len(job.members) > 1:  # by the id alone Slurm means, for one run of an array, all of them
        rest = rest.replace("$SLURM_JOB_ID", "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID")
    return "\n".join([*parts, rest])


def _head(job: Job, dialect: Dialect | None) -> str:
    lines = ["#!/bin/bash"]
    if dialect:
        own = [line.strip() for line in job.site.batch.options.splitlines()]
        lines += [f"{dialect.prefix} {line}" for line in [*dialect.directives(job), *filter(None, own)]]
    what = f"{HEADER} {job.command}".rstrip()
    return "\n".join([*lines, what]) + "\n"


def _environment(job: Job, dialect: Dialect | None) -> str:
    shell = job.site.shell
    text = dialect.start if dialect else ""
    if shell.modules.strip():
        text += f"module load {shlex.join(shell.modules.split())}\n"
    if shell.setup.strip():
        text += f"{shell.setup.strip()}\nset +eu   # this script looks at exit codes itself\n"
    text += f"ranks_per_node={job.ranks_per_node}\n"
    variables = dict(job.site.environment)
    if "OMP_NUM_THREADS" not in variables:
        if job.threads:
            text += f"export OMP_NUM_THREADS={job.threads}   # cores of a rank\n"
        else:
            cores = dialect.cores if dialect else "$(env -u OMP_NUM_THREADS nproc)"
            text += f"threads=$(({cores} / ranks_per_node))   # cores of a rank\n"
            text += "export OMP_NUM_THREADS=$((threads > 1 ? threads : 1))\n"
    text += "".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items())
    if job.requeues:
        text += "export HPCMP_RESUBMIT='true   # this script does it, at exit code 75'\n"
    if job.launcher != "flux":
        text += 'program=$(command -v hpcmp) || { echo "hpcmp job: hpcmp is not on PATH" >&2; exit 2; }\n'
    return text


def _runs(job: Job, dialect: Dialect | None) -> str:
    """Which run this is: its overrides, and on how many nodes it can be."""

    def assignments(member: Member) -> str:
        words = f"overrides=({shlex.join(member.overrides)})"
        return f"{words} fitting=({' '.join(map(str, member.fitting))})" if dialect else words

    fits = "   # fitting: numbers of nodes on which the layout runs\n" if dialect else "\n"
    if len(job.members) == 1:
        return assignments(job.members[0]) + fits
    index = dialect.index if dialect else "${1:-}"
    cases = "".join(f"{n}) {assignments(member)} ;;\n" for n, member in enumerate(job.members, 1))
    other = f'*) echo "hpcmp job: no run $member of the {len(job.members)} of this array" >&2; exit 2 ;;\n'
    return f'member={index}\ncase "$member" in{fits}{cases}{other}esac\n'


def _go_on(job: Job, dialect: Dialect) -> str:
    if not job.requeues:
        how = "# the next job of the chain goes on" if job.chained else "# train.requeue=false: no other does"
    else:
        again = dialect.again if job.site.batch.requeue else dialect.anew
        array = _ARRAYS.get(job.scheduler, "") if len(job.members) > 1 else ""
        how = again.replace("ARRAY", array.replace("NAME", job.name)).replace("SCRIPT", shlex.quote(job.path))
    ended = 143 if job.scheduler == "lsf" else 75  # LSF would requeue at 75
    test = f'[ "$told" != TERM ] || exit {ended}   # somebody has ended this job: it stays ended\n'
    return f"go_on() {{   # in another job\n{textwrap.indent(test + how, '    ')}\n    exit 75\n}}\n"


#: What submits one run of an array anew. (PBS takes no range of one: a step of two leaves the first.)
_ARRAYS = {
    "slurm": '--array="$member" ',
    "pbs": '-J "$member-$((member + 1)):2" ',
    "lsf": '-J "NAME[$member]" ',
    "flux": ' "$member"',
}


def _loop(job: Job, dialect: Dialect) -> str:
    """Start the ranks; act on their exit code; start them again on the nodes that are left when some are lost."""
    text = f"mapfile -t nodes < <({dialect.nodes})\n" + ENOUGH
    if job.launcher != "flux":
        text += NODES.replace("PROBE", _PROBES[job.launcher])
    body = 'for count in "${fitting[@]}"; do [ "$count" -gt ${#nodes[@]} ] || break; done   # the most nodes that fit\n'
    if job.launcher == "mpirun":
        body += 'hosts=$(printf ",%s:$ranks_per_node" "${nodes[@]:0:count}")\n'
    elif job.launcher != "flux":
        body += 'hosts=$(IFS=, && echo "${nodes[*]:0:count}")\n'
    body += f"{_launch(job)} \\\n    {_train(job)} &\n{WAIT}"
    # Open MPI's mpirun may end with 0 when it has lost a node
    done = "2 | 78" if job.launcher == "mpirun" else "0 | 2 | 78"
    body += f'case $code in\n{done}) exit "$code" ;;\n75) go_on ;;\nesac\n'
    lost = LOST.replace("answering", dialect.nodes) if job.launcher == "flux" else LOST
    if job.scheduler == "slurm":
        lost = lost.replace("    nodes=", SHRINK + "    nodes=")
    return text + '\ncrashed=""\nwhile :; do\n' + textwrap.indent(body, "    ") + lost


_PROBES = {
    "srun": 'srun --overlap --nodes=1 --ntasks=1 --nodelist="$node" true',
    "mpirun": 'mpirun --host "$node:1" -n 1 true',
    "mpiexec": 'mpiexec -n 1 --hosts "$node" true',
    "pals": 'mpiexec -n 1 --hosts "$node" true',
}


def _launch(job: Job) -> str:
    """The words that start the ranks on the first ``count`` of the nodes."""
    bind = job.site.launch.bind == "cores" and job.threads is not None
    count, words = '"$((count * ranks_per_node))"', []
    if job.launcher == "srun":
        # --wait: a rank that was killed ends the others a minute later, which may wait for it for ever
        words += [f"srun --mpi={shlex.quote(job.site.launch.mpi)} --overlap --no-kill --wait=60", '--nodes="$count"']
        words += [f"--ntasks={count}", '--ntasks-per-node="$ranks_per_node"', '--nodelist="$hosts"']
        words += [f"--cpus-per-task={job.threads}"] if job.threads else []
        words += ["--cpu-bind=cores"] if bind else []
    elif job.launcher == "mpirun":
        words += [f'mpirun --host "${{hosts#,}}" -n {count}', _binding(job)]
        names = ["PATH", "OMP_NUM_THREADS", *(["HPCMP_RESUBMIT"] if job.requeues else [])]
        names += [name for name in job.site.environment if name not in names]
        words += [f"-x {name}" for name in names]
        words += [f"${{{name}:+-x {name}}}" for name in ("PYTHONPATH", "LD_LIBRARY_PATH") if name not in names]
    elif job.launcher in ("mpiexec", "pals"):
        words += [f'mpiexec -n {count} --ppn "$ranks_per_node" --hosts "$hosts"', _binding(job)]
    else:
        words += ['flux run --nodes="$count" --tasks-per-node="$ranks_per_node" --exclusive']
        words += ["-o cpu-affinity=per-task"] if job.site.launch.bind == "cores" else []
    return " \\\n    ".join([*words, *_own(job)])


def _binding(job: Job) -> str:
    """The words by which a launcher that is not the scheduler's keeps each rank to its cores, or does not."""
    bound, none = {
        "mpirun": (f"--map-by ppr:{job.ranks_per_node}:node:PE={job.threads} --bind-to core", "--bind-to none"),
        "mpiexec": (f"-bind-to core:{job.threads}", "-bind-to none"),
        "pals": (f"--depth {job.threads} --cpu-bind depth", "--cpu-bind none"),
    }[job.launcher]
    return bound if job.site.launch.bind == "cores" and job.threads else none


def _own(job: Job) -> list[str]:
    survive = ["--with-ft ulfm"] if job.recovers else []  # mpirun does not end the ranks of which one has died
    return survive + ([shlex.join(words)] if (words := shlex.split(job.site.launch.options)) else [])


def _train(job: Job) -> str:
    program = "hpcmp" if job.launcher == "flux" else '"$program"'
    return f'{program} train {shlex.quote(job.config)} "${{overrides[@]}}"'


def _here(job: Job) -> str:
    """On this machine, without a scheduler: whoever started the script starts it again."""
    count = '-n "$ranks_per_node"'
    words = [f"{'mpirun' if job.launcher == 'mpirun' else 'mpiexec'} {count}", _binding(job)]
    said = '[ "$code" -ne 75 ] || echo "hpcmp job: stopped in time; start this script again to go on" >&2\n'
    own = "set -m   # a group of its own: Ctrl-C would have the launcher end the ranks, which are to save\n"
    return f'{own}{" ".join([*words, *_own(job)])} {_train(job)} </dev/null &\n{WAIT}{said}exit "$code"\n'
