"""Names that are no target: what is wrong with them, and which is meant."""

import re
from dataclasses import replace

import pytest

from mmfm import config
from mmfm.workflow import misspelt, targets
from support.places import DEFAULTS, ROOT

DEMO = config.load([DEFAULTS])


@pytest.mark.parametrize(
    ("typed", "meant", "why"),
    [
        ("dinov2_mode", "dinov2_mode.txt", "must end in .txt or .json"),
        ("dinov2_mode.k4", "dinov2_mode.k4.txt", "must end in .txt or .json"),
        ("dinov2_mode.jsn", "dinov2_mode.json", "must end in .txt or .json"),
        ("dinov2_mode.t4.seed1.txt", "dinov2_mode.seed1.t4.txt", "wrong order"),
        ("dinov2_mode_ag.g1.5.t4.json", "dinov2_mode_ag.t4.g1.5.json", "wrong order"),
        ("dinov2_moed.txt", "dinov2_mode.txt", "'moed' is not a setting"),
        ("dino_class_gmm.t4.txt", "dinov2_class_gmm.t4.txt", "`encoders` has no 'dino'"),
        ("clip_mode.txt", "dinov2_mode.txt", "`encoders` has no 'clip'"),
        ("dinov2_mode.XXL.txt", "dinov2_mode.XL.txt", "'.XXL' is neither a part of a name"),
        ("dinov2_mode.XXL.t4.k9.txt", "dinov2_mode.XL.k9.t4.txt", "wrong order"),
        ("dinov2_mode.t4.step60.k9.txt", "dinov2_mode.k9.step60.t4.txt", "wrong order"),
        ("dinov2_mode.step60", "dinov2_mode.step60.txt", "must end in .txt or .json"),
        ("dinov2_mode.step0.json.txt", None, "before the first step"),
        ("dinov2_mode.t0.txt", None, "'.t0' has no time point"),
        ("dinov2_mode.k0.txt", None, "'.k0' is a mixture without modes"),
        ("dinov2_mode.t4.t5.txt", None, "twice"),
        ("dinov2_uncond.t4.k4.txt", None, "has no mixture"),
        ("readme", None, "not an encoder with a setting"),
        ("dinov2_moed.seeds5.txt", "dinov2_mode.seeds5.txt", "'moed' is not a setting"),
        ("dinov2_mode.k9.seeds5.txt", "dinov2_mode.seeds5.k9.txt", "wrong order"),
        ("dinov2_mode.t4.seeds1.txt", None, "'.seeds1' has no range"),
        ("dinov2_mode.seed1.seeds5.txt", None, "twice"),
    ],
)
def test_a_wrong_name_is_explained_and_corrected(typed, meant, why):
    message = misspelt.explain_unknown(f"results/fid/{typed}", "results", DEMO)
    assert why in message and "(see README.md#what-it-does)" in message
    assert (f"(did you mean 'results/fid/{meant}'?)" in message) if meant else ("did you mean" not in message)
    assert f"did you mean 'results/fid/{typed}'" not in message


@pytest.mark.parametrize(
    ("kind", "typed", "meant", "why"),
    [
        ("memorisation", "dinov2_moed.png", "dinov2_mode.png", "'moed' is not a setting"),
        ("memorisation", "dinov2_mode.txt", "dinov2_mode.png", "must end in .png or .json"),
        ("memorisation", "dinov2_mode.seeds5.png", "dinov2_mode.png", "'.seeds5' is neither a part of a name"),
        ("mode_quality", "dinov2_mode.t4.k9.txt", "dinov2_mode.k9.t4.txt", "wrong order"),
        ("mode_quality", "dinov2_mode.pgn", "dinov2_mode.png", "must end in .png, .txt or .json"),
        ("curve", "dinov2_moed.t5,10.txt", "dinov2_mode.t5,10.txt", "'moed' is not a setting"),
        ("curve", "dinov2_mode_ag.g1,1.5.k9", "dinov2_mode_ag.k9.g1,1.5.png", "wrong order"),
        ("curve", "dinov2_mode.t5.png", None, "no part of it lists values"),
        ("curve", "dinov2_mode.t5,x,.png", None, "'.t5,x,' lists 'x' and '', which is not a number"),
        ("curve", "dinov2_uncond.k8,9.png", None, "has no mixture"),
        ("reconstruction", "dino.json", "dinov2.json", "`encoders` has no 'dino', it has dinov2"),
        ("reconstruction", "dinov2_mode.txt", "dinov2.txt", "`encoders` has no 'dinov2_mode'"),
        ("reconstruction", "dinov2", "dinov2.txt", "must end in .txt, .json or .png"),
        ("reconstruction", "dinov2.pgn", "dinov2.png", "must end in .txt, .json or .png"),
    ],
)
def test_so_are_names_of_other_results(kind, typed, meant, why):
    message = misspelt.explain_unknown(f"results/{kind}/{typed}", "results", DEMO)
    assert why in message and f"\nTargets are results/{kind}/{{dinov2" in message
    assert (f"(did you mean 'results/{kind}/{meant}'?)" in message) if meant else ("did you mean" not in message)


@pytest.mark.parametrize(
    ("run", "typed", "said"),
    [
        ("", "results/imagenet256/fid/x.txt", "`run: imagenet256`, pass it with --configfile (this one has no `run`)"),
        ("flowers", "results/fid/dinov2_mode.txt", "did you mean 'results/flowers/fid/dinov2_mode.txt'"),
        ("flowers", "results/flower/fid/dinov2_mode.t4", "did you mean 'results/flowers/fid/dinov2_mode.t4.txt'"),
        ("flowers", "results/birds/fid/x.txt", "`run: birds`, pass it with --configfile (this one has `run: flowers`)"),
        ("flowers", "results/comparison.txt", "of this configuration is results/flowers/comparison.txt"),
        ("", "results/flowers/comparison.html", "`run: flowers`, pass it with --configfile (this one has no `run`)"),
    ],
)  # fmt: skip
def test_results_of_another_run_are_said_to_be_so(run, typed, said):
    results = f"results/{run}" if run else "results"
    message = misspelt.explain_unknown(typed, results, replace(DEMO, run=run))
    assert said in message and f"did you mean '{typed}'" not in message


def test_a_name_of_several_seeds_stands_for_their_results():
    complete = [str(variant) for variant in targets.parse_seeds(".seeds3.k9.step60", "mode", DEMO)]
    assert complete == [f"seed{i}.tiny.k9.step60.t25" for i in range(3)]
    found = targets.parse_targets("results/fid/dinov2_mode_ag.seeds2.t4.txt", DEMO)
    assert [(target.guided, target.variant.seed, target.variant.t) for target in found] == [(True, 0, 4), (True, 1, 4)]
    (one,) = targets.parse_targets("results/fid/dinov2_mode.seed3.txt", DEMO)
    assert one.variant.seed == 3
    with pytest.raises(ValueError, match=r"sums up the results of several seeds; name one of them"):
        targets.parse_target("results/fid/dinov2_mode.seeds2.txt", DEMO)
    with pytest.raises(ValueError, match=r"has no mixture; leave out '\.k4'"):
        targets.parse_seeds(".seeds2.k4", "uncond", DEMO)


def test_the_documents_of_errors_exist():
    """Files and headings, as GitHub links to them."""
    named = {stage.document for stage in config.STAGES.values()} | {targets.DOCUMENT}
    named |= {
        "config/README.md",
        "docs/your-own-data.md",
        "README.md#changing-stopping-resuming",
        "docs/scale.md",
    }  # rules/common.smk, failure.py
    for document in named:
        path, _, anchor = document.partition("#")
        lines = (ROOT / path).read_text().splitlines()
        headings = [line.lstrip("# ").lower().replace(" ", "-").replace(",", "") for line in lines if line[:1] == "#"]
        assert not anchor or anchor in headings, document


def test_a_name_of_a_curve_stands_for_its_points():
    part, found = targets.parse_curve("results/curve/dinov2_mode_ag.k9.t5,10.g1.5.png", DEMO)
    assert part == "t" and all(target.guided for target in found)
    assert [str(target.variant) for target in found] == ["seed0.tiny.k9.t5.g1.5", "seed0.tiny.k9.t10.g1.5"]
    part, found = targets.parse_curve("dinov2_mode_ag.g1,1.5,2", DEMO)
    assert part == "g" and [target.variant.g for target in found] == [1.0, 1.5, 2.0]
    asked = targets.parse_targets("results/curve/dinov2_mode.step31,62.t4.txt", DEMO)
    assert [target.variant.step for target in asked] == [31, 62]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dinov2_mode.t5", "no part of it lists values; let exactly one of .t, .step, .g and .k do so"),
        ("dinov2_mode.k8,9.t5,6", "'.k8,9' and '.t5,6' of it lists values"),
        ("dinov2_mode.t5,05", "'.t5,05' has a value twice"),
        ("dinov2_uncond.k8,9", "the setting 'uncond' has no mixture; leave out '.k8'"),
        ("dinov2_moed.t5,6", "'dinov2_moed.t5.txt' is not a result .did you mean 'dinov2_mode.txt'"),
        ("dinov2_mode.g1,2", "trained without label dropout"),
    ],
)
def test_what_is_no_curve_is_explained(name, message):
    with pytest.raises(ValueError, match=message):
        targets.parse_curve(name, DEMO)


@pytest.mark.parametrize(
    ("name", "complete"),
    [
        ("mode.seed0.tiny.k256.t25", True),
        ("mode_ag.seed10.tiny.k256.step60.t25.g1.5", True),
        ("mode_ag.seed10.tiny.k256.t25.g0.05", True),
        ("mode.seed00.tiny.k256.t25", False),
        ("mode.seed0.tiny.k0256.t25", False),
        ("mode.seed0.tiny.k256.t025", False),
        ("mode_ag.seed0.tiny.k256.t25.g1.50", False),
        ("mode_ag.seed0.tiny.k256.t25.g01", False),
    ],
)
def test_a_number_written_otherwise_makes_no_second_training(name, complete):
    """It is a short name, which is completed to the usual one."""
    assert bool(re.fullmatch(targets.complete_pattern(DEMO), name)) is complete
