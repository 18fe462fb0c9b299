"""Exported files compute what the checkpoint computes. Those of other libraries, which are an extra, are slow or skipped."""

import json

import numpy as np
import pytest
import torch

import fastcifar
from fastcifar import export
from fastcifar.checkpoint import Checkpoint, load, save_checkpoint
from fastcifar.dataset import ResidentSet
from fastcifar.export import BOUND, Options, Program
from fastcifar.models import ARCHITECTURES, build_model
from fastcifar.models.layers import BatchNorm2d
from tests.conftest import CLASSES


def random_checkpoint(path, arch, **shape):
    """A network of random weights, its batch norms too: no channel passes as it came."""
    torch.manual_seed(0)
    model = build_model(arch, stem_stride=shape.get("stem_stride", 1))
    for layer in model.modules():
        if isinstance(layer, BatchNorm2d):
            torch.nn.init.normal_(layer.running_mean, std=0.2)
            torch.nn.init.normal_(layer.bias, std=0.2)
            torch.nn.init.uniform_(layer.running_var, 0.5, 2.0)
            if layer.weight.requires_grad:
                torch.nn.init.uniform_(layer.weight, -0.5, 1.5)
    checkpoint = Checkpoint(
        arch,
        True,
        CLASSES,
        [0.5, 0.4, 0.3],
        [0.2, 0.25, 0.3],
        "random",
        ["0", "1"],
        1,
        model.state_dict(),
        None,
        {},
        0.1,
        1,
        **shape,
    )
    save_checkpoint(path, checkpoint)
    return path


def pictures(count, height=32, width=32):
    return torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


# The three kinds of block, squeeze-excitation, a stem whose output has two users, pooling between convolution and batch norm.
@pytest.mark.parametrize(
    ("arch", "left", "shape"),
    [
        ("se_resnet18", 0, {}),
        ("light_resnet18", 9, {"stem_stride": 4, "size": [96, 64]}),
        ("speed94_half", 0, {}),
        ("dropout_resnet24", 0, {"stem_stride": 4, "size": [64, 96]}),
    ],
)
def test_the_program_folds_batch_norms_and_gives_the_same_logits(arch, left, shape, tmp_path):
    model = load(random_checkpoint(tmp_path / "x.pt", arch, **shape), kernels="torch")
    program, images = Program(model), pictures(3, *shape.get("size", (32, 32)))
    with torch.inference_mode():
        expected, given = model(images), program(images)
    assert sum(isinstance(layer, BatchNorm2d) for layer in program.modules()) == left
    assert (given - expected).abs().max() <= BOUND * expected.abs().max()
    assert sum(isinstance(layer, BatchNorm2d) for layer in model.modules()) > left, "the model itself was changed"


def test_a_batch_norm_behind_pooling_that_turns_signs_is_not_folded(tmp_path):
    model = load(random_checkpoint(tmp_path / "x.pt", "speed94_half"), kernels="torch")
    model.network.stages[0][0].bn.weight.data[0] = -1
    program, images = Program(model), pictures(2)
    with torch.inference_mode():
        torch.testing.assert_close(program(images), model(images), rtol=0, atol=BOUND * float(model(images).abs().max()))
    assert sum(isinstance(layer, BatchNorm2d) for layer in program.modules()) == 1


def test_the_top_level_gives_models(tmp_path):
    model = fastcifar.load(random_checkpoint(tmp_path / "x.pt", "speed94_half"))
    assert not model.training
    assert model.class_names == CLASSES
    assert model.preprocessing.mean == (0.5, 0.4, 0.3)
    picture = pictures(1)[0].numpy()
    assert model(torch.from_numpy(picture)[None]).shape == (1, 10)
    network = fastcifar.create_model("speed94_half", num_classes=100)
    assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 100)
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        fastcifar.lod  # noqa: B018


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        (["--to", "pt2", "--int8"], "--int8 is for --to onnx"),
        (["--to", "safetensors", "--bf16"], "--bf16 is for --to pt2 and torchscript"),
        (["--to", "gguf"], "'gguf' is none of its choices"),
        (["--to", "torchscript", "--limit-test", "51"], "51 were asked for"),
        (["--to", "torchscript", "--out", "x.pt"], "x.pt exists: choose another --out, or replace it with --force"),
    ],
)
def test_mistakes_are_one_line(options, fragment, betons, tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    random_checkpoint(tmp_path / "x.pt", "speed94_half")
    assert fragment in refused(export.main, "--checkpoint", "x.pt", "--data", betons, *options)
    assert [file.name for file in tmp_path.iterdir()] == ["x.pt"]


def test_a_missing_library_names_the_extra(tmp_path, refused, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    line = refused(export.main, "--checkpoint", tmp_path / "x.pt", "--to", "onnx")
    assert "--to onnx needs onnx, onnxruntime, onnxscript, not installed: uv sync --extra export" in line


def test_a_file_with_other_logits_is_not_kept(betons, tmp_path, refused, monkeypatch):
    monkeypatch.setattr(export, "opened", lambda path, to: lambda images: torch.zeros(len(images), 10))
    monkeypatch.setattr(export, "LATENCY", {1: 1})
    path = random_checkpoint(tmp_path / "x.pt", "speed94_half")
    assert "was not kept" in refused(export.main, "--checkpoint", path, "--to", "torchscript", "--data", betons)
    assert [file.name for file in tmp_path.iterdir()] == ["x.pt"]


def test_data_of_another_size_is_refused(betons, tmp_path, refused):
    path = random_checkpoint(tmp_path / "x.pt", "speed94_half", size=[64, 96])
    line = refused(export.main, "--checkpoint", path, "--to", "pt2", "--data", betons)
    assert f"{betons} has images of 32x32 pixels, {path} was trained on 96x64" in line


@pytest.mark.slow
@pytest.mark.parametrize("to", ["onnx", "pt2", "safetensors", "torchscript"])
def test_other_sizes_leave_too(to, tmp_path):
    for library in export.LIBRARIES.get(to, ()):
        pytest.importorskip(library, reason="uv sync --extra export")
    path = random_checkpoint(tmp_path / "x.pt", "se_resnet18", stem_stride=4, size=[64, 96])
    images = pictures(3, 64, 96)
    data = ResidentSet(images, torch.zeros(3, dtype=torch.int64), torch.arange(3))
    export.write(tmp_path / "out", Options(path, to), data)
    with torch.inference_mode():
        expected, given = load(path)(images), export.opened(tmp_path / "out", to)(images)
    np.testing.assert_allclose(given, expected, rtol=0, atol=BOUND * float(expected.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("to", ["onnx", "pt2", "safetensors", "torchscript"])
def test_every_architecture_exports_to_every_format(arch, to, betons, tmp_path, call, monkeypatch):
    for library in export.LIBRARIES.get(to, ()):
        pytest.importorskip(library, reason="uv sync --extra export")
    monkeypatch.setattr(export, "LATENCY", {1: 1})
    path = random_checkpoint(tmp_path / "x.pt", arch)
    text = call(export.main, "--checkpoint", path, "--to", to, "--data", betons, "--json")
    original, exported = json.loads(text)["rows"]
    assert exported["difference"] <= BOUND * original["largest"]
    assert (tmp_path / f"x.{to}").stat().st_size == pytest.approx(1e6 * exported["megabytes"])
    run, images = export.opened(tmp_path / f"x.{to}", to), pictures(7)  # another number than it was made with
    with torch.inference_mode():
        expected, given = load(path)(images), run(images)
    np.testing.assert_allclose(given, expected, rtol=0, atol=BOUND * float(expected.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("to", "precision", "share"), [("pt2", "bf16", 0.6), ("torchscript", "bf16", 0.6), ("onnx", "int8", 0.35)]
)
@pytest.mark.parametrize("arch", ["light_resnet18", "mish_se_resnet18", "speed94_half"])
def test_fewer_bits_make_smaller_files_of_nearly_the_same_logits(arch, to, precision, share, betons, tmp_path, monkeypatch):
    for library in export.LIBRARIES.get(to, ()):
        pytest.importorskip(library, reason="uv sync --extra export")
    monkeypatch.setattr(export, "LATENCY", {1: 1})
    path = random_checkpoint(tmp_path / "x.pt", arch)
    result = export.export(Options(path, to, data=betons, **{precision: True}))
    original, exported = result["rows"]
    assert exported["megabytes"] < share * original["megabytes"]
    assert 0 < exported["difference"] < 0.25 * original["largest"]
