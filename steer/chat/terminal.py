"""A chat on a terminal, or over lines of standard input.

Flow: 1. read a line; 2. carry it out, or print an answer as it is written; 3. say a mistake in one line, and go on.

Ctrl-C stops an answer, which is kept as far as it came; Ctrl-D, or the end of the input, ends the chat. On a terminal
there are line editing, a history, and completion of commands and names (readline). Side by side, steered and unsteered
text grow in two columns.
"""

import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from activations.errors import SaekitError
from steer.chat import commands
from steer.chat.commands import COMMANDS, Command, help_text, parse
from steer.chat.session import Chat, summary
from steer.chat.state import Turn, doses_together, open_pieces
from steer.library import load_library
from steer.show import WIDEST

PROMPT = "> "
NARROWEST = 60
"""columns that two answers side by side need"""


def converse(chat: Chat) -> None:
    """Talk until the input ends."""
    console = Console(highlight=False)
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        _edit_lines(chat)
        console.print(f"{_steering_line(chat)} /help lists the commands, Ctrl-D ends.", style="dim", markup=False)
    note = ""
    while True:
        try:
            if note:
                console.print(note, style="dim")
                note = ""
            line = input(PROMPT if is_terminal else "")
            if line.strip():
                _carry_out(chat, parse(line), console)
        except EOFError:
            console.print() if is_terminal else None
            return
        except KeyboardInterrupt:
            # Printed in the next round, where another Ctrl-C is caught too.
            note = "\n(Ctrl-D ends the chat)"
        except SaekitError as error:
            console.print(f"! {' '.join(str(error).split())}", style="red", markup=False, soft_wrap=True)


def _carry_out(chat: Chat, command: Command, console: Console) -> None:
    match command:
        case commands.Say(text):
            _print_answer(chat, chat.say(text), chat.state.compares, console)
        case commands.Compare(None):
            _print_answer(chat, chat.retry(compares=True), True, console)
        case commands.Compare(str(text)):
            _print_answer(chat, chat.say(text, compares=True), True, console)
        case commands.Retry():
            _print_answer(chat, chat.retry(), chat.state.compares, console)
        case commands.Help():
            console.print(help_text(), markup=False, soft_wrap=True)
        case commands.Vectors():
            _print_table(_vector_rows(chat), "no vectors: /load LIBRARY", console)
        case commands.Show():
            _print_table(_steering_rows(chat), "nothing steers", console)
            for line in [*_joint_lines(chat), *_setting_lines(chat), *_gate_lines(chat)]:
                console.print(line, markup=False, soft_wrap=True)
        case _:
            chat.apply(command)
            console.print(_said(chat, command), style="dim", markup=False, soft_wrap=True)


def _said(chat: Chat, command: Command) -> str:
    """What a command has led to."""
    match command:
        case commands.Undo():
            return f"{len(chat.state.turns)} questions in the conversation."
        case commands.Save(path):
            return f"{len(chat.state.turns)} answers in {path}."
        case commands.Load():
            return f"{len(_vector_rows(chat))} vectors; /vectors lists them."
        case commands.CompareAll(is_on):
            return "Answers come beside the unsteered model's." if is_on else "Answers come alone."
        case commands.System() | commands.Temperature() | commands.Seed() | commands.Tokens():
            return " ".join(_setting_lines(chat))
    return _steering_line(chat)


# --- answers ---------------------------------------------------------------------------------------------------------


def _print_answer(chat: Chat, pieces: Iterator[list[str]], compares: bool, console: Console) -> None:
    before = chat.state.turns
    # The iterator keeps what it has when it is closed, so also where Ctrl-C comes while a piece is printed.
    with suppress(KeyboardInterrupt), closing(pieces):  # pyright: ignore[reportArgumentType]
        if compares:
            _print_columns(pieces, console)
        else:
            _print_stream(pieces, console)
    turn = None if chat.state.turns is before else chat.state.turns[-1]
    if turn is not None and compares:
        console.print(_columns(turn.answer, turn.unsteered or ""))
    if turn is None or not turn.is_whole:
        console.print("(stopped)", style="dim")
    console.print()


def _print_stream(pieces: Iterator[list[str]], console: Console) -> None:
    has_begun = False
    try:
        for (piece,) in pieces:
            shown = piece if has_begun else piece.lstrip()
            has_begun = has_begun or bool(shown)
            console.file.write(shown)
            console.file.flush()
    finally:
        console.file.write("\n")


def _print_columns(pieces: Iterator[list[str]], console: Console) -> None:
    """Both columns while they grow, on a terminal only; what is final is printed by the caller."""
    texts = ["", ""]
    with Live(console=console, transient=True, auto_refresh=False) as live:
        for step in pieces:
            texts = [text + piece for text, piece in zip(texts, step, strict=True)]
            if console.is_terminal:
                live.update(_columns(*texts), refresh=True)


def _columns(steered: str, unsteered: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), expand=True, header_style="dim")
    for title in ("steered", "unsteered"):
        table.add_column(title, ratio=1, min_width=NARROWEST // 2)
    table.add_row(Text(steered.strip()), Text(unsteered.strip()))
    return table


# --- what there is, and what steers ----------------------------------------------------------------------------------


def _vector_rows(chat: Chat) -> list[dict[str, str]]:
    rows = {}
    for library in reversed(chat.libraries):
        for name, vector in load_library(library).items():
            effect = vector.receipts[-1].get("effect") if vector.receipts else None
            window = vector.window
            rows[name] = {
                "name": name,
                "hook point": vector.hook_point,
                "operation": vector.operation,
                "dose": f"{vector.dose(vector.coefficient):.2f}",
                "window": "-" if window is None else " to ".join(f"{end / vector.mean_norm:+.2f}" for end in window),
                "effect": "-" if effect is None else f"{effect:+.3f}",
            }
    return list(rows.values())


def _steering_rows(chat: Chat) -> list[dict[str, str]]:
    rows = []
    for row in summary(chat.state):
        gate = row["gate"]
        is_share = row["operation"] == "ablate"
        levels = (", ".join(row["own_gate"]) or "-") if gate is None else _levels(gate)
        dose = "-" if is_share else f"{row['dose'] if row['coefficient'] >= 0 else -row['dose']:+.2f}"
        rows.append(
            {
                "name": row["name"],
                "hook point": row["hook_point"],
                "operation": row["operation"],
                "dose": dose,
                "coefficient": f"{row['coefficient']:+.3g}",
                "scope": row["scope"],
                "gate": levels,
            }
        )
    return rows


def _levels(gate: dict[str, Any]) -> str:
    off = "" if gate["off"] is None else f", shut at {gate['off']:g}"
    return f"open above {gate['on']:g}{off}" + (f", {gate['tokens']} tokens or more" if gate["tokens"] > 1 else "")


def _steering_line(chat: Chat) -> str:
    parts = []
    for row in _steering_rows(chat):
        how = f"{row['operation']} {row['dose'] if row['dose'] != '-' else row['coefficient']}"
        scope = "" if row["scope"] == "all" else f", on {row['scope']}"
        parts.append(f"{row['name']} ({how}{scope}{'' if row['gate'] == '-' else ', gated'})")
    return f"Steered by {', '.join(parts)}." if parts else "Not steered."


def _joint_lines(chat: Chat) -> list[str]:
    return [f"joint dose at {point}: {dose:.2f}" for point, dose in doses_together(chat.state.steers).items()]


def _setting_lines(chat: Chat) -> list[str]:
    how = chat.state.sampling
    system = "" if how.system is None else f", system message {how.system!r}"
    return [f"temperature {how.temperature:g}, seed {how.seed}, at most {how.max_new_tokens} tokens{system}"]


def _gate_lines(chat: Chat) -> list[str]:
    turn: Turn | None = chat.state.turns[-1] if chat.state.turns else None
    lines = []
    for gate, indices in (turn.fired if turn is not None else {}).items():
        assert turn is not None
        n, parts = sum(index >= turn.n_prompt for index in indices), open_pieces(turn, gate)
        words = ": " + ", ".join(repr(part) for part in parts) if parts else ""
        before = f", and on {len(indices) - n} of the {turn.n_prompt} in front of it"
        lines.append(f"gate of {gate}: open on {n} of the last answer's {len(turn.pieces)} tokens{before}{words}")
    return lines


def _print_table(rows: list[dict[str, str]], empty: str, console: Console) -> None:
    if not rows:
        console.print(empty, markup=False)
        return
    table = Table(*rows[0], box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*map(Text, row.values()))
    wide = Console(file=console.file, highlight=False, soft_wrap=True, width=WIDEST)
    wide.width = wide.measure(table).maximum  # wider than the terminal, if it must: no cell loses its end
    wide.print(table)


def _edit_lines(chat: Chat) -> None:
    """Line editing, a history of this session, and completion, where the system has them."""
    try:
        import readline
    except ImportError:  # Windows
        return

    def completed(text: str, n: int) -> str | None:
        line = readline.get_line_buffer()
        if " " not in line:
            found = [f"/{name} " for name in COMMANDS if f"/{name}".startswith(line)]
        else:
            found = [row["name"] for row in _vector_rows(chat) if row["name"].startswith(text)]
        return found[n] if line.startswith("/") and n < len(found) else None

    readline.set_completer_delims(" ")
    readline.set_completer(completed)
    readline.parse_and_bind("tab: complete")
