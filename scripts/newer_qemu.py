"""Fetch a QEMU that is newer than the installed one, for the tests that need two releases, and print its path.

Promise: nothing is installed. The packages come from the backports of this Debian or Ubuntu, from the mirror that apt
uses already, and lie unpacked below ``.tools``. Where there is nothing newer it ends with code 3 and says why.
"""

import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final, NoReturn

ROOT: Final = Path(__file__).resolve().parent.parent
PLACE: Final = ROOT / ".tools" / "newer-qemu"
PACKAGE: Final = "qemu-system-x86"
NAME: Final = "qemu-system-x86_64"
NOTHING_NEWER: Final = 3
KEYS: Final = [
    Path("/usr/share/keyrings") / f"{name}-archive-keyring.{form}"
    for name in ("debian", "ubuntu")
    for form in ("gpg", "pgp")
]
# Where Debian's binary looks, which does not move with it.
DATA: Final = ("usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu")


def main() -> None:
    """Fetch, unpack and wrap it, unless that was done before."""
    wrapper = PLACE / "bin" / NAME
    if not wrapper.exists():
        shutil.rmtree(PLACE, ignore_errors=True)
        (PLACE / "bin").mkdir(parents=True)
        with tempfile.TemporaryDirectory(prefix="newer-qemu-") as scratch:
            files = fetch(Path(scratch))
            for file in files:
                run(["dpkg-deb", "--extract", str(file), str(PLACE / "root")])
        check_and_wrap(wrapper)
    print(wrapper)


def fetch(scratch: Path) -> list[Path]:
    """The packages that installing it would bring, downloaded and not installed."""
    if shutil.which("apt-get") is None:
        give_up("there is no apt-get")
    suite, source = backports()
    sources = scratch / "sources.list"
    sources.write_text(source, encoding="utf-8")
    for folder in ("lists/partial", "cache/archives/partial", "debs"):
        (scratch / folder).mkdir(parents=True)
    (scratch / "debs").chmod(0o755)
    apt = [
        "apt-get",
        "-qq",
        *("-o", f"Dir::Etc::SourceList={sources}", "-o", "Dir::Etc::SourceParts=/dev/null"),
        *("-o", f"Dir::State::Lists={scratch}/lists", "-o", f"Dir::Cache={scratch}/cache"),
        *("-o", "APT::Sandbox::User=root"),
    ]
    run([*apt, "update"])
    plan = run([*apt, "--simulate", "--no-install-recommends", "-t", suite, "install", PACKAGE])
    versions = dict(re.findall(r"^Inst (\S+) (?:\[[^]]*\] )?\((\S+)", plan, re.MULTILINE))
    if PACKAGE not in versions:
        give_up(f"{suite} has no newer {PACKAGE}")
    wanted = [f"{name}={version}" for name, version in versions.items()]
    run([*apt, "-t", suite, "download", *wanted], folder=scratch / "debs")
    return sorted((scratch / "debs").glob("*.deb"))


def backports() -> tuple[str, str]:
    """The name of this system's backports, and the sources with them, from the mirror apt uses already."""
    release = Path("/etc/os-release").read_text(encoding="utf-8")
    codename = re.search(r"^VERSION_CODENAME=\"?([a-z]+)", release, re.MULTILINE)
    if codename is None:
        give_up("this system has no codename")
    fields = "$(REPO_URI) $(CODENAME) $(COMPONENT)"
    targets = run(["apt-get", "indextargets", "--format", fields, "Created-By: Packages"]).splitlines()
    known = [line.split()[0] for line in targets if line.split()[1:] == [codename[1], "main"]]
    if not known:
        give_up(f"apt knows no mirror of {codename[1]}")
    key = next((f"[signed-by={path}] " for path in KEYS if path.exists()), "")
    newer = f"{codename[1]}-backports"
    return newer, "".join(f"deb {key}{known[0]} {suite} main\n" for suite in (codename[1], newer))


def check_and_wrap(wrapper: Path) -> None:
    """Make it find its own data and libraries, and see that it runs."""
    root = PLACE / "root"
    libraries = ":".join(
        str(path) for path in (root / "usr/lib/x86_64-linux-gnu", root / "lib/x86_64-linux-gnu")
    )
    options = " ".join(f"-L {shlex.quote(str(root / folder))}" for folder in DATA)
    draft = wrapper.with_suffix(".draft")
    draft.write_text(
        "#!/bin/sh\n"
        f"export LD_LIBRARY_PATH={shlex.quote(libraries)}\n"
        f'exec {shlex.quote(str(root / "usr/bin" / NAME))} {options} "$@"\n',
        encoding="utf-8",
    )
    draft.chmod(0o755)
    print(run([str(draft), "--version"]).splitlines()[0], file=sys.stderr)
    draft.rename(wrapper)


def run(command: list[str], *, folder: Path = ROOT) -> str:
    """What a command prints; gives up if it fails."""
    done = subprocess.run(
        command, cwd=folder, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    if done.returncode:
        give_up(f"{' '.join(command[:1])} says: {done.stderr.strip()[-500:]}")
    return done.stdout


def give_up(reason: str) -> NoReturn:
    """End without one."""
    print(f"no newer QEMU: {reason}", file=sys.stderr)
    sys.exit(NOTHING_NEWER)


if __name__ == "__main__":
    main()
