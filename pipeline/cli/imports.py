"""`rlhf import`: models of other projects become the ordinary model directories that plans name as sources."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from pipeline.flow.errors import UserError

Out = Annotated[Path, typer.Argument(metavar="OUT", help="directory to write; must not exist or be empty")]
Template = Annotated[
    str | None, typer.Option(help="chat format by name: own, chatml, llama-2, llama-3, llama-3.1, chatglm or alpaca")
]
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
    out: Out,
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

    whole(out, write)
    print(f"{out}: a policy to start from, e.g. rlhf run configs/stories.yaml --set sources.base.path={out}")
    if not chat:
        print("It has no chat template: import with --chat for SFT and everything after it.")


@app.command("chat")
def give_chat(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="model directory without a chat template")],
    out: Out,
    template: Template = "own",
    seed: Annotated[int, typer.Option(help="of the new tokens' embeddings")] = 0,
) -> None:
    """Copy a pretrained model and give it a chat format, our own by default, with embeddings for its tokens."""
    name = _named(template) or "own"
    if not (model / "config.json").is_file():
        raise UserError(f"{model}: holds no model (no config.json)")

    def write(directory: Path) -> None:
        from pipeline.llama.open import import_with_chat

        import_with_chat(model, directory, seed, name)

    whole(out, write)
    print(f"{out}: a policy to start from, e.g. rlhf run configs/llama3-8b-lora.yaml --set sources.base.path={out} ...")


@app.command()
def meta(
    weights: Annotated[
        Path, typer.Argument(metavar="DIR", help="params.json and consolidated.NN.safetensors, one or several")
    ],
    out: Out,
    tokenizer: Annotated[
        Path | None, typer.Option(help="SentencePiece model or tiktoken file; default: DIR/tokenizer.model")
    ] = None,
    template: Template = None,
    seed: Annotated[int, typer.Option(help="of the new tokens' embeddings")] = 0,
) -> None:
    """Import weights in Meta's own layout, bit for bit; several files are put together."""
    pieces = tokenizer or weights / "tokenizer.model"
    if not pieces.is_file():
        raise UserError(f"there is no file {pieces}; name the tokenizer with --tokenizer")
    name = _named(template)

    def write(directory: Path) -> None:
        from pipeline.llama.meta import import_meta

        import_meta(weights, pieces, directory, template=name, seed=seed)

    whole(out, write)
    print(f"{out}: a policy to start from, e.g. rlhf run configs/stories.yaml --set sources.base.path={out}")
    if not name:
        print("It has no chat template: import with --template for SFT and everything after it, or set sft.template.")


@app.command()
def tokenizer(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="SentencePiece model, tiktoken file of Llama 3, or tokenizer.json")
    ],
    out: Out,
    template: Template = None,
    bos: Annotated[str | None, typer.Option(help="of a bare tokenizer.json: the token that begins a text")] = None,
    eos: Annotated[str | None, typer.Option(help="the one that ends a text")] = None,
    pad: Annotated[str | None, typer.Option(help="the one that fills up")] = None,
) -> None:
    """Import a tokenizer of another project, for `sources: {NAME: {kind: tokenizer, path: OUT}}`."""
    if not file.is_file():
        raise UserError(f"there is no file {file}")
    name = _named(template)
    roles = {role: token for role, token in (("bos", bos), ("eos", eos), ("pad", pad)) if token is not None}

    def write(directory: Path) -> None:
        from pipeline.llama.tokenizer import add_chat_tokens, open_pieces

        opened = open_pieces(file, roles)
        if name:
            add_chat_tokens(opened, name)
        opened.save_pretrained(directory)

    whole(out, write)
    print(f"{out}: a tokenizer for pretrain, e.g. sources: {{pieces: {{kind: tokenizer, path: {out}}}}}")
    if not name:
        print("It has no chat template: import with --template, or set pretrain.template.")


def _named(template: str | None) -> str | None:
    from pipeline.data.templates import template_named

    return template and template_named(template).name


def whole(out: Path, write: Callable[[Path], None]) -> None:
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
