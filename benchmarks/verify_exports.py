"""Train networks, export them at several widths for each runtime, and run the files: the table of docs/deploy.md.

    python benchmarks/verify_exports.py                       # the digits, minutes
    python benchmarks/verify_exports.py --data cifar10/ --image-size 16 --labels 20000 --float-epochs 16

Each network is trained in float and then, from there, at each width, by `crcore train`; each is exported by
`crcore export --verify`, which measures on all test images. A file below the limit of agreement is kept here and shown
with what it reached. `--table FILE` prints the table of an earlier run, `--update PAGE` puts it into a page.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
from pathlib import Path
from typing import Any

from crcore.cli import main as crcore

WIDTHS = ((8, 8), (4, 8), (4, 4), (2, 8))
KINDS = {
    "ONNX, integers": ("--to", "onnx", "--integer-only"),
    "ONNX, sums in float": ("--to", "onnx", "--no-integer-only"),
    "LiteRT": ("--to", "litert"),
}
# Of what the export says, all but the paths of this machine and what is the same in every row.
MEASURED = (
    "samples", "agreement", "expected_accuracy", "accuracy", "max_code_difference", "size", "float_size", "latency",
    "float_latency", "layers", "differing_layers", "first_difference", "notices",
)  # fmt: skip
RESULTS = Path(__file__).parent / "results" / "verify_exports.json"


def run(*arguments: object) -> str:
    """The command's output; its error is one of this program."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        status = crcore([str(argument) for argument in arguments])
    if status:
        raise SystemExit(f"crcore {' '.join(map(str, arguments))} ended with status {status}")
    return shown.getvalue()


def exports(checkpoint: Path, to: list[str], weight_bits: int, activation_bits: int) -> list[dict[str, Any]]:
    """What `crcore export --verify --json` says of each form of one network."""
    found = []
    for kind, options in KINDS.items():
        if options[1] not in to:
            continue
        out = checkpoint.with_name(f"net.{'tflite' if kind == 'LiteRT' else 'onnx'}")
        common = ("--verify", "--json", "--minimum-agreement", 0, "--out", out)
        told = json.loads(run("export", checkpoint, *options, *common))
        result = {name: told[name] for name in MEASURED}
        found.append({"kind": kind, "weights": weight_bits, "activations": activation_bits, "result": result})
    return found


def train(out: Path, *options: object) -> None:
    """Train in this folder, or go on there; a training of other settings is refused."""
    run("train", *options, "--out", out, *(("--resume",) if out.exists() else ()))


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train and export everything; finished trainings are not repeated."""
    data = ("--data", arguments.data, "--labels", arguments.labels, "--backend", arguments.backend)
    data += ("--lr", arguments.lr, "--float-lr", arguments.float_lr)
    data += ("--image-size", arguments.image_size) if arguments.image_size else ()
    suffix = {"torch": "safetensors", "keras": "keras"}[arguments.backend]
    rows = []
    for given in arguments.models:
        model = given.rpartition(":")[2]
        start = arguments.work / f"{model}-float"
        train(start, *data, "--model", given, "--method", "fp32", "--epochs", arguments.float_epochs)
        trained = start / "seed0" / "fp32" / f"float.{suffix}"
        for weights, activations in WIDTHS:
            out = arguments.work / f"{model}-w{weights}a{activations}"
            width = ("--weight-bits", weights, "--activation-bits", activations)
            train(
                out, *data, "--model", given, *width, "--method", "qat", "--init", trained, "--epochs", arguments.epochs
            )
            checkpoint = out / "seed0" / "qat" / f"student.{suffix}"
            rows += [{"model": model, **row} for row in exports(checkpoint, arguments.to, weights, activations)]
            print(table({"rows": rows}).splitlines()[-1], flush=True)
    chosen = ("models", "backend", "to", "labels", "image_size", "float_epochs", "float_lr", "epochs", "lr")
    settings = {"data": Path(arguments.data).name, **{name: getattr(arguments, name) for name in chosen}}
    return {"settings": settings, "rows": rows}


def table(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    lines = [
        "| network | width | file | accuracy of the file | trained | same class | integers that differ | size / float "
        "| speed over float |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        found = row["result"]
        lines.append(
            f"| {row['model']} | W{row['weights']}A{row['activations']} | {row['kind']} | {found['accuracy']:.2f} % "
            f"| {found['expected_accuracy']:.2f} % | {found['agreement']:.2f} % | {len(found['differing_layers'])} "
            f"| {found['size'] / found['float_size']:.3f} | {found['float_latency'] / found['latency']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet18", "mobilenetv2"], help="as crcore train --model")
    parser.add_argument("--backend", choices=("torch", "keras"), default="torch", help="as crcore train --backend")
    parser.add_argument(
        "--to", nargs="+", choices=("onnx", "litert"), default=["onnx", "litert"], help="the forms to write"
    )
    parser.add_argument("--data", default="digits", help="as crcore train --data")
    parser.add_argument("--labels", default="all", help="how many labeled images")
    parser.add_argument("--image-size", type=int, help="scale images to this size")
    parser.add_argument("--float-epochs", type=int, default=40, help="epochs of the float network")
    parser.add_argument("--float-lr", type=float, default=0.1, help="as crcore train --float-lr")
    parser.add_argument("--lr", type=float, default=0.02, help="as crcore train --lr")
    parser.add_argument("--epochs", type=int, default=8, help="epochs at each width, from the float network")
    parser.add_argument("--work", type=Path, default=Path("runs/verify-exports"), help="where runs and files go")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON file")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of this JSON file, and stop")
    parser.add_argument("--update", type=Path, metavar="PAGE", help="put the table into this page")
    parser.add_argument("--marker", default="verification", help="the comments in the page between which it stands")
    arguments = parser.parse_args()
    if arguments.table:
        results = json.loads(arguments.table.read_text(encoding="utf-8"))
    else:
        results = measured(arguments)
        arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results))
    if arguments.update:
        begin, end = (f"<!-- {arguments.marker}: {which} -->" for which in ("begin", "end"))
        before, _, rest = arguments.update.read_text(encoding="utf-8").partition(begin)
        after = rest.partition(end)[2]
        arguments.update.write_text(f"{before}{begin}\n{table(results)}\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
