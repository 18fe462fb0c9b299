"""A whitening stem's filters: NumPy's covariance of what they give, and that training begins with them."""

import numpy as np
import pytest
import torch

from fastcifar.dataset import CIFAR10_MEAN, CIFAR10_STD, load_splits
from fastcifar.models import build_model
from fastcifar.models.whitening import EPS, whitening_filters
from fastcifar.recipes import Recipe, RunOptions
from fastcifar.state import build_state
from tests.conftest import learnable_images

CPU = torch.device("cpu")


def test_the_outputs_have_the_identity_as_covariance():
    images = learnable_images(np.arange(250) % 10, np.random.default_rng(0))
    filters = whitening_filters(torch.from_numpy(images), torch.tensor(CIFAR10_MEAN), torch.tensor(CIFAR10_STD)).numpy()
    normalised = (images / 255.0 - CIFAR10_MEAN) / CIFAR10_STD
    patches = np.lib.stride_tricks.sliding_window_view(normalised, (2, 2), (1, 2)).reshape(-1, 12)
    spread = np.linalg.eigvalsh(patches.T @ patches / len(patches))
    outputs = patches @ filters.reshape(24, 12).astype(np.float64).T
    covariance = outputs.T @ outputs / len(outputs)
    expected = np.diag(spread / (spread + EPS))  # the identity, but for EPS
    np.testing.assert_allclose(covariance, np.block([[expected, -expected], [-expected, expected]]), atol=1e-5)
    assert expected.min() < 1 - 1e-4  # so that EPS is seen


@pytest.mark.parametrize("stream", [False, True])
def test_a_run_begins_with_the_first_training_images_whitened(betons, stream, monkeypatch):
    monkeypatch.setattr("fastcifar.models.whitening.IMAGES", 20)
    limits = {"limit_train": 0, "limit_test": 0, "val_fraction": 0.25}
    data = load_splits(betons, CPU, **limits, seed=0, verify=False, stream=stream)
    state = build_state("speed94_half", Recipe(ema_decay=0.9), RunOptions(seed=3), data, CPU)
    torch.manual_seed(3)
    weights = build_model("speed94_half").state_dict()
    weights["stem.0.weight"] = whitening_filters(data.train.fetch(torch.arange(20)).images, data.mean, data.std)
    for model in (state.model, state.average.model):
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, weights[name], rtol=0, atol=0, msg=name)
    held = [p for group in state.optimizer.param_groups for p in group["params"]]
    assert not any(p is state.model.stem[0].weight for p in held)
