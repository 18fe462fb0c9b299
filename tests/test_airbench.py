"""The adapter of other people's scripts, tried on a small script of the same shape."""

import json
import sys
from textwrap import dedent

import pytest

from bench import airbench
from bench.outside import read_statement

# It trains the bias of a single layer and notes what it was given.
SCRIPT = """
    import sys
    with open(sys.argv[0]) as f:
        code = f.read()
    import torch
    from math import ceil
    from torch import nn

    class CifarLoader:
        def __init__(self, train):
            data = torch.load(f"cifar10/{'train' if train else 'test'}.pt", map_location=torch.device("cuda"))
            self.images, self.labels = data["images"].half().permute(0, 3, 1, 2), data["labels"]
            self.batch_size = 16

        def __len__(self):
            return len(self.images) // self.batch_size

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3072, 10, bias=False).half()

        def forward(self, x):
            return self.head(x.flatten(1))

    def print_training_details(variables, is_final_entry):
        print(variables["run"], variables["epoch"], variables["steps_done"], variables["drawn"])

    def main(run, model):
        train_loader, test_loader = CifarLoader(True), CifarLoader(False)
        total_train_steps = ceil(8 * len(train_loader))
        bias_steps = ceil(3 * len(train_loader))
        starter, ender = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        time_seconds, steps_done, drawn = 0.0, (total_train_steps, bias_steps), torch.rand(()).item()
        for epoch in range(ceil(total_train_steps / len(train_loader))):
            starter.record()
            model(train_loader.images)
            ender.record()
            torch.cuda.synchronize()
            time_seconds += 1e-3 * starter.elapsed_time(ender)
            val_acc = (epoch + 1) / 10
            print_training_details(locals(), is_final_entry=False)
        epoch, tta_val_acc = "eval", 0.9
        print_training_details(locals(), is_final_entry=True)
        return tta_val_acc

    if __name__ == "__main__":
        model = Net().cuda().to(memory_format=torch.channels_last)
        main("warmup", model)
        print([main(run, model) for run in range(200)])
"""


@pytest.fixture
def script(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)
    path = tmp_path / "fake.py"
    path.write_text(dedent(SCRIPT))
    return path


def test_a_script_runs_on_our_data_and_its_table_becomes_runs(script, betons, call):
    arguments = ("--seeds", "3", "4", "3", "--epochs", "2", "--data", betons, "--limit-train", "32", "--limit-test", "10")
    *printed, last = call(airbench.main, script, *arguments, "--no-compile", "--device", "cpu").strip().splitlines()
    stated = read_statement("fake", last)
    assert printed[0].startswith("warmup 0 (8, 3)")  # 8 steps, of which the bias takes part in the same share
    draws = [line.split()[-1] for line in printed if line.startswith(("0 0", "1 0", "2 0"))]
    assert draws[0] == draws[2] != draws[1]
    assert printed[-1] == "[0.9, 0.9, 0.9]"
    assert [run.seed for run in stated["runs"]] == [3, 4, 3]
    for run, rate in zip(stated["runs"], stated["images_per_second"], strict=True):
        assert (run.images_per_epoch, run.test_images, run.batch_size) == (32, 10, 16)
        assert run.epoch_top1 == [0.1, 0.9]  # of the last epoch, that of the views
        assert run.epoch_flops == [3 * 2 * 30_720 * 32] * 2
        assert rate == pytest.approx(64 / sum(run.train_seconds))
    assert json.loads(last)["top1"] == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("range(200)", "range(100)", "has no number of runs to replace"),
        (".cuda()", "", "has no model on the GPU to replace"),
        ("x.flatten(1)", 'x.flatten(1).to("cuda")', "also needs a GPU for 'return self.head("),
    ],
)
def test_what_cannot_be_replaced_stops_with_a_line(script, old, new, words, refused):
    script.write_bytes(script.read_text().replace(old, new).encode() + b"# \xff")
    assert words in refused(airbench.main, script, "--device", "cpu")


def test_on_a_gpu_only_the_protocol_is_replaced(script):
    text, epochs = airbench.adapted(script, on_cpu=False)
    assert epochs == 8
    for mine in ("host.runs()", "@host.listen\n"):
        text = text.replace(mine, {"host.runs()": "range(200)"}.get(mine, ""))
    for own in ("8", "3"):
        text = text.replace(f"host.steps({own}, train_loader, run)", f"ceil({own} * len(train_loader))")
    assert text == script.read_text()
