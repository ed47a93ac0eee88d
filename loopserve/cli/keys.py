"""`loopserve keys`: make API keys, list and check the file that holds their hashes. What a file may say, `deploy.keys` knows.

A new key is printed once, on stdout, and stands nowhere else; everything else goes to stderr or into the file.
"""

import json
import os
import re
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table

from loopserve.errors import ConfigError

keys = typer.Typer(no_args_is_help=True, help="Make, list and check API keys.")
KeysFile = Annotated[Path, typer.Option(help="The keys file: YAML, or JSON if it is called *.json.")]


@keys.command()
def new(
    tenant: Annotated[str, typer.Option(help="Whose sessions the key sees.")],
    role: Annotated[str, typer.Option(help="user, or operator: metrics and autopilot as well.")] = "user",
    label: Annotated[str, typer.Option(help="What it is for.")] = "",
    expires: Annotated[
        str, typer.Option(help="2027-01-31, 2027-01-31T12:00:00Z, 90d or 12h; never if not given.")
    ] = "",
    requests_per_minute: Annotated[int | None, typer.Option(min=1)] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(min=1, help="Prompt and generated.")] = None,
    concurrent_turns: Annotated[int | None, typer.Option(min=1)] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Of one answer.")] = None,
    file: Annotated[Path | None, typer.Option(help="Append the entry here; printed if not given.")] = None,
) -> None:
    """Make a key: print it once, and append its entry to a file (or print that, too)."""
    from deploy.keys import hash_key, new_key

    key = new_key()
    limits = {
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "concurrent_turns": concurrent_turns,
        "max_tokens": max_tokens,
    }
    entry: dict[str, Any] = {
        "sha256": hash_key(key),
        "tenant": tenant,
        "role": role,
        "label": label,
        "expires": _moment(expires),
        "limits": {name: limit for name, limit in limits.items() if limit is not None},
    }
    entry = {name: value for name, value in entry.items() if value}
    if file is None:
        text = with_entry("", entry)
        typer.echo(key)
        typer.echo(text, nl=False)
        return
    _append(file, entry)
    typer.echo(key)
    Console(stderr=True, soft_wrap=True).print(f"[dim]The key above is shown this once; its hash is in {file}.[/]")


@keys.command("list")
def show(file: KeysFile) -> None:
    """Show whose keys a file holds, and whether they are valid now."""
    from deploy.keys import load_keys

    table = Table("key id", "tenant", "role", "label", "state", "limits", box=None)
    for entry in load_keys(file):
        limits = {name: getattr(entry.limits, name) for name in entry.limits.__slots__}
        told = ", ".join(f"{name} {limit}" for name, limit in limits.items() if limit is not None)
        state = "disabled" if entry.disabled else _validity(entry.expires_unix_s)
        table.add_row(entry.key_id, entry.tenant, entry.role, entry.label, state, told or "none")
    Console(soft_wrap=True, highlight=False, markup=False, width=200).print(table)


@keys.command()
def check(file: KeysFile) -> None:
    """Read a file as the server would; exit status 2 and the reason where it cannot be used."""
    from deploy.keys import load_keys

    entries = load_keys(file)
    num_tenants = len({entry.tenant for entry in entries})
    num_valid = sum(entry.is_valid_at(time.time()) for entry in entries)
    keys_word, tenants_word = _counted(len(entries), "key"), _counted(num_tenants, "tenant")
    typer.echo(f"{keys_word} of {tenants_word}, {num_valid} of them valid now")


def with_entry(text: str, entry: dict[str, Any]) -> str:
    """The text of a keys file with one entry more, everything in it left as it is. Raises ConfigError where it would not be one."""
    from deploy.keys import parse_keys

    before = len(parse_keys(text)) if text.strip() else 0
    if text.lstrip().startswith("{"):
        held = json.loads(text)
        held["keys"].append(entry)
        grown = json.dumps(held, indent=2) + "\n"
    else:
        first_dash = re.search(r"^([ ]*)- ", text, re.MULTILINE)
        indent = first_dash.group(1) if first_dash else "  "
        block = yaml.safe_dump([entry], sort_keys=False, allow_unicode=True)
        head = "keys:\n" if not text.strip() else text if text.endswith("\n") else text + "\n"
        grown = head + "".join(f"{indent}{line}\n" for line in block.splitlines())
    if _num_keys(grown) != before + 1:
        raise ConfigError(
            "The file is not a plain list of entries under `keys:`; write it that way, or append by hand."
        )
    return grown


def _num_keys(text: str) -> int:
    from deploy.keys import parse_keys

    return len(parse_keys(text))


def _append(file: Path, entry: dict[str, Any]) -> None:
    """Write the grown file beside the old one and swap: a server never reads half of it. Readable by its owner only, if it is new."""
    target = file.resolve()
    try:
        text = target.read_text(encoding="utf-8") if target.exists() else ""
        if not text.strip() and target.suffix == ".json":
            text = '{"keys": []}'
        grown = with_entry(text, entry)
        mode = target.stat().st_mode & 0o777 if target.exists() else 0o600
        handle, beside = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            out.write(grown)
        Path(beside).chmod(mode)
        Path(beside).replace(target)
    except OSError as error:
        raise ConfigError(f"The keys file {file} cannot be written ({error.strerror}).") from None
    except UnicodeDecodeError:
        raise ConfigError(f"The keys file {file} is not UTF-8 text.") from None
    except ConfigError as error:
        raise ConfigError(f"The keys file {file} is wrong or would be: {error.message}") from None


def _moment(text: str) -> str:
    """An expiry as the file holds it; `90d` and `12h` count from now."""
    span = re.fullmatch(r"([0-9]{1,5})([dh])", text)
    if span is None:
        return text
    hours = int(span.group(1)) * (24 if span.group(2) == "d" else 1)
    return (datetime.now(UTC) + timedelta(hours=hours)).isoformat(timespec="seconds")


def _validity(expires_unix_s: float | None) -> str:
    if expires_unix_s is None:
        return "valid"
    moment = datetime.fromtimestamp(expires_unix_s, UTC).isoformat(timespec="minutes")
    return f"until {moment}" if time.time() < expires_unix_s else f"expired {moment}"


def _counted(num: int, word: str) -> str:
    return f"{num} {word}" if num == 1 else f"{num} {word}s"
