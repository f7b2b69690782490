"""`rlhf export`: policies in the layout that other projects' own code reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.imports import whole
from pipeline.flow.errors import UserError

app = typer.Typer(
    help="Write policies in the layout of other projects.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)


@app.callback()
def group() -> None:
    """Write policies in the layout of other projects."""


@app.command()
def meta(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="model directory of a whole LLaMA")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="directory to write; must not exist or be empty")],
    shards: Annotated[int, typer.Option(min=1, max=99, help="files: ranks of tensor parallelism")] = 1,
) -> None:
    """Write params.json and consolidated.NN.safetensors, as Meta's reference code names and orders its weights."""
    if not (model / "config.json").is_file():
        raise UserError(f"{model}: holds no model (no config.json)")

    def write(directory: Path) -> None:
        from pipeline.llama.meta import export_meta

        export_meta(model, directory, shards)

    whole(out, write)
    files = "1 consolidated file" if shards == 1 else f"{shards} consolidated files"
    print(f"{out}: {files}; its tokenizer is the one that the model came with")
