"""The picture of a run at several sizes and in bad states, and what a terminal and a pipe are left with."""

import io
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console

from sae.metrics import density_histogram
from sae.watch import Screen, live_view

ONE = ("resid_post.12",)
MANY = tuple(f"resid_post.{i}" for i in range(30))
HISTOGRAM = density_histogram(np.repeat([0, 2e-4, 2e-3, 0.02, 0.2], [12, 100, 800, 400, 40]))


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def row(step: int, hook_point: str = ONE[0], **more: Any) -> dict[str, Any]:
    train = {"lr": 1.125e-3, "loss": 0.2312, "fvu": 0.2 + 1 / step, "aux": 0.3, "l0": 32.0, "dead_fraction": 0.004}
    rest = {"dense_fraction": 0.0123, "grad_norm": 0.0213, "tok_s": 8158.2, "eta_s": 31.0}
    return {"step": step, "tokens": 1024 * step, "hook_point": hook_point, **train, **rest, **more}


def screen_for(hook_points: Sequence[str] = ONE, n_steps: int = 586, done: int = 341) -> Screen:
    clock = Clock()
    screen = Screen("train", hook_points, n_steps, 0, 1024, clock)
    for step in range(1, done + 1):
        screen.step(step)
        if step % 20 == 0:
            held_out = {"holdout_fvu": 0.3 - step / 5000, "holdout_density_histogram": HISTOGRAM}
            for name in hook_points:
                screen.row(row(step, name, **(held_out if step % 100 == 0 else {})))
    clock.now += 42.8
    return screen


def draw(screen: Screen, width: int = 80, height: int = 24, encoding: str = "utf-8") -> list[str]:
    file = io.TextIOWrapper(io.BytesIO(), encoding)
    console = Console(file=file, force_terminal=True, color_system=None, width=width, height=height)
    console.print(screen)
    file.seek(0)
    lines = [line.rstrip() for line in file.read().splitlines()]
    return lines[: len(lines) - (lines[-1] == "")]


def test_the_picture() -> None:
    assert draw(screen_for()) == [
        "  train    ━━━━━━━━━━━━━━━━━━━━━━━╸                   341/586 steps  lr 1.12e-03",
        "           349,184/600,064 tok  8,158 tok/s  elapsed 0:00:42  left 0:00:30",
        "",
        "  hook point        FVU    held-out FVU      L0    dead   dense     grad    loss",
        "  resid_post.12  0.2029  0.2400 -0.0200    32.0    0.4%    1.2%   0.0213  0.2312",
        "",
        "  FVU       █▄▄▃▂▂▂▂▂▂▂▁▁▁▁▁▁▁▁▁▁▁▁                   0.2500 to 0.2029",
        "",
        "  density    ▁▁      ██      ▄▄      ▁▁               12 of 1,352 never active",
        "           0.01%   0.1%    1%      10%     100% of tokens",
    ]


def test_a_narrow_terminal_has_what_matters_most() -> None:
    assert draw(screen_for(), width=60) == [
        "  train    ━━━━━━━━━━━━           341/586 steps  lr 1.12e-03",
        "           349,184/600,064 tok  8,158 tok/s  left 0:00:30",
        "",
        "  hook point        FVU    held-out FVU      L0    dead",
        "  resid_post.12  0.2029  0.2400 -0.0200    32.0    0.4%",
        "",
        "  FVU      █▄▂▂▂▂▁▁▁▁▁▁▁          0.2500 to 0.2029",
        "",
        "  density    ▁▁      ██      ▄▄      ▁▁",
        "           0.01%   0.1%    1%      10%     100% of tokens",
    ]


@pytest.mark.parametrize("hook_points", [ONE, MANY, ("resid_post.1+resid_post.2->mlp_out.1+mlp_out.2", "mlp_out.3")])
@pytest.mark.parametrize("height", [3, 6, 10, 24, 50])
@pytest.mark.parametrize("width", [20, 40, 60, 80, 120, 200])
def test_it_fits_any_terminal(hook_points: Sequence[str], width: int, height: int) -> None:
    for screen in (screen_for(hook_points), screen_for(hook_points, done=0), screen_for(hook_points, 10**6, 10)):
        lines = draw(screen, width, height)
        assert max(map(cell_len, lines)) <= width
        assert len(lines) + 1 < max(height, 7), "with the line that the cursor is on"


def test_hook_points_that_do_not_fit_are_counted() -> None:
    lines = draw(screen_for(MANY))
    shown = [line.split()[0] for line in lines if line.startswith("  resid_post.") and len(line) > 20]
    assert shown == list(MANY[: len(shown)])
    assert f"  and {30 - len(shown)} more, in train.jsonl" in lines
    assert len(shown) > 10
    assert len(lines) == 22
    assert lines[-6:-4] == ["", "  resid_post.0"], "whose FVU and density follow"


def test_the_last_picture_has_every_hook_point() -> None:
    screen = screen_for(MANY)
    screen.close()
    assert sum(line.startswith("  resid_post.") for line in draw(screen)) == 30 + 1
    assert not any("more" in line for line in draw(screen))


def test_each_sae_of_a_sweep_has_a_line() -> None:
    names = ("k=16,lr=0.002", "k=32,lr=0.002")
    screen = Screen("train", names, 586, 0, 1024, Clock(), "SAE")
    for name in names:
        screen.row(row(20, sae=name, fvu=0.25 if name == names[0] else 0.125))
    lines = [line.split() for line in draw(screen)]
    assert ["SAE", "FVU"] in [line[:2] for line in lines]
    shown = [line[:2] for line in lines if len(line) > 1 and line[0] in names]
    assert shown == [[names[0], "0.2500"], [names[1], "0.1250"]]


def test_the_cursor_rests_on_an_empty_line() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=24, record=True)
    console.print(screen_for(done=0))
    last = console.export_text().split("\n")[-3:]
    assert [line.strip() for line in last] == [
        f"{ONE[0]}       -               -       -       -       -        -       -",
        "",
        "",
    ]


def test_a_long_name_loses_its_middle() -> None:
    lines = draw(screen_for(("resid_mid.10->mlp_out.10", "resid_mid.11->mlp_out.11")))
    assert [line.split()[0] for line in lines[4:6]] == ["resid_mid...p_out.10", "resid_mid...p_out.11"]


def test_nothing_moves_sideways_while_numbers_change() -> None:
    def edges(step: int, **numbers: float) -> list[int]:
        screen = Screen("train", ONE, 2000, 0, 1024, Clock())
        screen.step(step)
        screen.row(row(step, holdout_fvu=0.5, **numbers))
        lines = draw(screen)
        return [lines[0].index("steps"), lines[1].index(" tok "), *(len(line) for line in lines[3:5])]

    numbers = {"fvu": 1.2, "l0": 2304.0, "dead_fraction": 1.0, "dense_fraction": 0.0, "grad_norm": 1e-5, "loss": 123.0}
    assert edges(1) == edges(999) == edges(1999, **numbers)
    assert draw(screen_for(done=0))[0].index("steps") == draw(screen_for())[0].index("steps")


def test_before_the_first_row_there_are_dashes() -> None:
    lines = draw(Screen("train", ONE, 586, 0, 1024, Clock()))
    assert lines[0].endswith("0/586 steps  lr -")
    assert lines[1] == "                 0/600,064 tok  - tok/s  elapsed 0:00:00  left -"
    assert lines[4].split() == ["resid_post.12", *"-------"]
    assert len(lines) == 5


@pytest.mark.parametrize(
    "bad",
    [
        {},
        {"step": 20},
        {"hook_point": "resid_post.99", "fvu": 0.5},
        {"hook_point": ONE[0], "fvu": None, "loss": float("nan"), "l0": "many", "lr": None, "tok_s": 0.0},
        {"fvu": float("inf"), "holdout_fvu": float("-inf"), "grad_norm": float("inf"), "tok_s": float("nan")},
        {"fvu": 0.0, "step": None},
        {"fvu": -1.0, "step": 10**9},
        {"fvu": 1e30, "loss": -1e30, "l0": 1e12, "grad_norm": 0.0, "step": -1},
        {"holdout_density_histogram": None},
        {"holdout_density_histogram": {"counts": [1, 2]}},
        {"holdout_density_histogram": {"counts": [1], "log10_edges": [0.0, 1.0]}},
        {"holdout_density_histogram": {"counts": [], "log10_edges": []}},
        {"holdout_density_histogram": {"counts": [0, 0], "log10_edges": [-1.0, 0.0]}},
        {"holdout_density_histogram": density_histogram(np.zeros(8))},
    ],
)
def test_a_strange_row_does_no_harm(bad: dict[str, Any]) -> None:
    alone = Screen("train", ONE, 586, 0, 1024, Clock())
    alone.row(bad)
    assert len(draw(alone)) >= 5
    later = screen_for()
    later.row(bad)
    later.row(row(341))
    assert draw(later)[4].startswith("  resid_post.12  0.2029  ")


def test_the_last_evaluation_stays_until_the_next_one() -> None:
    screen = screen_for(done=0)
    for step, held_out, cell in ((10, 0.5, "0.5000"), (20, None, "0.5000"), (30, 0.625, "0.6250 +0.1250")):
        screen.row(row(step, **({} if held_out is None else {"holdout_fvu": held_out})))
        assert f"  {cell}  " in draw(screen)[4]
    screen.row(row(40))
    assert "  0.6250 +0.1250  " in draw(screen)[4]


def test_the_rate_leaves_compiling_out() -> None:
    clock = Clock()
    screen = Screen("train", ONE, 1000, 100, 10, clock)
    clock.now += 60
    screen.step(101)
    assert "- tok/s" in draw(screen)[1]
    clock.now += 2
    screen.step(121)
    assert draw(screen)[1].endswith(" 1,210/10,000 tok  100 tok/s  elapsed 0:01:02  left 0:01:27")
    screen.row(row(121, tok_s=50.0))
    assert draw(screen)[1].endswith("50 tok/s  elapsed 0:01:02  left 0:02:55")


def test_the_curve_is_under_the_bar() -> None:
    screen = Screen("train", ONE, 1000, 400, 1, Clock())
    for step in range(401, 701):
        screen.step(step)
        screen.row(row(step, fvu=1 / step))
    lines = draw(screen, width=200)
    start = lines[0].index("━")
    assert lines[0].rindex("━") + 1 - start == pytest.approx(0.7 * 48, abs=1)
    curve = lines[-1][start : start + 48]
    assert len(curve.rstrip()) == pytest.approx(0.7 * 48, abs=1)
    assert len(curve) - len(curve.lstrip()) == pytest.approx(0.4 * 48, abs=1)
    assert list(curve.strip()) == sorted(curve.strip(), reverse=True)


def test_noise_does_not_fill_the_height() -> None:
    screen = screen_for(done=0)
    for step in range(1, 100):
        screen.row(row(step, fvu=0.2 + 0.001 * (step % 2)))
    assert "█" not in draw(screen)[-1]


def test_the_axis_of_densities_does_not_jump_back() -> None:
    screen = screen_for()
    rare = density_histogram(np.array([1e-6, 0.5]))
    screen.row(row(342, holdout_density_histogram=rare))
    assert draw(screen)[-1].split()[0] == "0.0001%"
    screen.row(row(343, holdout_density_histogram=HISTOGRAM))
    assert draw(screen)[-1].split()[0] == "0.0001%"


def test_a_terminal_without_such_characters_gets_none() -> None:
    lines = draw(screen_for(), encoding="ascii")
    assert all(line.isascii() for line in lines)
    assert lines[4].startswith("  resid_post.12  0.2029")


def test_a_step_and_a_row_cost_microseconds() -> None:
    screen, steps = Screen("train", ONE, 10**6, 0, 1024), 20_000
    start = time.thread_time()  # of this thread alone, whatever else the machine does
    for step in range(1, steps + 1):
        screen.step(step)
    assert (time.thread_time() - start) / steps < 20e-6


def test_elsewhere_than_on_a_terminal_one_line_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    with live_view("train", ONE, 342, 1, 1024) as view:
        for step in (2, 3, 5, 342):
            view.step(step)
            view.row(row(step))
    left = capsys.readouterr().err
    assert left.startswith("  train: 349,184 tok in ")
    assert left.endswith(" tok/s)\n")
    assert left.count("\n") == 1


RUN = """
import sys, time
from sae.watch import live_view
with live_view("train", [f"resid_post.{i}" for i in range(30)], 1000, 0, 1024) as view:
    for step in range(1, 1001):
        view.step(step)
        view.row({"step": step, "hook_point": "resid_post.0", "fvu": 1 / step})
        if step == 400:
            print("result")
            sys.stderr.write("  a note\\n")
            time.sleep(float(sys.argv[1]))
"""


def run_in_terminal(seconds: float, interrupt: bool) -> tuple[str, str, int]:
    """What the terminal was sent, what standard output got, and the exit status."""
    ours, theirs = pty.openpty()
    env = {**os.environ, "COLUMNS": "80", "LINES": "24", "TERM": "xterm-256color"}
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", RUN, str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=env, cwd=root, text=True) as process:
        os.close(theirs)
        sent = b""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # Linux says so when the other end is closed
                break
            if not part:
                break
            sent += part
            if interrupt and b"400/1,000" in sent:
                process.send_signal(signal.SIGINT)
                interrupt = False
        assert process.stdout is not None
        out = process.stdout.read()
    os.close(ours)
    return sent.decode(), out, process.returncode


HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"


def test_a_terminal_keeps_the_last_picture_under_the_notes() -> None:
    sent, out, status = run_in_terminal(1.2, interrupt=False)
    assert status == 0
    assert out == "result\n", "which the picture must not be mixed with"
    assert sent.count(HIDE) == sent.count(SHOW) == 1
    assert "400/1,000 steps" in sent
    last = sent[sent.rindex("train") :]
    assert "1,000/1,000 steps" in last
    assert "more, in train.jsonl" in sent
    assert "more, in train.jsonl" not in last
    assert "resid_post.29" in last
    assert "  a note" in sent[: sent.rindex("train")]


def test_ctrl_c_restores_the_terminal() -> None:
    sent, _, status = run_in_terminal(60, interrupt=True)
    assert status != 0
    assert sent.rindex(SHOW) > sent.rindex(HIDE)
    assert "400/1,000 steps" in sent
    assert sent.rstrip().endswith("KeyboardInterrupt")
