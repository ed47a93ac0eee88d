"""The training of the shipped model sees what it says it sees, and goes the whole way at toy size."""

import dataclasses
import json
import random

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.shipped_model import train
from benchmarks.shipped_model.batches import BatchKey, make_batch
from benchmarks.shipped_model.model import build_model, word_embeddings
from benchmarks.shipped_model.muon import Muon, orthogonalized
from benchmarks.shipped_model.recipe import full_recipe, further, tiny_recipe
from benchmarks.shipped_model.slips import with_slips
from benchmarks.shipped_model.text import IGNORE, REPLY, build_tokenizer, encode_dialogue, special_id
from loopserve.evaluation.dialogues import Split, make_past
from loopserve.evaluation.items import Dialogue, Turn
from loopserve.loading import shipped_model_dir

RECIPE = dataclasses.replace(full_recipe(1000, seed=3), earlier_share=0.0)


pytestmark = pytest.mark.usefixtures("same_threads")


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(seed=3, vocab=1024, num_dialogues=20)


def test_a_batch_follows_from_its_key_alone(tokenizer):
    one, same, other = (make_batch(RECIPE, tokenizer, BatchKey(index, 3)) for index in (5, 5, 6))
    assert torch.equal(one.ids, same.ids)
    assert torch.equal(one.positions, same.positions)
    assert one.ids.shape != other.ids.shape or not torch.equal(one.ids, other.ids)


def test_parts_share_a_steps_tokens(tokenizer):
    whole, half = make_batch(RECIPE, tokenizer, BatchKey(0, 4)), make_batch(RECIPE, tokenizer, BatchKey(0, 4, parts=2))
    assert half.ids.shape[0] == whole.ids.shape[0] // 2


@pytest.mark.parametrize("stage", RECIPE.stages)
def test_a_stage_is_as_long_as_its_shape_says(stage):
    full = Tokenizer.from_file(str(shipped_model_dir() / "tokenizer.json"))
    alone = dataclasses.replace(RECIPE, stages=(stage,))
    batches = [make_batch(alone, full, BatchKey(index, 0)) for index in range(6)]
    mean = sum(batch.num_tokens for batch in batches) / sum(len(batch.ids) for batch in batches)
    assert 0.9 * stage.shape.tokens <= mean <= 1.25 * stage.shape.tokens
    longest = max(batch.ids.shape[1] for batch in batches)  # invented names are more tokens than their letters say
    assert longest <= 1.5 * stage.shape.tokens + 20


@pytest.mark.parametrize("stage", range(len(RECIPE.stages)))
def test_positions_ascend_and_stay_within_the_model(tokenizer, stage):
    batch = make_batch(RECIPE, tokenizer, BatchKey(7, stage))
    for row, ids in zip(batch.positions, batch.ids, strict=True):
        own = row[: int((ids != 0).sum())]
        assert (own.diff() >= 1).all()
        assert own[-1] < RECIPE.model.positions


def test_only_what_the_assistant_says_bears_loss(tokenizer):
    turns = (
        Turn("My gate is 51.", "Noted: gate 51."),
        Turn("What is my gate?", "On record: gate 51.", ("gate 51",), task="facts"),
    )
    example = encode_dialogue(tokenizer, Dialogue("d", "Answer briefly.", turns))
    said = [token for token, kind in zip(example.ids, example.kinds, strict=True) if kind != IGNORE]
    end = special_id(tokenizer, "<|end|>")
    answers = [*tokenizer.encode(turns[0].answer).ids, end, *tokenizer.encode(turns[1].answer).ids, end]
    assert said == answers
    num_replied = len(tokenizer.encode(turns[0].answer).ids) + 2
    assert [kind for kind in example.kinds if kind == REPLY] == [REPLY] * num_replied


def told_dialogues(num):
    shape = full_recipe(1, 1).stages[4].shape
    return [make_past(random.Random(seed), Split.TRAIN, shape, count_tokens=len, id_=str(seed)) for seed in range(num)]


def test_slips_are_in_notes_alone_and_say_where():
    rng = random.Random(4)
    for dialogue in told_dialogues(20):
        slipped, where = with_slips(rng, dialogue, 0.5)
        for index, (before, after) in enumerate(zip(dialogue.turns, slipped.turns, strict=True)):
            assert dataclasses.replace(after, answer=before.answer) == before
            if index in where:
                assert not before.is_scored and before.answer.startswith(("Noted: ", "Changed: "))
            else:
                assert after == before


def test_a_note_with_a_slip_is_left_out_or_about_another_word_of_the_message():
    turn = Turn("My locker is 4417 and the gate is 88.", "Noted: locker 4417; gate 88.")
    seen = {with_slips(random.Random(s), Dialogue("d", "", (turn,)), 1.0)[0].turns[0].answer for s in range(300)}
    assert {"I see.", "Noted: gate 88.", "Noted: locker 4417.", turn.answer} <= seen
    notes = {note for answer in seen for note in answer.removeprefix("Noted: ").rstrip(".").split("; ")}
    assert {note.split()[0] for note in notes - {"I see"}} == {"locker", "gate", "and", "the"}
    assert {note.split()[1] for note in notes - {"I see"}} == {"4417", "88"}


def test_no_slips_are_made_where_none_are_wanted():
    for dialogue in told_dialogues(3):
        assert with_slips(random.Random(0), dialogue, 0.0) == (dialogue, frozenset())


def test_what_bears_a_slip_is_not_learned_but_read(tokenizer):
    turns = (Turn("My locker is 4417.", "Noted: is 4417."), Turn("My locker?", "On record: locker 4417.", ("4417",)))
    whole = encode_dialogue(tokenizer, Dialogue("d", "", turns))
    partly = encode_dialogue(tokenizer, Dialogue("d", "", turns), {0})
    assert partly.ids == whole.ids
    question = partly.messages[3]
    assert REPLY in whole.kinds[:question]
    assert set(partly.kinds[:question]) == {IGNORE}
    assert partly.kinds[question:] == whole.kinds[question:]


def test_any_text_is_tokenised_and_comes_back(tokenizer):
    text = "Größe 42, 你好 \U0001f600\tand\n\nso on"
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_spellings_of_a_word_are_near_each_other_and_never_the_same(tokenizer):
    rows = word_embeddings(tokenizer, 192, torch.Generator().manual_seed(1))
    assert len(rows.unique(dim=0)) == tokenizer.get_vocab_size(), "bytes that are no character of their own included"

    def row(text: str) -> torch.Tensor:
        (index,) = tokenizer.encode(text).ids
        return torch.nn.functional.normalize(rows[index], dim=0)

    words = {text.strip() for text in map(tokenizer.decode, ([index] for index in range(tokenizer.get_vocab_size())))}
    long = [word for word in words if len(word) >= 3 and word.isalpha()]
    both = [word for word in long if all(len(tokenizer.encode(text).ids) == 1 for text in (word, f" {word}"))]
    assert len(both) >= 8
    assert all(row(word) @ row(f" {word}") > 0.8 for word in both)
    assert row("The") @ row(" the") > 0.8
    assert row("Not") @ row(" not") > 0.8
    assert row(" the") @ row(" code") < 0.5
    assert row(" 4") @ row("4") < 0.5, "digits are copied, and never read as each other"


def test_a_jump_in_positions_hides_nothing_and_none_is_the_stock_forward(tokenizer):
    model = build_model(tiny_recipe(3).model, tokenizer, seed=3).eval()
    ids = torch.arange(10, 30)[None]
    plain = torch.arange(20)[None]
    with torch.no_grad():
        ours, stock = train.hidden_states(model, ids, plain), model.model(input_ids=ids).last_hidden_state
        assert torch.allclose(ours, stock, atol=1e-5)
        changed = ids.clone()
        changed[0, 2] = 99
        jumped = plain + 100 * (plain >= 10)
        one, other = (train.hidden_states(model, each, jumped) for each in (ids, changed))
    assert not torch.allclose(one[:, -1], other[:, -1], atol=1e-6)


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 24), (1, 5)])
def test_an_orthogonalized_matrix_has_singular_values_near_one_and_the_same_directions(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    update = orthogonalized(matrix)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    made = left.T @ update @ right.T  # diagonal where the directions are the same
    large = values > 0.05 * values[0]  # five steps lift these
    assert ((made.diag()[large] > 0.6) & (made.diag()[large] < 1.3)).all()
    assert (made - made.diag().diag()).abs().max() < 1e-4


def test_nothing_orthogonalized_is_nothing():
    assert not orthogonalized(torch.zeros(4, 6)).any()


def test_muon_moves_as_torchs_own_but_for_the_rounding_of_bfloat16():
    generator = torch.Generator().manual_seed(2)
    ours, theirs = (torch.nn.Parameter(torch.ones(12, 20)) for _ in range(2))
    optimizers = (
        Muon([ours], weight_decay=0.1),
        torch.optim.Muon([theirs], weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(5):
        gradient = torch.randn(12, 20, generator=generator)
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = gradient.clone()
            for group in optimizer.param_groups:
                group["lr"] = 0.1
            optimizer.step()
    moved = (theirs - 1).norm()
    assert (ours - theirs).norm() < 0.03 * moved  # bfloat16 has 8 bits, and five steps add up


def test_training_further_begins_late_and_at_a_lower_rate():
    recipe = full_recipe(1000, seed=3)
    late = further(recipe)
    assert late.stages == recipe.stages
    assert late.first_stage == len(recipe.stages) - 3
    assert 0 < late.rate < recipe.rate / 2


def test_a_trained_model_is_trained_further_with_its_own_tokenizer(tmp_path, monkeypatch):
    def run(name: str, *more: str) -> dict:
        arguments = ["train", "--tiny", "--workers", "1", "--checkpoint", str(tmp_path / name / "a.pt")]
        arguments += [
            "--out",
            str(tmp_path / name / "model"),
            "--results",
            str(tmp_path / name / "results.json"),
            *more,
        ]
        monkeypatch.setattr("sys.argv", arguments)
        train.main()
        return json.loads((tmp_path / name / "results.json").read_text())

    run("first", "--seed", "3")
    first = AutoModelForCausalLM.from_pretrained(tmp_path / "first" / "model").state_dict()
    record = run("second", "--seed", "4", "--trained", str(tmp_path / "first" / "model"))
    second = AutoModelForCausalLM.from_pretrained(tmp_path / "second" / "model").state_dict()
    tokenizers = [(tmp_path / name / "model" / "tokenizer.json").read_text() for name in ("first", "second")]
    assert tokenizers[0] == tokenizers[1]
    assert torch.equal(first["model.embed_tokens.weight"], second["model.embed_tokens.weight"])
    name = "model.layers.0.mlp.up_proj.weight"
    assert 0 < (second[name] - first[name]).norm() < 0.5 * first[name].norm(), "it went on from there"
    assert record["recipe"]["rate"] == further(tiny_recipe(4)).rate


def test_a_toy_run_is_resumed_and_its_export_is_a_stock_checkpoint(tmp_path, monkeypatch):
    arguments = [
        *("train", "--tiny", "--workers", "1", "--checkpoint", str(tmp_path / "run" / "a.pt")),
        *("--out", str(tmp_path / "model"), "--results", str(tmp_path / "results.json")),
    ]
    monkeypatch.setattr("sys.argv", arguments)
    train.main()
    first = json.loads((tmp_path / "results.json").read_text())
    assert first["tokens_seen"] >= first["recipe"]["tokens"]
    train.main()
    assert json.loads((tmp_path / "results.json").read_text())["steps"] == first["steps"], "nothing was left to do"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert model(**prompt).logits.isfinite().all()
    assert tokenizer.decode(prompt["input_ids"][0]) == "<|begin|><|user|>Hello<|end|><|assistant|>"
