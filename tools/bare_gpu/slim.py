"""Shrink vLLM's compiled libraries to what one GPU architecture runs, so that they can be carried.

A CUDA library holds its kernels in "fat binaries": a header (magic 0xBA55ED50, its length, the length of what follows)
and entries, one for each architecture: a header (kind: 1 PTX, 2 machine code; its length; length of the payload; ...;
architecture at byte 28) and a payload, often compressed. Here each fat binary is packed in place: entries that are
wanted move to the front, its length is corrected, the rest is zeros, which compress to nothing. Addresses do not
move, so the library loads as before. Where nothing is wanted, a small entry for a GPU of another architecture is put
in the place (whatever requests such a kernel gets "no kernel image"), so that every container stays a valid one.
"""

import argparse
import re
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

MAGIC = 0xBA55ED50
MACHINE_CODE = 2
OTHER = 75  # an architecture that no wanted GPU runs
# FlashAttention-3: tile of queries, tile of keys, size of a head; size of a head of the values; type.
FA3 = re.compile(
    r"CollectiveMainloopFwdSm90<2, cute::tuple<(?:cute::C<1>,? ?)+>, "
    r"cute::tuple<cute::C<\d+>, cute::C<\d+>, cute::C<(\d+)> >, (\d+), cutlass::(\w+)"
)
HEAD_SIZES, TYPES = ("64", "128"), ("half_t", "bfloat16_t")


def section(library: bytes, name: str) -> tuple[int, int]:
    """Offset and length of a section of a 64-bit ELF file."""
    (table,) = struct.unpack_from("<Q", library, 0x28)
    size, count, names = struct.unpack_from("<HHH", library, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", library, table + i * size) for i in range(count)]
    strings = headers[names][4]
    for header in headers:
        start = strings + header[0]
        if library[start : library.index(b"\0", start)].decode() == name:
            return header[4], header[5]
    raise ValueError(f"no section {name}")


def entries(binary: bytes, start: int, end: int) -> Iterator[tuple[int, int, bytes]]:
    """Kind, architecture and bytes of each entry of a fat binary."""
    while start < end:
        kind, _, header, payload = struct.unpack_from("<HHIQ", binary, start)
        (architecture,) = struct.unpack_from("<I", binary, start + 28)
        yield kind, architecture, bytes(binary[start : start + header + payload])
        start += header + payload


def smallest(library: bytes, architecture: int) -> bytes:
    """The shortest machine code for an architecture, to fill places with."""
    return min(
        (entry for kind, arch, entry in everything(library) if kind == MACHINE_CODE and arch == architecture),
        key=len,
    )


def everything(library: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Kind, architecture and bytes of each entry of a library."""
    for start, header, size in containers(library):
        yield from entries(library, start + header, start + header + size)


def containers(library: bytes) -> Iterator[tuple[int, int, int]]:
    """Offset, length of the header, and length of what follows it, of each fat binary."""
    start, length = section(library, ".nv_fatbin")
    end = start + length
    while start < end:
        if library[start : start + 4] == bytes(4):  # padding between fat binaries
            start += 4
            continue
        magic, _, header, size = struct.unpack_from("<IHHQ", library, start)
        if magic != MAGIC:
            raise ValueError(f"not a fat binary at {start:#x}: {magic:#x}")
        yield start, header, size
        start += header + size


def slim(library: bytes, wanted: Callable[[int, int, bytes], bool], filler: bytes) -> bytes:
    """The library with the wanted entries only, and a filler where there is none."""
    packed = bytearray(library)
    kept = seen = 0
    for start, header, size in containers(library):
        parsed = list(entries(library, start + header, start + header + size))
        left = [entry for entry in parsed if wanted(*entry)]
        seen, kept = seen + len(parsed), kept + len(left)
        body = b"".join(entry[2] for entry in left) or filler
        if len(body) <= size:
            struct.pack_into("<Q", packed, start + 8, len(body))
            packed[start + header : start + header + size] = body.ljust(size, b"\0")
    print(f"  {kept} of {seen} entries, {sum(byte != 0 for byte in packed[::64]) * 64 / 1e6:.1f} MB not zero")
    if not kept:
        raise ValueError("no entry of this architecture is left")
    return bytes(packed)


def for_architecture(architecture: int) -> Callable[[int, int, bytes], bool]:
    """Machine code of one architecture."""
    return lambda kind, arch, entry: kind == MACHINE_CODE and arch == architecture


def for_heads(kind: int, architecture: int, entry: bytes) -> bool:
    """FlashAttention-3 for the head sizes and types that LLaVA has, and what all of its kernels share."""
    names = sorted(set(re.findall(rb"\.text\.(_Z\w+)", entry)))
    text = subprocess.run(
        ["c++filt"], input=b"\n".join(names), capture_output=True, check=True
    ).stdout.decode()
    if "CollectiveMainloopFwd" not in text:
        return True
    matches = FA3.findall(text)
    if not matches:
        raise ValueError("an attention kernel whose name is not understood")
    return any(key == value and key in HEAD_SIZES and dtype in TYPES for key, value, dtype in matches)


def main() -> None:
    """Rewrite the libraries of a package of vLLM's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="vllm's package; its libraries are rewritten")
    parser.add_argument("--architecture", type=int, default=90)
    args = parser.parse_args()
    chosen = for_architecture(args.architecture)
    filler = smallest((args.folder / "_C_stable_libtorch.abi3.so").read_bytes(), OTHER)
    for name, wanted in {
        "_C_stable_libtorch": chosen,
        "_moe_C_stable_libtorch": chosen,
        "vllm_flash_attn/_vllm_fa3_C": for_heads,
    }.items():
        path = args.folder / f"{name}.abi3.so"
        print(path.name)
        path.write_bytes(slim(path.read_bytes(), wanted, filler))


if __name__ == "__main__":
    main()
