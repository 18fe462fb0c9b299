"""`fastcifar COMMAND ...`: what `python -m fastcifar.COMMAND` runs, under one name where the package is installed.

fastcifar train --arch se_resnet18 --epochs 200
fastcifar --tyro-print-completion bash > ~/.local/share/bash-completion/completions/fastcifar    # or zsh
"""

import runpy
import sys
from importlib import import_module

from fastcifar import ahead
from fastcifar.errors import importing, run_command, unknown

# name: module, class of its options, what it does. data_prep builds on fastcifar, which therefore imports it by name only.
COMMANDS = {
    "data": ("data_prep.write_beton", "Options", "write CIFAR or a synthetic dataset as betons"),
    "train": ("fastcifar.train", "Command", "train a network by a recipe into a run folder"),
    "sweep": ("fastcifar.sweep", "Options", "train a grid of architectures, settings and seeds"),
    "evaluate": ("fastcifar.evaluate", "Options", "measure a checkpoint"),
    "predict": ("fastcifar.predict", "Options", "predict the classes of pictures into a CSV"),
    "export": ("fastcifar.export", "Options", "turn a checkpoint into ONNX, pt2, TorchScript or safetensors"),
}


def main() -> None:
    """Run the command that is named first, as `python -m` would."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print("usage: fastcifar COMMAND [OPTIONS]; fastcifar COMMAND --help lists the options\n")
        print(*(f"  {command:10}{help}" for command, (_, _, help) in COMMANDS.items()), sep="\n")
    elif name.startswith("--tyro-"):
        complete(sys.argv[1:])
    elif name in COMMANDS:
        importing()
        if name == "train":
            ahead.begin(sys.argv[2:])
        sys.argv[:2] = [f"fastcifar {name}"]
        runpy.run_module(COMMANDS[name][0], run_name="__main__", alter_sys=True)
    else:
        run_command(lambda: refuse(name))


def refuse(name: str) -> None:
    """Raise InputError with the nearest command."""
    raise unknown("command", name, COMMANDS)


def complete(arguments: list[str]) -> None:
    """Let tyro write the completion of a shell for all commands."""
    import tyro

    kinds = {name: getattr(import_module(module), kind) for name, (module, kind, _) in COMMANDS.items()}
    tyro.extras.subcommand_cli_from_dict(kinds, prog="fastcifar", args=arguments)


if __name__ == "__main__":
    main()
