"""Installed versions of packages, without importing them."""

from importlib.metadata import PackageNotFoundError, version


def installed(*packages: str) -> dict[str, str | None]:
    """Return {package: version}; None where it is not installed (or only a folder on PYTHONPATH)."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found
