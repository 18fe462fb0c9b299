"""The latency benchmark without a GPU: what is refused, when a win is claimed, what is recorded. Its clock is told."""

import json
import weakref
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from bench import kernel_latency
from bench.kernel_latency import DRAWS, KERNELS, KernelRow, Options, check, disagreement, input_sets, measure
from fastcifar import augmentation
from fastcifar.errors import InputError
from kernels.mish.reference import mish as eager_mish
from kernels.squeeze_excite.reference import squeeze_excite as eager_squeeze_excite
from tests.kernel_checks import sample

CPU = torch.device("cpu")
SHAPE = (8, 4, 4)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A few sets of few images."""
    monkeypatch.setattr(kernel_latency, "COLD_BYTES", 3e4)
    monkeypatch.setattr(kernel_latency, "IMAGES", 20)


@pytest.fixture
def told(monkeypatch):
    """A clock that runs what it is given and adds up what the forms are said to take; every turn a little more."""
    told = SimpleNamespace(elapsed=0.0, turns=0, kept=[])

    def captured(calls, *, keep):
        told.kept.append(keep)

        def seconds():
            began, told.turns = told.elapsed, told.turns + 1
            for each in calls:
                each()
            return (told.elapsed - began or 1e-6 * len(calls)) * (1 + 1e-6 * told.turns)  # the copy says nothing: 1 us

        return seconds

    def taking(seconds, form):
        def timed(*inputs):
            told.elapsed += seconds
            return form(*inputs)

        return timed

    def measured(ours=eager_mish, **seconds):
        seconds = {"eager": 8e-6, "compiled": 4e-6, "ours": 2e-6} | seconds
        forms = {name: taking(taken, ours if name == "ours" else eager_mish) for name, taken in seconds.items()}
        return measure(KERNELS["mish"], SHAPE, forms, batch=2, dtype=torch.float32, device=CPU, rounds=30)

    monkeypatch.setattr(kernel_latency, "captured", captured)
    monkeypatch.setattr(kernel_latency, "peak_memory", lambda call: 1_000_000)
    monkeypatch.setattr(kernel_latency, "launches", lambda call: None)
    told.measured = measured
    return told


def test_each_direction_is_timed_cold_and_hot_with_all_forms(told):
    results = told.measured()
    assert [(each.direction, each.cache) for each in results] == [
        ("forward", "cold"), ("forward", "hot"), ("forward+backward", "cold"), ("forward+backward", "hot"),
    ]  # fmt: skip
    for each in results:
        assert {name: len(seconds) for name, seconds in each.seconds.items()} == {"eager": 30, "compiled": 30, "ours": 30}
        assert each.best_baseline == "compiled"
        assert each.speedup.estimate == pytest.approx(2, rel=0.01)
        assert each.won
    assert told.turns == 4 * 32 * 4  # states, rounds with two untimed ones, forms and the copy
    # Cold, no call's results take the memory of an earlier call's, the copy's neither.
    assert told.kept == [True] * 4 + [False] * 4 + [True] * 4 + [False] * 4
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
    monkeypatch.setattr(torch.cuda, "CUDAGraph", SimpleNamespace)
    results, alive = [], []

    def call():
        alive.append(sum(result() is not None for result in results))
        result = torch.empty(1)
        results.append(weakref.ref(result))
        return (result,)

    kernel_latency.captured([call] * 4, keep=keep)
    assert alive == [0, 0, 0] + ([0, 1, 2, 3] if keep else [0, 0, 0, 0])  # three calls before the capture


def test_a_kernel_that_breaks_while_it_is_timed_is_not_a_figure(told):
    with pytest.raises(ZeroDivisionError):
        kernel_latency.timed({"ours": [lambda: 1 / 0], "copy": [lambda: None]}, 2, keep=True)


def test_a_call_returns_the_result_and_every_gradient():
    (inputs, gradient), *_ = input_sets(KERNELS["squeeze_excite"], SHAPE, 2, torch.float32, CPU)
    y, *gradients = kernel_latency.call(eager_squeeze_excite, "forward+backward", inputs, gradient)
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
def test_a_wrong_kernel_is_not_timed_and_the_others_are(told, wrong, reason):
    results = told.measured(ours=wrong)
    for each in results:
        assert reason in each.refused["ours"]
        assert set(each.seconds) == {"eager", "compiled"}
        assert each.speedup is None
        assert not each.won
    assert kernel_latency.latency_table(results).row_count == 4


@pytest.mark.parametrize("name", sample([name for name, row in KERNELS.items() if row.exact is None], every=3, gpu=False))
def test_every_row_agrees_with_itself_and_with_the_triton_kernel(name):
    row = KERNELS[name]
    assert row.shapes
    sets = input_sets(row, SHAPE, 2, torch.float32, CPU)[:DRAWS]
    assert len(sets) == DRAWS  # of so small a map one draw would tell of the draw, not of the kernel
    forms = [row.eager, row.ours, row.same_algebra or row.eager]
    assert [disagreement(form, row.eager, sets) for form in forms] == [None] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_augmentation_is_held_to_numpys_pixels_and_timed_forward_only(told, dtype):
    row = KERNELS["augment"]
    ours = row.ours if dtype is torch.float32 else row.eager  # Triton's interpreter truncates to bfloat16
    forms = {"eager": row.eager, "ours": ours}
    results = measure(row, *row.shapes, forms, batch=4, dtype=dtype, device=CPU, rounds=2)  # interpreted, each takes long
    assert [(each.shape, each.direction, each.cache, each.refused) for each in results] == [
        ("3x32x32", "forward", "cold", {}), ("3x32x32", "forward", "hot", {}),
    ]  # fmt: skip
    written = 3072 * dtype.itemsize
    assert {(each.bytes, each.copy_bytes) for each in results} == {(4 * (3072 + written), 4 * 2 * written)}


def test_the_augmentations_sets_are_batches_of_one_resident_set():
    row = KERNELS["augment"]
    sets = input_sets(row, row.shapes[0], 4, torch.bfloat16, CPU)
    assert len({images.data_ptr() for (images, *_), _ in sets}) == 1
    assert [int(inputs[4]) for inputs, _ in sets] == [4 * number for number in range(len(sets))]


def test_an_augmentation_off_by_one_rounding_is_refused_and_a_compiled_form_is_not():
    row = KERNELS["augment"]
    sets = input_sets(row, *row.shapes, 4, torch.float32, CPU)[:1]
    for name, change, reason in (
        ("ours", lambda x, labels: (torch.nextafter(x, torch.tensor(torch.inf)), labels), "Mismatched elements"),
        ("compiled", lambda x, labels: (torch.nextafter(x, torch.tensor(torch.inf)), labels), None),
        ("compiled", lambda x, labels: (x.flip(3), labels), "Mismatched elements"),
        ("compiled", lambda x, labels: (x, labels + 1), "Mismatched elements"),
        ("compiled", lambda x, labels: x, "ValueError: "),
    ):
        found = check(row, name, lambda *inputs, change=change: change(*row.eager(*inputs)), sets)
        assert reason in found if reason else found is None


def test_a_win_needs_an_interval_that_excludes_one_against_every_form(told):
    results = told.measured(eager=2e-6, compiled=9e-6)
    assert not any(each.won for each in results)
    noisy = replace(results[0], seconds={"eager": [2.0, 0.5] * 20, "ours": [1.0] * 40})
    assert not noisy.won
    clear = replace(noisy, seconds={"eager": [2.0 + 0.01 * (7 * k % 11) for k in range(40)], "ours": [1.0] * 40})
    assert clear.won
    assert not replace(clear, refused={"compiled": "did not run"}).won
    without_eager = replace(clear, seconds={"ours": [1.0] * 40, "compiled": clear.seconds["eager"]})
    assert not without_eager.won


def test_the_table_shows_both_times_and_the_ratio_with_its_interval(told):
    console = Console(width=200)
    with console.capture() as captured:
        console.print(kernel_latency.latency_table(told.measured()))
    line = next(line for line in captured.get().splitlines() if "forward+backward cold" in line)
    assert line.split()[:5] == ["mish", "8x4x4", "forward+backward", "cold", "2.0"]
    assert "compiled 4." in line
    assert "2.00x [2.00, 2.00]" in line
    assert "125%" in line or "124%" in line


def test_the_cpu_part_times_only_what_shows_the_right_pixels(betons, monkeypatch):
    data = kernel_latency.load_all(betons, CPU)
    backwards = replace(data, train=data.train.subset(torch.arange(140, 80, -1)))  # sample indices that are not in order
    monkeypatch.setattr(kernel_latency, "load_all", lambda folder, device: backwards)
    monkeypatch.setattr(kernel_latency, "pipeline", lambda name, data, folder, *sizes_and_console: sizes_and_console[:2])
    monkeypatch.setattr(kernel_latency, "dropout_rates", lambda *sizes_and_console: sizes_and_console[:2])
    given = Options(rounds=31, batch_size=7, data=betons), Console(quiet=True)
    assert kernel_latency.cpu_part(*given) == dict.fromkeys([*kernel_latency.CPU_PIPELINES, kernel_latency.DROPOUT], (7, 31))
    right = augmentation.augment

    def wrong_when_it_overwrites(*arguments, reuse=None, **named):
        x, labels = right(*arguments, reuse=reuse, **named)
        return (x if reuse is None else x.flip(3)), labels

    def wrong_by_pytorch(*arguments, backend, **named):
        x, labels = right(*arguments, backend=backend, **named)
        return x, labels + (backend == "torch")

    for wrong, whose in ((wrong_when_it_overwrites, "Numba's loop"), (wrong_by_pytorch, "PyTorch's form")):
        with monkeypatch.context() as patch:
            patch.setattr(augmentation, "augment", wrong)
            with pytest.raises(InputError, match=f"{whose} does not show NumPy's pixels on this machine: not timed"):
                kernel_latency.cpu_part(*given)


def test_dropouts_forms_are_timed_only_where_they_drop_the_same(monkeypatch):
    monkeypatch.setattr(kernel_latency, "DROPPED", (4, 3, 3))
    results = kernel_latency.dropout_rates(2, 30, Console(quiet=True))
    assert {name: row["images_per_second"]["rounds"] for name, row in results.items()} == dict.fromkeys(results, 30)
    assert ["times_pytorch" in row for row in results.values()] == [True, True, False]
    right = kernel_latency.dropout
    monkeypatch.setattr(kernel_latency, "dropout", lambda x, *keys, **given: right(x, *keys, **given | {"layer": 1}))
    with pytest.raises(InputError, match="dropout's loop does not give its definition's bits on this machine: not timed"):
        kernel_latency.dropout_rates(2, 30, Console(quiet=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="what happens without a GPU")
def test_without_a_gpu_one_line_says_so(tmp_path, monkeypatch, call):
    monkeypatch.setattr(kernel_latency, "cpu_part", lambda options, console: {"measured": True})
    said = call(kernel_latency.main, "--out", tmp_path / "out.json")
    assert said == "no CUDA device: the Triton kernels are not timed, what runs on the CPU follows\n"
    results = json.loads((tmp_path / "out.json").read_text())
    assert results["cpu"] == {"measured": True}
    wanted = {"hardware", "versions", "commit", "command", "device", "date", "cores", "threads", "load"}
    assert results.keys() >= wanted


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rounds": 3}, "rounds must be at least 30, got 3"),
        ({"kernels": ("mesh",)}, "unknown kernel 'mesh': did you mean mish"),
        ({"shapes": ("31x32x32",)}, "unknown map '31x32x32'"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_bad_options_are_named(given, message):
    with pytest.raises(InputError, match=message):
        Options(**given)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what happens without a GPU")
@pytest.mark.parametrize("given", [{"kernels": ("mish",)}, {"shapes": ("45x32x32",)}, {"dtype": "fp32", "kernels": ("mish",)}])
def test_what_is_for_triton_is_refused_without_a_gpu(given):
    assert Options(kernels=tuple(KERNELS), batch_size=8, dtype="bf16").batch_size == 8  # as by default
    with pytest.raises(InputError, match=f"^{', '.join(given)}: for the Triton kernels on a CUDA device, and there is none"):
        Options(**given)


def test_the_gpus_part_goes_through_every_map(told, monkeypatch):
    row = KernelRow("mish", ((8, 4, 4), (4, 2, 2)), KERNELS["mish"].inputs, lambda x: 2 * x, eager_mish, 2, 3)
    monkeypatch.setattr(kernel_latency, "KERNELS", {"mish": row})
    monkeypatch.setattr(kernel_latency, "forms_of", lambda row: {"eager": row.eager, "ours": row.ours})
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    lines = []
    console = SimpleNamespace(print=lambda text, **style: lines.append(text))
    options = SimpleNamespace(kernels=("mish",), shapes=(), batch_size=2, dtype="fp32", rounds=30)
    assert len(kernel_latency.gpu_part(options, CPU, console)) == 8
    refused = [line.partition(": result: error")[0] for line in lines[:2]]
    assert refused == [f"mish {shape}: ours is not timed" for shape in ("8x4x4", "4x2x2")]
    assert lines[2].row_count == 8
