"""`rlhf export`: policies in the layout that other projects' own code reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.cli.common import RUNS, STORE, RunsDir, StoreDir
from pipeline.cli.imports import whole
from pipeline.cli.show import RunArgument, fingerprint_of, run_directory
from pipeline.flow.errors import UserError

app = typer.Typer(
    help="Write policies so that other projects read them.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)


@app.callback()
def group() -> None:
    """Write policies so that other projects read them."""


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


@app.command()
def merged(
    run: RunArgument,
    row: Annotated[str, typer.Argument(metavar="ROW", help="row whose policy is an adapter")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="directory to write; must not exist or be empty")],
    store: StoreDir = STORE,
    runs: RunsDir = RUNS,
) -> None:
    """Write a row's policy as one whole model: its adapters added to the weights below them, in float32."""
    from pipeline.flow.store import Store

    run_dir = run_directory(Path(run), runs)
    artifact = Store(store).open_output(fingerprint_of(run_dir, row), "policy")
    said: list[str] = []
    whole(out, lambda directory: said.append(_write_merged(artifact, directory, f"{run_dir.name} {row}")))
    print(f"{out}: the policy of {row}, {said[0]}")


def _write_merged(artifact: Any, directory: Path, name: str) -> str:
    """What was done, in words."""
    from pipeline.llama import adapters
    from pipeline.llama.open import open_frozen
    from pipeline.llama.save import save_model

    policy = open_frozen(artifact)
    if adapters.is_virtual(policy.model):
        raise UserError(
            f"{name}: its adapter is virtual tokens (prefix, prompt, P-tuning), which no weights can hold; open it "
            "with peft over its base, which rlhf lineage names"
        )
    if not adapters.is_adapted(policy.model):
        save_model(policy.model, policy.tokenizer, directory)
        return "which was whole already"
    plain = adapters.merged(policy.model)
    save_model(plain, policy.tokenizer, directory)
    error = plain.__dict__.get("merge_error")
    return "merged" + ("" if error is None else f"; outputs differ by {error:.3g} at most from those over few bits")
