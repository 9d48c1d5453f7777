"""What a run of the default target says first."""

import pytest

from mmfm.workflow.outlook import duration, outlook


def test_jobs_and_time_are_summed():
    line = outlook(["a.txt", "b.txt"], {"train": 2, "all": 1}, {"train": 90.0})
    assert (
        line
        == "No target was named, so this makes a.txt, b.txt: 3 jobs, about 3.0 min by the estimates of `mmfm scale`."
    )
    assert "depends on the number of images" in outlook(["a.txt"], {"train": 1}, None)


@pytest.mark.parametrize(("seconds", "text"), [(5, "5 s"), (60, "1.0 min"), (5400, "1.5 h"), (172800, "2.0 d")])
def test_durations(seconds, text):
    assert duration(seconds) == text
