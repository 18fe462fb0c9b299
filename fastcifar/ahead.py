"""Reads the training data on another core while this one imports PyTorch: both take a second."""

from concurrent.futures import Future
from pathlib import Path
from threading import Thread

from fastcifar.beton import Beton, read_beton

DATA = Path("data/beton")  # where a run's betons are, unless --data says otherwise
_begun: dict[tuple[Path, bool], Future[Beton]] = {}  # (path, verified): its content, or why it is refused


def option(arguments: list[str], name: str) -> str | None:
    """The value of `--name VALUE` or `--name=VALUE`, before the whole command line can be parsed."""
    for position, argument in enumerate(arguments):
        if argument == f"--{name}" and position + 1 < len(arguments):
            return arguments[position + 1]
        if argument.startswith(f"--{name}="):
            return argument.split("=", 1)[1]
    return None


def begin(arguments: list[str]) -> None:
    """Begin to read what a training with these arguments reads; nothing where they only ask, stream, or name a run."""
    if {"-h", "--help", "--stream"} & set(arguments) or option(arguments, "resume") or option(arguments, "config"):
        return
    folder, verify = Path(option(arguments, "data") or DATA), "--no-verify" not in arguments
    for split in ("train", "test"):
        _begun[folder / f"{split}.beton", verify] = Future()
    Thread(target=_read, args=(dict(_begun),), daemon=True).start()  # a command that ends early does not wait for it


def _read(begun: dict[tuple[Path, bool], Future[Beton]]) -> None:
    for (path, verify), result in begun.items():
        try:
            result.set_result(read_beton(path, verify=verify))
        except BaseException as error:  # raised where the data is asked for
            result.set_exception(error)


def beton(path: Path, *, verify: bool) -> Beton:
    """`read_beton`, or what was begun: once, so that the memory is free when the caller is done with it."""
    begun = _begun.pop((path, verify), None)
    return read_beton(path, verify=verify) if begun is None else begun.result()
