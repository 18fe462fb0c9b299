"""Exports a checkpoint for other people's code, and proves the file by running it beside the original.

python -m fastcifar.export --checkpoint runs/se_resnet18-seed0/best.pt --to onnx

onnx, pt2 and torchscript hold a program: uint8 images [N, H, W, 3] in, R G B as Pillow and NumPy have them, N free, H and W
those of the data; float32 logits [N, classes] out. Normalisation is inside, batch norm folded into the convolution it follows.
safetensors holds the weights alone, as trained, under the names of `fastcifar.create_model`.
"""

import io
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
import torch.fx
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fastcifar.ahead import DATA
from fastcifar.arguments import parse_arguments
from fastcifar.checkpoint import Trained, load
from fastcifar.dataset import ResidentSet, epoch_order, load_resident
from fastcifar.device import device_name, set_up_process
from fastcifar.errors import InputError, require, require_installed, run_command
from fastcifar.evaluate import require_same_kind, tell, warn_synthetic
from fastcifar.files import atomic_path
from fastcifar.models import build_model, place
from fastcifar.models.layers import BatchNorm2d
from fastcifar.models.resnet import PixelClassifier

Format = Literal["onnx", "pt2", "safetensors", "torchscript"]
Run = Callable[[Tensor], Tensor]  # uint8 images [N, H, W, 3] to float32 logits [N, classes]

CPU = torch.device("cpu")
BATCH = 250  # images a batch when the whole test set is run
LATENCY = {1: 31, 256: 5}  # images a call: calls whose median is shown
CALIBRATION = 512  # training images from which the ranges of int8's activations are taken
# Largest difference of a float32 logit over the largest logit. Folding rounds every weight once more: 2e-7 to 3e-6 was seen.
BOUND = 1e-4
LIBRARIES = {"onnx": ("onnx", "onnxruntime", "onnxscript"), "safetensors": ("safetensors",)}


@dataclass(frozen=True)
class Options:
    """Export a checkpoint, run the file on the test set and show it beside the original."""

    checkpoint: Path  # last.pt or best.pt of a run folder
    to: Format  # onnx, pt2 (torch.export), torchscript: a program for uint8 images; safetensors: the weights
    out: Path | None = None  # file to write; default: beside the checkpoint, under its name
    int8: bool = False  # onnx only: convolutions and linear layers in 8 bits, ranges from training images
    bf16: bool = False  # pt2 and torchscript only: convolutions and linear layers in bfloat16
    data: Path = DATA  # folder with the betons that the file is tried on, and calibrated by
    limit_test: int = 0  # try only the first so many test images, 0 = all
    json: bool = False  # print one JSON object instead of a table
    force: bool = False  # replace --out when it exists

    def __post_init__(self) -> None:
        require(self, self.limit_test >= 0, "limit_test", "0 or more")
        if self.int8 and self.to != "onnx":
            raise InputError(f"--int8 is for --to onnx, got --to {self.to}: choose onnx, or leave --int8 out")
        if self.bf16 and self.to not in ("pt2", "torchscript"):
            raise InputError(f"--bf16 is for --to pt2 and torchscript, got --to {self.to}: choose one of these")
        require_installed(f"--to {self.to}", LIBRARIES.get(self.to, ()), "export")

    @property
    def precision(self) -> str:
        return "int8" if self.int8 else "bf16" if self.bf16 else "fp32"

    @property
    def path(self) -> Path:
        """The file to write."""
        suffix = f".{self.to}" if self.precision == "fp32" else f".{self.precision}.{self.to}"
        return self.out or self.checkpoint.with_suffix(suffix)


@dataclass(frozen=True)
class Tried:
    """What a model did with the test set."""

    name: str
    accuracy: float  # 0..1
    difference: float  # largest of a logit from the original's
    largest: float  # logit, without its sign
    megabytes: float  # of the file; of a checkpoint, which holds the optimizer's state too, of its weights
    milliseconds: dict[int, float]  # {images a call: median}


def main() -> None:
    """Export and print."""
    options = parse_arguments(Options, "python -m fastcifar.export")
    tell(export(options), show, as_json=options.json)


def export(options: Options) -> dict[str, Any]:
    """Write the file and return the figures of both as plain values. Raises InputError, with no file left, when it differs."""
    set_up_process(CPU, deterministic=True)
    path = options.path
    if path.exists() and not options.force:
        raise InputError(f"{path} exists: choose another --out, or replace it with --force")
    original = load(options.checkpoint)
    test, manifest = load_resident(options.data / "test.beton", CPU, limit=options.limit_test)
    require_same_kind(options.checkpoint, original, options.data, test, manifest.class_names)
    with atomic_path(path) as partial, quiet():
        write(partial, options, test)
        rows = list(tried(original, options.checkpoint.name, {path.name: (partial, options.to)}, test))
        if options.precision == "fp32" and not rows[1].difference <= BOUND * rows[0].largest:
            raise InputError(
                f"{path} was not kept: its logits differ from {options.checkpoint}'s by {rows[1].difference:.2g} "
                f"of {rows[0].largest:.3g}: try another --to, and report this"
            )
    return {
        "out": str(path), "arch": original.arch, "epoch": original.epoch, "precision": options.precision,
        "data": manifest.name, "synthetic": manifest.synthetic, "images": len(test), "hardware": device_name(CPU),
        "rows": [asdict(row) for row in rows],
    }  # fmt: skip


class Program(nn.Module):
    """PixelClassifier in operations that every format has, for any N: uint8 images [N, H, W, 3] to float32 logits."""

    offset: Tensor
    scale: Tensor

    def __init__(self, model: PixelClassifier, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.network, self.dtype = deepcopy(model.network), dtype
        fold_batch_norms(self.network)
        for layer in self.network.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):  # a batch norm's statistics stay float32
                layer.to(dtype)
        self.register_buffer("offset", 255 * model.mean)
        self.register_buffer("scale", 1 / (255 * model.std))
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        normalised = (images.float() - self.offset) * self.scale  # as `kernels.augment.reference.normalise` rounds it
        return self.network(normalised.permute(0, 3, 1, 2).to(self.dtype)).float()


class LayersTracer(torch.fx.Tracer):
    """Sees our batch norm as one node."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, BatchNorm2d) or super().is_leaf_module(module, name)


def fold_batch_norms(network: nn.Module) -> None:
    """Fold each batch norm into the convolution whose output only it uses.

        g ((w x + b) - m) / sqrt(v + e) + h = (w g / sqrt(v + e)) x + (b - m) g / sqrt(v + e) + h

    Max pooling in between commutes with it where every g is positive.
    """
    layers = dict(network.named_modules())
    for node in LayersTracer().trace(network).nodes:
        bn = layers.get(node.target) if node.op == "call_module" else None
        if not isinstance(bn, BatchNorm2d):
            continue
        between = (nn.Identity, nn.MaxPool2d) if bool((bn.weight > 0).all()) else (nn.Identity,)
        before = node.args[0]
        while len(before.users) == 1 and isinstance(layers.get(before.target), between):
            before = before.args[0]
        conv = layers.get(before.target)
        if isinstance(conv, nn.Conv2d) and len(before.users) == 1:
            network.set_submodule(before.target, fuse_conv_bn_eval(conv, bn))
            network.set_submodule(node.target, nn.Identity())


def write(path: Path, options: Options, test: ResidentSet) -> None:
    """Write the file, for images of the size of `test`."""
    example = torch.zeros(2, *test.images.shape[1:], dtype=torch.uint8)  # no picture, since a pt2 keeps it
    model = load(options.checkpoint, kernels="torch")
    if options.to == "safetensors":
        path.write_bytes(safetensors_bytes(model))
        return
    program = Program(model, torch.bfloat16 if options.bf16 else torch.float32)
    if options.to == "torchscript":
        torch.jit.save(torch.jit.trace(program, example), str(path))
        return
    graph = torch.export.export(program, (example,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    for node in graph.graph.nodes:
        node.meta.pop("stack_trace", None)  # the paths of this machine
    if options.to == "pt2":
        buffer = io.BytesIO()  # of a name without .pt2 it would complain
        torch.export.save(graph, buffer)
        path.write_bytes(buffer.getvalue())
        return
    exported = torch.onnx.export(graph, input_names=["images"], output_names=["logits"], verbose=False)
    assert exported is not None
    if options.int8:
        quantise(exported.model_proto, path, calibration_images(options.data))
    else:
        path.write_bytes(exported.model_proto.SerializeToString())


def safetensors_bytes(model: Trained) -> bytes:
    """The network's weights under its own names; as text beside them what `read_safetensors` and others need."""
    from safetensors.torch import save

    facts = {name: getattr(model, name) for name in ("arch", "squeeze_excitation", "stem_stride", "epoch", "class_names")}
    facts |= asdict(model.preprocessing)
    weights = {name: tensor.contiguous() for name, tensor in model.network.state_dict().items()}
    return save(weights, {"format": "pt"} | {name: json.dumps(value) for name, value in facts.items()})


def read_safetensors(path: Path) -> PixelClassifier:
    """The model of a file that `safetensors_bytes` made."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        facts = {name: json.loads(text) for name, text in file.metadata().items() if name != "format"}
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
    shape = {name: facts[name] for name in ("squeeze_excitation", "stem_stride")}
    network = build_model(facts["arch"], len(facts["class_names"]), **shape)
    network.load_state_dict(weights)
    return PixelClassifier(place(network, CPU).eval(), torch.tensor(facts["mean"]), torch.tensor(facts["std"]))


def calibration_images(data: Path) -> list[Tensor]:
    """Batches of the training images that come first in epoch 0 of seed 0: keyed, so always the same."""
    train, _ = load_resident(data / "train.beton", CPU)
    return list(train.images[epoch_order(train.index, 0, 0)[:CALIBRATION]].split(64))


def quantise(model: Any, path: Path, batches: list[Tensor]) -> None:
    """Write an ONNX model with 8-bit convolutions and linear layers: weights by channel, activations by range (static QDQ)."""
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]  # has no types
        def __init__(self) -> None:
            self.batches = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch.numpy()}

    quantization.quantize_static(model, str(path), Reader(), per_channel=True)


def opened(path: Path, to: Format) -> Run:
    """What runs an exported file, on this process's number of threads."""
    if to == "safetensors":
        return read_safetensors(path)
    if to == "torchscript":
        return torch.jit.load(str(path))
    if to == "pt2":
        return torch.export.load(io.BytesIO(path.read_bytes())).module()
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path.read_bytes(), settings, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def tried(original: Trained, name: str, files: dict[str, tuple[Path, Format]], test: ResidentSet) -> Iterator[Tried]:
    """The rows of the table: the original, called `name`, then each of `files` by its name."""
    runs: dict[str, Run] = {name: original, **{name: opened(*file) for name, file in files.items()}}
    weights = sum(tensor.nbytes for tensor in original.state_dict().values())
    sizes = [weights, *(path.stat().st_size for path, _ in files.values())]
    with torch.inference_mode():
        outputs = [torch.cat([run(images) for images in test.images.split(BATCH)]) for run in runs.values()]
        batches = {count: test.images[torch.arange(count) % len(test)] for count in LATENCY}
        milliseconds = {count: latencies(runs.values(), images, LATENCY[count]) for count, images in batches.items()}
    for number, (name, size, logits) in enumerate(zip(runs, sizes, outputs, strict=True)):
        yield Tried(
            name=name,
            accuracy=float((logits.argmax(1) == test.labels).double().mean()),
            difference=float((logits - outputs[0]).abs().max()),
            largest=float(logits.abs().max()),
            megabytes=size / 1e6,
            milliseconds={count: times[number] for count, times in milliseconds.items()},
        )


def latencies(runs: Iterable[Run], images: Tensor, rounds: int) -> list[float]:
    """Median milliseconds of a call of each, in turns, after two calls that warm it up."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds + 2):
        for run, taken in zip(runs, times, strict=True):
            began = time.perf_counter()
            run(images)
            taken.append(1000 * (time.perf_counter() - began))
    return [median(taken[2:]) for taken in times]


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of the exporters, which are about their own insides."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(logging.NOTSET)


def show(result: dict[str, Any], console: Console) -> None:
    """Print the figures for people."""
    warn_synthetic(console, result["synthetic"], result["data"])
    console.print(f"{result['arch']} after epoch {result['epoch']}: {result['images']:,} test images of {result['data']}")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), caption=f"{result['hardware']}; medians, timed in turns")
    for heading in ("", "top-1", "logits differ by", "MB", *(f"ms, batch {count}" for count in LATENCY)):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for row in result["rows"]:
        times = [f"{value:.2f}" for value in row["milliseconds"].values()]
        table.add_row(row["name"], f"{row['accuracy']:.2%}", f"{row['difference']:.2g}", f"{row['megabytes']:.2f}", *times)
    console.print(table)
    console.print(f"the largest logit is {result['rows'][0]['largest']:.3g}; a checkpoint's MB are those of its weights")
    console.print(f"{result['out']}: uint8 images [N, H, W, 3] in, logits out")


if __name__ == "__main__":
    run_command(main)
