"""The command line: what can be asked for, explained. Needs nothing but the standard library, so `--help` is quick."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from crcore.cli._axes import Axis, axis, points
from crcore.cli._errors import CommandError
from crcore.cli._file_arguments import add_evaluate, add_export, add_flatness, add_report, add_sensitivity
from crcore.cli._help import (
    COMPARE,
    COMPARE_EXAMPLES,
    DATA_HELP,
    EVALUATE,
    EVALUATE_EXAMPLES,
    EXPORT,
    EXPORT_EXAMPLES,
    FLATNESS,
    FLATNESS_EXAMPLES,
    REPORT,
    REPORT_EXAMPLES,
    SENSITIVITY,
    SENSITIVITY_EXAMPLES,
    SWEEP,
    SWEEP_EXAMPLES,
    TRAIN,
    TRAIN_EXAMPLES,
)
from crcore.cli._methods import METHODS, parse_methods
from crcore.cli._settings import BACKENDS, BATCHNORM, QUANTIZERS, RAMP_SHAPES, STRONG_FROM, VIEWS, Settings


class Parser(argparse.ArgumentParser):
    """Reports a bad argument as one line, through `main`."""

    def error(self, message: str) -> NoReturn:
        """Called by argparse."""
        raise CommandError(f"{message}; see {self.prog} --help")


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of descriptions and adds defaults that the help text does not explain."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, max_help_position=28, width=116, **options)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, argparse.SUPPRESS) or "default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def build_parser(version: str) -> Parser:
    """The parser; its result has `command` and the options of that command."""
    parser = Parser(
        prog="crcore",
        description="Quantization-aware training with consistency regularization (arXiv 2402.13497).",
        epilog="start with: crcore compare\nmore about a command: crcore compare --help",
        formatter_class=_Help,
    )
    parser.add_argument("--version", action="version", version=f"crcore {version}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")
    compare = _command(
        commands, "compare", "train several methods and show what each gained", COMPARE, COMPARE_EXAMPLES
    )
    _add_data(compare)
    _add_network(compare)
    _add_training(compare, several=True)
    _add_run(compare)
    sweep = _command(commands, "sweep", "compare over a grid of settings", SWEEP, SWEEP_EXAMPLES)
    _add_grid(sweep)
    _add_data(sweep)
    _add_network(sweep)
    _add_training(sweep, several=True)
    _add_run(sweep)
    train = _command(commands, "train", "train one method and keep its checkpoint", TRAIN, TRAIN_EXAMPLES)
    _add_data(train)
    _add_network(train)
    _add_training(train, several=False)
    _add_run(train)
    evaluate = _command(commands, "evaluate", "measure the accuracy of a checkpoint", EVALUATE, EVALUATE_EXAMPLES)
    add_evaluate(evaluate)
    export = _command(commands, "export", "write a trained network for a runtime", EXPORT, EXPORT_EXAMPLES)
    add_export(export)
    report = _command(commands, "report", "write a page that shows all about a run", REPORT, REPORT_EXAMPLES)
    add_report(report)
    flatness = _command(
        commands, "flatness", "measure the curvature of the loss at checkpoints", FLATNESS, FLATNESS_EXAMPLES
    )
    add_flatness(flatness)
    sensitivity = _command(
        commands, "sensitivity", "measure how checkpoints bear noise", SENSITIVITY, SENSITIVITY_EXAMPLES
    )
    add_sensitivity(sensitivity)
    return parser


def settings_from(arguments: argparse.Namespace) -> Settings:
    """The settings behind the arguments of compare or train, or of one point of a sweep."""
    values = vars(arguments)
    if arguments.command != "train":
        values |= {
            "init": None,
            "methods": parse_methods(arguments.methods) if arguments.methods is not None else (),
        }
    else:
        values |= {"seeds": (arguments.seed,), "methods": (arguments.method,)}
    if arguments.float_epochs is None:
        values["float_epochs"] = arguments.epochs
    return Settings(**{name: values[name] for name in Settings.__dataclass_fields__ if name in values})


def sweep_settings(parser: Parser, arguments: Sequence[str], axes: Sequence[Axis]) -> list[Settings]:
    """The settings of each point: those of the command line with the point's own options after it."""
    found = [settings_from(parser.parse_args([*arguments, *options])) for options in points(axes)]
    if len(set(found)) < len(found):
        raise CommandError("--vary gives the same point twice, as 1 and 1.0 do; give each value once")
    return found


def output_folder(arguments: argparse.Namespace) -> Path:
    """The `--out` folder, or a new one named after the time."""
    if arguments.out is not None:
        return Path(arguments.out)
    if arguments.resume:
        raise CommandError("--resume needs --out: name the folder of the run to continue")
    return Path("runs") / time.strftime(f"{arguments.command}-%Y%m%d-%H%M%S")


def _command(commands: Any, name: str, summary: str, description: str, epilog: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=description, epilog=epilog, formatter_class=_Help
    )
    return parser


def _add_grid(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("grid")
    group.add_argument(
        "--vary",
        type=axis,
        action="append",
        required=True,
        metavar="NAME=V,...",
        help="the values of an option below; several --vary make a grid. bits sets --weight-bits and "
        "--activation-bits; flip and amp take yes and no",
    )


def _add_data(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument("--data", default="digits", metavar="PATH", help=DATA_HELP)
    group.add_argument(
        "--labels",
        type=_images,
        metavar="N",
        help="keep N labels (stratified, chosen by the seed); the other training images are unlabeled. "
        "Default: 200 for digits, otherwise all",
    )
    group.add_argument(
        "--unlabeled",
        type=_images,
        metavar="N",
        help="use only N of the unlabeled images, chosen by the seed; default: all",
    )
    group.add_argument("--image-size", type=int, metavar="N", help="scale and crop images to NxN; default: as they are")
    group.add_argument(
        "--flip",
        action=argparse.BooleanOptionalAction,
        help="flip views horizontally at random; default: yes, but not for digits",
    )
    group.add_argument(
        "--student-view",
        choices=VIEWS,
        help="augmentation of what the student sees. weak: random crop and flip; strong: also colour jitter and "
        f"erasing; none: the image itself. Default: strong from {STRONG_FROM} epochs on, which is where it paid "
        "(docs/results.md), weak below",
    )
    group.add_argument("--teacher-view", choices=VIEWS, default="weak", help="of what the teacher sees")


def _add_network(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("network and quantization")
    group.add_argument(
        "--model",
        default="resnet8",
        help="resnet8, resnet20 (CIFAR form, 1x1 convolution shortcuts), resnet18, mobilenetv2 (both with a stride-1 "
        "stem and no pooling before the stages), or your own as module:function",
    )
    group.add_argument(
        "--quantizer",
        choices=QUANTIZERS,
        default="lsq",
        help="lsq: learned step sizes; lsq+: with a learned offset for activations; pact: learned clip of activations, "
        "DoReFa weights; dorefa; minmax: observed ranges",
    )
    group.add_argument("--weight-bits", type=int, default=4, metavar="N", help="1 to 16; 8 in the first and last layer")
    group.add_argument(
        "--activation-bits", type=int, default=4, metavar="N", help="1 to 16; 8 in the first and last layer"
    )


def _add_training(parser: argparse.ArgumentParser, *, several: bool) -> None:
    group = parser.add_argument_group("training")
    if several:
        group.add_argument("--methods", metavar="A,B,...", help="which methods; default: all that the data allow")
        group.add_argument(
            "--seeds",
            type=_seeds,
            default="3",
            metavar="N|A-B",
            help="repeat everything with the seeds 0 to N-1, or A to B: seeds that were not looked at when settings "
            "were chosen confirm the choice",
        )
    else:
        group.add_argument("--method", choices=tuple(METHODS), default="qat+cr", help="which method")
        group.add_argument("--seed", type=int, default=0, metavar="N", help="of weights, labels, order and views")
        group.add_argument(
            "--init",
            metavar="CHECKPOINT",
            help="start from this checkpoint, float or of the same recipe, instead of training a float network",
        )
    group.add_argument("--epochs", type=int, default=60, metavar="N", help="passes of QAT over the labeled images")
    group.add_argument("--float-epochs", type=int, metavar="N", help="of the float network; default: as --epochs")
    group.add_argument("--batch-size", type=int, default=64, metavar="N", help="labeled images in a step")
    group.add_argument("--lr", type=float, default=0.02, help="peak learning rate of QAT (SGD, cosine to zero)")
    group.add_argument("--float-lr", type=float, default=0.1, help="peak learning rate of the float network")
    group.add_argument("--weight-decay", type=float, default=5e-4, help="of weights, not of quantizer scales")
    group.add_argument(
        "--reestimate-batchnorm",
        type=int,
        default=0,
        metavar="N",
        help="measure BatchNorm's running statistics anew on N batches after the last step of QAT, of the trained "
        "network and of its average; default: 0, which leaves them",
    )
    group = parser.add_argument_group("consistency (qat+cr), average (qat+ema, qat+cr) and distillation (qat+kd)")
    group.add_argument(
        "--consistency-weight", type=float, default=1.0, metavar="X", help="lambda at the end of its ramp"
    )
    group.add_argument(
        "--ramp", type=float, default=0.3, metavar="X", help="the part of the steps in which lambda rises"
    )
    group.add_argument(
        "--ramp-shape",
        choices=RAMP_SHAPES,
        default="sigmoid",
        help="how it rises: exp(-5 (1 - t)^2), t, (1 - cos(pi t)) / 2, or not at all",
    )
    group.add_argument("--temperature", type=float, default=1.0, metavar="X", help="of both softmaxes")
    group.add_argument(
        "--threshold",
        type=_number_or_none,
        metavar="P",
        help="leave images out on which the teacher's confidence is below P; default: none",
    )
    group.add_argument(
        "--ema-decay",
        type=float,
        metavar="X",
        help="of the average; default: a window of a twentieth of the steps, 0.9 to 0.999",
    )
    group.add_argument(
        "--teacher-batchnorm",
        choices=BATCHNORM,
        default="average",
        help="BatchNorm's running statistics in the average: averaged too, or copied from the student",
    )
    group.add_argument("--kd-weight", type=float, default=1.0, metavar="X", help="of qat+kd's term")
    group.add_argument("--kd-temperature", type=float, default=2.0, metavar="X", help="of qat+kd's softmaxes")

    group = parser.add_argument_group("weights that oscillate between two integers (Nagel et al., 2022)")
    group.add_argument(
        "--dampening",
        type=_number_or_none,
        metavar="X",
        help="pull weights to the middle of their bins: the factor of that term, at the end of its cosine ramp; "
        "default: none",
    )
    group.add_argument(
        "--freezing",
        type=_number_or_none,
        metavar="X",
        help="freeze weights whose frequency of oscillation is above X at the end, and above 4 X at the start; "
        "default: none",
    )


def _add_run(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument(
        "--backend",
        choices=BACKENDS,
        default="torch",
        help="what trains: crcore_torch, or crcore_keras on the engine that the environment variable KERAS_BACKEND "
        "names (tensorflow, jax or torch). Data and views are the same",
    )
    group.add_argument("--out", metavar="FOLDER", help="where results go; default: a new folder in runs/")
    group.add_argument(
        "--resume", action="store_true", help="continue the run in --out to the result it would have had"
    )
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    group.add_argument(
        "--amp",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="bfloat16 autocast of the networks' forward passes",
    )
    group.add_argument(
        "--evaluate-every", type=int, metavar="N", help="epochs between tests; default: about 20 tests in a run"
    )


def _seeds(text: str) -> tuple[int, ...]:
    first, dash, last = text.partition("-")
    try:
        numbers = range(int(first), int(last) + 1) if dash else range(int(first))
    except ValueError:
        numbers = range(0)
    if not numbers:
        raise argparse.ArgumentTypeError(
            f"must be a count, 1 or more, or a range such as 5-9, got {text!r}; 3 give a confidence interval"
        )
    return tuple(numbers)


def _number_or_none(text: str) -> float | None:
    try:
        return None if text == "none" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number or none, got {text!r}") from None


def _images(text: str) -> int:
    if text == "all":
        return 0
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number of images or 'all', got {text!r}") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, or 'all', got {number}")
    return number
