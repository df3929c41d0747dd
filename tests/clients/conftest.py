"""Makes driver.py importable; the other fixtures are those of tests/conftest.py."""

from __future__ import annotations

import base64
import struct
import sys
import zlib
from pathlib import Path

import pytest

HERE = str(Path(__file__).resolve().parent)
if HERE not in sys.path:
    sys.path.insert(0, HERE)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a client works; its home is beside it."""
    made = tmp_path / "work"
    made.mkdir()
    return made


@pytest.fixture
def red_square(folder: Path) -> tuple[Path, str]:
    """A picture of 8 by 8 in the client's folder, and the URL that has all of it."""
    def part(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    rows = b"".join(b"\0" + b"\xff\0\0" * 8 for _ in range(8))
    image = b"\x89PNG\r\n\x1a\n" + part(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)) + part(b"IDAT", zlib.compress(rows)) + part(b"IEND", b"")
    path = folder / "red.png"
    path.write_bytes(image)
    return path, "data:image/png;base64," + base64.b64encode(image).decode()
