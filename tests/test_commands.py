"""Evaluate, predict, plots and the contact sheet do what they say, on a network trained for a moment."""

import csv
import io
import json
import pickle
import runpy
import shutil
import struct
import warnings
import zlib
from dataclasses import replace

import matplotlib as mpl
import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from fastcifar import evaluate, plots, predict
from fastcifar.augmentation import __main__ as contact_sheet
from fastcifar.beton import Manifest, read_beton
from fastcifar.command import parse_command
from fastcifar.dataset import ResidentSet
from fastcifar.errors import InputError
from fastcifar.run_folder import RunFolder
from fastcifar.train import train
from tests.conftest import assert_user_error, run_cli


@pytest.fixture(scope="module")
def finished(betons, tmp_path_factory):
    """A complete run of two epochs."""
    out = tmp_path_factory.mktemp("runs") / "small"
    options = "--arch light_resnet18 --epochs 2 --batch-size 50 --limit-train 100 --held-out 0 --mix-probability 0 --no-plots"
    return train(parse_command([*options.split(), "--data", str(betons), "--out", str(out)]), Console(quiet=True))


def measure(finished, betons, **options):
    return evaluate.measure(evaluate.Options(checkpoint=finished.last, data=betons, **options))


def predictions(finished, source, tmp_path, **options):
    labels, unlabelled = predict.predict(
        predict.Options(checkpoint=finished.last, input=source, out=tmp_path / "x.csv", **options)
    )
    return labels, unlabelled.ids


# Evaluate


def test_evaluate_gives_the_summarys_figures(finished, betons):
    result, summary = measure(finished, betons), finished.read_summary()
    assert {key: result[key] for key in summary["final"]} == summary["final"]
    assert measure(finished, betons, tta="flip")["top1"] == summary["final_flip_tta_top1"]
    assert result["top1"] <= result["top5"] <= 1
    assert result["images"] == 50


def test_evaluate_does_not_depend_on_the_batch_size(finished, betons):
    a, b = (measure(finished, betons, batch_size=size, limit=20, tta="flip_translate", precision="fp32") for size in (20, 7))
    assert a["confusion"] == b["confusion"]
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_evaluate_prints_tables_and_json(finished, betons, call):
    command = ("--checkpoint", finished.last, "--data", betons)
    text, result = call(evaluate.main, *command), json.loads(call(evaluate.main, *command, "--json"))
    assert f"top-1 {result['top1']:.2%}" in text
    for name in result["per_class"]:
        assert name in text


def test_evaluate_refuses_data_of_other_classes(finished, betons, tmp_path):
    shutil.copytree(betons, tmp_path / "other")
    beton = tmp_path / "other" / "test.beton"
    manifest = Manifest.load(beton)
    replace(manifest, class_names=["something else", *manifest.class_names[1:]]).save(beton)
    with pytest.raises(InputError, match="knows other classes"):
        measure(finished, tmp_path / "other")


# Predict


def test_predict_writes_the_competitions_csv_and_agrees_with_evaluate(finished, betons, tmp_path, call):
    out = tmp_path / "submission.csv"
    command = ("--checkpoint", finished.last, "--input", betons / "test.beton", "--out", out, "--tta", "none")
    call(predict.main, *command)
    rows = list(csv.reader(out.open()))
    assert rows[0] == ["ID", "Labels"]
    assert [row[0] for row in rows[1:]] == [str(number) for number in range(50)]
    labels = np.array([int(row[1]) for row in rows[1:]])
    truth = read_beton(betons / "test.beton").labels
    assert (labels == truth).mean() == measure(finished, betons)["top1"]
    with pytest.raises(InputError, match=r"submission\.csv exists.*--force"):
        call(predict.main, *command)
    assert call(predict.main, *command, "--force") == f"{out}: 50 predictions\n"


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_predict_weighs_the_views_in_place_as_evaluate_does(finished, betons, weight):
    views = {"tta": "flip_translate", "centre_weight": weight, "precision": "fp32"}
    labels, _ = predict.predict(predict.Options(finished.last, betons / "test.beton", **views))
    truth = read_beton(betons / "test.beton").labels
    assert np.mean(labels == truth) == pytest.approx(measure(finished, betons, **views)["top1"])


@pytest.mark.parametrize("layout", ["hwc", "rows", "chw"])
def test_predict_reads_every_form_of_the_competitions_pickle(betons, tmp_path, layout):
    images = read_beton(betons / "test.beton").images
    planes = images.transpose(0, 3, 1, 2)
    data = np.ascontiguousarray({"hwc": images, "rows": planes.reshape(len(images), -1), "chw": planes}[layout])
    path = tmp_path / "test.pkl"
    for content, first in (
        ({"data": data}, 0),
        ({b"data": data}, 0),
        ({"data": data, "ids": np.arange(1000, 1050)}, 1000),
        ({b"data": data, b"ids": list(range(1000, 1050))}, 1000),
    ):
        path.write_bytes(pickle.dumps(content))
        unlabelled = predict.read_unlabelled(path)
        assert np.array_equal(unlabelled.images, images)
        assert unlabelled.ids == [str(number) for number in range(first, first + 50)]


def test_predict_reads_a_folder_of_pngs_in_the_order_of_their_numbers(finished, betons, tmp_path):
    images = read_beton(betons / "test.beton").images[:12]
    folder = tmp_path / "pngs"
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"img{number}.png")
    labels, ids = predictions(finished, folder, tmp_path)
    assert ids == [f"img{number}" for number in range(12)]
    assert labels == predictions(finished, betons / "test.beton", tmp_path)[0][:12]


ROWS = np.zeros((2, 3072), np.uint8)
INVALID_PICKLES = [
    ({"images": 1}, "no entry data"),
    ({"data": np.zeros((4, 10), np.uint8)}, "has shape"),
    ({"data": ROWS.astype(np.float32)}, "no entry data"),
    ({"data": ROWS[:0]}, "no entry data"),
    ({"data": ROWS, "ids": [1]}, "2 images but 1 ids"),
    *(
        ({"data": ROWS, "ids": ids}, "ids is not a list")
        for ids in (b"ab", 5, np.zeros((2, 2), int), [None, 1.5], [True, False])
    ),
    ({"data": ROWS, "ids": [1, 10**5000]}, "an id is a number of 16610 bits"),
    ({"data": ROWS, "ids": ["x", "y" * 10_000]}, "an id is a text of 10000 characters"),
]


def png(channels, bits, change=lambda chunks: chunks):
    """A PNG of 32x32 pixels that are all of one value; `change` has its blocks [(kind, content)] before they are summed up."""
    row = b"\0" + b"\x12" * (32 * channels * bits // 8)
    header = struct.pack(">IIBBBBB", 32, 32, bits, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(row * 32)), (b"IEND", b"")]
    blocks = ((len(content).to_bytes(4) + kind + content, zlib.crc32(kind + content)) for kind, content in change(chunks))
    return b"\x89PNG\r\n\x1a\n" + b"".join(block + checksum.to_bytes(4) for block, checksum in blocks)


def flipped(content, position):
    return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


GOOD_PNG = png(3, 8)
STORED_PNG = png(3, 8, lambda chunks: [chunks[0], (b"IDAT", zlib.compress(zlib.decompress(chunks[1][1]), 0)), chunks[2]])
GIF = io.BytesIO()
Image.new("RGB", (32, 32)).save(GIF, "GIF", save_all=True, append_images=[Image.new("RGB", (32, 32), "red")])
INVALID_PNGS = [
    *((png(channels, 16), "16 bits a channel") for channels in (1, 2, 3, 4)),
    (png(3, 16, lambda chunks: [(b"tEXt", b"a\0" + bytes([1] * 30)), *chunks]), "16 bits a channel"),
    (png(3, 8, lambda chunks: [chunks[0], (b"IHDR", png(3, 16)[16:29]), *chunks[1:]]), "16 bits a channel"),
    *((flipped(GOOD_PNG, position), "get it again") for position in (16, 24, 30, 50, 60)),
    # The pixels' block one byte too short hides zlib's checksum from Pillow, which then takes a changed byte for a pixel.
    (flipped(flipped(STORED_PNG, 1000), 36), "damaged or cut short"),
    (GOOD_PNG[:40], "damaged or cut short"),
    (png(3, 8, lambda chunks: [chunks[0], (b"IDAT", chunks[1][1][:10]), chunks[2]]), "truncated"),
    (png(3, 8, lambda chunks: [chunks[0], chunks[2]]), "get it again"),
    (b"not a picture", "cannot identify"),
    (GIF.getvalue(), "2 frames or pages"),
    (GOOD_PNG + bytes(1 << 22), "a file of at most"),
]


def test_the_pngs_of_these_tests_are_valid_but_for_their_damage(tmp_path):
    for number, channels in enumerate((1, 2, 3, 4)):
        (tmp_path / f"{number}.png").write_bytes(png(channels, 8))
    palette = Image.new("P", (32, 32))
    palette.putpalette([0x12] * 3)
    palette.save(tmp_path / "4.png", transparency=b"\x80")  # about which Pillow would warn
    with warnings.catch_warnings(action="error"):
        found = predict.read_unlabelled(tmp_path).images
    assert (found[[0, 2]] == 0x12).all()
    assert len(np.unique(found[[1, 3]])) == 1
    assert abs(int(found[1, 0, 0, 0]) - (0x12**2 + 255 * (255 - 0x12)) / 255) < 1  # 18/255 of them, the rest white


@pytest.mark.parametrize(
    ("ids", "problem"),
    [
        (["a", "b", "a"], "has ID 'a' 2 times"),
        ([1, "1", 2], "has ID '1' 2 times"),
        *(([1, 2, text], "rename it") for text in ("=1+1", "+1", "@a", "-cmd", "\t=1", "a\rb", "a\x1b[2J", "", "\u202ea")),
        (["-1", -2, 3], None),
        (["é", "é".encode(), "a b"], "has ID 'é' 2 times"),
    ],
)
def test_ids_are_unique_and_no_formulas(tmp_path, ids, problem):
    path = tmp_path / "ids.pkl"
    path.write_bytes(pickle.dumps({"data": np.zeros((3, 3072), np.uint8), "ids": ids}))
    if problem is None:
        assert predict.read_unlabelled(path).ids == ["-1", "-2", "3"]
    else:
        with pytest.raises(InputError, match=problem):
            predict.read_unlabelled(path)


def test_one_name_in_two_spellings_is_refused(tmp_path):
    for name in ("1.png", "1.PNG"):
        (tmp_path / name).write_bytes(GOOD_PNG)
    with pytest.raises(InputError, match="has ID '1' 2 times"):
        predict.read_unlabelled(tmp_path)


def test_probabilities_that_are_not_finite_are_refused(finished, betons, tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "class_probabilities", lambda *_, **__: [torch.full((50, 10), torch.nan)])
    with pytest.raises(InputError, match=r"last\.pt predicts NaN or infinity"):
        predictions(finished, betons / "test.beton", tmp_path)


def test_predict_refuses_what_is_no_set_of_images(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(InputError, match=r"holds no \.png"):
        predict.read_unlabelled(folder)
    path = folder / "small.png"
    Image.new("RGB", (31, 32)).save(path)
    with pytest.raises(InputError, match=r"small\.png is no .* channel \(31x32 pixels"):
        predict.read_unlabelled(folder)
    for content, problem in INVALID_PNGS:
        path.write_bytes(content)
        with pytest.raises(InputError, match=rf"small\.png is no.*{problem}"):
            predict.read_unlabelled(folder)
    path.unlink()
    path.mkdir()
    with pytest.raises(InputError, match=r"small\.png is not a file"):
        predict.read_unlabelled(folder)
    with pytest.raises(InputError, match="is missing"):
        predict.read_unlabelled(tmp_path / "nothing.pkl")
    for content, problem in INVALID_PICKLES:
        (tmp_path / "bad.pkl").write_bytes(pickle.dumps(content))
        with pytest.raises(InputError, match=problem):
            predict.read_unlabelled(tmp_path / "bad.pkl")


# Plots


CURVES = {"loss.png", "accuracy.png", "best_accuracy.png", "learning_rate.png"}


@pytest.mark.slow
def test_plots_of_one_run_and_of_several(finished, tmp_path, call):
    call(plots.main, finished.path, "--out", tmp_path / "one")
    paths = list((tmp_path / "one").iterdir())
    assert {path.name for path in paths} == CURVES | {"confusion_matrix.png"}
    for path in paths:
        assert np.asarray(Image.open(path).convert("L")).std() > 10  # something is drawn
    run = plots.read_run(finished)
    two = plots.draw([run, run], tmp_path / "two")
    assert len(set(two)) == 6
    assert all(path.exists() for path in two)
    assert {path.name for path in two} >= CURVES


def test_a_runs_name_may_hold_what_matplotlib_takes_for_mathematics(finished, tmp_path, call):
    named = shutil.copytree(finished.path, tmp_path / "a$b^{c")
    call(plots.main, named)
    assert {path.name for path in named.iterdir()} >= CURVES


def test_plots_of_a_run_unfinished_or_not_yet_evaluated_leave_out_what_is_unknown(finished, tmp_path):
    shutil.copytree(finished.path, tmp_path / "cut")
    (tmp_path / "cut" / "summary.json").unlink()
    run = plots.read_run(RunFolder(tmp_path / "cut"))
    rows = [{**row, "eval_loss": None, "eval_accuracy": None, "best_accuracy": None} for row in run.rows]
    early = plots.Run(run.label, run.data_name, rows, None)
    for number, unfinished in enumerate((run, early)):
        assert {path.name for path in plots.draw([unfinished], tmp_path / str(number))} == CURVES


def test_plots_leave_a_notebook_its_own(finished, tmp_path):
    before = mpl.get_backend()
    mpl.use("svg")
    try:
        runpy.run_path(contact_sheet.__file__)
        fresh = runpy.run_path(plots.__file__)
        fresh["save"](tmp_path / "loss.png", fresh["loss_figure"]([plots.read_run(finished)]))
        assert mpl.get_backend() == "svg"
    finally:
        mpl.use(before)


def test_the_curves_show_what_the_metrics_say(finished):
    run = plots.read_run(finished)
    figure = plots.accuracy_figure([run])
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    assert lines["test"].get_ydata().tolist() == [100 * row["eval_accuracy"] for row in run.rows]
    assert lines["training (augmented)"].get_xdata().tolist() == [1, 2]
    assert "accuracy" in figure.axes[0].get_ylabel()
    assert run.data_name in figure.axes[0].get_title()


def test_plots_name_the_line_that_is_damaged(tmp_path, finished):
    shutil.copytree(finished.path, tmp_path / "broken")
    path = tmp_path / "broken" / "metrics.jsonl"
    path.write_text(path.read_text().splitlines()[0] + '\n{"epo')
    with pytest.raises(InputError, match="line 2"):
        plots.read_run(RunFolder(tmp_path / "broken"))


# The contact sheet, and the processes


def test_the_contact_sheet_shows_originals_and_epochs(betons, tmp_path, call):
    out = tmp_path / "grid.png"
    call(contact_sheet.main, *["--arch", "robust_resnet64", "--images", "4", "--epochs", "3"], "--data", betons, "--out", out)
    assert Image.open(out).size[0] > 200
    data = read_beton(betons / "train.beton")
    few = ResidentSet(torch.from_numpy(data.images[:4]), torch.from_numpy(data.labels[:4]), torch.arange(4))
    mean, std = torch.tensor([0.5] * 3), torch.tensor([0.25] * 3)
    plain = contact_sheet.Augmentation(crop_padding=0, flip="off")
    assert np.array_equal(contact_sheet.seen(plain, few, mean, std, 0, 0, 1), few.images.numpy())  # nothing changed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "fragments"),
    [
        (("evaluate", "--checkpoint", "nowhere/best.pt"), ("nowhere/best.pt is missing",)),
        (("predict", "--checkpoint", "nowhere/best.pt", "--input", "nowhere.pkl"), ("nowhere/best.pt is missing",)),
        (("plots", "nowhere"), ("config.json is missing", "run folder")),
    ],
    ids=lambda value: value[0],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(command, fragments):
    assert_user_error(run_cli("-m", f"fastcifar.{command[0]}", *command[1:]), *fragments)
