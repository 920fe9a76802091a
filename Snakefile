"""A params file becomes runs of notebooks: snakemake -c 4 --configfile params/demo.yaml

A run is one notebook under papermill; its outputs are the records that it writes, declared by kvneox_lib.studies. It is
skipped when they are there. It is done again when its parameters change, since its records are then called otherwise,
and when the code changes that makes its figures, which the digest among `params` tells. Snakemake removes the outputs
before it does a run again: so the notebook, which keeps records whose parameters are equal, finds none and measures
anew, and nothing has to say `overwrite`. It removes them after a failure, too, unless all of
them are there: what was half done is done again with the run. Records that came with the checkout have no history here, so they are taken as they are.
"""

import json
import os
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

from kvneox_lib.studies.sweep import read_sweep, summary

sys.path.insert(0, os.path.join(workflow.basedir, "workflow"))
from only_one import AnotherSweep, claim

NOTEBOOKS = Path(os.path.relpath(workflow.basedir)) / "notebooks"
EXECUTE = [sys.executable, os.path.join(workflow.basedir, "workflow", "execute.py")]
if not workflow.configfiles:
    raise WorkflowError("Which sweep? Give a params file: --configfile params/demo.yaml")
try:
    RUNS = read_sweep(map(os.path.relpath, workflow.configfiles), NOTEBOOKS)
except ValueError as mistakes:
    raise WorkflowError(f"Nothing was run.\n{mistakes}") from None
# Of this machine. On a cluster, where a job may not count those of its node, a study says how many it wants.
ALL_CORES = (not workflow.remote_exec and workflow.resource_settings.cores) or 1
STUDIES = {run.study: [path for other in RUNS if other.study == run.study for path in other.outputs] for run in RUNS}


localrules:
    all,


rule all:
    input:
        [path for run in RUNS for path in run.outputs],


for study, outputs in STUDIES.items():

    rule:
        name:
            study,
        localrule:
            True
        input:
            outputs,


for number, run in enumerate(RUNS):

    rule:
        name:
            f"{run.study}_run{number}",
        input:
            notebook=ancient(str(run.notebook)),  # its date says nothing: what it does is in the digest
            baseline=ancient(list(run.needs)),  # measured again, it does not change what was compared with it
        output:
            list(run.outputs),
        log:
            run.executed,
        params:
            values=json.dumps(run.parameters, sort_keys=True),
            code=run.code,
        threads: run.cores or ALL_CORES
        resources:
            gpu=run.gpus,
            **({} if run.mem_mb is None else {"mem_mb": run.mem_mb}),
        shell:
            "exec {EXECUTE:q} {input.notebook:q} {log:q} {params.values:q} {resources.gpu} {output:q}"


onstart:  # of a sweep that does something: not of a dry run, nor of the jobs that it starts
    try:
        claim(path for run in RUNS for path in run.outputs)
    except AnotherSweep as another:
        raise WorkflowError(str(another)) from None


onsuccess:
    print(summary(RUNS), file=sys.stderr)


onerror:
    print(summary(RUNS), file=sys.stderr)
