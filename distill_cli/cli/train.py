"""`distill train`."""

from pathlib import Path
from typing import Annotated

import typer

from distill_cli.cli import options
from distill_cli.cli.options import flags
from distill_cli.cli.output import print_bill, print_result, report_for
from distill_cli.errors import UsageError


def command(
    out: Annotated[Path | None, typer.Option("--out", metavar="RUN", help="The run's directory.")] = None,
    recipe: options.RecipeName = None,
    student: options.Student = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Start from timm's own weights.")] = False,
    init_from: Annotated[
        str | None,
        typer.Option("--init-from", metavar="RUN|FILE", help="Start from the weights of a finished run, or of a file."),
    ] = None,
    teacher: options.Teacher = None,
    teacher_weights: options.TeacherWeights = None,
    teacher_pretrained: Annotated[
        bool, typer.Option("--teacher-pretrained", help="Take timm's own weights for the teacher.")
    ] = False,
    live: Annotated[
        bool, typer.Option("--live", help="Let the teacher look at every batch, in place of a store.")
    ] = False,
    store: options.StorePaths = None,
    trust: options.Trust = False,
    data: options.Data = None,
    cache: options.Cache = None,
    objective: Annotated[
        str | None,
        typer.Option(
            "--objective", metavar="NAME", help="supervised, tinyvit, fkd, deit, features, tinymim, dmae or terms."
        ),
    ] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", metavar="N", help="Passes over the data.")] = None,
    batch_size: options.BatchSize = None,
    views_per_read: options.ViewsPerRead = None,
    lr: Annotated[float | None, typer.Option("--lr", metavar="RATE", help="Peak learning rate, unscaled.")] = None,
    image_size: options.ImageSize = None,
    decode: options.Decode = None,
    workers: options.Workers = None,
    device: options.Device = None,
    gpus: options.Gpus = None,
    precision: options.Precision = None,
    compile_student: Annotated[
        bool, typer.Option("--compile", help="Compile the student; the first steps then take a minute.")
    ] = False,
    seed: options.Seed = None,
    skip_unreadable: options.SkipUnreadable = False,
    resume: Annotated[
        str | None, typer.Option("--resume", metavar="auto|never|must", help="Where a run is under way in RUN.")
    ] = None,
    replay_step: Annotated[
        Path | None,
        typer.Option("--replay-step", metavar="FILE", help="Run the step of RUN/nan-STEP.json again, by itself."),
    ] = None,
    sets: options.Sets = None,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Train a student from a store or from labels, or go on where the run stopped."""
    if out is None and replay_step is None:
        raise UsageError("Missing option '--out'; see \"distill train --help\"")
    if gpus is not None:
        from distill_cli.launch import launch

        raise typer.Exit(launch(gpus, device))
    from distill_cli import train
    from distill_cli.distributed import world
    from distill_cli.recipe import load

    loaded = load(
        recipe,
        sets or (),
        flags(
            ("--student", "student.name", student),
            ("--pretrained", "student.pretrained", pretrained),
            ("--init-from", "train.init_from", init_from),
            ("--teacher", "teacher.name", teacher),
            ("--teacher-weights", "teacher.weights", teacher_weights),
            ("--teacher-pretrained", "teacher.pretrained", teacher_pretrained),
            ("--live", "teacher.live", live),
            ("--store", "store.path", store),
            ("--trust", "store.trust", trust),
            ("--data", "data.path", data),
            ("--cache", "data.cache", cache),
            ("--objective", "objective.name", objective),
            ("--epochs", "train.epochs", epochs),
            ("--batch-size", "train.batch_size", batch_size),
            ("--views-per-read", "train.views_per_read", views_per_read),
            ("--lr", "train.lr", lr),
            ("--image-size", "data.image_size", image_size),
            ("--decode", "data.decode", decode),
            ("--workers", "runtime.workers", workers),
            ("--device", "runtime.device", device),
            ("--precision", "train.precision", precision),
            ("--compile", "runtime.compile", compile_student),
            ("--seed", "train.seed", seed),
            ("--resume", "runtime.resume", resume),
            ("--skip-unreadable", "data.skip_unreadable", skip_unreadable),
        ),
    )
    with world(loaded.recipe.runtime) as here:
        report = report_for(here, quiet)
        if replay_step is not None:
            from distill_cli.replay_step import replay_step as replay

            print_result(replay(replay_step, loaded.recipe.runtime, here, report), as_json)
            return
        assert out is not None
        if dry_run:
            bill = train.bill(loaded.recipe, out, here, report)
            if here.is_main:
                print_bill(bill, loaded.origins, as_json)
            return
        summary = train.train(loaded.recipe, out, here, report)
        if here.is_main:
            print_result(summary, as_json)
