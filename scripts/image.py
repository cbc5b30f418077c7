"""Build the container image with podman, also where the build itself could fetch nothing.

Promise: the image is what deploy/Containerfile says. Where its base cannot be pulled, a Debian of the same release is
made by mmdebstrap from the mirror of this computer's apt. That, and the layer with QEMU, are kept under names of
their own (``localhost/vmferry-base``, ``localhost/vmferry-system``), so that the next build finds them; nothing else
stays. Python packages are fetched here, by whatever index this computer's pip is configured for, in the versions of
constraints.txt, and handed to the build, which asks nobody. Needs root, as podman does here.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Final, NoReturn

ROOT: Final = Path(__file__).resolve().parent.parent
UPSTREAM_BASE: Final = "docker.io/library/debian:bookworm-slim"
OWN_BASE: Final = "localhost/vmferry-base:bookworm"
SYSTEM: Final = "localhost/vmferry-system:bookworm"
RELEASE: Final = "bookworm"
PYTHON: Final = "3.11"
"""What that release has."""
PLATFORMS: Final = (
    "manylinux2014_x86_64",
    "manylinux_2_17_x86_64",
    "manylinux_2_28_x86_64",
    "manylinux_2_34_x86_64",
)
NOT_NEEDED: Final = ("/usr/share/man/*", "/usr/share/doc/*", "/usr/share/info/*", "/usr/share/locale/*")
PODMAN: Final = ("podman", "--runtime", "runc")
"""Debian's crun refuses containers where control groups are those of before."""


def main() -> None:
    """Build it, and print its name."""
    parser = argparse.ArgumentParser(description="Build the container image of vmferry with podman.")
    parser.add_argument("--tag", default="localhost/vmferry:latest", help="name of the image")
    tag = parser.parse_args().tag
    for command in ("podman", "runc"):
        if shutil.which(command) is None:
            give_up(f"{command} is missing (on Debian: apt install podman runc netavark aardvark-dns)")
    with tempfile.TemporaryDirectory(prefix="vmferry-image-") as scratch:
        base = find_base(Path(scratch))
        # Fetched while the layer with QEMU is made: neither needs the other.
        system = subprocess.Popen(build(base, "system", SYSTEM), stdin=subprocess.DEVNULL, stdout=sys.stderr)
        try:
            wheels = fetch_wheels(Path(scratch))
        finally:
            failed = system.wait()
        if failed:
            give_up("the layer with QEMU could not be made (see above)")
        packages = f"{tag.rpartition(':')[0]}-packages:{tag.rpartition(':')[2]}"
        run(*build(base, "packages", packages, wheels), failure="the packages could not be installed")
        try:
            run(*build(base, "host", tag, wheels), failure="the image could not be built")
        finally:
            run(*PODMAN, "rmi", "--force", packages, failure="the packages could not be removed")
    print(tag)


def build(base: str, stage: str, tag: str, wheels: Path | None = None) -> list[str]:
    """The command that builds one stage of the Containerfile; what was built before is not built again."""
    from_here = ["--build-arg", "PIP_NO_INDEX=1", "--build-arg", "PIP_FIND_LINKS=/wheels"]
    return [
        *PODMAN,
        *("build", "--quiet", "--format", "docker", "--layers", "--pull=never", "--network", "host"),
        *("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=4096:4096"),
        *("--build-arg", f"BASE={base}"),
        *([] if wheels is None else ["--volume", f"{wheels}:/wheels:ro", *from_here]),
        *("--target", stage, "--tag", tag, "--file", str(ROOT / "deploy/Containerfile"), str(ROOT)),
    ]


def find_base(scratch: Path) -> str:
    """The image to build on: pulled, made before, or made now."""
    for image in (UPSTREAM_BASE, OWN_BASE):
        if not subprocess.run([*PODMAN, "image", "exists", image], check=False).returncode:
            return image
    pulled = subprocess.run(
        [*PODMAN, "pull", "--quiet", UPSTREAM_BASE],
        check=False,
        capture_output=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
    )
    if not pulled.returncode:
        return UPSTREAM_BASE
    if shutil.which("mmdebstrap") is None:
        give_up(f"{UPSTREAM_BASE} cannot be pulled, and there is no mmdebstrap to make a base with")
    say(f"{UPSTREAM_BASE} cannot be pulled; making a base from this computer's mirror")
    archive = scratch / "base.tar"
    run(
        *("mmdebstrap", "--quiet", "--variant=minbase", "--mode=root"),
        *(f"--dpkgopt=path-exclude={pattern}" for pattern in NOT_NEEDED),
        *("--dpkgopt=force-unsafe-io", RELEASE, str(archive)),
        failure="mmdebstrap failed",
    )
    run(*PODMAN, "import", "--quiet", str(archive), OWN_BASE, failure="the base could not be imported")
    archive.unlink()
    return OWN_BASE


def fetch_wheels(scratch: Path) -> Path:
    """A folder with the wheels of all that vmferry needs in the image, and of what builds its own."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    wheels = scratch / "wheels"
    run(
        *(
            sys.executable,
            "-m",
            "pip",
            "-qq",
            "--disable-pip-version-check",
            "download",
            "--dest",
            str(wheels),
        ),
        *("--only-binary=:all:", "--implementation", "cp", "--python-version", PYTHON),
        *(argument for platform in PLATFORMS for argument in ("--platform", platform)),
        *("--constraint", str(ROOT / "constraints.txt"), *wanted),
        failure="pip could not fetch what the image needs",
    )
    return wheels


def run(*command: str, failure: str) -> None:
    """Run a command, its output on stderr; give up if it fails."""
    if subprocess.run(command, check=False, stdin=subprocess.DEVNULL, stdout=sys.stderr).returncode:
        give_up(f"{failure} (see above)")


def say(message: str) -> None:
    """Tell the user on stderr, so that stdout has only the image's name."""
    sys.stderr.write(f"vmferry image: {message}\n")
    sys.stderr.flush()


def give_up(message: str) -> NoReturn:
    """End unsuccessfully with a message."""
    sys.exit(f"vmferry image: {message}")


if __name__ == "__main__":
    main()
