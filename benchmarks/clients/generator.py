"""What `loopserve bench` costs itself: CPU time a chunk, against a server that sends fixed chunks at fixed times and does nothing else.

    python -m benchmarks.clients.generator

The server is a child process, so only the load generator's own time is counted. Each chunk is one token, and one read where the generator
keeps up.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from benchmarks.machine import describe_machine
from benchmarks.report import RESULTS, Table, write_result
from loopserve.bench import Distribution, Endpoint, Report, Synthetic, Workload, run_load, summarise

CHUNKS = 64
GAP_S = 0.02


def _event(payload: dict[str, object]) -> bytes:
    data = b"data: " + json.dumps(payload).encode() + b"\n\n"
    return b"%x\r\n%b\r\n" % (len(data), data)


def _chunk(delta: dict[str, str], finish: str | None) -> dict[str, object]:
    """As long as a real one."""
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    common = {"id": "chatcmpl-" + "0" * 32, "object": "chat.completion.chunk", "created": 0, "model": "fixed"}
    return {**common, "system_fingerprint": None, "choices": [choice], "usage": None}


async def _send_fixed_answers() -> None:
    """The server, until it is killed; its port is its first line."""
    text = _event(_chunk({"content": " word"}, None))
    usage = {"prompt_tokens": 100, "completion_tokens": CHUNKS}
    end = _event(_chunk({}, "stop")) + _event({"choices": [], "usage": usage}) + b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                asked = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                await reader.readexactly(int(asked.partition("content-length:")[2].partition("\r\n")[0]))
                writer.write(head)
                for _ in range(CHUNKS):
                    await asyncio.sleep(GAP_S)
                    writer.write(text)
                writer.write(end)
        except (ConnectionError, asyncio.IncompleteReadError):
            writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


@contextmanager
def fixed_server() -> Iterator[str]:
    """Its address."""
    command = [sys.executable, "-m", "benchmarks.clients.generator", "--serve"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.wait()


def measure(num_dialogues: int, *, turns: int) -> Report:
    """The report of this many dialogues at once."""
    source = Synthetic(turns=Distribution.constant(turns))
    workload = Workload(source, num_dialogues=num_dialogues, concurrency=num_dialogues)
    with fixed_server() as url:
        return summarise(asyncio.run(run_load(workload, Endpoint(url, model="fixed"))))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dialogues", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        asyncio.run(_send_fixed_answers())
        return
    load = os.getloadavg()[0]
    reports = {num: measure(num, turns=args.turns) for num in args.dialogues}
    rows = [
        (
            str(num),
            f"{1000 * (report.generator.cpu_s_per_1000_chunks or 0):.0f}",
            f"{report.throughput.output_tokens_per_s:.0f} of {num / GAP_S:.0f}",
            f"{100 * report.generator.cpu_share:.0f} %",
            f"{1000 * (report.chunk_gap_s.p50 or 0):.1f}",
            f"{1000 * (report.chunk_gap_s.p99 or 0):.1f}",
        )
        for num, report in reports.items()
    ]
    header = ("dialogues at once", "CPU a token, µs", "tokens/s", "of one core", "gap p50, ms", "gap p99, ms")
    print(
        write_result(
            args.out,
            "clients_generator",
            title="What the load generator costs itself",
            machine=describe_machine(load_before=load),
            numbers={"gap_s": GAP_S, "reports": {str(num): asdict(report) for num, report in reports.items()}},
            tables=[
                Table(
                    f"One chunk every {1000 * GAP_S:.0f} ms from a server that does nothing else", header, tuple(rows)
                )
            ],
            notes=[
                "Gaps above that are what the machine and the generator add: what other work on it costs is in them."
            ],
        )
    )


if __name__ == "__main__":
    main()
