"""A session says what is missing, measures nothing on red tests, keeps to its time, and loses nothing when it is killed."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks import gpu_session
from benchmarks.gpu_session import PARTS, Session, parse_arguments
from benchmarks.kernels.gate import Outcome, Proof
from benchmarks.machine import describe_machine


class FakePrograms:
    """Stands for every program of a session: writes a result, and takes the time that it is told."""

    def __init__(self, clock, *, codes=(), seconds=1.0):
        self.clock, self.codes, self.seconds = clock, dict(codes), seconds
        self.commands = []

    def __call__(self, command, *, seconds_max, environment=None):
        self.commands.append((list(command), seconds_max))
        name = next(filter(None, (self._benchmark(word) for word in command)), "tests")
        code = self.codes.get(name, 0)
        took = seconds_max if code is None else self.seconds
        self.clock.now += took
        if "--out" in command:
            file = Path(command[command.index("--out") + 1])
            file.write_text(json.dumps({"benchmark": name, "rows": [{"case": name, "speedup": 0.5}]}))
        return Outcome(code, f"{name} said this", took)

    @staticmethod
    def _benchmark(word):
        return next((part.name for part in PARTS if part.module == word), None)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def session(tmp_path, *flags, **programs):
    clock = Clock()
    fake = FakePrograms(clock, **programs)
    args = parse_arguments(["--tiny", "--device", "cpu", "--commit", "abc", "--out", str(tmp_path), *flags])
    return Session(args, fake, clock=clock), fake


def record_in(tmp_path):
    (file,) = tmp_path.glob("cpu-*.json")
    return json.loads(file.read_text())


def statuses(done):
    return {part.name: part.status for part in done}


def test_every_part_runs_and_takes_the_sessions_word_for_green_tests(tmp_path):
    found, fake = session(tmp_path)
    assert found.run() == 0
    assert statuses(found.done) == {part.name: "passed" for part in PARTS} | {"memcheck": "skipped"}
    for command, _ in fake.commands:
        if "benchmarks.kernels.prefill" in command:
            assert "--tests-passed-at" in command and "--force" not in command
    record = record_in(tmp_path)
    assert set(record["results"]) == {part.name for part in PARTS} - {"tests", "memcheck"}
    assert "prefill: case prefill: 0.50x dense" in record["losing"]
    assert record["to_publish"] is False  # a CPU
    assert "SLOWER than dense: turns: case turns: 0.50x dense" in next(tmp_path.glob("cpu-*.md")).read_text()


@pytest.mark.parametrize(("code", "why"), [(1, "red: tests"), (None, "the kernel tests were not run to their end")])
def test_without_green_tests_every_benchmark_is_refused(tmp_path, code, why):
    found, fake = session(tmp_path, codes={"tests": code})
    assert found.run() == 1
    refused = [part for part in found.done if part.status == "refused"]
    assert {part.name for part in refused} == {part.name for part in PARTS} - {"ceilings", "tests", "memcheck"}
    assert {part.why for part in refused} == {why}
    assert not any("benchmarks.kernels.prefill" in command for command, _ in fake.commands)


def test_force_measures_all_the_same_and_is_passed_on(tmp_path):
    found, fake = session(tmp_path, "--force", codes={"tests": 1})
    assert found.run() == 1
    assert statuses(found.done)["prefill"] == "passed"
    assert all("--force" in command for command, _ in fake.commands if "benchmarks.kernels.decode" in command)


def test_what_a_part_leaves_over_the_next_ones_have_and_the_whole_keeps_to_its_time(tmp_path):
    found, quick = session(tmp_path, "--seconds-max", "530", seconds=1.0)
    found.run()
    assert quick.commands[2][1] > PARTS[3].seconds  # prefill has what ceilings, tests and memcheck left over
    slow_ones = {part.name: None for part in PARTS if part.name != "tests"}
    slow, fake = session(tmp_path, "--seconds-max", "530", codes=slow_ones)
    slow.run()
    assert fake.clock.now <= 530.0
    assert statuses(slow.done)["prefill"] == "not finished"


def test_parts_without_time_are_listed_as_skipped(tmp_path):
    found, _ = session(tmp_path, "--seconds-max", "60", "--parts", "tests", "prefill", "decode", seconds=24.0)
    assert found.run() == 0
    assert statuses(found.done) == {"tests": "passed", "prefill": "passed", "decode": "skipped"}
    assert [done["why"] for done in record_in(tmp_path)["parts"]][-1] == "12 s were left"


def test_proof_of_an_earlier_session_spares_the_tests_and_red_ones_take_it_back(tmp_path):
    proof = tmp_path / "proof.json"
    kept = ("--tests-passed-at", str(proof))
    session(tmp_path, *kept, "--parts", "tests")[0].run()
    assert proof.is_file()
    later, _ = session(tmp_path, *kept, "--parts", "decode")
    assert later.run() == 0
    session(tmp_path, *kept, "--parts", "tests", codes={"tests": 1})[0].run()
    assert not proof.exists()


def test_a_session_that_is_killed_keeps_what_was_measured(tmp_path):
    found, fake = session(tmp_path, "--parts", "ceilings", "tests", "decode")

    def killed(command, **limits):
        if "benchmarks.kernels.decode" in command:
            raise KeyboardInterrupt
        return fake(command, **limits)

    found._run_program = killed
    with pytest.raises(KeyboardInterrupt):
        found.run()
    record = record_in(tmp_path)
    assert [done["name"] for done in record["parts"]] == ["ceilings", "tests"]
    assert "ceilings" in record["results"]
    assert list(tmp_path.glob("cpu-*.parts/ceilings.json"))


def test_a_benchmark_that_writes_nothing_has_failed(tmp_path):
    found, _ = session(tmp_path, "--parts", "tests", "scores")
    found._run_program = lambda command, **limits: Outcome(0, "silent", 1.0)
    assert found.run() == 1
    assert found.done[-1].why == "it wrote nothing"


def test_what_is_missing_is_named_before_anything_runs(monkeypatch, capsys):
    monkeypatch.setattr(gpu_session, "PACKAGES", (("no_such_package", "no-such-package"), ("json", "json")))
    assert gpu_session.main(["--device", "cpu", "--tiny"]) == 1
    assert "python -m pip install no-such-package" in capsys.readouterr().out


def test_everything_a_session_imports_is_checked_and_ray_is_not_needed():
    assert "ray" not in {module for module, _ in gpu_session.PACKAGES}
    script = f"import sys; sys.modules['ray'] = None; {gpu_session.IMPORTS}"  # None: importing it raises
    from benchmarks.kernels.gate import run_program

    outcome = run_program([gpu_session.sys.executable, "-c", script], seconds_max=120.0)
    assert outcome.code == 0, outcome.tail


def test_a_session_at_toy_size_measures_for_real(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_session, "IMPORTS", "import json")  # the test above checks the real ones
    flags = ["--tiny", "--device", "cpu", "--out", str(tmp_path), "--commit", "abc"]
    flags += ["--parts", "tests", "decode", "--tests", "tests/kernels/test_store_kv.py"]
    assert gpu_session.main(flags) == 0
    record = record_in(tmp_path)
    assert {done["name"]: done["status"] for done in record["parts"]} == {
        "tests": "passed",
        "decode": "passed",
    }
    assert record["machine"]["commit"] == "abc"
    proof = Proof(**record["results"]["decode"]["tests"])
    assert tuple(proof.tests) == ("tests/kernels/test_store_kv.py",)
    assert record["results"]["decode"]["cases"]
    assert not list(tmp_path.glob("*.parts"))
    assert "paged_decode" in next(tmp_path.glob("cpu-*.md")).read_text()


def test_the_result_is_named_for_the_accelerator_once_a_part_has_told_it(tmp_path):
    found, fake = session(tmp_path, "--parts", "tests", "decode")
    machine = asdict(describe_machine(load_before=0.0, commit="abc"))

    def on_gpu(command, **limits):
        outcome = fake(command, **limits)
        if "--out" in command:
            told = {"machine": machine | {"accelerator": "NVIDIA H100 80GB HBM3, 79 GiB"}, "rows": []}
            Path(command[command.index("--out") + 1]).write_text(json.dumps(told))
        return outcome

    found._run_program = on_gpu
    found.run()
    assert [file.name.rsplit("-", 3)[0] for file in tmp_path.glob("*.json")] == ["nvidia-h100-80gb-hbm3"]
