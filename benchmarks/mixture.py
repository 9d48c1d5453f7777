"""Compare the mixture engine with scikit-learn, and measure its scaling and its cost relative to bare matrix products.

python benchmarks/mixture.py --sizes small large --rounds 1 --threads 2

The data are synthetic tokens: half as many clusters as components, in groups, unequal, anisotropic and heavy-tailed.
The contestants take turns, each in its own process, on the same float32 data, from data to a converged fit with labels.
Memory is the peak above the usage after imports. One function computes all final log-likelihoods in float64. Writes
benchmarks/results/mixture.json and .md, and keeps earlier results of parts that are not run again.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

SIZES = {"small": (20_000, 128, 256), "large": (100_000, 384, 1024)}
CONTESTANTS = ("truncated", "exact", "scikit-learn")
TOL, MAX_ITER, SEED = 1e-3, 100, 42
RESULTS = Path(__file__).parent / "results"


def tokens(n: int, c: int, k: int, seed: int = 0) -> np.ndarray:
    """Make tokens (n, c) float32 in k / 2 clusters of unequal size, shape and scale, with heavy tails."""
    g = np.random.default_rng(seed)
    spectrum = (1 + np.arange(c)) ** -0.4
    spectrum *= np.sqrt(c / (spectrum**2).sum())
    groups, clusters = max(4, k // 16), max(2, k // 2)
    top = g.normal(size=(groups, c)) * spectrum
    centres = 0.8 * top[g.integers(groups, size=clusters)] + 0.8 * g.normal(size=(clusters, c)) * spectrum
    scales = np.exp(0.3 * g.normal(size=(clusters, c)) + 0.25 * g.normal(size=(clusters, 1))) * spectrum
    basis = 0.5 * g.normal(size=(clusters, 4, c)) * spectrum
    labels = g.choice(clusters, size=n, p=g.dirichlet(np.full(clusters, 2.0)))
    result = np.empty((n, c), np.float32)
    for start in range(0, n, 2048):
        own = labels[start : start + 2048]
        noise = scales[own] * g.standard_t(6, size=(len(own), c)) / np.sqrt(1.5)
        low = np.einsum("bf,bfc->bc", g.laplace(size=(len(own), 4)), basis[own])
        tail = np.exp(0.1 * g.normal(size=(len(own), 1)))
        result[start : start + 2048] = centres[own] + 0.6 * tail * (noise + low)
    return result


def _status(name: str) -> float:
    """Return a field of /proc/self/status in MB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) / 1024


def _baseline() -> float:
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    return _status("VmRSS")


class _Clock:
    """Wall and CPU seconds since the start, at each iteration."""

    def __init__(self) -> None:
        self.begin, self.marks = (time.perf_counter(), time.process_time()), []

    def mark(self) -> None:
        self.marks.append((time.perf_counter() - self.begin[0], time.process_time() - self.begin[1]))

    def summary(self) -> dict[str, Any]:
        """Summarise the marks: the first ends the initialisation, the last but one EM, the last the labelling."""
        wall, cpu = ([mark[i] for mark in self.marks] for i in (0, 1))
        return {
            "start_s": wall[0],
            "start_cpu_s": cpu[0],
            "iteration_s": statistics.median(np.diff(wall[:-1])),
            "iteration_cpu_s": statistics.median(np.diff(cpu[:-1])),
            "total_s": wall[-1],
            "total_cpu_s": cpu[-1],
        }


def run_scikit_learn(path: Path, k: int, max_iter: int) -> tuple[dict[str, Any], tuple]:
    """Fit with scikit-learn; return measurements and (weights, means, variances)."""
    from sklearn.mixture import GaussianMixture

    baseline = _baseline()
    clock = _Clock()

    class Timed(GaussianMixture):
        def _e_step(self, X, **options):
            clock.mark()
            return super()._e_step(X, **options)

    data = np.load(path)
    model = Timed(k, covariance_type="diag", tol=TOL, reg_covar=1e-6, max_iter=max_iter, random_state=SEED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit_predict(data)  # its last E-step gives the labels
    clock.mark()
    peak = _status("VmHWM") - baseline
    about = {"bounds": [float(b) for b in model.lower_bounds_], "converged": bool(model.converged_), "peak_mb": peak}
    return clock.summary() | about, (model.weights_, model.means_, model.covariances_)


def gmm_section(k: int, e_step: str, cache_gb: float):
    """Return the section ``gmm`` of the configuration."""
    from mmfm.config import Gmm

    return Gmm(
        n_components=k, covariance_type="diag", init="kmeans", reg_covar=1e-6, tol=TOL, max_iter=MAX_ITER, seed=SEED,
        precision="float32", chunk_size=4096, n_init=1, init_means="", e_step=e_step, cache_gb=cache_gb,
        weights="fit", shrinkage=0.0,
    )  # fmt: skip


def run_engine(path: Path, k: int, max_iter: int, e_step: str, cache_gb: float) -> tuple[dict[str, Any], tuple]:
    """Fit with the project's engine; return measurements and (weights, means, variances)."""
    import torch

    from mmfm.infra.distributed import Ranks
    from mmfm.mixture import initial
    from mmfm.mixture.em import EMState, em_iterations
    from mmfm.mixture.groups import GROUP_ROWS
    from mmfm.mixture.streaming import Rows
    from mmfm.mixture.truncated import Truncation, measure_gap
    from mmfm.stages import fit_gmm

    initial.import_faiss()
    baseline = _baseline()
    clock = _Clock()
    data = np.load(path, mmap_mode="r")
    section, ranks = gmm_section(k, e_step, cache_gb), Ranks(0, 1, torch.device("cpu"))
    c = data.shape[1]

    def read(start: int, stop: int) -> np.ndarray:
        # Pages of a mapped file would count as memory of this process.
        offset = data.offset + 4 * c * start
        return np.fromfile(path, np.float32, (stop - start) * c, offset=offset).reshape(-1, c)

    rows = Rows(read, len(data), section.chunk_size, ranks, cache_gb * 1e9, GROUP_ROWS * k)
    mixture, winners = initial.start(rows, section)
    truncation = Truncation() if e_step == "truncated" else None
    state = EMState(mixture, winners=winners if truncation else None)
    iterations = em_iterations(
        rows, state, max_iter=max_iter, tol=TOL, reg_covar=1e-6, dtype=torch.float32, truncation=truncation
    )
    clock.mark()
    for state in iterations:  # noqa: B007 - the last one is used
        clock.mark()
    fit_gmm.predict_all(rows, state.mixture, torch.float32)
    clock.mark()
    about = {"bounds": list(state.lower_bounds), "converged": state.converged, "peak_mb": _status("VmHWM") - baseline}
    about["reseeded"] = sum(state.reseeded)
    if truncation:
        about["gap"] = measure_gap(rows, state.mixture, state.winners, truncation, torch.float32)
    return clock.summary() | about, (state.mixture.weights, state.mixture.means, state.mixture.variances)


def contestant(name: str, path: Path, k: int, max_iter: int, cache_gb: float) -> dict[str, Any]:
    """Run one contestant in this process."""
    if name == "scikit-learn":
        found, parameters = run_scikit_learn(path, k, max_iter)
    else:
        found, parameters = run_engine(path, k, max_iter, name, cache_gb)
    import torch

    from mmfm.mixture.gaussian import Mixture

    found["n_iter"] = len(found["bounds"])
    found["log_likelihood"] = Mixture(*(np.asarray(p, np.float64) for p in parameters)).score(
        torch.from_numpy(np.load(path))
    )
    return found


def in_a_process(name: str, path: Path, k: int, threads: int, max_iter: int = MAX_ITER, cache_gb: float = 0.0) -> dict:
    """Run one contestant in its own process."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    line = [sys.executable, __file__, "--contestant", name, "--data", str(path), "--components", str(k)]
    line += ["--max-iter", str(max_iter), "--cache-gb", str(cache_gb)]
    # Spinning threads would slow down other programs on a shared machine.
    environment = {**os.environ, **dict.fromkeys(names, str(threads)), "OMP_WAIT_POLICY": "PASSIVE"}
    return json.loads(subprocess.run(line, env=environment, check=True, capture_output=True, text=True).stdout)


def compare(size: str, rounds: int, threads: int, cache_gb: float, folder: Path) -> dict[str, Any]:
    """Run all contestants on data of one size."""
    n, c, k = SIZES[size]
    path = folder / f"{size}.npy"
    np.save(path, tokens(n, c, k))
    runs: dict[str, list] = {name: [] for name in CONTESTANTS}
    for number in range(rounds):
        for name in CONTESTANTS[number % 3 :] + CONTESTANTS[: number % 3]:
            runs[name].append(in_a_process(name, path, k, threads, cache_gb=cache_gb))
            last = runs[name][-1]
            print(f"{size} {name}: {last['total_s']:.1f} s ({last['total_cpu_s']:.1f} s CPU)", file=sys.stderr)
    path.unlink()
    return {"n": n, "c": c, "k": k, "threads": threads, "cache_gb": cache_gb, "runs": runs, "load": os.getloadavg()[0]}


def scaling(threads: int, folder: Path) -> list[dict[str, Any]]:
    """Measure CPU seconds per iteration and peak memory for three values each of N, D and K, without a token cache."""
    base, found = (40_000, 128, 256), []
    points = [(n, 128, 256) for n in (20_000, 40_000, 80_000)]
    points += [(40_000, c, 256) for c in (64, 256)] + [(40_000, 128, k) for k in (128, 512)]
    for n, c, k in points:
        path = folder / "scaling.npy"
        np.save(path, tokens(n, c, base[2]))
        for name in ("exact", "truncated"):
            run = in_a_process(name, path, k, threads, max_iter=6, cache_gb=0.0)
            found.append(
                {"n": n, "c": c, "k": k, "e_step": name, **{i: run[i] for i in ("iteration_cpu_s", "peak_mb")}}
            )
            print(found[-1], file=sys.stderr)
    return found


def profile(threads: int) -> dict[str, Any]:
    """Measure the parts of an exact iteration on one chunk, and the bare matrix product, at both sizes."""
    import torch

    from mmfm.mixture.em import posteriors
    from mmfm.mixture.gaussian import Mixture
    from mmfm.mixture.moments import SufficientStatistics

    torch.set_num_threads(threads)

    def seconds(work, repeats: int = 7) -> float:
        times = []
        for _ in range(repeats):
            begin = time.process_time()
            work()
            times.append(time.process_time() - begin)
        return min(times)

    found = {}
    for size, (_, c, k) in SIZES.items():
        x = torch.from_numpy(tokens(4096 + k, c, k))
        means, x = x[4096:].double(), x[:4096]
        mixture = Mixture(torch.full((k,), 1 / k, dtype=torch.float64), means, x.var(0).expand(k, c) / 2)
        a, b, out = torch.randn(4096, 2 * c), torch.randn(2 * c, k), torch.empty(4096, k)
        joint, sums = mixture.log_joint(x, torch.float32), SufficientStatistics(mixture.means)
        responsibilities = posteriors(joint.clone())[1]
        found[size] = {
            "product_s": seconds(lambda a=a, b=b, out=out: torch.mm(a, b, out=out)),
            "log_joint_s": seconds(lambda m=mixture, x=x: m.log_joint(x, torch.float32)),
            "posteriors_s": seconds(lambda joint=joint: posteriors(joint.clone())),
        }
        if not isinstance(responsibilities, torch.Tensor):
            row, component, weight = responsibilities
            found[size]["moments_s"] = seconds(
                lambda s=sums, x=x, c=component, r=row, w=weight: s.add_pairs(x, c, r, w)
            )
            found[size]["pairs_per_row"] = len(row) / len(x)
        found[size]["product_gflops"] = 2 * 4096 * 2 * c * k / found[size]["product_s"] / 1e9
    return found


def table(comparison: dict[str, Any]) -> list[str]:
    """Return the Markdown table for one size, with medians over the rounds."""
    middle = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0] if isinstance(runs[0][key], float)}
        | {"n_iter": runs[0]["n_iter"], "bounds": runs[0]["bounds"]}
        for name, runs in comparison["runs"].items()
    }
    rival = middle["scikit-learn"]
    equal = min(m["n_iter"] for m in middle.values())
    lines = [
        f"N = {comparison['n']:,}, D = {comparison['c']}, K = {comparison['k']}, {comparison['threads']} threads, "
        f"{len(comparison['runs']['exact'])} round(s), {comparison['cache_gb']:g} GB of tokens cached by the engine",
        "",
        "| | " + " | ".join(middle) + " |",
        "|---" * (len(middle) + 1) + "|",
    ]
    rows = [
        ("initialisation, s", lambda m: f"{m['start_s']:.1f}"),
        ("median iteration, s", lambda m: f"{m['iteration_s']:.2f}"),
        ("iterations", lambda m: f"{m['n_iter']}"),
        ("data to converged fit, s", lambda m: f"{m['total_s']:.1f}"),
        ("data to converged fit, CPU s", lambda m: f"{m['total_cpu_s']:.1f}"),
        ("speed-up over scikit-learn (wall; CPU)", lambda m: f"{rival['total_s'] / m['total_s']:.1f}; "
         f"{rival['total_cpu_s'] / m['total_cpu_s']:.1f}"),
        ("peak memory above imports, MB", lambda m: f"{m['peak_mb']:.0f}"),
        ("relative to scikit-learn", lambda m: f"{m['peak_mb'] / rival['peak_mb']:.2f}"),
        (f"lower bound at iteration {equal}", lambda m: f"{m['bounds'][equal - 1]:.3f}"),
        ("final mean log-likelihood (float64)", lambda m: f"{m['log_likelihood']:.4f}"),
        ("difference from scikit-learn", lambda m: f"{m['log_likelihood'] - rival['log_likelihood']:+.4f}"),
    ]  # fmt: skip
    return lines + [f"| {name} | " + " | ".join(value(m) for m in middle.values()) + " |" for name, value in rows]


def estimate(flops: float = 67e12, share: float = 0.7, n: int = 1_281_167, c: int = 768, k: int = 8192) -> str:
    """Estimate the time of an exact iteration at full size on H100 GPUs."""
    work = 4.0 * n * c * k
    one = work / (flops * share)
    return (
        f"An exact iteration at N = {n:,}, D = {c}, K = {k} is one product of (N, 2 D) with (2 D, K): 4 N D K = "
        f"{work:.3g} operations. At {share:.0%} of an H100's {flops / 1e12:.0f} TFLOP/s (float32 without TF32, from "
        f"the data sheet), this takes {one:.2f} s on one GPU and {one / 8:.2f} s on eight; 100 iterations take "
        f"{100 * one / 60:.1f} and {100 * one / 8 / 60:.1f} minutes. Each iteration sums statistics of "
        f"{16 * c * k / 1e6:.0f} MB over the GPUs. These numbers are not measured."
    )


def markdown(found: dict[str, Any]) -> str:
    """Return the Markdown report of all parts."""
    lines = [f"Machine: {found['machine']}", ""]
    for size in SIZES:
        if size in found:
            lines += [f"### {size}", "", *table(found[size]), ""]
    if "scaling" in found:
        lines += ["### Scaling", "", "One thread, without a token cache.", ""]
        lines += ["| N | D | K | E-step | CPU s per iteration | peak MB |", "|---|---|---|---|---|---|"]
        lines += [
            f"| {p['n']:,} | {p['c']} | {p['k']} | {p['e_step']} | {p['iteration_cpu_s']:.3f} | {p['peak_mb']:.0f} |"
            for p in found["scaling"]
        ] + [""]
    if "profile" in found:
        lines += ["### Profile of an exact iteration, one chunk of 4096 rows, one thread", ""]
        lines += ["| size | part | CPU ms | relative to the bare product |", "|---|---|---|---|"]
        for size, parts in found["profile"].items():
            for name in ("product_s", "log_joint_s", "posteriors_s", "moments_s"):
                if name in parts:
                    share = parts[name] / parts["product_s"]
                    lines.append(f"| {size} | {name.removesuffix('_s')} | {1e3 * parts[name]:.1f} | {share:.2f} |")
        lines.append("")
    return "\n".join([*lines, "### Full size", "", estimate(), ""])


def machine() -> str:
    """Return the name of the processor and its number of cores."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = next((line.split(":")[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")), "?")
    return f"{name}, {os.cpu_count()} cores"


def main() -> None:
    """Run the requested parts and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", default=[], choices=SIZES, help="comparisons to run")
    parser.add_argument("--scaling", action="store_true", help="measure time and memory by N, D, K, and the profile")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument(
        "--cache-gb", type=float, default=0.0, help="size of the engine's token cache; 0 reads tokens in every pass"
    )
    for name, kind in (("contestant", str), ("data", Path), ("components", int)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    parser.add_argument("--max-iter", type=int, default=MAX_ITER, help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.contestant:
        print(json.dumps(contestant(o.contestant, o.data, o.components, o.max_iter, o.cache_gb)))
        return
    o.out.mkdir(parents=True, exist_ok=True)
    path = o.out / "mixture.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    found["machine"] = machine()
    with tempfile.TemporaryDirectory() as folder:
        for size in o.sizes:
            found[size] = compare(size, o.rounds, o.threads, o.cache_gb, Path(folder))
            path.write_text(json.dumps(found, indent=1))
        if o.scaling:
            found["scaling"], found["profile"] = scaling(1, Path(folder)), profile(1)
    path.write_text(json.dumps(found, indent=1))
    path.with_suffix(".md").write_text(markdown(found))
    print(markdown(found))


if __name__ == "__main__":
    main()
