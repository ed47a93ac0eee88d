"""The published quality experiments: what they compare can be run, and workers that share a run make the run that one would make."""

import json
from argparse import Namespace

import pytest

from benchmarks.quality.experiments import EXPERIMENTS, Experiment
from benchmarks.quality.run import run_experiment
from loopserve.evaluation.engines import build_config, by_engine, check_methods
from loopserve.evaluation.tasks import PASTS, Wanted
from loopserve.evaluation.variants import Budget, make_variants

pytestmark = pytest.mark.usefixtures("same_threads")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_setting_that_is_compared_exists_and_no_two_variants_are_one(name):
    experiment = EXPERIMENTS[name]
    check_methods(experiment.variants)
    for overrides in by_engine(experiment.variants):
        build_config("", overrides, concurrency=4)
    names = [variant.name for variant in experiment.variants]
    assert len(set(names)) == len(names)
    assert "dense" in names
    assert any(variant.method.name == experiment.against for variant in experiment.variants)


@pytest.mark.parametrize("past", PASTS)
def test_workers_that_share_a_run_answer_as_one_does(tmp_path, past):
    variants = (*make_variants(["dense"], ()), *make_variants(["loopserve-decode"], [Budget(share=0.5)]))
    wanted = Wanted(("facts", "lists"), num=2, tokens=600, seed=1, split="validation", past=past)
    experiment = Experiment("", wanted, variants, lengths=(600,), against="dense")
    outcomes = []
    for workers in (1, 2):
        results = tmp_path / f"results{workers}"
        results.mkdir()
        work = tmp_path / f"work{workers}"
        args = Namespace(model="", work=work, results=results, concurrency=4, max_tokens=4, workers=workers)
        run_experiment("tiny", experiment, args)
        outcomes.append(json.loads((results / "quality_tiny.json").read_text())["outcomes"])
    assert outcomes[0] == outcomes[1]
    assert [outcome["whole"]["score"]["num"] for outcome in outcomes[0]] == [6, 6]
