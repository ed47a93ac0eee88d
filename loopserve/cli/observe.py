"""`loopserve observe`: a whole LoopServe on this machine under load, and the address of a page to watch it. `deploy/` does it; this tells.

`deploy/` stands a floor above and is imported when the command runs.
"""

import os
import secrets
from dataclasses import replace
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape


def observe(
    host: Annotated[str | None, typer.Option(help="Address to listen on; 127.0.0.1 if not given.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port; 8000 if not given.")] = None,
    replicas: Annotated[int | None, typer.Option(min=1, help="Engines to begin with; 2 if not given.")] = None,
    model: Annotated[str | None, typer.Option(help="Hub id or directory; the shipped model if not given.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda; auto if not given.")] = None,
    dialogues: Annotated[int, typer.Option(min=1, max=256, help="Dialogues held at a time.")] = 16,
    rate: Annotated[
        float | None, typer.Option(min=0.01, help="Dialogues begun per second; if not given, one when another ends.")
    ] = None,
    minutes: Annotated[float, typer.Option(min=0.1, max=1440, help="How long the load lasts; the page stays.")] = 30.0,
    load: Annotated[bool, typer.Option("--load/--no-load", help="Hold dialogues with the model.")] = True,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="LOOPSERVE_API_KEY", show_envvar=True, help="An operator's, where keys are in use."),
    ] = None,
) -> None:
    """Serve on this machine, hold many dialogues at once, and show a live page of it until Ctrl-C."""
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print("[dim]LoopServe: starting Ray on this machine, then loading the model ...[/]")
    from deploy.local import RunEvent, Stage
    from deploy.observe.demo import TALK, DemoEvents, demo_settings, run_demo
    from loopserve.bench import Workload

    options = {"host": host, "port": port, "replicas": replicas, "model": model, "device": device}
    settings, engine = demo_settings(os.environ, {name: given for name, given in options.items() if given is not None})
    talk = replace(TALK, seed=secrets.randbelow(2**31))
    workload = Workload(talk, num_dialogues=None, concurrency=dialogues, rate_per_s=rate, duration_s=60 * minutes)

    def tell(event: RunEvent) -> None:
        if event.stage is Stage.READY:
            held = f"{dialogues} dialogues at a time for {minutes:g} min" if load else "no load"
            console.print(welcome(event.url, event.model, held=held))
        elif event.stage is Stage.STOPPING:
            console.print("[dim]Stopping ...[/]")

    def tell_prometheus(url: str | None) -> None:
        if url is not None:
            console.print(f"[dim]Prometheus scrapes it every second: {escape(url)}[/]")
            return
        console.print(
            "[bold yellow]Prometheus was not found.[/] The page then begins when it is opened, and the autopilot asks the replicas "
            "themselves. [bold]make tools[/] fetches it."
        )

    events = DemoEvents(tell, tell_prometheus, lambda line: console.print(f"[dim]{escape(line)}[/]"))
    run_demo(settings, engine, workload if load else None, api_key=api_key, events=events)


def welcome(url: str, model: str, *, held: str) -> str:
    """Where to look, as rich markup."""
    return (
        f"[bold green]Watch it:[/] [bold]{escape(url)}/observe[/] ({escape(model)}, {held}). Ctrl-C ends everything.\n"
        f"  OpenAI's API is at {escape(url)}/v1, the metrics at {escape(url)}/metrics."
    )
