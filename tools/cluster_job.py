#!/usr/bin/env python3
"""What slurm/lib asks in the course of a job; for people there is tools/run_status.py.

    cluster_job.py facts --recipe R                        # paths of a recipe, as shell assignments
    cluster_job.py begin --recipe R --job J --restart N --nodes node01,node02
    cluster_job.py watch --recipe R --timeout SECONDS      # returns once the run hangs
    cluster_job.py end   --recipe R --job J --restart N --ranks 128 --exit-code C [--asked] [--hung REASON] [--bad-nodes node02]

`begin` and `end` print shell assignments too: ACTION (go, finished, requeue, stopped, give_up), REASON and EXCLUDE.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import argparse
import shlex

from endprompt.cluster import attempts, verdict
from endprompt.cluster.watchdog import watch
from endprompt.errors import run_command
from endprompt.recipe import Recipe, add_recipe_arguments, load_recipe
from endprompt.training.run_files import checkpoint_step
from endprompt.training.run_folder import RunFolder
from endprompt.training.stacks import read_stacks, remove_empty, summary


def main() -> None:
    arguments = parse_arguments()
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    COMMANDS[arguments.command](recipe, arguments)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in COMMANDS:
        command = commands.add_parser(name)
        add_recipe_arguments(command)
        if name == "watch":
            command.add_argument("--timeout", type=float, required=True, metavar="SECONDS")
        if name in ("begin", "end"):
            command.add_argument("--job", required=True)
            command.add_argument("--restart", type=int, required=True, help="SLURM_RESTART_COUNT")
            command.add_argument("--max-restarts", type=int, default=verdict.Limits.max_restarts)
            command.add_argument("--max-idle", type=int, default=verdict.Limits.max_idle, help="attempts in a row without a new checkpoint")
        if name == "begin":
            command.add_argument("--nodes", type=_names, required=True)
        if name == "end":
            command.add_argument("--exit-code", type=int, required=True, help="of srun")
            command.add_argument("--trained", action="store_true", help="the step of training was started")
            command.add_argument("--asked", action="store_true", help="SLURM had asked to stop")
            command.add_argument("--cancelled", action="store_true", help="SLURM has ended the job")
            command.add_argument("--hung", default="", metavar="REASON", help="what `watch` said")
            command.add_argument("--ranks", type=int, required=True, help="of the job")
            command.add_argument("--bad-nodes", type=_names, default=[], help="what the preflight found unfit")
    return parser.parse_args()


def facts(recipe: Recipe, arguments: argparse.Namespace) -> None:
    validation = recipe.data.validation[0].path if recipe.data.validation else ""
    status = RunFolder(recipe).read_status()
    print_assignments(
        RUN_FOLDER=recipe.output.directory,
        RECIPE_NAME=recipe.name,
        MODEL_PATH=recipe.model.path,
        TRAIN_DATA=" ".join(source.path for source in recipe.data.train),
        VALIDATION_DATA=validation,
        FINISHED="yes" if verdict.is_finished(status, recipe.steps) else "no",
        STEP_NOW=f"{status.get('step', 0)} of {recipe.steps}",
        TARGET_LENGTH=recipe.target_length,
        ORIGINAL_LENGTH=recipe.model.original_length,
    )


def begin(recipe: Recipe, arguments: argparse.Namespace) -> None:
    """`finished`: a requeued job of a run that is done ends at once. `give_up`: nodes die under it and it gets nowhere."""
    run = Path(recipe.output.directory)
    if verdict.is_finished(RunFolder(recipe).read_status(), recipe.steps):
        print_assignments(ACTION="finished", REASON=f"finished already at step {recipe.steps}", EXCLUDE="")
        return
    before = [attempt for attempt in attempts.read_attempts(run) if attempt.job == arguments.job]
    found = verdict.check_start(before, limits(arguments))
    if found:
        print_assignments(ACTION="give_up", REASON=found.reason, EXCLUDE="")
        return
    remove_empty(run.glob(f"attempts/{arguments.job}-*/stacks"))  # of attempts that took the batch script with them
    attempts.record_start(run, arguments.job, arguments.restart, arguments.nodes)
    attempts.failures_folder(run, arguments.job, arguments.restart).mkdir(parents=True, exist_ok=True)
    print_assignments(ACTION="go", REASON=f"from step {checkpoint_step(run)} of {recipe.steps}", EXCLUDE="")


def end(recipe: Recipe, arguments: argparse.Namespace) -> None:
    run = Path(recipe.output.directory)
    stacks = attempts.stacks_folder(run, arguments.job, arguments.restart)
    standings = read_stacks(stacks)
    outcome = verdict.Outcome(
        arguments.exit_code, arguments.trained, arguments.asked, arguments.cancelled, arguments.hung, tuple(arguments.bad_nodes),
        tuple(standings),
    )  # fmt: skip
    found = verdict.decide(
        run, arguments.job, arguments.restart, attempts.read_attempts(run), outcome, RunFolder(recipe).read_status(), recipe.steps,
        limits(arguments),
    )  # fmt: skip
    attempts.record_end(
        run, arguments.job, arguments.restart,
        {"exit_code": arguments.exit_code, "verdict": found.action, "reason": found.reason,
         "trained": arguments.trained, "asked": arguments.asked, "suspects": list(found.suspects), "excluded": list(found.excluded)},
    )  # fmt: skip
    if arguments.hung or any(standing.frames for standing in standings):  # to the log: the shell reads the standard output
        print(f"where ranks stood, whole stacks in {stacks}:", *summary(standings, arguments.ranks), sep="\n", file=sys.stderr)
    else:
        remove_empty([stacks])
    print_assignments(ACTION=found.action.replace(" ", "_"), REASON=found.reason, EXCLUDE=",".join(found.excluded))


def watch_run(recipe: Recipe, arguments: argparse.Namespace) -> None:
    print(watch(Path(recipe.output.directory), arguments.timeout))


def limits(arguments: argparse.Namespace) -> verdict.Limits:
    return verdict.Limits(arguments.max_restarts, arguments.max_idle)


def print_assignments(**values: object) -> None:
    for name, value in values.items():
        print(f"{name}={shlex.quote(' '.join(str(value).split()))}")


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


COMMANDS = {"facts": facts, "begin": begin, "watch": watch_run, "end": end}


if __name__ == "__main__":
    run_command(main)
