"""A program that serves a model directory until it is told to stop, and writes what happens to stdout, a line an event."""

import sys

from deploy.local import RunEvent, run
from deploy.settings import DeploySettings
from loopserve.errors import LoopServeError


def told(event: RunEvent) -> None:
    print(event.stage, event.url or "-", event.model or "-", flush=True)


if __name__ == "__main__":
    model, port = sys.argv[1:]
    try:
        run(DeploySettings(model=model, port=int(port), device="cpu", start_timeout_s=120), on_event=told)
    except LoopServeError as error:
        sys.exit(f"{type(error).__name__}: {error.message}")
