"""`stoker generate`: one answer to one prompt, streamed."""

import sys
from typing import Annotated

import typer

from stoker.cli.options import (
    Base,
    Device,
    MaxNewTokens,
    Revision,
    Seed,
    Temperature,
    TopP,
    Trained,
    TrustRemoteCode,
)


def command(
    model: Trained,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The prompt; - reads it from standard input.")],
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")] = False,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = None,
    seed: Seed = 0,
    base: Base = None,
    device: Device = "auto",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Answer one prompt and print it as it comes.

    Example: stoker generate runs/quickstart -p "What is LoRA?"
    """
    from stoker.compose.session import open_session

    text = sys.stdin.read() if prompt == "-" else prompt
    session = open_session(model, base=base, device=device, revision=revision, trust_remote_code=trust_remote_code)
    settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    if raw:
        pieces = session.stream_text(text, **settings)
    else:
        messages = [{"role": "system", "content": system}] if system else []
        pieces = session.stream_chat([*messages, {"role": "user", "content": text}], **settings)
    for piece in pieces:
        typer.echo(piece, nl=False)
    typer.echo()
