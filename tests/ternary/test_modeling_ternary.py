"""Ternary networks as models: every way of saving and loading, damage, training, export."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, Trainer, TrainingArguments

from optimum_rmtkd import SpecMismatchError, TernaryConfig, compress_features, pack_model
from optimum_rmtkd.errors import DiskFullError
from optimum_rmtkd.layers_rmtkd import CentredActivation, StepActivation
from optimum_rmtkd.ternary.configuration_ternary import TernaryMLPConfig
from optimum_rmtkd.ternary.modeling_ternary import TernaryMLPForClassification, TernaryMLPForRegression
from optimum_rmtkd.ternary.packing import convert

from ..surgery import zoo


HIDDEN = (64, 48)


def data(n: int = 300, p: int = 30, classes: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, classes, (n,), generator=generator)
    centres = torch.randn(classes, p, generator=torch.Generator().manual_seed(9))
    return centres[y] + torch.randn(n, p, generator=generator) + 5, y


@pytest.fixture(scope="module")
def model():
    x, y = data()
    names = ["low", "middle", "high"]
    return compress_features(x, y, TernaryConfig(hidden=HIDDEN, mode="min_shift"), names)[0]


@pytest.fixture
def saved(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def logits(model, x=None) -> torch.Tensor:
    with torch.no_grad():
        return model(data(seed=1)[0] if x is None else x).logits


def run_python(code: str, folder, **env) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, env={**os.environ, **env}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_reload(model, saved):
    again = AutoModel.from_pretrained(saved)
    assert type(again) is TernaryMLPForClassification
    assert zoo.close(logits(again), logits(model))
    assert again.config.label2id == {"low": 0, "middle": 1, "high": 2}
    assert again.config.recipe["mode"] == "min_shift" and again.config.report["layers"][0]["residual"] < 1e-6
    assert AutoConfig.from_pretrained(saved).network == model.config.network


ASK = (
    "from transformers import AutoModel; import torch;"
    "m = AutoModel.from_pretrained('model'{}); x = torch.linspace(-1, 1, 60).reshape(2, 30);"
    "print(m(x).logits.flatten().tolist())"
)


def assert_answers(printed: str, model) -> None:
    out = logits(model, torch.linspace(-1, 1, 60).reshape(2, 30))
    assert json.loads(printed) == pytest.approx(out.flatten().tolist(), rel=1e-5, abs=1e-5)


def test_fresh_process(model, saved):
    assert_answers(run_python("import optimum_rmtkd;" + ASK.format(""), saved.parent), model)


def test_fresh_process_without_this_package(model, saved):
    """Remote code, saved again by it, and read again."""
    hide = "import sys; sys.modules['optimum_rmtkd'] = None;"
    remote = ", trust_remote_code=True"
    modules = str(saved.parent / "modules")
    code = hide + ASK.format(remote) + "; m.save_pretrained('second/model')"
    assert_answers(run_python(code, saved.parent, HF_MODULES_CACHE=modules), model)
    again = run_python(hide + ASK.format(remote), saved.parent / "second", HF_MODULES_CACHE=modules + "2")
    assert_answers(again, model)
    # and by the package once more
    assert zoo.close(logits(AutoModel.from_pretrained(saved.parent / "second" / "model")), logits(model))


def test_saved_files_import_no_package(saved):
    assert sorted(f.name for f in saved.glob("*.py")) == [
        "configuration_ternary.py",
        "layers_rmtkd.py",
        "loading_rmtkd.py",
        "modeling_ternary.py",
        "spec_rmtkd.py",
    ]
    for file in saved.glob("*.py"):
        lines = file.read_text(encoding="utf8").splitlines()
        assert not [line for line in lines if line.startswith(("from optimum_rmtkd", "import optimum_rmtkd"))]


def test_what_is_uploaded_is_complete(model, tmp_path, monkeypatch):
    """save_pretrained(push_to_hub=True): the files that leave are those that run without this package."""
    from types import SimpleNamespace

    from transformers.utils import hub

    sent = {}

    def upload(self, working_dir, repo_id, *args, **kwargs):
        sent["repo"], sent["message"] = repo_id, kwargs["commit_message"]
        sent["files"] = {f.name: f.read_bytes() for f in Path(working_dir).iterdir()}

    card = SimpleNamespace(save=lambda path: None)
    api = SimpleNamespace(create_repo=lambda repo_id, **_: SimpleNamespace(repo_id=f"me/{repo_id}"))
    monkeypatch.setattr(hub, "hf_api", lambda: api)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *args, **kwargs: card)
    monkeypatch.setattr(hub.PushToHubMixin, "_upload_modified_files", upload)
    model.save_pretrained(tmp_path / "head", push_to_hub=True, commit_message="first")
    assert sent["repo"] == "me/head" and sent["message"] == "first"
    for file in (tmp_path / "head").iterdir():
        assert sent["files"][file.name] == file.read_bytes(), file.name
    assert b"from .layers_rmtkd import" in sent["files"]["modeling_ternary.py"]


def test_saving_twice_gives_the_same_folder(saved, tmp_path):
    AutoModel.from_pretrained(saved).save_pretrained(tmp_path / "twice")
    for file in saved.iterdir():
        assert (tmp_path / "twice" / file.name).read_bytes() == file.read_bytes(), file.name


def test_regression(tmp_path):
    x, _ = data()
    y = x[:, :2] * 2 - 1
    model, report = compress_features(x, y, TernaryConfig(hidden=(256,)))
    assert isinstance(model, TernaryMLPForRegression) and report.error < 0.1
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert type(again) is TernaryMLPForRegression
    with torch.no_grad():
        out = again(features=x, labels=y)
    assert float(out.loss) == pytest.approx(float((out.logits - y).square().mean()))
    single = compress_features(x, y[:, 0], TernaryConfig(hidden=(64,)))[0]
    assert single(x, labels=y[:, 0]).loss.shape == () and logits(single, x).shape == (300, 1)


@pytest.mark.parametrize("storage", ["base3", "2bit", "seed"])
def test_storages_reload(storage, tmp_path):
    x, y = data()
    reference = compress_features(x, y, TernaryConfig(hidden=HIDDEN))[0]
    model = compress_features(x, y, TernaryConfig(hidden=HIDDEN, storage=storage))[0]
    model.save_pretrained(tmp_path)
    assert zoo.close(logits(AutoModel.from_pretrained(tmp_path)), logits(reference))
    sizes = {k: v.numel() for k, v in load_file(tmp_path / "model.safetensors").items() if "packed" in k}
    weights = 30 * 64 + 64 * 48
    assert sum(sizes.values()) == {"base3": 384 + 615, "2bit": weights / 4, "seed": 0}[storage]


def test_two_bits_or_fewer_a_weight_in_the_file(tmp_path):
    """All of it: 120,000 hidden weights; constants, readout, header and all in 2 bits each."""
    x, y = data(p=100)
    model = compress_features(x, y, TernaryConfig(hidden=(400, 200)))[0]
    model.save_pretrained(tmp_path)
    assert 8 * (tmp_path / "model.safetensors").stat().st_size / 120_000 < 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(model, saved, dtype):
    half = AutoModel.from_pretrained(saved, dtype=dtype)
    assert half.mlp.layers[0].packed.dtype == torch.uint8 and half.mlp.readout.weight.dtype == dtype
    x = data(seed=1)[0]
    agree = (logits(half, x.to(dtype)).argmax(1) == logits(model, x).argmax(1)).float().mean()
    assert agree > 0.9


def test_from_config_draws_the_same_hidden_weights(model, saved):
    fresh = AutoModel.from_config(AutoConfig.from_pretrained(saved))
    assert torch.equal(fresh.mlp.layers[0].packed, model.mlp.layers[0].packed)


def test_device_map(model, saved):
    assert zoo.close(logits(AutoModel.from_pretrained(saved, device_map="cpu")), logits(model))


def test_another_number_of_labels(saved):
    with pytest.raises(SpecMismatchError, match="ignore_mismatched_sizes"):
        AutoModel.from_pretrained(saved, num_labels=7)
    other = AutoModel.from_pretrained(saved, num_labels=7, ignore_mismatched_sizes=True)
    assert logits(other).shape[-1] == 7


# Damage


def rewrite(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_truncated_trits(saved):
    rewrite(saved, lambda t: t.update({"mlp.layers.0.packed": t["mlp.layers.0.packed"][:-3].clone()}))
    with pytest.raises(SpecMismatchError, match=r"mlp.layers.0.packed has shape \(381,\).*\(384,\)"):
        AutoModel.from_pretrained(saved)


def test_truncated_file(saved):
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(Exception, match="(?i)incomplete|invalid|header|size"):
        AutoModel.from_pretrained(saved)


def test_invalid_trit(saved):
    rewrite(saved, lambda t: t["mlp.layers.1.packed"].__setitem__(7, 250))
    with pytest.raises(SpecMismatchError, match="Byte 7 of the packed weights is 250"):
        AutoModel.from_pretrained(saved)


@pytest.mark.parametrize("key", ["mlp.layers.0.packed", "mlp.input_mean", "mlp.readout.bias", "mlp.layers.1.scale"])
def test_missing_tensor(saved, key):
    rewrite(saved, lambda t: t.pop(key))
    with pytest.raises(SpecMismatchError, match=f"lacks 1 tensor.*{key}"):
        AutoModel.from_pretrained(saved)


def test_another_seed_in_the_config(tmp_path):
    x, y = data()
    compress_features(x, y, TernaryConfig(hidden=HIDDEN, storage="seed"))[0].save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf8"))
    config["network"]["seed"] = 1
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf8")
    with pytest.raises(SpecMismatchError, match="drawn from seed 1 have checksum"):
        AutoModel.from_pretrained(tmp_path)


# Training and gradients


def rows(n: int = 300):
    x, y = data(n)
    return [{"features": a.numpy(), "labels": int(b)} for a, b in zip(x, y)]


def arguments(folder, **options) -> TrainingArguments:
    options = {"max_steps": 40, "learning_rate": 1e-2, "per_device_train_batch_size": 50} | options
    return TrainingArguments(str(folder), report_to="none", use_cpu=True, disable_tqdm=True, **options)


def test_trainer_trains_the_readout_alone(tmp_path):
    x, y = data()
    model = compress_features(x, y, TernaryConfig(hidden=HIDDEN))[0]
    hidden = model.mlp.hidden_features(x)
    torch.nn.init.zeros_(model.mlp.readout.weight)
    Trainer(model, arguments(tmp_path, max_steps=150), train_dataset=rows()).train()
    assert torch.equal(model.mlp.hidden_features(x), hidden)
    assert {name for name, p in model.named_parameters()} == {"mlp.readout.weight", "mlp.readout.bias"}
    assert (logits(model, x).argmax(1) == y).float().mean() > 0.8


def test_latent_weights_train_and_pack(tmp_path):
    x, y = data()
    model = compress_features(x, y, TernaryConfig(hidden=HIDDEN))[0]
    model.mlp = convert(model.mlp, "latent")
    model.config.network = {**model.config.network, "storage": "latent"}
    before = model.mlp.layers[0].trits()
    Trainer(model, arguments(tmp_path / "run", max_steps=60), train_dataset=rows()).train()
    model.eval()
    assert not torch.equal(model.mlp.layers[0].trits(), before)
    trained = logits(model)
    model.save_pretrained(tmp_path / "latent")
    assert zoo.close(logits(AutoModel.from_pretrained(tmp_path / "latent")), trained)
    pack_model(model, "2bit").save_pretrained(tmp_path / "packed")
    again = AutoModel.from_pretrained(tmp_path / "packed")
    assert again.config.network["storage"] == "2bit"
    assert torch.allclose(logits(again), trained, atol=1e-4)


def test_centring_by_nothing_is_no_work():
    x = torch.tensor([-1.0, 2.0])
    assert CentredActivation("relu")(x).tolist() == [0.0, 2.0] and x.tolist() == [-1.0, 2.0]
    assert CentredActivation("linear", 0.5)(x).tolist() == [-1.5, 1.5] and x.tolist() == [-1.0, 2.0]  # not in place
    assert CentredActivation("linear")(x) is x


def test_steps_have_the_derivative_they_were_given():
    step = StepActivation((-0.5, 0.5), (-1.0, 0.2, 2.0), slopes=(0.25, 0.75))
    x = torch.tensor([-2.0, -0.5, 0.1, 0.5, 0.6], requires_grad=True)
    out = step(x)
    assert out.tolist() == pytest.approx([-1.0, -1.0, 0.2, 0.2, 2.0])
    out.sum().backward()
    assert x.grad.tolist() == [0.25, 0.25, 0.75, 0.75, 0.75]
    assert torch.equal(step(x.detach()), out.detach())


def test_gradients_reach_the_features(model):
    x = data()[0].requires_grad_()
    model(x, labels=data()[1]).loss.backward()
    assert bool((x.grad.abs().sum(1) > 0).all())
    model.zero_grad()


# Compilation and export


def test_torch_export(model):
    x = data(n=4)[0]
    program = torch.export.export(model.eval(), (), {"features": x}, strict=False)
    assert torch.allclose(program.module()(features=x).logits, logits(model, x), atol=1e-6)


@pytest.mark.parametrize("mode", ["weights_only", "min_shift"])
def test_onnx(mode, tmp_path):
    """Through the library's own export, which compares with PyTorch over several batch sizes."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason="needs the extra onnx")
    from optimum_rmtkd.hub.loading import load_model
    from optimum_rmtkd.hub.onnx import to_onnx

    x, y = data()
    compress_features(x, y, TernaryConfig(hidden=HIDDEN, mode=mode))[0].save_pretrained(tmp_path)
    assert to_onnx(load_model(tmp_path), tmp_path) < 1e-4
    import onnxruntime

    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    found = session.run(["logits"], {"features": x[:17].numpy()})[0]
    assert torch.allclose(torch.from_numpy(found), logits(load_model(tmp_path), x[:17]), atol=1e-4)


def test_onnx_of_a_model_with_a_ternary_part(tmp_path):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason="needs the extra onnx")
    from optimum_rmtkd import compress_head
    from optimum_rmtkd.hub.onnx import to_onnx

    model, batches = zoo.make("bert", "ForSequenceClassification"), zoo.batches("bert")
    assert to_onnx(compress_head(model, "classifier", batches, TernaryConfig(hidden=HIDDEN))[0], tmp_path) < 1e-4


def test_unknown_activation_in_a_config():
    network = {
        "in_features": 4,
        "hidden": [8],
        "activations": [{"name": "swoosh", "mean": 0.0}],
        "storage": "base3",
    }
    with pytest.raises(ValueError, match="Unknown activation 'swoosh'.*cos, .*relu"):
        TernaryMLPForClassification(TernaryMLPConfig(network=network))


# Saving


def test_a_disk_that_is_full_leaves_the_folder_as_it_was(model, tmp_path, monkeypatch):
    """Never a config without weights, nor new weights under old code."""
    place = tmp_path / "net"

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    for there in (False, True):
        before = {path.name: path.read_bytes() for path in place.iterdir()} if there else None
        with monkeypatch.context() as patch:
            patch.setattr(transformers.modeling_utils, "safe_save_file", full)
            with pytest.raises(DiskFullError, match="The model in .*net could not be written"):
                model.save_pretrained(place)
        if there:
            assert {path.name: path.read_bytes() for path in place.iterdir()} == before
        else:
            assert list(tmp_path.iterdir()) == []
            model.save_pretrained(place)
            assert {"config.json", "model.safetensors", "layers_rmtkd.py"} <= {path.name for path in place.iterdir()}
