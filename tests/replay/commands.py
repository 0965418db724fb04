"""What is replayed: every command with tiny settings, and orders that must be refused.

In an argument `{source}` is the tiny pipeline, `{unet}` one whose skips are concatenated, `{here}` the case's own
folder, and `{name}` the folder of another case, which is then run first.
"""

from __future__ import annotations

from dataclasses import dataclass

FEW = "--seeds 2 --steps 3"
QUICK = f"{FEW} --formats uaq3,kmc3,uaq4,uaq6"
JOB = "quantize {source} -o {here}/out --json"
FAST = f"--no-check {QUICK}"
STATIC = "--act-ranges min-max --act-steps 1 --act-symmetric"


@dataclass(frozen=True)
class Case:
    """A command line; `loose` names keys of its JSON that are not compared.

    `is_chaotic` says that what it computes multiplies noise of floating point, as training a network does: numbers,
    recipes and bytes are left out, and what stays are exit code, the form of the JSON and the keys of the study.
    """

    name: str
    line: str
    loose: tuple[str, ...] = ()
    is_chaotic: bool = False


CASES = (
    # the main job by every method
    Case("adjoint", f"{JOB} --bits 5 --method adjoint {QUICK}"),
    Case("auto", f"{JOB} --bits 5 {FAST}", loose=("reason",)),
    Case("jacobian", f"{JOB} --bits 5 --method jacobian {FAST}"),
    Case("error", f"{JOB} --bits 5 --method error {FAST}"),
    Case("ablation", f"{JOB} --bits 5 --method ablation {FAST}"),
    Case("combined", f"{JOB} --bits 5 --method combined {QUICK}"),
    Case("sqnr", f"{JOB} --bits 5 --method sqnr {FAST}"),
    Case("orthogonality", f"{JOB} --bits 5 --method orthogonality --beta 3 --tau 1 {QUICK}"),
    Case("orthogonality-noise", f"{JOB} --bits 5 --method orthogonality --importance-of noise --tail-mean {FAST}"),
    Case("orthogonality-lp", f"{JOB} --bits 5 --method orthogonality-lp {FAST}"),
    Case("uniform", f"{JOB} --method uniform:kmc4 --no-check {FEW}"),
    Case("hybrid", f"{JOB} --method hybrid:uaq4 --keep 1 {FEW}"),
    Case("hybrid-bits", f"{JOB} --method hybrid:uaq4 --bits 9 --no-check {FEW}"),
    Case("hybrid-db", f"{JOB} --method hybrid:uaq4 --keep-db 1 --no-check {FEW}"),
    Case("bare", "quantize {source}/transformer -o {here}/out --json --bits 5 " + FAST),
    Case("dry", f"{JOB} --bits 5 --method ablation --dry-run {QUICK}", loose=("memory_bytes", "disk_bytes", "hours")),
    # budgets
    Case("stored-bits", f"{JOB} --stored-bits 5.5 --method error {FAST}"),
    Case("bytes", f"{JOB} --bytes 34000 --method error {FAST}"),
    Case("bops", f"{JOB} --bops 20% --act a4,a8 --method adjoint {FAST}"),
    # inputs rounded, layers smoothed, rounding learned
    Case("act", f"{JOB} --bits 5 --act a8 --method adjoint {FAST}"),
    Case("static", f"{JOB} --bits 5 --act a8 {STATIC} --method adjoint {FAST}"),
    Case(
        "by-timestep",
        f"{JOB} --method uniform:uaq4a8 --act-ranges percentile --act-by-timestep --no-check {FEW}",
    ),
    Case("ends", f"{JOB} --bits 5 --ends uaq8 --method adjoint {FAST}"),
    Case("smooth", f"{JOB} --bits 5 --act a8 --smooth 0.6 --smooth-share 1 --method error {FAST}"),
    Case("published", f"{JOB} --method hybrid:uaq8a8 --keep 1 {STATIC} --smooth 0.7 --no-check {FEW}"),
    Case("reconstruct", f"{JOB} --method uniform:uaq3 --reconstruct --reconstruct-steps 10 --no-check {FEW}"),
    Case("compensate", f"{JOB} --method uniform:uaq3 --compensate --no-check {FEW}"),
    Case("no-compensate", f"{JOB} --bits 5 --method adjoint --no-compensate {FAST}"),
    # a denoiser whose layers have streams
    Case("streams", "quantize {unet} -o {here}/out --json --bits 5 --method adjoint " + FAST),
    Case("whole-layers", "quantize {unet} -o {here}/out --json --bits 5 --method adjoint --whole-layers " + FAST),
    # what is done with checkpoints
    Case("inspect", "inspect {source} --json"),
    Case("inspect-streams", "inspect {unet} --json"),
    Case("inspect-packed", "inspect {adjoint}/out --json"),
    Case("recipe", f"{JOB} --recipe {{adjoint}}/out/sedimo_recipe.json --no-check {FEW}"),
    Case("evaluate", f"evaluate {{uniform}}/out --against {{source}} --json {FEW}"),
    Case("correct", f"evaluate {{uniform}}/out --against {{source}} --json --correct {FEW}"),
    Case("diff", "diff {error}/out {uniform}/out --json"),
    Case("change", "change {uniform}/out proj_out_1=kmc3 --source {source} -o {here}/out --json"),
    # what is done with studies
    Case("allocate", "allocate {jacobian}/out.study --bits 4.8 -o {here}/recipe.json --json"),
    Case("allocate-lp", "allocate {orthogonality}/out.study --bits 5 --rule lp --json"),
    Case("allocate-greedy", "allocate {jacobian}/out.study --stored-bits 5.5 --rule greedy --json"),
    Case("report", "report {combined}/out.study -o {here}/page.html --json"),
    Case("explore", f"explore {{source}} --store {{here}}/study --trials 24 --json {QUICK}"),
    Case(
        "explore-more",
        f"explore {{source}} --store {{here}}/study --trials 3 --sampler paper --prior error --act a8 "
        f"--objective path,step --json {QUICK}",
    ),
    Case(
        "explore-dry",
        f"explore {{source}} --store {{here}}/study --trials 9 --dry-run --json {QUICK}",
        loose=("memory_bytes", "disk_bytes"),
    ),
    Case("trials", "trials {explore}/study --json"),
    Case("trials-export", "trials {explore-more}/study -o {here}/trials.json --json"),
    Case("attribute", "attribute {explore}/study --json", is_chaotic=True),
    Case(
        "run",
        "run {source} --bits 5 -o {here}/out --json --trials 24 --refine 0 --level groups --prior error " + FAST,
        is_chaotic=True,
    ),
    Case(
        "blocks",
        f"blocks {{source}} --format uaq4 --store {{here}}/study --keep 1 -o {{here}}/recipe.json "
        f"--page {{here}}/page.html --json {FEW}",
    ),
    Case(
        "compare",
        "compare {source} --bits 5,6 --store {here}/study --methods uniform,error,jacobian,combined,orthogonality-lp "
        f"--fresh 4 -o {{here}}/page.html --json {QUICK}",
    ),
    Case(
        "sweep-alpha",
        "sweep alpha {source} --store {here}/study --values 0.5,0.9 --smooth-share 1 "
        f"--fresh 3 -o {{here}}/page.html --json {FEW}",
    ),
    Case("sweep-calibration", f"sweep calibration {{source}} --store {{here}}/study --fresh 3 --json {FEW}"),
    Case("sweep-threshold", f"sweep threshold {{source}} --store {{here}}/study --fresh 3 --json {FEW}"),
    Case("sweep-samples", f"sweep samples {{source}} --store {{here}}/study --values 3,6 --json {FEW}"),
    Case(
        "sweep-schedulers",
        f"sweep schedulers {{source}} --store {{here}}/study --values ddim,euler,unipc --fresh 3 --json {FEW}",
    ),
)

ERRORS = (
    Case("no-command", "divine {source}"),
    Case("no-number", f"{JOB} --bits three"),
    Case("no-budget", f"{JOB} {QUICK}"),
    Case("two-budgets", f"{JOB} --bits 3 --bytes 9 {QUICK}"),
    Case("budget-too-small", f"{JOB} --bits 1 {QUICK}"),
    Case("budget-nan", f"{JOB} --bits nan {QUICK}"),
    Case("unknown-method", f"{JOB} --bits 5 --method magic {QUICK}"),
    Case("unknown-format", f"{JOB} --bits 5 --formats kmc1 {FEW}"),
    Case("unknown-device", f"{JOB} --bits 5 --device abacus {QUICK}"),
    Case("no-source", "quantize {here}/nowhere --bits 5 -o {here}/out"),
    Case("no-output", "quantize {source} --bits 5"),
    Case("output-exists", "quantize {source} --bits 5 -o {uniform}/out"),
    Case("output-in-source", "quantize {source} --bits 5 -o {source}/small"),
    Case("quantized-already", "quantize {uniform}/out --bits 5 -o {here}/out"),
    Case("hybrid-without-rule", f"{JOB} --method hybrid:uaq4 {FEW}"),
    Case("keep-without-hybrid", f"{JOB} --bits 5 --method jacobian --keep 1 {FEW}"),
    Case("both-roundings", f"{JOB} --method uniform:uaq3 --compensate --reconstruct {FEW}"),
    Case("share-alone", f"{JOB} --bits 5 --smooth-share 0.5 {QUICK}"),
    Case("act-and-uniform", f"{JOB} --method uniform:uaq4 --act a8 {FEW}"),
    Case("steps-without-ranges", f"{JOB} --bits 5 --act-steps 1 {QUICK}"),
    Case("no-study", "allocate {source} --bits 5"),
    Case("no-folder", "allocate {here}/nowhere --bits 5"),
    Case("no-report", "report {explore-more}/study"),
    Case("unknown-layer", "change {uniform}/out nowhere=kmc3 --source {source} -o {here}/out"),
    Case("change-unpacked", "change {source} proj_out_1=kmc3 --source {source} -o {here}/out"),
    Case("few-images", f"evaluate {{uniform}}/out --against {{source}} --images 19 {FEW}"),
    Case("few-trials", f"run {{source}} --bits 5 --trials 5 -o {{here}}/out {QUICK}"),
    Case("unknown-target", f"run {{source}} --bits 5 --target beauty -o {{here}}/out {QUICK}"),
    Case("unknown-rule", "allocate {jacobian}/out.study --bits 5 --rule luck"),
    Case("sweep-of-nothing", f"sweep alpha {{source}} --store {{here}}/study --values 0 {FEW}"),
    Case("too-many-steps", f"sweep calibration {{source}} --store {{here}}/study --values 9 {FEW}"),
    Case("bare-compare", "compare {source}/transformer --bits 5 --store {here}/study " + QUICK),
)
