#!/usr/bin/env bash
# A study of scaling, strong (the same batch on more nodes) and weak (a batch that grows with them), and its table.
#
#     bash jobs/scaling.sh CONFIG.toml SITE.toml MOST [section.key=value ...]      # with hpcmp's environment active
#
# 100 steps on 1, 2, 4, ... MOST nodes, a job each, which start as nodes come free; where the site has no scheduler, on as
# many ranks of this machine, one after the other. Start it again when jobs have ended: the table has what is there by
# then. Each has its script and its run in runs/scaling, as strong-2.sh and strong-2/; remove both to take it again.
set -euo pipefail
config=$1 site=$2 most=$3 study=runs/scaling
shift 3

facts=$(python - "$config" "$site" "$@" <<'EOP'
import sys
from hpcmp.errors import InputError
from hpcmp.jobs import load_site
from hpcmp.training.config import load_config

config, site, *overrides = sys.argv[1:]
try:
    print(load_config(config, overrides).train.batch, load_site(site).batch.scheduler)
except InputError as error:
    sys.exit(f"scaling.sh: {error}")
EOP
)
read -r batch scheduler <<<"$facts"

mkdir -p "$study"
for kind in strong weak; do
    n=1
    [[ $kind == strong ]] || n=2    # on one node they are the same
    for ((; n <= most; n *= 2)); do
        run=$study/$kind-$n
        [[ ! -e $run.sh ]] || continue
        where=(--nodes "$n" --submit) samples=$batch
        [[ $scheduler != none ]] || where=(--ranks-per-node "$n")
        [[ $kind != weak ]] || samples=$((batch * n))
        # One that does not fit, or that the scheduler refuses, has said so.
        hpcmp job "$config" --site "$site" "${where[@]}" --time 30 --name "scaling-$kind-$n" --out "$run.sh" \
            train.steps=100 optimizer.warmup=10 checkpoint.resume=false "$@" \
            train.batch="$samples" run.directory="$run" >&2 || { rm -f "$run.sh"; continue; }
        [[ $scheduler != none ]] || bash "$run.sh" >"$run.out" 2>&1 || echo "scaling.sh: $run failed: see $run.out" >&2
    done
done

python - "$study" "$most" "$scheduler" <<'EOP'
import sys
from pathlib import Path
from hpcmp.errors import InputError
from hpcmp.training.report import Run, report

study, most, scheduler = sys.argv[1:]
print(f"{'':8}{'ranks' if scheduler == 'none' else 'nodes':>6}{'batch':>8}{'s/step':>10}{'tokens/s':>12}{'efficiency':>12}")
for kind in "strong", "weak":
    first = None  # (nodes, tokens/s) of the smallest: what the others are measured by
    for n in (2**i for i in range(int(most).bit_length())):
        try:
            found = report(Run(Path(study, f"{kind if n > 1 else 'strong'}-{n}")))
        except InputError:
            found = None
        if not found or found["step"] < found["steps"] or not found["tokens_per_second"]:
            print(f"{kind:8}{n:6}   not finished")
            continue
        rate, train = found["tokens_per_second"]["median"], found["config"]["train"]
        first = first or (n, rate)
        seconds = train["batch"] * found["config"]["model"]["sequence"] / rate
        share = rate / first[1] * first[0] / n
        print(f"{kind:8}{n:6}{train['batch']:8}{seconds:10.3f}{rate:12,.0f}{share:12.0%}")
EOP
