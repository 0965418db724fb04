"""The command line that is made from the jobs' settings: what it takes, what it refuses, what its help shows."""

from __future__ import annotations

import importlib
import math
import re
import shlex

import click
import pytest
from click.testing import CliRunner

from sedimo import jobs, methods
from sedimo.cli.main import main
from sedimo.errors import InputError
from sedimo.jobs.compare import CompareSettings
from sedimo.jobs.quantize import JOB, QuantizeSettings
from sedimo.jobs.settings import FormatSettings
from sedimo.lab.bench import SourceSettings
from sedimo.methods.search import SEARCH
from sedimo.settings import leaves
from sedimo.treatments.smoothing import SmoothingKnobs, SmoothingSettings
from sedimo.treatments.static_ranges import ActivationSettings

# All that the commands have taken since the first version; scripts rely on it.
FLAGS = {
    "allocate": "--bits --bops --bytes --json --out --rule --stored-bits -o",
    "attribute": "--confidence --json --method --objective --preset --target",
    "blocks": (
        "--act-by-timestep --act-ranges --act-steps --act-symmetric --bits --device --dtype --format "
        "--guidance --json --keep --keep-db --objective --out --page --prompts --resolution --seed --seeds "
        "--smooth --smooth-share --steps --store --variant -o"
    ),
    "change": "--json --out --source --variant -o",
    "compare": (
        "--act --act-by-timestep --act-ranges --act-steps --act-symmetric --bits --bops --compensate --device "
        "--dtype --ends --formats --fresh --guidance --json --methods --out --prompts --resolution --seed "
        "--seeds --smooth --smooth-share --steps --store --trials --variant --whole-layers -o"
    ),
    "demo": "--bits --json --out -o",
    "diff": "--json",
    "evaluate": (
        "--against --correct --device --dtype --guidance --images --json --prompts --resolution --seed "
        "--seeds --steps --variant"
    ),
    "explore": (
        "--act --act-by-timestep --act-ranges --act-steps --act-symmetric --device --dry-run --dtype --ends "
        "--executor --formats --guidance --high-bits --json --low-bits --objective --prior --prompts "
        "--resolution --sampler --seed --seeds --smooth --smooth-share --steps --store --study-seed --trials "
        "--variant --whole-layers --workers"
    ),
    "inspect": "--json --variant",
    "quantize": (
        "--act --act-by-timestep --act-ranges --act-steps --act-symmetric --beta --bits --bops --bytes "
        "--compensate --device --dry-run --dtype --ends --formats --guidance --importance-of --json --keep "
        "--keep-db --link --method --minutes --no-check --no-compensate --out --prompts --recipe "
        "--reconstruct --reconstruct-steps --resolution --seed --seeds --smooth --smooth-share --steps "
        "--store --stored-bits --tail-mean --tau --variant --whole-layers -o"
    ),
    "report": "--json --out -o",
    "run": (
        "--act --act-by-timestep --act-ranges --act-steps --act-symmetric --bits --bops --bytes --compensate "
        "--confidence --device --dry-run --dtype --ends --formats --guidance --json --level --link --no-check "
        "--no-compensate --out --prior --prompts --reconstruct --reconstruct-steps --refine --resolution "
        "--seed --seeds --smooth --smooth-share --steps --store --stored-bits --study-seed --target --trials "
        "--variant --whole-layers -o"
    ),
    "sweep": (
        "--act-by-timestep --act-ranges --act-steps --act-symmetric --device --dtype --format --fresh "
        "--guidance --json --out --prompts --resolution --seed --seeds --signal --smooth-share --steps "
        "--store --values --variant -o"
    ),
    "trials": "--json --out -o",
}
DEFAULTS = [
    ("blocks compare explore quantize run sweep", "--act-ranges", "dynamic"),
    ("quantize", "--beta", "10.0"),
    ("demo", "--bits", "3.5"),
    ("attribute run", "--confidence", "1.0"),
    ("explore", "--executor", "serial"),
    ("compare explore quantize run", "--formats", "wide"),
    ("sweep", "--fresh", "16"),
    ("compare", "--fresh", "64"),
    ("quantize", "--importance-of", "bits"),
    ("run", "--level", "decisions"),
    ("quantize", "--method", "auto"),
    ("attribute", "--method", "gnn"),
    ("compare", "--methods", "all"),
    ("blocks explore", "--objective", "final_latents"),
    ("attribute", "--preset", "fast"),
    ("explore run", "--prior", "jacobian"),
    ("run", "--refine", "3"),
    ("allocate", "--rule", "milp"),
    ("explore", "--sampler", "stratified"),
    ("blocks compare evaluate explore quantize run sweep", "--seeds", "8"),
    ("sweep", "--signal", "jacobian"),
    ("sweep", "--smooth-share", "0.1"),
    ("blocks compare evaluate explore quantize run sweep", "--steps", "10"),
    ("run", "--target", "sqnr_db"),
    ("compare", "--trials", "120"),
    ("run", "--trials", "300"),
    ("demo", "-o", "demo-out"),
]


def command(name):
    return main.get_command(click.Context(main), name)


def run(*arguments, code=0):
    result = CliRunner().invoke(main, [str(a) for a in arguments], terminal_width=118)  # of 120 columns
    assert result.exit_code == code, f"{result.exit_code}: {result.output}\n{result.exception!r}"
    return result


def default_of(name, flag):
    """What a flag of a command stands at when nobody gives it."""
    job = importlib.import_module(f"sedimo.jobs.{name}").JOB
    records = [job.settings, *(one.knobs for one in job.offers())]
    return next(leaf.default for record in records for leaf in leaves(record) if flag in leaf.flags)


def test_there_is_a_command_for_every_job():
    assert main.list_commands(click.Context(main)) == sorted(jobs.JOBS)
    assert set(FLAGS) <= set(jobs.JOBS)


@pytest.mark.parametrize("name", FLAGS)
def test_no_option_was_lost(name):
    taken = {flag for p in command(name).params for flag in (*p.opts, *p.secondary_opts)}
    assert set(FLAGS[name].split()) <= taken


@pytest.mark.parametrize(("names", "flag", "value"), DEFAULTS)
def test_no_default_has_changed(names, flag, value):
    for name in names.split():
        found = SEARCH.compared.n_trials if (name, flag) == ("compare", "--trials") else default_of(name, flag)
        assert (",".join(found) if isinstance(found, tuple) else str(found)) == value, name


def test_no_flag_of_a_command_means_two_things():
    for name in jobs.JOBS:
        flags = [flag for p in command(name).params for flag in (*p.opts, *p.secondary_opts)]
        assert len(flags) == len(set(flags)), name


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("quantize x --bits three", 2, "not a valid float"),
        ("quantize x --nonsense", 2, "No such option"),
        ("quantize x --seeds 1", 2, "is not in the range"),
        ("quantize x --dtype int8", 2, "is not one of"),
        ("quantize", 2, "Missing argument"),
        ("compare x --bits 3", 2, "Missing option '--store'"),
        ("quantize x --bits 3 --bytes 9", 3, "give one size"),
        ("quantize x --bits 3 --method magic", 3, "method must be one of"),
        ("quantize x --bits 3 --method jacobian --keep 1", 3, "options of hybrid do nothing with --method jacobian"),
        ("quantize x --bits 3 --method sqnr --beta 3", 3, "(--help-method orthogonality"),
        ("quantize x --bits 3 --act w8", 3, "are written such as a8"),
        ("quantize x --help-method magic", 3, "--help-method must be one of smoothing,"),
    ],
)
def test_lines_that_make_no_sense_are_refused(line, code, message):
    assert message in " ".join(run(*shlex.split(line), code=code).output.split())


def test_options_of_one_method_are_shown_when_they_are_asked_for():
    assert "--trials" not in run("quantize", "--help").stdout
    shown = run("quantize", "--help-method", "gnn").stdout
    assert "Options of gnn" in shown
    assert all(flag in shown for flag in ("--trials", "--refine", "--prior", "--level"))
    assert "--beta" not in shown
    assert "--beta" in run("quantize", "--help-method", "orthogonality").stdout


def test_what_a_search_predicts_can_be_set_wherever_there_is_a_search():
    words = {"source": "x", "bits": 3.0, "method": "gnn", "goal": "sqnr_pooled_db"}
    settings = JOB.read({**words, "target": "diffusers"})
    assert (settings.task.knobs.target, settings.target) == ("sqnr_pooled_db", "diffusers")
    assert "--target" not in run("quantize", "--help-method", "gnn").stdout
    for name, flags in (
        ("quantize", {"--goal"}),
        ("run", {"--goal", "--target"}),
        ("attribute", {"--goal", "--target"}),
    ):
        assert next({*p.opts} for p in command(name).params if "--goal" in p.opts) == flags
    wrong = run("quantize", "x", "--bits", "3", "--method", "gnn", "--goal", "beauty", code=3).output
    assert "can predict sqnr_db or sqnr_pooled_db" in wrong


def test_headings_of_a_search_come_before_what_many_commands_share():
    heads = [line for line in run("run", "--help").stdout.splitlines() if re.fullmatch(r"[A-Z][\w ]+:", line)]
    first, last = ["Source:", "Budget:", "Options:", "Search:"], ["Formats:", "Sampling:", "Treatments:"]
    assert heads == [*first, *last, "Output and help:", "What NAME may be:"]


def test_a_method_without_options_is_described():
    shown = run("quantize", "--help-method", "sqnr").stdout.splitlines()
    assert shown[0] == "sqnr:"
    assert [line.split()[0] for line in shown[1:]] == ["about", "sees", "misses", "source"]
    assert "misses  what becomes of the noise on its way to the output" in shown[3]
    shown = run("quantize", "--help-method", "gnn").stdout
    assert shown.index("  misses") < shown.index("Options of gnn:")


def test_help_of_the_main_job_fits_a_screen_and_names_every_method():
    shown = run("quantize", "--help").stdout
    assert len(shown.splitlines()) <= 50
    assert {str(method) for method in methods.METHODS} <= set(re.split(r"[,\s]+", shown))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("quantize x --bits 3 --minutes -1", "--minutes must be above 0, got -1"),
        ("quantize x --bits 3 --smooth 2", "--smooth must be at least 0 and at most 1 (0: all"),
        ("quantize x --bits 3 --target moon", "--target must be one of diffusers, got 'moon'"),
        ("explore x --store y --trials 0", "--trials must be at least 1, got 0"),
        ("explore x --store y --trials 1 --objective fun", "--objective must be of final_latents,"),
        ("quantize x --bits 3 --guidance nan", "--guidance must be a finite number, got nan"),
    ],
)
def test_errors_name_the_flag(line, message):
    assert message in run(*shlex.split(line), code=3).output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"keep": -1}, "keep must be at least 0, got -1"),
        ({"smooth": 2.0}, "smooth must be at least 0"),
        ({"guidance": math.nan}, "guidance must be a finite number"),
        ({"dtype": "int8"}, "dtype must be one of fp32, bf16, fp16, got 'int8'"),
    ],
)
def test_errors_in_python_name_the_keyword(words, message):
    with pytest.raises(InputError, match=message):
        JOB.read({"source": "x", "bits": 3.0, "method": "hybrid:uaq4", **words})


@pytest.mark.parametrize("name", jobs.JOBS)
def test_help_of_every_command_names_its_arguments(name):
    shown = run(name, "--help").stdout
    assert f"Usage: main {name}" in shown
    assert "--json" in shown


@pytest.mark.parametrize(
    ("formats", "act", "expected"),
    [
        ("wide", None, "wide"),
        ("uaq3,kmc4", "a8", "uaq3a8,kmc4a8"),
        ("uaq3", "a4, a6,a16", "uaq3a4,uaq3a6,uaq3"),
        ("uaq3,fp16", "8", "uaq3a8,fp16a8"),
    ],
)
def test_widths_of_activations_widen_the_formats(formats, act, expected):
    assert FormatSettings(formats, act).text == expected


@pytest.mark.parametrize(
    ("act", "formats", "message"),
    [
        ("w8", "uaq4", "are written such as a8"),
        (",", "uaq4", "are written such as a8"),
        ("a8", "uaq4a8", "has activation bits already"),
    ],
)
def test_widths_that_cannot_be(act, formats, message):
    with pytest.raises(InputError, match=message):
        FormatSettings(formats, act)


def test_widths_are_for_formats_to_choose_from():
    with pytest.raises(InputError, match="write uniform:uaq4a8"):
        QuantizeSettings(SourceSettings("x"), method="uniform:kmc4", formats=FormatSettings(act="a8"))


@pytest.mark.parametrize("more", [{"n_steps": 3}, {"by_timestep": True}])
def test_options_of_calibration_need_calibrated_ranges(more):
    with pytest.raises(InputError, match="give --act-ranges min-max, too"):
        ActivationSettings(**more)
    found = ActivationSettings("mse", **more)
    assert (found.n_steps, found.by_timestep) == (more.get("n_steps", 0), "by_timestep" in more)


def test_a_share_of_smoothed_layers_needs_smoothing():
    with pytest.raises(InputError, match="give --smooth"):
        SmoothingKnobs(share=0.5)
    assert SmoothingKnobs().settings is None
    assert SmoothingKnobs(0.5).settings == SmoothingSettings(0.5, 0.1)
    assert SmoothingKnobs(0.5, 1.0).settings == SmoothingSettings(0.5, 1.0)


def test_a_comparison_refuses_methods_that_cannot_choose_among_widths(tmp_path):
    def compared(methods):
        return CompareSettings(
            SourceSettings("x"), (4.0,), tmp_path, methods=methods, formats=FormatSettings("uaq4a4,uaq4a8")
        )

    with pytest.raises(InputError, match="method 'error' sees weights alone"):
        compared("uniform,orthogonality,error")
    with pytest.raises(InputError, match="sees weights alone"):
        compared("orthogonality-noise")
    compared("uniform,orthogonality,orthogonality-lp,jacobian,ablation,sqnr,gnn")
