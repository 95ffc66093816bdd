"""Serve a build over HTTP with the OpenAI API."""

from pathlib import Path
from typing import Any

import click

__all__ = ["command"]


@click.command("serve")
@click.argument("build", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0 takes any free port.")
@click.option("--slots", default=8, show_default=True, type=click.IntRange(1), help="Requests that run at once.")
@click.option(
    "--context", type=click.IntRange(2), help="Tokens per request, prompt and answer. [default: the engine's, <= 2048]"
)
@click.option("--threads", type=click.IntRange(1), help="Threads of the engine. [default: all cores]")
@click.option("--model-name", help="What clients call the model. [default: the directory's name]")
@click.option("--verify", is_flag=True, help="Compare every file of the build with its digest first.")
@click.option("--force", is_flag=True, help="Serve a build that missed its gates.")
def command(
    build: Path,
    host: str,
    port: int,
    slots: int,
    context: int | None,
    threads: int | None,
    model_name: str | None,
    verify: bool,
    force: bool,
) -> None:
    """Serve BUILD over HTTP with the OpenAI API until it is interrupted."""
    import logging

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    # The port answers before anything heavy is imported: /health says 503 until the model is there.
    from llmopt.optimizer.errors import InputError, MissingExtraError

    try:
        from llmopt.runtime.server.serve import bind, serve
    except ModuleNotFoundError as error:
        if error.name not in ("starlette", "uvicorn"):
            raise
        raise MissingExtraError(error.name, "serve") from error
    from llmopt.runtime.build import holds_encoder, open_build
    from llmopt.runtime.encoder import Encoder

    vectors = holds_encoder(build)
    if vectors and context is not None:
        raise InputError("--context is for builds that continue text", hint="an encoder's engine has its own length")

    def load() -> Any:
        if vectors:
            return Encoder(build, threads=threads, verify=verify, force=force)
        return open_build(build, slots=slots, context=context, threads=threads, verify=verify, force=force)

    sock = bind(host, port)
    name = model_name or build.resolve().name
    click.echo(f"serving {name} on http://{host}:{sock.getsockname()[1]}", err=True)
    serve(load, sock=sock, model_name=name, vectors=vectors)
