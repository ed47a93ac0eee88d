"""Runs the published quality experiments: `python -m benchmarks.quality.run NAME ...`; without a name, all of them.

What is compared is in `experiments.py`. Answers are kept under `build/quality/`, so a run that was broken off goes on; the results are
written to `benchmarks/results/quality_NAME*.{json,md,html}`. Measures no time, so each worker is a process of one thread with its share of
the variants: two of them answer more in a minute than one of two threads.
"""

from __future__ import annotations

import argparse
import shutil
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import multiprocessing

from benchmarks.quality.experiments import EXPERIMENTS, Experiment
from benchmarks.report import RESULTS
from loopserve.evaluation.answers import ANSWERS, Answer
from loopserve.evaluation.report import HTML, MARKDOWN, write_report
from loopserve.evaluation.report import RESULTS as NUMBERS
from loopserve.evaluation.suite import TOLD, Settings, run, tell
from loopserve.evaluation.tasks import OWN

_SAID_EVERY_S = 30.0


class _Teller:
    """Says on the terminal how far a run is."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._total = self._done = 0
        self._said_s = time.monotonic()

    def told(self, num_told: int, num_dialogues: int) -> None:
        if num_told == num_dialogues:
            print(f"{self._name}: {num_dialogues} pasts told", flush=True)

    def counted(self, num_answers: int, num_before: int) -> None:
        self._total, self._done = num_answers, num_before
        print(f"{self._name}: {num_answers} answers, {num_before} there already", flush=True)

    def answered(self, answer: Answer) -> None:
        self._done += 1
        if time.monotonic() - self._said_s >= _SAID_EVERY_S:
            self._said_s = time.monotonic()
            print(f"{self._name}: {self._done} of {self._total}", flush=True)


def run_experiment(name: str, experiment: Experiment, args: argparse.Namespace) -> None:
    """All lengths of one experiment, and its results."""
    for wanted in experiment.runs():
        title = name if len(experiment.lengths) == 1 else f"{name}_{wanted.tokens}"
        directory = args.work / title
        settings = Settings(args.model, wanted, experiment.variants, directory, args.concurrency, args.max_tokens)
        if args.workers > 1:
            if wanted.past == OWN:
                tell(settings, listener=_Teller(title))
            answer_in_parts(settings, args.workers)
        run(settings, listener=_Teller(title))
        write_report(directory, against=experiment.against)
        for file in (NUMBERS, MARKDOWN, HTML):
            target = args.results / f"quality_{title}{Path(file).suffix}"
            shutil.copyfile(directory / file, target)
            print(f"wrote {target.name}", flush=True)


def answer_in_parts(settings: Settings, workers: int) -> None:
    """Let each worker answer under its share of the variants, and put what they answered beside what the whole run has."""
    parts = [
        replace(settings, variants=settings.variants[index::workers], out=settings.out / f"part{index}of{workers}")
        for index in range(min(workers, len(settings.variants)))
    ]
    for part in parts if settings.wanted.past == OWN else ():
        part.out.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(settings.out / TOLD, part.out / TOLD)  # all ask over the same past
    multiprocessing.spawn(_answer_part, args=(parts,), nprocs=len(parts))  # type: ignore[no-untyped-call]
    logs = [log for log in (each.out / ANSWERS for each in (settings, *parts)) if log.exists()]
    lines = dict.fromkeys(line for log in logs for line in log.read_text(encoding="utf-8").split("\n")[:-1])
    (settings.out / ANSWERS).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _answer_part(index: int, parts: list[Settings]) -> None:
    torch.set_num_threads(1)
    part = parts[index]
    run(part, listener=_Teller(f"{part.out.parent.name}, {part.out.name}"))


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *EXPERIMENTS], metavar="NAME", help=", ".join(EXPERIMENTS))
    parser.add_argument("--model", default="", help="hub id or directory; the shipped model if not given")
    parser.add_argument("--work", type=Path, default=Path("build/quality"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    """The experiments named."""
    args = parse_arguments()
    torch.set_num_threads(1)
    for name in args.names or EXPERIMENTS:
        run_experiment(name, EXPERIMENTS[name], args)


if __name__ == "__main__":
    main()
