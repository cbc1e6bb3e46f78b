"""`ltnorm export`."""

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from ltnorm.cli import options
from ltnorm.console import Output
from ltnorm.errors import UsageError, did_you_mean

# The name of the file in a run's directory, and the packages that write it.
FORMATS = {
    "safetensors": ("weights.safetensors", ("safetensors",)),
    "onnx": ("model.onnx", ("onnx", "onnxscript")),
}


def command(
    run: Annotated[Path, typer.Argument(help="A finished run's directory, or its checkpoint.")],
    format: Annotated[
        str, typer.Option("--format", help="safetensors: the weights; onnx: the model to run.")
    ] = "safetensors",
    to: Annotated[
        Path | None,
        typer.Option("--output", help="The file (weights.safetensors or model.onnx in RUN)."),
    ] = None,
    data_dir: options.DataDir = options.DATA_DIR,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write the final weights of a run as safetensors or ONNX.

    The file says how its images are to be normalized, and what its classes are. The data set is
    not needed.

    `ltnorm export results/synthetic-exp100/resnet8-bn-ce/seed0 --format onnx`
    """
    from ltnorm.reporting import schema

    output = Output(quiet=quiet, json=json)
    if format not in FORMATS:
        raise UsageError(f"unknown format '{format}'", did_you_mean(format, FORMATS))
    name, packages = FORMATS[format]
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise UsageError(
            f"--format {format} needs {' and '.join(missing)}", 'pip install "ltnorm[export]"'
        )
    file = to or (run.parent if run.is_file() else run) / name
    if file.exists() and not file.is_dir() and not force:
        raise UsageError(
            f"{file} is there already", "--force replaces it; --output FILE is another"
        )

    from ltnorm import export

    found = export.read(run, data_dir)
    schema.check_file(file, "--output")
    content = found.onnx() if format == "onnx" else found.safetensors()
    schema.write_bytes(file, content)
    output.note(f"{found.recipe.norm.name}, {len(content):,} bytes; takes {found.takes}")
    output.product(str(file))
    document = {"file": str(file), "format": format, "bytes": len(content)}
    output.document(document | {"metadata": found.metadata})
