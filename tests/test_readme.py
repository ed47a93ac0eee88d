"""The README is run as it stands: its commands start the server, talk to it, and test the project.

A fenced block whose first line ends in `serve`, `run` or `check` after the language is a command of the README. All `run` blocks
meet one server, started by the `serve` block on a free port.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from loopserve.config import EngineConfig

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DEFAULT_ADDRESS = "127.0.0.1:8000"
START_S_MAX, BLOCK_S_MAX, STOP_S_MAX = 300.0, 180.0, 60.0


def blocks(language: str, role: str) -> list[str]:
    """The fenced blocks with that language and role, in order."""
    return re.findall(rf"^```{language} {role}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def block(language: str, role: str, containing: str = "") -> str:
    """The one block with that language and role that contains some text."""
    (found,) = [text for text in blocks(language, role) if containing in text]
    return found


def environment(**more: str) -> dict[str, str]:
    """This process's environment as a terminal would have it: not as a recipe of make has it."""
    names = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES")
    return {name: value for name, value in os.environ.items() if name not in names} | more


def is_ready(address: str) -> bool:
    """Whether the server says that every replica can answer."""
    try:
        with urllib.request.urlopen(f"http://{address}/ready", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def end_group(process: subprocess.Popen[bytes]) -> int:
    """End a process and its group as Ctrl-C in a terminal does; its exit status. What does not end is killed."""
    try:
        os.killpg(process.pid, signal.SIGINT)
        return process.wait(STOP_S_MAX)
    finally:
        with suppress(ProcessLookupError):  # nothing is left of the group: as it should be
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(STOP_S_MAX)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The README's server on a free port; its address. It must also end as Ctrl-C ends it: cleanly."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("readme") / "server.log"
    address = f"127.0.0.1:{port}"
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["bash", "-c", "exec " + block("bash", "serve")],
            cwd=ROOT,
            env=environment(PORT=str(port)),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # Runners of tests may ignore SIGINT, and children inherit that; a terminal's do not.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        try:
            deadline = time.monotonic() + START_S_MAX
            while not is_ready(address):
                assert process.poll() is None, f"the server ended by itself:\n{log.read_text()}"
                assert time.monotonic() < deadline, f"the server was not ready in time:\n{log.read_text()}"
                time.sleep(0.5)
            yield address
        finally:
            status = end_group(process)
    # make passes on the signal that ended it, and says nothing if its command ended well.
    assert status in (0, -signal.SIGINT), log.read_text()
    assert "***" not in log.read_text() and "Traceback" not in log.read_text(), log.read_text()


def run(text: str, address: str = DEFAULT_ADDRESS) -> str:
    """Run a block as its language says, with the server's address in it; what it printed."""
    command = ["bash", "-euo", "pipefail", "-c"] if text.startswith("curl") else [sys.executable, "-c"]
    done = subprocess.run(
        [*command, text.replace(DEFAULT_ADDRESS, address)],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=BLOCK_S_MAX,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.serve
def test_the_curl_commands_are_answered(server: str) -> None:
    for text in blocks("bash", "run"):
        answer = json.loads(run(text, server))
        assert answer["choices"][0]["message"]["content"]
        assert answer["usage"]["loopserve"]["mode"] in ("auto", "sparse", "exact")


@pytest.mark.serve
def test_the_openai_example_finds_its_conversation_cached_and_sparse(server: str) -> None:
    printed = run(block("python", "run", "from openai"), server)
    turns = re.findall(r"cached (\d+) of (\d+); (.*)", printed)
    assert len(turns) == 3, printed
    (first, *_), *later = turns
    assert int(first) == 0
    for cached, prompt, report in later:
        assert 0 < int(cached) < int(prompt)
        assert "'mode': 'sparse'" in report
    assert "What is my locker? -> " in printed


def test_the_library_example_prints_an_answer() -> None:
    assert run(block("python", "run", "from loopserve.engine")).strip()


def test_every_command_of_the_readme_is_run() -> None:
    fences = set(re.findall(r"^```(\S.*)$", README, re.MULTILINE))
    assert fences == {"bash serve", "bash run", "bash check", "python run"}
    assert len(blocks("python", "run")) == 2, "a new python block needs a test of its own"


def test_continuous_integration_runs_the_readmes_test_command_and_nothing_weaker() -> None:
    lines = (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()
    commands = [line for line in lines if line and not line.startswith("#")]
    assert commands[0] == "set -euo pipefail"
    assert commands[-1] == f"exec {block('bash', 'check').strip()} </dev/null"
    assert all(line.startswith(("cd ", "export ")) or line == ".ci/tools </dev/null" for line in commands[1:-1])


def test_the_settings_in_the_readme_exist_with_these_defaults() -> None:
    rows = re.findall(r"^\| `(LOOPSERVE_ENGINE_\w+)` \| `(.*?)` \|", README, re.MULTILINE)
    assert rows
    for variable, default in rows:
        assert EngineConfig.from_env({variable: default}) == EngineConfig(), variable


def test_no_page_and_no_pin_names_a_package_index() -> None:
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pins = [line for line in constraints.splitlines() if line and not line.startswith("#")]
    assert "torch==2.13.0" in pins
    assert any(re.match(r"triton==3\.7\.1 ;.*sys_platform == 'linux'", pin) for pin in pins)
    assert all(re.match(r"[\w.-]+==[\w.]+( ; [\w.<>=!'() ]+)?$", pin) for pin in pins)
    for name in ("README.md", "Makefile", "pyproject.toml", ".ci/run"):
        assert "index-url" not in (ROOT / name).read_text(encoding="utf-8").replace("--no-emit-index-url", ""), name
