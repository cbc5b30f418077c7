"""Generate vmferry/v1 from protos/, or check that it is what the generators would write.

Promise: with the same contract the same bytes come out on every machine. To that end it refuses to run with
generators other than those pyproject.toml pins, and it owns every ``*_pb2*`` file in vmferry/v1: stale ones are
deleted. Contracts without a service get no ``_pb2_grpc`` files.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Final

from google.protobuf.descriptor_pb2 import FileDescriptorSet

ROOT: Final = Path(__file__).resolve().parent.parent
PROTOS: Final = ROOT / "protos"
PACKAGE: Final = Path("vmferry/v1")
GENERATORS: Final = ("grpcio-tools", "mypy-protobuf")


def main() -> None:
    """Generate into a temporary directory, then compare with the committed files or replace them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="change nothing; fail if the committed files differ"
    )
    check = parser.parse_args().check
    refuse_other_generators()
    with tempfile.TemporaryDirectory(prefix="vmferry-protos-") as directory:
        generate(Path(directory))
        fresh = contents(Path(directory) / PACKAGE)
    committed = contents(ROOT / PACKAGE)
    drift = sorted(name for name in fresh.keys() | committed.keys() if fresh.get(name) != committed.get(name))
    if check and drift:
        sys.exit(f"{PACKAGE} is not what protos/ says; run make protos. Different: {', '.join(drift)}")
    for name in drift:
        target = ROOT / PACKAGE / name
        if name in fresh:
            target.write_bytes(fresh[name])
        else:
            target.unlink()


def refuse_other_generators() -> None:
    """Stop unless the installed generators are exactly those that pyproject.toml pins."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        group = tomllib.load(file)["dependency-groups"]["dev"]
    for name in GENERATORS:
        installed = f"{name}=={version(name)}"
        if installed not in group:
            sys.exit(f"{installed} is installed here, which is not what pyproject.toml pins; run make setup")


def generate(out: Path) -> None:
    """Write the stubs of every contract below ``out``."""
    files = sorted(str(path.relative_to(PROTOS)) for path in (PROTOS / PACKAGE).glob("*.proto"))
    descriptors = out / "descriptors.binpb"
    protoc(f"--descriptor_set_out={descriptors}", *files)
    described = FileDescriptorSet.FromString(descriptors.read_bytes())
    with_services = [file.name for file in described.file if file.service]
    protoc(f"--python_out={out}", f"--mypy_out=quiet:{out}", *files)
    protoc(f"--grpc_python_out={out}", f"--mypy_grpc_out=quiet:{out}", *with_services)


def protoc(*arguments: str) -> None:
    """Call the compiler of grpcio-tools with the plug-ins that are installed beside this interpreter."""
    scripts = Path(sys.executable).parent
    plugins = [f"--plugin={name}={scripts / name}" for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"--proto_path={PROTOS}", *plugins, *arguments]
    subprocess.run(command, check=True)


def contents(directory: Path) -> dict[str, bytes]:
    """The generated files in ``directory``, by name."""
    return {path.name: path.read_bytes() for path in directory.glob("*_pb2*")}


if __name__ == "__main__":
    main()
