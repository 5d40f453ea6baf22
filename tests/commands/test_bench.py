"""The bench counts what can be counted by hand, and says so where it cannot measure."""

from __future__ import annotations

import json
import shutil
import sys
import types

import pytest

from optimum_rmtkd.commands import measuring
from optimum_rmtkd.commands.bench import BenchOptions, _shapes, compare
from optimum_rmtkd.commands.output import weight_bytes
from optimum_rmtkd.errors import RMTKDError

from .conftest import save_bert


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """The tiny BERT with half the feed-forward neurons: a model whose costs are known."""
    return save_bert(tmp_path_factory.mktemp("half"), intermediate_size=32)


@pytest.fixture(autouse=True)
def _no_processes(monkeypatch, request):
    """Two more processes a shape are slow; one test runs them."""
    if "memory" not in request.node.name:
        monkeypatch.setattr("optimum_rmtkd.commands.bench.peak_memory", lambda *args: 1000)


def values_of(found) -> dict:
    return {value["what"]: value for value in found["values"]}


def test_sizes_and_flops_are_exact(bert, half):
    found = values_of(compare(str(bert), str(half), BenchOptions(batch_sizes=[1, 3], lengths=[8], repeats=2)))
    lost = 2 * (32 * 32 * 2 + 32)  # two layers: up and down lose 32 columns of 32, and up its bias
    assert found["parameters"]["before"] - found["parameters"]["after"] == lost
    assert found["bytes on disk"]["before"] == weight_bytes(bert)
    layers = (
        2 * (4 * 32 * 32 + 2 * 32 * 64) * 8 + 2 * 2 * 8 * 8 * 32
    )  # per sample: linear layers; scores and their sums
    heads = 32 * 32 + 32 * 2  # pooler and classifier, on one position
    assert found["FLOPs, batch 1, length 8"]["before"] == 2 * (layers + heads)
    assert found["FLOPs, batch 3, length 8"]["before"] == 3 * 2 * (layers + heads)
    assert (
        found["FLOPs, batch 1, length 8"]["before"] - found["FLOPs, batch 1, length 8"]["after"]
        == 2 * 2 * 2 * 32 * 32 * 8
    )


def test_ratios_have_a_spread_and_units_fit(bert, half):
    found = compare(str(bert), str(half), BenchOptions(batch_sizes=[1, 4], lengths=[8], repeats=4))
    by_name = values_of(found)
    for name in ("latency, batch 1, length 8", "throughput, batch 4, length 8"):
        assert 0 < by_name[name]["low"] <= by_name[name]["ratio"] <= by_name[name]["high"]
    assert by_name["throughput, batch 4, length 8"]["unit"] == "/s"
    rows = {row[0]: row for row in found["rows"]}
    assert rows["latency, batch 1, length 8"][1].endswith(" ms")
    for part in ("cpu", "1 thread,", "float32", "torch"):
        assert part in found["setting"]


def test_energy_without_a_counter_is_not_invented(bert, half, monkeypatch, tmp_path):
    monkeypatch.setattr(measuring, "RAPL", tmp_path)
    options = BenchOptions(batch_sizes=[1], lengths=[4], repeats=1, energy=True)
    rows = {row[0]: row for row in compare(str(bert), str(half), options)["rows"]}
    assert rows["energy, batch 1, length 4"][1:] == ("not measurable here", "not measurable here", "-")


def test_energy_meter_gives_joules_of_one_pass(monkeypatch):
    """A counter of ten watts, in place of codecarbon's."""
    codecarbon = pytest.importorskip("codecarbon")
    clock = iter(range(0, 1000, 3))

    class Tracker:
        def __init__(self, **options):
            pass

        def start(self):
            pass

        def stop(self):
            self.final_emissions_data = type("Data", (), {"cpu_energy": 100 / 3.6e6, "energy_consumed": 1.0})

    monkeypatch.setattr(codecarbon, "OfflineEmissionsTracker", Tracker)
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: next(clock))
    runs = []
    assert measuring._rapl_meter()(lambda: runs.append(1)) == pytest.approx(100 / len(runs))
    assert len(runs) == 4  # 3 seconds each, ten seconds asked for


def test_energy_of_a_gpu_is_that_of_the_right_one(monkeypatch):
    """Counters of two GPUs in millijoules, in place of NVML's; torch sees the second one as its first."""
    import torch

    counters = {"GPU-first": iter([0, 0, 0]), "GPU-second": iter([5_000, 10_000, 30_000])}
    nvml = types.SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda name: name,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(counters[handle]),
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: types.SimpleNamespace(uuid="second"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    clock = iter(range(0, 1000, 3))
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: next(clock))
    assert measuring.energy_meter("cuda")(lambda: None) == pytest.approx(20 / 4)  # 20 J in 4 runs of 3 seconds


def test_a_gpu_without_a_counter_is_not_measurable(monkeypatch):
    def none(name):
        raise RuntimeError("Not Supported")

    import torch

    nvml = types.SimpleNamespace(NVMLError=RuntimeError, nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=none)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: types.SimpleNamespace(uuid="x"))
    assert measuring.energy_meter("cuda") is None


def test_command_writes_json_and_the_card(cli, bert, table, validation_table, tmp_path):
    data = ["--train-file", table, "--validation-file", validation_table]
    size = ["--target-reduction", 0.3, "--round-to", 4, "--min-width", 4, "--no-train"]
    code, out, err = cli("compress", "--model", bert, *data, *size, "-o", tmp_path / "small")
    assert code == 0, err
    card = tmp_path / "small" / "README.md"
    assert "Latency was not measured" in card.read_text()
    code, out, err = cli(
        "bench", tmp_path / "small", "--against", bert, "--batch-sizes", 1, "--lengths", 8, "--repeats", 2
    )
    assert code == 0, err
    found = json.loads((tmp_path / "small" / "rmtkd_bench.json").read_text())
    assert "latency, batch 1, length 8" in out and found["options"]["lengths"] == [8]
    text = card.read_text()
    assert "Latency was not measured" not in text and "| latency, batch 1, length 8 |" in text
    assert text.count("\n| parameters |") == 1


def test_a_card_changed_by_hand_is_left_alone(cli, bert, table, validation_table, tmp_path):
    data = ["--train-file", table, "--validation-file", validation_table, "--no-train"]
    size = ["--target-reduction", 0.3, "--round-to", 4, "--min-width", 4]
    assert cli("compress", "--model", bert, *data, *size, "-o", tmp_path / "small")[0] == 0
    card = tmp_path / "small" / "README.md"
    card.write_text(card.read_text() + "\nMine.\n")
    shape = ["--batch-sizes", 1, "--lengths", 4, "--repeats", 1]
    code, out, err = cli("bench", tmp_path / "small", "--against", bert, *shape)
    assert code == 0, err
    assert "not into" in out and card.read_text().endswith("\nMine.\n") and "latency, batch 1" not in card.read_text()
    assert (tmp_path / "small" / "rmtkd_bench.json").is_file()


def test_a_dense_folder_with_a_card_is_benched_all_the_same(cli, bert, half, tmp_path):
    shutil.copytree(half, tmp_path / "half")
    (tmp_path / "half" / "README.md").write_text("# mine")
    shape = ["--batch-sizes", 1, "--lengths", 4, "--repeats", 1]
    code, _, err = cli("bench", tmp_path / "half", "--against", bert, *shape)
    assert code == 0, err
    assert (tmp_path / "half" / "README.md").read_text() == "# mine"


def test_memory_that_the_system_does_not_tell(bert, half, monkeypatch):
    monkeypatch.setattr("optimum_rmtkd.commands.bench.peak_memory", lambda *args: None)
    rows = compare(str(bert), str(half), BenchOptions(batch_sizes=[1], lengths=[4], repeats=1))["rows"]
    assert {row[0]: row[1] for row in rows}["peak memory, batch 1, length 4"] == "not measurable here"


def test_a_place_that_cannot_be_written_is_told_before_anything_is_measured(cli, bert, monkeypatch, tmp_path):
    monkeypatch.setattr("optimum_rmtkd.commands.bench.compare", lambda *args: pytest.fail("measured"))
    for place, message in ((tmp_path, "it is a folder"), (tmp_path / "missing" / "x.json", "does not exist")):
        code, _, err = cli("bench", bert, "--against", bert, "--json", place)
        assert code == 2 and message in err


def test_a_model_that_is_not_the_base(cli, bert, half, table, validation_table, tmp_path):
    other = save_bert(tmp_path / "other", vocabulary=40)
    shape = ["--batch-sizes", 1, "--lengths", 4, "--repeats", 1]
    code, _, err = cli("bench", half, "--against", other, *shape)
    assert code == 2 and f"vocab_size is 40 in '{other}'" in err
    data = ["--train-file", table, "--validation-file", validation_table, "--no-train"]
    size = ["--target-reduction", 0.3, "--round-to", 4, "--min-width", 4]
    assert cli("compress", "--model", bert, *data, *size, "-o", tmp_path / "small")[0] == 0
    said = [cli("bench", tmp_path / "small", "--against", base, *shape)[1] for base in (bert, half)]
    assert "not the uncut one" not in said[0] and "not the uncut one" in said[1]


@pytest.mark.slow
def test_memory_of_a_process_of_its_own(tmp_path):
    """What counts is what the model needs, not the libraries around it."""
    sizes = {
        width: measuring.peak_memory(
            str(save_bert(tmp_path / str(width), intermediate_size=width)), 1, 4, "float32", "cpu"
        )
        for width in (20_000, 200_000)
    }
    grown = 2 * 180_000 * (2 * 32 + 1) * 4
    assert 0.9 * grown < sizes[200_000] - sizes[20_000] < 2.5 * grown
    assert sizes[20_000] < 10 * grown / 9


@pytest.mark.parametrize(
    "options, message",
    [
        (["--lengths", 99], "at most 32 tokens"),
        (["--repeats", 0], "expected a whole number of at least 1"),
        (["--device", "cuda"], "no GPU"),
    ],
)
def test_wrong_options(cli, bert, options, message):
    code, _, err = cli("bench", bert, "--against", bert, *options)
    assert code == 2 and message in err


def test_the_longest_text_of_roberta_is_shorter_than_its_table():
    from transformers import RobertaConfig, RobertaForSequenceClassification

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    config = RobertaConfig(vocab_size=40, max_position_embeddings=34, pad_token_id=1, **sizes)
    model = RobertaForSequenceClassification(config)
    assert _shapes(model, BenchOptions(batch_sizes=[1])) == [(1, 32)]
    with pytest.raises(RMTKDError, match="at most 32 tokens"):
        _shapes(model, BenchOptions(lengths=[33]))
