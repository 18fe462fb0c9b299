"""An epoch's record enters; a point on each TensorBoard curve leaves."""

from pathlib import Path
from typing import Any


class Curves:
    """TensorBoard events in a run folder; opened by the first epoch, so that TensorBoard's import delays no first step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer: Any = None

    def log(self, record: dict[str, Any]) -> None:
        """Add an epoch; what an interrupted run wrote for it and later ones is purged."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.folder), purge_step=record["epoch"])
        curves = {
            "loss/train": record["train_loss"],
            "loss/eval": record["eval_loss"],
            "accuracy/train": record["train_accuracy"],
            "accuracy/eval": record["eval_accuracy"],
            "accuracy/best": record["best_accuracy"],
            "speed/images_per_second": record["images_per_second"],
            "learning_rate": record["learning_rates"][-1],
        }
        for tag, value in curves.items():
            if value is not None:
                self._writer.add_scalar(tag, value, record["epoch"])
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()
