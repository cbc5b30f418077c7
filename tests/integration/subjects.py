"""A process that writes to a RAM file when told, and a copy of the file that is kept from what a tracker reports."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import vmferry
from vmferry.memory.digest import PageTable
from vmferry.memory.regions import MappedRegion, RamFile, Region, find_mapping
from vmferry.memory.runs import PAGE_SIZE, PageRuns

# Understands commands, one line each, and answers each; a storm lasts until the next line.
SUBJECT = """
import ctypes, mmap, random, select, sys
fd, size, register = map(int, sys.argv[1:])
memory = mmap.mmap(fd, size)
if register:
    from vmferry.memory.userfault import track_own_range
    tracking = track_own_range(ctypes.addressof(ctypes.c_char.from_buffer(memory)), size)
print("ready", flush=True)
def lines():
    line = b""
    while byte := sys.stdin.buffer.raw.read(1):
        line += byte
        if byte == b"\\n":
            yield line.decode().split()
            line = b""
def storm(seed):
    rng = random.Random(seed)
    count = 0
    while not select.select([0], [], [], 0)[0]:
        for _ in range(500):
            at = rng.randrange(size // 8) * 8
            count += 1
            memory[at : at + 8] = count.to_bytes(8, "little")
for command, *arguments in lines():
    if command == "write":
        for page in map(int, arguments):
            memory[page * 4096] = (memory[page * 4096] + 1) % 256
    elif command == "odd":
        for page in range(1, size // 4096, 2):
            memory[page * 4096] = 5
    elif command == "read-file":
        with open("/dev/urandom", "rb", buffering=0) as source:
            page = int(arguments[0])
            source.readinto(memoryview(memory)[page * 4096 : page * 4096 + 4096])
    elif command == "drop":
        memory.madvise(mmap.MADV_DONTNEED)
    elif command == "move":
        old, memory = memory, mmap.mmap(fd, size)
        old.close()
    elif command == "replace":
        memory.close()
        memory = mmap.mmap(fd, size)
    elif command == "storm":
        print("storming", flush=True)
        storm(int(arguments[0]))
    print("done", flush=True)
"""


class Subject:
    """A process that writes to a RAM file when told."""

    def __init__(self, ram: RamFile, *, registers_itself: bool) -> None:
        self.ram = ram
        self.sent = PageTable(ram.page_count)
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                SUBJECT,
                str(ram.fileno()),
                str(ram.size_bytes),
                str(int(registers_itself)),
            ],
            pass_fds=[ram.fileno()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(vmferry.__file__).parents[1])},
        )
        assert self.answer() == "ready"

    @property
    def region(self) -> Region:
        """The RAM file as a region."""
        return Region("ram0", self.ram.path, self.ram.size_bytes)

    @property
    def mapped(self) -> MappedRegion:
        """Where the subject has it."""
        return find_mapping(self.process.pid, self.region)

    def answer(self) -> str:
        """The next line the subject says."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def tell(self, command: str) -> str:
        """Have one command done; returns the answer to it."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{command}\n")
        self.process.stdin.flush()
        return self.answer()

    def end(self) -> None:
        """Kill the subject and collect it."""
        with self.process:
            self.process.kill()


class Shadow:
    """A copy of the RAM file, kept up to date from what a tracker reports."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._content = bytearray(subject.ram.size_bytes)
        self._buffer = memoryview(bytearray(256 * PAGE_SIZE))

    def copy(self, runs: PageRuns) -> None:
        """Read pages into the shadow, noting their digests as a sender does."""
        for batch in runs.batches(256):
            size = self._subject.ram.read_pages(batch, self._buffer)
            self._subject.sent.note_pages(batch, self._buffer[:size])
            position = 0
            for first, count in batch:
                length = count * PAGE_SIZE
                start = first * PAGE_SIZE
                self._content[start : start + length] = self._buffer[position : position + length]
                position += length

    def wrong_pages(self) -> list[int]:
        """Where shadow and file differ."""
        content = bytearray(self._subject.ram.size_bytes)
        self._subject.ram.read_pages([(0, self._subject.ram.page_count)], content)
        starts = range(0, len(content), PAGE_SIZE)
        return [
            at // PAGE_SIZE
            for at in starts
            if content[at : at + PAGE_SIZE] != self._content[at : at + PAGE_SIZE]
        ]
