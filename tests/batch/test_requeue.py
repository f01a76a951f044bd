"""How a job is run again: by the scheduler's own command, or by the script's."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcmp.batch import Job, requeue, requeue_command

from .fakes import Programs


@pytest.mark.parametrize(
    ("job", "command"),
    [
        (Job("Slurm", "4711"), ["scontrol", "requeue", "4711"]),
        (Job("Slurm", "4711_2", array="4711", task="2"), ["scontrol", "requeue", "4711_2"]),
        (Job("PBS", "12.server"), ["qrerun", "12.server"]),
        (Job("LSF", "7[3]"), ["brequeue", "7[3]"]),
        (Job("Flux", "ƒ2Ab"), None),
        (Job(), None),
    ],
)
def test_each_scheduler_has_its_own_way(job: Job, command: list[str] | None) -> None:
    assert requeue_command(job, {}) == command
    line = "flux batch --dependency=afterany:$FLUX_JOB_ID gpt.sh"
    assert requeue_command(job, {"HPCMP_RESUBMIT": line}) == ["sh", "-c", line]
    assert requeue_command(job, {"HPCMP_RESUBMIT": " "}) == command


def test_what_goes_wrong_is_told_in_a_line(programs: Programs) -> None:
    programs.add("scontrol", "exit 0")
    assert requeue(["scontrol", "requeue", "4711"]) is None
    programs.add("scontrol", "echo 'Requested operation is presently disabled for job 4711' >&2\nexit 1")
    told = "`scontrol requeue 4711`: Requested operation is presently disabled for job 4711"
    assert requeue(["scontrol", "requeue", "4711"]) == told
    assert programs.calls == [["scontrol", "requeue", "4711"]] * 2
    assert "No such file" in str(requeue(["no-such-program", "4711"]))


def test_a_script_s_own_line_is_the_shell_s(
    programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPCMP_RESUBMIT", f"echo $((6 * 7)) > {tmp_path}/answer")
    command = requeue_command(Job("Flux", "ƒ2Ab"))
    assert command is not None and requeue(command) is None
    assert (tmp_path / "answer").read_text() == "42\n"
    assert str(requeue(["sh", "-c", "exit 9"])) == "`exit 9`: exit code 9"
