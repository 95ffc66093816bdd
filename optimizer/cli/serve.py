"""Serve a build over HTTP with the OpenAI API."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from llmopt.optimizer.cli._engine_options import choices_of, engine_options, opening_of

__all__ = ["command"]


@click.command("serve")
@click.argument("build", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0 takes any free port.")
@engine_options
@click.option(
    "--max-queue", default=1024, show_default=True, type=click.IntRange(1), help="Unfinished requests, before 429."
)
@click.option(
    "--max-queue-tokens",
    default=4_000_000,
    show_default=True,
    type=click.IntRange(1),
    help="Their tokens, prompts and longest answers, before 429.",
)
@click.option("--request-timeout", type=click.FloatRange(0, min_open=True), help="Seconds that a request may take.")
@click.option("--model-name", help="What clients call the model. [default: the directory's name]")
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="NAME=FOLDER",
    help="An adapter that PEFT saved, to answer as the model NAME; may be repeated. The build's own need none.",
)
@click.option(
    "--admin-key",
    envvar="LLMOPT_ADMIN_KEY",
    help="Who has it may load and unload adapters; better in LLMOPT_ADMIN_KEY, which others cannot see.",
)
@click.option("--verify", is_flag=True, help="Compare every file of the build with its digest first.")
@click.option("--force", is_flag=True, help="Serve a build that missed its gates.")
def command(
    build: Path,
    host: str,
    port: int,
    max_queue: int,
    max_queue_tokens: int,
    request_timeout: float | None,
    model_name: str | None,
    adapters: tuple[str, ...],
    admin_key: str | None,
    verify: bool,
    force: bool,
    **options: Any,
) -> None:
    """Serve BUILD over HTTP with the OpenAI API until it is interrupted."""
    import logging

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    # The port answers before anything heavy is imported: /health says 503 until the model is there.
    from llmopt.optimizer.errors import InputError, MissingExtraError

    try:
        from llmopt.runtime.server.serve import bind, serve
    except ModuleNotFoundError as error:
        if error.name not in ("prometheus_client", "starlette", "uvicorn"):
            raise
        raise MissingExtraError(error.name, "serve") from error
    from llmopt.runtime.build import holds_encoder, open_build
    from llmopt.runtime.encoder import Encoder
    from llmopt.runtime.engine import QueueLimits
    from llmopt.runtime.policy import policy_for
    from llmopt.runtime.server.service import Conduct

    vectors = holds_encoder(build)
    if vectors and options["context"] is not None:
        raise InputError("--context is for builds that continue text", hint="an encoder's engine has its own length")
    opening = opening_of(options)
    if vectors:
        opening["executor"].check_encoder()
    choices = choices_of(options)
    conduct = Conduct(
        policy=lambda opened: policy_for(opened, choices),
        limits=QueueLimits(requests=max_queue, tokens=max_queue_tokens),
        timeout=request_timeout,
        admin_key=admin_key,
    )
    named, name = _named(adapters), model_name or build.resolve().name
    if vectors and named:
        raise InputError("--adapter is for builds that continue text", hint="an encoder takes none: leave it out")
    if name in named:
        raise InputError(f"--adapter {name}=...: {name} is the model's own name", hint="choose another --model-name")

    def load() -> Any:
        if vectors:
            return Encoder(build, threads=options["threads"], executor=opening["executor"], verify=verify, force=force)
        opened = open_build(build, **opening, verify=verify, force=force)
        for adapter, folder in named.items():
            opened.adapters.add(adapter, folder)
        return opened

    sock = bind(host, port)
    click.echo(f"serving {name} on http://{host}:{sock.getsockname()[1]}", err=True)
    serve(load, sock=sock, model_name=name, vectors=vectors, conduct=conduct)


def _named(adapters: Sequence[str]) -> dict[str, Path]:
    """``NAME=FOLDER`` -> the folder by name.

    Raises:
        UsageError: It is written otherwise, or a name is given twice.
    """
    found: dict[str, Path] = {}
    for given in adapters:
        name, equals, folder = given.partition("=")
        if not (name and equals and folder) or name in found:
            raise click.UsageError(f"--adapter {given}: write NAME=FOLDER, each name once")
        found[name] = Path(folder)
    return found
