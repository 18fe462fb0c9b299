"""What `python bench/ablate.py --study NAME` trains: the reports' own comparisons, and the trials of the speed nets."""

from itertools import accumulate

from bench.results import Ablation, Arm
from fastcifar.recipes import RECIPES

_TEXT_E = "--recipe mish_se_resnet18_text"
_PLAIN_E = f"{_TEXT_E} --weight-decay 5e-4 --head-dropout 0"
_NO_JITTER = "--brightness 0 --contrast 0 --saturation 0 --hue 0"
_NO_MIXUP = "--mixup-alpha 0 --mixup-alpha-end None --mixup-alpha-floor 0"

# airbench94_muon's recipe: rates 0.24 for filters, 0.053 for biases, 0.67 for the head; a decay of 2e-6 an image of the batch.
# Only the batch is another: so few epochs have too few steps of its 2,000 images.
_AIRBENCH = (
    "--batch-size 1000 --optimizer muon --peak-lr 0.24 --momentum 0.6 --muon-steps 3 --vector-lr-factor 0.221 "
    "--head-lr-factor 2.79 --weight-decay 0.00833 --scale-decay --loss-reduction sum "
    "--label-smoothing 0.2 --schedule linear --schedule-epochs 8 --crop-padding 2 --crop-mode reflect --flip alternating "
    "--sizes --size-epochs --frozen stem.0.bias --frozen-from 3 --eval-tta flip"
)
# airbench94's before Muon: 0.0014 for a sum of losses, 64 times that for biases, a decay of 0.002 for a step of 1,024 images.
_NESTEROV = "--optimizer nesterov --momentum 0.85 --vector-lr-factor 64 --head-lr-factor 1 --weight-decay 1.4"
_ADAMW = "--optimizer adamw --momentum 0.9 --vector-lr-factor 1 --head-lr-factor 1 --weight-decay 0.05"
# speed94's own schedule, for its half.
_PHASES = RECIPES["speed94"].recipe.phases
_SPEED94_FLAGS = (
    f"--schedule-epochs {RECIPES['speed94'].recipe.epochs} --size-epochs {' '.join(map(str, _PHASES.size_epochs))} "
    "--eval-tta flip --eval-every 99"
)


def _growing(*sizes: tuple[int, int]) -> str:
    """Flags of (pixels, epochs), one size after another. `--size-epochs` counts in eighths of the training."""
    ends = list(accumulate(epochs for _, epochs in sizes))
    starts = [f"{8 * end / ends[-1]:g}" for end in ends[:-1]]
    return f"--epochs {ends[-1]} --sizes {' '.join(str(size) for size, _ in sizes)} --size-epochs {' '.join(starts)}"


STUDIES: dict[str, Ablation] = {
    study.name: study
    for study in (
        # Report D's bar chart; it gives the order of the bars and 85.574 % (Kaggle) for its final model, which is the fourth.
        # The probability of grayscale is not stated.
        Ablation("report_d", "Report D: five models", "se_resnet18", arms=[
            Arm("1 everything", "--grayscale 0.1", "best of those with grayscale"),
            Arm("2 without mixup and cutout", f"--grayscale 0.1 {_NO_MIXUP} --cutout 0", "loses most"),
            Arm("3 without colour jitter", f"--grayscale 0.1 {_NO_JITTER}", "loses little"),
            Arm("4 without grayscale", "", "gains: grayscale hurts; 85.574 % Kaggle"),
            Arm("5 without squeeze-excitation", "--grayscale 0.1 --no-squeeze-excitation", "loses little"),
        ]),
        # Report C's table of configurations: parameters, stages N, blocks per stage B, channels C, validation accuracy.
        Ablation("report_c", "Report C: table of configurations", "light_resnet18", arms=[
            Arm("LightResNet18 (2.81 M, N 4, B 2, C 32)", "", "93.12 % validation"),
            Arm("LightResNet18_v2 (4.39 M, N 4, B 2, C 40)", "--arch light_resnet18_v2_40", "94.35 % validation"),
            Arm("LightResNet18_v2 (5.00 M, N 4, B 2, C 45)", "--arch light_resnet18_v2_45", "94.88 % validation"),
            Arm("RobustResNet64 (3.80 M, N 3, B 10, C 32)", "--arch robust_resnet64", "96.93 % test, without TTA"),
        ]),
        # Report E's comparison of optimizers, by its text's training, before dropout and more decay were added. Adam's rate is
        # not stated: PyTorch's default.
        Ablation("report_e", "Report E: optimizers", "mish_se_resnet18", arms=[
            Arm("SGD 0.05, dropout, decay 1e-3", _TEXT_E, "82.417 % Kaggle"),
            Arm("Adam", f"{_PLAIN_E} --optimizer adam --peak-lr 1e-3 --weight-decay 0", "74 % Kaggle"),
            Arm("SGD 0.1, decay 5e-4", f"{_PLAIN_E} --peak-lr 0.1", "77 % Kaggle"),
            Arm("SGD 0.05, decay 5e-4", _PLAIN_E, "78 % Kaggle"),
        ]),
        Ablation("speed_half", "Trials at half width", "speed94_half", flags=f"--epochs 2 {_AIRBENCH} --eval-every 99", arms=[
            # TFLOP of an epoch: 9.86 at 32 px, 7.45 at 28, 5.17 at 24, 3.47 at 20, 1.99 at 16.
            Arm("32 px for 2 epochs"),
            Arm("32 px for 3 epochs", "--epochs 3"),
            Arm("32 px for 4 epochs", "--epochs 4"),
            Arm("28 px for 3 epochs", "--epochs 3 --sizes 28 --size-epochs"),  # evaluated at 32, as all are
            Arm("24 px for 4 epochs", "--epochs 4 --sizes 24 --size-epochs"),
            Arm("24 px for 1 of 2 epochs", _growing((24, 1), (32, 1))),
            Arm("24 px for 2 of 3 epochs", _growing((24, 2), (32, 1))),
            Arm("24, 28 px for 2, 1 epochs", _growing((24, 2), (28, 1))),
            Arm("24, 28 px for 1, 2 epochs", _growing((24, 1), (28, 2))),
            Arm("20 px for 3 of 4 epochs", _growing((20, 3), (32, 1))),
            Arm("16 px for 5 of 6 epochs", _growing((16, 5), (32, 1))),
            Arm("20, 24, 32 px for 1, 1, 1 epochs", _growing((20, 1), (24, 1), (32, 1))),
            Arm("16, 24, 32 px for 2, 1, 1 epochs", _growing((16, 2), (24, 1), (32, 1))),
            Arm("no smoothing", "--label-smoothing 0"),
            Arm("smoothing 0.1", "--label-smoothing 0.1"),
            Arm("smoothing 0.3", "--label-smoothing 0.3"),
            # A summed loss scales the gradient with the batch, so only Muon's rate and the decay of a step need to follow.
            Arm("batch 250", "--batch-size 250 --weight-decay 0.00208"),
            Arm("batch 500", "--batch-size 500 --weight-decay 0.00417"),
            Arm("batch 500, rates x0.7", "--batch-size 500 --weight-decay 0.00595 --peak-lr 0.168"),
            Arm("batch 2000", "--batch-size 2000 --weight-decay 0.0167"),
            Arm("rates x0.7", "--peak-lr 0.168"),
            Arm("rates x1.4", "--peak-lr 0.336"),
            Arm("rates of biases x0.5", "--vector-lr-factor 0.11"),
            Arm("rates of biases x2", "--vector-lr-factor 0.442"),
            Arm("rate of the head x0.5", "--head-lr-factor 1.4"),
            Arm("rate of the head x2", "--head-lr-factor 5.58"),
            Arm("momentum 0.5", "--momentum 0.5"),
            Arm("momentum 0.7", "--momentum 0.7"),
            Arm("momentum 0.85", "--momentum 0.85"),
            Arm("momentum 0.85 of biases and head", "--vector-momentum 0.85"),
            Arm("2 steps of Newton-Schulz", "--muon-steps 2"),
            Arm("5 steps of Newton-Schulz", "--muon-steps 5"),
            Arm("crop by 1 pixel", "--crop-padding 1"),
            Arm("crop by 4 pixels", "--crop-padding 4"),
            Arm("random flip", "--flip random"),
            Arm("cutout 4", "--cutout 4"),
            Arm("cutout 8", "--cutout 8"),
            Arm("stem's bias never trained", "--frozen-from 0"),
            Arm("stem's bias always trained", "--frozen-from 8"),
            *(Arm(f"Nesterov {rate}", f"{_NESTEROV} --peak-lr {rate}") for rate in ("0.0007", "0.0014", "0.0028")),
            *(Arm(f"AdamW {rate}", f"{_ADAMW} --peak-lr {rate}") for rate in ("0.004", "0.012")),
            Arm("cosine", "--schedule cosine"),
            Arm("warm-up of a tenth", "--warmup-epochs 0.8"),
            Arm("decay not scaled by rates", "--no-scale-decay"),
            Arm("decay x4", "--weight-decay 0.0333"),
            Arm("decay x0.25", "--weight-decay 0.00208"),
            *(Arm(f"EMA {decay}", f"--ema-decay {decay}") for decay in ("0.8", "0.9")),
            Arm("mean of the last half epoch", "--average-from 6"),
            Arm("mean of the last epoch", "--average-from 4"),
            Arm("mean of the last epoch, rates to a tenth", "--average-from 4 --final-lr 0.024"),
            Arm("one view", "--eval-tta none"),
            Arm("six views", "--eval-tta flip_translate --centre-weight 0.5"),
            Arm("all six views alike", "--eval-tta flip_translate"),
        ]),
        # A third of its epochs at half width, since three seeds of it at full width are seven hours of two cores.
        Ablation("speed94_parts", "speed94 without each part", "speed94_half", flags=f"--epochs 3 {_SPEED94_FLAGS}", arms=[
            Arm("the recipe"),
            Arm("images of one size", "--sizes --size-epochs"),
            Arm("images of one size for 2 epochs", "--epochs 2 --sizes --size-epochs"),
            Arm("Nesterov instead of Muon", f"{_NESTEROV} --peak-lr 0.0014"),
            Arm("batches of 2,000", "--batch-size 2000 --weight-decay 0.0167"),
            Arm("no smoothing", "--label-smoothing 0"),
            Arm("no crop", "--crop-padding 0"),
            Arm("random flip", "--flip random"),
            Arm("cosine", "--schedule cosine"),
            Arm("no decay", "--weight-decay 0"),
            Arm("decay not scaled by rates", "--no-scale-decay"),
            Arm("stem's bias never trained", "--frozen-from 0"),
            Arm("stem's bias always trained", "--frozen --frozen-from 0"),
            Arm("one view", "--eval-tta none"),
            Arm("six views", "--eval-tta flip_translate --centre-weight 0.5"),
        ]),
    )
}  # fmt: skip
