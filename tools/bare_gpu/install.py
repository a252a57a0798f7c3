"""Unpack what was carried, make the plugin known to vLLM, and print the versions that are there.

python -m tools.bare_gpu.install SITE.tar.xz FOLDER      in the repository root
"""

import importlib.metadata
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path


def main() -> int:
    """Unpack, and write the entry points of the plugin."""
    archive, folder = Path(sys.argv[1]), Path(sys.argv[2])
    shutil.rmtree(folder, ignore_errors=True)
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    info = folder / "ficoco_vllm-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ficoco-vllm\nVersion: 0\n")
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {target}" for name, target in points.items()), ""]
    (info / "entry_points.txt").write_text("\n".join(lines))
    (folder / "done").touch()
    for name in ("torch", "triton", "numpy", "transformers", "tokenizers", "vllm", "pydantic"):
        try:
            print(name, importlib.metadata.version(name), end="; ")
        except importlib.metadata.PackageNotFoundError:
            print(name, "MISSING", end="; ")
    print("python", sys.version.split()[0])
    if shutil.which("nvidia-smi"):
        subprocess.run(
            ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"],
            check=False,
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
