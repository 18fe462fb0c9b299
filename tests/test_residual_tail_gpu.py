"""`kernels.residual_tail` on CUDA: real shapes in real dtypes, captured, compiled, and beyond 2^31 elements."""

from copy import deepcopy

import pytest
import torch

from fastcifar.models import build_model, place
from kernels.residual_tail import residual_tail_fusable
from tests.tail_cases import FORMS, TRITON, Case

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
BATCH = 512
CASES = [
    Case((BATCH, 32, 32, 32), "relu"),
    Case((BATCH, 64, 16, 16), "mish", 4, se_activation="mish"),
    Case((BATCH, 128, 8, 8), "relu", 8),
    Case((BATCH, 256, 4, 4), "relu", 16),
    Case((BATCH, 256, 8, 8), "mish", 16, se_activation="mish", biases=True),
    Case((BATCH, 45, 32, 32), "relu", shortcut=False),
    Case((BATCH, 48, 16, 16), "mish", shortcut=False),
    Case((BATCH, 90, 16, 16), "relu", 3),
    Case((BATCH, 170, 8, 8), "none", 7),
    Case((BATCH, 185, 2, 2), "relu"),
    Case((BATCH, 340, 4, 4), "relu", 14, shortcut=False),
    Case((7, 45, 5, 5), "mish", 2),
    Case((1, 64, 32, 32), "relu", 4),
    Case((BATCH, 32, 32, 32), "relu", training=False),
    Case((BATCH, 256, 8, 8), "mish", 16, training=False),
    Case((1, 185, 1, 1), "mish", 8, training=False),
]


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_result_and_gradients_are_as_exact_as_eager_pytorch(case, dtype, name):
    case.check(FORMS[name], dtype, device="cuda")


@pytest.mark.parametrize("kind", ["large", "tiny", "constant", "strided"])
@pytest.mark.parametrize("case", [CASES[2], CASES[5], CASES[9], CASES[11], CASES[14]], ids=str)
def test_hard_inputs(case, kind):
    for dtype in (torch.bfloat16, torch.float32):
        case.check(TRITON, dtype, kind, "cuda")


@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[6], CASES[13]], ids=str)
def test_twice_the_same_is_the_same_to_the_bit(case):
    inputs = case.inputs(torch.bfloat16, device="cuda")
    first, second = case.run(TRITON, inputs), case.run(TRITON, inputs)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("case", [CASES[2], CASES[6], CASES[14]], ids=str)
def test_a_captured_graph_replays_on_new_inputs(case):
    inputs, fresh = (case.inputs(torch.bfloat16, kind, "cuda") for kind in ("plain", "large"))
    expected = case.run(TRITON, fresh)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles outside capture
        case.run(TRITON, inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = case.run(TRITON, inputs)
    for name, x in inputs.items():
        x.copy_(fresh[name])
    graph.replay()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("kernels", ["auto", "triton", "fusable"])
@pytest.mark.parametrize("arch", ["mish_se_resnet18", "light_resnet18"])
def test_a_network_compiles_into_one_graph_and_learns_the_same(arch, kernels):
    torch.manual_seed(0)
    images = torch.randn(64, 3, 32, 32, device=CUDA).contiguous(memory_format=torch.channels_last)
    expected, gradients = None, None
    peer = place(build_model(arch, kernels="torch"), CUDA)
    state = deepcopy(peer.state_dict())
    for model in (peer, place(build_model(arch, kernels=kernels), CUDA)):
        model.load_state_dict(state)
        forward = model if model is peer else torch.compile(model, fullgraph=True, dynamic=False)
        with torch.autocast("cuda", torch.bfloat16):
            logits = forward(images)
        logits.float().square().mean().backward()
        found = torch.cat([p.grad.flatten() for p in model.parameters()])
        if expected is None:
            expected, gradients = logits.detach().float(), found
    assert torch.nn.functional.cosine_similarity(logits.float().flatten(), expected.flatten(), 0) > 0.99
    assert torch.nn.functional.cosine_similarity(found, gradients, 0) > 0.9
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, peer.get_buffer(name), rtol=0.05, atol=0.02)


def test_the_compiled_fusable_form_is_as_exact_as_eager_pytorch():
    for case in (CASES[1], CASES[7], CASES[14]):
        torch._dynamo.reset()
        case.check(torch.compile(residual_tail_fusable, fullgraph=True), torch.bfloat16, device="cuda")


@pytest.mark.parametrize("units", [0, 4])
def test_more_than_2_to_the_31_elements(units):
    images = 2**31 // (64 * 1024) + 2
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free device memory")
    few = Case((2, 64, 32, 32), "relu", units)
    inputs = few.inputs(torch.bfloat16, device="cuda")
    for name in ("conv_out", "shortcut", "gradient"):  # copies of one image: the batch's statistics are its own
        inputs[name] = inputs[name][:1].expand(2, -1, -1, -1).contiguous(memory_format=torch.channels_last)
    expected = few.run(TRITON, inputs)
    for name in ("conv_out", "shortcut", "gradient"):
        inputs[name] = inputs[name][:1].expand(images, -1, -1, -1).contiguous(memory_format=torch.channels_last)
    found = Case((images, 64, 32, 32), "relu", units).run(TRITON, inputs)
    for name in ("result", "gradient of shortcut", "gradient of conv_out"):
        for image in (0, images // 2, images - 1):
            torch.testing.assert_close(found[name][image], expected[name][0], rtol=0.02, atol=0.02)
