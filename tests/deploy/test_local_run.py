"""The whole program with the real engine: a tiny random model, served on loopback, stopped by a signal."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

pytestmark = pytest.mark.serve

HERE = Path(__file__).parent
START_LIMIT_S = 120.0


@pytest.fixture
def tiny_model(tmp_path: Path) -> Path:
    sys.path.insert(0, str(HERE.parent))
    try:
        from tiny_models import byte_tokenizer, reference_model
    finally:
        sys.path.pop(0)
    folder = tmp_path / "tiny-llama"
    reference_model("llama").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def program(model: str, port: int) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1])}
    command = [sys.executable, str(HERE / "served_for_real.py"), model, str(port)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def port() -> Iterator[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        yield probe.getsockname()[1]


def test_a_model_is_served_until_the_signal_and_nothing_is_left(tiny_model: Path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = program(str(tiny_model), port)
    try:
        assert server.stdout is not None
        seen: list[str] = []
        for line in server.stdout:
            seen.append(line.split()[0])
            if seen[-1] == "ready":
                break
        assert seen == ["starting", "loading", "ready"], server.stderr.read() if server.stderr else ""
        _, url, model = line.split()
        assert (url, model) == (f"http://127.0.0.1:{port}", "tiny-llama")
        _converse(url, model)
        server.send_signal(signal.SIGTERM)
        rest, errors = server.communicate(timeout=START_LIMIT_S)
    finally:
        server.kill()
        server.wait()
    assert (server.returncode, [line.split()[0] for line in rest.splitlines()]) == (0, ["stopping", "stopped"]), errors


def _converse(url: str, model: str) -> None:
    """Two turns without a header: the second finds what the first has computed."""
    with openai.OpenAI(
        base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=httpx.Client(trust_env=False)
    ) as api:
        question = {"role": "user", "content": "Tell me something long. " * 4}
        chunks = list(
            api.chat.completions.create(
                model=model,
                messages=[question],
                max_tokens=24,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": True},
            )
        )
        answer = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        usage = chunks[-1].usage
        assert usage is not None and usage.completion_tokens == 24
        again = api.chat.completions.create(
            model=model,
            messages=[question, {"role": "assistant", "content": answer}, {"role": "user", "content": "And?"}],
            max_tokens=4,
        )
        assert again.usage and again.usage.prompt_tokens_details
        assert (again.usage.prompt_tokens_details.cached_tokens or 0) >= usage.prompt_tokens - 1
        with pytest.raises(openai.BadRequestError) as refused:
            api.chat.completions.create(model=model, messages=[question], max_tokens=10_000_000)
        assert refused.value.code == "context_length_exceeded"


def test_a_port_in_use_ends_the_program_with_one_clear_line(port: int):
    server = program("", port)
    output, errors = server.communicate(timeout=START_LIMIT_S)
    assert server.returncode == 1
    assert output == ""
    assert errors.strip().splitlines()[-1].startswith(f"ConfigError: Cannot listen at 127.0.0.1:{port}")
