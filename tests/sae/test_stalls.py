"""Who hangs, of processes that wait for each other: from reports alone, by the seconds that are said to pass."""

from sae.stalls import BEATS, Report, Stalls

PATIENCE_S = 20.0
BEAT_S = PATIENCE_S / BEATS


def after(stalls: Stalls, beats: int, reports: dict[int, Report]) -> str:
    """What is said after so many beats, in each of which these processes say the same of themselves."""
    said = ""
    for _ in range(beats):
        for process, report in reports.items():
            stalls.heard(process, report)
        said = stalls.wait(BEAT_S)
    return said


def test_the_one_behind_is_named_and_not_those_that_wait_for_it() -> None:
    stalls = Stalls([0, 1, 2], PATIENCE_S)
    where = {0: Report(9, 0, "step 4"), 1: Report(7, 0, "batch 3"), 2: Report(8, 0, "step 3")}
    assert after(stalls, BEATS - 1, where) == ""
    assert after(stalls, 1, where) == "process 1 hangs: no progress for 20 s at batch 3"


def test_of_two_at_one_point_the_one_with_fewer_signs_is_behind() -> None:
    where = {0: Report(9, 1, "batch 4"), 1: Report(9, 0, "batch 4")}
    assert after(Stalls([0, 1], PATIENCE_S), BEATS, where).startswith("process 1 hangs: no progress")


def test_one_that_says_nothing_is_named_even_if_it_was_ahead() -> None:
    stalls = Stalls([0, 1], PATIENCE_S)
    after(stalls, 1, {0: Report(8, 0, "step 3"), 1: Report(9, 0, "step 4")})
    assert after(stalls, BEATS, {0: Report(8, 0, "step 3")}) == "process 1 hangs: no word for 20 s at step 4"


def test_several_hang_or_none_is_behind() -> None:
    same = {i: Report(8, 0, "step 3") for i in range(3)}
    assert after(Stalls([0, 1, 2], PATIENCE_S), BEATS + 1, same) == (
        "no process gets on: no progress for 20 s, all at step 3"
    )
    ahead = same | {0: Report(9, 0, "step 4")}
    assert after(Stalls([0, 1, 2], PATIENCE_S), BEATS + 1, ahead).startswith("processes 1, 2 hang: no progress")


def test_any_progress_and_any_sign_of_work_of_one_is_enough() -> None:
    stalls, others = Stalls([0, 1], PATIENCE_S), {1: Report(50, 0, "step 21")}
    for i in range(5 * BEATS):
        assert after(stalls, 1, others | {0: Report(40, i // 5, "an evaluation")}) == ""
    for i in range(5 * BEATS):
        assert after(stalls, 1, others | {0: Report(41 + i // 5, 0, "a step")}) == ""


def test_the_end_of_a_process_is_no_silence() -> None:
    stalls = Stalls([0, 1, 2], PATIENCE_S)
    after(stalls, 1, {i: Report(8 - i, 0, "step 3") for i in range(3)})
    stalls.gone(2)
    assert after(stalls, BEATS, {0: Report(8, 0, "a"), 1: Report(7, 0, "b")}).startswith("process 1 hangs")


def test_a_watcher_that_was_stopped_itself_blames_nobody() -> None:
    stalls = Stalls([0, 1], PATIENCE_S)
    assert stalls.wait(1000 * PATIENCE_S) == ""
    assert after(stalls, 1, {0: Report(1, 0, "step 1"), 1: Report(1, 0, "step 1")}) == ""
