"""`stoker chat`: talk to a model in the terminal."""

from collections.abc import Iterable
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
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = None,
    seed: Seed = 0,
    base: Base = None,
    device: Device = "auto",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Talk to a model; /new starts over, /quit or Ctrl-D ends, Ctrl-C stops an answer.

    Example: stoker chat runs/quickstart
    """
    from stoker.compose.session import open_session

    session = open_session(model, base=base, device=device, revision=revision, trust_remote_code=trust_remote_code)
    typer.echo(f"{session.description}\n/new starts over, /quit ends.")
    opening = [{"role": "system", "content": system}] if system else []
    settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    messages = list(opening)
    while True:
        try:
            said = input("\nyou> ").strip()
        except (EOFError, KeyboardInterrupt):
            typer.echo()
            return
        if said == "/quit":
            return
        if said == "/new":
            messages = list(opening)
        elif said:
            messages.append({"role": "user", "content": said})
            messages.append({"role": "assistant", "content": _answer(session.stream_chat(messages, **settings))})


def _answer(pieces: Iterable[str]) -> str:
    """Prints the pieces as they come and returns them joined; Ctrl-C ends the answer, not the chat."""
    said: list[str] = []
    typer.echo("model> ", nl=False)
    try:
        for piece in pieces:
            said.append(piece)
            typer.echo(piece, nl=False)
    except KeyboardInterrupt:
        typer.echo(" …", nl=False)
    typer.echo()
    return "".join(said)
