"""The `crcore` command: train and compare networks, look at them, ship them.

Importing this package is cheap; torch and the rest of the extra `crcore[cli]` load when a command runs.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version

from crcore import CRCoreError
from crcore.cli._arguments import build_parser, output_folder, settings_from, sweep_settings

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status: 0, 2 for what the user can put right, 130 after Ctrl-C."""
    try:
        return _run(arguments)
    except CRCoreError as error:
        return _fail(str(error))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "crcore":
            raise
        return _fail(f"the package {error.name!r} is missing; install the command with: pip install 'crcore[cli]'")
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        sys.stderr.close()
        return 1
    except OSError as error:
        return _fail(
            f"{error.filename or 'file'}: {error.strerror or error}; check the path, its rights and free space"
        )
    except KeyboardInterrupt:
        return 130


def _run(arguments: Sequence[str] | None) -> int:
    parser, arguments = build_parser(version("crcore")), sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    if options.command in _ON_FILES:
        _ON_FILES[options.command](options)
        return 0
    out = output_folder(options)
    try:
        if options.command == "sweep":
            points = sweep_settings(parser, arguments, options.vary)
            from crcore.cli._sweep import sweep

            sweep(options.vary, points, out=out, resume=options.resume)
        else:
            settings = settings_from(options)
            from crcore.cli import _commands

            command = _commands.compare if options.command == "compare" else _commands.train
            command(settings, out=out, resume=options.resume)
    except KeyboardInterrupt:
        if (out / "settings.json").exists() or (out / "sweep.json").exists():
            print(f"crcore: interrupted; give the same command with --out {out} --resume to continue", file=sys.stderr)
        raise
    return 0


def _evaluate(options: argparse.Namespace) -> None:
    from crcore.cli._commands import evaluate

    evaluate(
        options.checkpoint,
        data_name=options.data,
        device_name=options.device,
        expected={name: getattr(options, name) for name in ("model", "quantizer", "weight_bits", "activation_bits")},
        as_json=options.json,
    )


def _export(options: argparse.Namespace) -> None:
    from crcore.cli._export import export

    export(
        options.run,
        to=options.to,
        out=options.out,
        role=options.role,
        opset=options.opset,
        integer_only=options.integer_only,
        minimum_agreement=options.minimum_agreement,
        verify=options.verify,
        data_name=options.data,
        samples=options.samples,
        as_json=options.json,
    )


def _report(options: argparse.Namespace) -> None:
    from crcore.cli._report_page import report

    report(options.run, out=options.out, seed=options.seed, data_name=options.data, measure=options.measure)


def _measure(options: argparse.Namespace) -> None:
    from crcore.cli._measure import Flatness, Sensitivity, Where, check_counts
    from crcore.cli._measure_command import measure

    instrument: Flatness | Sensitivity
    if options.command == "flatness":
        check_counts(top=options.top, probes=options.probes, samples=options.samples, seed=options.seed)
        instrument = Flatness(options.top, options.probes, options.density)
    else:
        check_counts(draws=options.draws, radii=options.radii, samples=options.samples, seed=options.seed)
        instrument = Sensitivity(options.draws, options.radii)
    where = Where(options.samples, options.split, options.seed, options.data, options.device)
    measure(options.checkpoints, instrument, where, out=options.out, as_json=options.json)


# Commands on what was trained before, which have neither settings nor a folder to continue.
_ON_FILES = {
    "evaluate": _evaluate,
    "export": _export,
    "flatness": _measure,
    "report": _report,
    "sensitivity": _measure,
}


def _fail(message: str) -> int:
    print(f"crcore: {' '.join(message.split())}", file=sys.stderr)
    return 2
