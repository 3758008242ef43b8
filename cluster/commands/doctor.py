"""`sdt doctor`: versions, hardware and what is missing."""

from __future__ import annotations


def doctor() -> None:
    """Print versions, cores, memory, GPUs, the bundled model and the data directory; says what is missing.

    Example:

      sdt doctor
    """
    import os
    import platform
    from importlib.metadata import PackageNotFoundError, version
    from pathlib import Path

    import psutil
    import torch

    from sdt_dist.models.forecaster.bundled import forecaster_directory

    print(f"python       {platform.python_version()} on {platform.system()} {platform.machine()}")
    for name in ("sdt-dist", "torch", "transformers", "numpy", "numba", "statsforecast"):
        try:
            print(f"{name:<12} {version(name)}")
        except PackageNotFoundError:
            print(f"{name:<12} missing")
    print(f"cores        {os.cpu_count()}, torch uses {torch.get_num_threads()}")
    memory = psutil.virtual_memory()
    print(f"memory       {memory.available / 2**30:.1f} GiB free of {memory.total / 2**30:.1f}")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"GPUs         {', '.join(gpus) or 'none'}")
    print(f"bundled      {'present' if forecaster_directory('bundled') else 'missing: reinstall the package'}")
    folder = os.environ.get("SDT_DATA_DIR")
    state = (
        "not set: ETT and M4 are downloaded" if not folder else folder if Path(folder).is_dir() else f"{folder} missing"
    )
    print(f"SDT_DATA_DIR {state}")
