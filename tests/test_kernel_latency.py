"""The latency benchmark without a GPU: what is refused, when a win is claimed, what is recorded. Its stopwatch is told."""

import json
import sys
import weakref
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from bench import kernel_latency
from bench.kernel_latency import KERNELS, KernelRow, Measurement, Options, call, check, disagreement, input_sets, measure
from fastcifar import augmentation
from fastcifar.errors import InputError
from kernels import backends
from kernels.mish.reference import mish as eager_mish
from kernels.squeeze_excite.reference import squeeze_excite as eager_squeeze_excite

CPU = torch.device("cpu")
SHAPE = (8, 4, 4)


class Told:
    """A stopwatch that runs everything and says what it was told a replay takes; every round a little more."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.per_call, self.calls, self.replays, self.kept = seconds, {}, [], []

    def prepare(self, name, calls, *, keep):
        self.calls[name] = len(calls)
        self.kept.append((name, keep))
        return lambda: [call() for call in calls]

    def seconds(self, name, replay):
        replay()
        self.replays.append(name)
        drift = 1 + 0.0001 * len(self.replays) / len(self.calls)
        return self.per_call[name] * self.calls[name] * drift

    def peak_memory(self, call):
        return 1_000_000

    def launches(self, call):
        return None


@pytest.fixture(autouse=True)
def few_sets(monkeypatch):
    monkeypatch.setattr("bench.kernel_latency.COLD_BYTES", 3e4)
    monkeypatch.setattr("bench.kernel_latency.IMAGES", 20)


def measured(name="mish", ours=None, seconds=None):
    row = KERNELS[name]
    forms = {"eager": row.eager, "compiled": row.eager, "ours": ours or row.eager}
    stopwatch = Told(seconds or {"eager": 8e-6, "compiled": 4e-6, "ours": 2e-6, "copy": 1e-6})
    settings = {"batch": 2, "dtype": torch.float32, "device": CPU, "rounds": 30}
    return measure(row, SHAPE, forms, stopwatch, **settings), stopwatch


def test_each_direction_is_timed_cold_and_hot_with_all_forms_in_turns():
    results, stopwatch = measured()
    assert [(each.direction, each.cache) for each in results] == [
        ("forward", "cold"), ("forward", "hot"), ("forward+backward", "cold"), ("forward+backward", "hot"),
    ]  # fmt: skip
    for each in results:
        assert {name: len(seconds) for name, seconds in each.seconds.items()} == {"eager": 30, "compiled": 30, "ours": 30}
        assert each.best_baseline == "compiled"
        assert each.speedup.estimate == pytest.approx(2, rel=0.01)
        assert each.won
    assert len(stopwatch.replays) == 4 * 32 * 4  # states, rounds, forms and the copy
    assert len(set(map(tuple, zip(*[iter(stopwatch.replays)] * 4, strict=True)))) > 1  # in changing order
    # Cold, no call's results take the memory of an earlier call's, the copy's neither.
    assert [keep for _, keep in stopwatch.kept] == [True] * 4 + [False] * 4 + [True] * 4 + [False] * 4
    # Mish forward moves 2 maps in 2 us, with its backward pass 5; the copy 2 maps in 1 us.
    assert [each.share_of_copy for each in results] == pytest.approx([0.5, 0.5, 1.25, 1.25], rel=0.01)
    json.dumps([each.to_json() for each in results], allow_nan=False)


def test_inputs_rotate_over_more_than_the_cache_holds():
    sets = input_sets(KERNELS["squeeze_excite"], SHAPE, 2, torch.float32, CPU)
    assert sum(x.numel() * 4 for (x, *_), _ in sets) > 3e4
    assert len({x.data_ptr() for (x, *_), _ in sets}) == len(sets)
    assert not torch.equal(sets[0][0][0], sets[1][0][0])


@pytest.mark.parametrize("keep", [True, False])
def test_a_cold_captures_results_stay_alive_and_a_hot_ones_are_given_back(keep, monkeypatch):
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda what: nullcontext())
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda: stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=None))
    results, alive = [], []

    def call():
        alive.append(sum(result() is not None for result in results))
        result = torch.empty(1)
        results.append(weakref.ref(result))
        return (result,)

    kernel_latency.Stopwatch().prepare("mish", [call] * 4, keep=keep)
    assert alive == [0, 0, 0] + ([0, 1, 2, 3] if keep else [0, 0, 0, 0])  # three calls before the capture


def test_a_call_returns_the_result_and_every_gradient():
    (inputs, gradient), *_ = input_sets(KERNELS["squeeze_excite"], SHAPE, 2, torch.float32, CPU)
    y, *gradients = call(eager_squeeze_excite, "forward+backward", inputs, gradient)
    assert torch.equal(y, eager_squeeze_excite(*inputs))
    assert not y.requires_grad
    assert [g.shape for g in gradients] == [t.shape for t in inputs]


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (lambda x: 1.001 * eager_mish(x), "result: error 0.001 against float64"),
        (lambda x: eager_mish(x).detach() + 0 * x, "gradient 1: error 1 against float64"),
        (lambda x: eager_mish(x) * torch.nan, "result: error nan against float64"),
        (lambda x: eager_mish(x.double()), "in torch.float64, eager's is"),
        (lambda x: torch.ops.no.kernel(x), "AttributeError: "),
    ],
)
def test_a_wrong_kernel_is_not_timed_and_the_others_are(wrong, reason):
    results, stopwatch = measured(ours=wrong)
    assert "ours" not in stopwatch.replays
    for each in results:
        assert reason in each.refused["ours"]
        assert set(each.seconds) == {"eager", "compiled"}
        assert each.speedup is None
        assert not each.won
    assert kernel_latency.latency_table(results).row_count == 4


@pytest.mark.parametrize("name", [name for name, row in KERNELS.items() if row.exact is None])
def test_every_row_agrees_with_itself_and_with_the_triton_kernel(name):
    row = KERNELS[name]
    assert row.shapes
    inputs, gradient = input_sets(row, SHAPE, 2, torch.float32, CPU)[0]
    forms = [row.eager, row.ours] + ([row.same_algebra] if row.same_algebra is not None else [])
    assert [disagreement(form, row.eager, inputs, gradient) for form in forms] == [None] * len(forms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_augmentation_is_held_to_numpys_pixels_and_timed_forward_only(dtype):
    row = KERNELS["augment"]
    (shape,) = row.shapes
    stopwatch = Told({"eager": 8e-6, "ours": 2e-6, "copy": 1e-6})
    ours = row.ours if dtype is torch.float32 else row.eager  # Triton's interpreter truncates to bfloat16
    forms = {"eager": row.eager, "ours": ours}
    results = measure(row, shape, forms, stopwatch, batch=4, dtype=dtype, device=CPU, rounds=2)  # interpreted, each takes long
    assert kernel_latency.shape_name(shape) == "3x32x32"
    assert [(each.direction, each.cache, each.refused) for each in results] == [("forward", "cold", {}), ("forward", "hot", {})]
    written = 3072 * dtype.itemsize
    assert {(each.bytes, each.copy_bytes) for each in results} == {(4 * (3072 + written), 4 * 2 * written)}


def test_the_augmentations_sets_are_batches_of_one_resident_set():
    row = KERNELS["augment"]
    sets = input_sets(row, row.shapes[0], 4, torch.bfloat16, CPU)
    assert len({images.data_ptr() for (images, *_), _ in sets}) == 1
    assert [int(inputs[4]) for inputs, _ in sets] == [4 * number for number in range(len(sets))]


def test_an_augmentation_off_by_one_rounding_is_refused_and_a_compiled_form_is_not():
    row = KERNELS["augment"]
    inputs = row.inputs(row.shapes[0], 4, torch.float32, CPU, 0)
    towards = torch.tensor(torch.inf)

    def rounded_otherwise(*inputs):
        x, labels = row.eager(*inputs)
        return torch.nextafter(x, towards), labels

    def other_labels(*inputs):
        x, labels = row.eager(*inputs)
        return x, labels + 1

    assert "Mismatched elements" in check(row, "ours", rounded_otherwise, inputs, None)
    assert check(row, "compiled", rounded_otherwise, inputs, None) is None
    assert "Mismatched elements" in check(
        row, "compiled", lambda *inputs: (row.eager(*inputs)[0].flip(3), inputs[1][:4]), inputs, None
    )
    assert "Mismatched elements" in check(row, "compiled", other_labels, inputs, None)
    assert "ValueError: " in check(row, "compiled", lambda *inputs: row.eager(*inputs)[0], inputs, None)


def test_a_win_needs_an_interval_that_excludes_one_against_every_form():
    results, _ = measured(seconds={"eager": 2e-6, "compiled": 9e-6, "ours": 2e-6, "copy": 1e-6})
    assert not any(each.won for each in results)
    noisy = replace(results[0], seconds={"eager": [2.0, 0.5] * 20, "ours": [1.0] * 40})
    assert not noisy.won
    clear = replace(noisy, seconds={"eager": [2.0 + 0.01 * (7 * k % 11) for k in range(40)], "ours": [1.0] * 40})
    assert clear.won
    assert not replace(clear, refused={"compiled": "did not run"}).won
    assert not replace(
        clear, seconds={"ours": [1.0] * 40, "compiled": [9.0 + 0.01 * (7 * k % 11) for k in range(40)]}
    ).won  # no eager: nothing to be sure with


def test_the_table_shows_both_times_and_the_ratio_with_its_interval():
    console = Console(width=200)
    with console.capture() as captured:
        console.print(kernel_latency.latency_table(measured()[0]))
    line = next(line for line in captured.get().splitlines() if "forward+backward cold" in line)
    assert line.split()[:5] == ["mish", "8x4x4", "forward+backward", "cold", "2.0"]
    assert "compiled 4." in line
    assert "2.00x [2.00, 2.00]" in line
    assert "125%" in line or "124%" in line


def test_only_maps_that_won_cold_in_both_directions_are_recorded_and_the_rest_stays(tmp_path):
    path = tmp_path / "measured.json"
    before = {"mish": ["bf16 7x7x7", "fp32 8x4x4", "fp32 9x9x9"], "other": ["fp32 2x2x2"]}
    path.write_text(json.dumps({"H100": {"mish": ["bf16 1x1x1"]}, "H200": before}))
    won, _ = measured()
    lost = [replace(each, shape="7x7x7") for each in won]
    lost[2] = replace(lost[2], seconds=lost[2].seconds | {"ours": lost[2].seconds["eager"]})
    hot_lost = [replace(each, shape="6x6x6", dtype="bfloat16") for each in won]
    hot_lost[3] = replace(hot_lost[3], seconds=hot_lost[3].seconds | {"ours": hot_lost[3].seconds["eager"]})
    kernel_latency.record(path, "H200", [*won, *lost, *hot_lost])
    mish = ["bf16 6x6x6", "bf16 7x7x7", "fp32 8x4x4", "fp32 9x9x9"]  # the loss in fp32 says nothing of bf16
    expected = {"H100": {"mish": ["bf16 1x1x1"]}, "H200": {"mish": mish, "other": ["fp32 2x2x2"]}}
    assert json.loads(path.read_text()) == expected
    kernel_latency.record(path, "H200", [replace(each, shape="9x9x9") for each in lost])
    assert json.loads(path.read_text())["H200"]["mish"] == ["bf16 6x6x6", "bf16 7x7x7", "fp32 8x4x4"]


def test_what_is_recorded_is_what_auto_reads(tmp_path, monkeypatch):
    kernel_latency.record(tmp_path / "measured.json", "H200", measured()[0])
    monkeypatch.setattr(backends, "WINS", backends.read_wins(tmp_path / "measured.json"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name="H200"))
    assert backends.has_won("mish", torch.empty(512, *SHAPE))
    assert not backends.has_won("mish", torch.empty(512, *SHAPE, dtype=torch.bfloat16))
    assert not backends.has_won("mish", torch.empty(512, 8, 4, 5))
    assert not backends.has_won("squeeze_excite", torch.empty(512, *SHAPE))


@pytest.fixture
def few_checked(betons, monkeypatch):
    """Options, console, and a set whose sample indices are not in order: 60 of the beton's images from the 140th back."""
    data = kernel_latency.load(betons, CPU)
    backwards = replace(data, train=data.train.subset(torch.arange(140, 80, -1)))
    monkeypatch.setattr(kernel_latency, "load", lambda folder, device: backwards)
    monkeypatch.setattr(
        kernel_latency, "pipeline", lambda name, data, folder, batch_size, rounds, console: (batch_size, rounds)
    )
    return Options(rounds=31, batch_size=7, data=betons), Console(quiet=True)


def test_the_cpu_part_times_what_shows_the_right_pixels(few_checked):
    assert kernel_latency.cpu_part(*few_checked) == dict.fromkeys(kernel_latency.CPU_PIPELINES, (7, 31))


def test_the_cpu_part_does_not_time_a_kernel_that_differs_when_it_overwrites_a_batch(few_checked, monkeypatch):
    right = kernel_latency.augment

    def wrong(*arguments, out=None, **named):
        x, labels = right(*arguments, out=out, **named)
        return (x if out is None else x.flip(3)), labels

    monkeypatch.setattr(kernel_latency, "augment", wrong)
    with pytest.raises(InputError, match="NumPy's pixels on this machine: not timed"):
        kernel_latency.cpu_part(*few_checked)


def test_the_cpu_part_does_not_time_a_loop_that_differs_from_pytorch(few_checked, monkeypatch):
    right = augmentation.augment

    def wrong(*arguments):
        return right(*arguments) + (1e-7 if "numba" in arguments else 0)

    monkeypatch.setattr(augmentation, "augment", wrong)
    with pytest.raises(InputError, match="PyTorch's pixels on this machine: not timed"):
        kernel_latency.cpu_part(*few_checked)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what happens without a GPU")
def test_without_a_gpu_one_line_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kernel_latency, "cpu_part", lambda options, console: {"measured": True})
    monkeypatch.setattr(sys, "argv", ["kernel_latency.py", "--out", str(tmp_path / "out.json")])
    kernel_latency.main()
    assert capsys.readouterr().out.splitlines() == [
        "no CUDA device: the Triton kernels are not timed, what runs on the CPU follows"
    ]
    results = json.loads((tmp_path / "out.json").read_text())
    assert results["cpu"] == {"measured": True}
    assert results["versions"]["triton"]


def test_bad_options_are_named(monkeypatch):
    with pytest.raises(InputError, match="rounds must be at least 30, got 3"):
        Options(rounds=3)
    with pytest.raises(InputError, match="unknown kernel 'mesh': did you mean mish"):
        Options(kernels=("mesh",))
    with pytest.raises(InputError, match="unknown map '31x32x32'"):
        Options(shapes=("31x32x32",))
    with pytest.raises(InputError, match="batch_size must be at least 1, got 0"):
        Options(batch_size=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what happens without a GPU")
def test_what_is_for_triton_is_refused_without_a_gpu():
    assert Options(kernels=tuple(KERNELS), batch_size=8, dtype="bf16").batch_size == 8
    for given in ({"kernels": ("mish",)}, {"shapes": ("45x32x32",)}, {"dtype": "fp32"}, {"record": True}):
        with pytest.raises(InputError, match=f"^{next(iter(given))}: for the Triton kernels on a CUDA device"):
            Options(**given)
    with pytest.raises(InputError, match="dtype, kernels: for the Triton kernels on a CUDA device, and there is none"):
        Options(kernels=("mish",), dtype="fp32")


def test_the_gpus_part_goes_through_every_map(monkeypatch):
    row = KernelRow("mish", ((8, 4, 4), (4, 2, 2)), KERNELS["mish"].inputs, lambda x: 2 * x, eager_mish, 2, 3)
    stopwatch = Told({"eager": 8e-6, "ours": 2e-6, "copy": 1e-6})
    monkeypatch.setattr(kernel_latency, "KERNELS", {"mish": row})
    monkeypatch.setattr(kernel_latency, "Stopwatch", lambda: stopwatch)
    monkeypatch.setattr(kernel_latency, "forms_of", lambda row: {"eager": row.eager, "ours": row.ours})
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    lines = []
    console = SimpleNamespace(print=lambda text, **style: lines.append(text))
    options = SimpleNamespace(kernels=("mish",), shapes=(), batch_size=2, dtype="fp32", rounds=30)
    results = kernel_latency.gpu_part(options, CPU, console)
    assert all(isinstance(each, Measurement) for each in results)
    assert [kernel_latency.shape_name(shape) for shape in row.shapes] == [line.split()[1].rstrip(":") for line in lines[:2]]
    assert "ours is not timed: result: error" in lines[0]
    assert lines[2].row_count == 8
