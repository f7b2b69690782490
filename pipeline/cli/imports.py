"""`rlhf import`: models of other projects become the ordinary model directories that plans name as sources."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from pipeline.flow.errors import UserError

app = typer.Typer(
    help="Turn models of other projects into directories that a plan can start from.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)


@app.callback()
def group() -> None:
    """Turn models of other projects into directories that a plan can start from."""


@app.command()
def llama2c(
    weights: Annotated[Path, typer.Argument(metavar="WEIGHTS", help="weights of llama2.c, version 0 or 1 (.bin)")],
    tokenizer: Annotated[Path, typer.Argument(metavar="TOKENIZER", help="its tokenizer (.bin, such as tok512.bin)")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="directory to write; must not exist or be empty")],
    chat: Annotated[
        bool, typer.Option("--chat", help="add a chat template and its turn tokens: what stages after pretraining need")
    ] = False,
    seed: Annotated[int, typer.Option(help="of the new tokens' embeddings")] = 0,
) -> None:
    """Import weights of karpathy/llama2.c as a Hugging Face directory, whole or not at all."""
    for path in (weights, tokenizer):
        if not path.is_file():
            raise UserError(f"there is no file {path}")

    def write(directory: Path) -> None:
        from pipeline.llama.llama2c import import_llama2c

        import_llama2c(weights, tokenizer, directory, chat=chat, seed=seed)

    _whole(out, write)
    print(f"{out}: a policy to start from, e.g. rlhf run configs/stories.yaml --set sources.base.path={out}")
    if not chat:
        print("It has no chat template: import with --chat for SFT and everything after it.")


@app.command("chat")
def give_chat(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="model directory without a chat template")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="directory to write; must not exist or be empty")],
    seed: Annotated[int, typer.Option(help="of the new tokens' embeddings")] = 0,
) -> None:
    """Copy a pretrained model and give it this project's chat template, with embeddings for its turn tokens."""
    if not (model / "config.json").is_file():
        raise UserError(f"{model}: holds no model (no config.json)")

    def write(directory: Path) -> None:
        from pipeline.llama.open import import_with_chat

        import_with_chat(model, directory, seed)

    _whole(out, write)
    print(f"{out}: a policy to start from, e.g. rlhf run configs/llama3-8b-lora.yaml --set sources.base.path={out} ...")


def _whole(out: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a directory beside `out` and move it there when it is complete."""
    import os
    import shutil
    import tempfile

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty directory; remove it or name another")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # transformers imports deepspeed, which looks for a GPU aloud
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        write(partial)
        partial.chmod(0o755)
        os.replace(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
