"""`loopserve serve`: settings from the command line, a few lines about what starts, then `deploy/` takes over. Knows no Ray.

`deploy/` stands a floor above and is imported when the command runs, so the rest of the command line works without a cluster.
"""

from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape


def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on; 127.0.0.1 if not given.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port; 8000 if not given.")] = None,
    replicas: Annotated[int | None, typer.Option(min=1, help="Engines to run; 1 if not given.")] = None,
    model: Annotated[str | None, typer.Option(help="Hub id or directory; the shipped model if not given.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda; auto if not given.")] = None,
) -> None:
    """Serve OpenAI's API until Ctrl-C. HOST, PORT, REPLICAS, MODEL and DEVICE in the environment count as well."""
    from deploy.app import run
    from deploy.settings import DeploySettings

    options = {"host": host, "port": port, "replicas": replicas, "model": model, "device": device}
    settings = DeploySettings.from_env(**{name: value for name, value in options.items() if value is not None})
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    num = "one replica" if settings.replicas == 1 else f"{settings.replicas} replicas"
    console.print(
        f"LoopServe starts [bold]{escape(settings.model or 'the shipped model')}[/] as {num} on Ray Serve"
        f" ({settings.device} device); Ctrl-C ends everything."
    )
    run(settings)
