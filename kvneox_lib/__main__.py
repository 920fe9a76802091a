"""`python -m kvneox_lib`: the proof that model and presses are right, tasks under a press, and the table of presses."""

import argparse
import sys


def verify(arguments) -> int:
    from kvneox_lib.measures.verify import verify

    return verify(arguments.model, arguments.context_length, arguments.smoke)


def presses(arguments) -> int:
    from kvneox_lib.pages.tables import press_table

    print(press_table())
    return 0


def tasks(arguments: list[str]) -> int:
    try:
        from kvneox_lib.measures.command import run

        return run(arguments)
    except (ValueError, ImportError, ConnectionError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def main() -> int:
    if sys.argv[1:2] == ["tasks"]:  # the harness reads its own arguments
        return tasks(sys.argv[2:])
    parser = argparse.ArgumentParser(prog="python -m kvneox_lib", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    about = "check the model against the stock one, and every press against an independent computation"
    command = commands.add_parser("verify", help=about, description=about)
    command.add_argument("--model", default="demo", help="alias, hub id or local folder (default: the bundled demo)")
    command.add_argument("--context-length", type=int, default=400)
    command.add_argument("--smoke", action="store_true", help="192 tokens, and a continuation instead of the matrix")
    command.set_defaults(run=verify)
    commands.add_parser("tasks", help="lm-evaluation-harness under a press; its own arguments, see `tasks --help`")
    commands.add_parser("presses", help="print the table of presses").set_defaults(run=presses)
    arguments = parser.parse_args()
    return arguments.run(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
