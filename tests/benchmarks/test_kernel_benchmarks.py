"""The kernels' benchmarks measure what they say: patterns have their density, dense is computed rightly, nothing is timed on red tests."""

import json

import pytest
import torch

from benchmarks.kernels import decode, dense, gate, prefill, results, run, scores
from benchmarks.kernels.chunks import Chunk
from benchmarks.kernels.patterns import (
    DENSITIES,
    HeadPattern,
    Pattern,
    Slash,
    computed_cells,
    computed_share,
    make_pattern,
    plant,
)
from benchmarks.kernels.run import Case, Run, parse_arguments
from benchmarks.kernels.segments import TINY, HeadShape, scattered
from benchmarks.kernels.timing import Timing, num_copies, time_in_graph, time_in_stream
from loopserve.sparsity.grid import TileGrid

CPU = torch.device("cpu")
FLAGS = ("--tiny", "--device", "cpu", "--force")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def one_thread(same_threads):
    torch.set_num_threads(1)


def read_mask(tiles, verticals, grid, dense_last_rows):
    """Cell by cell, as the contract of `sparse_prefill` has it: bool [H, r, N]."""
    read = torch.zeros((len(tiles), grid.num_rows, grid.num_columns), dtype=torch.bool)
    for row in range(grid.num_rows):
        for column in range(grid.start + row + 1):
            diagonal = row // grid.tile_tokens - (column - grid.start) // grid.tile_tokens
            read[:, row, column] = tiles[:, diagonal] | verticals[:, column] | (row >= grid.num_rows - dense_last_rows)
    return read


def pattern(density=0.2, *, grid=None, num_heads=8):
    grid = grid or TileGrid(16_384, 512, 64)
    return make_pattern(seed=7, density=density, grid=grid, num_heads=num_heads, dense_last_rows=16)


def a_case(**changes):
    timing = Timing(2e-3, 1e-3, 3e-3, 20, 2)
    return Case(
        **{"op": "op", "shape": "shape", "settings": {}, "timing": timing, "graph": None, "num_bytes": 8e6, "flop": 0.0}
        | changes
    )


@pytest.mark.parametrize("density", [0.05, 0.1, 0.2, 0.5])
def test_a_pattern_computes_the_share_that_was_asked_for(density):
    found = pattern(density)
    share = computed_share(*found.masks(CPU), found.grid, dense_last_rows=16)
    assert share == pytest.approx(density, rel=0.02)


def test_heads_differ_widely_in_what_they_read():
    found = pattern()
    cells = computed_cells(*found.masks(CPU), found.grid, dense_last_rows=16)
    assert cells.max() > 3 * cells.min()
    assert len({len(head.slashes) for head in found.heads}) > 1
    assert all(head.slashes[0].first == 0 for head in found.heads)


def test_the_published_patterns_are_the_same_everywhere_and_for_ever():
    grid = TileGrid(16_384, 512, 64)
    assert {density: prefill.pattern_for(grid, 32, density).fingerprint() for density in DENSITIES} == {
        0.05: "18f9b7c2a1be76ed",
        0.1: "3be192b10fa0f081",
        0.2: "0cceec74e526bdc1",
        0.5: "7f72e56b4538c478",
    }


@pytest.mark.parametrize(("start", "num_rows", "tile_tokens"), [(37, 21, 8), (40, 16, 8), (11, 5, 64)])
def test_cells_are_counted_as_the_contract_reads_them(start, num_rows, tile_tokens):
    grid = TileGrid(start, num_rows, tile_tokens)
    tiles = torch.rand(3, grid.num_diagonals, generator=torch.Generator().manual_seed(0)) < 0.4
    verticals = torch.rand(3, grid.num_columns, generator=torch.Generator().manual_seed(1)) < 0.2
    verticals[:, start:] = False
    for dense_last_rows in (0, 4):
        expected = read_mask(tiles, verticals, grid, dense_last_rows).sum(dim=(1, 2))
        assert torch.equal(computed_cells(tiles, verticals, grid, dense_last_rows=dense_last_rows), expected)


def test_masks_hold_every_distance_of_every_slash():
    grid = TileGrid(40, 16, 8)
    head = HeadPattern(2, torch.tensor([5, 9]), (Slash(0, 3), Slash(13, 5), Slash(24, 1)))
    tiles, verticals = Pattern(0, 0.1, grid, (head,)).masks(CPU)
    assert tiles[0].nonzero()[:, 0].tolist() == [0, 1, 2, 3]  # 24 is 3 whole tiles: one diagonal; 13 to 17 lie on three
    assert verticals[0].nonzero()[:, 0].tolist() == [0, 1, 5, 9]
    read = read_mask(tiles, verticals, grid, 0)[0]
    for row in range(grid.num_rows):
        for distance in (0, 1, 2, 13, 14, 15, 16, 17, 24):
            assert read[row, grid.start + row - distance]


def test_planted_queries_and_keys_attend_in_the_patterns_shape():
    grid = TileGrid(4096, 64, 64)
    found = make_pattern(seed=7, density=0.15, grid=grid, num_heads=8, dense_last_rows=0)
    tiles, verticals = found.masks(CPU)
    planted = plant(found, num_kv_heads=2, head_dim=128, dtype=torch.bfloat16, device=CPU)
    held = []
    for head in range(8):
        logits = planted.query[:, head].float() @ planted.key[:, head // 4].float().T * 128**-0.5
        future = torch.arange(grid.num_columns) > grid.start + torch.arange(grid.num_rows)[:, None]
        weights = logits.masked_fill(future, -torch.inf).softmax(dim=1)
        key_tile = grid.key_tile(torch.arange(grid.num_columns))
        diagonal = grid.num_past_tiles - key_tile  # of the only query tile
        read = (tiles[head, diagonal.clamp(min=0)] & (diagonal >= 0)) | verticals[head]
        held.append(float((weights * read).sum(dim=1).mean()))
    assert sum(held) / len(held) > 4 * 0.15
    assert sum(share > 0.9 for share in held) >= 4


def test_a_backend_that_aligns_its_mask_otherwise_is_left_aside(monkeypatch):
    def upper_left(query, key, value):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    right = dense._backends(torch.empty(1, 4, 8, 16), torch.empty(1, 2, 40, 16), CPU)
    monkeypatch.setattr(dense, "_backends", lambda *_: [("upper left", upper_left, False), *right])
    shapes = [(1, 4, 8, 16), (1, 2, 40, 16), (1, 2, 40, 16)]
    inputs = [tuple(torch.randn(shape) for shape in shapes) for _ in range(2)]
    found = dense.fastest_dense(inputs, device=CPU, in_graph=False)
    assert found.name == "sdpa on a CPU"
    assert "something else" in found.tried["upper left"]


def test_no_dense_backend_is_an_error(monkeypatch):
    def broken(query, key, value):
        raise RuntimeError("not for these shapes")

    monkeypatch.setattr(dense, "_backends", lambda *_: [("broken", broken, False)])
    inputs = [(torch.randn(1, 4, 2, 16), torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 16))]
    with pytest.raises(RuntimeError, match="not for these shapes"):
        dense.fastest_dense(inputs, device=CPU, in_graph=False)


def test_expected_rows_are_causal_attention():
    query, key, value = torch.randn(6, 4, 8), torch.randn(20, 2, 8), torch.randn(20, 2, 8)
    mask = torch.ones(6, 20, dtype=torch.bool).tril(14)
    by_head = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    whole = torch.nn.functional.scaled_dot_product_attention(*by_head, attn_mask=mask, enable_gqa=True)[0].transpose(
        0, 1
    )
    torch.testing.assert_close(dense.expected_rows(query, key, value, [0, 5], read=None), whole[[0, 5]])


def test_copies_outgrow_the_cache_twice():
    assert num_copies(1 << 18, CPU) * (1 << 18) > 2 << 20
    assert num_copies(1 << 30, CPU) == 1
    assert num_copies(1, CPU, most=10) == 10


def test_calls_take_the_copies_in_turn_and_a_cpu_has_no_graphs():
    taken = []
    timing = time_in_stream(taken.append, device=CPU, copies=2)
    assert set(taken) == {0, 1}
    assert timing.low_s <= timing.median_s <= timing.high_s
    assert time_in_graph(taken.append, device=CPU, copies=2) is None


def test_sequences_have_blocks_of_their_own():
    found = scattered(3, 40, TINY, dtype=torch.float32, device=CPU, seed=0)
    assert found.slots.unique().numel() == 3 * 40
    assert found.slots.max() < len(found.keys)
    assert (found.slots[:, 1:16] - found.slots[:, :15] == 1).all()


def test_a_case_is_held_against_the_ceiling_the_launch_and_dense():
    ceilings = run.Ceilings(1e12, 1e14, 5e-6, 2e-6)
    record = a_case(dense_s=3e-3, computed_share=0.5, flop=4e11, num_bytes=1e9).record(ceilings)
    assert record["floor_s"] == pytest.approx(4e-3)
    assert record["ceiling_share"] == pytest.approx(2.0)
    assert record["speedup"] == pytest.approx(1.5)
    assert record["efficiency"] == pytest.approx(0.75)
    assert record["over_launch_s"] is None
    in_graph = a_case(graph=Timing(1e-5, 1e-5, 1e-5, 20, 2)).record(ceilings)
    assert in_graph["time_s"] == 1e-5
    assert in_graph["over_launch_s"] == pytest.approx(8e-6)


def test_a_run_lists_what_it_lost_skipped_and_failed_and_writes_after_every_case(tmp_path):
    file = tmp_path / "out.json"
    found = Run("some", parse_arguments(None, [*FLAGS, "--out", str(file)]), proof=None)
    assert json.loads(file.read_text())["cases"] == []
    found.measure("slow", lambda: a_case(dense_s=1e-3))
    assert len(json.loads(file.read_text())["cases"]) == 1

    def broken():
        raise ValueError("no such shape")

    assert found.measure("broken", broken) is None
    found.args.seconds_max = 0.0
    assert found.measure("late", a_case) is None
    assert found.finish() == 1
    record = json.loads(file.read_text())
    assert record["losing"] == ["op shape: 0.50x dense"]
    assert record["skipped"] == ["late"]
    assert record["failed"] == {"broken": "ValueError: no such shape"}
    assert record["to_publish"] is False


def test_real_sizes_are_refused_on_a_cpu():
    with pytest.raises(SystemExit, match="only --tiny"):
        run.begin("some", parse_arguments(None, ["--device", "cpu"]))


def test_red_tests_are_the_end_of_a_benchmark(tmp_path):
    red = tmp_path / "test_red.py"
    red.write_text("def test_red():\n    assert False\n")
    with pytest.raises(SystemExit, match="not green"):
        run.begin("some", parse_arguments(None, ["--tiny", "--device", "cpu", "--tests", str(red)]))


def test_green_tests_are_proof_for_these_sources_alone(tmp_path, monkeypatch):
    green, file = tmp_path / "test_green.py", tmp_path / "proof.json"
    green.write_text("def test_green():\n    pass\n")
    proof = gate.require_green(CPU, proof_file=None, tests=[str(green)], commit="abc")
    assert "1 passed" in proof.summary and not proof.is_whole
    proof.write(file)
    assert gate.require_green(CPU, proof_file=file, tests=(), commit="") == proof
    monkeypatch.setattr(gate, "fingerprint", lambda: "others")
    with pytest.raises(SystemExit, match="other sources"):
        gate.require_green(CPU, proof_file=file, tests=(), commit="")


def test_without_pytest_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(gate.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install pytest"):
        gate.require_green(CPU, proof_file=None, tests=(), commit="")


def test_a_program_past_its_time_is_ended_with_what_it_said():
    outcome = gate.run_program(["sh", "-c", "echo begun; sleep 60"], seconds_max=0.5)
    assert outcome.code is None
    assert outcome.tail == "begun\n"
    assert outcome.seconds < 10


def test_a_wrong_output_is_not_timed():
    chunk = Chunk(64, 128, 1, HeadShape(4, 2, 32), CPU)
    sequences, query = chunk.sequences(0), chunk.queries(0)[0]
    tiles = torch.ones((4, chunk.grid.num_diagonals), dtype=torch.bool)
    verticals = torch.zeros((4, chunk.grid.num_columns), dtype=torch.bool)
    with pytest.raises(RuntimeError, match="off by"):
        prefill.check_lines(torch.zeros_like(query), query, sequences, tiles, verticals, chunk.grid)


def test_prefill_measures_lines_given_lines_selected_and_the_shipped_model(tmp_path):
    file = tmp_path / "prefill.json"
    assert prefill.main([*FLAGS, "--out", str(file)]) == 0
    record = json.loads(file.read_text())
    assert record["failed"] == {} and record["skipped"] == []
    kinds = [case["settings"]["kind"] for case in record["cases"]]
    chunks = 1 * 2 * 2  # new, cached, batch
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "shipped model": 1,
        "dense": chunks,
        "lines given": 2 * chunks,
        "lines selected": 2 * chunks,
    }
    for case in record["cases"]:
        if case["settings"]["kind"] != "dense":
            assert 0.0 < case["computed_share"] <= 1.0
            assert case["efficiency"] == pytest.approx(case["dense_s"] * case["computed_share"] / case["time_s"])
    shipped = record["cases"][0]["settings"]
    assert (shipped["heads"], shipped["kv_heads"], shipped["head_dim"], shipped["layers"]) == (4, 2, 64, 4)


@pytest.mark.parametrize("benchmark", [decode, scores])
def test_decode_and_scores_measure_every_operation(benchmark, tmp_path):
    file = tmp_path / "out.json"
    assert benchmark.main([*FLAGS, "--out", str(file)]) == 0
    record = json.loads(file.read_text())
    assert record["failed"] == {} and record["skipped"] == []
    operations = {case["op"] for case in record["cases"]}
    scored = {"line_scores", "token_scores", "sketch_scores", "sketch_log_sum", "store_kv", "store_sketch"}
    scored |= {"coverage_threshold"}
    assert operations == ({"paged_decode"} if benchmark is decode else scored)
    (table,) = results.tables("some", record)
    assert len(table.rows) == len(record["cases"])


def test_chosen_slots_ascend_within_their_row_and_are_distinct():
    slots = torch.arange(40).view(2, 20)
    found = decode.chosen_slots(slots, 2, 7, seed=0)
    assert found.shape == (2, 2, 7)
    assert (found.diff(dim=2) > 0).all()
    assert (found // 20 == torch.arange(2)[:, None, None]).all()


def test_tables_and_losses_are_found_in_any_record():
    record = {"rows": [{"name": "a", "speedup": 0.5, "more": {"ms": 1.25}}, {"name": "b", "ms": 2.0, "ratio": 2.0}]}
    (table,) = results.tables("other", record)
    assert table.header == ("name", "speedup", "ms", "ratio")
    assert table.rows == (("a", "0.5", "", ""), ("b", "", "2", "2"))
    assert results.losing("other", record) == ["other: name a: 0.50x dense"]
    assert results.left_out("other", {"skipped": ["x"], "failed": {"y": "why"}}) == [
        "other, skipped for lack of time: x",
        "other, FAILED: y: why",
    ]
