"""``mmfm doctor``: check this installation, whether a target fits here, and with ``--gpu`` how fast it trains."""

import argparse
import functools
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

from mmfm.infra.versions import PACKAGES, version

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_SLURM = "snakemake-executor-plugin-slurm"


def main(arguments: list[str]) -> int:
    """Print versions, devices and free disk space; return 1 if something would stop the workflow."""
    parser = argparse.ArgumentParser(
        prog="mmfm doctor",
        description="Check this installation: package versions, faiss build, GPUs, free disk space. With the name of a "
        "result, such as results/fid/dinov2_mode.txt, also whether its stages fit this machine's disk, memory and GPUs "
        "by the estimates of `mmfm scale`. The exit status is 1 if something would stop the workflow.",
    )
    parser.add_argument("target", nargs="?", help="name of a result or of the comparison, as given to Snakemake")
    parser.add_argument(
        "--configfile",
        metavar="YAML",
        nargs="+",
        default=[],
        help="the target's configuration, as given to Snakemake (default: config/config.yaml)",
    )
    parser.add_argument(
        "--gpu",
        action="store_true",
        help="then use all visible GPUs for two minutes: bandwidth between them, time and memory of training steps at "
        "ImageNet-256's size (without a GPU: toy sizes in two processes, to try this command)",
    )
    parser.add_argument("--micro-batch", type=int, default=32, help="images per GPU and step of --gpu (default: 32)")
    parser.add_argument("--trial", action="store_true", help=argparse.SUPPRESS)  # a process that --gpu starts
    parser.add_argument("--threads", action="store_true", help="print only the thread settings of this process")
    options = parser.parse_args(arguments)
    if options.threads:
        print(*(f"{name}={os.environ.get(name, '')}" for name in _THREADS), sep="\n")
        return 0
    if options.trial:
        return _trial(options.micro_batch)
    if options.configfile and not options.target:
        parser.error("--configfile belongs to a target: name one, such as results/fid/dinov2_mode.txt")
    problems = []
    print(f"python {platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} cores")
    for package in PACKAGES:
        found = version(package)
        print(f"{package:<16}{found or 'missing'}")
        if found is None:
            problems.append(f"{package} is missing; run pip install -e .")
    from mmfm.mixture.initial import faiss_wheels

    builds = faiss_wheels()
    print(f"{'faiss':<16}{', '.join(f'{b} {version(b)}' for b in builds) or 'missing'}")
    if len(builds) != 1:
        problems.append(
            f"exactly one build of faiss must be installed, found {builds or 'none'}; pip uninstall the others"
        )
    from mmfm.infra import torchvision_ops

    if torchvision_ops._declared is not None:
        print("torchvision was built for another PyTorch; its missing operators are stubbed (harmless here)")
    import torch

    from mmfm.infra.distributed import driver_version, why_no_cuda
    from mmfm.infra.launch import visible_gpus

    if torch.cuda.is_available():
        print(f"NVIDIA driver {driver_version() or '?'}, PyTorch for CUDA {torch.version.cuda}")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            print(f"GPU {i}: {properties.name}, {properties.total_memory / 2**30:.0f} GB")
    elif gpus := visible_gpus():
        problems.append(f"{len(gpus)} GPUs are here, but PyTorch can't use them: {why_no_cuda()}")
    else:
        print("no GPU: stages run on the CPU")
    print(f"free disk here: {shutil.disk_usage('.').free / 1e9:.0f} GB")
    if options.target:
        print(*_libraries(), sep="\n")
        problems += _room(options.target, options.configfile)
    for problem in problems:
        print(f"problem: {problem}")
    if options.target:
        print(f"'{options.target}' {'will not run here as it is' if problems else 'fits this machine'}")
    else:
        print("problems found" if problems else "no problems found")
    if options.gpu and not problems:
        count = ["--gpus", str(len(visible_gpus()))] if visible_gpus() else ["--processes", "2"]
        launch = [sys.executable, "-m", "mmfm.infra.launch", *count, "--", "doctor", "--trial"]
        return subprocess.run([*launch, "--micro-batch", str(options.micro_batch)]).returncode
    return 1 if problems else 0


def _libraries() -> list[str]:
    """Return lines on the linear algebra libraries and on the plugin for SLURM."""
    import numpy as np
    import torch

    numpy_blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    torch_blas = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    lines = [
        f"BLAS: {numpy_blas['name']} {numpy_blas['version']} in NumPy, {torch_blas[1] if torch_blas else '?'} in "
        f"PyTorch; threads: {torch.get_num_threads()} here, in stages those of their rule"
    ]
    if plugin := version(_SLURM):
        lines.append(f"{_SLURM} {plugin}")
    return lines


def _room(name: str, files: list[str]) -> list[str]:
    """Print what a target's stages take and what there is of it; return what is missing or will not fit.

    Raises:
        ValueError: the configuration is wrong, or it has no such result.
    """
    import torch

    from mmfm import config
    from mmfm.infra import cores
    from mmfm.infra.launch import visible_gpus
    from mmfm.workflow import facts, jobs, room, targets, this_cpu
    from mmfm.workflow.outlook import duration
    from mmfm.workflow.resources import for_target, together

    loaded = config.load(["config/config.yaml", *files])
    wanted = targets.parse_compared(name, loaded)
    results = Path(f"results/{loaded.run}" if loaded.run else "results")
    visible, found_wrong = len(visible_gpus()), []
    try:
        gpus = jobs.Machine(cores.given(), visible).share("train", loaded.gpus, loaded.processes).gpus
    except ValueError as error:
        found_wrong.append(str(error))
        gpus = visible
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    card = min((torch.cuda.get_device_properties(i).total_memory for i in range(count)), default=0)
    machine = room.Machine(gpus or loaded.processes, card if gpus else None, room.memory())
    known = facts.gather(loaded, results)
    if not machine.on_gpu:
        known = replace(known, rates=this_cpu.rates_for(known.image_bytes, machine.processes))
    needs = [(target, for_target(loaded, target, machine.processes, machine.on_gpu, known)) for target in wanted]
    needs_left = [(target, room.unfinished(of_it, target, results)) for target, of_it in needs]
    found, left = together(loaded, needs), together(loaded, needs_left)
    disks = room.disk_needs(left, room.caches(needs_left), results, Path(loaded.latents.folder))
    where = f"{gpus} GPU{'s' * (gpus != 1)}" if gpus else "the CPU"
    print(f"\n{name} on {where}, by the estimates of `mmfm scale`")
    print(f"for {known.n_images:,} training images ({known.origin}):")
    print(*room.table(found, left, machine), sep="\n")
    for folders, needed, free in disks:
        names = " and ".join(f"{folder}/" for folder in folders)
        print(f"disk: about {needed / 1e9:,.1f} GB still to write in {names}, {free / 1e9:,.1f} GB free")
    of_gpu = f", of the smallest GPU {card / 1e9:,.1f} GB" if card and gpus else ""
    print(f"memory: {machine.memory / 1e9:,.1f} GB{of_gpu}")
    print(f"time: about {duration(sum(taken.seconds for taken in left.values()))}\n")
    if missing := room.missing_images(left, loaded, results):
        found_wrong.append(missing)
    return [*found_wrong, *room.problems(left, disks, machine)]


def _trial(micro_batch: int) -> int:
    """Measure collectives and training steps in every process of this group, and print what the main one found."""
    import torch

    from mmfm import config
    from mmfm.infra.distributed import process_group
    from mmfm.models.flops import dit_flops
    from mmfm.training import trial
    from mmfm.training.usage import bf16_peak

    with process_group() as ranks, tempfile.TemporaryDirectory() as folder:
        on_gpu = ranks.device.type == "cuda"

        def seconds(run: Callable[[], object], repetitions: int = 5) -> float:
            """Return the median time after two repetitions to warm up."""
            found = []
            for _ in range(2 + repetitions):
                start = time.perf_counter()
                run()
                if on_gpu:
                    torch.cuda.synchronize()
                found.append(time.perf_counter() - start)
            return median(found[2:])

        def say(text: str) -> None:
            if ranks.is_main:
                print(text, flush=True)

        name = torch.cuda.get_device_name() if on_gpu else "CPU"
        say(f"{ranks.world} x {name}")
        if ranks.world > 1:
            tensor = torch.ones(1 << (26 if on_gpu else 20), device=ranks.device)
            bus = 2 * (ranks.world - 1) / ranks.world * tensor.nbytes / seconds(lambda: ranks.sum(tensor))
            say(f"all-reduce of {tensor.nbytes / 1e6:.0f} MB: {bus / 1e9:.1f} GB/s per process (bus bandwidth)")
        model = config.Model((1152, 2048), (28, 2), (16, 16)) if on_gpu else config.Model((48, 48), (2, 1), (3, 3))
        shape, labels = ((768, 16, 16), 8192) if on_gpu else ((64, 4, 4), 64)
        defaults = Path(__file__).parents[3] / "config"
        train = config.load([defaults / "config.yaml", defaults / "imagenet256.yaml"]).train
        flops = 3 * dit_flops(model, shape[1] * shape[2], shape[0]) * micro_batch
        for compiled in (False, True) if on_gpu else (False,):
            task = trial.labelled(replace(train, compile=compiled), labels, shape)
            made = trial.trainer(task, model, shape, micro_batch * ranks.world, Path(folder), ranks)
            forward = made.division.wrapped(compiled)
            batches = trial.RandomLatents(made.plan, ranks.device, shape).batches(0, 1 << 30)
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            step = seconds(functools.partial(made._train_step, forward, batches))
            line = f"training step of {'XL' if on_gpu else 'a toy model'}, {micro_batch} images per process"
            line += f"{', compiled' if compiled else ''}: {1e3 * step:.0f} ms"
            line += f", {micro_batch * ranks.world / step:,.0f} images/s"
            if on_gpu:
                line += f", peak {torch.cuda.max_memory_allocated() / 1e9:.1f} GB"
                if peak := bf16_peak(ranks.device):
                    line += f", {flops / step / peak:.0%} of the card's bf16 peak"
            say(line)
            del made, forward, batches
    return 0
