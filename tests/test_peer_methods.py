"""The methods that `examples/benchmarks/peers.py` compares with do what their papers say, on a tiny BERT."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from .conftest import ROOT


sys.path.append(str(ROOT / "examples" / "benchmarks"))
import peers  # noqa: E402
from peer_methods import (  # noqa: E402
    METHODS,
    Given,
    OutOfReachError,
    code_lines,
    fewer_layers,
    fisher_masks,
    from_scratch,
    pca_slicing,
    whitened_factors,
)
from peer_methods.common import balanced, blocks, encoder_linears, factorise_table, moments_of  # noqa: E402
from peer_methods.training import BATCH, divergence, order_of  # noqa: E402


PLAIN = ("fisher_masks", "fewer_layers", "whitened_factors", "pca_slicing", "from_scratch")


@pytest.fixture(scope="module")
def given() -> Given:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=1500, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=192,
        max_position_embeddings=32, initializer_range=0.2, attn_implementation="eager",
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    with torch.no_grad():  # norms that do something
        for name, parameter in model.named_parameters():
            if "LayerNorm" in name or name.endswith("bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    batches = []
    for _ in range(4):
        mask = torch.ones(16, 12, dtype=torch.long)
        mask[::2, 8:] = 0
        batches.append(
            {
                "input_ids": torch.randint(0, 1500, (16, 12)),
                "attention_mask": mask,
                "labels": torch.randint(0, 2, (16,)),
            }
        )
    before = sum(p.numel() for p in model.parameters())
    return Given(model, None, batches, torch.ones(1500), 0.5, before)


@torch.no_grad()
def answers(model, given) -> torch.Tensor:
    return torch.cat([model(b["input_ids"], b["attention_mask"]).logits for b in given.batches])


@pytest.mark.parametrize("target", (0.3, 0.6))
@pytest.mark.parametrize("name", PLAIN)
def test_a_method_meets_the_size_and_leaves_the_model_alone(given, name, target):
    asked, state = dataclasses.replace(given, target=target), copy.deepcopy(given.model.state_dict())
    small = METHODS[name].make(asked)
    parameters = sum(p.numel() for p in small.parameters())
    assert asked.limit - 0.02 * given.before <= parameters <= asked.limit  # one feature is 1 % of so small a model
    assert answers(small, given).isfinite().all()
    assert all(torch.equal(state[key], value) for key, value in given.model.state_dict().items())


def test_nothing_removed_changes_nothing(given):
    dense = answers(given.model, given)
    whole = pca_slicing.sliced(given.copied(), given.batches, 64)
    torch.testing.assert_close(answers(whole, given), dense, atol=2e-4, rtol=2e-4)
    sized = sum(p.numel() for p in whole.parameters())
    assert sized == pca_slicing.size(given.model, 64)
    table = given.copied()
    factorise_table(table, 64, given.counts)
    torch.testing.assert_close(answers(table, given), dense, atol=2e-4, rtol=2e-4)
    layers = given.copied()
    fewer_layers.keep_layers(layers, 1)
    assert torch.equal(answers(layers, given), dense)
    heads = given.copied()
    kept = fisher_masks.Kept([torch.arange(4)] * 3, [torch.arange(192)] * 3)
    fisher_masks.remove(heads, kept)
    fisher_masks.tune_masks(given.model, heads, given.batches, kept)
    torch.testing.assert_close(answers(heads, given), dense, atol=2e-4, rtol=2e-4)


def test_whitened_factors_lose_the_singular_values_that_go(given):
    layer = blocks(given.model)[1].intermediate.dense
    moments = moments_of(given.model, {"it": layer}, given.batches)["it"]
    root = torch.linalg.cholesky(moments)
    values = torch.linalg.svdvals(layer.weight.detach().double() @ root)
    thin = whitened_factors.whitened(layer, moments, 20)
    change = (thin.up.weight @ thin.down.weight - layer.weight).detach().double()
    lost = float(torch.trace(change @ moments @ change.T))
    assert lost == pytest.approx(float(values[20:].square().sum()), rel=1e-3)


def test_moments_leave_padding_out(given):
    layers = encoder_linears(given.model)
    query, pooled = layers["encoder.layer.0.attention.self.query"], layers["pooler.dense"]
    found = moments_of(given.model, {"ones": query, "pooled": pooled}, given.batches, lambda layer, x: x * 0 + 1)
    assert float(found["ones"][0, 0]) == sum(int(b["attention_mask"].sum()) for b in given.batches)
    assert float(found["pooled"][0, 0]) == sum(len(b["labels"]) for b in given.batches)


def test_a_table_keeps_what_is_frequent(given):
    counts, model = torch.zeros(1500), given.copied()
    counts[:8] = 1e6
    old = model.base_model.embeddings.word_embeddings.weight.detach().clone()
    factorise_table(model, 8, counts)
    new = model.base_model.embeddings.word_embeddings(torch.arange(1500)).detach()
    torch.testing.assert_close(new[:8], old[:8], atol=1e-2, rtol=1e-2)
    assert float((new[8:] - old[8:]).norm() / old[8:].norm()) > 0.5


def test_balanced_factors_keep_their_product():
    up, down = torch.randn(6, 3, dtype=torch.float64) * 100, torch.randn(3, 5, dtype=torch.float64)
    left, right = balanced(up, down)
    torch.testing.assert_close(left @ right, up @ down)
    torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1))


def test_the_information_of_a_mask_is_that_of_finite_differences(given):
    found = fisher_masks.fisher(given.model, given.batches[:1])
    model, batch, step = given.copied().double(), given.batches[0], 1e-5
    weight, losses = blocks(model)[1].attention.output.dense.weight, []
    kept = weight.detach().clone()
    for sign in (1, -1):
        with torch.no_grad():
            weight.copy_(kept)
            weight[:, 16:32] *= 1 + sign * step  # the second head's
            logits = model(batch["input_ids"], batch["attention_mask"]).logits
        losses.append(torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none"))
    slopes = (losses[0] - losses[1]) / (2 * step)
    assert float(found["heads"][1][1, 1]) == pytest.approx(float(slopes.square().sum()), rel=1e-3)


def test_what_has_no_effect_goes_first(given):
    model = given.copied()
    with torch.no_grad():
        blocks(model)[2].attention.output.dense.weight[:, :16] = 0
        blocks(model)[0].output.dense.weight[:, [3, 5]] = 0
    information = fisher_masks.fisher(model, given.batches)
    whole = 12 * 16 * (4 * 64 + 3) + 576 * 129
    kept = fisher_masks.choose(model, information, whole - 16 * 259 - 2 * 129)
    assert kept.heads[2].tolist() == [1, 2, 3] and [len(of) for of in kept.heads] == [4, 4, 3]
    assert not {3, 5} & set(kept.neurons[0].tolist()) and len(kept.neurons[0]) == 190
    before = answers(model, given)
    fisher_masks.remove(model, kept)
    torch.testing.assert_close(answers(model, given), before, atol=1e-4, rtol=1e-4)


def test_rearranging_lowers_the_cost_of_a_mask():
    half = torch.randn(40, 12, dtype=torch.float64)
    matrix = half @ half.T  # correlated: the diagonal alone misleads
    kept = matrix.diagonal().argsort(descending=True)[:20]

    def cost(kept: torch.Tensor) -> float:
        mask = torch.ones(40, dtype=torch.float64)
        mask[kept] = 0
        return float(mask @ matrix @ mask)

    better = fisher_masks._rearranged(matrix, kept)
    assert len(better.unique()) == 20 and cost(better) < 0.9 * cost(kept)


def test_tuned_masks_undo_a_scale(given):
    model, kept = given.copied(), fisher_masks.Kept([torch.arange(4)] * 3, [torch.arange(192)] * 3)
    with torch.no_grad():
        blocks(model)[1].attention.output.dense.weight[:, 16:32] *= 2
    fisher_masks.tune_masks(given.model, model, given.batches, kept)
    torch.testing.assert_close(answers(model, given), answers(given.model, given), atol=1e-3, rtol=1e-3)


def test_a_size_out_of_reach_is_refused(given):
    for name in PLAIN:
        with pytest.raises(OutOfReachError):
            METHODS[name].make(dataclasses.replace(given, target=0.9999))


def test_scratch_depends_on_the_seed_alone(given):
    first, again, other = (from_scratch.build(dataclasses.replace(given, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(answers(first, given), answers(again, given))
    assert not torch.equal(answers(first, given), answers(other, given))


@pytest.mark.parametrize("name", ("taylor", "group_norm"))
def test_torch_pruning_meets_the_size(given, name):
    pytest.importorskip("torch_pruning", reason="pip install -e '.[peers]'")
    small = METHODS[name].make(given)
    parameters = sum(p.numel() for p in small.parameters())
    assert given.limit - 0.03 * given.before <= parameters <= given.limit
    assert answers(small, given).isfinite().all()


def test_every_method_trains_on_the_same_batches():
    lengths = torch.randint(3, 40, (200,)).tolist()
    batches = order_of(lengths, 9, seed=1)
    assert batches == order_of(lengths, 9, seed=1) != order_of(lengths, 9, seed=2)
    assert len(batches) == 9 and all(len(batch) == BATCH for batch in batches)
    assert len({row for batch in batches[:6] for row in batch}) == 6 * BATCH  # no row twice in a pass
    assert order_of([4, 5], 2, seed=0) == [[0, 1], [0, 1]]


def test_divergence_is_that_of_the_definition():
    p, q = torch.tensor([[0.9, 0.1]]), torch.tensor([[0.5, 0.5]])
    expected = 0.9 * torch.log(torch.tensor(1.8)) + 0.1 * torch.log(torch.tensor(0.2))
    assert float(divergence(p.log(), q.log())) == pytest.approx(float(expected), rel=1e-5)


def test_code_lines_are_those_with_code():
    assert (
        code_lines(
            '"""Words\nof a module."""\n\nimport x  # why\n\n# a comment\ndef f():\n    """Words."""\n    return x\n'
        )
        == 3
    )


def row(rate: float, seed: int, lost: float) -> dict:
    sizes = {"parameters": 37, "before": 100, "agreement": 95.0, "divergence": 0.1}
    return {"method": "ours", "steps": 8, "rate": rate, "seed": seed, "lost": lost} | sizes


def test_a_row_is_shown_at_the_best_of_its_rates():
    rows = [row(1e-4, 0, 0.5), row(1e-4, 1, 2.5), row(3e-4, 0, 1.0), row(3e-4, 1, 1.2)]
    lost, cells = peers.line_of("ours", rows, 8)
    assert lost == pytest.approx(1.1)
    assert cells[:4] == ["ours, free widths", "63.0 %", "3e-04 of 2, 2", "1.10 (1.00 .. 1.20)"]
    assert peers.line_of("ours", [], 8) is None
    assert peers.line_of("ours", [{"rate": 0.0, "refused": "too small"}], 8)[1][1] == "out of reach: too small"


def test_what_cannot_be_trained_or_sized_is_measured_once():
    arguments = peers.Arguments(
        "run", methods=["ours", "int8", "taylor_fine_tuned"], steps=8, rates=[1e-4, 3e-4], latency=False
    )
    (key, ours), (_, int8), (_, tuned) = peers.keys(arguments)
    assert [one["steps"] for one in ours] == [0, 8, 8] and key["target"] == 0.5
    assert [one["steps"] for one in int8] == [0] and int8[0]["target"] is None
    assert [one["steps"] for one in tuned] == [8, 8]  # the cut is that of another row


@pytest.mark.slow
def test_the_papers_own_size_is_skipped_with_a_reason_where_there_is_no_gpu(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: it would be measured")
    script = ROOT / "examples" / "benchmarks" / "paper_parity.py"
    options = [sys.executable, script, "run", "--tasks", "bert_base", "resnet50", "-o", tmp_path]
    done = subprocess.run(options, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("no GPU here; this size is not measured") == 2
