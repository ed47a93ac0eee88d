"""Dialogues with `litellm`: the SDK against the server, in the way of an OpenAI-compatible provider.

Runs in an environment of its own, without LoopServe. Prints one JSON line a turn. Half of the dialogues stream.
"""

from __future__ import annotations

import argparse
import asyncio
import json

import litellm
from questions import questions

litellm.telemetry = False
litellm.suppress_debug_info = True


async def converse(url: str, model: str, index: int) -> None:
    """One dialogue."""
    messages: list[dict[str, str]] = []
    streams = index % 2 == 0
    asked = {"model": f"openai/{model}", "api_base": f"{url}/v1", "api_key": "none", "max_tokens": 32, "temperature": 0}
    for number, (text, expected) in enumerate(questions(index), start=1):
        messages.append({"role": "user", "content": text})
        reply = {"dialogue": index, "turn": number, "streamed": streams, "right": None, "error": None}
        try:
            if streams:
                stream = await litellm.acompletion(
                    messages=messages, stream=True, stream_options={"include_usage": True}, num_retries=0, **asked
                )
                whole = litellm.stream_chunk_builder([chunk async for chunk in stream], messages=messages)
            else:
                whole = await litellm.acompletion(messages=messages, num_retries=0, **asked)
            answer, usage = whole.choices[0].message.content or "", whole.usage
            details = usage.prompt_tokens_details
            reply |= {
                "prompt_tokens": usage.prompt_tokens,
                "completion_tokens": usage.completion_tokens,
                "cached_tokens": details.cached_tokens if details else None,
                "right": None if expected is None else expected in answer,
            }
        except Exception as error:
            reply["error"] = f"{type(error).__name__}: {error}"
            print(json.dumps(reply), flush=True)
            return
        messages.append({"role": "assistant", "content": answer})
        print(json.dumps(reply), flush=True)


async def main() -> None:
    """All dialogues, four at a time."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dialogues", type=int, default=12)
    parser.add_argument("--first", type=int, default=0, help="number of the first dialogue: other numbers, other facts")
    args = parser.parse_args()
    places = asyncio.Semaphore(4)

    async def hold(index: int) -> None:
        async with places:
            await converse(args.url, args.model, index)

    await asyncio.gather(*map(hold, range(args.first, args.first + args.dialogues)))


if __name__ == "__main__":
    asyncio.run(main())
