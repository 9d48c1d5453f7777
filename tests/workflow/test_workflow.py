"""The workflow: names, parameters, GPU limit, locks, and what a changed key reruns (dry runs of the real Snakefile)."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from mmfm import config
from mmfm.workflow import jobs, locks, targets
from support.checkout import link_workflow
from support.places import ROOT

DEFAULTS = config.load([ROOT / "config" / "config.yaml"])


@pytest.mark.parametrize(
    ("text", "setting", "expected"),
    [
        ("", "mode", "seed0.tiny.k256.t25"),
        ("", "uncond", "seed0.tiny.t25"),
        (".k512.t4", "gmm", "seed0.tiny.k512.t4"),
        (".seed3.S", "uncond", "seed3.S.t25"),
        (".seed1.tiny.k8.t1", "mode", "seed1.tiny.k8.t1"),
        (".t4", "class", "seed0.tiny.t4.g1"),
        (".g2.5", "class_gmm", "seed0.tiny.k256.t25.g2.5"),
        (".step60", "mode", "seed0.tiny.k256.step60.t25"),
        (".seed1.S.step60.t4", "uncond", "seed1.S.step60.t4"),
    ],
)
def test_variants_are_completed(text, setting, expected):
    complete = targets.parse_variant(text, setting, DEFAULTS)
    assert str(complete) == expected
    assert targets.parse_variant(f".{expected}", setting, DEFAULTS) == complete
    assert re.fullmatch(targets.complete_pattern(DEFAULTS), f"{setting}.{expected}")
    assert text == f".{expected}" or not re.fullmatch(targets.complete_pattern(DEFAULTS), f"{setting}{text}")


def test_variants_of_autoguidance_carry_the_guides_scale():
    for text, setting, expected in (
        ("", "mode", "seed0.tiny.k256.t25.g1.5"),
        (".t4.g2.0", "uncond", "seed0.tiny.t4.g2"),
    ):
        complete = targets.parse_variant(text, setting, DEFAULTS, guided=True)
        assert str(complete) == expected
        assert re.fullmatch(targets.complete_pattern(DEFAULTS), f"{setting}_ag.{expected}")
    guided = {"guide": replace(DEFAULTS.guide, interval=(0.1, 0.8))}
    keys = config.keys_of_kind(targets.guidance_of(1.5, True, replace(DEFAULTS, **guided)), "identity")
    assert keys == {"scale": 1.5, "interval": [0.1, 0.8]}
    assert targets.guidance_of(None, False, DEFAULTS) == config.Guidance(1.0, (0.0, 1.0))


def test_a_mode_model_with_dropout_has_a_scale():
    dropout = replace(DEFAULTS, train=replace(DEFAULTS.train, mode_dropout=0.1))
    assert str(targets.parse_variant(".g3", "mode", dropout)) == "seed0.tiny.k256.t25.g3"


@pytest.mark.parametrize(
    ("text", "setting"),
    [
        (".t4.k5", "gmm"),
        (".k8", "uncond"),
        (".k8", "class"),
        (".XXL", "mode"),
        (".g2", "mode"),
        (".t4.step9", "mode"),
        (".step0", "mode"),
    ],
)
def test_bad_variants_are_refused(text, setting):
    with pytest.raises(ValueError, match=r"variant|mixture|label dropout|first step"):
        targets.parse_variant(text, setting, DEFAULTS)


def test_a_step_after_the_last_is_refused_where_the_budget_says_so():
    steps = replace(DEFAULTS, train=replace(DEFAULTS.train, steps=100))
    assert targets.parse_variant(".step100", "mode", steps).step == 100
    with pytest.raises(ValueError, match=r"'.step101' is after the last step .* raise 'train.steps', which is 100"):
        targets.parse_variant(".step101", "mode", steps)


def test_parameters_hold_what_the_name_sets():
    value = jobs.stage_parameter(DEFAULTS, "fit_gmm", gmm={"n_components": 7})
    assert '"n_components":7' in value and "chunk_size" not in value


def test_stale_locks_are_cleared_and_live_ones_kept(tmp_path):
    lock = tmp_path / "locks" / "0.input.lock"
    hold = f"h = clear_stale_locks(Path({str(tmp_path)!r})); print('held', flush=True); input()"
    hold = f"from pathlib import Path; from mmfm.workflow.locks import *; {hold}"
    other = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"held\n"
    lock.parent.mkdir()
    lock.write_text("results/x")
    locks.clear_stale_locks(tmp_path).close()
    assert lock.exists()
    other.kill()
    other.wait()
    locks.clear_stale_locks(tmp_path).close()
    assert not lock.exists()


class Checkout:
    """A copy of the workflow with its own results, in which every stage is a command that only touches its outputs."""

    def __init__(self, folder):
        self.folder = folder
        link_workflow(folder)

    def run(self, *arguments, keys=None, text=None):
        overlay = self.folder / "overlay.yaml"
        overlay.write_text(text if text is not None else yaml.safe_dump(keys or {"gpus": 0}))
        line = [sys.executable, "-m", "snakemake", *arguments, "--cores", "2", "--configfile", str(overlay)]
        return subprocess.run(line, cwd=self.folder, capture_output=True, text=True)

    def jobs(self, *targets, keys=None, text=None):
        """Return the rules that a dry run would execute."""
        result = self.run(*(targets or ("results/fid/dinov2_mode.txt",)), "-n", keys=keys, text=text)
        assert result.returncode == 0, result.stdout + result.stderr
        output = result.stdout + result.stderr
        if "Job stats:" not in output:
            return set()
        table = output.split("Job stats:")[1].split("total")[0].splitlines()[3:]
        return {line.split()[0] for line in table if line.strip()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A checkout whose main job is done as far as Snakemake knows: outputs there, code and parameters recorded."""
    checkout = Checkout(tmp_path_factory.mktemp("checkout"))
    planned = checkout.run("results/fid/dinov2_mode.txt", "-n")
    assert planned.returncode == 0, planned.stdout + planned.stderr
    for line in (planned.stdout + planned.stderr).splitlines():
        if line.startswith("    output: "):
            for name in line.removeprefix("    output: ").split(", "):
                path = checkout.folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch() if path.suffix not in ("", ".zarr") else path.mkdir()
    touched = checkout.run("results/fid/dinov2_mode.txt", "--touch", "--forceall")
    assert touched.returncode == 0, touched.stdout + touched.stderr
    return checkout


FROM_SAMPLE = {"sample", "fid", "short_fid"}
FROM_TRAIN = {"train"} | FROM_SAMPLE


def test_a_second_call_has_nothing_to_do(finished):
    assert finished.jobs() == set()


@pytest.mark.parametrize(
    ("keys", "rerun"),
    [
        ({"sample": {"n_images": 100}}, FROM_SAMPLE),
        ({"sample": {"solver": "heun", "mode_draw": "stratified"}}, FROM_SAMPLE),
        # A guide and scales of guidance are no matter of an unguided target.
        ({"guide": {"scale": 2.0, "epochs": 7}, "sample": {"guidance": {"scale": 3.0}, "features": True}}, set()),
        # Another number of modes is another name: nothing of the present one is touched.
        ({"gmm": {"n_components": 32}}, {"fit_gmm", "spatial_gmm"} | FROM_TRAIN),
        ({"sample": {"batch_size": 10}, "train": {"workers": 3, "preview": {"every": 7}}, "processes": 2}, set()),
    ],
)
def test_a_changed_key_reruns_what_depends_on_it(finished, keys, rerun):
    """As a person calls it; every single key is tried in test_rerun.py."""
    assert finished.jobs(keys=keys) == rerun


def test_comments_and_the_order_of_keys_rerun_nothing(finished):
    text = "# another comment\ntrain: {lr: 0.001, epochs: 2}\nsample:\n  time_points: 25\n  n_images: 2000\n"
    assert finished.jobs(text=text) == set()


def test_a_variant_reuses_what_it_shares(finished):
    assert finished.jobs("results/fid/dinov2_mode.t4.txt") == FROM_SAMPLE
    assert finished.jobs("results/fid/dinov2_uncond.txt") == FROM_TRAIN


def test_several_seeds_are_a_target_of_their_own(finished):
    """Its first seed is there; one name still trains one model."""
    plan = finished.run("results/fid/dinov2_mode.seeds3.txt", "-n").stdout
    counts = dict(re.findall(r"^(\w+) +(\d+)$", plan, re.M))
    assert counts == {"train": "2", "sample": "2", "fid": "2", "seeds": "1", "total": "7"}
    result = finished.run("results/fid/dinov2_mode.seeds1.txt", "-n")
    assert result.returncode != 0 and "'.seeds1' has no range" in result.stdout + result.stderr


def test_a_curve_makes_the_points_that_are_missing(finished):
    """Of one training, and of one whose weights at some steps are wanted."""
    plan = finished.run("results/curve/dinov2_mode.t4,10,25.png", "-n").stdout
    counts = dict(re.findall(r"^(\w+) +(\d+)$", plan, re.M))
    assert counts == {"sample": "2", "fid": "2", "curve": "1", "total": "5"}
    assert finished.jobs("results/curve/dinov2_mode.k64,256.txt") == {
        "fit_gmm", "spatial_gmm", "train", "sample", "fid", "curve",
    }  # fmt: skip
    result = finished.run("results/curve/dinov2_mode.t4.png", "-n")
    assert result.returncode != 0 and "'dinov2_mode.t4' does not name a curve: no part" in result.stdout + result.stderr


def test_memorisation_adds_the_held_out_images_and_knows_the_names_of_distances(finished):
    """The images and the training tokens are there; a step asks the training for its milestone."""
    added = {"extract_heldout", "memorisation", "short_memorisation"}
    assert finished.jobs("results/memorisation/dinov2_mode.png") == added
    assert finished.jobs("results/memorisation/dinov2_mode.seed0.tiny.k256.t25.json") == added - {"short_memorisation"}
    plan = finished.run("results/memorisation/dinov2_mode.seed7.step60.png", "-n", "-p")
    assert "results/sample/dinov2_mode/seed7.tiny.k256.step60.t25/images.npz" in plan.stdout
    (line,) = (line for line in plan.stdout.splitlines() if " -- train " in line)
    assert "train.milestone_steps=[31,60,62]" in line.replace("\\", "").replace("'", "")


def test_short_names_are_copies_of_every_file(finished):
    """The rules are made in a loop: each must copy its own kind of result."""
    wanted = {}
    for kind in targets.OF_IMAGES:
        folder = finished.folder / "results" / kind
        folder.mkdir(parents=True, exist_ok=True)
        for ending in targets.ENDINGS[kind]:
            text = wanted[folder / f"dinov2_mode.seed9.{ending}"] = f"{kind} as {ending}"
            (folder / f"dinov2_mode.seed9.tiny.k256.t25.{ending}").write_text(text)
    named = [f"results/{kind}/dinov2_mode.seed9.{targets.ENDINGS[kind][0]}" for kind in targets.OF_IMAGES]
    rules = [f"short_{kind}" for kind in targets.OF_IMAGES]
    made = finished.run(*named, "--allowed-rules", *rules)
    assert made.returncode == 0, made.stdout + made.stderr
    assert {path: path.read_text() for path in wanted} == wanted
    said = (finished.folder / "results" / "logs" / "short_mode_quality.dinov2_mode.seed9.log").read_text()
    assert said == "mode_quality as txt"


def test_a_sweep_reuses_the_tokens_and_the_fit_that_is_there(finished):
    sweep = "results/gmm/dinov2/sweep.png"
    assert finished.jobs(sweep) == {"fit_gmm", "spatial_gmm", "sweep"}
    assert finished.jobs(sweep, keys={"sweep": {"modes": [256]}}) == {"sweep"}
    assert finished.jobs(keys={"sweep": {"modes": [256]}}) == set()


def test_modes_are_judged_by_the_images_that_are_there(finished):
    """By a short name or a complete one; what is judged is made as for a distance."""
    judged = {"mode_quality", "short_mode_quality"}
    for kind in ("png", "txt", "json"):
        assert finished.jobs(f"results/mode_quality/dinov2_mode.{kind}") == judged
    assert finished.jobs("results/mode_quality/dinov2_mode.seed0.tiny.k256.t25.png") == {"mode_quality"}
    assert finished.jobs("results/mode_quality/dinov2_mode.t4.png") == {"sample"} | judged
    named = ["results/mode_quality/dinov2_class_gmm_ag.k8.t4.g2.png", "results/mode_quality/dinov2_gmm.seed2.txt"]
    plan = finished.run(*named, "-n").stdout
    for name in ("class_gmm_ag.seed0.tiny.k8.t4.g2", "gmm.seed2.tiny.k256.t25"):
        assert f"results/mode_quality/dinov2_{name}.json" in plan


@pytest.mark.parametrize(
    ("name", "keys", "said"),
    [
        ("uncond", {}, "'uncond' has a Gaussian source, which has no modes to judge; name one of gmm, mode, class_gmm"),
        ("class.t4", {}, "the setting 'class' has a Gaussian source"),
        ("mode", {"gmm": {"weights": "g.safetensors"}, "spatial_gmm": {"weights": "s.zarr"}}, "set it to `fit` (see"),
    ],
)
def test_modes_that_nobody_can_judge_are_one_error(finished, name, keys, said):
    result = finished.run(f"results/mode_quality/dinov2_{name}.png", "-n", keys={"gpus": 0, **keys})
    message = result.stdout + result.stderr
    assert result.returncode != 0 and said in message and "docs/metrics.md#modes" in message
    assert "Traceback" not in message


def test_targets_of_autoguidance_train_a_guide_of_its_own(finished):
    """The guide differs from the main model in size or budget alone, and never shares its folder."""
    plan = finished.run("results/fid/dinov2_mode_ag.txt", "-n", keys={"guide": {"model": "tiny", "epochs": 3}}).stdout
    assert "results/train/dinov2_mode/seed0.tiny.k256.guide/ema.safetensors" in plan
    (finished.folder / "given").mkdir(exist_ok=True)
    (finished.folder / "given" / "dinov2_mode.safetensors").touch()
    given = {"guide": {"weights": "given/{encoder}_{setting}.safetensors"}}
    assert finished.jobs("results/fid/dinov2_mode_ag.g2.txt", keys=given) == FROM_SAMPLE | {"import_guide"}


def test_every_setting_is_a_target(finished):
    names = ["uncond_ag", "class", "class_ag.g2", "class_gmm.t4", "class_gmm_ag"]
    plan = finished.run(*(f"results/fid/dinov2_{name}.txt" for name in names), "-n").stdout
    for folder in ("uncond/seed0.tiny_guide", "class/seed0.tiny_guide", "class_gmm/seed0.tiny_guide.k256"):
        assert f"results/train/dinov2_{folder}.guide/ema.safetensors" in plan
    for folder in ("uncond_ag/seed0.tiny.t25.g1.5", "class_gmm/seed0.tiny.k256.t4.g1", "class_ag/seed0.tiny.t25.g2"):
        assert f"results/sample/dinov2_{folder}/images.npz" in plan


def test_distances_during_training_reach_the_command(finished, tmp_path):
    weights = tmp_path / "a detector.safetensors"
    weights.touch()
    keys = {"gpus": 0, "train": {"preview": {"fid_every": 20}}, "fid": {"weights": str(weights)}}
    plan = finished.run("results/fid/dinov2_mode.seed7.txt", "-n", "-p", keys=keys)
    assert plan.returncode == 0, plan.stdout + plan.stderr
    (line,) = (line for line in plan.stdout.splitlines() if " -- train " in line)
    words = shlex.split(line)
    assert words[words.index("--detector") + 1] == "fashion"
    assert words[words.index("--detector-weights") + 1] == str(weights)
    assert words[words.index("--fid-reference") + 1] == "results/fid_reference/reference.safetensors"
    assert "train.preview.fid_every=20" in words


def test_a_scale_without_guidance_is_refused(finished):
    result = finished.run("results/fid/dinov2_uncond.seed0.tiny.t25.g2.txt", "-n")
    assert result.returncode != 0 and "'.g2' can't be a classifier-free guidance scale" in result.stdout + result.stderr


@pytest.mark.parametrize(
    ("run", "typed", "said"),
    [
        ("", "results/fid/dinov2_moed.txt", "did you mean 'results/fid/dinov2_mode.txt'"),
        ("", "results/imagenet256/fid/dinov2_mode.txt", "pass it with --configfile"),
        ("flowers", "results/fid/dinov2_mode.txt", "did you mean 'results/flowers/fid/dinov2_mode.txt'"),
        ("flowers", "results/flowers/fid/dinov2_mode.t4.seed1.txt", "results/flowers/fid/dinov2_mode.seed1.t4.txt"),
        ("", "results/memorisation/dinov2_moed.png", "did you mean 'results/memorisation/dinov2_mode.png'"),
        ("", "results/mode_quality/dinov2_mode.k9", "did you mean 'results/mode_quality/dinov2_mode.k9.png'"),
        ("", "results/curve/dinov2_moed.t5,10.png", "did you mean 'results/curve/dinov2_mode.t5,10.png'"),
        ("", "results/curve/dinov2_mode.t5,10.pdf", "did you mean 'results/curve/dinov2_mode.t5,10.png'"),
        ("", "results/reconstruction/dinov.txt", "did you mean 'results/reconstruction/dinov2.txt'"),
        ("flowers", "results/reconstruction/dinov2.txt", "did you mean 'results/flowers/reconstruction/dinov2.txt'"),
        ("", "results/pics/comparison.txt", "`run: pics`, pass it with --configfile"),
        ("flowers", "results/comparison.html", "is results/flowers/comparison.txt"),
    ],
)
def test_a_wrong_target_is_explained(finished, run, typed, said):
    """Each kind of mistake is tried in test_targets.py."""
    result = finished.run(typed, "-n", keys={"gpus": 0, "run": run})
    message = result.stdout + result.stderr
    forms = {"reconstruction": "{dinov2}.txt", "comparison": "The comparison of this configuration is results/"}
    usual = "{dinov2}_{uncond,gmm,mode,class,class_gmm}[_ag][.seedN]"
    form = next((form for kind, form in forms.items() if kind in typed), usual)
    assert result.returncode != 0 and said in message and form in message
    assert "Traceback" not in message and "MissingRule" not in message


@pytest.mark.parametrize("options", [["--summary"], ["--dag"], ["--report", "report.html"], ["-n"]])
def test_the_profile_gives_the_number_of_cores(finished, options):
    """A plain call, without --cores."""
    line = [sys.executable, "-m", "snakemake", *options, "--", "results/fid/dinov2_mode.txt"]
    result = subprocess.run(line, cwd=finished.folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "No target was named" not in result.stderr


def test_a_bare_call_says_what_it_makes(finished):
    result = finished.run("-n")
    last = result.stderr.splitlines()[-1]
    assert last.startswith("No target was named, so this makes results/fid/dinov2_uncond.txt, ")
    assert re.search(r": \d+ jobs, about [\d.]+ min by the estimates", last)
    assert "No target" not in finished.run("-n", "results/fid/dinov2_gmm.txt").stderr


def test_an_unknown_key_names_the_nearest(finished):
    result = finished.run("-n", keys={"gmm": {"n_component": 3}})
    assert result.returncode != 0
    assert "unknown configuration key 'gmm.n_component' (did you mean 'n_components'?)" in result.stdout + result.stderr


def test_more_gpus_than_the_limit_is_an_error(finished):
    result = finished.run("-n", keys={"gpus": 99})
    assert result.returncode != 0 and "'gpus' is 99" in result.stdout + result.stderr


def test_the_main_job_again_after_kill(finished):
    """Snakemake killed with -9 leaves its lock; the same command is not refused."""
    script = "import time; time.sleep(600)"
    rules = finished.folder / "slow.smk"
    rules.write_text(
        'include: "Snakefile"\n\n\nrule slow:\n    output:\n        "slow.txt",\n    shell:\n'
        f"        \"echo > started; {sys.executable} -c '{script}' && echo > {{output}}\"\n"
    )
    line = [sys.executable, "-m", "snakemake", "slow.txt", "-s", "slow.smk", "--cores", "1"]
    line += ["--workflow-profile", "profiles/default"]
    process = subprocess.Popen(line, cwd=finished.folder, start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 500
    while not (finished.folder / "started").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    second = subprocess.run(line, cwd=finished.folder, capture_output=True, text=True)
    message = second.stdout + second.stderr
    assert second.returncode != 0 and "Directory cannot be locked" in message
    assert f"another Snakemake (process {process.pid}) is running in this folder" in message
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert list((finished.folder / ".snakemake" / "locks").glob("*.lock"))
    again = subprocess.run([*line, "-n"], cwd=finished.folder, capture_output=True, text=True)
    assert again.returncode == 0 and "slow" in again.stdout + again.stderr
    assert not list((finished.folder / ".snakemake" / "locks").glob("*.lock"))


LAST_WORDS = """
import signal, sys, time
def stop(*_):
    time.sleep(0.5)
    sys.exit(print("step 5 is saved", flush=True) or 130)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, stop)
print("ready", flush=True)
time.sleep(600)
"""


def start_words(folder: Path, script: str, *options: str) -> subprocess.Popen:
    """Start a rule that runs a script with a log, as a stage's rule does, for a rule without output, as `all` is."""
    (folder / "words.py").write_text(script)
    (folder / "words.smk").write_text(
        'include: "Snakefile"\n\n\nrule words:\n    output:\n        "words.txt",\n    log:\n        "words.log",\n'
        '    shell:\n        "python words.py 2>&1 | tee {log:q}; echo > {output}"\n'
        "\n\nrule every:\n    input:\n        rules.words.output,\n"
    )
    line = [sys.executable, "-m", "snakemake", "every", "-s", "words.smk", "--cores", "1", *options]
    return subprocess.Popen(
        [*line, "--workflow-profile", "profiles/default"], cwd=folder, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # A shell that runs the tests in the background ignores SIGINT, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def wait_for(log: Path, words: str) -> None:
    """Wait until a log has some words."""
    deadline = time.monotonic() + 300
    while not log.exists() or words not in log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_the_last_words_of_an_interrupted_stage_reach_its_log(finished, number):
    """A signal to the process group, as from a terminal or a scheduler, does not end `tee` before the stage."""
    log = finished.folder / "words.log"
    log.unlink(missing_ok=True)
    process = start_words(finished.folder, LAST_WORDS)
    wait_for(log, "ready")
    os.killpg(process.pid, number)
    said = process.communicate()[1]
    assert process.returncode != 0
    wait_for(log, "step 5 is saved")
    assert not (finished.folder / "words.txt").exists()
    if number != signal.SIGUSR1:  # which ends Snakemake itself
        assert "stopped; the same command resumes\n  finished: 0 of 1 jobs\n" in said
        assert " failed" not in said and "At least one job" not in said


FAILS = "import sys; print('words: error: too many (see docs/x.md)'); sys.exit(3)"


def test_a_failed_run_ends_with_what_matters(finished):
    """Why, where, what to do and what is finished are the last lines; the command is in Snakemake's log alone."""
    process = start_words(finished.folder, FAILS)
    said = process.communicate()[1]
    assert process.returncode != 0 and not (finished.folder / "words.txt").exists()
    assert (finished.folder / "words.log").read_text() == "words: error: too many (see docs/x.md)\n"
    *before, first, reason, log, remedy, state = said.splitlines()
    assert "words did not finish; its log: words.log" in before  # at once, while other jobs may go on
    assert first == "words failed" and reason == "  reason:   too many (see docs/x.md)"
    own = re.search(r"words\.log \(Snakemake's own, with the command: (.+)\)", log)[1]
    assert "it goes on with words" in remedy and state == "  finished: 0 of 1 jobs"
    assert not any("python words.py" in line or "job execution failed" in line for line in before)
    assert "python words.py" in (finished.folder / own).read_text()


def test_commands_are_printed_if_asked_for(finished):
    said = start_words(finished.folder, FAILS, "--printshellcmds").communicate()[1]
    assert "returned non-zero exit status 3" in said and "words failed\n" in said


def test_a_second_snakemake_leaves_the_log_of_a_running_job_alone(finished):
    """Snakemake's lock refuses it, and if that was killed with its Snakemake, the lock on the log does."""
    log = finished.folder / "words.log"
    log.unlink(missing_ok=True)
    script = "import os, time; print('ready', os.getpid(), flush=True); time.sleep(600)"
    first = start_words(finished.folder, script)
    try:
        wait_for(log, "ready")
        words = log.read_text()
        said = start_words(finished.folder, FAILS).communicate()[1]
        assert f"another Snakemake (process {first.pid}) is running in this folder" in said
        first.kill()  # the job lives on
        first.wait()
        said = start_words(finished.folder, FAILS).communicate()[1]
        assert f"another run is at work on a job of this one (process {words.split()[1]})" in said
        assert " failed" not in said and log.read_text() == words
    finally:
        os.killpg(first.pid, signal.SIGKILL)
