"""`loopserve serve`: settings from the command line, a few lines about what starts, then `deploy/` takes over. Knows no Ray.

`deploy/` stands a floor above and is imported when the command runs, so the rest of the command line works without a cluster.
"""

import json
import shlex
import shutil
import sys
from typing import Annotated, Any

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
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print("[dim]LoopServe: starting Ray on this machine, then loading the model ...[/]")
    from deploy.local import RunEvent, Stage, run
    from deploy.settings import DeploySettings

    options: dict[str, Any] = {"host": host, "port": port, "replicas": replicas, "model": model, "device": device}
    settings = DeploySettings.from_env(**{name: value for name, value in options.items() if value is not None})

    def tell(event: RunEvent) -> None:
        if event.stage is Stage.READY:
            program = "loopserve" if shutil.which("loopserve") else sys.argv[0]
            console.print(welcome(event.url, event.model, num_replicas=settings.replicas, program=program))
        elif event.stage is Stage.STOPPING:
            console.print("[dim]Stopping ...[/]")

    run(settings, on_event=tell)


def welcome(url: str, model: str, *, num_replicas: int, program: str) -> str:
    """What is served and what to try, as rich markup; the commands can be pasted as they stand."""
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Remember: locker 4417."}]})
    chat = f"{program} chat" if url == "http://127.0.0.1:8000" else f"{program} chat --url {url}"
    num = "1 replica" if num_replicas == 1 else f"{num_replicas} replicas"
    return (
        f"[bold green]Ready:[/] [bold]{escape(model)}[/] at [bold]{escape(url)}/v1[/] ({num}). Ctrl-C ends everything.\n\n"
        f"  curl {escape(url)}/v1/chat/completions -H 'Content-Type: application/json' -d {escape(shlex.quote(body))}\n"
        f"  {escape(chat)}\n"
    )
