"""Dialogues with the `openai` package, as a user writes them: the whole conversation each time, nothing that is not OpenAI's.

Runs in an environment of its own, without LoopServe. Prints one JSON line a turn. Half of the dialogues stream.
"""

from __future__ import annotations

import argparse
import asyncio
import json

from openai import AsyncOpenAI
from questions import questions


async def converse(client: AsyncOpenAI, model: str, index: int) -> None:
    """One dialogue."""
    messages: list[dict[str, str]] = []
    streams = index % 2 == 0
    for number, (text, expected) in enumerate(questions(index), start=1):
        messages.append({"role": "user", "content": text})
        reply = {"dialogue": index, "turn": number, "streamed": streams, "right": None, "error": None}
        try:
            if streams:
                answer, usage = await _streamed(client, model, messages)
            else:
                whole = await client.chat.completions.create(
                    model=model, messages=messages, max_tokens=32, temperature=0
                )
                answer, usage = whole.choices[0].message.content or "", whole.usage
            details = usage.prompt_tokens_details if usage else None
            reply |= {
                "prompt_tokens": usage.prompt_tokens if usage else None,
                "completion_tokens": usage.completion_tokens if usage else None,
                "cached_tokens": details.cached_tokens if details else None,
                "right": None if expected is None else expected in answer,
            }
        except Exception as error:
            reply["error"] = f"{type(error).__name__}: {error}"
            print(json.dumps(reply), flush=True)
            return
        messages.append({"role": "assistant", "content": answer})
        print(json.dumps(reply), flush=True)


async def _streamed(client: AsyncOpenAI, model: str, messages: list[dict[str, str]]) -> tuple[str, object]:
    parts, usage = [], None
    stream = await client.chat.completions.create(
        model=model,
        messages=messages,
        max_tokens=32,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    async for chunk in stream:
        usage = chunk.usage or usage
        if chunk.choices and chunk.choices[0].delta.content:
            parts.append(chunk.choices[0].delta.content)
    return "".join(parts), usage


async def main() -> None:
    """All dialogues, four at a time."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dialogues", type=int, default=12)
    parser.add_argument("--first", type=int, default=0, help="number of the first dialogue: other numbers, other facts")
    args = parser.parse_args()
    places = asyncio.Semaphore(4)
    async with AsyncOpenAI(base_url=f"{args.url}/v1", api_key="none", max_retries=0) as client:

        async def hold(index: int) -> None:
            async with places:
                await converse(client, args.model, index)

        await asyncio.gather(*map(hold, range(args.first, args.first + args.dialogues)))


if __name__ == "__main__":
    asyncio.run(main())
